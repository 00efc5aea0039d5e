"""torch.compile, whole model and layer by layer: eager's gradients, no graph break, one graph for all steps and layers.

``fullgraph=True`` makes a graph break an error everywhere here; ``unchanged`` makes a recompilation one.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from reslora_kernels import ResLoRAConfig, apply_reslora, checkpoint_context, collect_statistics, merge_reslora
from reslora_kernels.layers import chain
from reslora_kernels.ops import lora_linear
from reslora_kernels.testing import max_error

from .models import llama, randomize

SHORTCUTS = [("none", 0), ("input", 1), ("block", 1), ("middle", -1)]
HANDING = [("input", 1), ("middle", 1), ("middle", -1)]
WIDTH, ROUNDING = 8, 1e-13
ATTENTION = ["q_proj", "v_proj"]
needs_checkpoints = pytest.mark.skipif(
    not hasattr(dynamo, "skip_fwd_side_effects_in_bwd_under_checkpoint"),
    reason="this PyTorch checkpoints nothing inside compiled code that hands tensors on",
)


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nor is there anything in the package that Dynamo warns its user of."""
    monkeypatch.setattr("torch._dynamo.utils.warn_once", pytest.fail, raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def unchanged() -> AbstractContextManager[None]:
    return dynamo.patch(error_on_recompile=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.proj(x))


class Stack(nn.Module):
    """Residual blocks, of which a test can leave some out; ``around`` says how a block is called."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.around: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block(x)

    def forward(self, x: Tensor, skip: tuple[int, ...] = ()) -> Tensor:
        for n, block in enumerate(self.blocks):
            if n not in skip:
                x = self.around(block, x)
        return x


def stack(shortcut: str, pre_num: int, p: float = 0.0, depth: int = 4) -> Stack:
    torch.manual_seed(0)
    model = Stack(depth).double()
    config = ResLoRAConfig(r=2, shortcut=shortcut, pre_num=pre_num, lora_dropout=p)
    apply_reslora(model, config, example_inputs=torch.zeros(1, WIDTH, dtype=torch.float64))
    randomize(model)
    return model


def language_model(shortcut: str, pre_num: int, p: float = 0.0) -> Any:
    model = llama().double().train()
    config = ResLoRAConfig(r=2, shortcut=shortcut, pre_num=pre_num, lora_dropout=p, target_modules=ATTENTION)
    return randomize(apply_reslora(model, config))


def refused(text: str) -> Any:
    """The error of the layer reaches the user; of PyTorch 2.8's message it is only the cause."""
    return pytest.raises(Unsupported, match=rf"{text}|raised exception ExceptionVariable\(<class 'RuntimeError'>\)")


def compile_each(layers: Any, backend: Any = "aot_eager", **options: Any) -> CompileCounterWithBackend:
    counter = CompileCounterWithBackend(backend)
    for layer in layers:
        layer.compile(backend=counter, fullgraph=True, **options)
    return counter


def ids(length: int) -> Tensor:
    return torch.randint(0, 48, (2, length), generator=torch.Generator().manual_seed(length))


def loss_of(model: Any, length: int = 9) -> Tensor:
    return model(input_ids=ids(length), labels=ids(length), use_cache=False).loss


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def gradients(model: nn.Module, loss: Callable[..., Tensor], *arguments: Any) -> list[Tensor]:
    """Of two forwards before one backward, from the same random state."""
    torch.manual_seed(2)
    total = loss(*arguments) - 0.5 * loss(*arguments)
    return list(torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad]))


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = ROUNDING) -> None:
    assert max(max_error(one, two) for one, two in zip(actual, expected, strict=True)) < tolerance


def loss_with_all(model: nn.Module, x: Tensor, skip: tuple[int, ...]) -> Tensor:
    """A loss with a gradient for every adapter, of skipped layers too."""
    return model(x, skip).square().mean() + sum(0.0 * p.sum() for p in model.parameters() if p.requires_grad)


def x_of(rows: int = 3) -> Tensor:
    return torch.randn(rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


# --- whole model -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
def test_whole_language_model(shortcut: str, pre_num: int) -> None:
    """Dropout on; all steps, and with dynamic shapes all lengths, share what the first one compiled."""
    model = language_model(shortcut, pre_num, p=0.2)
    dynamic = shortcut == "input"
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    loss_of(compiled).backward()
    with unchanged():
        for length in (9, 11, 13) if dynamic else (9,):
            expected = gradients(model, loss_of, model, length)
            assert_same(gradients(model, loss_of, compiled, length), expected)


@pytest.mark.parametrize(("shortcut", "pre_num"), [*SHORTCUTS, ("block", -1)])
@pytest.mark.slow
def test_whole_stack_of_any_length(shortcut: str, pre_num: int) -> None:
    model = stack(shortcut, pre_num)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(x_of(2)).sum().backward()
    for rows in (3, 5, 7):
        expected = gradients(model, square, model, x_of(rows))
        with unchanged():
            assert_same(gradients(model, square, compiled, x_of(rows)), expected)
    model.eval()
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert max_error(compiled(x_of()), model(x_of())) < ROUNDING
    model.requires_grad_(False)
    assert max_error(compiled(x_of()), model(x_of())) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING[:1])
def test_inductor(shortcut: str, pre_num: int) -> None:
    """What users get: generated C++ around the package's ops."""
    model = stack(shortcut, pre_num, depth=3)
    expected = gradients(model, square, model, x_of())
    compiled = torch.compile(model, fullgraph=True)
    with unchanged():
        assert_same(gradients(model, square, compiled, x_of()), expected)


@pytest.mark.slow
def test_merged_model_and_statistics() -> None:
    """Norms and moments are gathered in compiled code too; a merged model compiles to its plain matmuls."""
    model = stack("middle", -1)
    with collect_statistics(model) as expected:
        for rows in (3, 3, 3, 3):
            model(x_of(rows))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with collect_statistics(model) as gathered:
        for _ in range(3):
            compiled(x_of())
        with unchanged():
            compiled(x_of())
    for name, layer in expected.layers.items():
        other = gathered.layers[name]
        assert (other.calls, other.norm_of_x()) == (4, pytest.approx(layer.norm_of_x(), rel=1e-12))
        assert max_error(other.gram, layer.gram) < 1e-12
    merge_reslora(model, statistics=gathered)
    assert max_error(compiled(x_of()), model(x_of())) < ROUNDING


# --- layer by layer --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING[:1])
def test_layers_of_a_language_model(shortcut: str, pre_num: int) -> None:
    """The root opens the pass eagerly; every compiled layer finds it. A second graph serves all other lengths."""
    model = language_model(shortcut, pre_num, p=0.2)
    expected = {length: gradients(model, loss_of, model, length) for length in (9, 11, 13)}
    compile_each(model.model.layers)
    for length in (9, 11):
        assert_same(gradients(model, loss_of, model, length), expected[length])
    with unchanged():
        for length in (9, 13):
            assert_same(gradients(model, loss_of, model, length), expected[length])


@pytest.mark.parametrize(("shortcut", "pre_num", "graphs"), [
    ("none", 0, 2), ("block", 1, 2), ("input", 1, 3), ("middle", 1, 3), ("middle", -1, 3), ("middle", 3, 5),
])  # fmt: skip
@pytest.mark.slow
def test_graphs_do_not_grow_with_the_layers(shortcut: str, pre_num: int, graphs: int) -> None:
    """32 layers: the first (its input needs no gradient), those alike, the last. PEFT's LoRA takes 2 as well."""
    model = stack(shortcut, pre_num, depth=32)
    expected = gradients(model, square, model, x_of())
    counter = compile_each(model.blocks)
    assert_same(gradients(model, square, model, x_of()), expected, 32 * ROUNDING)
    assert counter.frame_count == graphs
    with unchanged():
        assert_same(gradients(model, square, model, x_of()), expected, 32 * ROUNDING)


@pytest.mark.slow
def test_block_over_all_earlier_layers_needs_a_graph_each() -> None:
    """Every layer multiplies by another number of matrices. Past PyTorch's limit it says so; the limit is a setting."""
    model = stack("block", -1, depth=10)
    expected = gradients(model, square, model, x_of())
    counter = compile_each(model.blocks)
    with pytest.raises(FailOnRecompileLimitHit):
        model(x_of())
    with dynamo.patch(recompile_limit=16):
        assert_same(gradients(model, square, model, x_of()), expected, 10 * ROUNDING)
    assert counter.frame_count == 10


@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING[::2])
@pytest.mark.slow
def test_skipped_layers_and_another_shape(shortcut: str, pre_num: int) -> None:
    """A graph made for one situation is never taken for another, in whichever order they come."""
    model, compiled = stack(shortcut, pre_num, depth=6), stack(shortcut, pre_num, depth=6)
    compile_each(compiled.blocks)
    with dynamo.patch(recompile_limit=64):
        for skip in [(3,), (), (0,), (2, 3), (1, 4), (3,)]:
            for rows in (3, 4):
                expected = gradients(model, loss_with_all, model, x_of(rows), skip)
                assert_same(gradients(compiled, loss_with_all, compiled, x_of(rows), skip), expected)


def test_a_layer_outside_a_pass_and_passes_in_two_threads_are_errors() -> None:
    model = stack("input", 1)
    compile_each(model.blocks)
    with refused("outside a forward pass"):
        model.blocks[1](x_of())
    chain = model.blocks[0].proj.chain
    opened, done = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with chain.forward_pass():
            opened.set()
            done.wait(20)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    opened.wait(20)
    with refused("several threads"):
        model(x_of())
    done.set()
    thread.join()
    model(x_of())


def test_few_rows_in_float16_overflow_no_sooner_than_eager_ones() -> None:
    """dy times the scaling is beyond float16 here; the gradients are not."""
    torch.manual_seed(0)
    x, weight, a, b = torch.randn(4, 32) / 5, torch.randn(32, 32) / 10, torch.randn(4, 32) / 10, torch.randn(32, 4) / 20
    x, weight, dy = x.half(), weight.half(), 9000 * torch.eye(1, 32).expand(4, -1).half()
    found = []
    for call in (lora_linear, torch.compile(lora_linear, backend="aot_eager", fullgraph=True, dynamic=False)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
        y, _ = call(leaves[0], weight, None, leaves[1:2], leaves[2:], scaling=8.0)
        found.append(torch.autograd.grad(y, leaves, dy))
    torch.testing.assert_close(found[1], found[0], rtol=5e-3, atol=0.5)


@pytest.mark.parametrize(("shortcut", "pre_num"), [*SHORTCUTS, ("block", -1)])
def test_few_rows_take_plain_products_alone(shortcut: str, pre_num: int) -> None:
    """As many as LoRA takes, whatever the shortcut: no copy of a stack, and no product that adds to a tensor."""
    graphs: list[Counter[str]] = []

    def counted(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
        return make_boxed_func(graph.forward)

    model, layers = stack(shortcut, pre_num), 4
    backend = aot_autograd(fw_compiler=counted, bw_compiler=counted, partition_fn=min_cut_rematerialization_partition)
    y = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(x_of().requires_grad_())
    y.sum().backward()
    assert max_error(y, model(x_of())) < ROUNDING
    assert [graph["aten.mm.default"] for graph in graphs] == [3 * layers, 5 * layers]
    assert not any(graph[name] for graph in graphs for name in ("aten.addmm.default", "aten.cat.default"))


@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("block", 1)])
def test_an_eager_call_in_between_recompiles_nothing(shortcut: str, pre_num: int) -> None:
    model = apply_reslora(Stack(3), ResLoRAConfig(r=2, shortcut=shortcut, pre_num=pre_num))
    compiled, x = torch.compile(model, backend="eager"), torch.zeros(1, WIDTH)
    compiled(x)
    with unchanged():
        model(x)
        compiled(x)


def test_a_layer_after_a_graph_break_is_no_part_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several processes, a ``block`` layer that runs eagerly inside a compiled model, of one and of another."""
    monkeypatch.setattr(chain, "initialised", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(chain.Entered, "compiled", False)
    for model in (stack("block", 1), stack("block", 1)):
        for block in model.blocks:
            block.forward = torch.compiler.disable(block.forward)
        if not chain.Entered.compiled:
            with pytest.raises(RuntimeError, match="a part of a model is trained alone"):
                model.blocks[1](x_of())
        torch.compile(model, backend="eager")(x_of()).sum().backward()


def test_copies_know_their_own_neighbours() -> None:
    """Deep copies and pickles of chains of any length; a copy trains on its own."""
    model = stack("input", 1, depth=300)
    for twin in (copy.deepcopy(model.blocks), pickle.loads(pickle.dumps(model.blocks))):
        layers = [block.proj for block in twin]
        for n, layer in enumerate(layers):
            assert layer.neighbours.predecessor is (layers[n - 1] if n else None)
            assert layer.neighbours.following is (layers[n + 1] if n < 299 else None)


# --- with activation checkpointing -----------------------------------------------------------------------------------


@needs_checkpoints
@pytest.mark.parametrize(
    ("shortcut", "pre_num", "backend"),
    [*((*how, "aot_eager") for how in HANDING), ("input", 1, "inductor")],
)
@pytest.mark.slow
def test_recomputing_compiled_layers_into_an_open_pass_is_an_error(shortcut: str, pre_num: int, backend: str) -> None:
    """They would take the pass for theirs; with the context, and with backward after the block, they do not."""
    model = stack(shortcut, pre_num)
    layers = [block.proj for block in model.blocks]
    chain, x = layers[0].chain, x_of().requires_grad_()

    def run(**context: object) -> torch.Tensor:
        y = x
        for layer in layers:
            y = checkpoint(layer, y, use_reentrant=False, **context)
        return y.square().mean()

    parameters = [p for p in model.parameters() if p.requires_grad]
    context = checkpoint_context(model)
    with chain.forward_pass():
        loss = run(context_fn=context)
    expected = torch.autograd.grad(loss, parameters)
    for layer in layers:
        layer.compile(backend=backend)
    skip = dynamo.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
    still_open = pytest.raises(RuntimeError, match=r"inside a `with chain.forward_pass\(\):` that is still open")
    with chain.forward_pass(), skip, still_open:
        run().backward()
    with chain.forward_pass():
        size = max(float(gradient.abs().max()) for gradient in expected)
        found = list(torch.autograd.grad(run(context_fn=context), parameters))
        assert_same(found, list(expected), ROUNDING * max(1.0, size))


@pytest.mark.slow
@needs_checkpoints
@pytest.mark.parametrize(("shortcut", "pre_num"), [("none", 0), ("middle", -1)])
def test_checkpointing_inside_compiled_layers(shortcut: str, pre_num: int) -> None:
    """Exact once recomputation is told not to repeat what a layer hands on; an error before."""
    model = language_model(shortcut, pre_num, p=0.2)
    expected = gradients(model, loss_of, model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compile_each(model.model.layers)
    if shortcut != "none":
        with pytest.raises(Unsupported, match="skip_fwd_side_effects_in_bwd_under_checkpoint"):
            loss_of(model)
    with dynamo.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        assert_same(gradients(model, loss_of, model), expected)
        with unchanged():
            assert_same(gradients(model, loss_of, model), expected)


@pytest.mark.slow
@needs_checkpoints
def test_checkpointing_inside_a_compiled_model() -> None:
    """PyTorch refuses Transformers' hook that makes the embeddings require gradients, for PEFT's LoRA as well."""
    from peft import LoraConfig, get_peft_model

    enable = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    plain = get_peft_model(llama(), LoraConfig(r=2, target_modules=ATTENTION)).train()
    plain.base_model.model.gradient_checkpointing_enable(**enable)
    with pytest.raises(Unsupported, match="requires_grad_"):
        loss_of(torch.compile(plain, backend="aot_eager", fullgraph=True))

    model = language_model("input", 1, p=0.2)
    expected = gradients(model, loss_of, model)
    model.gradient_checkpointing_enable(**enable)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with dynamo.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        with pytest.raises(Unsupported, match="requires_grad_"):
            loss_of(compiled)
        model.disable_input_require_grads()
        assert_same(gradients(model, loss_of, compiled), expected)
    torch._dynamo.reset()
    with pytest.raises(Unsupported, match="skip_fwd_side_effects_in_bwd_under_checkpoint"):
        loss_of(compiled)


@pytest.mark.slow
@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
def test_checkpoint_around_compiled_blocks(shortcut: str, pre_num: int) -> None:
    """By hand, outside the compiled code: the context is resumed there as in eager code, and demanded as there."""
    model = stack(shortcut, pre_num, p=0.3)
    expected = gradients(model, square, model, x_of())
    compile_each(model.blocks)
    model.around = lambda block, x: checkpoint(block, x, use_reentrant=False)
    loss = model(x_of()).sum()
    with refused(r"context_fn=checkpoint_context\(model\)"):
        loss.backward()
    context = checkpoint_context(model)
    model.around = lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=context)
    for _ in range(2):
        assert_same(gradients(model, square, model, x_of()), expected)
    with unchanged():
        assert_same(gradients(model, square, model, x_of()), expected)
