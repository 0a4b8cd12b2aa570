"""Distillation of a teacher model into a smaller one, on the smaller one's own answers, with a low-memory optimizer.

    python scripts/distillation.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --teacher_model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback-prompt \
        --dtype bfloat16 \
        --optim slim_adamw_8bit \
        --learning_rate 2e-5 \
        --output_dir Qwen2.5-0.5B-distillation

The data has the column `prompt`, a text or a conversation. Both models are in memory, and share one vocabulary: the
smaller one answers, and learns at every token what the teacher would have said. Models, data files and several
processes are as in sft.py. All options: `python scripts/distillation.py --help`.
"""

from hf_lowmem.trainer.trl_script import main

if __name__ == "__main__":
    main("distillation")
