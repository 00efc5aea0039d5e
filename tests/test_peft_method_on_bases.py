"""ResLoRA under PEFT on bases that are quantised, offloaded or spread; what is not saved; public reports.

``docs/howto/peft.md`` lists the reports of PEFT and TRL that are tried here with ResLoRA as the method.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, apply_reslora, load_adapter, merge_reslora, unload
from reslora_kernels.peft import ResLoRAPeftConfig, to_native
from reslora_kernels.quantizers import keep_order

from .models import FAMILIES, llama, logits, randomize, roberta

BATCH = FAMILIES["llama"].batch(1)
WANTED: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
NOT_REENTRANT = {"use_reentrant": False}


def adapted(base: nn.Module, shortcut: str = "input", **changes: Any) -> Any:
    return randomize(peft.get_peft_model(base, ResLoRAPeftConfig(**WANTED, shortcut=shortcut, **changes)))


def gradients(model: Any) -> list[Tensor]:
    model.zero_grad()
    model.train()(**BATCH).loss.backward()
    model.eval()
    return [p.grad for name, p in model.named_parameters() if p.requires_grad]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) > 0 and all(map(torch.equal, found, expected))


def quantisation(kind: str) -> Any:
    if kind == "torchao":
        quantizers = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(quantizers.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "nf4":
        return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao"])
def test_a_quantised_base_is_that_of_the_native_api(kind: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantisation(kind), device_map="cpu", dtype=torch.float32
        )

    def prepared(**how: Any) -> Any:
        return peft.prepare_model_for_kbit_training(base(), gradient_checkpointing_kwargs=NOT_REENTRANT, **how)

    model = adapted(prepared())
    native = randomize(apply_reslora(prepared(), ResLoRAConfig(**WANTED, shortcut="input")))
    assert torch.equal(logits(model), logits(native))
    assert equal(gradients(model), gradients(native))
    plain = base()
    keep_order(plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
    model.save_pretrained(tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "peft")
    assert torch.equal(logits(again), logits(load_adapter(base(), to_native(tmp_path / "peft", tmp_path / "native"))))
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="has a quantised weight"):
        model.merge_and_unload(calibration=[BATCH])
    unmerged = logits(model)
    model.merge_adapter(calibration=[BATCH], dequantize=True)
    merge_reslora(native, calibration=[BATCH], dequantize=True)
    assert torch.equal(logits(model), logits(native))
    model.unmerge_adapter()
    assert torch.equal(logits(model), unmerged)
    dense = model.merge_and_unload(calibration=[BATCH], dequantize=True)
    assert type(dense.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.equal(logits(dense), logits(unload(native)))
    reentrant = adapted(peft.prepare_model_for_kbit_training(base()))  # so unless it is told otherwise
    with pytest.raises(RuntimeError, match="use_reentrant"):
        gradients(reentrant)


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
def test_an_offloaded_base_trains_as_one_in_memory(shortcut: str) -> None:
    plain, base = adapted(llama(), shortcut), llama()
    accelerate.cpu_offload(base, execution_device="cpu")
    offloaded = adapted(base, shortcut)
    assert equal(gradients(offloaded), gradients(plain))
    weights = [m.base_layer.weight for m in offloaded.modules() if hasattr(m, "reslora_adapter")]
    assert all(weight.is_meta for weight in weights) and weights  # away again
    with offloaded.disable_adapter():
        assert torch.equal(logits(offloaded), logits(llama()))
    assert torch.equal(logits(offloaded), logits(plain))


def test_a_dispatched_base_starts_from_its_weights_saves_merges_and_unloads(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", device_map=dict(places), offload_folder=tmp_path / "away"
        )

    dispatched = adapted(base(), init_lora_weights="pissa")
    expected = logits(adapted(llama(), init_lora_weights="pissa"))
    assert torch.equal(logits(dispatched), expected)
    dispatched.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")), expected)
    dispatched.merge_adapter(method="weights")
    assert not torch.equal(logits(dispatched), logits(llama()))
    dispatched.unmerge_adapter()
    assert torch.equal(logits(dispatched), expected)
    assert torch.equal(logits(dispatched.unload()), logits(llama()))
    with pytest.raises(ValueError, match=r"takes accelerate's hooks off .*set_peft_model_state_dict"):
        peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    again = peft.get_peft_model(base(), peft.PeftConfig.from_pretrained(tmp_path / "adapter"))
    peft.set_peft_model_state_dict(again, peft.load_peft_weights(str(tmp_path / "adapter"), device="cpu"))
    assert torch.equal(logits(again), expected)


def test_a_hook_runs_once() -> None:
    class Twice(accelerate.hooks.ModelHook):  # type: ignore[name-defined, misc]
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    base = llama()
    accelerate.hooks.add_hook_to_module(base.model.layers[0].mlp.down_proj, Twice())
    before = logits(base)
    model = peft.get_peft_model(base, ResLoRAPeftConfig(**WANTED))
    assert torch.equal(logits(model), before)
    randomize(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


def test_a_replaced_forward_is_refused_and_the_model_left_as_it_was() -> None:
    model = llama()
    model.model.layers[1].self_attn.q_proj.forward = lambda x: torch.zeros_like(x)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.self_attn\.q_proj' is replaced on the instance"):
        peft.get_peft_model(model, ResLoRAPeftConfig(**WANTED))
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("fault", ["NaN", "Inf", "head", "empty", "ZeRO-3", "given"])
def test_a_bad_adapter_does_not_replace_a_good_one(fault: str, tmp_path: Path) -> None:
    adapted(llama(), modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    files = [path for path in tmp_path.iterdir() if path.name.startswith("adapter_")]
    before = {path: path.read_bytes() for path in files}
    model = adapted(llama(), modules_to_save=["lm_head"])
    adapter = model.base_model.model.model.layers[1].self_attn.q_proj.reslora_adapter["default"]
    given: dict[str, Any] = {}
    if fault in ("NaN", "Inf"):
        adapter.lora_B.data[0, 0] = float(fault)
    elif fault == "head":
        model.base_model.model.lm_head.modules_to_save["default"].weight.data[0, 0] = float("nan")
    elif fault == "empty":
        adapter.lora_A.data = torch.empty(0)
    elif fault == "ZeRO-3":
        partition(model)
    else:  # as a Trainer that gathered nothing does
        given = {"state_dict": {}}
    with pytest.raises(ValueError, match=r"layers\.\d\.self_attn\.q_proj|lm_head.*NaN|ZeRO-3"):
        model.save_pretrained(tmp_path, **given)
    assert {path: path.read_bytes() for path in files} == before and len(files) == 2


def partition(model: nn.Module) -> None:
    """As DeepSpeed's ZeRO-3 leaves parameters between the forwards of their modules."""
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_shape, parameter.ds_id = parameter.shape, number  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
def test_zero_3_is_refused_before_training(shortcut: str) -> None:
    base = llama()
    partition(base)
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"parameter 'model\.embed_tokens\.weight' .*ZeRO-3.*apply_reslora"):
        adapted(base, shortcut)
    assert [name for name, _ in base.named_modules()] == names
    model = adapted(llama(), shortcut)
    for number, parameter in enumerate(model.parameters()):  # gathered for the forward, as small ones always are
        parameter.ds_shape, parameter.ds_id = parameter.shape, number
    with pytest.raises(ValueError, match=r"ZeRO-3.*train with ZeRO-2"):
        model(**BATCH)


def config(**changes: object) -> ResLoRAPeftConfig:
    return ResLoRAPeftConfig(r=4, target_modules=["q_proj", "v_proj"], **{"shortcut": "input", **changes})


@pytest.mark.filterwarnings("ignore:Adapter name")
@pytest.mark.parametrize("name", ["lora", "reslora", "adapter", "model"])
def test_peft_2699_an_adapter_may_be_called_like_a_part_of_a_name(tmp_path: Path, name: str) -> None:
    """Keys with the adapter's name in them were taken apart in the wrong place, and the adapter started at random."""
    model = randomize(peft.get_peft_model(llama(), config(), adapter_name=name))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / name)
    assert torch.equal(logits(loaded), logits(model))
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=name)
    assert torch.equal(logits(again), logits(model))


def test_peft_1381_a_merged_model_is_saved_without_its_adapter(tmp_path: Path) -> None:
    """The folder held the adapter as well, which was then applied to the merged weights a second time."""
    model = randomize(peft.get_peft_model(llama(), config(shortcut="block")))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path).eval()), logits(merged))


def test_peft_3455_unload_while_the_active_adapter_trains_no_module_whole() -> None:
    """It failed with a TypeError, after some layers had been unloaded."""
    batch = FAMILIES["roberta"].batch(1)
    both = {"target_modules": ["query"], "r": 4}
    model = peft.get_peft_model(roberta(), ResLoRAPeftConfig(modules_to_save=["classifier"], **both))
    model.add_adapter("other", ResLoRAPeftConfig(**both))
    model.set_adapter("other")
    assert torch.equal(logits(model.unload(), batch), logits(roberta(), batch))


def test_sentence_transformers_3865_transformers_loads_what_was_trained(tmp_path: Path) -> None:
    """Transformers' own adapter methods attached the layers and dropped the trained weights."""
    model = randomize(peft.get_peft_model(llama(), config()))
    model.save_pretrained(tmp_path)
    loaded = llama()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(llama()))


def test_peft_2118_a_file_that_lacks_a_layer_is_not_loaded_in_silence(tmp_path: Path) -> None:
    """Missing keys went unnoticed, and their layers stayed at their start."""
    from safetensors.torch import load_file, save_file

    peft.get_peft_model(llama(), config()).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(weights).items() if "layers.1." not in name}, weights)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*layers\.1"):
        peft.PeftModel.from_pretrained(llama(), tmp_path)
