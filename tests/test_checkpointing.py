"""Activation checkpointing changes no gradient: by hand, in wrappers, in Transformers, diffusers; not reentrant."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from reslora_kernels import (
    ResLoRAConfig,
    apply_reslora,
    checkpoint_context,
    collect_statistics,
    export_peft,
    load_adapter,
    merge_reslora,
    save_adapter,
)
from reslora_kernels.adapt.record import record_of
from reslora_kernels.adapt.targets import find_targets
from reslora_kernels.forward_state import ForwardState
from reslora_kernels.testing import relative_error

from .models import FAMILIES, randomize
from .test_gates import X, residual

SHORTCUTS = [("none", 0), ("input", 1), ("block", 2), ("middle", 2), ("middle", -1)]
HANDING = [("input", 1), ("middle", -1)]
WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """``around`` says how a block is called, so that a test can put a checkpoint there."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.around: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = lambda block, x: block(x)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.around(block, x)
        return x


def adapted(shortcut: str, pre_num: int, p: float = 0.0) -> Stack:
    torch.manual_seed(0)
    model = Stack().double()
    config = ResLoRAConfig(r=2, shortcut=shortcut, pre_num=pre_num, lora_dropout=p)
    apply_reslora(model, config, example_inputs=torch.zeros(1, WIDTH, dtype=torch.float64))
    randomize(model)
    return model


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    """Of two forwards before one backward, from the same random state."""
    torch.manual_seed(2)
    total = loss() - 0.5 * loss()
    return list(torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad]))


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(one, two) for one, two in zip(actual, expected, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
def test_by_hand_around_each_block(shortcut: str, pre_num: int, p: float) -> None:
    """Bit-equal gradients with two forwards before one backward, dropout masks included."""
    model, x = adapted(shortcut, pre_num, p), torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    expected = gradients(model, lambda: model(x).square().mean())
    context = checkpoint_context(model)
    model.around = lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=context)
    assert_same(gradients(model, lambda: model(x).square().mean()), expected)


@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
def test_around_several_blocks_and_around_the_whole_model(shortcut: str, pre_num: int) -> None:
    """Within one region a layer meets what the recomputation hands on; the whole model opens its own pass again."""
    model, x = adapted(shortcut, pre_num, 0.3), torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    expected = gradients(model, lambda: model(x).square().mean())
    whole = gradients(model, lambda: checkpoint(model, x, use_reentrant=False).square().mean())
    assert_same(whole, expected)
    first, second = nn.Sequential(*model.blocks[:1]), nn.Sequential(*model.blocks[1:])
    context = checkpoint_context(model)

    def halves(x: Tensor) -> Tensor:
        return checkpoint(second, first(x), use_reentrant=False, context_fn=context)

    model.forward = halves
    assert_same(gradients(model, lambda: model(x).square().mean()), expected)


@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
def test_checkpoint_wrapper(shortcut: str, pre_num: int) -> None:
    """torch.distributed's wrapper, as FSDP users apply it."""
    model, x = adapted(shortcut, pre_num), torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    expected = gradients(model, lambda: model(x).square().mean())
    context = checkpoint_context(model)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block, context_fn=context)
    assert_same(gradients(model, lambda: model(x).square().mean()), expected)


def wrap_blocks(model: Stack, step: int = 1) -> None:
    for i in range(0, len(model.blocks), step):
        model.blocks[i] = checkpoint_wrapper(model.blocks[i])


def wrap_layers(model: Stack) -> None:
    for block in model.blocks:
        block.up = checkpoint_wrapper(block.up)


def compile_blocks(model: Stack) -> None:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")


@pytest.mark.parametrize("shortcut", ["block", "middle"])
@pytest.mark.parametrize("wrapped_first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "wrap", [wrap_blocks, partial(wrap_blocks, step=2), wrap_layers, compile_blocks],
    ids=["blocks", "some blocks", "layers", "compiled blocks"],
)  # fmt: skip
def test_wrappers_change_no_chain_no_file_and_no_merge(
    wrap: Callable[[Stack], None], wrapped_first: bool, shortcut: str, tmp_path: Path
) -> None:
    """Adapted in wrappers, or put into them afterwards."""
    config, x = ResLoRAConfig(r=2, shortcut=shortcut), torch.randn(3, WIDTH, dtype=torch.float64)

    def plain(wrapped: bool = False) -> Stack:
        torch.manual_seed(0)
        model = Stack().double()
        if wrapped:
            wrap(model)
        return model

    expected = randomize(apply_reslora(plain(), config))(x)
    model = randomize(apply_reslora(plain(wrapped_first), config))
    chains = [chain.name for chain in record_of(model).chains]
    if not wrapped_first:
        wrap(model)
    assert chains == ["blocks.*.up", "blocks.*.down"]
    assert relative_error(model(x), expected) < 1e-12
    save_adapter(model, tmp_path / "own")
    for other in (plain(), plain(wrapped=True), model):
        assert relative_error(load_adapter(other, tmp_path / "own")(x), expected) < 1e-12
    export_peft(model, tmp_path / "peft", calibration=[x])
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert about["target_modules"] == ["down", "up"]
    merge_reslora(model, calibration=[x])
    served = PeftModel.from_pretrained(plain(), tmp_path / "peft")
    assert relative_error(served(x), model(x)) < 1e-6


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up = nn.MultiheadAttention(WIDTH, 2), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.attention(x, x, x)[0])


def test_wrappers_hide_nothing_of_what_they_are_around() -> None:
    """What reads a weight past an adapter still does so in a wrapper; full names mean what they mean outside of it."""
    model = nn.Sequential(Attending(), Attending())
    for block in model:
        block.attention = checkpoint_wrapper(block.attention)
    assert find_targets(model, ResLoRAConfig(target_modules="all-linear")).matched.keys() == {"0.up", "1.up"}
    wrapped = nn.Sequential(checkpoint_wrapper(Block()), Block())
    assert find_targets(wrapped, ResLoRAConfig(target_modules=["0.up"])).matched.keys() == {"0.up"}  # without a warning


def test_a_layer_that_is_compiled_by_itself_is_refused() -> None:
    """The compiled call is bound to the layer as it was."""
    model = nn.Sequential(torch.compile(nn.Linear(WIDTH, WIDTH), backend="eager"), nn.Linear(WIDTH, WIDTH))
    with pytest.raises(ValueError, match="'0' is compiled by itself, and would run without its adapter"):
        apply_reslora(model, ResLoRAConfig(r=2))
    assert not any(name.endswith("lora_A") for name, _ in model.named_parameters())


def test_backward_twice_through_the_same_graph() -> None:
    model, x = adapted("input", 1), torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    context = checkpoint_context(model)
    model.around = lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=context)
    loss, parameters = model(x).square().mean(), [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert_same(list(torch.autograd.grad(loss, parameters)), list(first))


@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
def test_a_checkpoint_without_the_context_is_an_error(shortcut: str, pre_num: int) -> None:
    """Also when the pass is still open, where a layer could meet another forward's state unnoticed."""
    model, x = adapted(shortcut, pre_num), torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    model.around = lambda block, x: checkpoint(block, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"context_fn=checkpoint_context\(model\)"):
        model(x).sum().backward()
    chains = {block.up.chain for block in model.blocks} | {block.down.chain for block in model.blocks}
    up, down = chains
    with up.forward_pass(), down.forward_pass(), pytest.raises(RuntimeError, match=r"checkpoint_context"):
        model(x).sum().backward()


@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
def test_recomputed_layers_are_observed_once(shortcut: str, pre_num: int) -> None:
    """Norms, moments and the number of batches are those of the run without checkpointing."""
    model, x = adapted(shortcut, pre_num, 0.3), torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    with collect_statistics(model, second_moments=True) as expected:
        gradients(model, lambda: model(x).square().mean())
    context = checkpoint_context(model)
    model.around = lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=context)
    with collect_statistics(model, second_moments=True) as actual:
        gradients(model, lambda: model(x).square().mean())
    own, other = actual.state_dict(), expected.state_dict()
    assert own.keys() == other.keys()
    assert_same([own[name] for name in other], list(other.values()))
    assert actual.calls == 2


def test_dropout_needs_the_random_state_of_the_first_forward() -> None:
    """PyTorch's own switch, which accelerate's activation_checkpointing turns off: wrong for any dropout, unseen."""
    model, x = adapted("block", 1, 0.3), torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    expected = gradients(model, lambda: model(x).square().mean())
    model.around = lambda block, x: checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
    wrong = gradients(model, lambda: model(x).square().mean())
    assert max(relative_error(one, two) for one, two in zip(wrong, expected, strict=True)) > 0.1


def test_only_rank_sized_tensors_wait_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """M r values for each layer that hands on: the memory that a checkpointed chain adds."""
    seen: list[weakref.ref[Tensor]] = []
    hand_on = ForwardState.hand_on
    monkeypatch.setattr(ForwardState, "hand_on", lambda self, n, h: (seen.append(weakref.ref(h)), hand_on(self, n, h)))
    model, x = adapted("input", 1), torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    context = checkpoint_context(model)
    model.around = lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=context)
    loss = model(x).sum()
    alive = [ref() for ref in seen]
    assert sum(h.numel() for h in alive if h is not None) == 2 * 3 * 3 * 2  # two chains, three of four layers, M x r
    del alive
    loss.backward()
    del loss
    assert all(ref() is None for ref in seen)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=3, **sizes)).double().train()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("enabled", ["before", "after"])
@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
def test_transformers(shortcut: str, pre_num: int, enabled: str) -> None:
    """gradient_checkpointing_enable, whichever of it and apply_reslora comes first; a deep copy keeps working."""
    ids = torch.randint(0, 32, (2, 9))
    config = ResLoRAConfig(r=2, shortcut=shortcut, pre_num=pre_num, lora_dropout=0.2)
    plain, model = llama(), llama()
    enable = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if enabled == "before":
        model.gradient_checkpointing_enable(**enable)
    for one in (plain, model):
        apply_reslora(one, config)
        randomize(one)
    if enabled == "after":
        model.gradient_checkpointing_enable(**enable)
    expected = gradients(plain, lambda: plain(ids, labels=ids, use_cache=False).loss)
    assert_same(gradients(model, lambda: model(ids, labels=ids, use_cache=False).loss), expected)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    assert_same(gradients(twin, lambda: twin(ids, labels=ids, use_cache=False).loss), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
def test_reentrant_is_refused(shortcut: str, pre_num: int) -> None:
    ids, model = torch.randint(0, 32, (2, 9)), llama()
    apply_reslora(model, ResLoRAConfig(r=2, shortcut=shortcut, pre_num=pre_num))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match=r'"use_reentrant": False'):
        model(ids, labels=ids, use_cache=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(ids, labels=ids, use_cache=False).loss.backward()
    with torch.no_grad():
        model(ids, labels=ids, use_cache=False)


@pytest.mark.slow
@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
def test_diffusers_unet(shortcut: str, pre_num: int) -> None:
    family = FAMILIES["unet"]
    plain, model = family.make().double().train(), family.make().double().train()
    inputs = {name: v.double() if v.is_floating_point() else v for name, v in family.batch(0).items()}
    config = ResLoRAConfig(r=2, shortcut=shortcut, pre_num=pre_num, target_modules=["to_q", "to_v"])
    for one in (plain, model):
        apply_reslora(one, config, example_inputs=inputs)
        randomize(one)
    model.enable_gradient_checkpointing()
    expected = gradients(plain, lambda: plain(**inputs).sample.square().mean())
    for one, two in zip(gradients(model, lambda: model(**inputs).sample.square().mean()), expected, strict=True):
        assert torch.equal(one, two)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn.Module"):
        checkpoint_context("model")
    with pytest.raises(ValueError, match="no ResLoRALinear"):
        checkpoint_context(nn.Linear(2, 2))


def test_gates_recomputed_with_two_forwards_before_one_backward() -> None:
    found = []
    for recompute in (False, True):
        model = residual(shortcut="middle", pre_num=-1)
        if recompute:
            around = partial(checkpoint, use_reentrant=False, context_fn=checkpoint_context(model))
            for layer in model.layers:
                layer.forward = partial(around, layer.forward)
        (model(X).square().sum() - 0.3 * model(X.flip(1)).square().sum()).backward()
        found.append([layer.lora_gates.grad for layer in model.layers])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Attention(nn.Module):
    """A checkpoint inside the module whose layers read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.around: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = lambda function, x: function(x)

    def core(self, x: Tensor) -> Tensor:
        return torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.around(self.core, x)


@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
def test_inside_a_module_whose_layers_read_one_tensor(shortcut: str, pre_num: int) -> None:
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    attentions = nn.Sequential(*(Attention() for _ in range(3))).double()
    config = ResLoRAConfig(r=2, shortcut=shortcut, pre_num=pre_num)
    model: Any = randomize(apply_reslora(attentions, config, example_inputs=x.detach()))
    assert len(model._reslora.groups) == 3
    expected = gradients(model, lambda: model(x).square().sum())
    context = {} if shortcut in ("none", "block") else {"context_fn": checkpoint_context(model)}
    for block in model:
        block.around = partial(checkpoint, use_reentrant=False, **context)
    assert_same(gradients(model, lambda: model(x).square().sum()), expected)
    assert all(group.passes.current() is None for group in model._reslora.groups)
