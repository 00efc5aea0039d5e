"""AdapterLayer: what an adapted layer is made of, whatever its frozen weight is and however that is multiplied by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from ..backends.select import BackendChoice
from ..config import ResLoRAConfig
from ..dtensors import is_dtensor, whole_shape
from .chain import Chain, Neighbours, SharedInput
from .initialization import fill
from .several import Beside, Part, not_missed
from .shortcuts import gates_shape
from .wrappers import module_at

_BESIDE = "beside_"
_DETOURS = ("merged", "disabled", "unstarted", "division", "observer", "replacement")
ADAPTER_PARAMETERS = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_gates", "start_A", "start_B")


class Observer(Protocol):
    """Whoever gathers statistics: told of every call's input and of the shortcut's part of u."""

    def observe(self, x: Tensor, lora_A: Tensor, residual: Tensor | None) -> None: ...


class AdapterLayer(nn.Module):
    """A frozen weight with A [..., r, K] and B [..., N, r], and a place in a chain; its subclasses are kinds of it.

    The rest of the package (chains, switching, merging, files, ``inspect``) knows a layer by what is declared here.
    ``layers.kinds`` says which subclass serves which part of a model.
    """

    in_features: int
    out_features: int
    config: ResLoRAConfig
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude_vector: nn.Parameter | None
    lora_gates: nn.Parameter | None
    start_A: nn.Parameter | None
    start_B: nn.Parameter | None
    weight: Any
    bias: Any
    neighbours = Neighbours()
    narrows = False  # whether its model goes on with the last tokens alone from some layer on; see ``adapt.linking``
    shares_projections: ClassVar[bool] = False  # whether one layer of a group may project x for this one
    sums: ClassVar[bool] = True  # whether other adapters may be in force in the same place
    takes_samples: ClassVar[bool] = False  # whether each sample of a batch may run through an adapter of its own
    division: tuple[Part, ...]  # where it is in force with others, or for some samples only
    merged: bool  # whether W holds the update
    disabled: bool
    unstarted: bool  # whether A and B wait for ``start_adapters``, and are random meanwhile
    observer: Observer | None
    replacement: tuple[Tensor, Tensor] | None  # (A, B) of a plain update that stands in, while merging
    detour: bool  # whether any of these six is so: all that a forward looks at
    factor: float = 1.0  # by which s counts
    samples_first: bool | None = None  # whether x has the batch in its first dimension; None: nobody has looked
    expert: bool = False  # whether the model gives it a choice of the tokens
    holds_all_it_reads: ClassVar[bool] = False  # whether it is called, on parameters of its own and of its neighbours

    def base_in(self, root: nn.Module, name: str) -> Any:
        """What ``leave`` left in ``root`` under the layer's name."""
        return module_at(root, name)

    def take_place_of(self, base: Any) -> None:
        """Stand in for what ``leave`` gave."""
        raise NotImplementedError

    def leave(self) -> Any:
        """The frozen part by itself, as it was before it was adapted."""
        raise NotImplementedError

    @property
    def execution_device(self) -> torch.device:
        """Where the layer computes, and its adapters are."""
        raise NotImplementedError

    @property
    def merged_dtype(self) -> torch.dtype:
        """The dtype that a merged weight has."""
        raise NotImplementedError

    @property
    def a_stack(self) -> tuple[Tensor, ...]:
        """The A matrices, its own and others', that one forward of this layer multiplies by."""
        raise NotImplementedError

    def backend_choice(self, tokens: int) -> BackendChoice:
        """Which backend serves a call of so many tokens, and why."""
        raise NotImplementedError

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The values of W in ``dtype``, or in its own if that is wider."""
        raise NotImplementedError

    def with_update(self, delta: Tensor) -> Tensor:
        """W* in float32 or better, for a plain update ΔW [..., N, K]."""
        raise NotImplementedError

    def original(self) -> Any:
        """What ``restore`` needs after ``set_merged``, off the device."""
        raise NotImplementedError

    def set_merged(self, weight: Tensor) -> None:
        """Take W* for W, and pass the adapters over."""
        raise NotImplementedError

    def restore(self, original: Any) -> None:
        """The inverse of ``set_merged``."""
        raise NotImplementedError

    def _adapt(self, config: ResLoRAConfig, adapter_dtype: torch.dtype | None, init_values: bool = True) -> None:
        dtype = adapter_dtype or (torch.float64 if self.weight.dtype == torch.float64 else torch.float32)
        device = self.execution_device
        self.config = config
        for kind in "AB":
            shape = self._shape_of(kind)
            empty = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(f"lora_{kind}", nn.Parameter(empty))
            start = nn.Parameter(torch.empty_like(empty), requires_grad=False) if config.has_start else None
            self.register_parameter(f"start_{kind}", start)
        magnitude = (
            nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if config.use_dora else None
        )
        self.register_parameter("lora_magnitude_vector", magnitude)
        self.register_parameter("lora_gates", None)
        self.merged = self.disabled = self.unstarted = False
        self.division = ()
        self.observer = self.replacement = None
        self.chain: Chain[Any] | None = None
        self.position = 0
        self.shared: SharedInput | None = None
        self.index = 0  # in ``shared``
        self.fit_gates()
        if init_values:
            self.reset_lora_parameters()

    def stand_beside(self, name: str, other: AdapterLayer) -> None:
        """Add another adapter's updates to this layer's: that of ``other``, which is for the same frozen part."""
        for parameter in other.adapter_parameters().values():
            parameter.data = parameter.data.to(self.execution_device)
        other.training = self.training
        self.register_module(_BESIDE + name, Beside(other))
        self._sum_up()

    def stand_alone(self) -> None:
        """The inverse, for all others."""
        for name, module in list(self._modules.items()):
            if isinstance(module, Beside):
                module.release()
                del self._modules[name]
        self._sum_up()

    @property
    def beside(self) -> tuple[Any, ...]:
        """The layers of the other adapters that are in force in this place."""
        return tuple(module.layer for module in self._modules.values() if isinstance(module, Beside))

    def _sum_up(self) -> None:
        self.division = (Part((self, *self.beside)),) if self.beside else ()

    def refuses_samples(self) -> str | None:
        """Why the layer cannot run for some samples of a batch only; None where it can."""
        if self.config.use_dora:
            return "uses DoRA"
        if self.expert:
            return "is an expert, which sees a choice of the tokens"
        return None if self.takes_samples else f"is a {type(self).__name__}"

    @property
    def in_sum(self) -> tuple[Any, ...]:
        """The layers of all adapters in force here, its own first."""
        return self.division[0].layers if self.division else (self,)

    @property
    def kernel_groups(self) -> int:
        """Into how many parts of its own channels each the layer's map falls, as that of a grouped convolution."""
        return 1

    @property
    def exports(self) -> str | None:
        """Why PEFT would make another function of the layer's A and B; None where it does not."""
        return None

    @property
    def scaling(self) -> float:
        """s of the equations, by the factor that PEFT's ``set_scale`` has set."""
        return self.config.scaling * self.factor

    @property
    def chain_length(self) -> int:
        return len(self.chain) if self.chain is not None else 1

    @property
    def a_parts(self) -> tuple[Tensor, ...]:
        """What the A of the equations is made of: its rows, from top to bottom."""
        held = self._parameters
        if "lora_A" in held and not self.config.has_start:
            return (held["lora_A"],)  # type: ignore[return-value]
        return (self.lora_A,) if self.start_A is None else (self.lora_A, self.start_A)

    @property
    def b_parts(self) -> tuple[Tensor, ...]:
        """What the B of the equations is made of: its columns, from left to right."""
        held = self._parameters
        if "lora_B" in held and not self.config.has_start:
            return (held["lora_B"],)  # type: ignore[return-value]
        return (self.lora_B,) if self.start_B is None else (self.lora_B, self.start_B)

    @property
    def whole_A(self) -> Tensor:
        """The A of the equations [..., r or 2r, in_features]."""
        return joined(self.a_parts, -2)

    @property
    def whole_A_shape(self) -> tuple[int, ...]:
        """That of ``whole_A``, also where processes hold parts of it (DTensors, ZeRO-3)."""
        shapes = [whole_shape(part) for part in (self.lora_A, self.start_A) if part is not None]
        return (*shapes[0][:-2], sum(shape[-2] for shape in shapes), shapes[0][-1])

    @property
    def whole_B(self) -> Tensor:
        """The B of the equations [..., out_features, r or 2r]."""
        return joined(self.b_parts, -1)

    def reads(self) -> Iterator[tuple[AdapterLayer, str]]:
        """Layers of which a forward of this one reads parameters as well, and which of them: "A", or "A" and "B"."""
        earlier, following = self.neighbours
        if self.config.shortcut == "block":
            yield from ((cast(AdapterLayer, other), "AB") for other in earlier)
        if self.config.shortcut == "input" and following is not None:
            yield cast(AdapterLayer, following), "A"
        for other in self.shared.layers[self.index + 1 :] if self.shared is not None else ():
            yield cast(AdapterLayer, other), "A"
            yield from ((third, "A") for third, _ in cast(AdapterLayer, other).reads())

    @property
    def gates(self) -> Tensor | None:
        """c and the g of the equations [1 + terms, 1 or r], c first; None where all are 1."""
        return None if self.config.gates == "none" else self._parameters["lora_gates"]

    @property
    def whole_gates(self) -> Tensor | None:
        """The same, whole in every process."""
        return self.gates

    def fit_gates(self) -> None:
        """Have as many gates as the layer's place in its chain has terms: fresh ones, where there are others."""
        shape, held = gates_shape(self.config, self.position), self._parameters["lora_gates"]
        if shape == (None if held is None else tuple(held.shape)):
            return
        if shape is None:
            self.register_parameter("lora_gates", None)
            return
        empty = torch.empty(shape, dtype=self.lora_A.dtype, device=self.lora_A.device)
        self.register_parameter("lora_gates", nn.Parameter(empty, requires_grad=self.lora_A.requires_grad))
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        """c = 1, and every g as ``config.gates_init`` says."""
        if self.lora_gates is not None:
            self.lora_gates.fill_(self.config.gates_init)
            self.lora_gates[0] = 1.0

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What the adapter adds to the frozen layer's parameters, by name."""
        return {name: value for name in ADAPTER_PARAMETERS if (value := self._parameters.get(name)) is not None}

    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that ``adapter_parameters`` have while they are whole."""
        gates = gates_shape(self.config, self.position) or ()
        return {name: gates if name == "lora_gates" else self._shape_of(name[-1]) for name in self.adapter_parameters()}

    def _shape_of(self, kind: str) -> tuple[int, ...]:
        matrices = {"A": (self.config.r, self.in_features), "B": (self.out_features, self.config.r)}
        return matrices.get(kind, (self.out_features,))

    def reset_lora_parameters(self) -> None:
        """Start afresh, as ``config.init_lora_weights`` says; the layer then computes what the frozen one does."""
        fill(self.config, self.lora_A, self.lora_B)
        self.unstarted = self.config.starts_from_data
        self.reset_gates()

    def refuse_unstarted(self) -> None:
        """For whoever is about to train the layer. Before its start it computes what the frozen one does, B being zero.

        Raises:
            RuntimeError: its start is one from data and was never given, or loaded.
        """
        if self.unstarted:
            raise RuntimeError(not_started(self.config))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for any module, but not spread over processes: a plan would cut A, which it does not know, by its rows."""
        if is_dtensor(param):
            raise ValueError(
                f"parameter {name!r} of an adapted layer cannot be spread by a tensor parallel plan: call "
                "parallelize_module (or from_pretrained with a tp_plan) first, then apply_reslora or load_adapter"
            )
        super().register_parameter(name, param)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As for any module, but adapters are not held in 8 bits: a ValueError."""
        dtype = fn(torch.empty(0, dtype=self.lora_A.dtype, device=self.lora_A.device)).dtype
        if dtype.itemsize == 1:
            raise ValueError(
                f"adapters are not held in 8 bits, got {dtype}: leave adapted layers out, as diffusers' "
                "enable_layerwise_casting(skip_modules_classes=(ResLoRALinear,)) does"
            )
        empty = self.lora_A.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if empty and not self.lora_A.is_meta:
            self._begin()
        return self

    def _begin(self) -> None:
        """Start in memory that ``to_empty`` has given: what it held before is no adapter."""
        self.reset_lora_parameters()
        if self.lora_magnitude_vector is not None:  # W, whose norms it is to be, has no values yet
            self.lora_magnitude_vector.data.fill_(torch.nan)

    def __getstate__(self) -> dict[str, Any]:
        """Without the neighbours, whose chain introduces them again: a copy would recurse from layer to layer."""
        return {name: value for name, value in self.__dict__.items() if name != "neighbours"}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Merged, the layer is a plain one to whoever saves it: a server would not know the adapter's names."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            for name in self.adapter_parameters():
                del destination[prefix + name]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint without this layer's adapter is a base checkpoint: it leaves the adapter as it is."""
        missing_keys: list[str] = args[2]
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._started_by(state_dict, prefix)
        not_missed(missing_keys, {prefix + name for name in self.adapter_parameters()})

    def _started_by(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """What is loaded has been started, or trained."""
        if self.unstarted and {f"{prefix}lora_A", f"{prefix}lora_B"} <= state_dict.keys():
            self.unstarted = False

    def _describe(self) -> str:
        """What ``extra_repr`` says of the adapter."""
        place = f", position={self.position} of {self.chain_length}" if self.chain is not None else ""
        gates = "" if self.config.gates == "none" else f", gates={self.config.gates!r}"
        return f"r={self.config.r}, shortcut={self.config.shortcut!r}{gates}{place}"


class _Detour:
    """An attribute that keeps ``detour`` up to date as it is set, and is read from the instance as any other is.

    ``__setattr__`` of the layers stays nn.Module's: FSDP looks whether it is, and swaps parameters past it then.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __set__(self, layer: AdapterLayer, value: Any) -> None:
        held = layer.__dict__
        held[self.name] = value
        held["detour"] = any(held.get(name) for name in _DETOURS)


for _name in _DETOURS:
    setattr(AdapterLayer, _name, _Detour(_name))


def not_started(config: ResLoRAConfig) -> str:
    """What to tell who trains or saves adapters that ``start_adapters`` never gave their start."""
    how = config.init_lora_weights
    shown = "weights=..." if how == "loftq" else "batches"
    return (
        f"init_lora_weights={how!r} starts from data, and these adapters have a random start: call "
        f"start_adapters(model, {shown}) before they are trained, load trained ones, or take init_lora_weights=True, "
        "which is such a random start"
    )


def joined(parts: tuple[Tensor, ...], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
