"""What AdapterCheckpoints leaves on disk beside the adapters, and a Trainer over a quantised base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from reslora_kernels import ResLoRAConfig, apply_reslora, load_adapter
from reslora_kernels.training import AdapterCheckpoints

from .cli.conftest import make_tokenizer
from .models import FAMILIES, llama

WEIGHTS = {"model.safetensors", "config.json", "generation_config.json"}  # the plain Trainer's, of the whole model
ADAPTER = {"reslora_config.json", "reslora_model.safetensors"}


class ResLoRATrainer(AdapterCheckpoints, Trainer):
    pass


def trainer(kind: type[Trainer], model: Any, folder: Path, **more: Any) -> Any:
    ids = FAMILIES["llama"].batch(5)["input_ids"].repeat(2, 1)
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.02}
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **options)
    return kind(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids], **more)


def adapted(model: Any) -> Any:
    torch.manual_seed(3)
    return apply_reslora(model, ResLoRAConfig(r=2, shortcut="input", target_modules=["q_proj", "v_proj"]))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_it_writes_what_the_trainer_writes(tmp_path: Path) -> None:
    for kind, model in ((Trainer, llama()), (ResLoRATrainer, adapted(llama()))):
        run = trainer(kind, model, tmp_path / kind.__name__, processing_class=make_tokenizer())
        run.train()
        run.save_model(str(tmp_path / kind.__name__ / "saved"))
    for folder in ("checkpoint-4", "saved"):
        plain, adapters = files(tmp_path / "Trainer" / folder), files(tmp_path / "ResLoRATrainer" / folder)
        assert plain >= WEIGHTS and {"tokenizer.json", "training_args.bin"} <= plain
        assert adapters == plain - WEIGHTS | ADAPTER


QUANTIZED = {
    "NF4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def quantized(kind: str, folder: Path) -> Any:
    """The small model loaded quantised, as Transformers does it."""
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = QUANTIZED[kind]
    if not folder.exists():
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_key_value_heads": 4,
        }  # what bitsandbytes packs on CPUs
        shape = LlamaConfig(**{**llama().config.to_dict(), **sizes, "head_dim": 16})
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


@pytest.mark.parametrize("kind", ["NF4", "int8", "torchao"])
def test_a_quantised_base_trains_and_resumes(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    run = trainer(ResLoRATrainer, adapted(quantized(kind, base)), tmp_path / "run")
    assert run.model.is_quantized
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    run.train()
    trained = {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
    assert all(not torch.equal(trained[name], before[name]) for name in trained)
    resumed = trainer(ResLoRATrainer, adapted(quantized(kind, base)), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    loaded = load_adapter(quantized(kind, base), tmp_path / "run" / "checkpoint-4")
    for model in (resumed.model, loaded):
        found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        assert found.keys() == trained.keys()
        assert all(torch.equal(found[name], trained[name]) for name in found)


def test_without_adapters_a_quantised_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(ResLoRATrainer, quantized("NF4", tmp_path / "base"), tmp_path / "run")
