"""The k-th call of a layer takes from the k-th call of the one before it: real models against the plain equations.

Hooks see every call of every adapted layer; ``reference`` says what each must have computed from the inputs seen.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from reslora_kernels import ResLoRAConfig, apply_reslora, collect_statistics, inspect, merge_reslora, reference
from reslora_kernels.adapt.record import adapted_layers, record_of
from reslora_kernels.forward_state import ForwardState
from reslora_kernels.testing import max_error, relative_error

from .distributed.residual import residual
from .models import VOCABULARY, llama, randomize

SHORTCUTS = [("input", 1), ("middle", 2), ("middle", -1), ("block", 2)]
HANDING = [("input", 1), ("middle", 2)]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
Calls = dict[str, list[tuple[Tensor, Tensor]]]


def adapted(model: nn.Module, shortcut: str, pre_num: int, **changes: Any) -> nn.Module:
    config = ResLoRAConfig(r=4, lora_alpha=8, shortcut=shortcut, pre_num=pre_num, **changes)
    return randomize(apply_reslora(model.double().eval(), config))


@contextmanager
def watched(model: nn.Module) -> Iterator[Calls]:
    """x and y of every call of every adapted layer."""
    calls: Calls = {name: [] for name in adapted_layers(model)}
    handles = [
        layer.register_forward_hook(lambda module, args, y, name=name: calls[name].append((args[0], y)))
        for name, layer in adapted_layers(model).items()
    ]
    yield calls
    for handle in handles:
        handle.remove()


def expected(layers: list[Any], calls: list[list[tuple[Tensor, Tensor]]], n: int, k: int) -> Tensor:
    """y of the k-th call of layer n of a chain: the part of the chain before it whose k-th calls saw such tokens."""
    config, first = layers[n].config, n
    if config.shortcut == "block":
        first = 0
    elif config.shortcut != "none":
        leading = calls[n][k][0].shape[:-1]
        while first > 0 and k < len(calls[first - 1]) and calls[first - 1][k][0].shape[:-1] == leading:
            first -= 1
    chain = layers[first : n + 1]
    x = [calls[n][k][0]] * len(chain) if config.shortcut == "block" else [calls[j][k][0] for j in range(first, n + 1)]
    a, b = [layer.lora_A for layer in chain], [layer.lora_B for layer in chain]
    term = reference.low_rank_term(config.shortcut, config.pre_num, layers[n].scaling, n - first, x, a, b)
    return nn.functional.linear(x[-1], layers[n].weight, layers[n].bias) + term


def check(model: nn.Module, run: Callable[[], Any]) -> Calls:
    """Run, and compare every call with the equations."""
    with torch.no_grad(), watched(model) as calls:
        run()
    names = {id(layer): name for name, layer in adapted_layers(model).items()}
    for chain in record_of(model).chains:
        of_chain = [calls[names[id(layer)]] for layer in chain.layers]
        for n, own in enumerate(of_chain):
            for k, (_, y) in enumerate(own):
                bound = 1e-12 if y.dtype == torch.float64 else 1e-5  # some models run their router in float32
                assert max_error(y, expected(chain.layers, of_chain, n, k)) < bound, (chain.name, n, k)
    assert any(calls.values())
    return calls


def bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(vocab_size=99, **(SMALL | changes)))


def siglip() -> Any:
    torch.manual_seed(0)
    text = dict(SMALL, vocab_size=99, max_position_embeddings=16)
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text, vision_config=dict(SMALL, image_size=16, patch_size=4))
    )


def whisper() -> Any:
    torch.manual_seed(0)
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=99, num_mel_bins=8, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=12,
            max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    )  # fmt: skip


def switch() -> Any:
    torch.manual_seed(0)
    return transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(
            vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=3, num_heads=4, num_experts=3,
            num_sparse_encoder_layers=3, num_sparse_decoder_layers=3, expert_capacity=64, dropout_rate=0.0,
        )
    )  # fmt: skip


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
class TestRealModels:
    def test_a_projection_also_run_on_position_embeddings(self, shortcut: str, pre_num: int) -> None:
        torch.manual_seed(0)
        config = transformers.DebertaV2Config(
            vocab_size=99, **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True,
            position_buckets=8, norm_rel_ebd="layer_norm",
        )  # fmt: skip
        model = adapted(transformers.DebertaV2Model(config), shortcut, pre_num)
        calls = check(model, lambda: model(input_ids=ids(2, 9)))
        assert len(calls["encoder.layer.1.attention.self.query_proj"]) == 2

    def test_two_towers_with_as_many_tokens(self, shortcut: str, pre_num: int) -> None:
        model = adapted(siglip(), shortcut, pre_num, target_modules=["q_proj", "v_proj"])
        check(model, lambda: model(input_ids=ids(2, 16), pixel_values=images()))
        check(model, lambda: model.get_image_features(pixel_values=images()))
        with torch.no_grad():
            one, two = (model(input_ids=ids(2, 16), pixel_values=images(seed)).text_embeds for seed in (1, 2))
        assert torch.equal(one, two)

    def test_one_tower_before_any_whole_forward(self, shortcut: str, pre_num: int) -> None:
        torch.manual_seed(0)
        config = transformers.CLIPConfig(
            text_config=dict(SMALL, vocab_size=99), vision_config=dict(SMALL, image_size=16, patch_size=4)
        )
        model = adapted(transformers.CLIPModel(config), shortcut, pre_num)

        def features() -> Tensor:
            found = model.get_image_features(pixel_values=images())
            return getattr(found, "pooler_output", found)

        check(model, features)
        with torch.no_grad(), float64_by_default():
            first = features()
            model(input_ids=ids(2, 7), pixel_values=images())
            assert torch.equal(features(), first)

    def test_chunked_feed_forward(self, shortcut: str, pre_num: int) -> None:
        model = adapted(bert(), shortcut, pre_num)
        with torch.no_grad():
            whole = model(ids(2, 8))[0]
            for layer in model.encoder.layer:
                layer.chunk_size_feed_forward = 2
            assert max_error(model(ids(2, 8))[0], whole) < 1e-12
        calls = check(model, lambda: model(ids(2, 8)))
        assert len(calls["encoder.layer.2.output.dense"]) == 4

    def test_encoder_and_decoder_of_one_length(self, shortcut: str, pre_num: int) -> None:
        model = adapted(whisper(), shortcut, pre_num)
        features = torch.randn(2, 8, 24, dtype=torch.float64)
        for length in (12, 6):
            check(model, lambda length=length: model(input_features=features, decoder_input_ids=ids(2, length)))

    def test_experts_see_no_other_tokens(self, shortcut: str, pre_num: int) -> None:
        """Samples alone are what they are in a batch; experts are plain LoRA, with c = 1, and merge as such."""
        model = adapted(switch(), shortcut, pre_num)
        encoder, decoder = ids(4, 9), ids(4, 6, seed=1)

        def logits(rows: slice = slice(None)) -> Tensor:
            found: Tensor = model(input_ids=encoder[rows], decoder_input_ids=decoder[rows], use_cache=False).logits
            return found

        check(model, logits)
        with torch.no_grad():
            together = logits()
            for i in range(4):
                assert max_error(logits(slice(i, i + 1)), together[i : i + 1]) < 1e-12
        expert = "encoder.block.1.layer.1.mlp.experts.expert_0.wi"
        layer = adapted_layers(model)[expert]
        assert layer.chain_length == 3 and inspect(model).layers
        x = torch.randn(5, 32, dtype=torch.float64)
        before = layer(x)
        batches = [{"input_ids": encoder, "decoder_input_ids": decoder}]
        with collect_statistics(model) as statistics, torch.no_grad():
            model(**batches[0])
        if shortcut != "block":
            assert statistics.layers[expert].gram is None  # exact without data
        report = merge_reslora(model, calibration=batches, joint_steps=2 if shortcut == "input" else 0)
        assert {row.name: row.method for row in report.rows}[expert] == "exact"
        assert max_error(layer(x), before) < 1e-12


@contextmanager
def float64_by_default() -> Iterator[None]:
    """CLIP of Transformers 4.56 makes its causal mask in the default dtype, with a number of the model's."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    total = loss() - 0.5 * loss()  # two forwards before one backward
    return list(torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
@pytest.mark.parametrize("entry", ["forward", "inner module"])
def test_checkpointing_where_the_roots_hook_does_not_run(shortcut: str, pre_num: int, entry: str) -> None:
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    plain, model = (adapted(bert(**none), shortcut, pre_num).train() for _ in range(2))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def loss(one: Any) -> Tensor:
        if entry == "forward":
            return one.forward(ids(2, 8))[0].pow(3).mean()  # squares of what a LayerNorm gave have no gradient
        return one.encoder(one.embeddings(ids(2, 8)))[0].pow(3).mean()

    for got, wanted in zip(gradients(model, lambda: loss(model)), gradients(plain, lambda: loss(plain)), strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or relative_error(got, wanted) < 1e-10


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.proj(x))


class Stack(nn.Module):
    """Runs its blocks as ``order`` says, which ones and how often, on ``streams`` tensors in turn."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.order = list(range(depth))

    def forward(self, x: Tensor, streams: int = 1) -> Tensor:
        parts = list(x.chunk(streams))
        for n in self.order:
            parts = [self.blocks[n](part) for part in parts]
        return torch.cat(parts)


class Around(nn.Module):
    """What runs a stack within its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Stack()


def stack(shortcut: str, pre_num: int, depth: int = 4) -> Stack:
    return adapted(Stack(depth), shortcut, pre_num)


def loss_of(model: nn.Module, x: Tensor, streams: int) -> Tensor:
    return model(x, streams=streams).square().mean()


def x_of(rows: int) -> Tensor:
    return torch.randn(rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
class TestCalls:
    def test_each_block_called_for_each_of_several_streams(self, shortcut: str, pre_num: int) -> None:
        model, x = stack(shortcut, pre_num), x_of(8)
        check(model, lambda: model(x, streams=4))
        with torch.no_grad():
            assert max_error(model(x, streams=4), torch.cat([model(part) for part in x.chunk(4)])) < 1e-14

    @pytest.mark.parametrize("order", [[0, 1, 0, 1, 2], [1, 0, 1, 2], [0, 0, 1, 1, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1]])
    def test_any_order_of_calls(self, shortcut: str, pre_num: int, order: list[int]) -> None:
        """A call before the one that it would take from is layer 0, and the late one is for nobody else."""
        model, x = stack(shortcut, pre_num), x_of(2)
        model.order = order
        seen: list[tuple[int, Tensor, Tensor]] = []
        for n, block in enumerate(model.blocks):
            block.proj.register_forward_hook(lambda module, args, y, n=n: seen.append((n, args[0], y)))
        with torch.no_grad():
            model(x)
        layers = [block.proj for block in model.blocks]
        handed: dict[tuple[int, int], list[Tensor]] = {}
        count = [0] * 4
        for n, tokens, y in seen:
            k, count[n] = count[n], count[n] + 1
            before = handed.get((n - 1, k), [])  # the inputs that reach this call, nearest first
            handed[n, k] = [tokens, *before]
            part = layers[n - len(before) : n + 1]
            a, b = [layer.lora_A for layer in part], [layer.lora_B for layer in part]
            chain = [*reversed(before), tokens]
            term = reference.low_rank_term(shortcut, pre_num, layers[n].scaling, len(chain) - 1, chain, a, b)
            assert max_error(y, nn.functional.linear(tokens, layers[n].weight, layers[n].bias) + term) < 1e-13

    @pytest.mark.parametrize(
        "plan",
        [
            [(0, [0]), (1, [0]), (0, [1]), (1, [1]), (0, [2, 3]), (1, [2, 3])],  # streams in turn, block by block
            [(0, [0, 1]), (1, [0, 1]), (0, [2, 3]), (1, [2, 3])],
            [(0, [0]), (0, [1]), (0, [1]), (0, [1]), (0, [2, 3])],  # a core that is looped
            [(0, [0, 1, 2, 3])] * 3,
        ],
        ids=["by block", "by half", "looped", "whole"],
    )
    def test_a_part_of_the_blocks_in_each_call_of_the_module(
        self, shortcut: str, pre_num: int, plan: list[tuple[int, list[int]]]
    ) -> None:
        """As with the same calls in one forward, where the k-th call takes from the k-th: streams never meet."""

        class Parts(Around):
            def forward(self, x: Tensor) -> Tensor:
                parts = list(x.chunk(2))
                for stream, self.inner.order in plan:
                    parts[stream] = self.inner(parts[stream])
                return torch.cat(parts)

        model = adapted(Parts(), shortcut, pre_num)
        check(model, lambda: model(x_of(6)))

    def test_a_failed_sweep_inside_one_forward_hands_nothing_to_the_next(self, shortcut: str, pre_num: int) -> None:
        class Retries(Around):
            def forward(self, x: Tensor, fails: bool) -> Tensor:
                if fails:
                    handle = self.inner.blocks[1].register_forward_pre_hook(fail)
                    with pytest.raises(ArithmeticError):
                        self.inner(2 * x)
                    handle.remove()
                return self.inner(x)

        def fail(*_: Any) -> None:
            raise ArithmeticError

        model, x = adapted(Retries(), shortcut, pre_num), x_of(2)
        with torch.no_grad():
            assert torch.equal(model(x, True), model(x, False))

    def test_a_sweep_that_leaves_layers_out_hands_nothing_to_the_next(self, shortcut: str, pre_num: int) -> None:
        class Pair(Around):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                self.inner.order = [0, 2, 3]  # layer drop
                first = self.inner(x)
                self.inner.order = [0, 1, 2, 3]
                return torch.cat([first, self.inner(y)])

        model, x, y = adapted(Pair(), shortcut, pre_num), x_of(2), x_of(3)[:2]
        with torch.no_grad():
            assert torch.equal(model(x, y)[2:], model.inner(y))

    def test_what_is_taken_is_freed(self, shortcut: str, pre_num: int, monkeypatch: pytest.MonkeyPatch) -> None:
        model, alive, most = stack(shortcut, pre_num), [], [0]
        hand_on = ForwardState.hand_on

        def counted(self: ForwardState, earlier: tuple[Tensor, ...], h: Tensor) -> None:
            alive.append(weakref.ref(h))
            hand_on(self, earlier, h)
            del h, earlier
            most[0] = max(most[0], sum(ref() is not None for ref in alive))

        monkeypatch.setattr(ForwardState, "hand_on", counted)
        model.order = [0, 1, 2, 3] * 50
        with torch.no_grad():
            model(x_of(2))
        gc.collect()
        assert len(alive) == 150 and most[0] <= 1 + pre_num

    @pytest.mark.slow
    def test_compiled_by_block_needs_no_graph_for_each_call(self, shortcut: str, pre_num: int) -> None:
        """Many calls of a block before those of the next, and many sweeps: as many graphs as with three of each."""
        counts = []
        for streams in (3, 9):
            torch._dynamo.reset()
            model, x = stack(shortcut, pre_num, depth=5), x_of(18)
            loss = partial(loss_of, model, x, streams)
            wanted = gradients(model, loss)
            counter = CompileCounterWithBackend("aot_eager")
            for block in model.blocks:
                block.compile(backend=counter, fullgraph=True)
            for got, want in zip(gradients(model, loss), wanted, strict=True):
                assert max_error(got, want) < 1e-13
            with dynamo.patch(error_on_recompile=True):
                gradients(model, loss)
            counts.append(counter.frame_count)
        torch._dynamo.reset()
        assert counts[0] == counts[1]

    @pytest.mark.slow
    def test_compiled_whole_with_repeated_calls(self, shortcut: str, pre_num: int) -> None:
        torch._dynamo.reset()
        model, x = stack(shortcut, pre_num), x_of(6)
        model.order = [0, 1, 1, 2, 0, 3]
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert max_error(compiled(x, 3), model(x, 3)) < 1e-13
        torch._dynamo.reset()


@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
def test_nothing_crosses_packed_samples(shortcut: str, pre_num: int) -> None:
    """A padding-free batch of three samples in one row gives each the gradients and outputs that it has by itself."""
    model = adapted(llama(), shortcut, pre_num).train()
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in (5, 9, 4)]
    packed = transformers.DataCollatorWithFlattening()([{"input_ids": sample.tolist()} for sample in samples])
    assert packed["position_ids"].tolist() == [[*range(5), *range(9), *range(4)]]
    trained = [p for p in model.parameters() if p.requires_grad]
    together = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits
    alone = torch.cat([model(input_ids=sample[None], use_cache=False).logits for sample in samples], 1)
    assert relative_error(together, alone) < 1e-6  # LLaMA's norms compute in float32
    direction = torch.randn(alone.shape, generator=generator, dtype=alone.dtype)
    for got, want in zip(
        *(torch.autograd.grad((y * direction).sum(), trained) for y in (together, alone)), strict=True
    ):
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
def test_a_model_that_has_lost_blocks_is_not_silently_another(shortcut: str) -> None:
    """A stage of a pipeline cut out of an adapted model: its first layers would be layer 0, or read what is gone."""
    model = residual(shortcut)
    x, cut = torch.randn(1, 2, 6, dtype=torch.float64), copy.deepcopy(model)
    del cut.blocks[:2]
    if shortcut == "none":
        cut(x)
        return
    with pytest.raises(ValueError, match=r"'blocks\.0\.up'.*pipeline_reslora"):
        cut(x)
    model(x)
