"""``csrc/host.cpp`` against the passes in PyTorch's own operations: values, gradients, modes, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reslora_kernels import ResLoRAConfig, ResLoRALinear, dropout, host, link
from reslora_kernels.backends import kinds
from reslora_kernels.ops import lora_linear
from reslora_kernels.testing import assert_close_to_truth

pytestmark = pytest.mark.skipif(host.module is None, reason=f"the host extension is not in use: {host.why}")
SEED = torch.tensor(-(2**62) - 5)

# (id, leading sizes, K, N, ranks of A, ranks of B, hand, residual, bias, p, c)
CALLS = [
    ("plain", (5,), 24, 40, (8,), (8,), None, False, True, 0.0, 1.0),
    ("four-dimensional", (2, 3, 2), 17, 9, (3,), (3,), None, False, False, 0.0, 2.0),
    ("many-rows", (65,), 33, 70, (4, 5), (4, 5), None, False, True, 0.0, 1.0),
    ("ahead", (2, 7), 16, 16, (4, 4), (4,), (4, 8), True, True, 0.0, 1.0),
    ("ahead-twice-first", (3,), 16, 24, (4, 4, 2), (4,), (4, 10), False, True, 0.0, 2.0),
    ("own-handed-on", (2, 7), 16, 16, (4,), (4,), (0, 4), True, True, 0.0, 1.0),
    ("own-handed-on-first", (2, 7), 16, 16, (4,), (4,), (0, 4), False, True, 0.0, 1.0),
    ("own-and-others-handed-on", (40,), 16, 16, (4, 3), (4,), (0, 7), True, False, 0.0, 1.0),
    ("part-handed-on", (6,), 16, 16, (4, 3), (4,), (1, 5), False, False, 0.0, 3.0),
    ("without-A", (3, 4), 16, 8, (), (4,), None, True, True, 0.0, 1.0),
    ("residual-taken-alone", (6,), 16, 8, (4,), (4,), None, True, True, 0.0, 0.5),
    ("dropped", (2, 33), 530, 8, (4, 4), (4,), (4, 8), True, True, 0.3, 1.0),
    ("apart", (16,), 512, 480, (16, 16), (16, 16), None, False, True, 0.0, 1.0),
    ("apart-and-handed-on", (4, 4), 512, 40, (16, 16), (16,), (0, 32), True, False, 0.0, 2.0),
    ("one-of-everything", (1,), 1, 1, (1,), (1,), None, False, False, 0.9, 1.0),
]


class Given:
    """The operands of a call and the gradients at its outputs, the same for whoever serves it."""

    def __init__(self, case: tuple, dtype: torch.dtype, whole_numbers: bool = False) -> None:
        _, leading, k, n, ranks_a, ranks_b, self.hand, residual, bias, self.p, self.c = case
        generator = torch.Generator().manual_seed(k + n)

        def draw(*shape: int) -> Tensor:
            if whole_numbers:
                return torch.randint(-3, 4, shape, generator=generator).to(dtype).requires_grad_()
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        self.x, self.weight, self.bias = draw(*leading, k), draw(n, k), draw(n) if bias else None
        self.a, self.b = [draw(r, k) for r in ranks_a], [draw(n, r) for r in ranks_b]
        self.residual = draw(*leading, sum(ranks_b)) if residual else None
        self.dy = draw(*leading, n).detach()
        self.dh = draw(*leading, self.hand[1] - self.hand[0]).detach() if self.hand else None

    def call(self) -> tuple[Tensor, Tensor | None]:
        seed = SEED if self.p else None
        options: dict[str, Any] = {"scaling": 2.0, "c": self.c, "p": self.p, "seed": seed, "hand": self.hand}
        return lora_linear(self.x, self.weight, self.bias, self.a, self.b, self.residual, **options)

    def results(self) -> dict[str, Tensor]:
        """Outputs and every gradient."""
        named = {"x": self.x, "weight": self.weight, "bias": self.bias, "residual": self.residual}
        named |= {f"a{at}": each for at, each in enumerate(self.a)} | {f"b{at}": each for at, each in enumerate(self.b)}
        leaves = {name: leaf for name, leaf in named.items() if leaf is not None}
        y, handed = self.call()
        outputs, directions = ([y], [self.dy]) if handed is None else ([y, handed], [self.dy, self.dh])
        gradients = torch.autograd.grad(outputs, list(leaves.values()), directions, allow_unused=True)
        found = {f"d{name}": each for name, each in zip(leaves, gradients, strict=True) if each is not None}
        return found | {"y": y.detach()} | ({} if handed is None else {"handed": handed.detach()})


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How many passes the extension has served."""
    count = {"forward": 0, "backward": 0}

    class Counting:
        keep_mask, kind_of = staticmethod(host.module.keep_mask), staticmethod(host.module.kind_of)

        def __getattr__(self, name: str) -> Callable[..., Any]:
            def counted(*arguments: Any) -> Any:
                made = getattr(module, name)(*arguments)
                count[name] += made is not None
                return made

            return counted

    module = host.module
    monkeypatch.setattr(host, "module", Counting())
    yield count


def without_extension(work: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "module", None)
        return work()


@pytest.mark.parametrize("case", CALLS, ids=lambda case: case[0])
@pytest.mark.parametrize("dtype", host.DTYPES, ids=str)
def test_both_passes_as_pytorch_computes_them(case: tuple, dtype: torch.dtype, served: dict[str, int]) -> None:
    exact = Given(case, dtype, whole_numbers=True)
    found, plain = exact.results(), without_extension(exact.results)
    assert served == {"forward": 1, "backward": 1}
    assert found.keys() == plain.keys()
    for name, value in found.items():
        if case[9] == 0:  # a kept element is multiplied by what is no whole number
            assert torch.equal(value, plain[name]), name
    given, truth = Given(case, dtype), without_extension(Given(case, torch.float64).results)
    found, plain = given.results(), without_extension(given.results)
    for name, value in found.items():
        if dtype == torch.float64:
            torch.testing.assert_close(value, plain[name], rtol=1e-12, atol=1e-12)
        else:
            assert_close_to_truth(value, truth[name], plain[name], name)


@pytest.mark.parametrize(("name", "apart"), [("apart", True), ("ahead-twice-first", True), ("many-rows", False)])
def test_few_rows_take_a_product_for_each_matrix(name: str, apart: bool) -> None:
    """Gradients of A are views of one product elsewhere, and autograd copies them where it adds to them."""
    gradient = Given(next(case for case in CALLS if case[0] == name), torch.float32).results()["da0"]
    assert (gradient.untyped_storage().nbytes() == gradient.nbytes) == apart


@pytest.mark.parametrize("rows", [1, 3, 700], ids=["a row", "few rows", "rows for many threads"])
def test_the_mask_is_the_mask(rows: int) -> None:
    for columns, p in ((1, 0.5), (513, 0.1), (1024, 0.9)):
        mask = host.keep_mask(SEED, rows, columns, dropout.threshold(p))
        assert mask is not None and torch.equal(mask, dropout.keep_mask(SEED, rows, columns, p))


def test_an_infinity_that_is_dropped_is_zero() -> None:
    x = torch.full((4, 64), float("inf"))
    y, h = lora_linear(
        x, torch.zeros(2, 64), None, [torch.eye(64)], [torch.zeros(2, 64)], scaling=1.0, p=0.5, seed=SEED, hand=(0, 64)
    )
    mask = dropout.keep_mask(SEED, 4, 64, 0.5)
    assert torch.isnan(y).all() and h is not None
    assert torch.isnan(h).all() == bool(mask.any())  # 0 times a kept infinity


@pytest.mark.parametrize(
    "change",
    [
        lambda g: setattr(g, "x", g.x.detach().to(torch.bfloat16)),
        lambda g: setattr(g, "a", [a.double() for a in g.a]),
        lambda g: setattr(g, "x", g.x.detach().transpose(0, 1).contiguous().transpose(0, 1)),
        lambda g: setattr(g, "x", g.x.detach()[:0]),
        lambda g: setattr(g, "x", torch._neg_view(g.x.detach())),
        lambda g: setattr(g, "x", g.x.detach().as_subclass(type("Mine", (Tensor,), {}))),
        lambda g: setattr(g, "weight", g.weight.detach().as_subclass(type("Mine", (Tensor,), {}))),
    ],
    ids=[
        "bfloat16",
        "other dtype of A",
        "no view of tokens",
        "empty",
        "negative view",
        "subclass",
        "weight's subclass",
    ],
)
def test_what_it_leaves_to_pytorch(change: Callable[[Given], None], served: dict[str, int]) -> None:
    given = Given(("", (3, 5), 8, 6, (2,), (2,), None, False, False, 0.0, 1.0), torch.float32)
    change(given)
    if given.x.dtype == torch.bfloat16:
        given.weight = given.weight.detach().to(torch.bfloat16)
    y, _ = given.call()
    y.sum().backward()
    assert served["forward"] == 0
    assert torch.equal(y, without_extension(lambda: given.call()[0]))


@pytest.mark.parametrize("name", ["triton", "cuda", "nonsense"])
def test_another_backend_is_never_replaced(name: str, served: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given(CALLS[0], torch.float32)
    monkeypatch.setenv("RESLORA_BACKEND", name)
    with pytest.raises((ValueError, RuntimeError)):
        lora_linear(given.x, given.weight, None, given.a[:0], given.b, scaling=1.0)
    assert served["forward"] == 0


def test_wrong_shapes_are_named_as_ever() -> None:
    given = Given(CALLS[0], torch.float32)
    given.bias = torch.zeros(3)
    with pytest.raises(ValueError, match="bias must be"):
        given.call()
    with torch.no_grad(), pytest.raises(ValueError, match="bias must be"):
        given.call()


def test_results_are_no_views_and_have_memory_of_their_own() -> None:
    """They can be written to in place, as a layer's output is by ReLU(inplace=True)."""
    given = Given(CALLS[3], torch.float32)
    y, handed = given.call()
    assert handed is not None and not y._is_view() and y._base is None
    gradient = torch.autograd.grad([nn.functional.relu(y, inplace=True), handed], given.x, [given.dy, given.dh])[0]
    y, handed = without_extension(given.call)
    plain = torch.autograd.grad([nn.functional.relu(y), handed], given.x, [given.dy, given.dh])[0]
    torch.testing.assert_close(gradient, plain)


def chain(shortcut: str, p: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    config = ResLoRAConfig(r=4, shortcut=shortcut, pre_num=1, lora_dropout=p)
    layers = [ResLoRALinear(16, 16, dtype=torch.float64, config=config) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    stack = nn.Sequential(*layers)
    link(layers, root=stack)
    return stack


@pytest.mark.parametrize("shortcut", ["none", "block", "middle", "input"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_chain_in_every_mode(shortcut: str, p: float, served: dict[str, int]) -> None:
    stack, x = chain(shortcut, p), torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)

    def gradients(run: Callable[[Tensor], Tensor], seed: int = 1) -> list[Tensor]:
        torch.manual_seed(seed)
        y = run(x)
        wanted = [x, *(parameter for parameter in stack.parameters() if parameter.requires_grad)]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]

    eager = gradients(stack)
    assert served == {"forward": 3, "backward": 3}
    for found, plain in zip(eager, without_extension(lambda: gradients(stack)), strict=True):
        torch.testing.assert_close(found, plain)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor)
    with hooks:
        assert all(map(torch.equal, gradients(stack), eager))
    recomputed = gradients(lambda x: checkpoint(stack, x, use_reentrant=False))
    assert all(map(torch.equal, recomputed, eager))
    stack.eval()
    with torch.no_grad():
        expected = stack(x)
    with torch.inference_mode():
        y = stack(x)
    assert y.is_inference() and torch.equal(y, expected)
    torch.testing.assert_close(expected, without_extension(lambda: stack(x)).detach())


def test_a_small_call_can_be_differentiated_twice() -> None:
    given = Given(CALLS[3], torch.float64)

    def penalty() -> list[Tensor]:
        wanted = [given.x, given.residual, *given.a, *given.b, given.weight, given.bias]
        y, handed = given.call()
        first = torch.autograd.grad(y.square().sum() + handed.square().sum(), wanted, create_graph=True)
        return list(torch.autograd.grad(sum(each.square().sum() for each in first), wanted))

    for found, plain in zip(penalty(), without_extension(penalty), strict=True):
        torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_kind_is_everything_but_values_and_addresses(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(host, "module", None)
    whole, memory = torch.zeros(4, 6), torch.zeros(1 << 10)
    unlike = [
        (whole, None), (whole, whole), (whole[:2], None), (whole[:, ::2], None), (whole.t(), None),
        (whole.double(), None), (whole.view(2, 2, 6), None), (whole.to("meta"), None), (torch.tensor(0.0), None),
        (torch.zeros(0), None), (memory[1:25].view(4, 6), None), (memory[2:26].view(4, 6), None),
    ]  # fmt: skip
    found = [kinds.kind_of(operands, "forward") for operands in unlike]
    assert len({kind for kind, _ in found}) == len(unlike)
    assert kinds.kind_of(unlike[0], "backward")[0] != found[0][0]
    for (kind, addresses), operands in zip(found, unlike, strict=True):
        assert addresses == [0 if each is None else each.data_ptr() for each in operands]
        if not any(address % 16 for address in addresses):
            like = [each if each is None else torch.empty_strided(each.shape, each.stride(), dtype=each.dtype,
                    device=each.device) for each in operands]  # fmt: skip
            assert kinds.kind_of(tuple(like), "forward")[0] == kind


def test_a_kind_of_other_tensors_is_left_to_python() -> None:
    class Other(Tensor):
        pass

    assert host.module.kind_of(torch.zeros(2).as_subclass(Other)) is None
    assert host.module.kind_of(torch.zeros(2), 3) is None
    assert host.module.kind_of(torch.eye(2).to_sparse()) is None


@pytest.mark.parametrize("compiled", [True, False])
def test_a_prepared_pass_allocates_what_it_returns(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And tells the launch where: operands first, nothing for nothing, each workspace in the memory of all."""
    if not compiled:
        monkeypatch.setattr(host, "module", None)
    operands = torch.ones(2, 3, dtype=torch.bfloat16), None
    results = torch.empty(2, 4, 3, dtype=torch.bfloat16), None, torch.empty(5), torch.empty(0, 7)
    workspaces, launched = [torch.empty(3), torch.empty(100)], list[list[int]]()
    prepared = kinds.prepare(operands, results, workspaces, lambda place: launched.append)
    assert prepared is not None
    y, nothing, da, empty = prepared.run(operands[0], [1, 0])
    assert nothing is None
    assert [(t.shape, t.dtype, t.is_contiguous()) for t in (y, da, empty)] == [
        (t.shape, t.dtype, True) for t in results if t is not None
    ]
    (addresses,) = launched
    assert addresses[:6] == [1, 0, y.data_ptr(), 0, da.data_ptr(), empty.data_ptr()]
    assert addresses[7] - addresses[6] == kinds.APART
    assert len(addresses) == 8


def test_memory_that_there_is_not_is_an_error_of_pytorch() -> None:
    """By which trainers know that a batch was too large."""
    prepared = kinds.prepare((torch.ones(2, 3),), (torch.empty(5),), [], lambda place: lambda addresses: None)
    assert prepared is not None
    sizes = (1 << 50,)
    larger = prepared._replace(forms=((sizes, torch.float32),), coded=((sizes, host.CODES[torch.float32]),))
    addresses = [1]
    assert host.module.allocate(torch.ones(2, 3), larger.coded, (), addresses) is None
    assert addresses == [1]
    with pytest.raises(RuntimeError, match="memory"):
        larger.run(torch.ones(2, 3), addresses)
