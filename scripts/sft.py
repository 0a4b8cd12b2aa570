"""Supervised fine-tuning with TRL and a low-memory optimizer.

    python scripts/sft.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B \
        --dataset_name trl-lib/Capybara \
        --dtype bfloat16 \
        --optim slim_adamw_8bit \
        --optim_args rounding=kahan \
        --learning_rate 2e-5 \
        --output_dir Qwen2.5-0.5B-sft

The data has the column `text`, or `messages`, or `prompt` and `completion`. The model is a hub id or a local folder;
the dataset is a hub id, a local folder, or a .jsonl, .json, .csv or .parquet file. On several processes: `hf-lowmem
sft --num_processes 2 ...`, or `accelerate launch scripts/sft.py ...`; without a GPU: `--use_cpu true`. All options:
`python scripts/sft.py --help`. Options for models of 0.5B, 1.5B and 8B on one GPU, with the memory that they are
planned to take: `scripts/recipes/`, given as `--config FILE`.
"""

from hf_lowmem.trainer.trl_script import main

if __name__ == "__main__":
    main("sft")
