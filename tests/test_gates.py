"""Learned gates of the shortcuts: values and every gradient as in the equations, wherever adapters go.

u = c ⊙ h + Σ_k g_k ⊙ (the k-th earlier term). The dense statement is ``reference.low_rank_term``, in float64.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    ResLoRALinear,
    add_adapter,
    apply_reslora,
    export_peft,
    inspect,
    link,
    load_adapter,
    load_peft_adapter,
    merge_reslora,
    reference,
    restart_reslora,
    save_adapter,
    set_adapter,
    unmerge_reslora,
)
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.peft import ResLoRAPeftConfig, from_native, to_native
from reslora_kernels.testing import chain_inputs, max_error, relative_error

from .models import FAMILIES, llama, logits, randomize
from .test_shared_input import WIDTH
from .test_shared_input import Model as Attentions

SHORTCUTS = [("input", 1), ("block", 1), ("block", -1), ("middle", 2), ("middle", -1)]
KINDS = ["scalar", "rank"]
L, R = 4, 3


def linked(inputs: dict[str, list[Tensor]], shortcut: str, pre_num: int, **changes: Any) -> tuple[list[Any], Any]:
    """Layers with the values of ``inputs``, in a chain."""
    config = ResLoRAConfig(r=R, lora_alpha=5, shortcut=shortcut, pre_num=pre_num, **changes)
    layers = []
    for n, weight in enumerate(inputs["weight"]):
        layer = ResLoRALinear(weight.shape[1], weight.shape[0], dtype=torch.float64, config=config)
        for name in ("weight", "bias", "lora_A", "lora_B"):
            getattr(layer, name).data.copy_(inputs[name][n])
        layers.append(layer)
    return layers, link(layers)


def drawn(layers: list[Any]) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    for layer in layers:
        layer.lora_gates.data.copy_(torch.randn(layer.lora_gates.shape, generator=generator))
    return layers


def ran(layers: list[Any], chain: Any, xs: list[Tensor]) -> list[Tensor]:
    with chain.forward_pass():
        return [layer(x) for layer, x in zip(layers, xs, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
class TestEquations:
    def test_values_and_gradients(self, shortcut: str, pre_num: int, kind: str) -> None:
        inputs = chain_inputs(L, (2, 7), 10, 9, R)
        layers, chain = linked(inputs, shortcut, pre_num, gates=kind)
        drawn(layers)
        xs = [x.clone().requires_grad_() for x in inputs["x"]]
        ys = ran(layers, chain, xs)
        torch.autograd.backward(ys, inputs["dy"])
        leaves, a, b = ([t.clone().requires_grad_() for t in inputs[name]] for name in ("x", "lora_A", "lora_B"))
        gates = [layer.lora_gates.detach().clone().requires_grad_() for layer in layers]
        truth = reference.chain_forward(
            shortcut, pre_num, layers[0].scaling, leaves, inputs["weight"], inputs["bias"], a, b, gates=gates
        )
        torch.autograd.backward(truth, inputs["dy"])
        for n, layer in enumerate(layers):
            assert layer.lora_gates.shape == (len(gates[n]), R if kind == "rank" else 1)
            for actual, expected in (
                (ys[n], truth[n]), (xs[n].grad, leaves[n].grad), (layer.lora_A.grad, a[n].grad),
                (layer.lora_B.grad, b[n].grad), (layer.lora_gates.grad, gates[n].grad),
            ):  # fmt: skip
                assert max_error(actual, expected) < 1e-12

    def test_gradcheck_of_the_gates(self, shortcut: str, pre_num: int, kind: str) -> None:
        """By finite differences of the layers themselves, not of the reference."""
        inputs = chain_inputs(L, (5,), 6, 4, R)
        layers, chain = linked(inputs, shortcut, pre_num, gates=kind)
        drawn(layers)

        def outputs(*gates: Tensor) -> tuple[Tensor, ...]:
            for layer, own in zip(layers, gates, strict=True):
                layer._parameters["lora_gates"] = own
            return tuple(ran(layers, chain, inputs["x"]))

        assert torch.autograd.gradcheck(outputs, [layer.lora_gates.detach().requires_grad_() for layer in layers])

    def test_at_one_they_change_nothing_and_at_zero_it_is_lora(self, shortcut: str, pre_num: int, kind: str) -> None:
        inputs = chain_inputs(L, (6,), 10, 9, R)
        found = {}
        for name, (own, changes) in {
            "ungated": (shortcut, {}),
            "at one": (shortcut, {"gates": kind}),
            "at zero": (shortcut, {"gates": kind, "gates_init": 0.0}),
            "lora": ("none", {}),
        }.items():
            found[name] = ran(*linked(inputs, own, pre_num, **changes), inputs["x"])
        for n in range(L):
            assert max_error(found["at one"][n], found["ungated"][n]) < 1e-14
            assert max_error(found["at zero"][n], found["lora"][n]) < 1e-14

    def test_nothing_more_of_x_is_kept(self, shortcut: str, pre_num: int, kind: str) -> None:
        """Gates keep no [M, K] and no [M, N] for backward: M r values at most, for each term."""
        inputs = chain_inputs(L, (500,), 100, 90, R)
        kept = {}
        for gates in ("none", kind):
            layers, chain = linked(inputs, shortcut, pre_num, gates=gates)
            seen: dict[int, int] = {}

            def note(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                ys = ran(layers, chain, inputs["x"])
            kept[gates] = sum(size >= 500 * 90 for size in seen.values()), sum(seen.values())
            assert len(ys) == L
        assert kept[kind][0] == kept["none"][0], "tensors of [M, K] or larger"
        terms = sum(len(layer.lora_gates) for layer in layers)
        assert kept[kind][1] - kept["none"][1] <= terms * (500 * R + 2 * R * 190)


def test_dropout_meets_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where h itself is handed on beside c ⊙ h, both are of one dropped x."""
    inputs = chain_inputs(2, (400,), 10, 9, R)
    layers, chain = linked(inputs, "middle", 1, gates="rank", lora_dropout=0.5)
    for layer in layers:
        layer.lora_gates.data[0] = 1.0
    layers[1].lora_gates.data[0] = 0.0  # of layer 1 there is only what layer 0 handed on
    layers[1].lora_B.data.copy_(layers[0].lora_B)
    ys = ran(layers, chain, [inputs["x"][0]] * 2)
    terms = [
        y - nn.functional.linear(inputs["x"][0], layer.weight, layer.bias) for y, layer in zip(ys, layers, strict=True)
    ]
    assert terms[0].abs().max() > 0.1 and max_error(terms[0], terms[1]) < 1e-12


def gates_after(model: Any, loss: Any) -> Tensor:
    """The loss, and every gate's gradient."""
    gradients = [layer.lora_gates.grad for layer in adapted_layers(model).values()]
    assert all(gradient.any() for gradient in gradients)
    return torch.cat([loss.detach()[None], *[gradient.flatten() for gradient in gradients]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
class TestModels:
    """A LLaMA, whose q, k and v share a projection, and its gate and up."""

    @staticmethod
    def adapted(shortcut: str, pre_num: int, kind: str, **changes: Any) -> Any:
        config = ResLoRAConfig(r=R, lora_alpha=7, shortcut=shortcut, pre_num=pre_num, gates=kind, **changes)
        return randomize(apply_reslora(llama(4).double(), config))

    def test_shared_projections_and_checkpoints(self, shortcut: str, pre_num: int, kind: str) -> None:
        batch, found = FAMILIES["llama"].batch(1), []
        for way in ("apart", "shared", "checkpointed"):
            model = self.adapted(shortcut, pre_num, kind, stack_projections=way != "apart")
            assert bool(model._reslora.groups) == (way != "apart")
            if way == "checkpointed":
                model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            loss = model(**batch).loss
            loss.backward()
            found.append(gates_after(model, loss))
        assert relative_error(found[1], found[0]) < 1e-9
        assert relative_error(found[2], found[0]) < 1e-9

    @pytest.mark.slow
    def test_compiled(self, shortcut: str, pre_num: int, kind: str) -> None:
        """Blocks of three layers that read one tensor."""
        x, found = torch.linspace(-1, 1, 2 * WIDTH, dtype=torch.float64).view(2, -1), []
        config = ResLoRAConfig(r=R, lora_alpha=7, shortcut=shortcut, pre_num=pre_num, gates=kind)
        for compiled in (False, True):
            torch.manual_seed(0)
            model: Any = randomize(apply_reslora(Attentions().double(), config, example_inputs=x))
            assert model._reslora.groups
            torch.compiler.reset()
            run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
            loss = sum(y.square().sum() for block in run(x) for y in block)
            loss.backward()
            found.append(gates_after(model, loss))
        assert relative_error(found[1], found[0]) < 1e-9

    def test_saved_and_loaded(self, shortcut: str, pre_num: int, kind: str, tmp_path: Path) -> None:
        model = self.adapted(shortcut, pre_num, kind)
        save_adapter(model, tmp_path / "own")
        wanted = logits(model)
        assert torch.equal(logits(load_adapter(llama(4).double(), tmp_path / "own")), wanted), "into a plain model"
        other = self.adapted(shortcut, pre_num, kind, gates_init=0.5)
        other.load_state_dict(apply_reslora(llama(4).double(), model._reslora.config).state_dict())
        assert torch.equal(logits(load_adapter(other, tmp_path / "own")), wanted), "into an adapted one"
        bare = apply_reslora(llama(4).double(), model._reslora.config.replace(gates="none"))
        with pytest.raises(ValueError, match="gates"):
            load_adapter(bare, tmp_path / "own")
        from_native(tmp_path / "own", tmp_path / "peft", task_type="CAUSAL_LM")
        assert torch.equal(logits(PeftModel.from_pretrained(llama(4).double(), tmp_path / "peft")), wanted)
        to_native(tmp_path / "peft", tmp_path / "back")
        assert torch.equal(logits(load_adapter(llama(4).double(), tmp_path / "back")), wanted)

    def test_merged_exported_and_restored(self, shortcut: str, pre_num: int, kind: str, tmp_path: Path) -> None:
        model = self.adapted(shortcut, pre_num, kind)
        before, calibration = logits(model), [FAMILIES["llama"].batch(seed) for seed in (1, 2)]
        export_peft(model, tmp_path / "peft", calibration=calibration)
        report = merge_reslora(model, calibration=calibration)
        merged = logits(model)
        if shortcut == "block":
            assert relative_error(merged, before) < 1e-9 and report.worst() == 0
        else:
            assert report.worst() > 1e-4, "an approximation, and it says so"
        served = PeftModel.from_pretrained(llama(4).double(), tmp_path / "peft")
        assert relative_error(logits(served), merged) < 1e-8
        unmerge_reslora(model)
        assert torch.equal(logits(model), before)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(L))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(nn.functional.layer_norm(x, (8,))))
        return x


def residual(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = ResLoRAConfig(**{"r": R, "lora_alpha": R, "gates": "rank", **changes})
    return randomize(apply_reslora(Residual().double(), config, example_inputs=torch.zeros(2, 8).double()))


X = torch.randn(64, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_a_layer_that_got_nothing_counts_its_own_input_again() -> None:
    """Layer 1 of ``input`` when layer 0 did not run: u = (c + g) ⊙ h, in the model and in what a merge is fitted to."""
    inputs = chain_inputs(2, (9,), 8, 8, R)
    layers, chain = linked(inputs, "input", 1, gates="rank")
    drawn(layers)
    x, second = inputs["x"][1], layers[1]
    with chain.forward_pass():
        y = second(x)
    h = (x @ second.lora_A.T) * second.lora_gates.sum(0)
    assert (
        max_error(y, nn.functional.linear(x, second.weight, second.bias) + second.scaling * h @ second.lora_B.T) < 1e-12
    )


class TestKindsOfLayers:
    def test_convolution_and_embedding(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))

            def forward(self, x: Tensor) -> Tensor:
                for block in self.blocks:
                    x = x + torch.tanh(block(x))
                return x

        x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for shortcut in ("input", "block", "middle"):
            found = []
            for gates in ("none", "rank"):
                torch.manual_seed(0)
                config = ResLoRAConfig(r=R, shortcut=shortcut, gates=gates, target_modules=r"blocks\.\d")
                model = randomize(apply_reslora(Model().double(), config, example_inputs=x))
                for layer in adapted_layers(model).values():
                    if layer.lora_gates is not None:
                        layer.reset_gates()
                found.append(model(x))
            found[1].square().sum().backward()
            assert max_error(found[0], found[1]) < 1e-12
            assert all(layer.lora_gates.grad.any() for layer in adapted_layers(model).values())
            if shortcut == "block":
                randomize(model)
                before = model(x)
                merge_reslora(model)
                assert max_error(model(x), before) < 1e-12

    def test_multihead_attention(self) -> None:
        torch.manual_seed(0)
        model = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2)).double()
        holder: Any = nn.Module()
        holder.layers = model
        holder.forward = lambda x: model[1](*[model[0](x, x, x)[0]] * 3)[0]
        config = ResLoRAConfig(r=R, shortcut="block", gates="rank", target_modules=["0", "1"])
        randomize(apply_reslora(holder, config, example_inputs=X[None]))
        before = holder(X[None])
        before.sum().backward()
        assert all(layer.lora_gates.grad.any() for layer in adapted_layers(holder).values())
        merge_reslora(holder)
        assert relative_error(holder(X[None]), before) < 1e-12

    def test_experts_have_the_gates_of_their_block_and_hand_nothing_on(self) -> None:
        pytest.importorskip("transformers", minversion="5.0", reason="experts are linear layers before")
        from transformers import MixtralConfig, MixtralForCausalLM

        def mixtral() -> Any:
            torch.manual_seed(0)
            return MixtralForCausalLM(
                MixtralConfig(
                    vocab_size=48, hidden_size=16, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
                    num_key_value_heads=2, num_local_experts=3, max_position_embeddings=64, initializer_range=0.2,
                )
            ).eval()  # fmt: skip

        def gated(shortcut: str) -> Any:
            config = ResLoRAConfig(
                r=R, shortcut=shortcut, gates="rank", target_modules=["v_proj"],
                target_parameters=["mlp.experts.down_proj"],
            )  # fmt: skip
            model = mixtral().double()
            model.set_experts_implementation("eager")  # PyTorch's grouped product takes no float64
            return randomize(apply_reslora(model, config))

        model, batch = gated("block"), FAMILIES["llama"].batch(1)
        model(**batch).loss.backward()
        layers = adapted_layers(model)
        assert all(layer.lora_gates.grad.any() for layer in layers.values())
        before = logits(model)
        merge_reslora(model)
        assert relative_error(logits(model), before) < 1e-8
        experts = {name: layer for name, layer in adapted_layers(gated("input")).items() if "experts" in name}
        assert experts and all(layer.lora_gates is None for layer in experts.values()), "plain LoRA, as without gates"

    def test_start_from_the_weight_cancels_whatever_the_gates(self) -> None:
        """PiSSA's start is taken off in every term, so that each gate serves both of its halves."""
        for shortcut in ("input", "block", "middle"):
            torch.manual_seed(0)
            plain = Residual().double()
            config = ResLoRAConfig(r=R, shortcut=shortcut, gates="rank", init_lora_weights="pissa")
            model = apply_reslora(copy.deepcopy(plain), config, example_inputs=X)
            for layer in model.layers:
                layer.lora_gates.data.normal_()
            assert max_error(model(X), plain(X)) < 1e-12
            for layer in model.layers:
                layer.lora_B.data.mul_(1.2)
            assert max_error(model(X), plain(X)) > 1e-3
            calibration = {} if shortcut == "block" else {"calibration": [X]}
            assert all(row.rank >= 2 * R for row in merge_reslora(model, **calibration).rows)


class TestTraining:
    def test_counted_trained_and_said(self) -> None:
        model, bare = residual(shortcut="block", pre_num=-1), residual(shortcut="block", pre_num=-1, gates="none")
        more = sum(len(layer.lora_gates) * R for layer in model.layers)
        assert more == (1 + 2 + 3 + 4) * R
        coverage = inspect(model)
        assert coverage.trainable_parameters == inspect(bare).trainable_parameters + more
        assert coverage.gates == "rank" and "gates 'rank'" in str(coverage) and "gates" not in str(inspect(bare))
        assert "gates='rank'" in repr(model.layers[0]) and "layers.3.lora_gates" in model.state_dict()
        peft = get_peft_model(
            llama().double(), ResLoRAPeftConfig(r=R, target_modules=["q_proj"], gates="scalar", gates_init=0.0)
        )
        trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
        assert [p.tolist() for name, p in trained.items() if "lora_gates" in name] == [[[1.0]]] + [[[1.0], [0.0]]] * 2

    def test_peft_adapter_is_where_a_gated_shortcut_starts(self, tmp_path: Path) -> None:
        """With gates that start at 0 the model computes what PEFT's does, and the gates have a gradient."""
        peft = get_peft_model(
            llama().double(), LoraConfig(r=R, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        peft.save_pretrained(tmp_path)
        model = load_peft_adapter(
            llama().double(), tmp_path, shortcut="block", pre_num=-1, gates="rank", gates_init=0.0
        )
        assert relative_error(logits(model), logits(peft)) < 1e-9
        model(**FAMILIES["llama"].batch(1)).loss.backward()
        assert all(layer.lora_gates.grad[:, 0].all() for layer in adapted_layers(model).values())

    def test_switching_and_restarts(self) -> None:
        model = residual(shortcut="block")
        first = model(X)
        add_adapter(model, "other", ResLoRAConfig(r=2, shortcut="middle", gates="scalar"), example_inputs=X)
        set_adapter(model, "other")
        assert model.layers[1].lora_gates.shape == (2, 1)
        set_adapter(model, "default")
        assert torch.equal(model(X), first)
        alone = residual(shortcut="block")
        restart_reslora(alone)
        assert all(torch.equal(layer.lora_gates, torch.ones_like(layer.lora_gates)) for layer in alone.layers)
        assert max_error(alone(X), first) < 1e-12

    def test_several_adapters_in_force(self) -> None:
        found = []
        for gates in ("none", "rank"):
            model = residual(shortcut="middle", pre_num=2, gates=gates)
            config = ResLoRAConfig(r=2, shortcut="block", gates=gates)
            set_adapter(randomize(add_adapter(model, "other", config, example_inputs=X)), ["default", "other"])
            trained = [p for name, p in model.named_parameters() if name.endswith("lora_gates")]
            for parameter in trained:
                parameter.data.fill_(1.0)
            found.append(model(X))
        assert max_error(*found) < 1e-12 and len(trained) == 2 * L
        found[1].square().sum().backward()
        for parameter in trained:
            with torch.no_grad():
                ends = []
                for step in (1e-6, -2e-6):  # up, then down from there
                    parameter.add_(step)
                    ends.append(float(model(X).square().sum()))
                parameter.add_(1e-6)
            assert float(parameter.grad.sum()) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gates": "column"}, ValueError, "gates must be one of 'none', 'scalar', 'rank', got 'column'"),
        ({"gates": True}, TypeError, "gates must be one of"),
        ({"gates": "rank", "shortcut": "none"}, ValueError, "'none' with shortcut='none'"),
        ({"gates": "scalar", "pre_num": 0}, ValueError, "'none' with pre_num=0"),
        ({"gates": "rank", "use_dora": True}, ValueError, "'none' with use_dora=True"),
        ({"gates_init": 0.0}, ValueError, "gates_init=0.0 is for gates='scalar' or 'rank'"),
        ({"gates": "rank", "gates_init": float("nan")}, ValueError, "gates_init"),
    ],
)
def test_what_has_no_terms_to_weigh_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ResLoRAConfig(**changes)


def test_unlike_gates_are_not_linked() -> None:
    layers = [ResLoRALinear(4, 4, config=ResLoRAConfig(gates=gates)) for gates in ("rank", "scalar")]
    with pytest.raises(ValueError, match="pre_num, gates"):
        link(layers)
