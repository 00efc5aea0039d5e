"""pipeline_reslora: chains that go on across the stages of ``torch.distributed.pipelining``.

What one stage needs of another is of two kinds. Tensors of tokens, [.., r], go with the activations of each microbatch,
and their gradients come back with those of the activations: what ``input`` and ``middle`` hand on. Parameters are lent
once in a step: ``input`` projects a stage's last layer by the next layer's A as well, ``block`` reads A and B of
earlier layers. Their values come from the stage that trains them. A stage that reads them does so in parameters of its
own, which a schedule scales the gradients of, and these gradients are then added to those where they are trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..adapt.record import complete_layers, record_of, refuse_beside, root_of
from ..checks import check_module
from ..dtensors import initialised, is_dtensor, refuse_sharded
from ..forward_state import Linked
from ..layers.adapter import AdapterLayer
from ..layers.chain import Chain
from ..layers.checkpointing import CarryThroughCheckpoints
from ..layers.shortcuts import hands_on
from ..reference import earlier

_LENT = "_lent"


def pipeline_reslora(
    model: nn.Module, parts: Sequence[nn.Module], *, placement: Sequence[int] | None = None, group: Any = None
) -> AdaptedPipeline:
    """Let the chains of an adapted model go on across pipeline stages, exactly as in one process.

        parts = [nn.Sequential(model.embed, *model.blocks[:2]), nn.Sequential(*model.blocks[2:], model.head)]
        pipeline = pipeline_reslora(model, parts)
        stage = PipelineStage(pipeline.stages[rank], rank, len(parts), device)
        with pipeline.step():
            schedule.step(x)

    Every process adapts the same whole model; what is not its own part may be on the meta device. With each microbatch
    go r values of a token over a border, for each chain that hands on and goes on there (with ``middle`` over several
    earlier blocks, for each of them); once in a step go the A (``input``), or A and B (``block``), of the layers that
    another stage reads. Without this function, adapt each part by itself: its chains then end at its borders.

    Args:
        model: adapted by ``apply_reslora`` or ``load_adapter``; its stages are modules made of modules of it.
        parts: the stages in order, without the hand-over: modules from tensors to one or several tensors.
        placement: the process of ``group`` that runs each stage; None for stage i in process i modulo their number,
            where PyTorch's schedules have it, but those that run in a V.
        group: the processes of the pipeline; None for all.

    Raises:
        TypeError: ``model`` or a part is not a module.
        ValueError: ``model`` is not adapted, is merged or sharded, has trained tokens, tied heads or several adapters
            in force; a part is in DDP; a layer of the model or another trained parameter is in no part or in several,
            or a chain goes back; this process's parts are on the meta device.
        RuntimeError: no process group.
    """
    check_module("model", model)
    refuse_sharded(model, "run in stages of which chains go on", "adapt the parts one by one, then shard them")
    refuse_beside(model, "handed from stage to stage", "adapt the model with apply_reslora")
    record = record_of(model)
    if record.merged is not None:
        raise ValueError("model is merged: call unmerge_reslora(model) before it is cut into stages")
    if record.tables or record.tied or record.together:
        raise ValueError(
            "trained tokens, heads with their embedding's adapter (ensure_weight_tying) and several adapters in force "
            "are not read over the border of a stage: adapt the parts one by one"
        )
    for i, part in enumerate(parts):
        check_module(f"parts[{i}]", part)
        if any(isinstance(module, DistributedDataParallel) for module in part.modules()):
            raise ValueError(f"parts[{i}] averages gradients (DDP) before they are whole: average them after step()")
    if not initialised():
        raise RuntimeError("pipeline_reslora needs a process group: call torch.distributed.init_process_group first")
    size = dist.get_world_size(group)
    chosen = [i % size for i in range(len(parts))] if placement is None else list(placement)
    if len(chosen) != len(parts) or any(not 0 <= rank < size for rank in chosen):
        raise ValueError(f"placement must name one of {size} processes for each of {len(parts)} parts, got {chosen}")
    return AdaptedPipeline(model, parts, chosen, group)


class Crossing(NamedTuple):
    """What a chain sends over one border: the ``number`` tensors [.., r] that its last layer before it handed on."""

    chain: Chain[Any]
    layer: AdapterLayer
    number: int


class Loan(NamedTuple):
    """A parameter of a layer that stages other than its own read: the part that trains it, and those that read it."""

    layer: Any
    name: str
    part: int
    readers: tuple[int, ...]

    @property
    def parameter(self) -> Any:
        return self.layer._parameters[self.name]


class PipelinePart(nn.Module):
    """One stage: takes the part's inputs and what comes over the border before it, returns the part's and what goes on.

    A call is one forward pass through the chains, so that microbatches share nothing.
    """

    def __init__(
        self,
        part: nn.Module,
        pipeline: AdaptedPipeline,
        links: Sequence[Linked],
        before: Sequence[Crossing],
        after: Sequence[Crossing],
    ) -> None:
        super().__init__()
        self.part = part
        self.train(part.training)
        self._pipeline = pipeline
        self._links, self._before, self._after = tuple(links), tuple(before), tuple(after)
        self._borrowed: list[tuple[Loan, nn.Parameter]] = []
        chains = [link for link in links if isinstance(link, Chain)]
        if chains:
            self.register_forward_pre_hook(CarryThroughCheckpoints(self, chains))

    def borrow(self, loans: Sequence[Loan]) -> None:
        """Read these parameters in parameters of its own, until ``give_back``."""
        for loan in loans:
            original = loan.parameter
            self._borrowed.append((loan, nn.Parameter(original.detach(), original.requires_grad)))
        self.register_module(_LENT, nn.ParameterList(own for _, own in self._borrowed))

    def give_back(self) -> list[tuple[Loan, Tensor | None]]:
        """What was borrowed, with the gradients that it has got."""
        borrowed, self._borrowed = self._borrowed, []
        delattr(self, _LENT)
        return [(loan, own.grad) for loan, own in borrowed]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        originals = [(loan, loan.parameter) for loan, _ in self._borrowed]
        for loan, own in self._borrowed:
            loan.layer._parameters[loan.name] = own
        try:
            yield
        finally:
            for loan, original in originals:
                loan.layer._parameters[loan.name] = original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The inputs of the part, then the tensors received; the part's outputs, then those to send, as a tuple."""
        self._pipeline.entered()
        received = sum(crossing.number for crossing in self._before)
        inputs, handed = args[: len(args) - received], list(args[len(args) - received :])
        for link in self._links:
            link.passes.open(self)
        try:
            for chain, layer, count in self._before:
                _state(chain).receive(layer, tuple(handed[:count]))
                del handed[:count]
            with self._reading():
                outputs = self.part(*inputs, **kwargs)
            sent = [tensor for crossing in self._after for tensor in _sent(crossing)]
        finally:
            for link in self._links:
                link.passes.close(self)
        if not self._after:
            return outputs
        return (*(outputs if isinstance(outputs, (tuple, list)) else (outputs,)), *sent)


def _state(chain: Chain[Any]) -> Any:
    state = chain.passes.current()
    assert state is not None
    return state


def _sent(crossing: Crossing) -> list[Tensor]:
    chain, layer, count = crossing
    calls = _state(chain).handed_by(layer)
    if len(calls) != 1 or len(calls[0]) != count:
        raise RuntimeError(
            f"layer {layer.position} of chain {chain.name!r} handed on {len(calls)} times in one forward of its stage, "
            f"{[len(call) for call in calls]} tensors: one call's {count} go on to the next stage. A layer at a border "
            "must run once in each forward, neither merged nor disabled"
        )
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in calls[0]]  # schedules detach in place


class AdaptedPipeline:
    """What ``pipeline_reslora`` returns.

    Attributes:
        stages: one module for each part, to give to ``PipelineStage``. A process trains the parameters of its own.
    """

    def __init__(self, model: nn.Module, parts: Sequence[nn.Module], placement: Sequence[int], group: Any) -> None:
        self._record = record_of(model)
        self._chains = self._record.chains
        self._placement, self._group = tuple(placement), group
        self._rank = dist.get_rank(group)
        self._part_of = _parts_of_layers(model, parts)
        self._trained = _owners(model, parts)
        self._device = self._own_device(parts)
        self._loans = self._find_loans()
        self._open = False
        borders = [self._crossings(border) for border in range(len(parts) - 1)]
        links: list[Linked] = [*self._chains, *self._record.groups]
        self.stages = [
            PipelinePart(part, self, links, before, after)
            for part, before, after in zip(parts, [[], *borders], [*borders, []], strict=True)
        ]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step (or evaluation) of a schedule, in all processes: lends parameters, then adds up gradients."""
        self._broadcast([(loan.layer, loan.name, loan.part) for loan in self._loans])
        self._open = True
        for i, stage in enumerate(self.stages):
            stage.borrow([loan for loan in self._loans if i in loan.readers])
        try:
            yield
        except BaseException:
            self._give_back()
            raise
        self._add_up(self._give_back())

    def gather(self) -> None:
        """Give every process all that is trained, as it is now, in the model; then one of them can save or merge it."""
        self._broadcast(self._trained)
        self._record.spread = ""

    def entered(self) -> None:
        """A stage starts a forward; RuntimeError if it would read parameters of others that are not up to date."""
        if self._loans and not self._open:
            raise RuntimeError(
                "a stage reads adapters of another: run the schedule inside `with pipeline.step():`, in all processes"
            )
        if self._loans and getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
            raise RuntimeError(
                "a stage whose adapters another stage reads is in DDP, which averages their gradients before they are "
                "whole: average them over the pipelines after step()"
            )
        for chain in self._chains:
            chain.entered = True
        if torch.is_grad_enabled():
            self._record.spread = (
                "the adapters are trained in the processes of a pipeline, each of which has its own part of them: call "
                "pipeline.gather() in all processes first"
            )

    def _give_back(self) -> dict[tuple[int, str], Tensor]:
        """The gradients of this process's stages for what they were lent, by layer's id and name."""
        self._open = False
        found: dict[tuple[int, str], Tensor] = {}
        for stage in self.stages:
            for loan, gradient in stage.give_back():
                if gradient is not None:
                    key = id(loan.layer), loan.name
                    found[key] = found[key] + gradient if key in found else gradient
        return found

    def _own_device(self, parts: Sequence[nn.Module]) -> torch.device:
        """Where this process computes."""
        own = [part for part, rank in zip(parts, self._placement, strict=True) if rank == self._rank]
        tensors = [parameter for part in own for parameter in part.parameters()]
        if any(parameter.is_meta for parameter in tensors):
            raise ValueError("parts of this process are on the meta device: load their weights first")
        return tensors[0].device if tensors else torch.device("cpu")

    def _crossings(self, border: int) -> list[Crossing]:
        """What goes from stage ``border`` to the next one."""
        found = []
        for chain in self._chains:
            before = [layer for layer in chain.layers if self._part_of[id(layer)] <= border]
            if before and len(before) < len(chain) and _is_handed(chain):
                config = before[-1].config
                summed = config.pre_num == -1 and config.gates == "none"
                several = config.shortcut == "middle" and not summed
                found.append(Crossing(chain, before[-1], earlier(config.pre_num, len(before)) if several else 1))
        return found

    def _find_loans(self) -> list[Loan]:
        readers: dict[tuple[int, str], set[int]] = {}
        layers = [layer for chain in self._chains for layer in chain.layers]
        for layer in layers:
            for other, kinds in layer.reads():
                if self._part_of[id(other)] != self._part_of[id(layer)]:
                    for name in other.adapter_parameters():
                        if name[-1] in kinds:
                            readers.setdefault((id(other), name), set()).add(self._part_of[id(layer)])
        return [
            Loan(layer, name, self._part_of[id(layer)], tuple(sorted(readers[id(layer), name])))
            for layer in layers
            for name in layer.adapter_parameters()
            if (id(layer), name) in readers
        ]

    def _broadcast(self, parameters: Sequence[tuple[nn.Module, str, int]]) -> None:
        """Values from the process that trains a parameter to all others; what is on the meta device there is made."""
        kinds: dict[tuple[int, torch.dtype], list[nn.Parameter]] = {}
        for module, name, part in parameters:
            rank = self._placement[part]
            parameter: Any = module._parameters[name]
            if is_dtensor(parameter):
                raise ValueError(f"parameter {name!r} of a stage is sharded, and other stages read it: shard no stage")
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device=self._device)
                parameter = module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
            kinds.setdefault((rank, parameter.dtype), []).append(parameter)
        for (rank, _), held in kinds.items():
            flat = torch.cat([parameter.detach().reshape(-1).to(self._device) for parameter in held])
            source = rank if self._group is None else dist.get_global_rank(self._group, rank)
            dist.broadcast(flat, source, group=self._group)
            if rank != self._rank:
                for parameter, values in zip(held, torch.split(flat, [p.numel() for p in held]), strict=True):
                    parameter.detach().copy_(values.view_as(parameter))

    def _add_up(self, found: dict[tuple[int, str], Tensor]) -> None:
        """Add the gradients that all processes have found to those where the parameters are trained."""
        by_dtype: dict[torch.dtype, list[Loan]] = {}
        for loan in self._loans:
            if loan.parameter.requires_grad:
                by_dtype.setdefault(loan.parameter.dtype, []).append(loan)
        for loans in by_dtype.values():
            parts = [found.get((id(loan.layer), loan.name)) for loan in loans]
            whole = [torch.zeros_like(loan.parameter) if g is None else g for loan, g in zip(loans, parts, strict=True)]
            flat = torch.cat([gradient.reshape(-1).to(self._device) for gradient in whole])
            count = flat.new_tensor([float(gradient is not None) for gradient in parts])
            flat = torch.cat([flat, count])
            dist.all_reduce(flat, group=self._group)
            *sums, count = torch.split(flat, [*(gradient.numel() for gradient in whole), len(loans)])
            for loan, total, any_has in zip(loans, sums, count.tolist(), strict=True):
                if any_has and self._placement[loan.part] == self._rank:
                    _add_gradient(loan.parameter, total)


def _add_gradient(parameter: Tensor, flat: Tensor) -> None:
    gradient = flat.view_as(parameter).to(parameter.device)
    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient


def _is_handed(chain: Chain[Any]) -> bool:
    config = chain.layers[0].config
    return len(chain) > 1 and hands_on(config.shortcut, config.pre_num)


def _parts_of_layers(model: nn.Module, parts: Sequence[nn.Module]) -> dict[int, int]:
    """The index of each adapted layer's part, by its id; ValueError for a layer in none or several, or a way back."""
    found: dict[int, list[int]] = {}
    for i, part in enumerate(parts):
        for module in part.modules():
            found.setdefault(id(module), []).append(i)
    for name, layer in complete_layers(model).items():
        if len(found.get(id(layer), ())) != 1:
            raise ValueError(
                f"each adapted layer must be in one part, {name!r} is in {found.get(id(layer), 'none')}: make the "
                "parts of the adapted model's own modules, and each of other ones"
            )
    for chain in record_of(model).chains:
        order = [found[id(layer)][0] for layer in chain.layers]
        if order != sorted(order):
            raise ValueError(f"the layers of chain {chain.name!r} are in parts {order}: a pipeline has no way back")
    return {key: where[0] for key, where in found.items()}


def _owners(model: nn.Module, parts: Sequence[nn.Module]) -> list[tuple[nn.Module, str, int]]:
    """All that is trained: module, name in it, part; ValueError for a parameter that is trained in no or several."""
    found: dict[int, set[int]] = {}
    for i, part in enumerate(parts):
        for parameter in part.parameters():
            found.setdefault(id(parameter), set()).add(i)
    owners = []
    for path, module in root_of(model).named_modules():
        for name, held in module.named_parameters(recurse=False):
            where = found.get(id(held), set())
            if held.requires_grad and len(where) != 1:
                raise ValueError(
                    f"what is trained must be in one part, {f'{path}.{name}'!r} is in {sorted(where) or 'none'}"
                )
            if held.requires_grad or name.startswith("start_"):
                owners.append((module, name, *where))
    return owners
