"""Real models, tiny and from a config: chains, training, merging, generation, copies, threads."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    ResLoRALinear,
    apply_reslora,
    collect_statistics,
    inspect,
    merge_reslora,
    unmerge_reslora,
)
from reslora_kernels.model import adapted_layers, record_of
from reslora_kernels.testing import relative_error

from .models import FAMILIES, Scrambled, llama, randomize, roberta, t5, train, unet

SHORTCUTS = ("none", "input", "block", "middle")
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}  # the same algebra summed in another order


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These matrices are too small to share out, and threads that wait for a busy core cost more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(shortcut: str, **changes: Any) -> ResLoRAConfig:
    return ResLoRAConfig(**({"r": 4, "lora_alpha": 8, "shortcut": shortcut, "pre_num": 2} | changes))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums."""
    assert relative_error(actual, expected) <= ROUNDING[expected.dtype]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def nothing_open(model: nn.Module) -> bool:
    return all(not chain.passes._open for chain in record_of(model).chains)


def chains_of(model: nn.Module) -> list[list[str]]:
    rows = inspect(model).layers
    return [[row.name for row in rows if row.chain == title] for title in dict.fromkeys(row.chain for row in rows)]


@cache
def trained(name: str, shortcut: str) -> tuple[nn.Module, list[float]]:
    """An adapted model after a few steps, and the loss before and after. Shared: copy it before changing it."""
    model = apply_reslora(FAMILIES[name].make(), config(shortcut))
    return model, train(model, FAMILIES[name], steps=16)


class TestChains:
    def test_llama(self) -> None:
        model = apply_reslora(llama(), config("block"))
        own = {
            "self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "mlp": ["gate_proj", "up_proj", "down_proj"],
        }
        expected = [
            [f"model.layers.{i}.{part}.{role}" for i in range(3)] for part, roles in own.items() for role in roles
        ]
        assert chains_of(model) == expected
        coverage = inspect(model)
        assert coverage.order == "dry run"
        assert [name for name, _ in coverage.unmatched] == ["lm_head"]
        assert [row.position for row in coverage.layers] == [0, 1, 2] * 7
        assert coverage.trainable_parameters == sum(row.parameters for row in coverage.layers)
        assert "model.layers.2.mlp.down_proj" in str(coverage)

    def test_roberta(self) -> None:
        model = apply_reslora(roberta(), config("block"))
        prefix = "roberta.encoder.layer"
        attention = [[f"{prefix}.{i}.attention.self.{role}" for i in range(3)] for role in ("query", "key", "value")]
        dense = [
            [f"{prefix}.{i}.{part}.dense" for i in range(3)] for part in ("attention.output", "intermediate", "output")
        ]
        assert sorted(chains_of(model)) == sorted(
            [*attention, *dense, ["classifier.dense"], ["classifier.out_proj"]]  # the head sees one token a sequence
        )

    def test_unet_middle_runs_before_up_though_registered_after(self) -> None:
        model = apply_reslora(unet(), config("block", target_modules=["to_q", "to_k"]))
        registered = list(adapted_layers(model))
        up, mid = (next(i for i, name in enumerate(registered) if name.startswith(at)) for at in ("up_", "mid_"))
        assert up < mid

        def attention(block: str, *ends: str) -> list[str]:
            return [f"{block}.transformer_blocks.0.{end}" for end in ends]

        outer = ["down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]
        inner = [
            "down_blocks.1.attentions.0",
            "mid_block.attentions.0",
            "up_blocks.0.attentions.0",
            "up_blocks.0.attentions.1",
        ]
        expected = []
        for level in (outer, inner):
            expected.append([name for block in level for name in attention(block, "attn1.to_q", "attn2.to_q")])
            expected += [
                [name for block in level for name in attention(block, key)] for key in ("attn1.to_k", "attn2.to_k")
            ]
        assert sorted(chains_of(model)) == sorted(expected)

    def test_unet_time_embeddings_of_one_width_are_one_chain(self) -> None:
        model = apply_reslora(unet(), config("block", target_modules=["time_emb_proj"]))
        assert chains_of(model) == [
            ["down_blocks.0.resnets.0.time_emb_proj", *(f"up_blocks.1.resnets.{i}.time_emb_proj" for i in (0, 1))],
            [
                "down_blocks.1.resnets.0.time_emb_proj",
                *(f"mid_block.resnets.{i}.time_emb_proj" for i in (0, 1)),
                *(f"up_blocks.0.resnets.{i}.time_emb_proj" for i in (0, 1)),
            ],
        ]

    def test_t5_keeps_encoder_from_decoder_and_self_from_cross_attention(self) -> None:
        model = apply_reslora(t5(), config("block"))
        chains = chains_of(model)
        assert sum(map(len, chains)) == len(adapted_layers(model)) == 3 * 6 + 2 * 10
        for names in chains:
            assert len({name.split(".")[0] for name in names}) == 1, names
            if names[0].endswith((".k", ".v")):
                assert len({name.split(".")[-2] for name in names}) == 1, names
        assert [f"decoder.block.{i}.layer.1.EncDecAttention.k" for i in range(2)] in chains

    def test_t5_keeps_them_apart_also_with_examples_of_equal_length(self) -> None:
        tokens = torch.zeros(1, 6, dtype=torch.long)
        examples = {"input_ids": tokens, "decoder_input_ids": tokens}
        model = apply_reslora(t5(), config("block"), example_inputs=examples)
        assert all(len({name.split(".")[0] for name in names}) == 1 for names in chains_of(model))

    def test_vit(self) -> None:
        model = apply_reslora(FAMILIES["vit"].make(), config("block"))
        assert inspect(model).order == "dry run"
        assert all(len(names) == 3 for names in chains_of(model) if "classifier" not in names)

    @pytest.mark.parametrize("name", FAMILIES)
    def test_chains_hold_every_layer_once(self, name: str) -> None:
        model = apply_reslora(FAMILIES[name].make(), config("input"))
        assert sorted(name for names in chains_of(model) for name in names) == sorted(adapted_layers(model))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("name", FAMILIES)
class TestTraining:
    def test_loss_falls_and_the_base_stays(self, name: str, shortcut: str) -> None:
        model, (first, last) = trained(name, shortcut)
        assert last < 0.95 * first
        base = FAMILIES[name].make().state_dict()
        after = {key: value for key, value in model.state_dict().items() if "lora_" not in key}
        assert after.keys() == base.keys()
        assert all(torch.equal(after[key], base[key]) for key in base)
        for key, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora_" in key)
            assert (parameter.grad is None) == ("lora_" not in key)
        assert all(layer.lora_B.abs().sum() > 0 for layer in adapted_layers(model).values())
        assert nothing_open(model)

    def test_exact_merges_are_exact_and_undone_bit_for_bit(self, name: str, shortcut: str) -> None:
        family, model = FAMILIES[name], copy.deepcopy(trained(name, shortcut)[0])
        model.double()  # float32 would show T5's unscaled attention, not the merge
        batch = {key: value.double() if value.is_floating_point() else value for key, value in family.batch(1).items()}
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            before = family.outputs(model, batch)
            merge_reslora(model, calibration=[batch])
            merged = family.outputs(model, batch)
            unmerge_reslora(model)
            assert torch.equal(family.outputs(model, batch), before)
        if shortcut in ("none", "block"):
            assert_same(merged, before)
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("shortcut", ["input", "middle"])
@pytest.mark.parametrize("name", ["llama", "roberta", "unet"])
def test_least_squares_beats_the_papers_merges_on_held_out_data(name: str, shortcut: str) -> None:
    family, model = FAMILIES[name], copy.deepcopy(trained(name, shortcut)[0])
    calibration, held_out = [family.batch(seed) for seed in range(8)], [family.batch(seed) for seed in (900, 901)]

    @torch.no_grad()
    def outputs() -> Tensor:
        return torch.cat([family.outputs(model, batch) for batch in held_out])

    unmerged = outputs()
    errors = {}
    with collect_statistics(model) as statistics, torch.no_grad():
        for batch in calibration:
            model(**batch)
    for method in ("input", "weights", "least_squares"):
        merge_reslora(model, method, statistics=statistics)
        errors[method] = relative_error(outputs(), unmerged)
        unmerge_reslora(model)
    if name != "unet":  # its longest chain has 8 layers, and every one costs two runs
        merge_reslora(model, "least_squares", calibration=calibration, sequential=True)
        errors["sequential"] = relative_error(outputs(), unmerged)
    paper = min(errors["input"], errors["weights"])
    assert max(errors["least_squares"], errors.get("sequential", 0.0)) < 0.95 * paper, errors


@pytest.mark.parametrize("shortcut", SHORTCUTS)
class TestGeneration:
    def test_llama_with_and_without_cache(self, shortcut: str) -> None:
        model = randomize(apply_reslora(llama(), config(shortcut)))
        prompt = torch.arange(3, 9).reshape(1, 6)
        cached, plain = (
            model.generate(prompt, max_new_tokens=10, do_sample=False, use_cache=use) for use in (True, False)
        )
        assert cached.shape == (1, 16)
        assert torch.equal(cached, plain)
        assert nothing_open(model)

    def test_llama_cached_logits(self, shortcut: str) -> None:
        model = randomize(apply_reslora(llama().double(), config(shortcut)))
        tokens = torch.arange(3, 15).reshape(1, 12)
        with torch.no_grad():
            whole = model(tokens).logits
            start = model(tokens[:, :7], use_cache=True)
            rest = model(tokens[:, 7:], past_key_values=start.past_key_values).logits
        assert_same(torch.cat([start.logits, rest], dim=1), whole)

    def test_t5_runs_its_encoder_alone(self, shortcut: str) -> None:
        model = randomize(apply_reslora(t5(), config(shortcut)))
        tokens = torch.arange(3, 11).reshape(1, 8)
        cached, plain = (
            model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
        )
        assert torch.equal(cached, plain)
        with torch.no_grad():
            alone = model.encoder(input_ids=tokens).last_hidden_state
            whole = model(input_ids=tokens, decoder_input_ids=tokens[:, :3])
            assert torch.equal(alone, whole.encoder_last_hidden_state)
            reused = model(encoder_outputs=(alone,), decoder_input_ids=tokens[:, :3])
            assert torch.equal(reused.logits, whole.logits)

    def test_inner_model_called_directly(self, shortcut: str) -> None:
        model = randomize(apply_reslora(llama(), config(shortcut)))
        tokens = torch.arange(3, 15).reshape(1, 12)
        with torch.no_grad():
            hidden = model.model(tokens).last_hidden_state
            assert torch.equal(model.lm_head(hidden), model(tokens).logits)
        assert nothing_open(model)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
class TestState:
    def test_copy_is_independent(self, shortcut: str) -> None:
        family = FAMILIES["llama"]
        model = randomize(apply_reslora(llama(), config(shortcut)))
        batch = family.batch(1)
        before = family.outputs(model, batch).detach()
        twin = copy.deepcopy(model)
        assert torch.equal(family.outputs(twin, batch), before)
        own, others = adapted_layers(model), adapted_layers(twin)
        assert not {id(layer.chain) for layer in own.values()} & {id(layer.chain) for layer in others.values()}
        assert all(layer in layer.chain.layers for layer in others.values())
        train(twin, family, steps=3)
        assert not torch.equal(family.outputs(twin, batch), before)
        assert torch.equal(family.outputs(model, batch), before)
        del model, own  # the copy's hooks and chains are its own
        merge_reslora(
            twin, "weights" if shortcut == "input" else None, calibration=None if shortcut == "input" else [batch]
        )
        assert nothing_open(twin)

    def test_two_models_in_two_threads(self, shortcut: str) -> None:
        family = FAMILIES["llama"]
        models = [randomize(apply_reslora(llama().double(), config(shortcut)), seed) for seed in (1, 2)]
        batches = [family.batch(seed) for seed in (1, 2)]
        alone = []
        for model, batch in zip(models, batches, strict=True):
            family.loss(model, batch).backward()
            alone.append(gradients(model))
            model.zero_grad()
        self.in_threads(models, batches)
        for model, expected in zip(models, alone, strict=True):
            assert all(torch.equal(grad, expected[name]) for name, grad in gradients(model).items())
            assert nothing_open(model)

    def test_one_model_in_two_threads(self, shortcut: str) -> None:
        family = FAMILIES["llama"]
        model = randomize(apply_reslora(llama().double(), config(shortcut)))
        batches = [family.batch(seed) for seed in (1, 2)]
        with torch.no_grad():
            alone = [family.outputs(model, batch) for batch in batches]
        both = self.in_threads([model, model], batches)
        assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))

    @staticmethod
    def in_threads(models: list[nn.Module], batches: list[dict[str, Any]]) -> list[Tensor]:
        """Forward and backward of each in its own thread; all wait for each other in the middle of the forward."""
        barrier = threading.Barrier(len(models), timeout=60)
        outputs: list[Tensor] = [torch.empty(0)] * len(models)

        def meet(*_: Any) -> None:
            barrier.wait()

        handles = [
            layer.register_forward_hook(meet)
            for model in {id(m): m for m in models}.values()
            for layer in model.model.layers
        ]

        def work(i: int) -> None:
            torch.set_num_threads(1)
            result = models[i](**batches[i])
            outputs[i] = result.logits.detach()
            if models.count(models[i]) == 1:
                result.loss.backward()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for handle in handles:
            handle.remove()
        return outputs

    def test_two_forwards_before_one_backward(self, shortcut: str) -> None:
        family = FAMILIES["llama"]
        model = randomize(apply_reslora(llama().double(), config(shortcut)))
        first, second = family.batch(1), family.batch(2)
        second = {key: value[:5, :11] for key, value in second.items()}
        for batch in (first, second):
            family.loss(model, batch).backward()
        separate = gradients(model)
        model.zero_grad()
        losses = [family.loss(model, batch) for batch in (first, second)]
        (losses[0] + losses[1]).backward()
        for name, grad in gradients(model).items():
            assert_same(grad, separate[name])

    def test_exception_in_a_forward_leaves_nothing_behind(self, shortcut: str) -> None:
        family = FAMILIES["llama"]
        model = randomize(apply_reslora(llama(), config(shortcut)))
        batch = family.batch(1)
        before = family.outputs(model, batch).detach()

        def fail(*_: Any) -> None:
            raise KeyError("in the middle")

        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        for use in (model, model.model):
            with pytest.raises(KeyError, match="in the middle"):
                use(batch["input_ids"])
            assert nothing_open(model)
        handle.remove()
        assert torch.equal(family.outputs(model, batch), before)
        assert not any(isinstance(value, Tensor) for m in model.modules() for value in vars(m).values())

    def test_no_grad_and_eval_change_no_value(self, shortcut: str) -> None:
        family = FAMILIES["llama"]
        model = randomize(apply_reslora(llama(), config(shortcut))).train()
        batch = family.batch(1)
        trained_values = family.outputs(model, batch)
        with torch.no_grad():
            assert torch.equal(family.outputs(model, batch), trained_values)
        with torch.inference_mode():
            assert torch.equal(family.outputs(model.eval(), batch), trained_values)

    def test_whole_model_survives_torch_save(self, shortcut: str) -> None:
        model = randomize(apply_reslora(llama(), config(shortcut)))
        tokens = torch.arange(3, 15).reshape(1, 12)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, model(tokens).logits)


class TestStateDict:
    def test_base_checkpoint_loads_strictly(self) -> None:
        model = randomize(apply_reslora(llama(), config("middle")))
        adapters = {key: value.clone() for key, value in model.state_dict().items() if "lora_" in key}
        base = {key: value + 1 for key, value in llama().state_dict().items()}
        model.load_state_dict(base, strict=True)
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in (base | adapters).items())

    def test_own_checkpoint_loads_strictly(self) -> None:
        model, other = (randomize(apply_reslora(llama(), config("input")), seed) for seed in (1, 2))
        other.load_state_dict(model.state_dict(), strict=True)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())

    @pytest.mark.parametrize("ending", [(".lora_A",), (".lora_A", ".lora_B")], ids=["half a layer", "a whole layer"])
    def test_checkpoint_with_some_adapters_missing_is_refused(self, ending: tuple[str, ...]) -> None:
        model = apply_reslora(llama(), config("input"))
        gone = tuple("layers.1.mlp.up_proj" + end for end in ending)
        state = {key: value for key, value in model.state_dict().items() if not key.endswith(gone)}
        with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj\.lora_A"):
            model.load_state_dict(state, strict=True)


def through_examples(kind: str) -> tuple[nn.Module, Any]:
    x = torch.zeros(2, 3, 12, dtype=torch.float64)
    return Scrambled(), {"dict": {"x": x}, "tuple": (x,), "list": [x], "tensor": x, "none": None}[kind]


class TestCustomModule:
    ORDER = ("first.fc", "second.fc", "third.fc")

    @pytest.mark.parametrize("kind", ["dict", "tuple", "list", "tensor"])
    def test_order_from_example_inputs(self, kind: str) -> None:
        model, examples = through_examples(kind)
        apply_reslora(model, config("input"), example_inputs=examples)
        assert chains_of(model) == [["first.fc", "second.fc", "third.fc"], ["out"]]
        assert inspect(model).order == "dry run"

    @pytest.mark.parametrize("shortcut", SHORTCUTS)
    def test_order_from_the_first_forward(self, shortcut: str) -> None:
        late, early = Scrambled(), Scrambled()
        x = torch.randn(2, 3, 12, dtype=torch.float64)
        apply_reslora(late, config(shortcut))
        assert inspect(late).order == "not recorded yet"
        assert list(adapted_layers(late)) != list(self.ORDER)
        apply_reslora(early, config(shortcut), example_inputs=x)
        for model in (late, early):
            randomize(model)
            model.train()(x).square().sum().backward()
            assert model.training
        assert inspect(late).order == "first forward"
        assert chains_of(late) == chains_of(early)
        for name, grad in gradients(late).items():
            assert torch.equal(grad, gradients(early)[name])
        assert nothing_open(late)

    @pytest.mark.parametrize("shortcut", ["input", "middle"])
    def test_calibration_on_the_first_forward_counts_each_batch_once(self, shortcut: str) -> None:
        batches = [
            torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1, 2)
        ]
        late, early = (randomize(apply_reslora(Scrambled(), config(shortcut))) for _ in range(2))
        early(batches[0])
        for model in (late, early):
            merge_reslora(model, calibration=batches)
        for name, layer in adapted_layers(late).items():
            assert torch.equal(layer.weight, adapted_layers(early)[name].weight), name

    def test_first_forward_that_fails_is_tried_again(self) -> None:
        model = apply_reslora(Scrambled(), config("input"))
        with pytest.raises(ValueError, match=r"x must be .* got x \[2, 5\]"):
            model(torch.zeros(2, 5, dtype=torch.float64))
        assert inspect(model).order == "not recorded yet"
        model(torch.zeros(2, 12, dtype=torch.float64))
        assert chains_of(model)[0] == list(self.ORDER)

    @pytest.mark.parametrize("shortcut", SHORTCUTS)
    def test_fused_inference_of_torchs_encoder_does_not_pass_the_adapters_by(self, shortcut: str) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
        model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
        x = torch.linspace(-1, 1, 120, dtype=torch.float64).reshape(2, 5, 12)
        randomize(apply_reslora(model, config(shortcut), example_inputs=x))
        with torch.no_grad():
            inference = model(x)
        assert_same(inference, model(x.clone().requires_grad_()).detach())

    def test_statistics_under_autocast(self) -> None:
        model = randomize(apply_reslora(Scrambled(dtype=torch.float32), config("input")))
        batches = [torch.randn(40, 12) for _ in range(2)]
        model(batches[0])
        with collect_statistics(model) as statistics, torch.autocast("cpu", dtype=torch.bfloat16):
            for batch in batches:
                model(batch)
        moments = statistics.layers["first.fc"].gram
        assert moments is not None
        truth = sum(batch.double().T @ batch.double() for batch in batches)
        assert relative_error(moments, truth) <= ROUNDING[torch.float32]


@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
def test_shortcut_none_is_peft_lora(use_rslora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "down_proj"]
    family, batch = FAMILIES["llama"], FAMILIES["llama"].batch(1)
    own = config("none", target_modules=targets, lora_alpha=6, use_rslora=use_rslora)
    model = randomize(apply_reslora(llama().double(), own))
    theirs = get_peft_model(
        llama().double(), LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=use_rslora)
    )

    def same_name(name: str) -> str:
        return f"base_model.model.{name}.default.weight"

    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameters[same_name(name)].copy_(parameter)
    assert_same(family.outputs(model, batch).detach(), family.outputs(theirs, batch).detach())
    for each in (model, theirs):
        family.loss(each, batch).backward()
    ours, expected = gradients(model), gradients(theirs)
    assert {same_name(name) for name in ours} == expected.keys()
    for name, grad in ours.items():
        assert_same(grad, expected[same_name(name)])


def test_hooks_of_a_swapped_layer_go_on_working() -> None:
    """Also full backward hooks, which a flag beside the hooks tells from the old kind."""
    model, seen = Scrambled(), []
    fc = model.first["fc"]
    fc.register_full_backward_hook(lambda m, grad_input, grad_output: seen.append(grad_input[0].shape))
    handle = fc.register_forward_hook(lambda m, args, out: seen.append(type(m)))
    apply_reslora(model, config("block"), example_inputs=torch.zeros(2, 12, dtype=torch.float64))
    seen.clear()
    model(torch.zeros(2, 12, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert seen == [ResLoRALinear, torch.Size([2, 12])]
    handle.remove()
    model(torch.zeros(2, 12, dtype=torch.float64))
    assert len(seen) == 2
