"""Training: Transformers' Trainer, optimizers' parameter groups, schedules of ranks and restarts, many processes."""

from .trainer import STATISTICS_NAME, AdapterCheckpoints, ResLoRACallback

__all__ = ["STATISTICS_NAME", "AdapterCheckpoints", "ResLoRACallback"]
