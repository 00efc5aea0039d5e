"""Embeddings whose weight a head shares: rows that train whole (``trainable_token_indices``), and tied adapters.

The table stays frozen and as it is. Its trained rows are a parameter ``trained_tokens`` [n, N] of the embedding, which
forward hooks put in the place of what was looked up, in every embedding on the same table (T5's encoder and decoder); a
head there gets the difference to its logits, or to its weight where a fused loss reads that. As in PEFT the rows are
values, not differences, so that an adapter fits a model whose new rows started at random.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ResLoRAConfig, matches, with_parents
from ..layers.embedding import ResLoRAEmbedding, scaled
from ..layers.kinds import is_linear, kind_of
from ..layers.linear import ResLoRALinear
from .checkpoints import input_embedding
from .obstacles import reader_of_given
from .record import TOKENS, Record
from .surroundings import HeadRuns


def tables(model: nn.Module, config: ResLoRAConfig, targets: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """The tokens to train of each embedding, or head on a weight of its own, by its name in ``model``.

    Raises:
        ValueError: no embedding, or one that cannot be trained in rows, is meant; one is adapted or trained whole as
            well; it shares its weight with the model's input embedding, which is not meant; an index is not in its
            table.
    """
    found: dict[str, tuple[int, ...]] = {}
    owners: dict[int, str] = {}
    meant: set[str] = set()
    if config.trainable_token_indices is not None and (reader := reader_of_given(model)):
        raise ValueError(
            f"trainable_token_indices: {reader} reads the weight of an embedding past rows that train: train the "
            "embedding whole (modules_to_save)"
        )
    for ending, indices in _wanted(model, config).items():
        names = [name for name, module in model.named_modules() if f".{name}".endswith(f".{ending}") and _is(module)]
        if not names:
            raise ValueError(f"trainable_token_indices: {ending!r} is no embedding and no linear head of the model")
        for name in names:
            table: Any = model.get_submodule(name)
            _check(model, name, indices, config, targets)
            owner = owners.setdefault(id(table.weight), name)
            if found.setdefault(owner, indices) != indices:
                raise ValueError(
                    f"trainable_token_indices: {owner!r} and {name!r} share a weight and train other tokens"
                )
            meant.add(name)
    return {_source_of(model, name, meant): indices for name, indices in found.items()}


def _source_of(model: nn.Module, name: str, meant: Collection[str]) -> str:
    """The name of the model's input embedding where ``name`` shares its weight: it must be ``meant``, as in PEFT."""
    table: Any = model.get_submodule(name)
    source = _input_embedding(model)
    if source is None or not _shares(source[1], table):
        return name
    if source[0] not in meant:
        raise ValueError(
            f"trainable_token_indices: {name!r} shares its weight with {source[0]!r}: name that, for all that share it"
        )
    return source[0]


def _check(
    model: nn.Module, name: str, indices: Sequence[int], config: ResLoRAConfig, targets: Mapping[str, nn.Module]
) -> None:
    """ValueError unless these rows of the table can train, and are not trained in another way as well."""
    table: Any = model.get_submodule(name)
    kind = kind_of(table)
    assert kind is not None
    if TOKENS not in table._parameters and (fault := kind.why_not(table)):
        raise ValueError(f"trainable_token_indices: {name!r} is {fault}")
    for other in {name, *tied_embeddings(model, table)}:
        if other in targets:
            raise ValueError(f"trainable_token_indices: {other!r} is in target_modules too: take one of both")
    for other in {name, *tied_embeddings(model, table), *tied_heads(model, table)}:
        if config.modules_to_save and any(matches(each, config.modules_to_save) for each in with_parents(other)):
            raise ValueError(f"trainable_token_indices: {other!r} is trained whole by modules_to_save")
    outside = [index for index in indices if index >= len(table.weight)]
    if outside:
        raise ValueError(
            f"trainable_token_indices: {outside[0]} is not in {name!r}, which has {len(table.weight)} rows"
        )


def token_shapes(model: nn.Module, config: ResLoRAConfig) -> dict[str, tuple[int, int]]:
    """The names and shapes of the parameters that ``attach`` makes; ValueError as for ``tables``."""
    found = {} if config.trainable_token_indices is None else tables(model, config, {})
    shapes: dict[str, tuple[int, int]] = {}
    for name, rows in found.items():
        table: Any = model.get_submodule(name)
        shapes[f"{name}.{TOKENS}"] = len(rows), table.weight.shape[1]
    return shapes


def _wanted(model: nn.Module, config: ResLoRAConfig) -> dict[str, tuple[int, ...]]:
    """The indices by name or name ending; a list of them is for the model's input embedding."""
    wanted = config.trainable_token_indices
    if wanted is None or isinstance(wanted, Mapping):
        return {ending: tuple(indices) for ending, indices in (wanted or {}).items()}
    source = _input_embedding(model)
    if source is None:
        raise ValueError("trainable_token_indices must say of which embedding: {'name': [...]}; the model does not")
    return {source[0]: tuple(wanted)}


def _input_embedding(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The input embedding with its name; None where there is none."""
    embedding: Any = input_embedding(model)
    return next(((name, module) for name, module in model.named_modules() if module is embedding), None)


def _is(module: nn.Module) -> bool:
    return kind_of(module) in (ResLoRAEmbedding, ResLoRALinear)


def attach(model: nn.Module, record: Record, found: Mapping[str, Sequence[int]], autocast: bool) -> None:
    """Give the tables their trained rows, and let them and the heads on the same weights use them."""
    for name, indices in found.items():
        table: Any = model.get_submodule(name)
        rows = table.weight.detach()[list(indices)].clone()
        rows = rows.float() if autocast and rows.dtype.itemsize < 4 else rows
        table.register_parameter(TOKENS, nn.Parameter(rows))
        swap = _Rows(table, indices)
        record.tables[name] = swap
        for embedding in tied_embeddings(model, table).values():
            record.hooks.append(embedding.register_forward_hook(swap.looked_up, with_kwargs=True))
        for head in tied_heads(model, table).values():
            record.hooks += [head.register_forward_hook(swap.projected, with_kwargs=True), ReadHead.stand_in(head)]


def _shares(one: Any, other: Any) -> bool:
    return getattr(one, "weight", None) is other.weight


def tied_embeddings(root: nn.Module, table: Any) -> dict[str, nn.Module]:
    """The embeddings on one weight, by name."""
    return {name: m for name, m in root.named_modules() if isinstance(m, nn.Embedding) and _shares(m, table)}


def tied_heads(root: nn.Module, table: Any) -> dict[str, nn.Module]:
    """The linear layers that share the weight of an embedding, adapted or not, by name."""
    shared = table.weight
    return {name: m for name, m in root.named_modules() if is_linear(m) and getattr(m, "weight", None) is shared}


def refuse_adapted_heads(model: nn.Module, config: ResLoRAConfig, targets: Mapping[str, Any]) -> None:
    """ValueError where ``ensure_weight_tying`` would give a head a second adapter; a warning where there is no head."""
    if not config.ensure_weight_tying:
        return
    tables = {name: module for name, module in model.named_modules() if kind_of(module) is ResLoRAEmbedding}
    heads = {name: tied_heads(model, table) for name, table in tables.items()}
    for name in tables.keys() & targets.keys():
        twin = next((other for other, table in tables.items() if other != name and _shares(table, tables[name])), None)
        if twin is not None:
            raise ValueError(
                f"ensure_weight_tying is for an embedding and its head, and {name!r} shares its weight with {twin!r} "
                "too, which would stay as it is: take False"
            )
    for name, found in heads.items():
        twice = [head for head in found if head in targets and name in targets]
        if twice:
            raise ValueError(
                f"ensure_weight_tying gives {twice[0]!r} the adapter of {name!r}, whose weight it shares: leave "
                f"{twice[0]!r} out of target_modules"
            )
    if not any(heads.values()):
        warnings.warn("ensure_weight_tying: no head of the model shares the weight of an embedding", stacklevel=5)


def tie(model: nn.Module, record: Record, layers: Mapping[str, Any]) -> None:
    """Let the heads that share an adapted embedding's weight have its adapter."""
    for layer in layers.values() if record.config.ensure_weight_tying else ():
        if isinstance(layer, ResLoRAEmbedding):
            tied = TiedHead(layer)
            record.tied.append(tied)
            for head in tied_heads(model, layer).values():
                record.hooks += [head.register_forward_hook(tied, with_kwargs=True), ReadHead.stand_in(head)]


def heads_with_adapters(root: nn.Module, record: Record, layers: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the heads that have the adapter of an embedding, by the name of that, of one adapter of ``root``."""
    if not record.config.ensure_weight_tying:
        return {}
    tables = {name: layer for name, layer in layers.items() if isinstance(layer, ResLoRAEmbedding)}
    return {name: list(tied_heads(root, layer)) for name, layer in tables.items()}


class ReadHead(nn.Linear):
    """A head with such hooks, of which the weight can be read in the place of a run: fused losses do so."""

    @staticmethod
    def stand_in(head: nn.Module) -> _StandsIn:
        """Let a plain linear head be one, until the handle is removed; any other is refused when it has not run."""
        if type(head) is nn.Linear:
            head.__class__ = ReadHead
        return _StandsIn(head)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, cast(Tensor, self._parameters["weight"]), self.bias)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The frozen weight [N, K]; while the model runs, with what the hooks would add to its product."""
        parts = [getattr(hook, "__self__", hook) for hook in self._forward_hooks.values()]
        watches = [part for part in parts if isinstance(part, HeadRuns) and part.is_open]
        frozen = cast(Tensor, self._parameters["weight"])
        found: Tensor | None = frozen
        for part in parts if watches else ():
            if isinstance(part, (TiedHead, _Rows)):
                found = None if found is None else part.in_weight(found)
        for watch in watches if found is not None else ():
            watch.ran()
        return frozen if found is None else found


class _StandsIn:
    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def remove(self) -> None:
        if type(self.head) is ReadHead:
            cast(Any, self.head).__class__ = nn.Linear


class TiedHead:
    """Forward hook of a head on an adapted embedding's weight: y + s (D(x) B) A, of the W + s (B A)ᵀ of both."""

    def __init__(self, layer: ResLoRAEmbedding) -> None:
        self.layer = layer
        self.active = True  # False while another adapter is in force

    def in_weight(self, weight: Tensor) -> Tensor | None:
        """W + s (B A)ᵀ [N, K]; None where dropout is between the input and B."""
        layer = self.layer
        if not self.active or layer.merged or layer.disabled:
            return weight
        if layer.training and layer.config.lora_dropout > 0:
            return None
        call = layer._call(())
        for a, b in zip(call.a_stack, call.b_stack, strict=True):
            weight = torch.add(weight, (b @ a).T.to(weight.dtype), alpha=layer.scaling)
        return weight

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        layer = self.layer
        if not self.active or layer.merged or layer.disabled:
            return y
        x, p = _first(args, kwargs).to(y.dtype), layer.config.lora_dropout if layer.training else 0.0
        x, call = F.dropout(x, p) if p > 0 else x, layer._call(())
        for a, b in zip(call.a_stack, call.b_stack, strict=True):
            u = F.linear(x, b.T.to(y.dtype))
            y = torch.add(y, F.linear(u, a.T.to(y.dtype)), alpha=layer.scaling)
        return y


class _Rows:
    """Hooks that put an embedding's trained rows in the place of the table's."""

    def __init__(self, table: Any, indices: Sequence[int]) -> None:
        self.table = table
        self.indices = tuple(indices)
        self.original: Tensor | None = None  # while they are in the table itself, what was there
        self.merged = self.disabled = False
        self._index: Tensor | None = None

    @property
    def frozen(self) -> Tensor:
        """The table [N, K], which may be a ``ReadHead``."""
        return cast(Tensor, self.table._parameters["weight"])

    @property
    def index(self) -> Tensor:
        """The tokens, on the table's device."""
        if self._index is None or self._index.device != self.frozen.device:
            self._index = torch.tensor(self.indices, device=self.frozen.device)
        return self._index

    def looked_up(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        """What the embedding gives for its ids, with rows of the trained tokens."""
        if self.merged or self.disabled:
            return None
        same = _first(args, kwargs)[..., None] == self.index
        rows = F.embedding(same.int().argmax(-1), self.table.trained_tokens.to(y.dtype))
        return torch.where(same.any(-1, keepdim=True), scaled(module, rows), y)

    def projected(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        """The logits of a head on the same table."""
        if self.merged or self.disabled:
            return None
        change = self.table.trained_tokens.to(y.dtype) - self.frozen[self.index].to(y.dtype)
        return y.index_add(-1, self.index, F.linear(_first(args, kwargs).to(y.dtype), change))

    def in_weight(self, weight: Tensor) -> Tensor:
        """The table [N, K] with the trained rows."""
        if self.merged or self.disabled:
            return weight
        return weight.index_copy(0, self.index, self.table.trained_tokens.to(weight.dtype))

    @torch.no_grad()
    def merge(self, keep_original: bool) -> None:
        """Write the rows to the table, which a head that shares it reads too."""
        self.original = self.frozen[self.index].to("cpu", copy=True) if keep_original else None
        self.frozen[self.index] = self.table.trained_tokens.to(self.frozen.dtype)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        assert self.original is not None
        self.frozen[self.index] = self.original.to(self.frozen.device)
        self.original, self.merged = None, False

    def remove(self) -> None:
        del self.table._parameters[TOKENS]


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x
