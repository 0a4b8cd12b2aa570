"""Direct preference optimization with TRL and a low-memory optimizer.

    python scripts/dpo.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized \
        --dtype bfloat16 \
        --optim slim_adamw_8bit \
        --optim_args rounding=kahan \
        --learning_rate 5e-7 \
        --output_dir Qwen2.5-0.5B-dpo

The data has the columns `chosen` and `rejected`, and `prompt` unless both begin with it: texts, or conversations.
Without LoRA a second copy of the model is kept as the reference; `--precompute_ref_log_probs` saves it. Models, data
files and several processes are as in sft.py. All options: `python scripts/dpo.py --help`.
"""

from hf_lowmem.trainer.trl_script import main

if __name__ == "__main__":
    main("dpo")
