"""Real models in use: generation, copies, threads, exceptions, checkpoints; nothing is left behind."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, apply_reslora, merge_reslora
from reslora_kernels.adapt.record import adapted_layers, record_of
from reslora_kernels.testing import relative_error

from .models import FAMILIES, llama, randomize, t5, train

SHORTCUTS = ("none", "input", "block", "middle")
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}  # the same algebra summed in another order


def config(shortcut: str, **changes: Any) -> ResLoRAConfig:
    return ResLoRAConfig(**({"r": 4, "lora_alpha": 8, "shortcut": shortcut, "pre_num": 2} | changes))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums."""
    assert relative_error(actual, expected) <= ROUNDING[expected.dtype]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def nothing_open(model: nn.Module) -> bool:
    return all(not chain.passes._open for chain in record_of(model).chains)


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
        barrier = threading.Barrier(len(models), timeout=600)
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
            inferred = family.outputs(model.eval(), batch)
        # tensors of inference mode do not tell whether they were written to, so each layer projects them for itself
        assert relative_error(inferred, trained_values) < 1e-5

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
        with pytest.warns(UserWarning, match="holds no adapters"):
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
