"""Public reports of PEFT and TRL, tried with ResLoRA as the method; ``docs/reports.md`` lists them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from reslora_kernels.peft import ResLoRAPeftConfig  # noqa: E402

from .models import FAMILIES, llama, logits, randomize, roberta  # noqa: E402


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
