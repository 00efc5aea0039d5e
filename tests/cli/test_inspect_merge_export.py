"""``reslora inspect``, ``merge`` and ``export`` on a small saved model and adapters: results, and every refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from reslora_kernels import ResLoRAConfig, apply_reslora, load_adapter, save_adapter
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.cli import main, merge
from reslora_kernels.cli import options as shared_options
from reslora_kernels.cli.options import parse_names

RUN = ", confirmed by a run"
if not hasattr(transformers.utils.generic, "maybe_autocast"):  # the rotary embeddings of 4.56 ask autocast for "meta"
    RUN = "; a run with derived inputs failed (RuntimeError: unsupported scalarType"
WITHOUT_WEIGHTS = f"the structure{RUN}"


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def make_adapter(base: Path, folder: Path, shortcut: str) -> Path:
    """A saved adapter with an effect."""
    torch.manual_seed(1)
    config = ResLoRAConfig(r=4, shortcut=shortcut, target_modules=["q_proj", "v_proj"])  # type: ignore[arg-type]
    model = apply_reslora(load(base), config)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    return save_adapter(model, folder)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(base, folder / name, name) for name in ("block", "input", "middle")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    lines = [
        json.dumps({"text": f"Two plus {i} is {i + 2}, and the quick brown fox jumps over it."}) for i in range(40)
    ]
    path.write_text("\n".join(lines))
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(2, 40).unsqueeze(0)).logits


# --- inspect ---------------------------------------------------------------------------------------------------------


def inspect_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main(["inspect", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_needs_the_configuration_alone(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of 70 billion parameters, of which only config.json is there."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    found = inspect_json(capsys, str(tmp_path), "--shortcut", "middle", "--target-modules", "q_proj,down_proj")
    assert found["total_parameters"] > 70e9
    assert found["order"].startswith(WITHOUT_WEIGHTS)
    assert [row["position"] for row in found["layers"]] == [*range(80), *range(80)]
    assert {row["chain"] for row in found["layers"]} == {
        "model.layers.*.self_attn.q_proj",
        "model.layers.*.mlp.down_proj",
    }
    assert {row["chain_length"] for row in found["layers"]} == {80}


def test_inspect_shows_tables(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(base), "--shortcut", "input", "--target-modules", "q_proj"]) == 0
    printed = capsys.readouterr().out
    assert "shortcut 'input'" in printed
    assert f"chains from {WITHOUT_WEIGHTS}" in printed
    assert "model.layers.2.self_attn.q_proj" in printed
    assert "3 of 3" in printed
    assert "not in target_modules" in printed
    assert "trainable parameters: 1,536 of" in printed


def test_inspect_matches_as_the_config_does(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--target-modules", r".*\.(q|k)_proj", "--exclude-modules", "k_proj", "--layers-to-transform", "0,2"]
    found = inspect_json(capsys, str(base), *options, "--r", "2")
    assert [row["name"] for row in found["layers"]] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 2)]
    reasons = dict(found["unmatched"])
    assert reasons["model.layers.1.self_attn.q_proj"] == "layer index 1 is not in layers_to_transform"
    assert reasons["lm_head"] == "not in target_modules"


@pytest.mark.parametrize("device", [[], ["--device", "cpu"]])
def test_inspect_an_adapter(
    device: list[str], base: Path, adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspect_json(capsys, str(base), "--adapter", str(adapters["middle"]), *device)
    assert found["shortcut"] == "middle"
    assert found["order"].startswith("adapter file" if device else WITHOUT_WEIGHTS)
    assert {(row["chain"], row["r"], row["chain_length"]) for row in found["layers"]} == {
        ("model.layers.*.self_attn.q_proj", 4, 3),
        ("model.layers.*.self_attn.v_proj", 4, 3),
    }


def test_inspect_a_model_that_is_no_causal_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import RobertaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    RobertaConfig(**sizes, vocab_size=99, architectures=["RobertaForSequenceClassification"]).save_pretrained(tmp_path)
    found = inspect_json(capsys, str(tmp_path), "--target-modules", "query,out_proj")
    assert [row["name"] for row in found["layers"]] == [
        "roberta.encoder.layer.0.attention.self.query",
        "roberta.encoder.layer.1.attention.self.query",
        "classifier.out_proj",
    ]


def test_names_on_the_command_line_mean_what_they_do_in_python() -> None:
    assert parse_names("all-linear") == "all-linear"
    assert parse_names("q_proj") == ("q_proj",)
    assert parse_names("q_proj, model.layers.0.v_proj,") == ("q_proj", "model.layers.0.v_proj")
    assert parse_names(r".*\.(q|v)_proj") == r".*\.(q|v)_proj"
    assert parse_names("x{1,2}") == "x{1,2}"


# --- merge and export ------------------------------------------------------------------------------------------------


def test_merged_block_model_equals_the_adapted_one(
    base: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    out, of_images = tmp_path / "new" / "merged", tmp_path / "of images"
    shutil.copytree(base, of_images)
    (of_images / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    assert main(["merge", str(adapters["block"]), "--base", str(of_images), "--out", str(out)]) == 0
    assert (out / "preprocessor_config.json").read_bytes() == (of_images / "preprocessor_config.json").read_bytes()
    printed = capsys.readouterr().out
    assert "model.layers.2.self_attn.v_proj" in printed
    assert "exact" in printed
    adapted = load_adapter(load(base), adapters["block"])
    torch.testing.assert_close(logits(load(out)), logits(adapted), rtol=1e-4, atol=1e-5)
    assert not any("lora_" in name for name in load(out).state_dict())
    assert AutoTokenizer.from_pretrained(out)("two plus two")["input_ids"]
    assert [path.name for path in out.parent.iterdir()] == ["merged"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(["--sequential", "--extra-rank", "2", "--joint-steps", "4"], marks=pytest.mark.slow),
        ["--method", "input"],
    ],
    ids=lambda o: " ".join(o) or "default",
)
def test_export_is_the_merged_model(
    options: list[str],
    base: Path,
    adapters: dict[str, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from peft import PeftModel

    common = [str(adapters["middle"]), "--base", str(base), "--data", str(data), *options]
    assert main(["merge", *common, "--out", str(tmp_path / "merged")]) == 0
    method = {"input": "input", "4": "joint"}.get(options[-1], "least_squares") if options else "least_squares"
    assert f" {method} " in capsys.readouterr().out
    assert main(["export", *common, "--out", str(tmp_path / "peft")]) == 0
    printed = capsys.readouterr().out
    assert f"max_lora_rank a server needs: {6 if method == 'joint' else 4}" in printed
    assert str(tmp_path / "peft") in printed
    assert ".reslora-" not in (tmp_path / "peft/README.md").read_text()  # where it was written before it was whole
    served = PeftModel.from_pretrained(load(base), tmp_path / "peft")
    torch.testing.assert_close(logits(served), logits(load(tmp_path / "merged")), rtol=1e-4, atol=1e-5)
    plain, adapted = logits(load(base)), logits(load_adapter(load(base), adapters["middle"]))
    assert (logits(served) - adapted).norm() < (plain - adapted).norm()


def test_exact_ranks_through_the_pattern(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["export", str(adapters["block"]), "--base", str(base), "--out", str(tmp_path / "peft"), "--pattern"]
    assert main(arguments) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert set(config["rank_pattern"].values()) == {4}


def test_input_merges_by_weights_without_data(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["merge", str(adapters["input"]), "--base", str(base), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--method", "weights"]) == 0


def test_half_precision_is_kept(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    common = ["--base", str(base), "--out", str(tmp_path / "out"), "--torch-dtype", "bfloat16"]
    assert main(["merge", str(adapters["block"]), *common]) == 0
    assert {tensor.dtype for tensor in load(tmp_path / "out").state_dict().values()} == {torch.bfloat16}


def test_overwrite_replaces_what_the_command_wrote_only(
    base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    arguments = ["merge", str(adapters["block"]), "--base", str(base), "--out", str(out)]
    assert main(arguments) == 0
    (out / "stale.txt").touch()
    assert main(arguments) == 2
    assert "is not empty; give another folder, or --overwrite to replace it" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert not (out / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.chdir(out)  # and stays there
    assert main([*arguments[:-1], ".", "--overwrite"]) == 0
    assert Path("config.json").is_file()
    monkeypatch.chdir(tmp_path)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").touch()
    assert main([*arguments[:-1], str(foreign), "--overwrite"]) == 2
    assert "is not replaced: it holds no config.json" in capsys.readouterr().err
    assert main([*arguments[:-1], str(base), "--overwrite"]) == 2
    assert "which is read; give another folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["merge", "export"])
@pytest.mark.parametrize(
    ("shortcut", "options", "message"),
    [
        ("middle", [], "needs calibration data: give --data with some of the training data"),
        ("input", [], "or --method weights, which needs none"),
        ("input", ["--method", "average"], "--method must be one of input, weights, least_squares, got 'average'"),
        ("input", ["--method", "input", "--sequential", "--data", "x"], "--sequential needs --method least_squares"),
        ("middle", ["--method", "input", "--joint-steps", "4", "--data", "x"], "--joint-steps needs --method least_"),
        ("middle", ["--extra-rank", "4", "--data", "x"], "--extra-rank 4 needs --joint-steps"),
        ("middle", ["--data", "./missing.jsonl"], "--data './missing.jsonl' does not exist"),
        ("middle", ["--device", "tpu"], "--device must be one of"),
        ("middle", ["--torch-dtype", "int4"], "--torch-dtype must be one of"),
    ],
)
def test_refused_before_the_model_is_loaded(
    command: str,
    shortcut: str,
    options: list[str],
    message: str,
    base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_options, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    arguments = [command, str(adapters[shortcut]), "--base", str(base), "--out", str(tmp_path / "out"), *options]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("reslora: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else(
    base: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*arguments: str) -> str:
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    block = str(adapters["block"])
    assert "holds no reslora_config.json: it is not a ResLoRA adapter" in refusal(
        "merge", str(base), "--base", str(base)
    )
    assert "does not exist or is not a folder" in refusal("merge", "./nowhere", "--base", str(base))
    assert "holds no config.json: it is not a Transformers model; it is an adapter: give the base" in refusal(
        "merge", block, "--base", block
    )
    assert "Missing option '--base'" in refusal("merge", block)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "reslora_config.json").write_text("{")
    assert "is not valid JSON" in refusal("export", str(damaged), "--base", str(base))
    for name in ("reslora_config.json", "reslora_model.safetensors"):
        (damaged / name).write_bytes((adapters["block"] / name).read_bytes())
    (damaged / "reslora_model.safetensors").write_bytes(b"\0" * 100)
    assert "does not have the SHA-256" in refusal("export", str(damaged), "--base", str(base))


@pytest.mark.parametrize("name", ["merge", "export"])
def test_failure_while_writing_leaves_nothing(
    name: str, base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(merge, "save_merged", full)
    monkeypatch.setattr(merge, "export_peft", full)
    assert main([name, str(adapters["block"]), "--base", str(base), "--out", str(tmp_path / "out")]) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_class_is_the_one_whose_layers_the_adapter_has(base: Path, tmp_path: Path) -> None:
    """``finetune`` loads the causal model of a checkpoint, also of one whose config names another class (Qwen3.5)."""
    load(base).model.save_pretrained(tmp_path / "headless")
    assert json.loads((tmp_path / "headless" / "config.json").read_text())["architectures"] == ["LlamaModel"]
    of_causal = make_adapter(base, tmp_path / "of-causal", "block")
    model = apply_reslora(load(base).model, ResLoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
    of_own = save_adapter(model, tmp_path / "of-own")
    for adapter, name in ((of_causal, "LlamaForCausalLM"), (of_own, "LlamaModel")):
        out = tmp_path / name
        assert main(["merge", str(adapter), "--base", str(tmp_path / "headless"), "--out", str(out)]) == 0
        assert json.loads((out / "config.json").read_text())["architectures"] == [name]


def test_inspect_shows_the_chains_of_the_file(
    base: Path, tmp_path: Path, adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]
    model = apply_reslora(load(base), ResLoRAConfig(r=4, target_modules=["q_proj"]), chains=[names[:1], names[1:]])
    save_adapter(model, tmp_path / "by-hand")
    found = inspect_json(capsys, str(base), "--adapter", str(tmp_path / "by-hand"))
    assert [row["position"] for row in found["layers"]] == [0, 0, 1]
    small = load(base).model
    small.layers = small.layers[:2]
    small.config.num_hidden_layers = 2
    small.save_pretrained(tmp_path / "small")
    assert main(["inspect", str(tmp_path / "small"), "--adapter", str(adapters["block"])]) == 2
    assert "the adapter does not fit the model" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["merge", "export"])
def test_files_that_are_no_models_are_not_replaced(
    command: str, base: Path, tmp_path: Path, adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, str(adapters["block"]), "--base", str(base), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0 and main([*arguments, "--overwrite"]) == 0
    (tmp_path / "out" / "train.py").write_text("mine")
    assert main([*arguments, "--overwrite"]) == 2
    assert "is not replaced: it holds 'train.py'" in capsys.readouterr().err
    (tmp_path / "out" / "train.py").unlink()
    shutil.copy(base / "config.json", tmp_path / "out" / "d.txt")
    assert main([*arguments, "--overwrite", "--data", str(tmp_path / "out" / "d.txt")]) == 2
    assert "d.txt', which is read; give another folder" in capsys.readouterr().err
