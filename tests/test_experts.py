"""Adapters of experts that a model holds as one tensor: against the equations, against PEFT, and through files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reslora_kernels import (
    ResLoRAConfig,
    add_adapter,
    apply_reslora,
    disable_adapter,
    export_peft,
    inspect,
    load_adapter,
    load_peft_adapter,
    merge_and_unload,
    merge_reslora,
    save_adapter,
    set_adapter,
    unload,
    unmerge_reslora,
)
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.ops.grouped import Groups, add_low_rank
from reslora_kernels.testing import assert_close_to_truth

transformers = pytest.importorskip("transformers", minversion="5.0")

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
FOUR = {"num_experts_per_tok": 2, "intermediate_size": 24, "num_local_experts": 4}
CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, **FOUR, head_dim=16),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SMALL, head_dim=16, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SMALL, intermediate_size=48, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=16,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**SMALL, **FOUR, head_dim=16, layer_types=["full_attention"] * 3),
    "llama4_text": lambda: transformers.Llama4TextConfig(
        **SMALL, **(FOUR | {"num_experts_per_tok": 1}), head_dim=16, intermediate_size_mlp=48, attention_chunk_size=16,
        interleave_moe_layer_step=1,
    ),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**SMALL, **FOUR),
}  # fmt: skip
RUNS = [(kind, how) for kind in CONFIGS for how in ("eager", "batched_mm", "grouped_mm")]
RUNS = [(kind, how) for kind, how in RUNS if kind != "llama4_text" or how == "eager"]  # it knows one way only
IDS = torch.arange(24).reshape(2, 12) * 7 % 64


def model_of(kind: str, how: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    made = transformers.Llama4ForCausalLM if kind == "llama4_text" else transformers.AutoModelForCausalLM.from_config
    model = made(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    if kind != "llama4_text":
        model.set_experts_implementation(how)
    return model.to(dtype).eval()


def adapted(model: Any, shortcut: Any = "none", **changes: Any) -> Any:
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": BOTH} | changes
    apply_reslora(model, ResLoRAConfig(shortcut=shortcut, **settings), autocast_adapter_dtype=False)
    return randomized(model)


def randomized(model: Any) -> Any:
    torch.manual_seed(1)
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_A, std=0.3)
        nn.init.normal_(layer.lora_B, std=0.3)
    return model


def flat(tensors: dict[str, Tensor], order: Iterable[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in order])


def loss_and_gradients(model: Any, given: Any = IDS) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(given, labels=given)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def dense_statement(plain: Any, layers: dict[str, Any], shortcut: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The equations with every W + s Σ B A made, of ``layers``' A and B in the dtype of ``plain``."""
    dtype = next(plain.parameters()).dtype
    given = {
        f"{name}.{own}": p.detach().to(dtype).requires_grad_()
        for name, layer in layers.items()
        for own, p in layer.adapter_parameters().items()
    }
    weights, last = {}, {}
    for name, layer in layers.items():
        role = name.rpartition(".")[2]
        terms = [name, *([last[role]] if shortcut == "block" and role in last else [])]
        last[role] = name
        delta = sum(torch.einsum("enr,erk->enk", given[f"{n}.lora_B"], given[f"{n}.lora_A"]) for n in terms)
        parameter = name.removesuffix("_reslora")
        update = layer.scaling * (delta.mT if layer.transposed else delta)
        weights[parameter] = plain.get_parameter(parameter).detach() + update
    out = torch.func.functional_call(plain, weights, (IDS,), {"labels": IDS})
    gradients = torch.autograd.grad(out.loss, list(given.values()))
    return out.logits.detach(), dict(zip(given, gradients, strict=True))


@pytest.mark.parametrize(("kind", "how"), RUNS)
def test_outputs_and_gradients_are_those_of_the_equations(kind: str, how: str) -> None:
    plain = model_of(kind, how)
    model = adapted(copy.deepcopy(plain), "block")
    layers = adapted_layers(model)
    assert len(layers) == (4 if kind == "deepseek_v3" else 6)
    logits, gradients = loss_and_gradients(model)
    truth, true_gradients = dense_statement(model_of(kind, "eager", torch.float64), layers, "block")
    rounded, rounded_gradients = dense_statement(plain, layers, "block")
    assert_close_to_truth(logits, truth, rounded)
    assert gradients.keys() == true_gradients.keys()
    assert_close_to_truth(*(flat(of, gradients) for of in (gradients, true_gradients, rounded_gradients)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_in_float64_nothing_but_rounding_is_left(kind: str) -> None:
    plain = model_of(kind, dtype=torch.float64)
    model = adapted(copy.deepcopy(plain), "block")
    logits, gradients = loss_and_gradients(model)
    truth, true_gradients = dense_statement(plain, adapted_layers(model), "block")
    torch.testing.assert_close(logits, truth, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients, true_gradients, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_experts_that_see_no_token_have_no_gradient(how: str) -> None:
    model = adapted(model_of("mixtral", how))
    _, gradients = loss_and_gradients(model, IDS[:1, :2])
    unseen = [name for name, gradient in gradients.items() for part in gradient if not part.any()]
    assert unseen
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("rows", [None, "given", "at once"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_grouped_product(rows: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    experts = torch.tensor([2, 0, 2, 2, 5, 0, 5])
    order = torch.argsort(experts, stable=True)
    r, k = (8, 16) if rows == "at once" else (3, 12)  # rows of whole 16 bytes, as torch._grouped_mm takes them
    x, a, b, y, dy = (torch.randn(*s) for s in ((7, k), (6, r, k), (6, 8, r), (7, 8), (7, 8)))
    groups = Groups.of(experts, 6)
    if rows != "given":
        groups = Groups(groups.offsets, at_once=rows == "at once")
        x, y, dy, experts = x[order], y[order], dy[order], experts[order]

    def of(dtype: torch.dtype, compute: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        inputs = [t.to(dtype).requires_grad_() for t in (y, x, a, b)]
        out = compute(*inputs)
        return (out.detach(), *torch.autograd.grad(out, inputs, dy.to(dtype)))

    def dense(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return y + 0.5 * torch.einsum("snr,srk,sk->sn", b[experts], a[experts], x)

    got = of(dtype, lambda y, x, a, b: add_low_rank(y.clone(), x, a, b, groups, 0.5))
    for mine, truth, plain in zip(got, of(torch.float64, dense), of(dtype, dense), strict=True):
        assert_close_to_truth(mine, truth, plain)
    assert torch.autograd.gradcheck(
        lambda y, x, a, b: add_low_rank(y.clone(), x, a, b, groups, 0.5),
        [t.double().requires_grad_() for t in (y, x, a, b)],
    )


class Operators(TorchDispatchMode):
    """How many operators run, and how often a value is read back from its device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.reads = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.reads += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["grouped_mm", "eager"])
def test_what_runs_on_the_host_does_not_grow_with_the_experts(how: str) -> None:
    """Operators of a module with two adapted parameters, forward and backward, beside those of the plain module."""

    def counted(experts: int, adapt: bool) -> Operators:
        config = CONFIGS["mixtral"]()
        config.num_local_experts = experts
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model.set_experts_implementation(how)
        module = (adapted(model, r=4) if adapt else model.requires_grad_(False)).model.layers[0].mlp.experts
        x = torch.randn(32, 32, requires_grad=True)
        index, weights = torch.arange(64).reshape(32, 2) % experts, torch.full((32, 2), 0.5)
        module(x, index, weights).sum().backward()
        with Operators() as operators:
            module(x, index, weights).sum().backward()
        return operators

    few, many = ([counted(e, adapt) for adapt in (False, True)] for e in (4, 16))
    added = [adapted_one.count - plain.count for plain, adapted_one in (few, many)]
    assert added[0] > 0
    if how == "grouped_mm":
        assert added[1] == added[0] <= 2 * 40
        assert [each.reads for each in (*few, *many)] == [few[0].reads] * 4
    else:  # one expert after the other, as the module itself runs them
        assert added[1] > added[0]


def test_forward_saves_inputs_and_rank_values_only() -> None:
    model = adapted(model_of("mixtral", "grouped_mm"))
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(10, 32, requires_grad=True)
    index, weights = torch.arange(20).reshape(10, 2) % 4, torch.full((10, 2), 0.5)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def saved() -> int:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            alive = experts(x, index, weights)
        assert alive.requires_grad
        return sum(size for address, size in kept.items() if address not in known)

    with disable_adapter(model):
        before = saved()
    inputs, ranks = 20 * (32 + 24) * 4, 20 * (2 + 2) * 4
    assert 0 < saved() - before <= inputs + ranks


def test_trains_with_and_without_checkpointing() -> None:
    model = adapted(model_of("qwen3_moe", "grouped_mm"), "block", target_modules=["q_proj"]).train()
    _, plain = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, recomputed = loss_and_gradients(model)
    torch.testing.assert_close(recomputed, plain)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_mixed_precision(how: str) -> None:
    """Adapters stay in float32 beside a half-precision base, and autocast may stay on in backward."""
    model = model_of("mixtral", how, torch.bfloat16)
    apply_reslora(model, ResLoRAConfig(r=8, target_modules=[], target_parameters=BOTH))
    _, gradients = loss_and_gradients(randomized(model))
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    model = adapted(model_of("mixtral", how))
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients = loss_and_gradients(model)
    torch.testing.assert_close(logits.float(), loss_and_gradients(model)[0], rtol=0.1, atol=0.2)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.slow
def test_compiled() -> None:
    model = adapted(model_of("mixtral", "grouped_mm"), "block")
    logits, gradients = loss_and_gradients(model)
    compiled_logits, compiled_gradients = loss_and_gradients(torch.compile(model))
    torch.testing.assert_close(compiled_logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        {name.removeprefix("_orig_mod."): gradient for name, gradient in compiled_gradients.items()}, gradients
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_save_load_merge_and_unload(kind: str, tmp_path: Path) -> None:
    plain = model_of(kind)
    keys, before = plain.state_dict().keys(), plain(IDS).logits
    model = adapted(copy.deepcopy(plain), "block")
    logits = model(IDS).logits
    save_adapter(model, tmp_path)
    again = load_adapter(copy.deepcopy(plain), tmp_path)
    assert torch.equal(again(IDS).logits, logits)
    merge_reslora(model)
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == keys
    unmerge_reslora(model)
    assert torch.equal(model(IDS).logits, logits)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, logits)
    bare = unload(copy.deepcopy(model))
    assert bare.state_dict().keys() == keys
    assert torch.equal(bare(IDS).logits, before)
    torch.testing.assert_close(merge_and_unload(model)(IDS).logits, logits, rtol=1e-4, atol=1e-4)


def test_adapters_take_turns() -> None:
    model = adapted(model_of("mixtral", "grouped_mm"))
    first = model(IDS).logits
    add_adapter(model, "other", ResLoRAConfig(r=3, target_modules=["q_proj"], target_parameters=BOTH[:1]))
    set_adapter(model, "other")
    randomized(model)
    other = model(IDS).logits
    set_adapter(model, "default")
    assert torch.equal(model(IDS).logits, first)
    set_adapter(model, "other")
    assert torch.equal(model(IDS).logits, other)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("targets", [BOTH, BOTH[1:]], ids=["both", "one"])
def test_peft_loads_what_is_exported(kind: str, targets: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    plain = model_of(kind)
    model = adapted(copy.deepcopy(plain), "block", target_parameters=targets, target_modules=["q_proj", "q_b_proj"])
    export_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_goes_on_from_what_peft_trained(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    plain = model_of(kind)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=[], target_parameters=BOTH, rank_pattern={"down_proj": 3},
        init_lora_weights=False,
    )  # fmt: skip
    trained = peft.get_peft_model(copy.deepcopy(plain), config)
    trained.save_pretrained(tmp_path)
    model = load_peft_adapter(plain, tmp_path)
    torch.testing.assert_close(model(IDS).logits, trained(IDS).logits, rtol=1e-4, atol=1e-4)
    assert {layer.config.r for layer in adapted_layers(model).values()} == {2, 3}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_expert_by_expert_for_servers(kind: str, tmp_path: Path) -> None:
    """PEFT too reads adapters of experts one by one, and fuses them: it judges the keys and values."""
    peft = pytest.importorskip("peft", minversion="0.21")
    plain = model_of(kind)
    model = adapted(copy.deepcopy(plain))
    export_peft(model, tmp_path, per_expert=True)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="per_expert=True is for models whose checkpoints"):
        export_peft(adapted(model_of("gpt_oss")), tmp_path / "other", per_expert=True)


@pytest.mark.parametrize(
    ("kind", "router"),
    [("mixtral", "mlp.gate.weight"), ("deepseek_v3", "mlp.gate.weight"), ("llama4_text", "router.weight")],
)
def test_router_by_name(kind: str, router: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    plain = model_of(kind)
    model = adapted(copy.deepcopy(plain), target_parameters=[router])
    assert not torch.equal(model(IDS).logits, plain(IDS).logits)
    export_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_experts_hand_nothing_on(shortcut: str) -> None:
    model = adapted(model_of("mixtral"), shortcut, target_modules=["q_proj"])
    said = {row.name.rpartition(".")[2]: row.hands_on for row in inspect(model).layers}
    assert said["gate_up_proj_reslora"] == "no: an expert, plain LoRA"
    assert said["q_proj"] == "no: last of its chain"
    layer: Any = adapted_layers(model)["model.layers.1.mlp.experts.gate_up_proj_reslora"]
    assert layer.config.shortcut == "none"


def test_ranks_by_name_and_shared_out() -> None:
    model = adapted(model_of("mixtral"), r=9, split_expert_r=True, rank_pattern={"down_proj": 3})
    ranks = {row.name.rpartition(".")[2]: row.r for row in inspect(model).layers}
    assert ranks == {"gate_up_proj_reslora": 2, "down_proj_reslora": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout must be 0 with target_parameters"),
        ({"use_dora": True}, "use_dora must be False with target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True or 'gaussian'"),
        ({"backend": "cuda"}, "backend 'cuda' cannot run here|no kernel for"),
        ({"target_parameters": ["experts.w1"]}, "those of experts are mlp.experts.gate_up_proj"),
        ({"target_parameters": ["embed_tokens.weight"]}, "looked up, not multiplied by"),
        ({"target_parameters": ["norm.weight"]}, "neither a matrix nor one for each expert"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}, "in target_modules as well"),
        ({"target_parameters": "experts.gate_up_proj"}, "must be a list of names"),
    ],
)
def test_refused_before_anything_is_changed(settings: dict[str, Any], message: str) -> None:
    model = model_of("mixtral")
    keys, trained = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        adapted(model, **settings)
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == trained


def test_quantised_experts_are_refused() -> None:
    model = model_of("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"which is quantised \(torch.float8_e4m3fn\): load the model dequantised"):
        adapted(model)


class Mixed(nn.Module):
    """Experts whose forward is no matrix product that an adapter can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("sk,enk->sn", x, self.weight)


def test_what_is_no_product_is_refused_by_name() -> None:
    model = adapted(nn.Sequential(Mixed()), target_parameters=["0.weight"])
    with pytest.raises(TypeError, match="Mixed computes einsum of its parameter 'weight'"):
        model(torch.randn(2, 4))
    assert isinstance(model[0].weight, nn.Parameter)  # and not what stood in for it
    with disable_adapter(model):
        assert model(torch.randn(2, 4)).shape == (2, 4)
