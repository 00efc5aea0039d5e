"""Real models in use: generation, copies, threads, exceptions, checkpoints, weights that are kept elsewhere."""

from __future__ import annotations

import copy
import io
import threading
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file as load
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    ResLoRALinear,
    add_adapter,
    apply_reslora,
    load_adapter,
    merge_reslora,
    save_adapter,
    set_adapter,
    unmerge_reslora,
)
from reslora_kernels.adapt.record import adapted_layers, record_of
from reslora_kernels.testing import relative_error

from .models import FAMILIES, denoised, llama, needs_transformers_5, randomize, t5, train, unet

SHORTCUTS = ("none", "input", "block", "middle")
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}  # the same algebra summed in another order


def config(shortcut: str, **changes: Any) -> ResLoRAConfig:
    return ResLoRAConfig(**({"r": 4, "lora_alpha": 8, "shortcut": shortcut, "pre_num": 2} | changes))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums."""
    assert relative_error(actual, expected) <= ROUNDING[expected.dtype]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def tensors_beside_parameters(model: nn.Module) -> list[int]:
    """Those that modules hold as plain attributes, as Transformers 4's rotary embeddings do."""
    return [id(value) for m in model.modules() for value in vars(m).values() if isinstance(value, Tensor)]


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
        kept = tensors_beside_parameters(model)

        def fail(*_: Any) -> None:
            raise KeyError("in the middle")

        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        for use in (model, model.model):
            with pytest.raises(KeyError, match="in the middle"):
                use(batch["input_ids"])
            assert nothing_open(model)
        handle.remove()
        assert torch.equal(family.outputs(model, batch), before)
        assert tensors_beside_parameters(model) == kept

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


X = torch.arange(2, 11)[None]


def offloadable(shortcut: str = "input") -> ResLoRAConfig:
    return ResLoRAConfig(r=2, shortcut=shortcut, target_modules=["q_proj", "v_proj", "down_proj"])


def kept_on_cpu(model: nn.Module, folder: Path) -> nn.Module:
    accelerate.cpu_offload(model, execution_device="cpu")
    return model


def kept_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    accelerate.disk_offload(model, str(folder / "weights"), execution_device="cpu")
    return model


def kept_by_a_second_hook(model: nn.Module, folder: Path) -> nn.Module:
    hooks = accelerate.hooks
    for layer in [module for module in model.modules() if type(module) is nn.Linear]:
        hooks.add_hook_to_module(layer, hooks.ModelHook())
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", offload=True), append=True)
    return model


def adapted_in_place(model: nn.Module, shortcut: str = "input") -> nn.Module:
    model = apply_reslora(model, offloadable(shortcut))
    torch.manual_seed(1)
    return randomize(model)


def gradients_of_tokens(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=X, labels=X).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
@pytest.mark.parametrize("offload", [kept_on_cpu, kept_on_disk, kept_by_a_second_hook])
def test_an_offloaded_base_trains_as_one_in_memory(offload: Any, shortcut: str, tmp_path: Path) -> None:
    plain, offloaded = adapted_in_place(llama(), shortcut), adapted_in_place(offload(llama(), tmp_path), shortcut)
    expected, found = gradients_of_tokens(plain), gradients_of_tokens(offloaded)
    assert expected.keys() == found.keys() and expected
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)
    assert all(m.weight.is_meta for m in offloaded.modules() if isinstance(m, ResLoRALinear))  # away again


@pytest.mark.parametrize("offload", [kept_on_cpu, kept_on_disk])
def test_an_offloaded_base_merges_saves_and_switches(offload: Any, tmp_path: Path) -> None:
    plain, offloaded = adapted_in_place(llama()), adapted_in_place(offload(llama(), tmp_path))
    before = offloaded(input_ids=X).logits
    merge_reslora(plain, "weights"), merge_reslora(offloaded, "weights")
    torch.testing.assert_close(offloaded(input_ids=X).logits, plain(input_ids=X).logits, rtol=0, atol=0)
    assert not torch.equal(offloaded(input_ids=X).logits, before)
    unmerge_reslora(offloaded)
    assert torch.equal(offloaded(input_ids=X).logits, before)
    save_adapter(offloaded, tmp_path / "adapter")
    again = load_adapter(offload(llama(), tmp_path / "again"), tmp_path / "adapter")
    assert torch.equal(again(input_ids=X).logits, before)
    add_adapter(offloaded, "other", offloadable("none"))
    set_adapter(offloaded, "other")
    assert torch.equal(offloaded(input_ids=X).logits, llama()(input_ids=X).logits)
    set_adapter(offloaded, "default")
    assert torch.equal(offloaded(input_ids=X).logits, before)


@needs_transformers_5
def test_a_dispatched_model_trains_and_saves_whole(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    dispatched = adapted_in_place(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=places, offload_folder=tmp_path / "away")
    )
    plain = adapted_in_place(llama())
    expected, found = gradients_of_tokens(plain), gradients_of_tokens(dispatched)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    dispatched.save_pretrained(tmp_path / "whole")
    state = {name: value for file in (tmp_path / "whole").glob("*.safetensors") for name, value in load(file).items()}
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name


def test_weights_return_when_the_hooks_are_removed() -> None:
    model = adapted_in_place(kept_on_cpu(llama(), Path()))
    before = model(input_ids=X).logits
    accelerate.hooks.remove_hook_from_submodules(model)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model(input_ids=X).logits, before)


def test_a_hook_of_any_kind_still_runs_and_a_copy_has_its_own() -> None:
    class Twice(accelerate.hooks.ModelHook):  # type: ignore[name-defined, misc]
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    model = llama()
    accelerate.hooks.add_hook_to_module(model.model.layers[0].mlp.down_proj, Twice())
    before = model(input_ids=X).logits
    apply_reslora(model, offloadable())
    assert torch.equal(model(input_ids=X).logits, before)
    other = copy.deepcopy(model)
    randomize(model)
    assert torch.equal(other(input_ids=X).logits, before)


def replaced(model: Any) -> str:
    layer = model.model.layers[1].self_attn.q_proj
    layer.forward = lambda x: torch.zeros_like(x)
    return r"'model.layers.1.self_attn.q_proj' is replaced on the instance by tests.test_model_state.replaced"


def cast_by_layer(model: Any) -> str:
    casting = pytest.importorskip("diffusers.hooks")
    casting.apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=["norm"])
    return r"replaced on the instance by diffusers \(layerwise_casting\).*skip_modules_classes"


def offloaded_in_groups(model: Any) -> str:
    groups = pytest.importorskip("diffusers.hooks")
    groups.apply_group_offloading(model, torch.device("cpu"), offload_type="leaf_level")
    return "group offloading: call apply_reslora first"


def loaded_with_submodules(model: Any) -> str:
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["LlamaAttention"])
    return r"accelerate loads 'model.layers.0.self_attn' with all its submodules"


@pytest.mark.parametrize("hang", [replaced, cast_by_layer, offloaded_in_groups, loaded_with_submodules])
def test_what_an_adapter_would_lose_is_refused_by_name(hang: Any) -> None:
    model = llama()
    message = hang(model)
    state = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        apply_reslora(model, offloadable())
    assert {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()} == state


def test_trained_weights_are_not_offloaded() -> None:
    model = kept_on_cpu(llama(), Path())
    with pytest.raises(ValueError, match=r"'lm_head' would be trained.*accelerate offloads it"):
        apply_reslora(model, offloadable().replace(modules_to_save=["lm_head"]))


def test_diffusers_hooks_after_adapting() -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    model = adapted_in_place(llama())
    cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32, "skip_modules_pattern": ["norm"]}
    with pytest.raises(ValueError, match=r"adapters are not held in 8 bits.*skip_modules_classes"):
        hooks.apply_layerwise_casting(model, **cast)
    model = adapted_in_place(llama())
    adapters = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    hooks.apply_layerwise_casting(model, **cast, skip_modules_classes=(ResLoRALinear,))
    assert torch.isfinite(model(input_ids=X).logits).all()
    assert all(torch.equal(p, adapters[name]) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("stack", [True, False])
def test_groups_that_are_offloaded_apart(shortcut: str, kind: str, stack: bool, tmp_path: Path) -> None:
    """diffusers' group offloading to a disk leaves memory without values: what reads another group's is refused."""
    hooks = pytest.importorskip("diffusers.hooks")
    config = ResLoRAConfig(r=2, target_modules=["to_k", "to_v"], shortcut=shortcut, stack_projections=stack)
    model = randomize(apply_reslora(unet().double(), config))
    before, cpu = denoised(model), torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    hooks.apply_group_offloading(model, cpu, offload_type=kind, offload_to_disk_path=str(tmp_path), **blocks)
    if shortcut in ("input", "block") or (stack and kind == "leaf_level"):
        with pytest.raises(ValueError, match="diffusers' group offloading moves the adapters of each group"):
            denoised(model)
    else:
        assert relative_error(denoised(model), before) < ROUNDING[torch.float64]


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
def test_adapters_that_go_away_with_the_weights_are_refused_where_they_would_not_train(shortcut: str) -> None:
    """huggingface/accelerate#3770, huggingface/accelerate#3785: training ran, and changed nothing."""
    model = kept_on_cpu(adapted_in_place(llama(), shortcut), Path())
    with pytest.raises(ValueError, match=r"cpu_offload.*first, then apply_reslora"):
        model(input_ids=X, labels=X)
