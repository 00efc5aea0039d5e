"""ResLoRAModel: what PEFT calls a tuner. It puts the layers in place and hands merges to the package."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ..adapt.apply import replace_modules
from ..adapt.checkpoints import has_moved, named_buffers
from ..adapt.execution import find_samples
from ..adapt.record import gone
from ..adapt.switching import refuse_in_sum, refuse_samples
from ..adapt.targets import adaptable, passed_over, refuse_idle_patterns
from ..config import ALL_LINEAR, MergeMethod
from ..dtensors import initialised, refuse_partitioned, refuse_sharded, refuse_zero3
from ..files.peft_export import PREFIX
from ..layers.adapter import AdapterLayer, not_started
from ..layers.several import BASE, names_by_module
from ..layers.wrappers import without_wrappers
from ..merge.merging import MergeReport, fit_in, merge_reslora, unmerge_reslora
from ..merge.statistics import Statistics
from .layer import ResLoRALayer, adapters_of, refuse_taken_off_hooks


class ResLoRAModel(BaseTuner):
    """A model with ResLoRA adapters. Those in force sum; ``adapter_names`` in a forward has one for each sample.

    What cannot be right is refused by name: DoRA beside another adapter, merges of several that are not exact, or that
    need data and get none.
    """

    prefix = "reslora_"
    tuner_layer_cls = ResLoRALayer
    _before_merge: list[str] | None = None  # the adapters in force before others were merged
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, with the chains linked afterwards. If it fails the model is as it was."""
        adapters = adapters_of(model)
        adapters.refuse_merged_but([])
        refuse_sharded(model, "adapted", "call get_peft_model first, then shard it")
        refuse_zero3(model)
        refuse_taken_off_hooks(model)
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            config: Any = self.peft_config[adapter_name]
            layers = self._layers_of(model, adapter_name)
            refuse_idle_patterns(config.native(), layers)
            adapters.link(adapter_name, config.native(), layers, config.chains)
            adapters.put_in_force(self.active_adapters)
        except BaseException:
            self._withdraw(model, adapter_name)
            for parameter, flag in trained:
                parameter.requires_grad_(flag)
            raise

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As PEFT's, for whatever it is written to; ValueError for what ``save_adapter`` would not save either.

        A process that does not write may give an empty ``state_dict``, as accelerate does with a sharded model.
        """
        if state_dict or not initialised() or torch.distributed.get_rank() == 0:
            _refuse_unsound(model, adapter_name, state_dict)
        tensors: dict[str, Any] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, *args, **kwargs
        )
        root = next(module for module in model.modules() if "_reslora_adapters" in module.__dict__)
        record = adapters_of(root).records[adapter_name]
        moved = {name for name, buffer in named_buffers(root).items() if has_moved(name, buffer, record)}
        return tensors | {key: state_dict[key] for key in state_dict if key.removeprefix(PREFIX) in moved}

    @staticmethod
    def _layers_of(model: nn.Module, adapter_name: str) -> dict[str, Any]:
        return {
            without_wrappers(name): module.reslora_adapter[adapter_name]
            for name, module in model.named_modules()
            if isinstance(module, ResLoRALayer) and adapter_name in module.reslora_adapter
        }

    @staticmethod
    def _withdraw(model: nn.Module, adapter_name: str) -> None:
        adapters_of(model).forget(adapter_name)
        empty: dict[int, nn.Module] = {}
        for module in model.modules():
            if isinstance(module, ResLoRALayer):
                if adapter_name in module.reslora_adapter:
                    del module.reslora_adapter[adapter_name]
                if not module.reslora_adapter:
                    empty[id(module)] = module.base_layer
        replace_modules(model, empty)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Let "all-linear" leave out what cannot be adapted, or not with effect: ``out_proj`` of an attention, say."""
        if peft_config.target_modules == ALL_LINEAR:
            config = peft_config.native()
            _maybe_include_all_linear_layers(peft_config, model)
            peft_config.target_modules = {
                name
                for name in peft_config.target_modules
                if passed_over(model, name, model.get_submodule(name), config) is None
            }

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        for name, module in self.model.named_modules():
            if isinstance(module, ResLoRALayer) and any(
                _within(name, ending) for ending in config.modules_to_save or ()
            ):
                raise ValueError(
                    f"modules_to_save={config.modules_to_save!r} would copy {name!r}, which holds adapters: target "
                    "other modules, or give the second adapter a model of its own"
                )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = peft_config.native()
        layer = target
        if not isinstance(layer, ResLoRALayer):
            layer = ResLoRALayer(adaptable(current_key, target, config, self.model), adapters_of(self.model))
        layer.add(adapter_name, config.for_module(current_key), random_b=peft_config.init_lora_weights is False)
        replace_modules(self.model, {id(target): layer})

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """In the place of ``child``, wherever it is. PEFT's copies its weight, which a whole head does not have."""
        replace_modules(self.model, {id(child): new_module})

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's: several adapters sum. A merged one is unmerged first, as PEFT does."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if len(names) > 1:
            refuse_in_sum(adapters_of(self.model).layers_of(names))
        if self._merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Refused: NotImplementedError."""
        raise NotImplementedError(
            "add_weighted_adapter makes one adapter of several that the package holds: load them with load_adapter and "
            "call add_weighted_adapter of reslora_kernels. Here base_model.set_adapter([...]) sums them"
        )

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        adapters_of(self.model).forget(adapter_name)
        adapters_of(self.model).put_in_force(self.active_adapters)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        if not enabled and self._merged:
            self.unmerge_adapter()
        super()._enable_adapter_layers(enabled)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names, beams = kwargs.get("adapter_names"), kwargs.get("num_beams")
        if names is None:
            yield
            return
        adapters, used = adapters_of(self.model), [name for name in dict.fromkeys(names) if name != BASE]
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if self._merged:
            raise ValueError("Cannot pass `adapter_names` while an adapter is merged: call unmerge_adapter() first")
        if unknown := sorted(set(used) - adapters.records.keys()):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        refuse_samples(adapters.layers_of(used))
        names_of = names_by_module(self.model, names, beams if isinstance(beams, int) else 1)
        find_samples(self.model, [module for module in self.model.modules() if isinstance(module, ResLoRALayer)])
        with adapters.for_a_while(used), ExitStack() as hooks:
            for module in self.model.modules():
                if isinstance(module, ResLoRALayer):
                    module.samples = names_of(module)
                    hooks.callback(setattr, module, "samples", None)
                elif isinstance(module, AuxiliaryTrainingWrapper):
                    hand = module.register_forward_pre_hook(_HandNames(names_of(module)), with_kwargs=True)
                    hooks.callback(hand.remove)
            yield

    @property
    def _merged(self) -> bool:
        return any(record.merged is not None for record in adapters_of(self.model).records.values())

    @contextmanager
    def _trained_as_before(self) -> Iterator[None]:
        """For a block that puts other adapters in force: what trains is what trained before."""
        trained = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        yield
        for parameter, flag in trained:
            parameter.requires_grad_(flag)

    def merge_adapter(  # type: ignore[override]
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        *,
        method: MergeMethod | None = None,
        calibration: Iterable[Any] | None = None,
        statistics: Statistics | None = None,
        **how: Any,
    ) -> MergeReport | None:
        """Merge adapters into the weights, so that ``unmerge_adapter`` can restore them bit for bit.

        "none" and "block" merge exactly, and the sum of several such adapters does. The other shortcuts are
        approximated, one adapter at a time: ``calibration`` is batches for the model, ``statistics`` what
        ``collect_statistics`` gathered. "input" with method "weights" needs neither.

        Args:
            adapter_names: those to merge; None is those in force. Others are in force until they are unmerged.
            safe_merge: accepted as PEFT has it: merged weights with NaN or Inf are always refused.
            method, calibration, statistics: as for ``merge_reslora``; ``how``: its other arguments.

        Returns:
            the method, rank and relative error of every layer; None, with a warning, if it is merged already.

        Raises:
            TypeError, ValueError: as ``merge_reslora``, or no adapter has such a name. The model is unchanged then.
        """
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        if not names or not set(names) <= self.peft_config.keys():
            raise ValueError(f"adapter_names must be some of {list(self.peft_config)}, got {names}")
        if self._merged and not _any_given(method, calibration, statistics):
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
            return None
        self._check_merge_allowed()  # type: ignore[no-untyped-call]
        before = self.active_adapters
        if set(names) != set(before):
            with self._trained_as_before():
                self.set_adapter(names)
        try:
            report = merge_reslora(self.model, method, calibration=calibration, statistics=statistics, **how)
        except BaseException:
            self._return_to(before)
            raise
        self._before_merge = before
        return report

    def _return_to(self, names: list[str]) -> None:
        """Put adapters in force that were so before a merge of others."""
        if names != self.active_adapters:
            with self._trained_as_before():
                self.set_adapter(names)

    def unmerge_adapter(self) -> None:
        """Restore the weights from before ``merge_adapter``, bit for bit. A warning says if nothing is merged."""
        if not self._merged:
            warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
            return
        unmerge_reslora(self.model)
        self._return_to(self._before_merge or self.active_adapters)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        method: MergeMethod | None = None,
        calibration: Iterable[Any] | None = None,
        statistics: Statistics | None = None,
        **how: Any,
    ) -> torch.nn.Module:
        """The base model with adapters merged into it; arguments and errors as for ``merge_adapter``.

        A quantised weight cannot hold an update: ``dequantize=True`` puts the dequantised, merged one in its place.
        """
        given = _any_given(method, calibration, statistics) or how
        if given or not self._merged:
            how.setdefault("keep_original", False)
            self.merge_adapter(
                adapter_names, safe_merge, method=method, calibration=calibration, statistics=statistics, **how
            )
        return self._unloaded(progressbar)

    def unload(self) -> torch.nn.Module:
        """The base model without any adapters, its weights as they were."""
        if self._merged:
            self.unmerge_adapter()
        return self._unloaded(False)

    def _unloaded(self, progressbar: bool) -> nn.Module:
        dense = [
            layer.base_layer for layer in self.model.modules() if isinstance(layer, ResLoRALayer) and layer.dequantized
        ]
        for name in list(adapters_of(self.model).records):
            adapters_of(self.model).forget(name)
        model: nn.Module = self.model
        super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        del model.__dict__["_reslora_adapters"]
        if dense:
            fit_in(model, dense)
        return model


class _HandNames:
    """Forward pre-hook of what PEFT trains whole: the adapter of each sample."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"adapter_names": self.names}


def _any_given(*arguments: Any) -> bool:
    return any(argument is not None for argument in arguments)


def _refuse_unsound(model: nn.Module, adapter_name: str, tensors: Mapping[str, Any]) -> None:
    """ValueError, which names it, for a tensor of the adapter that is not there, has another shape or is not finite."""
    for name, layer in model.named_modules():
        if isinstance(layer, ResLoRALayer) and adapter_name in layer.reslora_adapter:
            adapter = layer.reslora_adapter[adapter_name]
            if not isinstance(adapter, AdapterLayer):
                raise ValueError(f"nothing was saved: {gone(name, adapter)}")
            if adapter.unstarted:
                raise ValueError(f"nothing was saved: {not_started(adapter.config)}")
            for own, shape in adapter.adapter_shapes().items():
                key = f"{name}.reslora_adapter.{adapter_name}.{own}".replace("_fsdp_wrapped_module.", "")
                found = tuple(tensors[key].shape) if key in tensors else None
                if found != shape:
                    refuse_partitioned(model)
                    raise ValueError(f"nothing was saved: tensor {key!r} must be {shape}, got {found}")
    for key, tensor in tensors.items():
        ours = f".reslora_adapter.{adapter_name}." in key or f".modules_to_save.{adapter_name}." in key
        if ours and not tensor.is_meta and not torch.isfinite(tensor).all():
            raise ValueError(f"nothing was saved: tensor {key!r} holds NaN or Inf")


def _within(name: str, ending: str) -> bool:
    """Whether a module is inside one that ``ending`` names, or is it."""
    return f".{name}.".find(f".{ending}.") >= 0
