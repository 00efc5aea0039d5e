"""Training with Transformers' Trainer: checkpoints of the adapters alone, statistics that survive a restart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from ..adapt.checkpoints import beside, trained_beside
from ..adapt.record import adapted_layers, is_adapted, record_of, root_of
from ..config import MergeMethod
from ..dtensors import initialised, is_sharded, under_zero3
from ..files.adapter_format import write_durably
from ..files.save_load import load_adapter, refuse_unsaved, save_adapter
from ..layers.adapter import AdapterLayer
from ..merge.merging import merge_reslora, unmerge_reslora
from ..merge.statistics import Statistics, collect_statistics

STATISTICS_NAME = "reslora_statistics.safetensors"


class AdapterCheckpoints:
    """Mixin for ``transformers.Trainer``: saves, resumes and restores the adapters alone.

        class ResLoRATrainer(AdapterCheckpoints, Trainer):
            pass

    A checkpoint folder, and one that ``save_model`` writes, holds what the Trainer puts there with the adapters in the
    place of the model: the tokenizer or processor, the arguments, and in a checkpoint the optimizer, the scheduler, the
    random state and the Trainer's own state. It can be given to ``load_adapter`` as it is.

    The frozen weights may be quantised (NF4, int8, torchao).
    """

    args: Any
    data_collator: Any
    model: Any
    processing_class: Any
    state: Any
    callback_handler: Any

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        with _adapters_on_top(model):
            super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        if kwargs.get("ref_model") is None and not any(isinstance(given, nn.Module) for given in args):
            _refuse_bare_reference(self.model, getattr(self, "ref_model", None))
        if self.args.save_strategy != "no" and is_adapted(self.model):
            try:  # now, not at the first checkpoint
                refuse_unsaved(self.model)
                beside(self.model)
            except ValueError as error:
                raise ValueError(f"AdapterCheckpoints could not save this model: {error}") from None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's."""
        if is_adapted(self.model):  # compiled, it would not be seen
            record_of(self.model).kept |= trained_beside(root_of(self.model))
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:  # an exception ends it too
            for callback in getattr(getattr(self, "callback_handler", None), "callbacks", ()):
                if isinstance(callback, ResLoRACallback):
                    callback.detach()

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """As the Trainer's, without gates, which weight decay would close."""
        names: list[str] = super().get_decay_parameter_names(model)  # type: ignore[misc]
        return [name for name in names if not name.endswith(".lora_gates")]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's. A sharded model is gathered from all processes, which all come here."""
        if is_sharded(self.model) or under_zero3(self.model):
            self._save_adapters(output_dir)
        else:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if _internal_call and output_dir is not None:  # a checkpoint; its last file is the Trainer's state
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ResLoRACallback):
                    callback.write_statistics(self.args, Path(output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self._save_adapters(output_dir)

    def _save_adapters(self, output_dir: str | None) -> None:
        folder = save_adapter(self.model, output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if processing is not None:
                processing.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(model if model is not None else self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Asked in every resumed run; the one above is not with DeepSpeed, which loads what it has saved."""
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ResLoRACallback):
                callback.resume_from = None if checkpoint is None else Path(checkpoint)

    def _load_best_model(self) -> None:
        if under_zero3(self.model):
            super()._load_best_model()  # type: ignore[misc]
        else:
            load_adapter(self.model, self.state.best_model_checkpoint)


@contextmanager
def _adapters_on_top(model: Any) -> Iterator[None]:
    """The Trainer refuses a model that is quantised and nothing else; adapters it knows by PEFT's class alone.

    While it is made, and for this it asks then and for nothing else, an adapted model says that it is not quantised.
    """
    if not getattr(model, "is_quantized", False) or not is_adapted(model):
        yield
        return
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True


def _refuse_bare_reference(model: Any, reference: Any) -> None:
    """ValueError if TRL has made ``reference`` of the base model's files, and ``model`` is not the base model."""
    if not isinstance(reference, nn.Module) or is_adapted(reference):
        return
    layers: list[Any] = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    if any(bool(layer.adapter_parameters()[layer.zero_at_start].detach().any()) for layer in layers):
        raise ValueError(
            "ref_model would be the base model, without the adapters that model begins with: they would differ at the "
            "first step. Give ref_model=copy.deepcopy(model). Where the trainer takes none (GRPO), train through PEFT "
            "(reslora_kernels.peft.from_native), or merge and train a new adapter"
        )


class ResLoRACallback:
    """Callback of ``transformers.Trainer``: gathers the statistics that merging needs, from the training steps.

        callback = ResLoRACallback(evaluate="merged", method="input")
        trainer = ResLoRATrainer(model=model, callbacks=[callback], ...)
        trainer.train()
        merge_reslora(model, "input", statistics=callback.statistics)

    They are saved with every checkpoint, in ``reslora_statistics.safetensors``, and training that is resumed goes on
    from them. Of several processes the first gathers; a merged evaluation uses its statistics in all of them.

    Args:
        evaluate: "unmerged", or "merged": the evaluations during training see the merged model, on one data set. The
            weights are restored after each, bit for bit. That before the first step (``eval_on_start``) is unmerged.
        method: how to merge then, as for ``merge_reslora``.
        calibration: batches to merge with instead of the statistics; re-iterable.
        second_moments: gather those too, as "least_squares" needs (see ``collect_statistics`` for the memory).

    Attributes:
        statistics: what was gathered, from the beginning of training on.
    """

    def __new__(cls, *_: Any, **__: Any) -> ResLoRACallback:
        from transformers import TrainerCallback  # asked for here, so that this module needs torch alone

        if not issubclass(cls, TrainerCallback):
            cls = type(cls.__name__, (cls, TrainerCallback), {})
        return object.__new__(cls)

    def __init__(
        self,
        *,
        evaluate: str = "unmerged",
        method: MergeMethod | None = None,
        calibration: Iterable[Any] | None = None,
        second_moments: bool = False,
    ) -> None:
        if evaluate not in ("unmerged", "merged"):
            raise ValueError(f"evaluate must be 'unmerged' or 'merged', got {evaluate!r}")
        if method is not None and method not in get_args(MergeMethod):
            raise ValueError(f"method must be None or one of {', '.join(get_args(MergeMethod))}, got {method!r}")
        if calibration is not None and iter(calibration) is calibration:
            raise ValueError(f"calibration must be re-iterable, a list say, got {type(calibration).__name__}")
        self.evaluate, self.method, self.calibration = evaluate, method, calibration
        self.second_moments = second_moments
        self.statistics: Statistics | None = None
        self.resume_from: Path | None = None
        self._merged = False
        self._observed: list[AdapterLayer] = []
        self._written_to: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self._written_to = None
        self.detach()
        with collect_statistics(model, second_moments=self.second_moments) as self.statistics:
            pass  # made here, attached to the layers from step to step
        if state.global_step:
            folder = self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.statistics.load_state_dict(_read(folder / STATISTICS_NAME))

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self._unmerge(model)
        if args.process_index == 0 and self.statistics is not None:
            for name, layer in adapted_layers(model).items():
                layer.observer = self.statistics.layers[name]
                self._observed.append(layer)

    def detach(self) -> None:
        """Stop to observe the layers, between steps and after one that was cut off."""
        for layer in self._observed:
            layer.observer = None
        self._observed = []

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self.detach()
        self._merge_for_evaluation(model, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self._merge_for_evaluation(model, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, *, model: Any, metrics: Any, **_: Any) -> None:
        several = self._merged and "eval_runtime" not in metrics  # the Trainer puts their names into the keys
        self._unmerge(model)
        if several:
            raise ValueError("evaluate='merged' needs one evaluation data set, got several; evaluate them unmerged")

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self._unmerge(model)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._written_to != folder:  # without AdapterCheckpoints
            self.write_statistics(args, folder)

    def write_statistics(self, args: Any, folder: Path) -> None:
        """Into ``folder``, from the first process."""
        from safetensors.torch import save

        if args.process_index == 0 and self.statistics is not None:
            write_durably(folder / STATISTICS_NAME, save(self.statistics.state_dict()))
        self._written_to = folder

    def _merge_for_evaluation(self, model: Any, control: Any) -> None:
        """Once it is decided that an evaluation follows; the Trainer announces only that it is over."""
        if self.evaluate == "unmerged" or not control.should_evaluate or self._merged:
            return
        statistics = self.statistics
        if initialised() and statistics is not None:
            for tensor in statistics.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
        if self.calibration is not None:
            statistics = None
        merge_reslora(model, self.method, statistics=statistics, calibration=self.calibration)
        self._merged = True

    def _unmerge(self, model: Any) -> None:
        if self._merged:
            unmerge_reslora(model)
            self._merged = False


def _read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist: that checkpoint was saved without a ResLoRACallback")
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from None
