"""RLOO, reinforcement learning with each answer's fellows as its baseline, with TRL and a low-memory optimizer.

    python scripts/rloo.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl-lib/DeepMath-103K \
        --reward_funcs accuracy_reward \
        --dtype bfloat16 \
        --optim slim_adamw_8bit \
        --optim_args rounding=kahan \
        --learning_rate 1e-6 \
        --output_dir Qwen2.5-0.5B-rloo

Data and rewards are as in grpo.py. Without LoRA a second copy of the model is kept as the reference, unless `--beta`
is 0. Models, data files and several processes are as in sft.py. All options: `python scripts/rloo.py --help`.
"""

from hf_lowmem.trainer.trl_script import main

if __name__ == "__main__":
    main("rloo")
