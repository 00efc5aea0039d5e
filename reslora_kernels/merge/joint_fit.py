"""A joint fit of every layer's update to what the unmerged model computes from the calibration batches.

Layer by layer, least squares cannot know which errors matter to the model's output, nor let one layer make up for
another. Here all A*_n and B*_n, from where least squares left them, are trained by Adam on

    KL(softmax(z) ‖ softmax(z*)) per row for logits, else ‖z* - z‖² / ‖z‖²,

z being the output of the unmerged model and z* that of the merged one. No labels are needed; rows of logits that a
batch's "attention_mask" hides do not count. A*_n moves in coordinates in which the layer's input is white,
A*_n = A + Z L⁻¹ with L Lᵀ = G_n + λI: the inputs of a transformer's layers have a few large directions, beside which
Adam on A itself hardly moves in the others. A wider update has more rows of A, the first right singular vectors of

    Σ (∂/∂y_n)ᵀ x_n L⁻ᵀ

over the batches, times L⁻¹, and more columns of B, zero at first: directions of the white input in which B gains most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..adapt.execution import call_with, undisturbed
from ..layers.adapter import AdapterLayer
from .closed_form import LowRankUpdate, cholesky_factor, own_a, relative_error
from .sequential import Kept, replaced
from .statistics import LayerStatistics

DAMPING = 1e-4  # λ as a share of the mean diagonal of G_n
RATES = {"a": 1e-2, "b": 2e-3}  # of Adam, as shares of the root mean square of what is trained
BETAS = (0.9, 0.99)
NEW_ROWS = (1.0, 0.1)  # their size to that of the others, tried in turn, and at last a fit without them
TRIAL_STEPS = 16  # or more, to whole passes over the batches: if the distance grows in their mean, a try has failed
WARMUP_STEPS = 8  # times a factor that falls linearly to zero over all steps
OVERSAMPLING, ITERATIONS = 8, 4  # of the search for directions: how many more than are kept
GRADIENT_SCALE = 2.0**12  # of the backward pass, where float16 would lose what a mean over many tokens leaves of each


Unmerged: TypeAlias = Kept[tuple[Tensor, bool]]  # an output, and whether it is logits; see ``output_of``


class _White(NamedTuple):
    """A* = a + z unwhiten and B* = b; trained are ``z`` and ``b``; ``sizes``: root mean squares of A L and B."""

    a: Tensor
    z: Tensor
    unwhiten: Tensor
    b: Tensor
    sizes: tuple[float, float]

    def update(self) -> tuple[Tensor, Tensor]:
        return self.a + self.z @ self.unwhiten, self.b

    def wider(self, rows: Tensor) -> _White:
        """With ``rows`` more of A, in white coordinates, and columns of B that are zero."""
        a = torch.cat((self.a, rows @ self.unwhiten))
        return self._replace(a=a, z=torch.zeros_like(a), b=nn.functional.pad(self.b, (0, len(rows))))


def joint_updates(
    model: nn.Module,
    updates: Mapping[AdapterLayer, LowRankUpdate],
    statistics: Mapping[AdapterLayer, LayerStatistics],
    calibration: Iterable[Any],
    steps: int,
    rank: int = 0,
) -> dict[AdapterLayer, LowRankUpdate]:
    """``updates`` after ``steps`` steps of one batch each, or as they are where that brings the output no nearer.

    Args:
        statistics: with second moments, of the unmerged model.
        calibration: batches; run again and again; the unmerged output is ``Kept``.
        rank: by how much every update becomes wider, within the smaller side of W.

    Raises:
        TypeError: as for ``output_of``.
        ValueError: ``calibration`` runs once only, or a layer's moments cannot be solved for.
    """
    with undisturbed(model):
        white = {layer: _white(layer, update, statistics[layer]) for layer, update in updates.items()}
        unmerged = Kept(calibration, lambda batch: _unmerged_output(model, batch))
        before = _distance(model, unmerged, white)
        rows = _new_rows(model, unmerged, white, rank) if rank and math.isfinite(before) else {}
        for size in (*NEW_ROWS, 0.0) if rows else (0.0,):
            limit = before if size else math.inf  # nothing to try after the last
            found = {layer: one.wider(size * rows[layer]) for layer, one in white.items()} if size else white
            if _train(model, unmerged, found, steps, limit) and _distance(model, unmerged, found) < before:
                break
        else:  # also where it is NaN
            return dict(updates)
    fitted = {}
    for layer, update in updates.items():
        a, b = (matrix.detach() for matrix in found[layer].update())
        error = relative_error(statistics[layer], own_a(layer), layer.whole_B.detach(), a, b)
        fitted[layer] = LowRankUpdate(a, b, update.scaling, "joint", error)
    return fitted


def output_of(found: Any, batch: Any = None) -> tuple[Tensor, bool]:
    """What a model's result is compared by: logits as [rows, classes] and True, or another tensor and False.

    Args:
        found: with ``logits`` of [rows, classes] or [B, T, classes], or anything that holds a floating-point tensor of
            two or more dimensions.
        batch: what it was computed from. Logits at places that its "attention_mask" [B, T] hides are left out; of an
            encoder-decoder, whose logits are the decoder's, "decoder_attention_mask".

    Raises:
        TypeError: ``found`` holds no such tensor.
    """
    logits = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        if logits.dim() not in (2, 3) or logits.shape[-1] == 1:
            return logits, False
        name = "decoder_attention_mask" if hasattr(found, "encoder_last_hidden_state") else "attention_mask"
        mask = batch.get(name) if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
            return logits[mask.to(logits.device, torch.bool, copy=True)], True
        return logits.flatten(0, -2), True
    for leaf in pytree.tree_leaves(dict(found) if isinstance(found, Mapping) else found):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1:
            return leaf, False
    raise TypeError(f"a joint fit needs a model that returns logits or another tensor, got {type(found).__name__}")


def distance(found: Tensor, wanted: Tensor, logits: bool) -> Tensor:
    """KL(softmax(wanted) ‖ softmax(found)), the mean over rows, in nats; or ‖found - wanted‖² / ‖wanted‖²."""
    found, wanted = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (found, wanted))
    if not logits:
        return (found - wanted).square().sum() / wanted.square().sum().clamp_min(torch.finfo(wanted.dtype).tiny)
    found, wanted = (t.log_softmax(-1) for t in (found, wanted))
    return nn.functional.kl_div(found, wanted, reduction="sum", log_target=True) / max(len(found), 1)


def _unmerged_output(model: nn.Module, batch: Any) -> tuple[Tensor, bool]:
    with torch.no_grad():
        return output_of(call_with(model, batch), batch)


def _white(layer: AdapterLayer, update: LowRankUpdate, statistics: LayerStatistics) -> _White:
    assert statistics.gram is not None
    gram = statistics.gram.double()
    scaled = gram / gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    factor = cholesky_factor(scaled, DAMPING, f"layer {layer.position} of chain {layer.chain and layer.chain.name!r}")
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    unwhiten = torch.linalg.solve_triangular(factor, identity, upper=False).to(update.a)
    sizes = _size(update.a.double() @ factor), _size(update.b)
    return _White(update.a, torch.zeros_like(update.a), unwhiten, update.b.clone(), sizes)


def _size(matrix: Tensor) -> float:
    return float(matrix.square().mean().sqrt())


def _new_rows(
    model: nn.Module, unmerged: Unmerged, white: Mapping[AdapterLayer, _White], rank: int
) -> dict[AdapterLayer, Tensor]:
    """Up to ``rank`` for each A, within the smaller side of W, as large as those that are there."""
    sums = {layer: one.b.new_zeros(len(one.b), one.a.shape[1]) for layer, one in white.items()}
    watches = [layer.register_forward_hook(partial(_watch, total), with_kwargs=True) for layer, total in sums.items()]
    try:
        for batch, (wanted, logits) in unmerged:
            _gradients(model, white, [one.b.requires_grad_() for one in white.values()], batch, wanted, logits)
    finally:
        for watch in watches:
            watch.remove()
    new = {}
    for layer, one in white.items():
        gradient = sums.pop(layer) @ one.unwhiten.T
        rows = _first_directions(gradient, max(0, min(rank, min(gradient.shape) - len(one.a))))
        new[layer] = rows * (one.sizes[0] * gradient.shape[1] ** 0.5)
    return new


def _watch(total: Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
    """Let the backward pass through ``y`` add (∂/∂y)ᵀ x to ``total``."""
    if y.requires_grad:  # else it is not the pass that is differentiated
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        y.register_hook(partial(_add_product, total, x))  # type: ignore[no-untyped-call]


def _add_product(total: Tensor, x: Tensor, gradient: Tensor) -> None:
    with torch.autocast(x.device.type, enabled=False):
        rows, columns = (t.reshape(-1, t.shape[-1]).to(total) for t in (gradient, x))
        total += (rows.T @ columns).nan_to_num(0.0, 0.0, 0.0)  # of float16, where a batch may overflow


def _first_directions(matrix: Tensor, count: int) -> Tensor:
    """The first right singular vectors as rows [count, K], by subspace iteration from one and the same start."""
    wide = matrix.double()  # and autocast leaves it alone
    start = torch.randn(
        wide.shape[1], min(count + OVERSAMPLING, *wide.shape), dtype=wide.dtype, device="cpu",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    found = start.to(wide.device)
    for _ in range(ITERATIONS):
        found = torch.linalg.qr(wide.T @ (wide @ found)).Q
    turned: Tensor = torch.linalg.svd(wide @ found, full_matrices=False)[2]
    directions: Tensor = turned[:count] @ found.T
    return directions.to(matrix)


def _train(
    model: nn.Module, unmerged: Unmerged, white: Mapping[AdapterLayer, _White], steps: int, limit: float
) -> bool:
    """Whether all steps were done; not where the distance's mean over ``TRIAL_STEPS`` is above ``limit``."""
    groups: list[dict[str, Any]] = []
    for one in white.values():
        for parameter, name, size in zip((one.z, one.b), RATES, one.sizes, strict=True):
            groups.append({"params": [parameter.requires_grad_()], "lr": RATES[name] * size})
    trained: list[Tensor] = [group["params"][0] for group in groups]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1.0) * (1 - step / steps)
    )
    done, tried, total = 0, 0, torch.zeros(())
    while done < steps:
        start = done
        for batch, (wanted, logits) in islice(unmerged, steps - done):
            loss, gradients = _gradients(model, white, trained, batch, wanted, logits)
            total = total.to(loss) + loss
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            done += 1
        if done == start:
            raise ValueError("calibration gave no batch on another run: with joint_steps pass a list")
        tried += done - start
        if tried >= TRIAL_STEPS:
            if not float(total) / tried <= limit:  # also where it is NaN
                return False
            tried, total = 0, torch.zeros(())
    return True


def _gradients(
    model: nn.Module, white: Mapping[AdapterLayer, _White], of: list[Tensor], batch: Any, wanted: Tensor, logits: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """One batch's distance and its gradients; None where it does not depend on a tensor."""
    with torch.enable_grad(), _merged(model, white, batch) as found:
        loss = distance(found, wanted, logits)
        gradients = torch.autograd.grad(loss * GRADIENT_SCALE, of, allow_unused=True)
    return loss.detach(), [None if gradient is None else gradient / GRADIENT_SCALE for gradient in gradients]


def _distance(model: nn.Module, unmerged: Unmerged, white: Mapping[AdapterLayer, _White]) -> float:
    """The mean over the batches."""
    total, count = 0.0, 0
    for batch, (wanted, logits) in unmerged:
        with _merged(model, white, batch) as found:
            total, count = total + float(distance(found, wanted, logits)), count + 1
    return total / max(count, 1)


@contextmanager
def _merged(model: nn.Module, white: Mapping[AdapterLayer, _White], batch: Any) -> Iterator[Tensor]:
    """The output for one batch; the updates stand in until the block ends, as checkpointed layers run in backward."""
    with replaced({layer: one.update() for layer, one in white.items()}):
        yield output_of(call_with(model, batch), batch)[0]
