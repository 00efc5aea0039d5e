"""Wrong arguments to everything public: an error that names the argument and what is allowed, and nothing changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reslora_kernels import (
    ResLoRAConfig,
    ResLoRALinear,
    apply_reslora,
    collect_statistics,
    export_peft,
    inspect,
    link,
    load_adapter,
    merge_reslora,
    save_adapter,
    unmerge_reslora,
)
from reslora_kernels.ops import lora_linear

from .models import Scrambled, randomize

X = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(3, 12)


def adapted(shortcut: str = "input", **changes: Any) -> nn.Module:
    config = ResLoRAConfig(r=3, shortcut=shortcut, pre_num=2, **changes)
    return randomize(apply_reslora(Scrambled(), config, example_inputs=X))


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "types": [(name, type(module), module.training) for name, module in model.named_modules()],
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "record": str(inspect(model)) if "_reslora" in vars(model) else "",
        "observers": [getattr(m, "observer", None) for m in model.modules()],
    }


def raises(error: type[Exception], message: str, call: Callable[[], Any], *models: nn.Module) -> None:
    """The call raises exactly ``error`` with a message that matches, and the models stay as they were."""
    before = [snapshot(model) for model in models]
    with pytest.raises(error, match=message) as caught:
        call()
    assert caught.type is error
    assert [snapshot(model) for model in models] == before


class TestLayer:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (("3", 4), TypeError, "in_features must be an int, got '3'"),
            ((3, 4.0), TypeError, "out_features must be an int, got 4.0"),
            ((-1, 4), ValueError, "in_features .*-1"),
        ],
        ids=["str", "float", "negative"],
    )
    def test_sizes(self, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
        raises(error, message, lambda: ResLoRALinear(*arguments))

    def test_options(self) -> None:
        raises(TypeError, "config .*dict", lambda: ResLoRALinear(3, 4, config={"r": 3}))  # type: ignore[arg-type]
        raises(ValueError, r"dtype .*int32", lambda: ResLoRALinear(3, 4, dtype=torch.int32))
        raises(TypeError, "dtype .*'float32'", lambda: ResLoRALinear(3, 4, dtype="float32"))  # type: ignore[arg-type]

    def test_from_linear(self) -> None:
        linear, config = nn.Linear(3, 4), ResLoRAConfig()
        make = ResLoRALinear.from_linear
        raises(TypeError, "linear .*Bilinear", lambda: make(nn.Bilinear(2, 2, 2), config))  # type: ignore[arg-type]
        raises(TypeError, "linear .*ResLoRALinear", lambda: make(ResLoRALinear(3, 4), config))
        raises(TypeError, "config .*NoneType", lambda: make(linear, None), linear)  # type: ignore[arg-type]
        raises(ValueError, "adapter_dtype .*int8", lambda: make(linear, config, torch.int8), linear)

    @pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
    @pytest.mark.parametrize(
        "x", [torch.ones(2, 5), torch.ones(2, 3).double(), torch.ones(2, 3).int(), torch.tensor(1.0)],
        ids=["width", "dtype", "int", "scalar"],
    )  # fmt: skip
    def test_input(self, x: torch.Tensor, shortcut: str) -> None:
        layers = [ResLoRALinear(3, 3, config=ResLoRAConfig(r=2, shortcut=shortcut)) for _ in range(2)]
        chain = link(layers)
        with chain.forward_pass():
            raises(ValueError, r"x must .* got", lambda: layers[0](x), *layers)
        assert chain.passes.current() is None


class TestLink:
    def test_layers(self) -> None:
        config = ResLoRAConfig(r=2)
        a, b, wide = ResLoRALinear(3, 3, config=config), ResLoRALinear(3, 3, config=config), ResLoRALinear(3, 4)
        raises(ValueError, "layers .*none", lambda: link([]))
        raises(TypeError, r"layers\[1\] .*Linear", lambda: link([a, nn.Linear(3, 3)]), a)  # type: ignore[list-item]
        raises(ValueError, r"layers\[1\] has \(3, 4", lambda: link([a, wide]), a, wide)
        raises(ValueError, "same layer twice", lambda: link([a, a]), a)
        raises(TypeError, "root .*str", lambda: link([a, b], root="model"), a, b)  # type: ignore[arg-type]
        other = ResLoRALinear(3, 3, config=config.replace(shortcut="input"))
        raises(ValueError, "'input'", lambda: link([a, other]), a, other)
        assert a.chain is b.chain is other.chain is None
        link([a, b])
        raises(ValueError, r"layers\[0\] is already linked", lambda: link([b]), b)
        assert (b.position, len(b.chain or ())) == (1, 2)

    @pytest.mark.parametrize("shortcut", ["input", "middle"])
    def test_layer_outside_a_pass_names_both_ways_out(self, shortcut: str) -> None:
        layers = [ResLoRALinear(3, 3, config=ResLoRAConfig(r=2, shortcut=shortcut)) for _ in range(2)]
        link(layers)
        raises(RuntimeError, r"root=model.*forward_pass\(\)", lambda: layers[0](torch.ones(1, 3)), *layers)


class TestApply:
    def test_types(self) -> None:
        model, config = Scrambled(), ResLoRAConfig()
        apply: Any = apply_reslora
        raises(TypeError, "model .*str", lambda: apply("llama", config))
        raises(TypeError, "config .*dict", lambda: apply(model, {"r": 3}), model)
        raises(
            TypeError, "autocast_adapter_dtype .*'no'", lambda: apply(model, config, autocast_adapter_dtype="no"), model
        )

    @pytest.mark.parametrize(
        "inputs", [{"y": X}, (X, X), X[:, :5], "text", 3], ids=["dict", "tuple", "tensor", "str", "int"]
    )
    def test_example_inputs(self, inputs: Any) -> None:
        model = Scrambled()
        raises(
            ValueError,
            "example_inputs do not run",
            lambda: apply_reslora(model, ResLoRAConfig(), example_inputs=inputs),
            model,
        )

    @pytest.mark.parametrize(
        "changes",
        [
            {"target_modules": ["q_proj"]},
            {"target_modules": "fc"},
            {"exclude_modules": ".*"},
            {"layers_to_transform": 7},
        ],
        ids=str,
    )
    def test_no_match_lists_the_candidates(self, changes: dict[str, Any]) -> None:
        model, (field,) = Scrambled(), changes
        raises(
            ValueError,
            rf"{field}=.*candidates: fc \(3x.*out \(1x",
            lambda: apply_reslora(model, ResLoRAConfig(**changes)),
            model,
        )

    def test_unsuitable_models(self) -> None:
        normalisation = nn.Sequential(nn.BatchNorm2d(1), nn.Linear(2, 2))
        raises(ValueError, "no torch.nn.Linear", lambda: apply_reslora(nn.Sequential(nn.ReLU()), ResLoRAConfig()))
        raises(
            ValueError,
            "matches '0', a BatchNorm2d",
            lambda: apply_reslora(normalisation, ResLoRAConfig(target_modules=["0"])),
            normalisation,
        )
        raises(ValueError, "no parent", lambda: apply_reslora(nn.Linear(2, 2), ResLoRAConfig()))
        model = adapted()
        raises(ValueError, "already adapted", lambda: apply_reslora(model, ResLoRAConfig()), model)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="the backend may run there")
    def test_backend_that_cannot_run_here(self) -> None:
        model = Scrambled()
        config = ResLoRAConfig(backend="cuda")
        raises(RuntimeError, "backend 'cuda' cannot run here: .*'torch'", lambda: apply_reslora(model, config), model)


EVERY: dict[str, Callable[[Any, Path], Any]] = {
    "inspect": lambda model, path: inspect(model),
    "collect_statistics": lambda model, path: collect_statistics(model).__enter__(),
    "merge_reslora": lambda model, path: merge_reslora(model),
    "unmerge_reslora": lambda model, path: unmerge_reslora(model),
    "save_adapter": lambda model, path: save_adapter(model, path / "new"),
    "export_peft": lambda model, path: export_peft(model, path / "new"),
}


@pytest.mark.parametrize("name", EVERY)
def test_model_that_is_none_or_not_adapted(name: str, tmp_path: Path) -> None:
    raises(TypeError, "model .*str", lambda: EVERY[name]("llama", tmp_path))
    model = Scrambled()
    raises(ValueError, "no ResLoRA adapters: call apply_reslora", lambda: EVERY[name](model, tmp_path), model)
    assert list(tmp_path.iterdir()) == []


class TestMerge:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"method": "mean"}, ValueError, "method .*'least_squares'.*'mean'"),
            ({"method": 3}, ValueError, "method .*3"),
            ({}, ValueError, "'input' with method 'least_squares' needs data: .*calibration"),
            ({"method": "input"}, ValueError, "needs data"),
            ({"statistics": {}}, TypeError, "statistics .*collect_statistics.*dict"),
            ({"calibration": 3}, TypeError, "calibration .*iterable of batches.*int"),
            ({"calibration": {"x": X}}, TypeError, "calibration .*iterable of batches.*dict"),
            ({"calibration": X}, TypeError, "calibration .*iterable of batches.*Tensor"),
            ({"calibration": []}, ValueError, "no batch"),
            ({"calibration": [X], "sequential": 1}, TypeError, "sequential .*1"),
            ({"calibration": iter([X]), "sequential": True}, ValueError, "sequential=True .*re-iterable"),
            ({"calibration": [X], "joint_steps": 1.5}, TypeError, "joint_steps .*1.5"),
            ({"calibration": [X], "joint_steps": -1}, ValueError, "joint_steps .*-1"),
            ({"calibration": [X], "joint_steps": 2, "extra_rank": 1.5}, TypeError, "extra_rank .*1.5"),
            ({"calibration": [X], "joint_steps": 2, "extra_rank": -1}, ValueError, "extra_rank .*-1"),
            ({"calibration": [X], "extra_rank": 4}, ValueError, "extra_rank=4 needs joint_steps"),
            ({"calibration": iter([X]), "joint_steps": 2}, ValueError, "joint_steps=2 needs .* re-iterable"),
            ({"method": "input", "calibration": [X], "joint_steps": 2}, ValueError, "joint_steps=2 .*least_squares"),
            ({"calibration": [X], "sequential": True, "method": "input"}, ValueError, "sequential=True .*'input'"),
            ({"calibration": [X], "regularization": -1}, ValueError, "regularization .*-1"),
            ({"calibration": [X], "regularization": math.nan}, ValueError, "regularization .*nan"),
            ({"calibration": [X], "regularization": "1"}, TypeError, "regularization .*'1'"),
            ({"calibration": [X], "keep_original": None}, TypeError, "keep_original .*None"),
            ({"calibration": [X * math.nan]}, ValueError, "NaN or Inf"),
        ],
        ids=lambda value: str(value)[:36] if not isinstance(value, type) else value.__name__,
    )  # fmt: skip
    def test_arguments(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        model = adapted()
        raises(error, message, lambda: merge_reslora(model, **arguments), model)

    def test_statistics_of_another_model_or_of_nothing(self) -> None:
        model = adapted()
        with collect_statistics(model) as nothing:
            pass
        raises(ValueError, "no batch", lambda: merge_reslora(model, statistics=nothing), model)
        wide = randomize(
            apply_reslora(
                Scrambled(width=16), ResLoRAConfig(r=3, shortcut="input"), example_inputs=torch.zeros(1, 16).double()
            )
        )
        other = apply_reslora(
            nn.Sequential(nn.Linear(4, 4)), ResLoRAConfig(shortcut="input"), example_inputs=torch.zeros(1, 4)
        )
        for stranger, x in ((wide, torch.ones(2, 16).double()), (other, torch.ones(2, 4))):
            with collect_statistics(stranger) as theirs:
                stranger(x)
            raises(ValueError, "another model", lambda s=theirs: merge_reslora(model, statistics=s), model)  # type: ignore[misc]
        with collect_statistics(model) as both:
            model(X)
        raises(ValueError, "statistics or calibration, not both",
               lambda: merge_reslora(model, statistics=both, calibration=[X]), model)  # fmt: skip

    def test_second_moments_are_asked_for(self) -> None:
        model = adapted()
        with collect_statistics(model, second_moments=False) as statistics:
            model(X)
        raises(ValueError, "second_moments=True", lambda: merge_reslora(model, statistics=statistics), model)
        assert merge_reslora(model, "input", statistics=statistics).worst() in (None, 0.0)

    def test_collecting_twice_at_once(self) -> None:
        model = adapted()
        with collect_statistics(model), pytest.raises(RuntimeError, match="being collected already"):
            collect_statistics(model).__enter__()
        assert all(getattr(module, "observer", None) is None for module in model.modules())

    def test_batch_that_fails_leaves_the_model_alone(self) -> None:
        model = adapted()
        raises(ValueError, "x must be", lambda: merge_reslora(model, calibration=[X, X[:, :3]]), model)

    def test_twice_and_back_twice(self) -> None:
        model = adapted("block")
        raises(ValueError, "not merged", lambda: unmerge_reslora(model), model)
        merge_reslora(model, keep_original=False)
        raises(ValueError, "merged already", lambda: merge_reslora(model), model)
        raises(ValueError, "keep_original=False", lambda: unmerge_reslora(model), model)

    def test_update_with_nan(self) -> None:
        model = adapted("block")
        with torch.no_grad():
            model.blocks["2"]["fc"].lora_A[0, 0] = math.inf
        raises(ValueError, "'blocks.2.fc'.*NaN or Inf", lambda: merge_reslora(model), model.blocks["0"])

    def test_shared_weight(self) -> None:
        model = Scrambled()
        model.head = nn.Linear(12, 12, dtype=torch.float64)
        model.head.weight = model.blocks["0"]["fc"].weight
        apply_reslora(model, ResLoRAConfig(r=2, exclude_modules=["head"]), example_inputs=X)
        raises(ValueError, "shared", lambda: merge_reslora(model), model)


class TestPaths:
    @pytest.mark.parametrize("path", [None, 3, b"adapter", ["a"]], ids=repr)
    def test_type(self, path: Any) -> None:
        model = adapted("block")
        for call in (save_adapter, load_adapter, export_peft):
            raises(TypeError, "path .*" + type(path).__name__, lambda call=call: call(model, path), model)

    def test_file_in_the_way(self, tmp_path: Path) -> None:
        model, file = adapted("block"), tmp_path / "file"
        file.write_text("mine")
        for call in (save_adapter, load_adapter, export_peft):
            raises(NotADirectoryError, "path .*file", lambda call=call: call(model, file), model)
        assert file.read_text() == "mine"

    def test_load_into_nothing(self, tmp_path: Path) -> None:
        raises(TypeError, "model .*str", lambda: load_adapter("llama", tmp_path))  # type: ignore[arg-type]


class TestFunctional:
    @staticmethod
    def arguments(**changes: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        given = {
            "x": torch.randn(5, 4), "weight": torch.randn(3, 4), "bias": torch.randn(3),
            "a_stack": [torch.randn(2, 4)], "b_stack": [torch.randn(3, 2)], "residual": torch.randn(5, 2),
            "scaling": 0.5, "c": 1.0, "p": 0.0, "seed": None, "hand": None, "backend": "auto",
        }  # fmt: skip
        return given | changes

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"x": [[1.0]]}, TypeError),
            ({"x": torch.zeros(5, 3)}, ValueError),
            ({"x": torch.tensor(1.0)}, ValueError),
            ({"x": torch.zeros(5, 4).double()}, ValueError),
            ({"x": torch.ones(5, 4, dtype=torch.int32), "weight": torch.ones(3, 4, dtype=torch.int32)}, ValueError),
            ({"weight": None}, TypeError),
            ({"weight": torch.zeros(3, 4, 1)}, ValueError),
            ({"bias": torch.zeros(4)}, ValueError),
            ({"bias": 0.0}, TypeError),
            ({"bias": torch.zeros(3).half()}, ValueError),
            ({"a_stack": [], "residual": None}, ValueError),
            ({"a_stack": torch.zeros(2, 4)}, TypeError),
            ({"a_stack": [None]}, TypeError),
            ({"a_stack": [torch.zeros(2, 5)]}, ValueError),
            ({"a_stack": [torch.ones(2, 4, dtype=torch.int64)]}, ValueError),
            ({"a_stack": [torch.zeros(2, 4, device="meta")]}, ValueError),
            ({"b_stack": [torch.zeros(2, 3)]}, ValueError),
            ({"b_stack": [torch.zeros(3, 3)]}, ValueError),
            ({"b_stack": "B"}, TypeError),
            ({"residual": torch.zeros(5, 3)}, ValueError),
            ({"residual": 1}, TypeError),
            ({"scaling": "2"}, TypeError),
            ({"c": None}, TypeError),
            ({"p": 1.0, "seed": torch.tensor(1)}, ValueError),
            ({"p": -0.1}, ValueError),
            ({"p": math.nan}, ValueError),
            ({"p": "0.1"}, TypeError),
            ({"seed": None, "p": 0.5}, ValueError),
            ({"seed": torch.tensor(1.0), "p": 0.5}, ValueError),
            ({"seed": 3, "p": 0.5}, TypeError),
            ({"hand": (0, 3)}, ValueError),
            ({"hand": (1, 1)}, ValueError),
            ({"hand": 2}, TypeError),
            ({"hand": (0.0, 1.0)}, TypeError),
            ({"backend": "select"}, ValueError),
            ({"backend": None}, ValueError),
        ],
        ids=lambda value: (
            value.__name__ if isinstance(value, type) else str(next(iter(value.items())))[:40].replace("\n", "")
        ),
    )
    @pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
    def test_argument(self, changes: dict[str, Any], error: type[Exception], autocast: bool) -> None:
        if autocast and any(
            isinstance(v, torch.Tensor) and v.dtype in (torch.float64, torch.float16) for v in changes.values()
        ):
            pytest.skip("autocast converts it")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), pytest.raises(error) as caught:
            lora_linear(**self.arguments(**changes))
        assert caught.type is error
        assert next(iter(changes)) in str(caught.value)
        assert "must" in str(caught.value)

    def test_those_arguments_are_right_otherwise(self) -> None:
        y, handed = lora_linear(**self.arguments())
        assert y.shape == (5, 3)
        assert handed is None

    @pytest.mark.skipif(torch.cuda.is_available(), reason="the backend may run there")
    def test_backend_that_cannot_run_here(self) -> None:
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run here"):
            lora_linear(**self.arguments(backend="cuda"))
