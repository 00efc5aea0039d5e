"""ResLoRAConfig: every wrong value is named, every right one survives JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reslora_kernels import ResLoRAConfig

FIELDS = [field.name for field in dataclasses.fields(ResLoRAConfig)]


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
            ("target_modules", {3}, ValueError, "str"),
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
        with pytest.raises(TypeError, match=r"values .*list"):
            ResLoRAConfig.from_dict([1])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"text .*bytes"):
            ResLoRAConfig.from_json(b"{}")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="rank"):
            ResLoRAConfig().replace(rank=3)

    def test_frozen(self) -> None:
        config = ResLoRAConfig()
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.r = 3  # type: ignore[misc]
        with pytest.raises(TypeError):
            ResLoRAConfig(4)  # type: ignore[misc]
