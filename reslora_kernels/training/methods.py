"""LoRA+, AdaLoRA's schedule and ReLoRA's restarts, for layers with shortcuts.

- LoRA+ (Hayou et al., arXiv 2402.12354): B learns faster than A by a fixed ratio.
- AdaLoRA (Zhang et al., arXiv 2303.10512): ranks move to the layers where they matter, within a budget. The k-th row
  of A and the k-th column of B are one triplet; the singular value of the paper is part of B here. Its importance is
  its entries' mean sensitivity |w ∂L/∂w|, smoothed over steps (Eqs. 8 to 11). Pruning it sets the column of B to zero;
  B's gradient goes on, so that it may come back until the budget is final.
- ReLoRA (Lialin et al., arXiv 2307.05695): merge what was learnt, start the adapters afresh, train on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapt.data_parallel import share
from ..adapt.record import adapted_layers, record_of, refuse_beside, root_of
from ..checks import check_int, check_module, check_number
from ..dtensors import refuse_sharded
from ..layers.adapter import AdapterLayer
from ..merge.merging import MergeReport, merge_reslora


def loraplus_groups(
    model: nn.Module, *, lr: float, loraplus_lr_ratio: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer, grouped as PEFT's ``create_loraplus_optimizer`` groups them.

        optimizer = torch.optim.AdamW(loraplus_groups(model, lr=1e-4, loraplus_lr_ratio=16, weight_decay=0.01))

    Args:
        model: adapted; what does not train is left out.
        lr: of every lora_A and of other matrices that train.
        loraplus_lr_ratio: lora_B and all biases learn at ``lr`` times this, which LoRA+ wants well above 1.
        weight_decay: of all but the biases and gates, which start at 1 and mean nothing at 0. Gates learn at ``lr``.

    Returns:
        Groups with ``params``, ``lr`` and ``weight_decay``; none of them is empty.

    Raises:
        TypeError: ``model`` is not a module, or a number is none.
        ValueError: a number is not finite or out of range, or ``model`` has no adapted layer that trains.
    """
    check_module("model", model)
    for name, value in (("lr", lr), ("loraplus_lr_ratio", loraplus_lr_ratio)):
        check_number(name, value, "a finite number above 0", lambda v: v > 0)
    check_number("weight_decay", weight_decay, "a finite number of 0 or more", lambda v: v >= 0)
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    if not any(layer.lora_B.requires_grad for layer in layers):
        raise ValueError("model has no ResLoRALinear that trains: adapt it first, with apply_reslora or load_adapter")
    of_b = {id(layer.lora_B) for layer in layers}
    gates = {id(layer.lora_gates) for layer in layers}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fast = lr * loraplus_lr_ratio
    matrices = [p for p in trained if p.dim() != 1 and id(p) not in of_b | gates]
    groups = [
        {"params": matrices, "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in of_b], "lr": fast, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "lr": fast, "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in gates], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class RankAllocator:
    """Call ``step`` after every backward and optimizer step, before the gradients are cleared.

        allocator = RankAllocator(model, target_r=4, tinit=100, tfinal=500, total_step=2000)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            allocator.step()
            optimizer.zero_grad()

    Names are those of PEFT's ``AdaLoraConfig``.

    Args:
        model: an adapted model whose rank r is the initial one.
        target_r: mean rank of a layer in the end, below r.
        tinit, tfinal: steps before pruning starts, and those at the end with the final ranks.
        total_step: steps in all.
        deltaT: steps between two prunings.
        beta1, beta2: of the exponential means of sensitivity and of its uncertainty.

    Raises:
        TypeError, ValueError: ``model`` is not adapted or is sharded over processes, or a number is not as above.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_r: int,
        total_step: int,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        refuse_sharded(model, "given ranks by their values", "use DDP, or set ranks by hand (rank_pattern)")
        self.layers = adapted_layers(model)
        of_experts = [name for name, layer in self.layers.items() if layer.lora_A.dim() != 2]
        if of_experts:
            raise ValueError(
                f"{of_experts[0]!r} has an adapter for each expert, whose ranks are not moved one by one: leave it out "
                "of target_parameters, or set ranks by hand (rank_pattern)"
            )
        grouped = [name for name, layer in self.layers.items() if layer.kernel_groups > 1]
        if grouped:
            raise ValueError(
                f"{grouped[0]!r} is a convolution with groups, of which each has ranks of its own that are not moved "
                "one by one: leave it out of target_modules, or set ranks by hand (rank_pattern)"
            )
        for name, number, least in (
            ("target_r", target_r, 1), ("total_step", total_step, 1), ("tinit", tinit, 0), ("tfinal", tfinal, 0),
            ("deltaT", deltaT, 1),
        ):  # fmt: skip
            check_int(name, number, least, None)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            check_number(name, beta, "a number between 0 and 1", lambda v: 0 < v < 1)
        if tinit >= total_step - tfinal:
            raise ValueError(
                f"tinit + tfinal must be less than total_step={total_step}, got tinit={tinit}, tfinal={tfinal}"
            )
        self.initial_budget = sum(layer.config.r for layer in self.layers.values())
        self.target_budget = target_r * len(self.layers)
        if self.target_budget >= self.initial_budget:
            raise ValueError(
                f"target_r must be below the mean rank {self.initial_budget / len(self.layers):g}, got {target_r}"
            )
        self.tinit, self.tfinal, self.total_step, self.interval = tinit, tfinal, total_step, deltaT
        self.beta1, self.beta2 = beta1, beta2
        self.steps = 0
        self.keep = {name: torch.ones_like(layer.lora_A[:, 0], dtype=torch.bool) for name, layer in self.layers.items()}
        self._mean: dict[tuple[str, str], Tensor] = {}
        self._uncertainty: dict[tuple[str, str], Tensor] = {}

    def budget(self, step: int) -> tuple[int, bool]:
        """The ranks to keep after ``step`` steps, and whether that is a step at which to prune (paper, Eq. 12)."""
        if step <= self.tinit:
            return self.initial_budget, False
        if step > self.total_step - self.tfinal:
            return self.target_budget, True
        left = 1 - (step - self.tinit) / (self.total_step - self.tfinal - self.tinit)
        budget = int((self.initial_budget - self.target_budget) * left**3 + self.target_budget)
        return budget, step % self.interval == 0

    @torch.no_grad()
    def step(self) -> None:
        """Account for one step; prune where the schedule says so. Nothing is read back from the device.

        Raises:
            RuntimeError: an adapter that trains has no gradient; nothing is changed then.
        """
        for name, layer in self.layers.items():
            if layer.lora_A.grad is None or layer.lora_B.grad is None:
                raise RuntimeError(f"layer {name!r} has no gradients: call step() after backward, before zero_grad()")
        self.steps += 1
        final = self.steps > self.total_step - self.tfinal
        if not final:
            for name, layer in self.layers.items():
                self._observe(name, layer)
        budget, prune = self.budget(self.steps)
        if prune and (not final or self.steps == self.total_step - self.tfinal + 1):
            self._choose(budget)
        if prune:
            for name, layer in self.layers.items():
                layer.lora_B.mul_(self.keep[name])

    def rank_pattern(self) -> dict[str, int]:
        """The ranks that are left, by layer."""
        return {name: int(keep.sum()) for name, keep in self.keep.items()}

    def _observe(self, name: str, layer: AdapterLayer) -> None:
        for kind, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
            assert parameter.grad is not None
            sensitivity, key = (parameter * parameter.grad).abs(), (name, kind)
            mean = self._mean.setdefault(key, torch.zeros_like(sensitivity))
            uncertainty = self._uncertainty.setdefault(key, torch.zeros_like(sensitivity))
            mean.lerp_(sensitivity, 1 - self.beta1)
            uncertainty.lerp_((sensitivity - mean).abs(), 1 - self.beta2)

    def _choose(self, budget: int) -> None:
        """Keep the ``budget`` most important triplets of all layers."""
        first = next(iter(self.layers.values())).lora_A.device
        flat = torch.cat([(self._score(name, "A", 1) + self._score(name, "B", 0)).to(first) for name in self.layers])
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[flat.topk(budget).indices] = True
        parts = torch.split(kept, [len(keep) for keep in self.keep.values()])
        for (name, keep), part in zip(self.keep.items(), parts, strict=True):
            self.keep[name] = part.to(keep.device)

    def _score(self, name: str, kind: str, axis: int) -> Tensor:
        return (self._mean[name, kind] * self._uncertainty[name, kind]).float().mean(axis)


def restart_reslora(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **merge: Any) -> MergeReport:
    """Merge the adapters into the frozen weights for good and start them again, so that the updates' ranks add up.

        for step, batch in enumerate(batches):
            if step and step % 1000 == 0:
                restart_reslora(model, optimizer, calibration=batches[:16])
            ...

    From then on the weights are not those of the base model: save the whole model (``state_dict``); ``save_adapter``
    and ``export_peft`` refuse.

    Args:
        model: an adapted model; changed in place.
        optimizer: what trains it; it forgets its state of the adapters, which belongs to the old ones. The learning
            rate is the caller's: ReLoRA warms it up again.
        merge: arguments of ``merge_reslora`` other than ``keep_original`` and ``dequantize``.

    Returns:
        what ``merge_reslora`` returns.

    Raises:
        TypeError, ValueError: as ``merge_reslora``, or the model has several adapters, which share the weights, or
            magnitudes (``use_dora``). The model and the optimizer are unchanged then.
    """
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    if unknown := merge.keys() & {"keep_original", "dequantize"}:
        raise TypeError(f"a restart merges for good, into plain weights: it takes no {', '.join(sorted(unknown))}")
    layers, record = adapted_layers(model), record_of(model)
    refuse_beside(model, "restarted", "its save_pretrained would leave the merged weights out; use apply_reslora")
    if record.others:
        raise ValueError(f"the adapters {[record.name, *record.others]} share the weights: delete the others first")
    if record.tables:
        raise ValueError(
            "trained tokens (trainable_token_indices) are values, not updates that add up: train without them"
        )
    if record.config.use_dora:
        raise ValueError("magnitudes (use_dora=True) are not low-rank updates that add up: train without them")
    report = merge_reslora(model, keep_original=False, **merge)
    record.merged = None
    record.restarts += 1
    for layer in layers.values():
        layer.merged = False
        layer.reset_lora_parameters()
        for parameter in layer.adapter_parameters().values():
            parameter.grad = None
            if optimizer is not None:
                optimizer.state.pop(parameter, None)
    # the processes of DistributedDataParallel have drawn A on their own, and may have fitted W to other batches
    share(model, root_of(model), [t for layer in layers.values() for t in _changed(layer, bool(merge))])
    return report


def _changed(layer: AdapterLayer, fitted: bool) -> list[Tensor]:
    """What a restart gives values that may be another process's: W too, if it was merged by data."""
    changed: list[Tensor] = list(layer.adapter_parameters().values())
    holder = getattr(layer, "holds_weight", None)
    return [*changed, holder.weight] if fitted and holder is not None else changed
