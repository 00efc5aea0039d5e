"""``reslora finetune``: fine-tune a Transformers model on your data."""

from reslora_kernels.cli.finetune.command import finetune

__all__ = ["finetune"]
