"""ResLoRALinear, a drop-in for ``nn.Linear``."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from .. import dropout
from ..backends import select
from ..checks import check_floating, check_int, why_not_linear
from ..config import ResLoRAConfig, checked_config
from ..forward_state import ForwardState, outside, recomputing
from ..ops import Operands, fused_linear
from ..ops.call import Sharing
from ..quantizers import quantizer_of
from ..side_channel import SideChannel
from .adapter import AdapterLayer, joined
from .initialization import from_weight, row_norms
from .offloading import device_of, held, hold, hook_like, unhooked
from .several import in_parts
from .shortcuts import Call, call_of, carried, folded, for_the_next, hands_on, rows, weighed, with_projection
from .standing_in import own_attributes, share_base


class ResLoRALinear(AdapterLayer, nn.Linear):
    """y = x Wᵀ + b + the low-rank term of ``config.shortcut`` (ResLoRA, arXiv 2402.18039, Eqs. 1 to 4).

    W and b are frozen and keep ``nn.Linear``'s names, so a base checkpoint loads unchanged. On its own the layer is
    layer 0 of a chain of one: plain LoRA for every shortcut but ``input``, which counts its own input twice.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a b.
        device: as for ``nn.Linear``.
        dtype: of W and b; the adapters are float32 when this is float16 or bfloat16, else the same.
        config: rank, scaling, dropout, shortcut and backend.

    Attributes:
        lora_A: [r, in_features]; lora_B: [out_features, r]. Their start is ``config.init_lora_weights``.
        start_A, start_B: frozen, of the same shapes, where A and B start from W, else None: the start A_0 and -B_0.
            Every equation then reads [A; A_0] and [B, -B_0] for A and B: the start cancels in every shortcut, and W
            stays as it is.
        lora_magnitude_vector: m [out_features] with ``use_dora``, else None: y = m / ‖W + s B A‖ ⊙ (x Wᵀ + the low-rank
            term) + b, with norms of rows.
        merged: whether W holds the merged update and the adapters are passed over.
        disabled: whether the adapters are passed over with W as it is.
    """

    is_linear: ClassVar[bool] = True  # a map that "all-linear" means
    shares_projections: ClassVar[bool] = True  # whether one layer of a group may project x for this one
    holds_all_it_reads: ClassVar[bool] = True
    fused: ClassVar[bool] = True  # a kernel may serve it
    takes_samples: ClassVar[bool] = True
    zero_at_start: ClassVar[str] = "lora_B"  # so that the layer begins as the frozen one
    _base: tuple[type[nn.Module], dict[str, Any]]  # class and own attributes of the frozen layer

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: ResLoRAConfig | None = None,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            check_int(name, size, 0, None)
        check_floating("dtype", dtype)
        config = checked_config(config if config is not None else ResLoRAConfig())
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._base = nn.Linear, {"in_features": in_features, "out_features": out_features}
        self.requires_grad_(False)
        self._adapt(config, None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: ResLoRAConfig,
        adapter_dtype: torch.dtype | None = None,
        *,
        init_values: bool = True,
    ) -> ResLoRALinear:
        """The adapted layer that shares ``linear``'s weight, bias, hooks and training mode.

        Args:
            adapter_dtype: dtype of lora_A and lora_B; None gives float32 for a half-precision weight, else its dtype.
            init_values: False leaves A and B without a start, for who fills them next.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear`` or computes another function than x Wᵀ + b of its own weight and
                bias (weight_norm, a quantised subclass), or another argument has the wrong type. ``linear`` is as it
                was then.
            ValueError: ``adapter_dtype`` is no floating dtype, or A and B cannot start from this weight.
        """
        cls.check_base(linear)
        checked_config(config)
        check_floating("adapter_dtype", adapter_dtype)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._base = type(linear), own_attributes(linear)
        layer.share_base(linear)
        layer.requires_grad_(False)
        layer._adapt(config, adapter_dtype, init_values)
        return layer

    def take_place_of(self, linear: nn.Linear) -> None:
        """Stand in for what ``leave`` gave: take over its weight, bias, hooks and training mode."""
        self.share_base(linear)
        if "_hf_hook" not in vars(linear):
            linear._parameters.update(dict.fromkeys(linear._parameters))
            self.__dict__["_displaced"] = linear

    def leave(self) -> Any:
        """The frozen layer by itself: of the class it was, it shares weight, bias, hooks and training mode.

        It is the module that ``take_place_of`` was given last, if any, so that compiled code finds again what it knows.
        """
        linear: Any = unhooked(self) or self.__dict__.pop("_displaced", None)
        if linear is None:
            kind, attributes = self._base
            linear = kind.__new__(kind)
            nn.Module.__init__(linear)
            linear.__dict__.update(attributes)
        share_base(linear, self)
        return linear

    @staticmethod
    def stands_in_for(module: nn.Module) -> bool:
        """Whether this kind of layer is for modules of that class."""
        return isinstance(module, nn.Linear) and quantizer_of(module) is None

    @staticmethod
    def why_not(module: Any) -> str | None:
        """What keeps a module of that class from being adapted; None where nothing does."""
        return why_not_linear(module)

    @staticmethod
    def weight_of(module: Any) -> Any:
        """The weight of the module to adapt, or of an adapted layer."""
        return module.weight

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        """K and N of the module to adapt."""
        return module.in_features, module.out_features

    @staticmethod
    def refuses(module: Any, config: ResLoRAConfig) -> str | None:
        """Why a module that can be adapted cannot be so with ``config``; None where it can."""
        return None

    @staticmethod
    def parts(module: Any) -> dict[str, nn.Module]:
        """Layers inside the module, by their name in it, that are adapted with it."""
        return {}

    @staticmethod
    def form(module: Any) -> tuple[Any, ...]:
        """What the layers of one chain agree in beside their sizes; of a module to adapt, or of an adapted layer."""
        return ()

    @classmethod
    def matrices(cls, module: Any, r: int) -> dict[str, tuple[int, ...]]:
        """The shapes of A and B at rank r, as the layer holds them."""
        k, n = cls.sizes(module)
        return {"A": (r, k), "B": (n, r)}

    @classmethod
    def peft_matrices(cls, module: Any, r: int) -> dict[str, tuple[int, ...]]:
        """The names and shapes that they have in a PEFT adapter, A first."""
        k, n = cls.sizes(module)
        return {"lora_A.weight": (r, k), "lora_B.weight": (n, r)}

    def for_peft(self, a: Tensor, b: Tensor, rank: int) -> dict[str, Tensor]:
        """A plain update b a, a [R, K] and b [N, R], as tensors of a PEFT adapter of ``rank``, padded with zeros."""
        padding = rank - len(a)
        padded = nn.functional.pad(a, (0, 0, 0, padding)), nn.functional.pad(b, (0, padding))
        shapes = self.peft_matrices(self.holds_weight, rank).items()
        return {name: tensor.reshape(shape) for (name, shape), tensor in zip(shapes, padded, strict=True)}

    @classmethod
    def check_base(cls, linear: Any) -> None:
        """TypeError unless this kind of layer can share ``linear``'s base."""
        if not cls.stands_in_for(linear):
            raise TypeError(f"linear must be an nn.Linear with a plain weight, got {type(linear).__name__}")
        if fault := cls.why_not(linear):
            raise TypeError(f"linear must be an nn.Linear, got {fault}")

    def share_base(self, linear: nn.Linear) -> None:
        """Take sizes, weight, bias, hooks and training mode from ``linear``, which stays as it is."""
        self.__dict__.update(self._base[1])
        self.in_features, self.out_features = self.sizes(linear)
        share_base(self, linear)
        hook_like(linear, self, self._share_weights)

    def _share_weights(self, linear: nn.Module) -> None:
        self._parameters.update(linear._parameters)

    @property
    def holds_weight(self) -> nn.Linear:
        """The module that W is a parameter of, whose hook may keep it elsewhere."""
        return self

    @property
    def execution_device(self) -> torch.device:
        """Where the layer computes, and its adapters are."""
        return device_of(self.holds_weight)

    @property
    def frozen_weight(self) -> Any:
        """W as ``lora_linear`` takes it."""
        held = self._parameters  # as ``self.weight`` finds it, without the time that nn.Module takes to
        if "weight" in held:
            return held["weight"]
        return self.weight

    @property
    def frozen_bias(self) -> Any:
        """b as ``lora_linear`` takes it."""
        held = self._parameters
        if "bias" in held:
            return held["bias"]
        return self.bias

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The values of W [N, K] in ``dtype``, or in its own if that is wider."""
        return held(self.holds_weight).to(torch.promote_types(self.weight.dtype, dtype))

    def frozen_forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b."""
        return nn.functional.linear(x, self.weight, self.bias)

    @property
    def merged_dtype(self) -> torch.dtype:
        """The dtype that a merged weight has."""
        dtype: torch.dtype = self.weight.dtype
        return dtype

    def backend_choice(self, tokens: int) -> select.BackendChoice:
        """Which backend serves a call of so many tokens, and why."""
        if not self.fused:
            return select.BackendChoice("torch", "library calls: there is no fused kernel for this kind of layer")
        weight = self.frozen_weight
        if not isinstance(weight, Tensor):  # unpacked to the dtype of x, which is half precision as a rule
            weight = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
        x = weight.new_empty(1, self.in_features).expand(tokens, -1)
        return select.explain(self.config.backend, x, weight, self.rank_of_call)

    def original(self) -> Any:
        """What ``restore`` needs after ``set_merged``, off the device."""
        return held(self.holds_weight).to("cpu", copy=True)

    def set_merged(self, weight: Tensor) -> None:
        """Take W* [N, K] for W, and pass the adapters over."""
        hold(self.holds_weight, weight)
        self.merged = True

    def restore(self, original: Any) -> None:
        """The inverse of ``set_merged``."""
        hold(self.holds_weight, original)
        self.merged = False

    @property
    def a_stack(self) -> tuple[Tensor, ...]:
        """The A matrices [., K], its own and others', that one forward of this layer multiplies by."""
        config = self.config
        return call_of(config.shortcut, self, self.neighbours, ()).a_stack

    @property
    def rank_of_call(self) -> int:
        """R_a, the rows of ``a_stack``."""
        return rows(folded(self._call(())).a_stack)

    def reset_lora_parameters(self) -> None:
        """Start afresh, as ``config.init_lora_weights`` says; the layer then computes what the frozen one does."""
        if self.start_A is None or self.start_B is None or self.config.starts_from_data:
            super().reset_lora_parameters()
        else:
            a, b = from_weight(self.config, self.dense_weight(torch.float32))
            with torch.no_grad():
                self.lora_A.copy_(a)
                self.lora_B.copy_(b)
            self.reset_gates()
        self.take_off_start()
        if self.lora_magnitude_vector is not None:
            with torch.no_grad():
                self.lora_magnitude_vector.copy_(torch.linalg.vector_norm(self.dense_weight(torch.float32), dim=1))

    @torch.no_grad()
    def take_off_start(self) -> None:
        """Let the layer compute what the frozen one does with A and B as they are, where its start is taken off."""
        if self.start_A is not None and self.start_B is not None:
            self.start_A.copy_(self.lora_A)
            self.start_B.copy_(-self.lora_B)

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in_features] to y [..., out_features]; x by the name that ``nn.Linear`` has for it."""
        x = input
        if self.detour and (detoured := self._detoured(x)) is not None:
            return detoured
        state = self._open_pass()
        received: tuple[Tensor, ...] = ()
        if state is not None:
            leading = x.shape[:-1] if self.fused else self.leading(x)  # of most layers without a call
            received = state.enter(self, self.neighbours.earlier, leading)
        call = self._call(received)
        residual, bias = call.residual, self.frozen_bias
        scale = self._dora_scale(call) if self.config.use_dora else None
        if self.detour and self.replacement is not None:
            call = _replaced(call, *self.replacement)
        p = self.config.lora_dropout if self.config.lora_dropout and self.training else 0.0
        inner_bias = bias if scale is None else None
        if state is not None and state.trains is not torch.is_grad_enabled() and self.config.shortcut == "input":
            call, handed = self.projected(x, p, call, state)
            y, _ = self._low_rank(x, inner_bias, 0.0, call)
        elif self.shared is None or p > 0:
            y, handed = self._low_rank(x, inner_bias, p, call)
        else:
            y, handed = self.shared.run(self.index, x, call, partial(self._among_others, inner_bias))
        if scale is not None:
            y = (y * scale.to(y.dtype)) if bias is None else torch.addcmul(bias, y, scale.to(y.dtype))
        if self.detour and self.observer is not None and not recomputing():
            self._observe(x, residual)
        if handed is not None and state is not None:
            state.hand_on(*carried(self.config, received, handed))
        return y

    def _detoured(self, x: Tensor) -> Tensor | None:
        """y where it is not that of this adapter alone; None where it is after all."""
        if self.merged or self.disabled:
            return self.frozen_forward(x)
        if self.division:
            return in_parts(self, self.division, x)
        if self.training and torch.is_grad_enabled() and self.lora_A.requires_grad:
            self.refuse_unstarted()
        return None

    def leading(self, x: Tensor) -> torch.Size:
        """The shape of the tokens in x, for kinds of layers where that is not x without its last dimension."""
        return x.shape[:-1]

    def _low_rank(self, x: Tensor, bias: Tensor | None, p: float, call: Call) -> tuple[Tensor, Tensor | None]:
        """``lora_linear`` of the layer: y, and the rows of h = x A_stackᵀ that ``call.hand`` asks for."""
        a_stack, b_stack, c, residual, hand, _, _ = call if call.gate is None else folded(call)
        config = self.config
        side = SideChannel(c, config.scaling * self.factor, *(hand or (0, 0)))  # ``scaling`` would be one call more
        seed = self._new_seed(x.device) if p > 0 else None
        operands = Operands(x, self.frozen_weight, bias, residual, seed, a_stack, b_stack)
        y, handed = fused_linear(operands, side, p, config.backend)
        return y, handed

    def projected(self, x: Tensor, p: float, call: Call, state: ForwardState | None) -> tuple[Call, Tensor | None]:
        """The call with u made, and what is handed on.

        With "input" the layer after a part without gradients owns the A that this one multiplies x by for it, and
        trains it: in a forward that began with gradients that product has them, wherever this layer stands.

        Raises:
            RuntimeError: the forward began without gradients, so that the layer before kept none for this one.
        """
        trains, a_stack = torch.is_grad_enabled(), call.a_stack
        if state is not None and state.trains is not trains and self.config.shortcut == "input":
            handed = call.residual
            if trains and handed is not None and self.lora_A.requires_grad and not handed.requires_grad:
                raise RuntimeError(
                    f"{self._describe()}: the layer before ran without gradients, as the whole forward began, and so "
                    "this one would train on a part of its gradient: call the model with gradients enabled, and go "
                    "without them (torch.no_grad) inside its forward"
                )
            trains, a_stack = True, a_stack if trains else for_the_next(call, self)
        with torch.set_grad_enabled(trains):
            return with_projection(call, self._projected(x, a_stack, p))

    def _among_others(self, bias: Tensor | None, x: Tensor, call: Call, sharing: Sharing | None) -> tuple[Any, ...]:
        """The same of one of a group that reads x, without dropout: see ``ops.fused_linear``."""
        call = folded(call)
        side = SideChannel(call.c, self.config.scaling * self.factor, *(call.hand or (0, 0)))
        operands = Operands(x, self.frozen_weight, bias, call.residual, None, call.a_stack, call.b_stack, call.h)
        return fused_linear(operands, side, 0.0, self.config.backend, sharing)

    def _projected(self, x: Tensor, a_stack: tuple[Tensor, ...], p: float) -> Tensor:
        """h = D(x) A_stackᵀ [..., R_a] by itself."""
        return nn.functional.linear(nn.functional.dropout(x, p) if p > 0 else x, joined(a_stack, 0).to(x.dtype))

    def _new_seed(self, device: torch.device) -> Tensor:
        """What the mask of one call is drawn from."""
        return dropout.new_seed(device)

    def _observe(self, x: Tensor, residual: Tensor | None) -> None:
        """Tell the observer of a call."""
        assert self.observer is not None
        a, gates = self.whole_A, self.whole_gates
        if gates is not None and residual is None and self.config.shortcut == "input":  # its own input, once more
            residual = weighed(x.to(a.dtype) @ a.T, gates[1])
        self.observer.observe(x, a, residual)

    def _dora_scale(self, call: Call) -> Tensor | None:
        """m / ‖W + ΔW‖ [N], ΔW being the layer's own update; None without ``use_dora``."""
        if not self.config.use_dora:
            return None
        assert self.lora_magnitude_vector is not None
        b = torch.cat(call.b_stack, 1)
        a = torch.cat(call.a_stack)[: b.shape[1]]
        return self.lora_magnitude_vector / row_norms(self.dense_weight(self.merged_dtype), a, b, self.scaling)

    def with_update(self, delta: Tensor) -> Tensor:
        """W* [N, K] in float32 or better, for a plain update ΔW."""
        weight = self.dense_weight(torch.float32)
        weight = weight + delta.to(weight.dtype)
        scale = self._whole_dora_scale()
        return weight if scale is None else weight * scale.detach()[:, None]

    def _whole_dora_scale(self) -> Tensor | None:
        """m / ‖W + ΔW‖ [N] of the layer by itself; None without ``use_dora``."""
        return self._dora_scale(self._call(()))

    def _open_pass(self) -> ForwardState | None:
        """The forward pass that the layer takes from and hands on to; None if it does neither."""
        shortcut = self.config.shortcut
        if shortcut == "none" or (shortcut == "block" and is_dynamo_compiling()):
            return None  # compiled code is made for what is read here, and would ask for it in each call
        chain, (earlier, following) = self.chain, self.neighbours
        if chain is None or not (earlier or following):
            return None
        if not hands_on(shortcut, self.config.pre_num):
            if earlier and not chain.entered:
                chain.refuse_part(self.position)
            return None
        state = chain.passes.current()
        if state is None or state.is_stale:
            raise RuntimeError(outside(shortcut, chain.name, self.position))
        return state

    def _call(self, received: tuple[Tensor, ...]) -> Call:
        """The layer's part in its chain, given what was handed to it."""
        gates = None if self.config.gates == "none" else self.gates  # asked here too: of most layers without a call
        return call_of(self.config.shortcut, self, self.neighbours, received, gates)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._describe()}"


def _replaced(call: Call, a: Tensor, b: Tensor) -> Call:
    """The plain update (a, b) in place of the shortcut, handing on what the layer would have handed on."""
    if call.hand is None:
        return Call((a,), (b,))
    handed = torch.cat(call.a_stack)[slice(*call.hand)]
    return Call((a, handed), (b,), hand=(a.shape[0], a.shape[0] + handed.shape[0]))
