"""Adapters of parameters (``target_parameters``) as PEFT writes them, and as servers want them: one module per expert.

PEFT wraps the module that holds the parameters once for each of them, in the order in which they are registered: the
last one's A and B are the outermost wrapper's, the one before is in its ``base_layer``, and so on. A [E, r, K] is
written as [E r, K], expert by expert, and B [E, N, r] as [N, r E], the experts innermost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ..adapt.matching import matches
from ..config import PARAMETER_ADAPTER
from ..layers.experts import TargetParameter

EXPERT_PARTS = {  # how the experts of a checkpoint are called, by model type: (parts of gate_up_proj, down_proj, block)
    "mixtral": (("w1", "w3"), "w2", ("mlp", "block_sparse_moe")),
    "qwen2_moe": (("gate_proj", "up_proj"), "down_proj", None),
    "qwen3_moe": (("gate_proj", "up_proj"), "down_proj", None),
    "deepseek_v2": (("gate_proj", "up_proj"), "down_proj", None),
    "deepseek_v3": (("gate_proj", "up_proj"), "down_proj", None),
    "olmoe": (("gate_proj", "up_proj"), "down_proj", None),
}


def wrapper_names(root: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Where PEFT holds the adapters of the parameters ``names``: by name, that of the wrapper's module."""
    of_owner: dict[str, set[str]] = {}
    for name in names:
        owner, _, own = name.rpartition(".")
        of_owner.setdefault(owner, set()).add(own)
    found: dict[str, str] = {}
    for owner, wanted in of_owner.items():
        outermost = [own for own in reversed(root.get_submodule(owner)._parameters) if own in wanted]
        for depth, own in enumerate(outermost):
            found[f"{owner}.{own}" if owner else own] = ".".join(filter(None, (owner, *["base_layer"] * depth)))
    return found


def parameter_of(layer_name: str) -> str:
    """The parameter's name, from that of its adapter."""
    return layer_name.removesuffix(PARAMETER_ADAPTER)


def flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A [E, r, K] and B [E, N, r] as PEFT writes them; matrices as they are."""
    if a.dim() == 2:
        return a, b
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def unflattened(a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The inverse of ``flat``."""
    if not num_experts:
        return a, b
    by_expert = b.reshape(b.shape[0], -1, num_experts)
    return a.reshape(num_experts, -1, a.shape[-1]), by_expert.permute(2, 0, 1)


def endings_of_parameters(root: nn.Module, names: Sequence[str]) -> list[str]:
    """``target_parameters`` that mean the parameters ``names`` and no others: their last two words where those do."""
    every = [name for name, _ in root.named_parameters() if not _is_adapter(name)]
    chosen = set()
    for name in names:
        ending = ".".join(name.split(".")[-2:])
        alone = all(other in names for other in every if matches(other, [ending]))
        chosen.add(ending if alone else name)
    return sorted(chosen)


def _is_adapter(name: str) -> bool:
    return any(part.endswith(PARAMETER_ADAPTER) for part in name.split("."))


def targets_in(root: nn.Module, wanted: Iterable[str]) -> dict[str, TargetParameter]:
    """The parameters that an adapter file's ``target_parameters`` means, by name."""
    endings = list(wanted)
    return {
        name: TargetParameter(root.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        for name, _ in root.named_parameters(remove_duplicate=False)
        if matches(name, endings)
    }


def refuse_no_expert_names(root: nn.Module) -> str:
    """The model type, if it is known how a server calls its experts one by one; else a ValueError."""
    kind = getattr(getattr(root, "config", None), "model_type", None)
    if kind not in EXPERT_PARTS:
        raise ValueError(
            f"per_expert=True is for models whose checkpoints hold experts one by one ({', '.join(EXPERT_PARTS)}), got "
            f"{kind!r}: servers take those of other models as PEFT writes them, with per_expert=False"
        )
    return str(kind)


def one_by_one(kind: str, parameter: str, a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r, K] and B [N, r] of every expert's linear layers, by the names that the checkpoint has for them.

    The two halves of ``gate_up_proj`` share their A.
    """
    halves, down, renamed = EXPERT_PARTS[kind]
    owner, _, own = parameter.rpartition(".")
    if renamed is not None:
        owner = owner.replace(f".{renamed[0]}.", f".{renamed[1]}.")
    names = halves if own == "gate_up_proj" else (down,)
    return {
        f"{owner}.{e}.{name}": (a[e], part)
        for e in range(a.shape[0])
        for name, part in zip(names, b[e].chunk(len(names)), strict=True)
    }
