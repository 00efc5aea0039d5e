"""Several adapters in one layer: their sum, or one of them for each sample of a batch.

    y = x Wᵀ + b + Σ_i s_i u_i B_iᵀ

Each adapter's u comes from its own A, dropout and chain, on the input that all of them see. Then one product has them
all, with s_i / s of the layer in the model folded into B_i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .shortcuts import Call, carried

BASE = "__base__"  # PEFT's name for no adapter


class Part(NamedTuple):
    """Adapted layers in one place whose updates are summed, for some samples of a batch; None: for all of them."""

    layers: tuple[Any, ...]
    rows: Tensor | None = None


class Beside(nn.Module):
    """The parameters of an adapter that is in force in the place of another one's layer: a child of that layer.

    They are in one dict with that adapter's own layer, so that what replaces them here (``functional_call``,
    ``load_state_dict(assign=True)``) reaches it. What that layer has of the base meanwhile is plain attributes.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # no child: its weight is that of the layer in the model
        held, own = layer._parameters, layer.adapter_parameters()
        base = {name: held[name] for name in held if held[name] is not None and name not in own}
        for name in base:
            del held[name]
        layer.__dict__.update(base)
        self.__dict__.update(_base=base, _parameters=held)

    def release(self) -> None:
        """Let the layer have parameters of its own again: it is not beside another one any more."""
        layer: Any = self.layer
        base: dict[str, Any] = self.__dict__["_base"]
        for name in base:
            del layer.__dict__[name]
        layer.__dict__["_parameters"] = base | self._parameters

    def train(self, mode: bool = True) -> Beside:
        layer: Any = self.layer
        layer.training = mode
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any) -> None:
        """As the layer itself: merged, there is no adapter to whoever saves the model."""
        layer: Any = self.layer
        if not layer.merged:
            super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As the layer itself: a checkpoint without this adapter leaves it as it is."""
        missing_keys: list[str] = args[2]
        super()._load_from_state_dict(state_dict, prefix, *args)
        not_missed(missing_keys, {prefix + name for name, _ in self.named_parameters()})


def not_missed(missing_keys: list[str], own: set[str]) -> None:
    """Take an adapter's names out of those that a state dict lacks, if it lacks all of them."""
    if own.issubset(missing_keys):
        missing_keys[:] = [key for key in missing_keys if key not in own]


def names_by_module(root: nn.Module, names: Sequence[str], beams: int) -> Callable[[nn.Module], list[str]]:
    """The adapter of each sample that a module of ``root`` sees: a beam search repeats samples, but for the encoder."""
    model: Any = root
    encoder = model.get_encoder() if getattr(getattr(root, "config", None), "is_encoder_decoder", False) else None
    as_they_are = set() if encoder is None else set(encoder.modules())
    repeated = [name for name in names for _ in range(beams)]
    return lambda module: list(names) if module in as_they_are else repeated


def parts_for(names: Sequence[str], layers: Mapping[str, Any]) -> tuple[Part, ...]:
    """The parts of one layer's batch whose sample i runs through adapter ``names[i]``, of those that it has."""
    rows: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        rows.setdefault(name if name in layers else BASE, []).append(index)
    return tuple(
        Part((layers[name],) if name in layers else (), torch.tensor(indices)) for name, indices in rows.items()
    )


def in_parts(place: Any, parts: Sequence[Part], x: Tensor) -> Tensor:
    """y of ``place``'s frozen weight, with several adapters in force there.

    Raises:
        ValueError: they are for single samples, and x has another number of them.
    """
    if parts[0].rows is None:
        return summed(place, parts[0].layers, x)
    rows = torch.cat([part.rows for part in parts if part.rows is not None]).to(x.device)
    check_samples(place, len(rows), len(parts), x)
    samples = torch.split(x[rows], [len(part.rows) for part in parts if part.rows is not None])
    of_parts = [summed(place, part.layers, each) for part, each in zip(parts, samples, strict=True)]
    return torch.cat(of_parts)[rows.argsort()]


def check_samples(place: Any, count: int, different: int, x: Tensor) -> None:
    """ValueError unless x has a sample for each name, in its first dimension as far as can be told."""
    if len(x) != count:
        raise ValueError(
            f"names (adapter_names) must have one for each sample of the batch: got {count}, and a layer sees {len(x)} "
            "(a beam search repeats each sample, and so must its name be)"
        )
    alike = x.dim() > 2 and x.shape[1] == count
    if alike and different > 1 and not place.samples_first:
        raise ValueError(
            f"a layer sees {list(x.shape)}, of which either dimension could be the {count} samples: pad the samples to "
            "another length"
        )
    if not alike:
        place.samples_first = True


def summed(place: Any, layers: Sequence[Any], x: Tensor) -> Tensor:
    """y of ``place``'s frozen weight, with the updates of ``layers`` there."""
    if not layers:
        frozen: Tensor = place.frozen_forward(x)
        return frozen
    found = [(layer.scaling, *_contribution(layer, x)) for layer in layers]  # of scale 0 too: it may hand on
    place = next((one for one in (place, *layers) if one.scaling), place)
    if not place.scaling:
        return place.frozen_forward(x)  # type: ignore[no-any-return]
    ratios = [scaling / place.scaling for scaling, _, _ in found]
    stack = tuple([b if ratio == 1 else b * ratio for ratio, (_, _, bs) in zip(ratios, found, strict=True) for b in bs])
    y: Tensor = place._low_rank(
        x, place.frozen_bias, 0.0, Call((), stack, residual=torch.cat([u for _, u, _ in found], -1))
    )[0]
    return y


def _contribution(layer: Any, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """u [..., R] of one adapter, and the B that it goes through; what it hands on goes along its own chain."""
    state, config = layer._open_pass(), layer.config
    received = () if state is None else state.enter(layer, layer.neighbours.earlier, layer.leading(x))
    call = layer._call(received)
    call, handed = layer.projected(x, config.lora_dropout if layer.training else 0.0, call, state)
    if handed is not None and state is not None:
        state.hand_on(*carried(config, received, handed))
    assert call.residual is not None
    return call.residual, call.b_stack
