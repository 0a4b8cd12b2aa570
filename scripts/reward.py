"""A reward model from preference pairs, with TRL and a low-memory optimizer.

    python scripts/reward.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized \
        --dtype bfloat16 \
        --optim slim_adamw_8bit \
        --optim_args rounding=kahan \
        --learning_rate 1e-5 \
        --output_dir Qwen2.5-0.5B-reward

The data has the columns `chosen` and `rejected`: texts, or conversations; `prompt` may hold what both begin with. The
model becomes a sequence classifier with one label, which `--reward_model_name_or_path` of grpo.py and rloo.py takes.
With LoRA (`--use_peft`) the new head is trained, too. Models, data files and several processes are as in sft.py. All
options: `python scripts/reward.py --help`.
"""

from hf_lowmem.trainer.trl_script import main

if __name__ == "__main__":
    main("reward")
