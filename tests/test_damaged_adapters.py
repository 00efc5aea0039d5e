"""Damaged and hostile adapter files: a clear error, and the model as it was; what other tests tamper with files by."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, apply_reslora, inspect, load_adapter, save_adapter
from reslora_kernels.files.adapter_format import CONFIG_NAME, WEIGHTS_NAME

from .models import Scrambled, randomize

X = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(3, 12)


def config(shortcut: str = "input", **changes: Any) -> ResLoRAConfig:
    return ResLoRAConfig(**({"r": 3, "lora_alpha": 6, "shortcut": shortcut, "pre_num": 2} | changes))


def adapted(seed: int = 1, **changes: Any) -> nn.Module:
    return randomize(apply_reslora(Scrambled(), config(**changes), example_inputs=X), seed)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything a failed load must leave alone."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "training": [module.training for module in model.modules()],
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "coverage": inspect(model) if "_reslora" in vars(model) else None,
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    values, expected = after.pop("values"), before["values"]
    assert after == {key: value for key, value in before.items() if key != "values"}
    assert values.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in values.items())


def refused(folder: Path, message: str | None = None, error: type[Exception] = ValueError, **changes: Any) -> None:
    """The folder is refused by a plain and by an adapted model, and both stay as they were."""
    for model in (Scrambled(), adapted(seed=9, **changes)):
        before = state(model)
        with pytest.raises(error, match=message) as caught:
            load_adapter(model, folder)
        assert str(caught.value)
        assert_unchanged(model, before)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the config as JSON."""
    values = json.loads((folder / CONFIG_NAME).read_text())
    change(values)
    (folder / CONFIG_NAME).write_text(json.dumps(values))


def put_weights(folder: Path, content: bytes) -> None:
    """Other weights under a config that vouches for them."""
    (folder / WEIGHTS_NAME).write_bytes(content)
    rewrite(folder, lambda values: values.update(weights_sha256=hashlib.sha256(content).hexdigest()))


def put_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    put_weights(folder, save(tensors))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_adapter(adapted(), tmp_path / "adapter")


def _set(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update(changes)


def _set_config(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["config"].update(changes)


CONFIG_FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "other format": _set(format="peft"),
    "newer version": _set(format_version=2),
    "unknown key": _set(extra=1),
    "missing key": lambda values: values.pop("chains"),
    "config is a list": _set(config=[1]),
    "unknown field": _set_config(rank=4),
    "missing field": lambda values: values["config"].pop("shortcut"),
    "wrong type of field": _set_config(r="3"),
    "value out of range": _set_config(lora_dropout=1.5),
    "huge alpha": _set_config(lora_alpha=10**400),
    "bad regular expression": _set_config(target_modules="(q"),
    "regular expression that overflows": _set_config(target_modules="a{99999999999999999999}"),
    "backend that is a module name": _set_config(backend="os"),
    "trained is a dict": _set(trained_parameters={"out.bias": 1}),
    "trained holds numbers": _set(trained_parameters=[3]),
    "trained with ..": _set(trained_parameters=["../out.bias"]),
    "trained absolute": _set(trained_parameters=["/etc/passwd"]),
    "trained without values": _set(trained_parameters=["out.bias"]),
    "chains is a str": _set(chains="fc"),
    "chains empty": _set(chains=[]),
    "chain without layers": _set(chains=[{"name": "fc", "layers": []}]),
    "chain with a stranger": lambda values: values["chains"][0]["layers"].append("../x"),
    "chain with a layer twice": lambda values: values["chains"][0]["layers"].append("blocks.0.fc"),
    "chain short of a layer": lambda values: values["chains"][0]["layers"].pop(),
    "chain of unlike layers": _set(chains=[{"name": "all", "layers": ["out", *(f"blocks.{n}.fc" for n in (2, 0, 1))]}]),
    "hash is a number": _set(weights_sha256=5),
    "hash of other weights": _set(weights_sha256="0" * 64),
}  # fmt: skip


class TestDamage:
    @pytest.mark.parametrize("fault", CONFIG_FAULTS)
    def test_config(self, saved: Path, fault: str) -> None:
        rewrite(saved, CONFIG_FAULTS[fault])
        refused(saved)

    @pytest.mark.parametrize(
        "text",
        [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"format": "reslora", "format": "reslora"}', b"[" * 100_000],
        ids=["empty", "cut", "list", "null", "not UTF-8", "duplicate key", "deep"],
    )
    def test_config_that_is_no_object(self, saved: Path, text: bytes) -> None:
        (saved / CONFIG_NAME).write_bytes(text)
        refused(saved, CONFIG_NAME.replace(".", r"\.") if b"format" not in text else "given twice")

    def test_duplicate_key_inside_the_config(self, saved: Path) -> None:
        text = (saved / CONFIG_NAME).read_text()
        (saved / CONFIG_NAME).write_text(text.replace('"r": 3,', '"r": 3, "r": 3,'))
        refused(saved, "'r' is given twice")

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (lambda t: t.pop("out.lora_A"), "out.lora_A"),
            (lambda t: t.update({"blocks.0.fc.lora_C": torch.zeros(1)}), "blocks.0.fc.lora_C"),
            (lambda t: t.update({"../../x.lora_A": torch.zeros(3, 12)}), "x"),
            (lambda t: t.update({"/tmp/x.lora_A": torch.zeros(3, 12)}), "x"),
            (lambda t: t.update({"out.weight": torch.zeros(5, 12)}), "out.weight"),
            (lambda t: t.update({"out.lora_A": torch.zeros(12, 3)}), "out.lora_A"),
            (lambda t: t.update({"out.lora_A": torch.zeros(3, 12, dtype=torch.int32)}), "out.lora_A"),
            (lambda t: t.update({"out.lora_A": torch.zeros(3, 12, dtype=torch.bool)}), "out.lora_A"),
            (lambda t: t.update({"out.lora_A": torch.zeros(3, 12).to(torch.float8_e4m3fn)}), "out.lora_A"),
            pytest.param(
                lambda t: t.update({"out.lora_A": torch.zeros(3, 12, dtype=torch.complex64)}), "out.lora_A",
                marks=pytest.mark.skipif(safetensors.__version__ < "0.7", reason="it knows no complex numbers"),
            ),
            (lambda t: t["out.lora_A"].fill_(float("nan")), "NaN"),
            (lambda t: t["out.lora_B"].fill_(float("inf")), "Inf"),
            (lambda t: t.update({"_orig_mod.out.lora_A": t["out.lora_A"].clone()}), "prefix"),
            (lambda t: t.clear(), "layers missing"),
        ],
        ids=["missing", "foreign kind", "..", "absolute", "base weight", "transposed", "int", "bool", "float8",
             "complex", "NaN", "Inf", "prefix collision", "none at all"],
    )  # fmt: skip
    def test_tensors(self, saved: Path, fault: Callable[[dict[str, Tensor]], Any], message: str) -> None:
        put_tensors(saved, fault)
        refused(saved, re.escape(message))

    @pytest.mark.parametrize(
        "header",
        [
            b"", b"[]", b"3", b"{}", b'{"a": 1}', b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
            b'{"out.lora_A": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
            b'{"out.lora_A": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99999999]}}',
            b'{"out.lora_A": {"dtype": "F32"}}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}",
        ],
        ids=["empty", "list", "number", "no tensor", "not an object", "unknown dtype", "negative size",
             "outside the file", "incomplete", "deep", "long number"],
    )  # fmt: skip
    def test_header(self, saved: Path, header: bytes) -> None:
        put_weights(saved, len(header).to_bytes(8, "little") + header + bytes(4))
        refused(saved)

    def test_duplicate_tensor_in_the_header(self, saved: Path) -> None:
        content = (saved / WEIGHTS_NAME).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + length].rstrip()
        first = next(key for key in json.loads(header) if key != "__metadata__")
        entry = json.dumps({first: json.loads(header)[first]}).encode()
        header = header[:-1] + b"," + entry[1:]
        put_weights(saved, len(header).to_bytes(8, "little") + header + content[8 + length :])
        refused(saved, "given twice")

    @pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
    def test_missing_file(self, saved: Path, name: str) -> None:
        (saved / name).unlink()
        refused(saved, name, FileNotFoundError)

    @pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
    def test_folder_in_place_of_a_file(self, saved: Path, name: str) -> None:
        (saved / name).unlink()
        (saved / name).mkdir()
        refused(saved, f"{name} must be a regular file")

    def test_folder_that_is_none(self, saved: Path) -> None:
        refused(saved / "nowhere", "nowhere", FileNotFoundError)
        refused(saved / CONFIG_NAME, "must be a folder", NotADirectoryError)

    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data(), vouched=st.booleans(), name=st.sampled_from([CONFIG_NAME, WEIGHTS_NAME]))
    def test_any_damage_is_a_clear_error_and_changes_nothing(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, vouched: bool, name: str
    ) -> None:
        folder = tmp_path_factory.mktemp("damaged")
        save_adapter(adapted(), folder)
        content = bytearray((folder / name).read_bytes())
        if data.draw(st.booleans(), label="truncate"):
            content = content[: data.draw(st.integers(0, len(content) - 1), label="length")]
        else:
            reach = len(content) - 1 if name == CONFIG_NAME else 600  # the header: any tensor value is a value
            for at in data.draw(st.lists(st.integers(0, reach), min_size=1, max_size=4), label="at"):
                content[at] = data.draw(st.integers(0, 255), label="byte")
        model = Scrambled()
        before = state(model)
        if name == WEIGHTS_NAME and vouched:
            put_weights(folder, bytes(content))
        else:
            (folder / name).write_bytes(content)
        try:
            load_adapter(model, folder)
        except (ValueError, OSError) as error:
            assert str(error)
            assert_unchanged(model, before)
        else:  # the damage made no difference to JSON, or to a field that only describes
            model(X)
        finally:
            shutil.rmtree(folder)
