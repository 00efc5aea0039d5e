"""Training with Transformers' Trainer: checkpoints that hold the adapters instead of the whole base model."""

from __future__ import annotations

from typing import Any

from .adapters import load_adapter, save_adapter


class AdapterCheckpoints:
    """Mixin for ``transformers.Trainer``: saves, resumes and restores the adapters alone.

        class ResLoRATrainer(AdapterCheckpoints, Trainer):
            pass

    A checkpoint folder then holds what ``save_adapter`` writes, next to the optimizer, the scheduler, the random state
    and the Trainer's own state, so it can be given to ``load_adapter`` as it is. The base model is not in it.
    """

    args: Any
    model: Any
    state: Any

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            save_adapter(self.model, output_dir if output_dir is not None else self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(model if model is not None else self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_adapter(self.model, self.state.best_model_checkpoint)
