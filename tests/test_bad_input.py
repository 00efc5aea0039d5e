"""Wrong arguments to everything public: an error that names the argument and what is allowed, and nothing changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
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

FIELDS = [field.name for field in dataclasses.fields(ResLoRAConfig)]
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


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value", "error", "allowed"),
        [
            ("r", 0, ValueError, "from 1 to 256"),
            ("r", 257, ValueError, "from 1 to 256"),
            ("r", 8.0, TypeError, "int"),
            ("r", True, TypeError, "int"),
            ("r", None, TypeError, "int"),
            ("lora_alpha", 0, ValueError, "above 0"),
            ("lora_alpha", math.nan, ValueError, "finite"),
            ("lora_alpha", 10**400, ValueError, "finite"),
            ("lora_alpha", "16", TypeError, "number"),
            ("lora_dropout", 1.0, ValueError, "0 <= lora_dropout < 1"),
            ("lora_dropout", -0.1, ValueError, "0 <= lora_dropout < 1"),
            ("target_modules", [], ValueError, "at least one"),
            ("target_modules", "", ValueError, "empty"),
            ("target_modules", [3], ValueError, "str"),
            ("target_modules", {"q_proj", 3}, ValueError, "str"),
            ("target_modules", 3, TypeError, "list of names"),
            ("target_modules", b"q_proj", TypeError, "list of names"),
            ("target_modules", "(q", ValueError, "regular expression"),
            ("target_modules", "a{99999999999999999999}", ValueError, "regular expression"),
            ("exclude_modules", "[", ValueError, "regular expression"),
            ("exclude_modules", [""], ValueError, "non-empty"),
            ("layers_to_transform", -1, ValueError, "0 or more"),
            ("layers_to_transform", [], ValueError, "at least one"),
            ("layers_to_transform", [1.5], TypeError, "int"),
            ("layers_to_transform", "1", TypeError, "int"),
            ("use_rslora", 1, TypeError, "True or False"),
            ("bias", "some", ValueError, "'lora_only'"),
            ("bias", True, TypeError, "'lora_only'"),
            ("shortcut", "bs", ValueError, "'none', 'input', 'block', 'middle'"),
            ("pre_num", -2, ValueError, "at least -1"),
            ("pre_num", 1.0, TypeError, "int"),
            ("merge", "average", ValueError, "'least_squares'"),
            ("norm_window", 0, ValueError, "at least 1"),
            ("backend", "opencl", ValueError, "'auto', 'torch', 'triton', 'cuda'"),
        ],
        ids=lambda value: str(value)[:24] if not isinstance(value, type) else value.__name__,
    )
    def test_field(self, field: str, value: Any, error: type[Exception], allowed: str) -> None:
        for make in (
            lambda: ResLoRAConfig(**{field: value}),
            lambda: ResLoRAConfig().replace(**{field: value}),
            lambda: ResLoRAConfig.from_dict({field: value}),
        ):
            with pytest.raises(error, match=allowed) as caught:
                make()
            assert field in str(caught.value)

    @given(
        field=st.sampled_from(FIELDS),
        value=st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4),
            st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=3),
            st.sets(st.one_of(st.integers(), st.text(max_size=3)), max_size=3),
            st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), st.builds(object),
        ),
    )  # fmt: skip
    @settings(max_examples=300, deadline=None)
    def test_any_value_is_accepted_or_named(self, field: str, value: Any) -> None:
        try:
            config = ResLoRAConfig(**{field: value})
        except (TypeError, ValueError) as error:
            assert type(error) in (TypeError, ValueError)
            assert str(error).startswith(field)
        else:
            assert ResLoRAConfig.from_json(config.to_json()) == config

    names = st.lists(st.text("abc_.0", min_size=1, max_size=6), min_size=1, max_size=3)

    @given(
        values=st.fixed_dictionaries(
            {},
            optional={
                "r": st.integers(1, 256),
                "lora_alpha": st.one_of(st.integers(1, 10**9), st.floats(1e-6, 1e9)),
                "lora_dropout": st.floats(0, 1, exclude_max=True),
                "target_modules": st.one_of(
                    names, names.map(tuple), st.sampled_from(["all-linear", r".*\.(q|v)_proj"])
                ),
                "exclude_modules": st.one_of(st.none(), names, st.just("lm_head")),
                "layers_to_transform": st.one_of(
                    st.none(), st.integers(0, 99), st.lists(st.integers(0, 99), min_size=1, max_size=4)
                ),
                "use_rslora": st.booleans(),
                "bias": st.sampled_from(["none", "all", "lora_only"]),
                "shortcut": st.sampled_from(["none", "input", "block", "middle"]),
                "pre_num": st.integers(-1, 50),
                "merge": st.sampled_from(["input", "weights", "least_squares"]),
                "norm_window": st.integers(1, 10**6),
                "backend": st.sampled_from(["auto", "torch", "triton", "cuda"]),
            },
        )
    )
    @settings(max_examples=150, deadline=None)
    def test_json_round_trip(self, values: dict[str, Any]) -> None:
        config = ResLoRAConfig(**values)
        again = ResLoRAConfig.from_json(config.to_json())
        assert again == config
        assert hash(again) == hash(config)
        assert ResLoRAConfig.from_dict(config.to_dict()) == config
        assert again.scaling == config.scaling > 0
        assert config.replace() == config

    @given(key=st.text())
    def test_unknown_field(self, key: str) -> None:
        assume(key not in FIELDS)
        with pytest.raises(ValueError, match="unknown ResLoRAConfig field"):
            ResLoRAConfig.from_dict({key: 1})

    @given(text=st.text(max_size=20))
    def test_text_that_is_no_config(self, text: str) -> None:
        assume(text.strip() != "{}")
        with pytest.raises(ValueError, match=r"."):
            ResLoRAConfig.from_json(text)

    def test_types_of_from_dict_and_from_json(self) -> None:
        raises(TypeError, "values .*list", lambda: ResLoRAConfig.from_dict([1]))  # type: ignore[arg-type]
        raises(TypeError, "text .*bytes", lambda: ResLoRAConfig.from_json(b"{}"))  # type: ignore[arg-type]
        raises(ValueError, "rank", lambda: ResLoRAConfig().replace(rank=3))

    def test_frozen(self) -> None:
        config = ResLoRAConfig()
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.r = 3  # type: ignore[misc]
        with pytest.raises(TypeError):
            ResLoRAConfig(4)  # type: ignore[misc]


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
        convolution = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(2, 2))
        raises(ValueError, "no torch.nn.Linear", lambda: apply_reslora(nn.Sequential(nn.ReLU()), ResLoRAConfig()))
        raises(
            ValueError,
            "matches '0', a Conv2d",
            lambda: apply_reslora(convolution, ResLoRAConfig(target_modules=["0"])),
            convolution,
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
            model.third["fc"].lora_A[0, 0] = math.inf
        raises(ValueError, "'third.fc'.*NaN or Inf", lambda: merge_reslora(model), model.first)

    def test_shared_weight(self) -> None:
        model = Scrambled()
        model.head = nn.Linear(12, 12, dtype=torch.float64)
        model.head.weight = model.first["fc"].weight
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
            ({"x": torch.randn(5, 3)}, ValueError),
            ({"x": torch.tensor(1.0)}, ValueError),
            ({"x": torch.randn(5, 4).double()}, ValueError),
            ({"x": torch.ones(5, 4, dtype=torch.int32), "weight": torch.ones(3, 4, dtype=torch.int32)}, ValueError),
            ({"weight": None}, TypeError),
            ({"weight": torch.randn(3, 4, 1)}, ValueError),
            ({"bias": torch.randn(4)}, ValueError),
            ({"bias": 0.0}, TypeError),
            ({"bias": torch.randn(3).half()}, ValueError),
            ({"a_stack": []}, ValueError),
            ({"a_stack": torch.randn(2, 4)}, TypeError),
            ({"a_stack": [None]}, TypeError),
            ({"a_stack": [torch.randn(2, 5)]}, ValueError),
            ({"a_stack": [torch.ones(2, 4, dtype=torch.int64)]}, ValueError),
            ({"a_stack": [torch.randn(2, 4, device="meta")]}, ValueError),
            ({"b_stack": [torch.randn(2, 3)]}, ValueError),
            ({"b_stack": [torch.randn(3, 3)]}, ValueError),
            ({"b_stack": "B"}, TypeError),
            ({"residual": torch.randn(5, 3)}, ValueError),
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
