"""TensorParallelResLoRALinear: a ResLoRALinear whose frozen weight a tensor parallel plan has spread over processes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import dropout
from ..config import ResLoRAConfig
from ..dtensors import fill, is_dtensor, whole
from .initialization import row_norms
from .linear import ResLoRALinear
from .shortcuts import Call


class Layout(NamedTuple):
    """A plan's name for a linear layer and the dimension of W [N, K] that it cuts.

    What goes with the cut dimension is cut too. All else is whole in every process, each with a term of its gradient.
    """

    name: str
    cut: int

    def dimension_of(self, parameter: str) -> int | None:
        """The dimension in which a parameter of the layer is cut; None where it is whole."""
        if parameter == "weight":
            return self.cut
        if parameter in ("lora_A", "start_A"):
            return 1 if self.cut == 1 else None
        if parameter == "lora_gates":
            return None
        return 0 if self.cut == 0 else None  # B, bias and magnitude have a value or a row for each of the N outputs


LAYOUTS = (Layout("colwise", 0), Layout("rowwise", 1))


class TensorParallelResLoRALinear(ResLoRALinear):
    """y = x Wᵀ + b + the low-rank term, where P processes hold a part of W each, by a colwise or a rowwise plan.

    Colwise, W and B are cut along N; x and A are whole in every process, and with them h = D(x) Aᵀ. Rowwise, W, A and
    x are cut along K: process p has h_p = D(x_p) A_pᵀ, and h = Σ_p h_p. All that follows is linear in h, so that
    u_p = c h_p + residual_p and y_p = x_p W_pᵀ + s u_p Bᵀ are terms of sums too, and the plan's own reduction of
    y = Σ_p y_p reduces the low-rank term with it. Either way a layer hands on what it has, and nothing is sent for it.

    What is whole in every process (A colwise, B rowwise) has a term of its gradient in each; a hook of the parameter
    adds them up, once in a backward.
    """

    sums = takes_samples = False  # whose u is a term of a sum over processes
    holds_all_it_reads = False
    shares_projections = False  # they tell one x by its identity, and each layer takes parts of its own

    @staticmethod
    def stands_in_for(module: nn.Module) -> bool:
        return ResLoRALinear.stands_in_for(module) and is_dtensor(module.weight)

    @staticmethod
    def why_not(module: Any) -> str | None:
        if layout_of(module) is None:
            return (
                f"a {type(module).__name__} whose weight is spread as {module.weight.placements}: only a colwise or a "
                "rowwise plan's, cut in one dimension, can be adapted. Leave it out of the plan, or of target_modules"
            )
        return ResLoRALinear.why_not(module)

    layout: Layout  # of the weight as it was adapted: FSDP2 cuts it once more

    def share_base(self, linear: nn.Linear) -> None:
        super().share_base(linear)
        layout = layout_of(linear)
        assert layout is not None
        self.layout = layout
        self._base[1].pop("forward", None)  # the plan's, around the other module
        _install(linear, self)

    def leave(self) -> nn.Linear:
        linear: nn.Linear = super().leave()
        _install(self, linear)
        return linear

    def _adapt(self, config: ResLoRAConfig, adapter_dtype: torch.dtype | None, init_values: bool = True) -> None:
        super()._adapt(config, adapter_dtype, init_values)
        self._spread_parameters(*self.adapter_parameters())
        if self._parameters.get("bias") is not None and self.layout.dimension_of("bias") is None:
            _hook(self._parameters["bias"])

    def fit_gates(self) -> None:
        super().fit_gates()
        if self.lora_gates is not None and is_dtensor(self.lora_A):
            self._spread_parameters("lora_gates")

    def _spread_parameters(self, *names: str) -> None:
        """Give every process of the plan its part of those of the adapter's parameters that are plain tensors yet."""
        from torch.distributed.tensor import distribute_tensor

        for name in names:
            parameter = self._parameters[name]
            assert parameter is not None
            if is_dtensor(parameter):
                continue
            spread = distribute_tensor(parameter.detach(), self._mesh, self._placements(name))
            self.register_parameter(name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
            if self.layout.dimension_of(name) is None:
                _hook(self._parameters[name])

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        nn.Linear.register_parameter(self, name, param)

    @property
    def _mesh(self) -> Any:
        """The processes that the plan spread the weight over, or, while FSDP2 shards it too, all of both."""
        return cast(Any, self.weight).device_mesh

    def _placements(self, name: str) -> list[Any]:
        from torch.distributed.tensor import Replicate, Shard

        dim = self.layout.dimension_of(name)
        return [Replicate() if dim is None else Shard(dim)]

    def _own(self, name: str) -> Tensor:
        """This process's part of a parameter; of one that is whole, the gradient is taken for a term of a sum."""
        parameter = self._parameters[name]
        assert parameter is not None
        if not is_dtensor(parameter):
            raise RuntimeError(
                f"parameter {name!r} of a tensor parallel layer is not spread over processes now: adapt the model "
                "after parallelize_module (or from_pretrained with tp_plan) and before shard_reslora"
            )
        return part_of(parameter, self.layout.dimension_of(name) is None)

    @property
    def a_parts(self) -> tuple[Tensor, ...]:
        return tuple(self._own(name) for name in ("lora_A", "start_A") if self._parameters[name] is not None)

    @property
    def b_parts(self) -> tuple[Tensor, ...]:
        return tuple(self._own(name) for name in ("lora_B", "start_B") if self._parameters[name] is not None)

    @property
    def whole_A(self) -> Tensor:
        return torch.cat([whole(p) for p in (self.lora_A, self.start_A) if p is not None])

    @property
    def whole_B(self) -> Tensor:
        return torch.cat([whole(p) for p in (self.lora_B, self.start_B) if p is not None], 1)

    @property
    def gates(self) -> Tensor | None:
        return None if self.config.gates == "none" else self._own("lora_gates")

    @property
    def whole_gates(self) -> Tensor | None:
        return None if self.lora_gates is None else whole(self.lora_gates)

    @property
    def frozen_weight(self) -> Any:
        return self._own("weight")

    @property
    def frozen_bias(self) -> Any:
        """b, which one of the terms of y has; the others have zeros."""
        if self.bias is None:
            return None
        bias = self._own("bias")
        first = self.layout.name == "colwise" or self._mesh.get_local_rank() == 0
        return bias if first else bias * 0

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return whole(self.weight).to(torch.promote_types(self.weight.dtype, dtype))

    def original(self) -> Any:
        return cast(Any, self.weight.detach()).to_local().to("cpu", copy=True)

    def set_merged(self, weight: Tensor) -> None:
        with torch.no_grad():
            fill(self.weight, weight)
        self.merged = True

    def restore(self, original: Any) -> None:
        cast(Any, self.weight.detach()).to_local().copy_(original)
        self.merged = False

    def reset_lora_parameters(self) -> None:
        """As for any layer; what process 0 of the plan draws is every process's start."""
        from torch.distributed.tensor import distribute_tensor

        spread = {name: p for name, p in self.adapter_parameters().items() if is_dtensor(p)}
        for name, parameter in spread.items():
            plain = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            self._parameters[name] = nn.Parameter(plain, requires_grad=False)
        try:
            super().reset_lora_parameters()
            drawn = {name: cast(Tensor, self._parameters[name]).detach() for name in spread}
        finally:
            self._parameters.update(spread)
        for name, parameter in spread.items():
            parameter.detach().copy_(distribute_tensor(drawn[name], self._mesh, self._placements(name)))

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in_features], spread or this process's part of it, to y [..., out_features], spread."""
        return self._spread(super().forward(self._own_input(input)))

    def frozen_forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.frozen_weight, self.frozen_bias)

    def _own_input(self, x: Any) -> Tensor:
        """x whole (colwise), or this process's columns of it (rowwise)."""
        if not is_dtensor(x):
            return cast(Tensor, x)
        from torch.distributed.tensor import Replicate, Shard

        wanted = Replicate() if self.layout.name == "colwise" else Shard(x.dim() - 1)
        if x.placements != (wanted,):
            x = x.redistribute(placements=[wanted])
        return part_of(x, self.layout.name == "colwise")

    def _spread(self, y: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial

        mesh = self._mesh
        if self.layout.name == "rowwise":
            return DTensor.from_local(y, mesh, [Partial()], run_check=False)
        return cast(Tensor, _cut_last(y, mesh, self.out_features))

    def _new_seed(self, device: torch.device) -> Tensor:
        """Processes that draw alike drop the same of a whole x, and each something else of its own columns."""
        seed = dropout.new_seed(device)
        return seed if self.layout.name == "colwise" else seed ^ self._mesh.get_local_rank()

    def _observe(self, x: Tensor, residual: Tensor | None) -> None:
        """Whoever gathers statistics is told of whole tensors."""
        assert self.observer is not None
        if self.layout.name == "rowwise":
            from torch.distributed.tensor import DTensor, Partial

            mesh = self._mesh
            x = _cut_last(x.detach(), mesh, self.in_features).full_tensor()
            if residual is not None:
                residual = DTensor.from_local(residual.detach(), mesh, [Partial()], run_check=False).full_tensor()
        super()._observe(x, residual)

    def _dora_scale(self, call: Call) -> Tensor | None:
        """m / ‖W + ΔW‖ of this process's rows; rowwise the norms are summed over the processes, [N] values."""
        if not self.config.use_dora:
            return None
        b = torch.cat(call.b_stack, 1)
        a = torch.cat(call.a_stack)[: b.shape[1]]
        group = None if self.layout.name == "colwise" else self._mesh.get_group()
        return self._own("lora_magnitude_vector") / row_norms(self._own("weight").detach(), a, b, self.scaling, group)

    def _whole_dora_scale(self) -> Tensor | None:
        scale = self._dora_scale(self._call(()))
        if scale is None or self.layout.name == "rowwise":
            return scale
        return cast(Tensor, _cut_last(scale.detach(), self._mesh, self.out_features).full_tensor())


def layout_of(linear: nn.Linear) -> Layout | None:
    """How a plan has spread a linear layer; None for any other way than by rows or columns over one dimension."""
    placements = cast(Any, linear.weight).placements
    if len(placements) > 1:
        return None
    return next((layout for layout in LAYOUTS if placements[0].is_shard(layout.cut)), None)


def part_of(tensor: Tensor, summed: bool) -> Tensor:
    """A process's part of a tensor that is spread; ``summed``: its gradients are terms of a sum over the processes."""
    part: Tensor = _Part.apply(tensor, summed)  # type: ignore[no-untyped-call]
    return part


class _Part(torch.autograd.Function):
    """``DTensor.to_local``, but a plain tensor also where the plan's communication for it is still under way."""

    @staticmethod
    def forward(ctx: Any, tensor: Any, summed: bool) -> Tensor:
        from torch.distributed._functional_collectives import AsyncCollectiveTensor

        ctx.spread = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
        ctx.summed = summed
        part = tensor.to_local()
        part = part.wait() if isinstance(part, AsyncCollectiveTensor) else part
        return cast(Tensor, part.view_as(part))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        from torch.distributed.tensor import DTensor, Partial

        mesh, placements, shape, stride = ctx.spread
        placements = [Partial()] if ctx.summed else placements
        return DTensor.from_local(gradient, mesh, placements, run_check=False, shape=shape, stride=stride), None


def _hook(parameter: Any) -> None:
    """Let its gradients be added up over the processes, whenever it is trained."""
    trained = parameter.requires_grad
    parameter.requires_grad_().register_hook(_reduced)
    parameter.requires_grad_(trained)


def _reduced(gradient: Any) -> Any:
    """The sum of a gradient's terms in all processes."""
    from torch.distributed.tensor import Replicate

    if not is_dtensor(gradient) or not any(placement.is_partial() for placement in gradient.placements):
        return gradient
    return gradient.redistribute(placements=[Replicate() if p.is_partial() else p for p in gradient.placements])


def _cut_last(part: Tensor, mesh: Any, size: int) -> Any:
    """A process's part of a tensor whose last dimension, ``size`` long, is cut; parts may differ in length."""
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((*part.shape[:-1], size))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, [Shard(part.dim() - 1)], run_check=False, shape=shape, stride=stride)


def is_parallelized(module: nn.Module) -> bool:
    """Whether ``forward`` is replaced on the instance, by a tensor parallel style of Transformers and no one else."""
    return _style_of(module) is not None


def _style_of(module: nn.Module) -> tuple[Any, Any] | None:
    """The style of Transformers' plan that replaced the module's forward, and its mesh."""
    forward: Callable[..., Any] | None = vars(module).get("forward")
    if getattr(forward, "__module__", "") != "transformers.distributed.tensor_parallel":
        return None
    held = inspect.getclosurevars(cast(Any, forward)).nonlocals
    original = getattr(held.get("original_forward"), "__func__", None)
    return (held["self"], held["mesh"]) if "self" in held and original is type(module).forward else None


def _install(source: nn.Module, target: nn.Module) -> None:
    """Let Transformers' plan call ``target`` as it calls ``source``, if it has replaced that one's forward."""
    found = _style_of(source)
    if found is None or "forward" in vars(target):
        return
    style, mesh = copy.copy(found[0]), found[1]
    if isinstance(target, ResLoRALinear):  # it takes its own parts; the plan's way to would miss its neighbours
        style.should_use_local_tensors = lambda module: False
    else:
        vars(style).pop("should_use_local_tensors", None)
    style.install_forward(target, mesh)
