"""Tools that speak ``PeftModel``, as they are, with ResLoRA's config: TRL, Transformers' Trainer, PEFT's own tests."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from reslora_kernels import ResLoRAConfig, apply_reslora  # noqa: E402
from reslora_kernels.peft import ResLoRAPeftConfig  # noqa: E402
from reslora_kernels.training import AdapterCheckpoints  # noqa: E402

from . import processes  # noqa: E402
from .conftest import make_tokenizer  # noqa: E402
from .models import FAMILIES, llama, logits, randomize  # noqa: E402

pytestmark = pytest.mark.slow
LOG2 = 0.6931471805599453

SWAPPED = """
import peft
from reslora_kernels.peft import ResLoRAPeftConfig

peft.LoraConfig = ResLoRAPeftConfig  # before PEFT's tests import it, so that its cases of LoRA are ours
"""
LINEAR_CASES = "ResLoRAPeftConfig and Vanilla and MLP"
NOT_OURS = (
    "KaSA",
    "MiCA",
    "VeLoRA",
    "Monteclora",
    "lora_b",
    "Parameter",
    "BD",
)  # variants of LoRA with fields of theirs
DIFFERENT = (
    "test_active_adapter",  # sets two adapters in force, which is refused by name
    "bias_peft_method_only",  # takes the value to be "reslora_only"; it is "lora_only", as in the native config
)


def config(shortcut: str) -> ResLoRAPeftConfig:
    return ResLoRAPeftConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], shortcut=shortcut, task_type="CAUSAL_LM"
    )


def adapters(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}


def settings(kind: Any, folder: Path, **changes: Any) -> Any:
    return kind(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=4, save_steps=2, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, bf16=False, seed=0, **changes,
    )  # fmt: skip


def wide_llama() -> Any:
    model = llama()
    model.resize_token_embeddings(384)
    return model


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_trl_supervised_fine_tuning_resumes_bit_for_bit(tmp_path: Path, shortcut: str) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": f"two plus {i} is four, the lazy dog is {i}"} for i in range(16)])

    def trainer() -> Any:
        args = settings(trl.SFTConfig, tmp_path, max_length=24)
        tokenizer = make_tokenizer()
        return trl.SFTTrainer(
            model=wide_llama(), args=args, train_dataset=rows, processing_class=tokenizer, peft_config=config(shortcut)
        )

    whole, resumed = trainer(), trainer()
    assert whole.train().training_loss < 6.5
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected, found = adapters(whole.model), adapters(resumed.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()


def test_trl_without_padding_takes_the_same_steps(tmp_path: Path) -> None:
    """Rows laid end to end are told apart by their positions, from which Transformers makes a mask for attention that
    has no form of its own for them, such as PyTorch's on a CPU."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "two plus two is four" + " the lazy dog" * (i % 3)} for i in range(16)])

    def losses(**how: Any) -> list[float]:
        args = settings(trl.SFTConfig, tmp_path, max_length=None, **how)
        trainer = trl.SFTTrainer(
            model=wide_llama(), args=args, train_dataset=rows, processing_class=make_tokenizer(),
            peft_config=config("input"),
        )  # fmt: skip
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    assert losses(padding_free=True) == pytest.approx(losses(), rel=1e-3)


@pytest.mark.parametrize("trained", [False, True], ids=["base as reference", "adapter as reference"])
@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_trl_preference_optimisation_starts_at_its_reference(tmp_path: Path, shortcut: str, trained: bool) -> None:
    """Policy and reference are one model at the first step, so its loss is log 2: chains follow ``disable_adapter``
    and the copy that TRL names "ref"."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    pairs = [{"prompt": "two plus", "chosen": f" {i} is four", "rejected": f" the dog {i}"} for i in range(16)]
    model = wide_llama()
    if trained:
        model = randomize(peft.get_peft_model(model, config(shortcut)))
    trainer = trl.DPOTrainer(
        model=model,
        args=settings(trl.DPOConfig, tmp_path, max_length=24),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=make_tokenizer(),
        peft_config=None if trained else config(shortcut),
    )
    before = adapters(trainer.model)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert abs(losses[0] - LOG2) < 1e-3
    assert abs(losses[-1] - LOG2) > 1e-3
    assert any(not torch.equal(before[name], after) for name, after in adapters(trainer.model).items())


def test_trl_takes_no_base_model_as_the_reference_of_an_adapted_one(tmp_path: Path) -> None:
    """It makes one from the base model's files, which has none of the adapters that the policy begins with."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    wide_llama().save_pretrained(tmp_path / "base")
    pairs = [{"prompt": "two plus", "chosen": f" {i} is four", "rejected": f" the dog {i}"} for i in range(16)]

    class Trainer(AdapterCheckpoints, trl.DPOTrainer):
        pass

    def trainer(model: Any, **reference: Any) -> Any:
        args = settings(trl.DPOConfig, tmp_path, max_length=24)
        rows = datasets.Dataset.from_list(pairs)
        return Trainer(model=model, args=args, train_dataset=rows, processing_class=make_tokenizer(), **reference)

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = apply_reslora(model, ResLoRAConfig(r=4, target_modules=["q_proj", "v_proj"], shortcut="block"))
    assert trainer(model).ref_model is not None  # they are one model so far
    with pytest.raises(ValueError, match=r"ref_model would be the base model.*ref_model=copy\.deepcopy\(model\)"):
        trainer(randomize(model))
    right = trainer(model, ref_model=copy.deepcopy(model))
    right.train()
    assert abs(next(row["loss"] for row in right.state.log_history if "loss" in row) - LOG2) < 1e-3


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_trl_group_relative_policy_optimisation_resumes_bit_for_bit(tmp_path: Path, shortcut: str) -> None:
    """Its reference is the model with the adapter disabled, and it generates between its steps."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    prompts = datasets.Dataset.from_list([{"prompt": f"two plus {i}"} for i in range(16)])

    def shares_of_the_letter_e(completions: list[str], **_: Any) -> list[float]:
        return [text.count("e") - len(set(text)) / 8 for text in completions]

    def trainer() -> Any:
        args = settings(trl.GRPOConfig, tmp_path, num_generations=4, max_completion_length=8, beta=0.1)
        model = wide_llama()
        return trl.GRPOTrainer(
            model=model, args=args, train_dataset=prompts, processing_class=make_tokenizer(),
            reward_funcs=shares_of_the_letter_e, peft_config=config(shortcut),
        )  # fmt: skip

    whole = trainer()
    before = adapters(whole.model)
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected, found = adapters(whole.model), adapters(resumed.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(expected[name], before[name]) for name in expected)
    assert any(row.get("kl", 0) != 0 for row in whole.state.log_history)


def test_transformers_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{key: value[i] for key, value in FAMILIES["llama"].batch(3).items()} for i in range(8)] * 2

    def trainer() -> Any:
        model = peft.get_peft_model(llama(), config("middle"))
        args = settings(TrainingArguments, tmp_path, gradient_checkpointing=True)
        return Trainer(model=model, args=args, train_dataset=rows)

    torch.manual_seed(0)
    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected, found = adapters(whole.model), adapters(resumed.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_compiled_it_computes_the_same() -> None:
    model = randomize(peft.get_peft_model(llama(), config("input")))
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def tests_of_peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's tests, out of the source distribution of the installed version."""
    folder = tmp_path_factory.mktemp("peft")
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-binary", "peft"]
    done = subprocess.run(
        [*fetch, f"peft=={peft.__version__}", "-d", str(folder)], capture_output=True, text=True, timeout=250
    )
    archives = list(folder.glob("peft-*.tar.gz"))
    if done.returncode or not archives:
        pytest.skip(f"PEFT's source distribution cannot be had: {done.stderr.strip()[-200:]}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    root = next(path for path in folder.glob("peft-*") if path.is_dir())
    (root / "tests" / "__init__.py").touch()
    (root / "swapped.py").write_text(SWAPPED)
    (root / "pytest.ini").write_text("[pytest]\n")
    return root


def test_custom_models_of_peft(tests_of_peft: Path) -> None:
    """Its cases of LoRA in linear layers, every test; without the variants of LoRA that ResLoRA has no fields for, and
    without the tests of what is different on purpose."""
    wanted = " and ".join((LINEAR_CASES, *(f"not {word}" for word in (*NOT_OURS, *DIFFERENT))))
    repository = Path(__file__).parents[1]
    path = os.pathsep.join([str(repository), str(tests_of_peft), os.environ.get("PYTHONPATH", "")])
    done = processes.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "swapped", "tests/test_custom_models.py", "-k", wanted],
        cwd=tests_of_peft,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    outcomes = Counter(line.split()[0] for line in done.stdout.splitlines() if "test_custom_models.py::" in line)
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert done.returncode == 0, "\n".join(failures[:20]) or done.stdout[-2000:] + done.stderr[-2000:]
    assert outcomes["PASSED"] > 300
