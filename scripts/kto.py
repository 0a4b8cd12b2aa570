"""KTO, alignment with answers that are labelled good or bad, with TRL and a low-memory optimizer.

    python scripts/kto.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl-lib/kto-mix-14k \
        --dtype bfloat16 \
        --optim slim_adamw_8bit \
        --optim_args rounding=kahan \
        --learning_rate 5e-7 \
        --output_dir Qwen2.5-0.5B-kto

The data has the columns `prompt`, `completion` and `label` (true or false): texts, or conversations. A batch holds at
least two rows per device. Without LoRA a second copy of the model is kept as the reference. Models, data files and
several processes are as in sft.py. All options: `python scripts/kto.py --help`.
"""

from hf_lowmem.trainer.trl_script import main

if __name__ == "__main__":
    main("kto")
