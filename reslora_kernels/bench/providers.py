"""Who is timed: the same layers, each written the way its users would write it, behind one interface.

Every provider is built on the same weights and starts from the same adapters, so that outputs and gradients can be
compared before anything is timed. Beside the package's own they are LoRA written by hand and other libraries' layers.

Each library is imported when asked for, and left out with the reason where it is not there. Their faults, worked
around: Unsloth's fused forms write over x, so its form of one projection, LoRA_W, is timed; it takes 3-D inputs, and
dropout in newer versions only. LoRAFusion takes 3-D inputs and needs p > 0; the seed comes from Python's ``random``
unless given, and its dropout, like its sums by atomics, is not reproducible bit for bit.

They are called as they were read, on 26 November 2026: Unsloth in the wheel 2026.10.9, whose LoRA_W takes
(X, W, W_quant, A, B, S, dropout_p=None, bias=None), and at commit 015bdef0d94a of 22 August, whose takes no more than
S; LoRAFusion at commit c48d7fdb1b54 of 17 September 2025, its newest. None of it has run here, which has no GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from reslora_kernels.backends import select
from reslora_kernels.bench.cases import Case, Method
from reslora_kernels.bench.workload import Layers, Workload
from reslora_kernels.config import BackendName, ResLoRAConfig
from reslora_kernels.layers.kinds import link
from reslora_kernels.layers.linear import ResLoRALinear

FROZEN = "frozen"
SCALING = 2.0  # s, as lora_alpha = 2 r makes it


class HandWritten(torch.autograd.Function):
    """y = x Wᵀ + b + s x Aᵀ Bᵀ with three products forward, five backward, and no option at all."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        u = x @ a.T
        ctx.save_for_backward(x, weight, a, b, u)
        ctx.scaling = scaling
        y = (u * scaling) @ b.T if bias is None else torch.addmm(bias, u, b.T, alpha=scaling)
        return y.addmm_(x, weight.T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, u = ctx.saved_tensors
        du = (dy @ b) * ctx.scaling
        return (du @ a).addmm_(dy, weight), None, None, du.T @ x, (dy.T @ u) * ctx.scaling, None


def hand_written(workload: Workload, method: Method) -> Layers:
    def layer(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = HandWritten.apply(x, weight, None, a, b, SCALING)  # type: ignore[no-untyped-call]
        return y

    return _layer_by_layer(workload, layer)


def hand_written_missing(case: Case, method: Method, device: torch.device) -> str | None:
    return "it has no dropout" if case.p else None


def addmm(workload: Workload, method: Method) -> Layers:
    """One ``torch.addmm`` on the frozen linear's result; autograd does the backward."""
    p = workload.case.p

    def layer(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        dropped = nn.functional.dropout(x, p) if p else x
        return torch.addmm(nn.functional.linear(x, weight), dropped @ a.T, b.T, alpha=SCALING)

    return _layer_by_layer(workload, layer)


def _layer_by_layer(workload: Workload, layer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Layers:
    a, b = _copies(workload.a), _copies(workload.b)
    return Layers(lambda xs: list(map(layer, xs, workload.weights, a, b)), [*a, *b])


def peft(workload: Workload, method: Method, autocast_adapter_dtype: bool) -> Layers:
    from peft import LoraConfig, get_peft_model

    case, count = workload.case, workload.case.layers
    config = LoraConfig(
        r=case.r, lora_alpha=2 * case.r, lora_dropout=case.p, target_modules=[str(n) for n in range(count)]
    )
    stack: Any = get_peft_model(
        nn.Sequential(*workload.linears()),
        config,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    stack.train()
    layers = [stack.base_model.model[n] for n in range(count)]
    parameters = [layer.lora_A["default"].weight for layer in layers]
    parameters += [layer.lora_B["default"].weight for layer in layers]
    for parameter, value in zip(parameters, [*workload.a, *workload.b], strict=True):
        parameter.data.copy_(value)
    return Layers(lambda xs: [layer(x) for layer, x in zip(layers, xs, strict=True)], parameters)


def peft_missing(case: Case, method: Method, device: torch.device, half_only: bool = False) -> str | None:
    if half_only and case.torch_dtype == torch.float32:
        return "the same as peft where the weights are float32"
    return None if importlib.util.find_spec("peft") else "peft is not installed"


def unsloth(workload: Workload, method: Method) -> Layers:
    function, dropout = _unsloth().LoRA_W.apply, (workload.case.p,) if workload.case.p else ()

    def layer(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = function(x.unsqueeze(0), weight, None, a, b, SCALING, *dropout)
        return y.squeeze(0)

    return _layer_by_layer(workload, layer)


def unsloth_missing(case: Case, method: Method, device: torch.device) -> str | None:
    if (reason := _gpu_library_missing("unsloth", _unsloth, device)) or not case.p:
        return reason
    takes_it = "dropout_p" in inspect.signature(_unsloth().LoRA_W.forward).parameters
    return None if takes_it else "this version of it has no dropout"


@cache
def _unsloth() -> Any:
    return importlib.import_module("unsloth.kernels.fast_lora")


def lorafusion(workload: Workload, method: Method) -> Layers:
    function, p = _lorafusion().fused_linear_lora, workload.case.p

    def layer(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = function(x.unsqueeze(0), weight, a, b, alpha=SCALING, seed=1, dropout_p=p)
        return y.squeeze(0)

    return _layer_by_layer(workload, layer)


def lorafusion_missing(case: Case, method: Method, device: torch.device) -> str | None:
    needs_dropout = None if case.p else "it needs dropout p > 0"
    return _gpu_library_missing("lorafusion", _lorafusion, device) or needs_dropout


@cache
def _lorafusion() -> Any:
    return importlib.import_module("lorafusion.ops.lora_v1")


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def _gpu_library_missing(name: str, load: Any, device: torch.device) -> str | None:
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed"
    if device.type != "cuda":
        return f"{name} needs a GPU"
    try:
        load()
    except Exception as error:  # whatever its import raises on this machine is the reason
        return f"{name} cannot be imported: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return None


@dataclass(frozen=True)
class Provider:
    """One way to compute the layers.

    Args:
        name: as ``--provider`` takes it; ``about`` says what it is, in one line.
        build: makes its layers on a workload, for a method.
        missing: why it cannot run a case of a method here; None where it can.
        lora_only: serves plain LoRA alone; compiles: times only the methods that the case names for it.
        same_mask: with dropout it draws the masks of ``reslora_kernels.dropout``, so it can be checked then too.
        least_p: the smallest dropout it can run with; results are checked at this p, otherwise at 0.
    """

    name: str
    about: str
    build: Callable[[Workload, Method], Layers]
    missing: Callable[[Case, Method, torch.device], str | None] = lambda case, method, device: None
    lora_only: bool = False
    compiles: bool = False
    same_mask: bool = False
    least_p: float = 0.0

    def methods(self, case: Case) -> list[Method]:
        """The methods of a case that it has an answer to."""
        if self.name == FROZEN:
            return [case.methods[0]]
        if self.compiles:
            return list(case.compiled)
        return [method for method in case.methods if not self.lora_only or method.shortcut == "none"]


def frozen(workload: Workload, method: Method) -> Layers:
    weights = workload.weights
    return Layers(lambda xs: [nn.functional.linear(x, w) for x, w in zip(xs, weights, strict=True)], [])


def adapters(workload: Workload) -> tuple[list[Tensor], list[Tensor]]:
    """Fresh trainable copies of A and B."""
    a, b = ([t.clone().requires_grad_() for t in group] for group in (workload.a, workload.b))
    return a, b


def plain_layers(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    shortcut: str,
    pre_num: int,
    scaling: float,
    p: float,
) -> list[Tensor]:
    """Eqs. 1 to 4 of the paper in the form of its released layers, scaling last; autograd does the backward."""
    dropped = [nn.functional.dropout(x, p) for x in xs] if p else list(xs)
    ys = []
    for n, x in enumerate(dropped):
        y = nn.functional.linear(xs[n], weights[n])
        reach = n if pre_num == -1 else min(pre_num, n)
        if shortcut == "none":
            y = y + (x @ a[n].T @ b[n].T) * scaling
        elif shortcut == "input":
            y = y + ((x + dropped[max(n - 1, 0)]) @ a[n].T @ b[n].T) * scaling
        elif shortcut == "block":
            for k in range(reach + 1):
                y = y + (x @ a[n - k].T @ b[n - k].T) * scaling
        else:
            h = x @ a[n].T
            for k in range(1, reach + 1):
                h = h + dropped[n - k] @ a[n - k].T
            y = y + (h @ b[n].T) * scaling
        ys.append(y)
    return ys


def scaling_of(case: Case) -> float:
    """s, the same for every provider: lora_alpha = 2 r."""
    return config_of(case, Method("none")).scaling


def config_of(case: Case, method: Method, backend: BackendName = "auto") -> ResLoRAConfig:
    return ResLoRAConfig(
        r=case.r,
        lora_alpha=2 * case.r,
        lora_dropout=case.p,
        shortcut=method.shortcut,
        pre_num=method.pre_num,
        backend=backend,
    )


def plain(workload: Workload, method: Method) -> Layers:
    return _plain(plain_layers, workload, method)


@cache
def _compiled_layers() -> Callable[..., list[Tensor]]:
    function: Callable[..., list[Tensor]] = torch.compile(plain_layers, dynamic=False)
    return function


def compiled(workload: Workload, method: Method) -> Layers:
    """One compilation serves all input sets of a case."""
    return _plain(_compiled_layers(), workload, method)


def _plain(function: Callable[..., list[Tensor]], workload: Workload, method: Method) -> Layers:
    a, b = adapters(workload)
    weights, case = workload.weights, workload.case
    scalars = (method.shortcut, method.pre_num, scaling_of(case), case.p)
    return Layers(lambda xs: function(xs, weights, a, b, *scalars), [*a, *b])


def ours(workload: Workload, method: Method, backend: BackendName) -> Layers:
    case = workload.case
    config = config_of(case, method, backend)
    layers = [ResLoRALinear.from_linear(linear, config) for linear in workload.linears()]
    for layer, a, b in zip(layers, workload.a, workload.b, strict=True):
        layer.lora_A.data.copy_(a)
        layer.lora_B.data.copy_(b)
    chain = link(layers)

    def run(xs: Sequence[Tensor]) -> list[Tensor]:
        with chain.forward_pass():
            return [layer(x) for layer, x in zip(layers, xs, strict=True)]

    return Layers(run, [layer.lora_A for layer in layers] + [layer.lora_B for layer in layers])


def cannot_serve(case: Case, method: Method, device: torch.device, backend: BackendName) -> str | None:
    """Why a backend cannot run the case here.

    Raises:
        ValueError: the environment puts one backend in the place of all.
    """
    if forced := select.override():
        raise ValueError(f"{select.OVERRIDE}={forced} would time one backend under every name; unset it")
    if backend == "auto":
        return None if device.type == "cuda" else "on a CPU the same as ours-torch"
    if reason := select.unavailable_reason(backend):
        return reason
    if device.type == "cpu" and backend != "torch":
        return f"{backend} is for tensors on a GPU"
    return None


_OURS: tuple[tuple[BackendName, str], ...] = (
    ("auto", "this package as it comes: backend chosen call by call"),
    ("torch", "this package, library calls: low-rank product first, frozen matmul on top of it in place"),
    ("triton", "this package, Triton kernels"),
    ("cuda", "this package, CUDA kernels"),
)
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(FROZEN, "the frozen linears alone, forward and dx: the floor", frozen),
        Provider("plain", "the paper's layers written plainly in PyTorch; autograd does the backward", plain),
        Provider("plain-compiled", "the same under torch.compile", compiled, compiles=True),
        Provider(
            "hand-written",
            "LoRA as one autograd.Function written by hand, of library calls",
            hand_written,
            hand_written_missing,
            lora_only=True,
        ),
        Provider(
            "addmm",
            "torch.addmm on the frozen linear's result; autograd does the backward",
            addmm,
            lora_only=True,
        ),
        Provider(
            "peft",
            "PEFT LoRA, autocast_adapter_dtype=False: adapters in the weights' dtype",
            partial(peft, autocast_adapter_dtype=False),
            peft_missing,
            lora_only=True,
        ),
        Provider(
            "peft-float32",
            "PEFT LoRA as it comes, autocast_adapter_dtype=True: adapters in float32",
            partial(peft, autocast_adapter_dtype=True),
            partial(peft_missing, half_only=True),
            lora_only=True,
        ),
        Provider(
            "unsloth",
            "Unsloth's LoRA_W, one projection; writes over no input",
            unsloth,
            unsloth_missing,
            lora_only=True,
        ),
        Provider(
            "lorafusion",
            "LoRAFusion's fused_linear_lora",
            lorafusion,
            lorafusion_missing,
            lora_only=True,
            least_p=1e-7,
        ),
        *(
            Provider(
                "ours" if backend == "auto" else f"ours-{backend}",
                about,
                partial(ours, backend=backend),
                partial(cannot_serve, backend=backend),
                same_mask=True,
            )
            for backend, about in _OURS
        ),
    )
}


def chosen(names: Sequence[str] | None) -> list[Provider]:
    """Providers by name, in the order of PROVIDERS; all without names. The frozen linears are always among them.

    Raises:
        ValueError: there is no such provider.
    """
    for name in names or ():
        if name not in PROVIDERS:
            raise ValueError(f"unknown provider {name!r}; the providers are {', '.join(PROVIDERS)}")
    return [p for name, p in PROVIDERS.items() if not names or name in names or name == FROZEN]
