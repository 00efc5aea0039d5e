"""``reslora finetune`` on a small saved model: exact resume, what is saved, every refusal; alone and as processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from reslora_kernels import load_adapter
from reslora_kernels.cli import finetune as command
from reslora_kernels.cli import main, options
from reslora_kernels.cli.tokenization import PLAIN_CHAT_TEMPLATE
from reslora_kernels.testing import max_error

from ..processes import run_command
from .conftest import Finetune, adapter_of, write_lines


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(2, 40).unsqueeze(0)).logits


# --- the whole command -----------------------------------------------------------------------------------------------


def test_trains_saves_merges_and_exports(
    base: Path, tmp_path: Path, finetune: Finetune, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "new" / "run"
    more = ["--shortcut", "input", "--target-modules", "q_proj,v_proj", "--eval-fraction", "0.2", "--eval-steps", "3"]
    assert finetune(out, *more, "--merge", "--export", "--joint-steps", "4", "--extra-rank", "2") == 0
    printed = capsys.readouterr().out
    assert "6 layers adapted in 2 chains" in printed
    assert f"adapter: {out / 'adapter'}" in printed

    record = json.loads((out / "finetune.json").read_text())
    assert (record["status"], record["steps"], record["train_sequences"], record["eval_sequences"]) == (
        "finished",
        6,
        9,
        3,
    )
    assert record["losses"]["eval_last"] < record["losses"]["eval_first"]
    assert record["losses"]["train_last"] < record["losses"]["train_first"]
    assert record["losses"]["eval_merged"] == pytest.approx(record["losses"]["eval_last"], abs=0.01)
    assert record["merge"]["methods"] == ["joint"]
    assert record["peft"]["max_lora_rank"] == 8 + 2
    assert record["settings"]["config"]["target_modules"] == ["q_proj", "v_proj"]
    assert record["plain_chat_template"] is True

    trained = load_adapter(AutoModelForCausalLM.from_pretrained(base), out / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "peft")
    far = (logits(trained) - logits(plain)).norm()
    assert (logits(merged) - logits(trained)).norm() < 0.5 * far
    torch.testing.assert_close(logits(served), logits(merged), rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out / "merged").chat_template == PLAIN_CHAT_TEMPLATE
    readable = (out / "finetune.json").stat().st_mode
    assert {path.stat().st_mode for path in (out / "merged").iterdir()} == {readable}


def test_checkpoint_holds_the_adapter_and_not_the_base_model(base: Path, tmp_path: Path, finetune: Finetune) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert finetune(tmp_path / "run") == 0
    checkpoint = tmp_path / "run" / "checkpoint-6"
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "tokenizer")
    assert {path.name for path in checkpoint.iterdir()} == {
        "chat_template.jinja",
        "optimizer.pt",
        "reslora_config.json",
        "reslora_model.safetensors",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
        "training_args.bin",
        *(path.name for path in (tmp_path / "tokenizer").iterdir()),
    }
    load_adapter(AutoModelForCausalLM.from_pretrained(base), checkpoint)
    assert (checkpoint / "reslora_model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size


@pytest.mark.parametrize("form", ["completion", "text lines", "text file", "saved dataset", "saved splits"])
def test_other_forms_of_data(form: str, tmp_path: Path, finetune: Finetune, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    completions = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}", "id": i} for i in range(8)]
    texts = [{"text": f"Two plus {i} is {i + 2}."} for i in range(8)]
    path = tmp_path / "data.jsonl"
    if form == "completion":
        write_lines(path, completions)
    elif form == "text lines":
        write_lines(path, texts)
    elif form == "text file":
        path = tmp_path / "book.txt"
        path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    elif form == "saved dataset":
        path = tmp_path / "saved"
        datasets.Dataset.from_list(completions).save_to_disk(path)
    else:
        path = tmp_path / "splits"
        datasets.DatasetDict({"train": datasets.Dataset.from_list(texts)}).save_to_disk(path)
        assert finetune(tmp_path / "none", "--split", "valid", data=path) == 2
        assert "has no split 'valid'; it has train" in capsys.readouterr().err
    evaluation = ["--eval-data", str(path)] if form == "completion" else ["--eval-fraction", "0.25"]
    assert finetune(tmp_path / "run", "--max-steps", "1", "--max-length", "32", *evaluation, data=path) == 0
    record = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert record["eval_sequences"] > 0
    assert record["plain_chat_template"] is False


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shortcut", "diagonal"], "shortcut must be one of 'none', 'input', 'block', 'middle', got 'diagonal'"),
        (["--r", "0"], "r must be from 1 to 256, got 0"),
        (["--lora-dropout", "1"], "lora_dropout must be"),
        (["--target-modules", "(("], "target_modules must be a valid regular expression"),
        (["--layers-to-transform", "one"], "--layers-to-transform must be numbers separated by commas, got 'one'"),
        (["--merge-method", "average"], "merge must be one of"),
        (["--backend", "rocm"], "backend must be one of"),
        (["--torch-dtype", "int8"], "--torch-dtype must be one of auto, float32, float16, bfloat16, got 'int8'"),
        (["--device", "tpu"], "--device must be one of auto, cpu, cuda, got 'tpu'"),
        (["--device", "cpu", "--fp16"], "--fp16 needs a GPU"),
        (["--bf16", "--fp16"], "--bf16 and --fp16 exclude each other"),
        (["--lr-scheduler-type", "zigzag"], "zigzag"),
        (["--optim", "magic"], "magic"),
        (["--eval-fraction", "1"], "--eval-fraction must be at least 0 and below 1, got 1.0"),
        (["--eval-steps", "5"], "--eval-steps needs --eval-data or --eval-fraction"),
        (["--eval-data", "missing.jsonl"], "--eval-data 'missing.jsonl' does not exist"),
        (["--max-length", "4096"], "--max-length must be at most 128, the positions of the model, got 4096"),
        (["--resume"], "--resume: "),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--sequential", "--shortcut", "input", "--merge-method", "input"], "--sequential needs --merge-method least"),
        (["--joint-steps", "8", "--shortcut", "input", "--merge-method", "input"], "--joint-steps needs --merge"),
        (["--extra-rank", "8"], "--extra-rank 8 needs --joint-steps"),
        (["--tokenizer", "./nowhere"], "--tokenizer './nowhere' does not exist"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    finetune: Finetune,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    assert finetune(tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("reslora: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_inputs_that_are_missing_or_do_not_fit(
    base: Path, tmp_path: Path, finetune: Finetune, capsys: pytest.CaptureFixture[str], tokenizer: Any
) -> None:
    from transformers import AutoConfig

    def refusal(*arguments: str, **replaced: Any) -> str:
        assert finetune(tmp_path / "run", *arguments, **replaced) == 2
        assert not (tmp_path / "run").exists()
        captured = capsys.readouterr().err
        assert captured.count("\n") == 1
        return captured

    assert "--data './missing.jsonl' does not exist" in refusal(data="./missing.jsonl")
    assert "missing' does not exist" in refusal(model=tmp_path / "missing")
    assert "holds no config.json: it is not a Transformers model" in refusal(model=tmp_path)
    (tmp_path / "weights.bin").touch()
    assert "is a file; give the model's folder" in refusal(model=tmp_path / "weights.bin")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base / "config.json", bare)
    assert "holds no tokenizer" in refusal(model=bare)
    small = tmp_path / "small"
    config = AutoConfig.from_pretrained(base)
    config.vocab_size = 10
    config.save_pretrained(small)
    tokenizer.save_pretrained(small)
    assert "but the model has only 10: they do not belong together" in refusal(model=small)
    assert "target_modules=('c_attn',) matches no linear layer of the model; candidates" in refusal(
        "--target-modules", "c_attn"
    )


def test_missing_libraries_are_named_with_the_fix(
    tmp_path: Path, finetune: Finetune, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = options.importlib.util.find_spec
    absent = {"transformers", "accelerate"}
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None if name in absent else installed(name))
    assert finetune(tmp_path / "run") == 2
    assert capsys.readouterr().err == (
        'reslora: error: transformers and accelerate are not installed; run: pip install "reslora_kernels[hf]"\n'
    )


def test_divergence_is_reported_and_no_adapter_is_saved(
    tmp_path: Path, finetune: Finetune, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(tmp_path / "run", "--learning-rate", "inf") == 2
    assert "training diverged" in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.slow
def test_a_quantised_model_trains_and_resumes(base: Path, tmp_path: Path, finetune: Finetune) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map="cpu").save_pretrained(
        tmp_path / "nf4"
    )
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "nf4")
    out = tmp_path / "run"
    assert finetune(out, "--device", "cpu", "--merge", model=tmp_path / "nf4") == 2  # at once, not after the training
    assert not out.exists()
    assert finetune(out, "--device", "cpu", model=tmp_path / "nf4") == 0
    last = adapter_of(out)
    shutil.rmtree(out / "checkpoint-6")
    assert finetune(out, "--device", "cpu", "--resume", model=tmp_path / "nf4") == 0
    assert all(torch.equal(tensor, last[name]) for name, tensor in adapter_of(out).items())


COMMON = ["--device", "cpu", "--learning-rate", "0.01", "--shortcut", "input", "--target-modules", "q_proj,v_proj"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    lines = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}"} for i in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def words(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["finetune", "--model", str(base), "--data", str(data), "--output-dir", str(out), *COMMON, *more]


def newest_checkpoint(out: Path) -> int:
    return max(
        (int(state.parent.name.split("-")[1]) for state in out.glob("checkpoint-*/trainer_state.json")), default=0
    )


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_the_same_batches(base: Path, sums: Path, tmp_path: Path) -> None:
    """The first process writes, both train; resuming needs as many processes again."""
    options = ["--max-steps", "6", "--save-steps", "3", "--eval-fraction", "0.2", "--merge", "--export"]
    one, two = (words(base, sums, tmp_path / name, *options) for name in ("one", "two"))
    assert main([*one, "--per-device-train-batch-size", "4"]) == 0
    two += ["--per-device-train-batch-size", "2"]
    printed = run_command([*TORCHRUN, "-m", "reslora_kernels", *two])
    assert printed.count("layers adapted in") == 1

    single, double = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    assert single.keys() == double.keys()
    largest = max(float(tensor.abs().max()) for tensor in single.values())
    assert max(max_error(double[name], tensor) for name, tensor in single.items()) < 1e-5 * largest
    records = [json.loads((tmp_path / name / "finetune.json").read_text()) for name in ("one", "two")]
    assert [record["settings"]["processes"] for record in records] == [1, 2]
    for name, loss in records[0]["losses"].items():
        assert records[1]["losses"][name] == pytest.approx(loss, abs=2e-3), name  # merges calibrate on other batches
    assert records[1]["losses"]["train_last"] < records[1]["losses"]["train_first"]
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())
    assert main([*two, "--resume"]) == 2


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_ends_bit_for_bit_the_same(base: Path, sums: Path, tmp_path: Path) -> None:
    options = ["--max-steps", "60", "--save-steps", "4", "--per-device-train-batch-size", "2", "--lora-dropout", "0.1"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert main(words(base, sums, straight, *options)) == 0
    arguments = words(base, sums, killed, *options)
    process = subprocess.Popen(
        [sys.executable, "-m", "reslora_kernels", *arguments],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    after, delay, deadline = random.randrange(4, 48), random.uniform(0, 0.05), time.monotonic() + 120
    while newest_checkpoint(killed) < after and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main([*arguments, "--resume"]) == 0
    expected, actual = adapter_of(straight), adapter_of(killed)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items()), (
        f"killed {delay} s after step {after}"
    )
