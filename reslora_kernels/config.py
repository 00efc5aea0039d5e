"""What a ResLoRA run is made of: one frozen, validated value that travels as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .checks import check_int, check_number

Shortcut = Literal["none", "input", "block", "middle"]
MergeMethod = Literal["input", "weights", "least_squares"]
BackendName = Literal["auto", "torch", "triton", "cuda"]
Bias = Literal["none", "all", "lora_only"]
Gates = Literal["none", "scalar", "rank"]

ALL_LINEAR = "all-linear"
MAX_RANK = 256
PARAMETER_ADAPTER = "_reslora"  # the adapter of a parameter is its module's child of the parameter's name and this
_ALPHA: Any = ("a finite number above 0", lambda v: v > 0)
_INITS = r"gaussian|pissa|pissa_niter_[1-9]\d{0,3}|olora|orthogonal|loftq|eva|corda|corda_kpm|lora_ga"
_LINEAR_STARTS = ("orthogonal", "loftq", "eva", "corda", "corda_kpm", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class ResLoRAConfig:
    """Hyperparameters of ResLoRA (arXiv 2402.18039). Names follow PEFT's ``LoraConfig`` where the meaning is the same.

    Args:
        r: rank of every adapter, 1 to 256.
        lora_alpha: the low-rank term is multiplied by ``lora_alpha / r`` (see ``scaling``).
        lora_dropout: probability in [0, 1) that an element of x is dropped before the projection.
        target_modules: which ``nn.Linear`` to adapt: names or name endings, one regular expression that must match the
            whole name, or ``"all-linear"`` (every linear layer but the output head).
        target_parameters: parameters to adapt, by names or name endings, as in PEFT. Experts held as one tensor
            ("mlp.experts.gate_up_proj") get an A and a B each; a matrix that its module multiplies by (a router,
            "mlp.gate.weight") gets one. They are adapted beside ``target_modules``, of which ``[]`` adapts none;
            ``exclude_modules`` and ``layers_to_transform`` are about modules.
        split_expert_r: share ``r`` out among the experts of a parameter: each has max(1, r // E), which the scaling
            divides by then.
        exclude_modules: names or name endings, or one regular expression, to leave out.
        rank_pattern: ranks that differ from ``r``, by name, name ending or regular expression for one, as in PEFT; the
            first entry that matches a module counts. A chain holds layers of one rank only.
        alpha_pattern: the same for ``lora_alpha``.
        modules_to_save: names or name endings of other modules to train whole (a classification head, say);
            ``save_adapter`` saves them with the adapter.
        trainable_token_indices: tokens whose rows of the input embedding train whole, and those of a head that shares
            them; or a dict of such lists by names or name endings of embeddings.
        ensure_weight_tying: a head that shares the weight of an adapted embedding gets its adapter too, as in PEFT: its
            logits change by s (x B) A. What is trained whole, module or tokens, is shared with such a head in any case.
        layers_to_transform: only modules whose first numbered name component is one of these.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead.
        use_dora: learn the length of every row of W + ΔW apart (DoRA, arXiv 2402.09353), with ΔW the layer's own update
            (with "block", its window's), and its norm taken for a constant in backward, as the paper says.
        stack_projections: layers that read the same tensor (q, k, v; gate and up) project it in one pass, forward and
            backward. Layers that drop elements of x (``lora_dropout``, in training) have masks of their own and do not.
        init_lora_weights: how A and B start. True: A Kaiming-uniform, B zero; "gaussian": A normal with deviation 1/r,
            B zero; "pissa" or "pissa_niter_<n>" (arXiv 2404.02948): the r largest singular triplets of W, the latter
            found by n randomised iterations; "olora" (arXiv 2406.01775): the first r columns and rows of W's QR
            decomposition; "orthogonal": both random, with B A = 0 (r even). What "eva", "corda", "corda_kpm", "lora_ga"
            and "loftq" start from has to be shown: call ``start_adapters``; until then they are as True, and a forward
            that would train them is a RuntimeError. "pissa", "olora", "corda" and "lora_ga" take their start off again,
            so that the model begins as the frozen one.
        bias: which biases train: "none", "all", or "lora_only" (those of the adapted layers).
        shortcut: "none" (LoRA, Eq. 1), "input" (Eq. 2), "block" (Eq. 3), "middle" (Eq. 4).
        pre_num: how many earlier blocks of the chain ``block`` and ``middle`` use; -1 means all (``input`` uses one).
        gates: learned factors of the shortcut's terms, u = c ⊙ h + Σ g_k ⊙ (the k-th earlier one): "scalar" learns a
            number for each term, "rank" r of them. Not with "none" or ``pre_num=0``, which have no such terms.
        gates_init: what every g starts from, c from 1: 1 is the paper's shortcut, 0 plain LoRA at the first step.
        merge: how ``merge_reslora`` turns the trained shortcut into a plain update, unless told otherwise there.
        norm_window: number of most recent batches over which the norms for merging are averaged.
        backend: "auto", or the backend that must serve every layer.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a value that is not allowed.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    target_parameters: Sequence[str] | None = None
    split_expert_r: bool = False
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = field(default=None, hash=False)
    ensure_weight_tying: bool = False
    layers_to_transform: int | Sequence[int] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    use_rslora: bool = False
    use_dora: bool = False
    stack_projections: bool = True
    init_lora_weights: bool | str = True
    bias: Bias = "none"
    shortcut: Shortcut = "block"
    pre_num: int = 1
    gates: Gates = "none"
    gates_init: float = 1.0
    merge: MergeMethod = "least_squares"
    norm_window: int = 100
    backend: BackendName = "auto"

    def __post_init__(self) -> None:
        check_int("r", self.r, 1, MAX_RANK)
        check_int("pre_num", self.pre_num, -1, None)
        check_int("norm_window", self.norm_window, 1, None)
        check_number("lora_alpha", self.lora_alpha, *_ALPHA)
        check_number("lora_dropout", self.lora_dropout, "a number with 0 <= lora_dropout < 1", lambda v: 0 <= v < 1)
        for name in ("use_rslora", "use_dora", "stack_projections", "split_expert_r", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.init_lora_weights is not True and not (
            isinstance(self.init_lora_weights, str) and re.fullmatch(_INITS, self.init_lora_weights)
        ):
            raise ValueError(
                "init_lora_weights must be True, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_<n>', 'olora', "
                f"'loftq', 'eva', 'corda', 'corda_kpm' or 'lora_ga', got {self.init_lora_weights!r}"
            )
        self._refuse_start_that_moves()
        _check_choice("bias", self.bias, get_args(Bias))
        _check_choice("shortcut", self.shortcut, get_args(Shortcut))
        _check_choice("gates", self.gates, get_args(Gates))
        check_number("gates_init", self.gates_init, "a finite number", lambda v: True)
        self._check_gates()
        _check_choice("merge", self.merge, get_args(MergeMethod))
        _check_choice("backend", self.backend, get_args(BackendName))
        freeze = object.__setattr__
        freeze(self, "rank_pattern", _pattern("rank_pattern", self.rank_pattern))
        freeze(self, "alpha_pattern", _pattern("alpha_pattern", self.alpha_pattern))
        for key, rank in self.rank_pattern.items():
            check_int(f"rank_pattern[{key!r}]", rank, 1, MAX_RANK)
        for key, alpha in self.alpha_pattern.items():
            check_number(f"alpha_pattern[{key!r}]", alpha, *_ALPHA)
        if self.target_parameters is not None:
            if isinstance(self.target_parameters, str):
                raise TypeError(f"target_parameters must be a list of names, got {self.target_parameters!r}")
            freeze(self, "target_parameters", _names("target_parameters", self.target_parameters))
            self._refuse_beside_parameters()
        none = self.target_parameters is not None and not isinstance(self.target_modules, str)
        if not (none and isinstance(self.target_modules, Sequence) and not self.target_modules):
            freeze(self, "target_modules", _names("target_modules", self.target_modules))
        if self.exclude_modules is not None:
            freeze(self, "exclude_modules", _names("exclude_modules", self.exclude_modules))
        if self.modules_to_save is not None:
            if isinstance(self.modules_to_save, str):
                raise TypeError(f"modules_to_save must be a list of names, got {self.modules_to_save!r}")
            freeze(self, "modules_to_save", _names("modules_to_save", self.modules_to_save))
        if self.trainable_token_indices is not None:
            freeze(self, "trainable_token_indices", _token_indices(self.trainable_token_indices))
        if self.layers_to_transform is not None:
            freeze(self, "layers_to_transform", _layer_indices(self.layers_to_transform))

    def _refuse_start_that_moves(self) -> None:
        """ValueError for a start that would not be the frozen model, or not what it is to be, with this shortcut."""
        if self.init_lora_weights == "orthogonal":
            if self.r % 2:
                raise ValueError(f"init_lora_weights='orthogonal' halves the rank, which must be even, got r={self.r}")
            if self.shortcut == "middle" and self.pre_num:
                raise ValueError(
                    "init_lora_weights='orthogonal' has B A = 0 in each layer, but not from the A of one to the B of "
                    "another, which shortcut='middle' multiplies: take another start, or shortcut"
                )
        if self.init_lora_weights == "loftq" and self.use_dora:
            raise ValueError("init_lora_weights='loftq' moves weights whose lengths use_dora starts from: take False")
        if self.init_lora_weights == "loftq" and self.shortcut != "none" and (self.pre_num or self.shortcut == "input"):
            raise ValueError(
                "init_lora_weights='loftq' starts from what quantisation took from each layer's own weight, and "
                f"shortcut={self.shortcut!r} adds that of other layers: take shortcut='none', or another start"
            )

    def _check_gates(self) -> None:
        """ValueError for gates without terms to weigh, and for a start of gates that are not there."""
        if self.gates == "none":
            if self.gates_init != 1:
                raise ValueError(f"gates_init={self.gates_init!r} is for gates='scalar' or 'rank', got gates='none'")
            return
        for name, value, allowed, why in (
            ("shortcut", self.shortcut, self.shortcut != "none", "has no terms for them"),
            ("pre_num", self.pre_num, self.shortcut == "input" or self.pre_num != 0, "leaves no terms for them"),
            ("use_dora", self.use_dora, not self.use_dora, "learns the length of the rows in another way"),
        ):
            if not allowed:
                raise ValueError(f"gates={self.gates!r} must be 'none' with {name}={value!r}, which {why}")

    def _refuse_beside_parameters(self) -> None:
        """ValueError for what an adapter of a parameter has no equation for."""
        start = self.init_lora_weights
        for name, value, allowed, instead in (
            ("lora_dropout", self.lora_dropout, self.lora_dropout == 0, "0"),
            ("use_dora", self.use_dora, not self.use_dora, "False"),
            ("init_lora_weights", start, start in (True, "gaussian"), "True or 'gaussian'"),
        ):
            if not allowed:
                raise ValueError(
                    f"{name} must be {instead} with target_parameters, as in PEFT, got {value!r}: train the parameters "
                    "without it, or leave them out"
                )

    @property
    def scaling(self) -> float:
        """s of the equations: lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``."""
        return float(self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r))

    @property
    def has_start(self) -> bool:
        """Whether A and B start from W, with a start that is taken off again (``ResLoRALinear.start_A``)."""
        return self.init_lora_weights not in (True, "gaussian", "orthogonal", "loftq", "eva")

    @property
    def starts_from_data(self) -> bool:
        """Whether ``start_adapters`` gives A and B their start, from data; until then it is a random one."""
        return self.init_lora_weights in ("loftq", "eva", "corda", "corda_kpm", "lora_ga")

    @property
    def linear_start(self) -> bool:
        """Whether the start is for linear layers alone."""
        return self.init_lora_weights in _LINEAR_STARTS

    def for_module(self, name: str, num_experts: int = 0) -> ResLoRAConfig:
        """What the patterns make of this configuration for one module, or one parameter of experts; it holds none."""
        if self.split_expert_r and num_experts:
            own = self.for_module(name)
            return dataclasses.replace(own, r=max(1, own.r // num_experts), split_expert_r=False)
        if not (self.rank_pattern or self.alpha_pattern):
            return self
        name = name.removesuffix(PARAMETER_ADAPTER)
        r = next((r for key, r in self.rank_pattern.items() if pattern_matches(key, name)), self.r)
        alpha = next((a for key, a in self.alpha_pattern.items() if pattern_matches(key, name)), self.lora_alpha)
        return dataclasses.replace(self, r=r, lora_alpha=alpha, rank_pattern={}, alpha_pattern={})

    def replace(self, **changes: Any) -> ResLoRAConfig:
        """A copy with the given fields changed, validated again."""
        _check_keys(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values only, ready for JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ResLoRAConfig:
        """The inverse of ``to_dict``. An unknown key is a ValueError."""
        if not isinstance(values, Mapping):
            raise TypeError(f"values must be a mapping of field names to values, got {type(values).__name__}")
        _check_keys(values)
        return cls(**values)

    def to_json(self) -> str:
        """``to_dict`` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ResLoRAConfig:
        """The inverse of ``to_json``. Text that is not a JSON object is a ValueError."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str of JSON, got {type(text).__name__}")
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"text must hold one JSON object, got a JSON {type(values).__name__}")
        return cls.from_dict(values)


def _check_keys(values: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(ResLoRAConfig)]
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise ValueError(f"unknown ResLoRAConfig field {', '.join(sorted(unknown))}; the fields are {', '.join(known)}")


def checked_config(config: Any) -> ResLoRAConfig:
    """``config``; TypeError unless it is a ResLoRAConfig."""
    if not isinstance(config, ResLoRAConfig):
        raise TypeError(f"config must be a ResLoRAConfig, got {type(config).__name__}")
    return config


def matches(name: str, wanted: str | Sequence[str]) -> bool:
    """PEFT's rule for names: the whole of one or the ending of it; a str is a regular expression for the whole."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in wanted)


def with_parents(name: str) -> list[str]:
    """The names of the modules down to ``name``, itself included."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def pattern_matches(key: str, name: str) -> bool:
    """Whether an entry of ``rank_pattern`` or ``alpha_pattern`` means the module: its name, or the ending of it."""
    return re.fullmatch(rf"(.*\.)?({key})", name) is not None


def _pattern(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
        raise TypeError(f"{name} must map names or regular expressions to numbers, got {value!r}")
    for key in value:
        _check_regex(f"{name} key", key)
    return dict(value)


def _check_regex(name: str, value: str) -> None:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name} must be a valid regular expression, got {value!r}: {error}") from None


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _names(name: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{name} must not be empty, got {value!r}")
        if value != ALL_LINEAR:
            _check_regex(name, value)
        return value
    if not isinstance(value, (Sequence, set, frozenset)) or isinstance(value, bytes):
        raise TypeError(f"{name} must be a str (regular expression) or a list of names, got {value!r}")
    names = tuple(value)
    if not names or not all(isinstance(item, str) and item for item in names):
        raise ValueError(f"{name} must be a list of at least one non-empty str, got {value!r}")
    return tuple(sorted(names)) if isinstance(value, (set, frozenset)) else names


def _token_indices(value: Any) -> tuple[int, ...] | dict[str, list[int]]:
    if isinstance(value, Mapping):
        if not value or not all(isinstance(name, str) and name for name in value):
            raise TypeError(f"trainable_token_indices must map names of embeddings to lists of int, got {value!r}")
        return {name: list(_tokens(indices)) for name, indices in value.items()}
    return _tokens(value)


def _tokens(value: Any) -> tuple[int, ...]:
    indices = tuple(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else ()
    if not indices or any(isinstance(index, bool) or not isinstance(index, int) for index in indices):
        raise TypeError(f"trainable_token_indices must hold lists of at least one int, got {value!r}")
    if min(indices) < 0 or len(set(indices)) < len(indices):
        raise ValueError(f"trainable_token_indices must be 0 or more and each there once, got {value!r}")
    return indices


def _layer_indices(value: Any) -> tuple[int, ...]:
    indices = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else (value,)
    if any(isinstance(index, bool) or not isinstance(index, int) for index in indices):
        raise TypeError(f"layers_to_transform must be an int or a list of int, got {value!r}")
    if not indices or any(index < 0 for index in indices):
        raise ValueError(f"layers_to_transform must hold at least one index of 0 or more, got {value!r}")
    return tuple(indices)
