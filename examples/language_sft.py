"""Supervised fine-tuning with TRL: SFTTrainer trains the adapted model as it trains any other.

python examples/language_sft.py
"""

from datasets import Dataset
from stand_ins import language_model, questions, tokenizer
from trl import SFTConfig, SFTTrainer

from reslora_kernels import ResLoRAConfig, apply_reslora, export_peft
from reslora_kernels.training import AdapterCheckpoints


class ResLoRATrainer(AdapterCheckpoints, SFTTrainer):
    """SFTTrainer, with checkpoints that hold the adapter instead of the model."""


model = language_model()
apply_reslora(model, ResLoRAConfig(r=8, lora_alpha=16, shortcut="block", pre_num=2))  # and no peft_config below
arguments = SFTConfig(
    "checkpoints",
    max_steps=10,
    learning_rate=5e-3,
    completion_only_loss=True,
    save_steps=10,
    bf16=False,
    gradient_checkpointing_kwargs={"use_reentrant": False},
    report_to=[],
)
trainer = ResLoRATrainer(model, arguments, train_dataset=Dataset.from_list(questions()), processing_class=tokenizer())
trainer.train()
print(export_peft(model, "peft-adapter"))  # block merges exactly, without data
