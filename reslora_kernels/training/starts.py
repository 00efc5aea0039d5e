"""start_adapters: the starts that need to be shown something, batches or the weights before they were quantised."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt.data_parallel import share
from ..adapt.execution import call_with
from ..adapt.record import adapted_layers, record_of, refuse_beside, root_of
from ..adapt.switching import adapt_anew
from ..adapt.targets import endings_of
from ..checks import check_number
from ..config import ResLoRAConfig
from ..dtensors import refuse_sharded
from ..layers.adapter import AdapterLayer
from ..layers.initialization import corda, eva, loftq, lora_ga
from ..layers.linear import ResLoRALinear
from ..layers.quantized_linear import QuantizedResLoRALinear
from ..layers.tensor_parallel import TensorParallelResLoRALinear
from ..merge.statistics import observed

IGNORED = -100  # the label of a token that no loss counts, in Transformers


def start_adapters(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    rho: float = 1.0,
) -> nn.Module:
    """Give A and B the start that ``init_lora_weights`` names, from batches of data ("eva", "corda", "corda_kpm",
    "lora_ga") or from the weights before they were quantised ("loftq"). Whatever was trained is forgotten.

    The model computes what its base does afterwards: "eva" has B = 0; "corda" and "lora_ga" take their start off again
    in every shortcut, where PEFT changes the base's weights; "loftq" is meant to move it, by the best rank r part of
    what quantisation took.

    Args:
        model: an adapted model that is not sharded; run in evaluation mode, and left in the mode that it is in.
        calibration: batches: mappings of keyword arguments, tuples or lists of positional ones, or tensors. "eva"
            leaves out tokens that an ``attention_mask`` or ``labels`` of -100 say do not count.
        loss: for "lora_ga": what to differentiate of the model's output; None takes its ``loss``.
        weights: for "loftq": tensors by the names of the base model's state dict.
        rho: for "eva" with shortcut "none": above 1, ranks move to the layers whose inputs they explain more of, as
            PEFT's do, within their sum: a layer has ``rho`` r at most, and loses its adapter where it has none. Its
            scaling stays. The adapters are new ones then, by a new ``rank_pattern``: build the optimizer afterwards.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: the model's start is none of these, what it needs is not given, or it is merged, sharded
            or spread by a tensor parallel plan; a rank is larger than the data or the gradient allow; ``rho`` is below
            1, or above it where ranks cannot move. The model has a random start then, or the one it had.
    """
    layers, record = adapted_layers(model), record_of(model)
    how = record.config.init_lora_weights
    if not record.config.starts_from_data:
        raise ValueError(
            f"init_lora_weights={how!r} is there from the beginning: only 'eva', 'corda', 'corda_kpm', 'lora_ga' and "
            "'loftq' are started from data"
        )
    if record.merged is not None:
        raise ValueError("model is merged: call unmerge_reslora(model) first")
    refuse_sharded(model, "started", "call start_adapters before shard_reslora")
    spread = next((name for name, layer in layers.items() if isinstance(layer, TensorParallelResLoRALinear)), None)
    if spread is not None:
        raise ValueError(f"layer {spread!r} is spread by a tensor parallel plan: start the adapters of a whole model")
    _check_rho(rho, record.config)
    if rho > 1:
        refuse_beside(model, "given other ranks", "take rho=1")
    if how == "loftq":
        _start_from_weights(layers, weights)
        return model
    if calibration is None:
        raise ValueError(f"init_lora_weights={how!r} starts from data: give calibration=, batches for the model")
    for layer in layers.values():
        layer.reset_lora_parameters()
    seen = {name: _KINDS[str(how)](layer) for name, layer in layers.items()}
    with _evaluating(model), observed({layer: seen[name] for name, layer in layers.items()}):
        batches = 0
        for batch in calibration:
            batches += 1
            _show(model, batch, seen.values(), loss if how == "lora_ga" else None, how == "lora_ga")
    if not batches:
        raise ValueError("calibration must hold at least one batch, got none")
    never = [name for name, gathered in seen.items() if not gathered.count]
    if never:
        warnings.warn(f"calibration never reached {', '.join(never)}: their start is a random one", stacklevel=2)
    started = {name: gathered.factors(rho) for name, gathered in seen.items() if gathered.count}
    if rho > 1:
        variations = {name: each for name, each in seen.items() if isinstance(each, _Variation) and each.count}
        ranks = _moved_ranks(variations)
        layers = dict(adapted_layers(adapt_anew(model, _with_ranks(model, ranks))))
        started = {name: (a[: ranks[name]], layers[name].lora_B) for name, (a, _) in started.items() if ranks[name]}
    for name, (a, b) in started.items():
        _start(layers[name], a, b)
    for name in never:
        layers[name].unstarted = False
    if rho == 1:  # else the adapters are new ones, which no DistributedDataParallel knows
        parameters = (layer.adapter_parameters().values() for layer in layers.values())
        share(model, root_of(model), chain.from_iterable(parameters))
    return model


class _Gathered:
    """What one layer saw, an ``Observer`` of it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.count = 0
        self.counted: Tensor | None = None  # which tokens of the batch count

    def observe(self, x: Tensor, lora_A: Tensor, residual: Tensor | None) -> None:
        raise NotImplementedError

    def factors(self, rho: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class _Variation(_Gathered):
    """EVA's: number, sum and second moments of the inputs."""

    total: Tensor
    gram: Tensor
    shares: Tensor  # of the variance, along the directions that ``factors`` found

    def observe(self, x: Tensor, lora_A: Tensor, residual: Tensor | None) -> None:
        x = x.detach()
        counted = self.counted
        x = x[counted] if counted is not None and x.shape[:-1] == counted.shape else x.reshape(-1, x.shape[-1])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.total = x.sum(0) + (self.total if self.count else 0)
        self.gram = x.T @ x + (self.gram if self.count else 0)
        self.count += len(x)

    def factors(self, rho: float) -> tuple[Tensor, Tensor]:
        r = round(self.layer.config.r * rho)
        if self.count <= r or self.layer.in_features < r:
            raise ValueError(
                f"init_lora_weights='eva' needs more than {r} tokens and features, which is r times rho, got "
                f"{self.count} tokens and {self.layer.in_features} features"
            )
        a, self.shares = eva(r, self.count, self.total, self.gram)
        return a, torch.zeros_like(self.layer.lora_B)


class _Covariance(_Gathered):
    """CorDA's: second moments of the inputs, each batch's scaled by its largest value, as in PEFT."""

    gram: Tensor

    def observe(self, x: Tensor, lora_A: Tensor, residual: Tensor | None) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        x = x / x.max().abs()
        self.gram = x.T @ x + (self.gram if self.count else 0)
        self.count += 1

    def factors(self, rho: float) -> tuple[Tensor, Tensor]:
        _refuse_wide(self.layer, self.layer.config.r)
        return corda(self.layer.config, self.layer.dense_weight(torch.float32), self.gram / self.count)


class _Gradient(_Gathered):
    """LoRA-GA's: dL/dW = Σ dyᵀ x, of a mean over calls. W itself gets no gradient."""

    x: Tensor
    sum: Tensor

    def observe(self, x: Tensor, lora_A: Tensor, residual: Tensor | None) -> None:
        self.x = x.detach()

    def follow(self, module: nn.Module, args: Any, y: Tensor) -> None:
        """Forward hook of the layer, after it was observed."""
        if y.requires_grad:
            tensor: Any = y
            tensor.register_hook(partial(self._add, self.x))

    def _add(self, x: Tensor, dy: Tensor) -> None:
        x, dy = x.reshape(-1, x.shape[-1]).float(), dy.reshape(-1, dy.shape[-1]).float()
        self.sum = dy.T @ x + (self.sum if self.count else 0)
        self.count += 1

    def factors(self, rho: float) -> tuple[Tensor, Tensor]:
        _refuse_wide(self.layer, 2 * self.layer.config.r)
        return lora_ga(self.layer.config, self.sum / self.count)


_KINDS: dict[str, type[_Gathered]] = {
    "eva": _Variation, "corda": _Covariance, "corda_kpm": _Covariance, "lora_ga": _Gradient,
}  # fmt: skip


def _show(
    model: nn.Module, batch: Any, seen: Iterable[_Gathered], loss: Callable[[Any], Tensor] | None, differentiate: bool
) -> None:
    """Run the model on one batch, and a backward pass if the start is one of gradients."""
    counted = _counted(batch)
    for gathered in seen:
        gathered.counted = counted
    if not differentiate:
        with torch.no_grad():
            call_with(model, batch)
        return
    handles = [each.layer.register_forward_hook(each.follow) for each in seen if isinstance(each, _Gradient)]
    try:
        with torch.enable_grad():
            output = call_with(model, batch)
            value = output.loss if loss is None else loss(output)
            if value is None:
                raise ValueError("init_lora_weights='lora_ga' needs a loss: give labels in the batches, or loss=")
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.autograd.grad(value, trained, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()


def _counted(batch: Any) -> Tensor | None:
    """bool [batch, tokens]: the tokens that a batch's mask and labels say count."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    counted = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if isinstance(labels, Tensor) and labels.dim() == 2:
        counted = labels != IGNORED if counted is None else counted & (labels != IGNORED)
    return counted


def _start_from_weights(layers: Mapping[str, AdapterLayer], weights: Mapping[str, Tensor] | None) -> None:
    """LoftQ's start of every layer, worked out before any is changed."""
    if weights is None:
        raise ValueError("init_lora_weights='loftq' starts from the weights before quantisation: give weights=")
    started = {}
    for name, layer in layers.items():
        if not isinstance(layer, QuantizedResLoRALinear):
            raise ValueError(
                f"init_lora_weights='loftq' is for a quantised base, and layer {name!r} is not (and is not rounded in "
                "full precision, as PEFT would): load the model quantised, adapt that, and give the plain weights here"
            )
        weight = weights.get(f"{name}.weight")
        if weight is None or tuple(weight.shape) != (layer.out_features, layer.in_features):
            raise ValueError(
                f"weights must hold {name + '.weight'!r} of {[layer.out_features, layer.in_features]}, got "
                f"{'none' if weight is None else list(weight.shape)}"
            )
        _refuse_wide(layer, layer.config.r)
        started[name] = loftq(layer.config, weight.to(layer.execution_device), layer.dense_weight(torch.float32))
    for name, (a, b) in started.items():
        _start(layers[name], a, b)


def _check_rho(rho: float, config: ResLoRAConfig) -> None:
    check_number("rho", rho, "a finite number of 1 or more", lambda v: v >= 1)
    for name, value, wanted in (
        ("init_lora_weights", config.init_lora_weights, "eva"),
        ("shortcut", config.shortcut, "none"),
    ):
        if rho > 1 and value != wanted:
            raise ValueError(
                f"rho={rho} moves ranks between layers, which is for {name}={wanted!r}, got {value!r} (the layers of a "
                "chain have one rank): take rho=1"
            )


def _moved_ranks(seen: Mapping[str, _Variation]) -> dict[str, int]:
    """The rank of each layer: of all directions those that explain most of their layer's inputs, as PEFT shares them.

    Layers of one input have its directions once each; the first of them has the largest rank.
    """
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, each in seen.items():
        groups.setdefault(tuple(each.total.tolist()), []).append(name)
    names = [group[0] for group in groups.values()] + [name for group in groups.values() for name in group[1:]]
    owners = [name for name in names for _ in seen[name].shares]
    order = torch.cat([seen[name].shares.cpu() for name in names]).argsort(descending=True, stable=True)
    budget = sum(each.layer.config.r for each in seen.values())
    ranks = dict.fromkeys(seen, 0)
    for index in order[:budget].tolist():
        ranks[owners[index]] += 1
    for first, *rest in groups.values():
        for name in rest:
            ranks[first], ranks[name] = max(ranks[first], ranks[name]), min(ranks[first], ranks[name])
    return ranks


def _with_ranks(model: nn.Module, ranks: Mapping[str, int]) -> ResLoRAConfig:
    """The model's configuration with these ranks, at the scalings that the layers have; without those of rank 0."""
    config, layers = record_of(model).config, adapted_layers(model)
    kept = {name: ranks.get(name, layer.config.r) for name, layer in layers.items()}
    kept = {name: rank for name, rank in sorted(kept.items(), key=lambda item: -len(item[0])) if rank}
    alphas = {name: layers[name].config.lora_alpha * rank / layers[name].config.r for name, rank in kept.items()}
    changes: dict[str, Any] = {"rank_pattern": kept, "alpha_pattern": alphas}
    if len(kept) < len(layers):
        changes |= {
            "target_modules": endings_of(root_of(model), list(kept)),
            "exclude_modules": None,
            "layers_to_transform": None,
        }
    return config.replace(**changes)


def _refuse_wide(layer: Any, rank: int) -> None:
    smallest = min(layer.in_features, layer.out_features)
    if smallest < rank:
        how = layer.config.init_lora_weights
        raise ValueError(f"init_lora_weights={how!r} needs {rank} singular values here, and W has {smallest}: lower r")


@torch.no_grad()
def _start(layer: AdapterLayer, a: Tensor, b: Tensor) -> None:
    layer.lora_A.copy_(a)
    layer.lora_B.copy_(b)
    layer.unstarted = False
    if isinstance(layer, ResLoRALinear):
        layer.take_off_start()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block, then each module's own."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
