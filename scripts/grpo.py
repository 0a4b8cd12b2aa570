"""GRPO, reinforcement learning that compares groups of answers, with TRL and a low-memory optimizer.

    python scripts/grpo.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl-lib/DeepMath-103K \
        --reward_funcs accuracy_reward \
        --dtype bfloat16 \
        --optim slim_adamw_8bit \
        --optim_args rounding=kahan \
        --learning_rate 1e-6 \
        --output_dir Qwen2.5-0.5B-grpo

The data has the column `prompt`, a text or a conversation, and whatever the reward asks for: `accuracy_reward` reads
`solution` (and needs `pip install math-verify`). A reward is TRL's own by name, a function `my_module.my_function`
(which may lie in the current folder), or a reward model (`--reward_model_name_or_path`). With `--beta` above 0 and
without LoRA a second copy of the model is kept as the reference. Models, data files and several processes are as in
sft.py. All options: `python scripts/grpo.py --help`.
"""

from hf_lowmem.trainer.trl_script import main

if __name__ == "__main__":
    main("grpo")
