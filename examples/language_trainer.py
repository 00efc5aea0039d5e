"""A language model with Transformers' Trainer: checkpoints of the adapter alone, evaluations of the merged model.

python examples/language_trainer.py
"""

from stand_ins import language_model, tokens
from transformers import Trainer, TrainingArguments

from reslora_kernels import ResLoRAConfig, apply_reslora, export_peft, merge_reslora, save_adapter
from reslora_kernels.training import AdapterCheckpoints, ResLoRACallback


class ResLoRATrainer(AdapterCheckpoints, Trainer):
    """The Trainer, with checkpoints that hold the adapter instead of the model."""


model = language_model()
model.save_pretrained("base")
apply_reslora(model, ResLoRAConfig(r=8, lora_alpha=16, shortcut="input"))
rows = [{"input_ids": row, "labels": row} for row in tokens()]
train, held_out = rows[:48], rows[48:]
calibration = [{"input_ids": row["input_ids"][None]} for row in train[:16]]

arguments = TrainingArguments(
    "checkpoints",
    max_steps=20,
    learning_rate=5e-3,
    eval_strategy="steps",
    eval_steps=10,
    save_steps=10,
    save_total_limit=2,
    report_to=[],
)
callback = ResLoRACallback(evaluate="merged", calibration=calibration)
trainer = ResLoRATrainer(model, arguments, train_dataset=train, eval_dataset=held_out, callbacks=[callback])
trainer.train()  # resume_from_checkpoint=True goes on from the last checkpoint

save_adapter(model, "adapter")
unmerged = trainer.evaluate()["eval_loss"]
print(merge_reslora(model, calibration=calibration))
print(f"held-out loss {unmerged:.4f}, merged {trainer.evaluate()['eval_loss']:.4f}")
print(export_peft(model, "peft-adapter"))
