"""Lines that could be changed one by one without a test noticing, until the tests here."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    ResLoRALinear,
    add_adapter,
    apply_reslora,
    delete_adapter,
    dropout,
    dtensors,
    host,
    link,
    load_adapter,
    save_adapter,
)
from reslora_kernels.adapt.targets import endings_of, find_targets, role_of
from reslora_kernels.config import matches, with_parents
from reslora_kernels.files.peft_export import _is_in
from reslora_kernels.forward_state import ForwardState, Passes, any_opened_by_hand, outside, refuse_recomputation
from reslora_kernels.layers.shortcuts import weighed
from reslora_kernels.ops import lora_linear


def layer(shortcut: str, k: int = 6, n: int = 5, device: str = "cpu", **options: Any) -> ResLoRALinear:
    config = ResLoRAConfig(r=2, shortcut=shortcut, **options)
    made = ResLoRALinear(k, n, dtype=torch.float64, device=device, config=config)
    nn.init.normal_(made.lora_B)
    return made


def linear() -> nn.Linear:
    return nn.Linear(6, 6, dtype=torch.float64)


class Stack(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for one in self.layers:
            x = torch.tanh(one(x))
        return x


def adapted(shortcut: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = ResLoRAConfig(r=2, shortcut=shortcut, target_modules=r"layers\.\d", **options)
    return with_random_b(apply_reslora(Stack(), config))


def with_random_b(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return model


def test_gradients_of_layer_zero_of_input_count_its_input_twice() -> None:
    own = layer("input")
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, own.lora_A, own.lora_B)
    assert torch.autograd.gradcheck(
        lambda x, a, b: torch.func.functional_call(own, {"lora_A": a, "lora_B": b}, x), inputs
    )


def test_dora_scales_by_the_layers_own_update_and_not_the_next_layers_matrix() -> None:
    first, second = layer("input", 6, 6, use_dora=True), layer("input", 6, 6, use_dora=True)
    chain = link([first, second])
    x = torch.randn(4, 6, dtype=torch.float64)
    with chain.forward_pass():
        y = first(x)
    update = first.scaling * first.lora_B @ first.lora_A
    length = (first.weight + update).norm(dim=1)
    term = x @ first.weight.T + 2 * x @ update.T  # layer 0 of ``input`` counts its own input twice
    torch.testing.assert_close(y, first.lora_magnitude_vector / length * term + first.bias)


@pytest.mark.parametrize(
    ("name", "wanted", "meant"),
    [
        ("layers.0.q_proj", ["q_proj"], True),
        ("layers.0.new_q_proj", ["q_proj"], False),
        ("layers.0.q_proj", r"layers\.\d\.q_proj", True),
        ("layers.0.q_proj_old", r"layers\.\d\.q_proj", False),
    ],
)
def test_names_match_by_whole_components_and_whole_expressions(name: str, wanted: Any, meant: bool) -> None:
    assert matches(name, wanted) is meant


def test_a_layers_index_is_that_of_its_block() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))}) for _ in range(3)
    )
    config = ResLoRAConfig(r=2, target_modules=r"layers\.\d\.mlp\.\d", layers_to_transform=[2])
    assert list(find_targets(model, config).matched) == ["layers.2.mlp.0", "layers.2.mlp.1"]


def test_a_number_is_no_ending_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert endings_of(model, ["0", "1"]) == ["0", "1"]
    nested = nn.ModuleDict({"mlp": model})
    assert endings_of(nested, ["mlp.0", "mlp.1"]) == ["mlp.0", "mlp.1"]


def test_an_owner_is_within_a_module_of_which_it_is_a_part() -> None:
    assert _is_in("head.dense.weight", ["head"])
    assert not _is_in("header.weight", ["head"])


def test_a_seed_is_one_number() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    a, b = torch.randn(2, 4), torch.randn(5, 2)
    with pytest.raises(ValueError, match="one element"):
        lora_linear(x, w, None, [a], [b], scaling=1.0, p=0.5, seed=torch.zeros(2, dtype=torch.int64))


def test_autocast_leaves_float64_alone() -> None:
    own = layer("none")
    x = torch.randn(4, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = own(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, own(x), rtol=0, atol=0)


def test_u_is_kept_only_for_the_gradient_of_b() -> None:
    def kept(b_trains: bool) -> list[tuple[int, ...]]:
        own = layer("none")
        own.lora_B.requires_grad_(b_trains)
        shapes: list[tuple[int, ...]] = []
        x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.append(tuple(t.shape)), t)[1], lambda t: t):
            own(x)
        return shapes

    assert (7, 2) in kept(True)
    assert (7, 2) not in kept(False)


def test_a_chain_in_a_file_has_layers(tmp_path: Path) -> None:
    save_adapter(adapted("middle"), tmp_path / "a")
    file = next((tmp_path / "a").glob("*.json"))
    content = json.loads(file.read_text())
    content["chains"].append({"name": "empty", "layers": []})
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="chains"):
        load_adapter(Stack(), tmp_path / "a")


def test_a_deleted_adapter_takes_its_hooks_along() -> None:
    model = adapted("middle")

    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())

    before = hooks()
    add_adapter(model, "other", ResLoRAConfig(r=2, shortcut="input", target_modules=r"layers\.\d"))
    assert hooks() > before
    delete_adapter(model, "other")
    assert hooks() == before


def test_a_pass_that_was_left_open_is_dropped_by_its_owner_and_closed_by_no_other() -> None:
    passes, owner = Passes(), object()
    passes.open(owner)
    left = passes.current()
    passes.close(object())
    assert passes.current() is left
    passes.open(object())
    assert passes.current() is left
    passes.open(owner)
    assert passes.current() is not left
    passes.close(owner)
    assert passes.current() is None


def test_the_other_processes_learn_that_the_writer_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[float] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: sent.append(float(tensor)))
    mesh = SimpleNamespace(device_type="cpu", ndim=1, get_coordinate=lambda: [0], get_group=lambda dim: None)
    with pytest.raises(OSError, match="full"), dtensors.one_writer(mesh) as writes:
        assert writes
        raise OSError("the disk is full")
    assert sent == [1.0]


class Readers(nn.Module):
    """q, k and v of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(512, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) + self.v(x)


@pytest.mark.parametrize("rank", [2, 3])
def test_no_projection_is_wider_than_its_limit(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from reslora_kernels.backends import torch as library
    from reslora_kernels.side_channel import height

    monkeypatch.setattr("reslora_kernels.layers.chain.MOST_ROWS", 6)
    monkeypatch.setattr(host, "module", None)
    heights: list[int] = []
    forward = library.forward
    monkeypatch.setattr(
        library, "forward", lambda x, w, b, a, *rest: (heights.append(height(a)), forward(x, w, b, a, *rest))[1]
    )
    config = ResLoRAConfig(r=rank, shortcut="none")
    model = apply_reslora(nn.Sequential(Readers()), config, example_inputs=torch.zeros(2, 512))
    model(torch.randn(64, 512))
    assert max(heights) == 6  # of all three layers, or of two of them


def test_roles_are_the_last_words_of_names() -> None:
    assert [role_of(name) for name in ("layers.0.q_proj", "mlp.0", "0.1")] == ["q_proj", "mlp", "0.1"]


def test_parents_of_a_name_are_its_beginnings() -> None:
    assert with_parents("a.b.c") == ["a", "a.b", "a.b.c"]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (["one.q", "two.q"], ["q"]),
        (["one.k", "two.k"], ["one.k", "two.k"]),  # three.inner.k is not wanted
        (["one.k"], ["one.k"]),
        (["inner.k", "two.k"], r"inner\.k|two\.k"),  # inner.k is the ending of three.inner.k
    ],
)
def test_endings_mean_what_was_named_and_no_more(wanted: list[str], chosen: list[str] | str) -> None:
    model = nn.ModuleDict(
        {name: nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)}) for name in ("one", "two")}
    )
    model["inner"] = nn.ModuleDict({"k": linear()})
    model["three"] = nn.ModuleDict({"inner": nn.ModuleDict({"k": linear()})})
    assert endings_of(model, wanted) == chosen


def test_nothing_matched_says_what_was_asked_and_what_there_is() -> None:
    config = ResLoRAConfig(target_modules=["q"], exclude_modules=["k"], layers_to_transform=[1])
    with pytest.raises(ValueError) as raised:
        find_targets(Stack(2), config)
    assert "target_modules=('q',), exclude_modules=('k',), layers_to_transform=(1,)" in str(raised.value)
    assert str(raised.value).endswith("layers (2x, e.g. 'layers.0')")


@pytest.mark.parametrize(
    ("shortcut", "devices", "runs"),
    [("input", ["meta", "cpu"], 1), ("middle", ["cpu", "meta"], 2), ("block", ["cpu", "meta"], 2)],
)
def test_what_a_layer_gets_from_another_device_comes_to_its_own(shortcut: str, devices: list[str], runs: int) -> None:
    """PyTorch refuses an operation on "meta" and another device as it does one on two GPUs."""
    layers = [layer(shortcut, 6, 6, device=device) for device in devices]
    x = torch.randn(2, 6, dtype=torch.float64)
    with link(layers).forward_pass():
        for one in layers[:runs]:
            x = one(x.to(one.weight.device))
            assert x.device == one.weight.device


def test_a_sweep_goes_on_where_its_own_call_paused() -> None:
    """Three sweeps that pause: the first behind the last layer, the others behind the first."""
    zero, one = SimpleNamespace(position=0), SimpleNamespace(position=1)
    state, shape = ForwardState(object()), torch.Size([2])
    calls = [torch.full((2, 1), float(n)) for n in range(3)]

    def gives(n: int) -> None:
        state.enter(zero, [], shape)
        state.hand_on((), calls[n])

    gives(0)
    assert state.enter(one, [zero], shape)[0] is calls[0]
    state.hand_on((), calls[0])
    for n in (1, 2):
        state.turn()
        gives(n)
    for n in (1, 2):
        state.turn()
        assert state.enter(one, [zero], shape)[0] is calls[n]


def test_who_runs_outside_a_pass_is_named() -> None:
    assert outside("input", "q_proj", 1).startswith("layer 1 of chain 'q_proj' with shortcut 'input' ran outside")
    assert outside("input", "", 1).startswith("layer 1 of a chain with shortcut 'input' ran outside")


def test_a_copied_pass_goes_on_as_the_pass_would() -> None:
    """Two sweeps pause with one call waiting in each, the latest holds two; copy and pass give the same, each once."""
    zero, one = SimpleNamespace(position=0), SimpleNamespace(position=1)
    state, shape = ForwardState(object()), torch.Size([2])
    calls = [torch.full((2, 1), float(n)) for n in range(5)]
    for n in range(4):
        state.enter(zero, [], shape)
        state.hand_on((), calls[n])
        if n < 3:
            state.turn()
    state.enter(zero, [], shape)
    state.hand_on((), calls[4])
    copy = state.copy()
    assert copy.owner is state.owner
    for each in (copy, state):
        taken = [each.enter(one, [zero], shape) for _ in range(2)]
        for _ in range(3):
            each.turn()
            taken.append(each.enter(one, [zero], shape))
        assert [h.flatten()[0].item() for (h,) in taken] == [3, 4, 0, 1, 2]


def test_who_took_nothing_is_told_once_for_each_call() -> None:
    """Layer 2 asks twice and layer 1 once before any was called: their own calls come too late, in either order."""
    one, two, three = (SimpleNamespace(position=n) for n in (1, 2, 3))
    for late in ([one, two, two], [two, one, two], [two, two, one]):
        state, shape = ForwardState(object()), torch.Size([2])
        for asker, giver in ((three, two), (two, one), (three, two)):
            assert state.enter(asker, [giver], shape) == ()
        for layer in late:
            state.enter(layer, [], shape)
            state.hand_on((), torch.ones(2, 1))
        for layer, asker in ((one, two), (two, three)):
            assert state.enter(asker, [layer], shape) == ()  # what came too late was not kept


def test_seeds_are_drawn_from_all_63_bits() -> None:
    torch.manual_seed(0)
    seeds = torch.stack([dropout.new_seed(torch.device("cpu")) for _ in range(64)])
    assert seeds.dtype == torch.int64
    assert seeds.min() >= 0
    for bit in range(63):
        assert 0 < ((seeds >> bit) & 1).sum() < 64
    assert dropout.new_seed(torch.device("meta")).device.type == "meta"


def test_thresholds_are_of_sixteen_bits_and_rounded_to_the_nearest() -> None:
    assert [dropout.threshold(p) for p in (0.0, 0.1, 0.3, 0.5, 0.9)] == [0, 6554, 19661, 32768, 58982]


def test_bits_at_the_threshold_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    least = dropout.threshold(0.25)
    words = [least << 16, (least - 1) << 16 | least, 0xFFFFFFFF, 0]
    monkeypatch.setattr(dropout, "philox", lambda counter, key: [torch.full((1, 1), word) for word in words])
    mask = dropout.keep_mask(torch.tensor(3), 1, 8, 0.25)
    assert mask.tolist() == [[False, True, True, False, True, True, False, False]]


def test_a_mask_is_drawn_where_the_seed_is() -> None:
    mask = dropout.keep_mask(torch.empty((), dtype=torch.int64, device="meta"), 3, 20, 0.5)
    assert (mask.device.type, mask.shape) == ("meta", (3, 20))


def test_what_others_handed_on_stays_when_one_is_taken_from_between() -> None:
    givers = [SimpleNamespace(position=n) for n in range(3)]
    state, shape = ForwardState(object()), torch.Size([2])
    for n, giver in enumerate(givers):
        state.enter(giver, [], shape)
        state.hand_on((), torch.full((2, 1), float(n)))
    asker = SimpleNamespace(position=3)
    for n in (1, 2, 0):
        assert state.enter(asker, [givers[n]], shape)[0].flatten()[0] == n


def test_a_pass_is_open_for_hooks_that_were_there_before() -> None:
    model, seen = Stack(), []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.layers[0].chain.passes.current() is not None))
    apply_reslora(model, ResLoRAConfig(r=2, shortcut="input", target_modules=r"layers\.\d"))
    model(torch.randn(2, 6, dtype=torch.float64))
    assert seen == [True]


def test_what_crosses_to_another_process_is_found_in_every_sweep_and_begins_one_there() -> None:
    zero, one = SimpleNamespace(position=0), SimpleNamespace(position=1)
    state, shape = ForwardState(object()), torch.Size([2])
    calls = [torch.full((2, 1), float(n)) for n in range(5)]
    for sweep in ([(zero, 1), (zero, 2)], [(zero, 3)], [(one, 4), (zero, 0)]):  # two pause, the last goes on
        for giver, n in sweep:
            state.enter(giver, [], shape)
            state.hand_on((), calls[n])
        state.turn()
    assert [int(h[0]) for (h,) in state.handed_by(zero)] == [0, 1, 2, 3]
    assert [int(h[0]) for (h,) in state.handed_by(one)] == [4]
    there = ForwardState(object())
    there.receive(zero, (calls[0],))
    there.turn()  # a module around the chain that ran no layer of it
    assert there.enter(one, [zero], shape) == (calls[0],)


def test_a_pass_that_was_opened_by_hand_is_known_and_no_layer_recomputed_into_it() -> None:
    own = link([layer("input", 6, 6), layer("input", 6, 6)])

    def backward(hook: Callable[[], object]) -> None:
        y = 2 * torch.ones(1, requires_grad=True)
        y.register_hook(lambda dy: hook() and None)
        y.backward()

    assert not any_opened_by_hand()
    with own.forward_pass():
        assert any_opened_by_hand()
        refuse_recomputation()
        with pytest.raises(RuntimeError, match="recomputes a layer in backward"):
            backward(refuse_recomputation)
    assert not any_opened_by_hand()
    with ExitStack() as stack:  # one that is opened in backward is the recomputation's own
        backward(lambda: (stack.enter_context(own.forward_pass()), refuse_recomputation()))
        refuse_recomputation()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_layer_trains_alone_in_one_process_and_after_its_model_in_two(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reslora_kernels.layers.chain.initialised", lambda: True)
    monkeypatch.setattr("reslora_kernels.layers.chain.Entered.compiled", False)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    model, x = adapted("block"), torch.randn(2, 6, dtype=torch.float64)
    if processes > 1:
        with pytest.raises(RuntimeError, match="a part of a model is trained alone"):
            model.layers[1](x)
        model(x)
    model.layers[1](x)


def test_a_gated_h_keeps_its_dtype() -> None:
    h, gate = torch.randn(3, 4).bfloat16(), torch.randn(4)
    assert torch.equal(weighed(h, gate), (h.float() * gate).bfloat16())
