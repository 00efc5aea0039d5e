"""Adapters on disk: round trips, damaged and hostile files, saves that are killed."""

from __future__ import annotations

import ast
import copy
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

import reslora_kernels
from reslora_kernels import apply_reslora, inspect, load_adapter, merge_reslora, save_adapter, unmerge_reslora
from reslora_kernels.files.adapter_format import CONFIG_NAME, WEIGHTS_NAME

from .models import Scrambled, llama, randomize, roberta, t5
from .test_damaged_adapters import X, adapted, assert_unchanged, config, put_weights, rewrite, state

SHORTCUTS = ("none", "input", "block", "middle")
TOKENS = torch.arange(3, 17).reshape(2, 7)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_adapter(adapted(), tmp_path / "adapter")


class TestRoundTrip:
    @pytest.mark.parametrize("shortcut", SHORTCUTS)
    @pytest.mark.parametrize("make", [llama, t5, roberta], ids=["llama", "t5", "roberta"])
    def test_logits_are_bit_equal(self, make: Callable[[], nn.Module], shortcut: str, tmp_path: Path) -> None:
        def logits(model: nn.Module) -> Tensor:
            decoder = {"decoder_input_ids": TOKENS[:, :4]} if make is t5 else {}
            with torch.no_grad():
                return model(TOKENS, **decoder).logits

        model = randomize(apply_reslora(make(), config(shortcut)))
        assert save_adapter(model, tmp_path) == tmp_path
        plain = load_adapter(make(), tmp_path)
        other = load_adapter(randomize(apply_reslora(make(), config(shortcut)), seed=7), str(tmp_path))
        assert torch.equal(logits(plain), logits(model))
        assert torch.equal(logits(other), logits(model))
        assert inspect(plain).order == "adapter file"
        assert inspect(plain).layers == inspect(model).layers
        assert inspect(plain).trainable_parameters == inspect(model).trainable_parameters

    @pytest.mark.parametrize("shortcut", SHORTCUTS)
    def test_custom_module_needs_no_second_dry_run(self, shortcut: str, tmp_path: Path) -> None:
        model = adapted(shortcut=shortcut)
        again = load_adapter(Scrambled(), save_adapter(model, tmp_path))
        assert torch.equal(again(X), model(X))

    @pytest.mark.parametrize("bias", ["lora_only", "all"])
    def test_biases(self, bias: str, tmp_path: Path) -> None:
        model = randomize(apply_reslora(roberta(), config(bias=bias, target_modules=["query", "value"])))
        with torch.no_grad():
            biases = [p.add_(0.25) for p in model.parameters() if p.requires_grad and p.dim() == 1]
        assert biases
        save_adapter(model, tmp_path)
        again = load_adapter(roberta(), tmp_path)
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {name for name, p in again.named_parameters() if p.requires_grad} == trainable

    def test_unfrozen_head(self, tmp_path: Path) -> None:
        model = randomize(apply_reslora(roberta(), config(target_modules=["query", "value"])))
        model.classifier.requires_grad_(True)
        with torch.no_grad():
            for parameter in model.classifier.parameters():
                parameter.mul_(1.5)
        save_adapter(model, tmp_path)
        for again in (roberta(), apply_reslora(roberta(), config(target_modules=["query", "value"]))):
            load_adapter(again, tmp_path)
            assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
            assert all(p.requires_grad for p in again.classifier.parameters())

    def test_merged_model_saves_its_adapters_and_takes_none(self, saved: Path, tmp_path: Path) -> None:
        model = adapted()
        merge_reslora(model, calibration=[X])
        again = load_adapter(Scrambled(), save_adapter(model, tmp_path / "merged"))
        before = state(model)
        with pytest.raises(ValueError, match="unmerge_reslora"):
            load_adapter(model, saved)
        assert_unchanged(model, before)
        assert torch.equal(again(X), unmerge_reslora(model)(X))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision_base(self, dtype: torch.dtype, tmp_path: Path) -> None:
        x = X.to(dtype)
        model = randomize(apply_reslora(Scrambled(dtype=dtype), config(), example_inputs=x))
        again = load_adapter(Scrambled(dtype=dtype), save_adapter(model, tmp_path))
        assert again.out.lora_A.dtype == torch.float32
        assert torch.equal(again(x), model(x))

    def test_model_with_a_part_called_module(self, tmp_path: Path) -> None:
        """A real name, not the prefix of a wrapper."""

        class Holder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.module = Scrambled()

            def forward(self, x: Tensor) -> Tensor:
                return self.module(x)

        model = randomize(apply_reslora(Holder(), config(bias="all"), example_inputs=X))
        again = load_adapter(Holder(), save_adapter(model, tmp_path))
        assert torch.equal(again(X), model(X))
        assert torch.equal(load_adapter(again, tmp_path)(X), model(X))

    def test_wrapped_model(self, tmp_path: Path) -> None:
        class Wrapper(nn.Module):  # DDP's naming, without a process group
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

        model = adapted(bias="all")
        save_adapter(Wrapper(model), tmp_path)
        other = adapted(seed=3, bias="all")
        load_adapter(Wrapper(other), tmp_path)
        assert torch.equal(other(X), model(X))
        assert torch.equal(load_adapter(Scrambled(), tmp_path)(X), model(X))

    @pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
    def test_prefixes_of_wrappers_in_a_file_are_stripped(self, prefix: str, tmp_path: Path) -> None:
        folder = save_adapter(adapted(bias="lora_only"), tmp_path)

        def rename(values: dict[str, Any]) -> None:
            values["trained_parameters"] = [prefix + name for name in values["trained_parameters"]]
            for chain in values["chains"]:
                chain["layers"] = [prefix + name for name in chain["layers"]]

        rewrite(folder, rename)
        put_weights(folder, save({prefix + key: value for key, value in load_file(folder / WEIGHTS_NAME).items()}))
        for model in (Scrambled(), adapted(seed=5, bias="lora_only")):
            assert torch.equal(load_adapter(model, folder)(X), adapted()(X))


class TestMismatch:
    """The adapter is sound but not this model's: nothing changes."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"r": 5}, "r=5"),
            ({"shortcut": "middle"}, "shortcut='middle'"),
            ({"lora_alpha": 12}, "lora_alpha=12"),
            ({"pre_num": 1}, "pre_num=1"),
            ({"use_rslora": True}, "use_rslora=True"),
            ({"target_modules": ["fc"]}, "other layers"),
            ({"target_modules": ["out"]}, "other layers"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_other_adapters(self, saved: Path, changes: dict[str, Any], message: str) -> None:
        model = adapted(**changes)
        before = state(model)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, saved)
        assert_unchanged(model, before)

    def test_other_model(self, saved: Path) -> None:
        for model in (Scrambled(width=16), nn.Sequential(nn.Linear(4, 4))):
            before = state(model)
            with pytest.raises(ValueError, match=r"lora_[AB]|layers missing"):
                load_adapter(model, saved)
            assert_unchanged(model, before)

    def test_other_order(self, saved: Path) -> None:
        rewrite(saved, lambda values: [chain["layers"].reverse() for chain in values["chains"]])
        model = adapted()
        before = state(model)
        with pytest.raises(ValueError, match="another order"):
            load_adapter(model, saved)
        assert_unchanged(model, before)

    def test_model_without_values(self, saved: Path) -> None:
        with pytest.raises(ValueError, match="meta"):
            load_adapter(Scrambled().to("meta"), saved)
        with pytest.raises(ValueError, match="meta"):
            save_adapter(adapted().to("meta"), saved)
        assert torch.equal(load_adapter(Scrambled(), saved)(X), adapted()(X))


class TestSave:
    def test_mode_follows_the_umask(self, tmp_path: Path) -> None:
        for umask in (0o022, 0o077):
            before = os.umask(umask)
            try:
                folder = save_adapter(adapted(), tmp_path / str(umask))
            finally:
                os.umask(before)
            assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}
            assert folder.stat().st_mode & 0o777 == 0o777 & ~umask

    def test_other_files_stay_and_nothing_is_left_over(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        for seed in (1, 2):
            save_adapter(adapted(seed), tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", CONFIG_NAME, WEIGHTS_NAME}
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert torch.equal(load_adapter(Scrambled(), tmp_path)(X), adapted(2)(X))

    def test_failed_write_keeps_the_previous_adapter(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                save_adapter(adapted(seed=2), saved)
        assert torch.equal(load_adapter(Scrambled(), saved)(X), adapted()(X))

    def test_save_killed_after_one_that_was_killed_too(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second must not write over the weights that the first left under their temporary name."""
        real = os.replace

        def die_before(name: str) -> Callable[..., None]:
            def replace(source: Path, target: Path) -> None:
                if Path(target).name == name:
                    raise KeyboardInterrupt
                real(source, target)

            return replace

        for seed, name in ((2, WEIGHTS_NAME), (3, CONFIG_NAME)):  # after the commit, then before it
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(os, "replace", die_before(name))
                save_adapter(adapted(seed), saved)
            if seed == 3:  # what a killed process had written of its weights
                pending = saved / "reslora_model.pending.safetensors"
                pending.write_bytes(pending.read_bytes()[:100])
            assert torch.equal(load_adapter(Scrambled(), saved)(X), adapted(2)(X))
        save_adapter(adapted(4), saved)
        assert torch.equal(load_adapter(Scrambled(), saved)(X), adapted(4)(X))

    @pytest.mark.slow
    @pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
    def test_killed_at_any_moment(self, tmp_path: Path) -> None:
        """kill -9 in the middle of saving versions 1, 2, ... over each other: one of them loads, whole."""
        script = tmp_path / "saver.py"
        script.write_text(
            "import sys, torch\n"
            "from torch import nn\n"
            "from reslora_kernels import *\n"
            "torch.set_num_threads(1)\n"
            "model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))\n"
            "config = ResLoRAConfig(r=64, shortcut='input')\n"
            "apply_reslora(model, config, example_inputs=torch.zeros(1, 64))\n"
            "version = int(sys.argv[2])\n"
            "while True:\n"
            "    version += 1\n"
            "    for layer in model:\n"
            "        nn.init.constant_(layer.lora_A, version)\n"
            "        nn.init.constant_(layer.lora_B, -version)\n"
            "    save_adapter(model, sys.argv[1])\n"
            "    print(version, flush=True)\n"
        )
        folder, generator, last = tmp_path / "adapter", random.Random(0), 0
        environment = os.environ | {"PYTHONPATH": str(Path(reslora_kernels.__file__).parents[1])}
        for _ in range(4):
            command = [sys.executable, str(script), str(folder), str(last)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
                assert process.stdout is not None
                finished = int(process.stdout.readline())
                time.sleep(generator.random() * 0.1)
                process.send_signal(signal.SIGKILL)
                finished = int(([str(finished), *process.stdout.read().split()])[-1])
            model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
            load_adapter(model, folder)
            values = {float(sign * value) for layer in model for sign, p in ((1, layer.lora_A), (-1, layer.lora_B))
                      for value in p.detach().unique()}  # fmt: skip
            assert len(values) == 1
            (last,) = map(int, values)
            assert last in (finished, finished + 1)


def test_copy_of_a_loaded_model_saves_the_same_files(saved: Path, tmp_path: Path) -> None:
    model = copy.deepcopy(load_adapter(Scrambled(), saved))
    again = save_adapter(model, tmp_path / "again")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_another_programs_tensors_of_another_dtype_are_converted(saved: Path) -> None:
    tensors = {key: value.half() for key, value in load_file(saved / WEIGHTS_NAME).items()}
    save_file(tensors, saved / WEIGHTS_NAME)
    put_weights(saved, (saved / WEIGHTS_NAME).read_bytes())
    model = load_adapter(Scrambled(), saved)
    assert model.out.lora_A.dtype == torch.float64
    assert torch.equal(model.out.lora_A, tensors["out.lora_A"].double())


def test_package_never_unpickles() -> None:
    """It writes one such file, the Trainer's own arguments, and reads none."""
    source = Path(reslora_kernels.__file__).parent
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    found = []
    for path in sorted(source.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                bad = bool(modules & {alias.name.split(".")[0] for alias in node.names})
            elif isinstance(node, ast.ImportFrom):
                bad = (node.module or "").split(".")[0] in modules
            else:
                bad = isinstance(node, ast.Call) and ast.unparse(node.func) in {
                    "torch.load",
                    "torch.save",
                    "eval",
                    "exec",
                }
            if bad:
                found.append(f"{path.relative_to(source)}: {ast.unparse(node)}")
    assert found == ["training/trainer.py: torch.save(self.args, folder / 'training_args.bin')"]
