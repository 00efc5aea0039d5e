"""Models that lay samples out, read weights or change them otherwise than most: right, or refused by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    adapters_per_sample,
    add_adapter,
    apply_reslora,
    inspect,
    load_adapter,
    merge_reslora,
    save_adapter,
    set_adapter,
    unload,
    unmerge_reslora,
)
from reslora_kernels.adapt.surroundings import Surroundings
from reslora_kernels.peft import ResLoRAPeftConfig

from .models import VOCABULARY, llama, randomize

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=2)
NAMES = ["a", "b", "b", "a"]
SQUARE = torch.randint(3, VOCABULARY, (4, 4), generator=torch.Generator().manual_seed(0))


def two_adapters(model: nn.Module, targets: list[str]) -> nn.Module:
    config = ResLoRAConfig(r=2, target_modules=targets, shortcut="block")
    randomize(apply_reslora(model, config, adapter_name="a"), 1)
    randomize(set_adapter(add_adapter(model, "b", config), "b"), 2)
    return model.eval()


def states(model: Any, tokens: Tensor = SQUARE) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens).last_hidden_state
    return found


class TestSamplesAmongDimensionsOfOneSize:
    """As many tokens as samples: which dimension of x holds the samples is seen in a run of one sample."""

    def expected(self, model: nn.Module) -> Tensor:
        alone = {name: states(set_adapter(model, name)) for name in "ab"}
        return torch.stack([alone[name][i] for i, name in enumerate(NAMES)])

    def test_first_as_almost_everywhere(self) -> None:
        torch.manual_seed(0)
        model = two_adapters(transformers.BertModel(transformers.BertConfig(**SIZES)), ["query", "value"])
        expected = self.expected(model)
        with adapters_per_sample(model, NAMES):
            torch.testing.assert_close(states(model), expected)

    def test_first_under_peft(self) -> None:
        torch.manual_seed(0)
        config = ResLoRAPeftConfig(r=2, target_modules=["query", "value"], shortcut="middle")
        bert = transformers.BertModel(transformers.BertConfig(**SIZES))
        model = peft.get_peft_model(bert, config, adapter_name="one")
        model.add_adapter("two", config)
        randomize(model.base_model.model)
        model.eval()
        names = ["one", "two", "__base__", "one"]
        with torch.no_grad():
            together = model(input_ids=SQUARE, adapter_names=names).last_hidden_state
            for i, name in enumerate(names):
                alone = model(input_ids=SQUARE[i : i + 1], adapter_names=[name]).last_hidden_state
                torch.testing.assert_close(together[i : i + 1], alone)

    def test_second_is_refused(self) -> None:
        """XLNet works on [tokens, samples, width]."""
        torch.manual_seed(0)
        config = transformers.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=24)
        model = two_adapters(transformers.XLNetModel(config), ["layer_1", "layer_2"])
        with (
            pytest.raises(ValueError, match="either dimension could be the 4 samples"),
            adapters_per_sample(model, NAMES),
        ):
            states(model)

    def test_experts_are_refused(self) -> None:
        """One may be given as many tokens as there are samples, by chance."""
        torch.manual_seed(0)
        config = transformers.SwitchTransformersConfig(
            vocab_size=VOCABULARY, d_model=16, d_ff=24, d_kv=8, num_heads=2, num_layers=2, num_experts=2,
            num_sparse_encoder_layers=1,
        )  # fmt: skip
        model = transformers.SwitchTransformersEncoderModel(config)
        model = two_adapters(model, ["wi", "wo"])
        with (
            pytest.raises(ValueError, match="is an expert, which sees a choice"),
            adapters_per_sample(model, ["a", "b"]),
        ):
            pass


def test_a_head_that_is_given_the_embedding_is_no_place_for_an_adapter() -> None:
    """DeBERTa's multiplies with the weight of the embedding that its forward gets."""
    config = transformers.DebertaV2Config(**SIZES, legacy=False, max_position_embeddings=16)
    model = transformers.DebertaV2ForMaskedLM(config)
    with pytest.raises(ValueError, match="DebertaV2LMPredictionHead reads the weight of an embedding"):
        apply_reslora(model, ResLoRAConfig(target_modules=["query_proj"], trainable_token_indices=[3]))
    with pytest.raises(ValueError, match="whose weight DebertaV2LMPredictionHead reads past an adapter"):
        apply_reslora(model, ResLoRAConfig(target_modules=["word_embeddings"]))
    assert inspectable(apply_reslora(model, ResLoRAConfig(target_modules=["query_proj"])))


def inspectable(model: nn.Module) -> bool:
    return any(name.endswith("lora_A") for name, _ in model.named_parameters())


def test_parameters_that_zero3_has_emptied_are_not_those_of_fsdp1(monkeypatch: pytest.MonkeyPatch) -> None:
    class MetError(Exception):
        pass

    def met(*_: Any) -> None:
        raise MetError

    importlib.import_module("torch.distributed.fsdp._flat_param")
    monkeypatch.setattr(Surroundings, "_under_zero3", met)
    model = apply_reslora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ResLoRAConfig(r=2))
    for parameter in model.parameters():
        parameter.ds_id, parameter.ds_shape, parameter.data = 1, parameter.shape, torch.empty(0)
    with pytest.raises(MetError):
        model(torch.randn(2, 4))


def test_weights_that_are_divided_in_evaluation_are_refused() -> None:
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, context_length=16)
    with pytest.raises(ValueError, match=r"from 2 on in evaluation.*rescale_every = 0"):
        apply_reslora(transformers.RwkvModel(transformers.RwkvConfig(**sizes, rescale_every=2)), ResLoRAConfig())
    for every in (0, 6):
        assert inspectable(
            apply_reslora(
                transformers.RwkvModel(transformers.RwkvConfig(**sizes, rescale_every=every)), ResLoRAConfig()
            )
        )


def test_names_that_differ_by_a_part_in_front_say_so(tmp_path: Path) -> None:
    config = ResLoRAConfig(r=2, target_modules=["q_proj"])
    whole, inner = llama(), llama().model
    save_adapter(randomize(apply_reslora(inner, config)), tmp_path / "inner")
    with pytest.raises(ValueError, match=r"what this model has as its 'model': load_adapter\(model\.model, \.\.\.\)"):
        load_adapter(whole, tmp_path / "inner")
    load_adapter(whole.model, tmp_path / "inner")
    save_adapter(apply_reslora(llama(), config), tmp_path / "whole")
    with pytest.raises(ValueError, match=r"on a model that has one like this as its 'model'"):
        load_adapter(llama().model, tmp_path / "whole")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.proj(x))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Root(nn.Module):
    """Runs its blocks without gradients below ``frozen``; after two of them it may add what ``within`` gives."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Inner()
        self.frozen = 0
        self.within: Any = None

    def forward(self, x: Tensor) -> Tensor:
        given = x
        for n, block in enumerate(self.net.blocks):
            with torch.set_grad_enabled(torch.is_grad_enabled() and n >= self.frozen):
                x = block(x)
            if n == 1 and self.within is not None:
                within, self.within = self.within, None
                x = x + within(given)
        return x


X = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SHORTCUTS = ["none", "input", "block", "middle"]


def residual(shortcut: str, kind: type[nn.Module] = Root) -> Any:
    torch.manual_seed(0)
    return randomize(apply_reslora(kind().double(), ResLoRAConfig(r=2, lora_alpha=4, shortcut=shortcut)))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("around", ["root", "module inside"])
def test_a_model_that_calls_itself(shortcut: str, around: str) -> None:
    """Self-conditioning, and hooks that run the model again: such a call is a pass of its own."""
    model = residual(shortcut, Root if around == "root" else Inner)
    alone = model(X)
    model = residual(shortcut)
    model.within = lambda _: alone.detach()
    expected = model(X)
    calls = {"root": model, "module inside": model.net}
    model.within = lambda x: calls[around](x).detach()
    assert torch.equal(model(X), expected)
    called: list[int] = []

    def again(module: nn.Module, args: Any, y: Tensor) -> None:
        if not called:
            called.append(1)
            with torch.no_grad():
                model.net(X.flip(0))

    expected = model.net(X)
    handle = model.net.blocks[1].register_forward_hook(again)
    assert torch.equal(model.net(X), expected) and called
    handle.remove()

    def interrupted(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.net.blocks[2].register_forward_pre_hook(interrupted)
    model.within = lambda x: model(x)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    model.within = None
    assert torch.equal(model(X), alone)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("together", [False, True])
def test_layers_above_a_part_without_gradients_get_all_of_theirs(shortcut: str, together: bool) -> None:
    """Refinement loops and frozen lower halves. With "input" the layer below multiplies by the A of the one above."""
    found = []
    for how in ("without gradients", "detached"):
        model = residual(shortcut)
        if together:
            add_adapter(model, "b", ResLoRAConfig(r=2, shortcut=shortcut))
            randomize(set_adapter(model, "b"), 1)
            set_adapter(model, ["default", "b"])
        if how == "detached":  # each x as it comes out of the part below, and no gradient through it
            model.net.blocks[0].register_forward_hook(lambda module, args, y: y.detach())
            model.net.blocks[1].register_forward_hook(lambda module, args, y: y.detach())
        else:
            model.frozen = 2
        model(X).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if ".blocks.0." not in name})
    for name, gradient in found[0].items():
        if ".blocks.1." in name:
            assert gradient is None or shortcut == "block", name  # whose A and B the layer after it reads
        elif gradient is not None:
            torch.testing.assert_close(gradient, found[1][name])
            assert gradient.norm() > 0 and found[1][name] is not None


def test_a_part_with_gradients_in_a_forward_without_any_is_refused() -> None:
    class Guided(Root):
        def forward(self, x: Tensor) -> Tensor:
            x = self.net.blocks[0](x)
            with torch.enable_grad():
                return self.net.blocks[1](x)

    for shortcut in SHORTCUTS:
        model = residual(shortcut, Guided)
        with torch.no_grad():
            if shortcut != "input":
                assert model(X).requires_grad
                continue
            with pytest.raises(RuntimeError, match="the layer before ran without gradients"):
                model(X)


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["self_attn"]])
def test_an_encoder_with_padding_is_evaluated_as_it_trains(targets: list[str]) -> None:
    """``nn.TransformerEncoder`` makes nested tensors for a fused layer that reads weights past their adapters."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2)
    x, padding = torch.randn(2, 5, 16), torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    with torch.no_grad():
        before = encoder.eval()(x, src_key_padding_mask=padding)
    randomize(apply_reslora(encoder, ResLoRAConfig(r=2, target_modules=targets)))
    trained = encoder.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        evaluated = encoder.eval()(x, src_key_padding_mask=padding)
        torch.testing.assert_close(evaluated[~padding], trained[~padding])
        assert torch.equal(unload(encoder)(x, src_key_padding_mask=padding), before)


def test_heads_beside_each_other_have_backward_passes_of_their_own() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.other(x)

    model = randomize(apply_reslora(Heads().double(), ResLoRAConfig(r=2, shortcut="none"), example_inputs=X))
    one, other = model(X)
    one.sum().backward()
    assert model.other.lora_A.grad is None
    other.sum().backward()
    assert model.other.lora_A.grad is not None


def test_layers_that_a_model_calls_from_a_list() -> None:
    """Mask2Former's predictor: registered by ``add_module``, called from a plain list."""

    class Predictor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
            for n, layer in enumerate(self.layers):
                self.add_module(str(n), layer)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    model = Predictor().double()
    before = model(X)
    randomize(apply_reslora(model, ResLoRAConfig(r=2)))
    adapted = model(X)
    assert not torch.allclose(adapted, before)
    merge_reslora(model)
    torch.testing.assert_close(model(X), adapted)
    assert torch.allclose(unload(unmerge_reslora(model))(X), before)


def test_a_complex_weight_is_left_out() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.real, self.complex = nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.complex64)

    found = inspect(apply_reslora(Model(), ResLoRAConfig(r=2)))
    assert ("complex", "a Linear with a complex weight") in found.unmatched
