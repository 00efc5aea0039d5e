"""A training step of a whole model, adapted in several ways on the same frozen weights.

Forward, backward and AdamW; one of the ways is the paper's layers written plainly, in the place of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reslora_kernels.adapt.apply import apply_reslora
from reslora_kernels.adapt.record import adapted_layers, record_of
from reslora_kernels.bench import timing
from reslora_kernels.bench.cases import LORA, Method
from reslora_kernels.bench.model_cases import FAMILIES, ModelCase, missing
from reslora_kernels.bench.results import FAILED, REFUSED, SKIPPED, TIMED, ModelMeasurement
from reslora_kernels.bench.suite import AGAIN, Bench
from reslora_kernels.bench.timing import check_alive, one_line
from reslora_kernels.bench.workload import peak_bytes
from reslora_kernels.config import ResLoRAConfig
from reslora_kernels.layers.linear import ResLoRALinear
from reslora_kernels.testing import relative_error


class PlainChain:
    """Inputs of the chain's layers in the current forward pass, as the paper's released layers keep them."""

    def __init__(self) -> None:
        self.layers: list[PlainLinear] = []
        self.inputs: list[Tensor] = []


class PlainLinear(nn.Module):
    """Eqs. 1 to 4; adapters in the weight's dtype."""

    def __init__(self, layer: ResLoRALinear, chain: PlainChain) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Parameter(layer.lora_A.detach().to(layer.weight.dtype))
        self.lora_B = nn.Parameter(layer.lora_B.detach().to(layer.weight.dtype))
        self.config = layer.config
        self.position = len(chain.layers)
        self.chain = chain
        chain.layers.append(self)

    def forward(self, x: Tensor) -> Tensor:
        n, shortcut, s = self.position, self.config.shortcut, self.config.scaling
        layers, inputs = self.chain.layers, self.chain.inputs
        if n == 0:
            inputs.clear()
        inputs.append(x)
        reach = n if self.config.pre_num == -1 else min(self.config.pre_num, n)
        y = nn.functional.linear(x, self.weight, self.bias)
        if shortcut == "none":
            return y + (x @ self.lora_A.T @ self.lora_B.T) * s
        if shortcut == "input":
            return y + ((x + inputs[max(n - 1, 0)]) @ self.lora_A.T @ self.lora_B.T) * s
        if shortcut == "block":
            for k in range(reach + 1):
                y = y + (x @ layers[n - k].lora_A.T @ layers[n - k].lora_B.T) * s
            return y
        h = x @ self.lora_A.T
        for k in range(1, reach + 1):
            h = h + inputs[n - k] @ layers[n - k].lora_A.T
        return y + (h @ self.lora_B.T) * s


def write_plainly(model: nn.Module) -> dict[str, nn.Parameter]:
    """Replace every adapted layer by a plain one of the same chain and place; returns A and B of all by name."""
    adapted = adapted_layers(model)
    names = {id(layer): name for name, layer in adapted.items()}
    found: dict[str, nn.Parameter] = {}
    record = record_of(model)
    for hook in record.hooks:  # which open the chains' passes, and look for their layers
        hook.remove()
    for chain in record.chains:
        plain = PlainChain()
        for layer in chain.layers:
            name = names[id(layer)]
            assert isinstance(layer, ResLoRALinear)
            new = PlainLinear(layer, plain)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new)
            found[f"{name}.lora_A"], found[f"{name}.lora_B"] = new.lora_A, new.lora_B
    return found


FLOOR = f"frozen {LORA}"
CHECKED_ROUNDING = 16  # steps of rounding that a whole model may differ by, on top of twice plain PyTorch's error


@dataclass
class Trained:
    """One way to adapt a model: the model, A and B of every layer by name, and what trains them."""

    provider: str
    method: Method
    model: nn.Module
    adapters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | None = None


@dataclass
class Batch:
    """Arguments of a model's forward, and the gradient at its output. A gradient is wanted for the input ``leaf``."""

    name: str
    leaf: Tensor
    others: dict[str, Any]
    gradient: Tensor

    def forward(self, model: nn.Module) -> Tensor:
        output: Tensor = model(**{self.name: self.leaf}, **self.others)[0]
        return output

    def to(self, dtype: torch.dtype) -> Batch:
        others = {k: v.to(dtype) if torch.is_floating_point(v) else v for k, v in self.others.items()}
        leaf = self.leaf.detach().to(dtype).requires_grad_()
        return Batch(self.name, leaf, others, self.gradient.to(dtype))


def run_model(bench: Bench, case: ModelCase, note: Callable[[str], None] = lambda _: None) -> list[ModelMeasurement]:
    """Frozen, PEFT LoRA, plain ResLoRA layers, our LoRA and our ResLoRA layers, side by side."""
    wanted: list[tuple[str, Method]] = [("frozen", LORA), ("peft", LORA), ("plain", case.method)]
    wanted += [("ours", LORA), ("ours", case.method)]
    rows = {pair: _row(case, *pair) for pair in wanted}
    reason = missing(case)
    if reason is not None:
        for row in rows.values():
            row.status, row.reason = SKIPPED, reason
        return list(rows.values())
    try:
        note("building")
        base, dtype = build_base(case, bench.device)
        variants = _variants(case, base, rows)
        note("checking")
        _check(case, base, dtype, bench, variants, rows)
        batch = make_batch(case, base, dtype, bench.device)
        note(f"timing {len(variants)} side by side")
        _time(bench, case, batch, variants, rows)
    except Exception as error:  # the model itself cannot be made or run here: every way to adapt it has no figure
        check_alive(bench.device)
        for row in rows.values():
            if row.status == TIMED and not row.seconds:
                row.status, row.reason = FAILED, one_line(error)
    return list(rows.values())


def _row(case: ModelCase, provider: str, method: Method) -> ModelMeasurement:
    label = "" if provider == "frozen" else str(method)
    row = ModelMeasurement(case.name, case.swept, case.value, provider, label, TIMED, settings=asdict(case))
    row.unit = FAMILIES[case.family].unit
    return row


def build_base(case: ModelCase, device: torch.device) -> tuple[nn.Module, torch.dtype]:
    """The frozen model with random weights, in bfloat16 on a GPU and float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = FAMILIES[case.family].make(case)
        finally:
            torch.set_default_dtype(before)
    return model.to(device).train().requires_grad_(False), dtype


def make_batch(case: ModelCase, model: nn.Module, dtype: torch.dtype, device: torch.device) -> Batch:
    torch.manual_seed(1)
    name, leaf, others = FAMILIES[case.family].batch(case, model, dtype, device)
    with torch.no_grad():
        output = model(**{name: leaf}, **others)[0]
    return Batch(name, leaf.requires_grad_(), others, torch.randn_like(output))


def share(model: nn.Module) -> nn.Module:
    """A copy whose modules are its own and whose weights are not."""
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def adapt(case: ModelCase, base: nn.Module, provider: str, method: Method) -> Trained:
    """The base adapted by one provider, with equal A and B for every provider; B is not zero, so A has a gradient."""
    model = share(base)
    if provider == "frozen":
        return Trained(provider, method, model, {})
    targets = FAMILIES[case.family].targets
    if provider == "peft":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=case.r, lora_alpha=2 * case.r, target_modules=list(targets))
        model = get_peft_model(model, config)
        named = {
            name.removeprefix("base_model.model.").replace(".default.weight", ""): p
            for name, p in model.named_parameters()
            if p.requires_grad
        }
    else:
        own = ResLoRAConfig(
            r=case.r,
            lora_alpha=2 * case.r,
            target_modules=targets,
            shortcut=method.shortcut,
            pre_num=method.pre_num,
        )
        apply_reslora(model, own, example_inputs=_example(case, base))
        if provider == "plain":
            named = write_plainly(model)
        else:
            layers = adapted_layers(model).items()
            named = {f"{name}.lora_{ab}": getattr(layer, f"lora_{ab}") for name, layer in layers for ab in "AB"}
    _fill(named)
    return Trained(provider, method, model.train(), named)


def _example(case: ModelCase, base: nn.Module) -> dict[str, Any]:
    first = next(base.parameters())
    short = case.replace(batch=1, sequence=min(case.sequence, 16))
    name, leaf, others = FAMILIES[case.family].batch(short, base, first.dtype, first.device)
    return {name: leaf, **others}


def _fill(adapters: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in sorted(adapters):
            parameter = adapters[name]
            values = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5 * 0.1
            parameter.copy_(values.to(torch.bfloat16))  # exact in every dtype that adapters are kept in


def _variants(case: ModelCase, base: nn.Module, rows: dict[tuple[str, Method], ModelMeasurement]) -> list[Trained]:
    made = []
    for (provider, method), row in rows.items():
        try:
            trained = adapt(case, base, provider, method)
        except ImportError as error:
            row.status, row.reason = SKIPPED, one_line(error)
            continue
        except Exception as error:  # a provider that cannot adapt this model has no figure
            row.status, row.reason = FAILED, one_line(error)
            continue
        parameters = list(trained.adapters.values())
        trained.optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0) if parameters else None
        made.append(trained)
    return made


def step_results(trained: Trained, batch: Batch) -> dict[str, Tensor]:
    """The output, and every adapter's gradient as one vector in the order of names."""
    output = batch.forward(trained.model)
    names = sorted(trained.adapters)
    gradients = torch.autograd.grad(output, [trained.adapters[name] for name in names], batch.gradient)
    return {"output": output.detach(), "gradients": torch.cat([g.flatten().double() for g in gradients])}


def _check(
    case: ModelCase,
    base: nn.Module,
    dtype: torch.dtype,
    bench: Bench,
    variants: Sequence[Trained],
    rows: dict[tuple[str, Method], ModelMeasurement],
) -> None:
    """Against plain layers in float64 on a small batch: twice the error of those in the same dtype, and a bit."""
    small = replace(case, batch=1, sequence=min(case.sequence, 64 if case.family != "unet" else 16))
    batch = make_batch(small, base, dtype, bench.device)
    exact_base = copy.deepcopy(base).double()
    truths: dict[Method, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    for trained in variants:
        if trained.provider == "frozen":
            continue
        if trained.method not in truths:
            exact = step_results(adapt(case, exact_base, "plain", trained.method), batch.to(torch.float64))
            plain = step_results(adapt(case, base, "plain", trained.method), batch)
            truths[trained.method] = exact, plain
        exact, plain = truths[trained.method]
        found = step_results(trained, batch)
        row = rows[trained.provider, trained.method]
        row.error = max(relative_error(found[name], exact[name]) for name in exact)
        for name in exact:
            allowed = 2 * relative_error(plain[name], exact[name]) + CHECKED_ROUNDING * torch.finfo(dtype).eps
            if not relative_error(found[name], exact[name]) <= allowed:
                row.status, row.reason = REFUSED, f"wrong {name}: error {row.error:.1e} is above {allowed:.1e}"


def _time(
    bench: Bench,
    case: ModelCase,
    batch: Batch,
    variants: Sequence[Trained],
    rows: dict[tuple[str, Method], ModelMeasurement],
) -> None:
    sound = [v for v in variants if rows[v.provider, v.method].status == TIMED]
    for trained in sound:
        train_step(trained, batch)
        peak = peak_bytes(partial(train_step, trained, batch), bench.device)
        rows[trained.provider, trained.method].peak_bytes = peak
    subjects = [_subject(trained, batch) for trained in sound]
    for again in [subject for subject in subjects if subject.name == FLOOR]:
        subjects.append(timing.Subject(AGAIN, again.forward, again.backward))
    samples = timing.measure(subjects, bench.clock, bench.plan, lambda: check_alive(bench.device), bench.deadline)
    floor, again_seconds = (samples.get(name, timing.Samples()).of("both") for name in (FLOOR, AGAIN))
    for trained, subject in zip(sound, subjects, strict=False):
        row, own = rows[trained.provider, trained.method], samples[subject.name]
        if own.failure is not None:
            row.status, row.reason = FAILED, own.failure
            continue
        row.rounds, row.seconds = len(own.forward), list(timing.percentiles(own.of("both")))
        row.per_second = case.samples / row.seconds[1]
        if len(floor) == len(own.forward):
            ratio = timing.relative(own.of("both"), floor)
            row.times_frozen, row.noise = ratio.median, ratio.noise
            if len(again_seconds) == len(floor):
                row.noise = max(ratio.noise, abs(timing.relative(again_seconds, floor).median - 1))


def _subject(trained: Trained, batch: Batch) -> timing.Subject:
    return timing.Subject(
        f"{trained.provider} {trained.method}",
        lambda i: batch.forward(trained.model),
        lambda i, output: finish_step(trained, batch, output),
    )


def train_step(trained: Trained, batch: Batch) -> None:
    finish_step(trained, batch, batch.forward(trained.model))


def finish_step(trained: Trained, batch: Batch, output: Tensor) -> None:
    """Backward down to the model's input, and the optimizer, which moves nothing: its rate is 0."""
    torch.autograd.backward(output, batch.gradient)
    batch.leaf.grad = None
    if trained.optimizer is not None:
        trained.optimizer.step()
        trained.optimizer.zero_grad()
