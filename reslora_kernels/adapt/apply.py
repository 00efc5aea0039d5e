"""apply_reslora: freeze a model, swap its linear layers, link them in chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..backends import select
from ..checks import check_bool, check_module
from ..config import ResLoRAConfig, checked_config, matches
from ..dtensors import is_partitioned, placements_of, refuse_fsdp
from ..layers.adapter import AdapterLayer
from ..layers.experts import ResLoRAExperts, TargetParameter
from ..layers.kinds import config_of, kind_of, weight_of
from ..layers.shortcuts import hands_on
from ..layers.wrappers import modules_of
from ..quantizers import keep_order
from . import trained_tokens
from .checkpoints import guard, statistics_of, trained_beside, undefined
from .linking import ChainPlan, Chains, build_chains, confirm_order, names_of_experts, plan_chains
from .obstacles import refuse_foreign_hooks
from .record import Record, adapted_layers, checked_name, is_adapted
from .surroundings import watch_methods
from .targets import find_targets, with_heads_saved

_NESTED = "_reslora_nested"  # what use_nested_tensor of an adapted encoder was


def apply_reslora(
    model: nn.Module,
    config: ResLoRAConfig,
    *,
    example_inputs: Any = None,
    autocast_adapter_dtype: bool = True,
    adapter_name: str = "default",
    chains: Chains | None = None,
) -> nn.Module:
    """Adapt ``model`` in place: freeze it, swap every targeted ``nn.Linear`` for a ``ResLoRALinear``, link the chains.

    Chains are read off the names of the modules: a chain holds the layers of one role (the name without the indices of
    blocks) with equal ``in_features``, ``out_features`` and rank, ordered by the indices of their blocks. Layers of
    experts, which see a choice of the tokens, hand nothing on: with "input" and "middle" they are plain LoRA.

    A run confirms the order, with ``example_inputs``, or with small inputs derived from the config of a Transformers
    model or a diffusers UNet; where layers execute in another order a warning says so. It also finds the layers that
    read one tensor, for ``stack_projections``. Without inputs there is no such run.

    The head of a Transformers model for a task (``...ForSequenceClassification``: what it has beside its base model)
    is trained whole, unless ``target_modules`` names it: it joins ``modules_to_save``, as with PEFT's task types.

    Args:
        model: any module; it is changed and returned.
        config: what to adapt and how.
        example_inputs: a dict of keyword arguments, a tuple or list of positional ones, or one tensor.
        autocast_adapter_dtype: keep adapters in float32 when the weights are float16 or bfloat16, as PEFT does.
        adapter_name: what to call the adapter where the model gets more than one (``add_adapter``).
        chains: chains by hand, as lists of names of adapted layers in their order, or a dict of such lists by title.
            Layers that none names are in the chains of the structure. Layers of experts named here do hand on.

    Returns:
        ``model``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: nothing matches, a match is no plain ``nn.Linear`` or has its ``forward`` replaced by another than
            accelerate's hooks, or the model is adapted or sharded over processes already; the
            message names it or lists the candidates. Or ``chains`` names a layer that is not adapted, names one twice,
            or puts layers of other sizes or ranks into one chain.
        RuntimeError: ``config.backend`` cannot run on this machine. In every case the model is left as it was.
    """
    check_module("model", model)
    checked_config(config)
    check_bool("autocast_adapter_dtype", autocast_adapter_dtype)
    refuse_fsdp(model, "adapted", "call apply_reslora first, then shard_reslora")
    checked_name(adapter_name)
    select.check(config.backend)
    config = with_heads_saved(config, model)
    targets = find_targets(model, config)
    refuse_foreign_hooks(model, targets.matched, config)
    record = Record(config, targets.unmatched, adapter_name, given=chains is not None)
    plans = plan_chains(model, targets.matched, config, chains)
    if record.given:
        record.order = "chains="
    confirm_order(model, targets.matched, plans, example_inputs, record)
    adapt(model, targets.matched, record, plans, autocast_adapter_dtype)
    return model


def adapt(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    record: Record,
    plans: Sequence[ChainPlan],
    autocast_adapter_dtype: bool,
    init_values: bool = True,
) -> None:
    """Swap ``targets``, freeze the rest, and link the chains."""
    config = record.config
    _refuse_layouts(targets, plans, config)
    found = trained_tokens.tables(model, config, targets)
    trained_tokens.refuse_adapted_heads(model, config, targets)
    experts = names_of_experts(plans)
    configs = {
        name: without_hand_over(config_of(config, name, base)) if name in experts else config_of(config, name, base)
        for name, base in targets.items()
    }
    keep_order(model)
    _swap(model, targets, config, configs, autocast_adapter_dtype, init_values)
    trained_tokens.attach(model, record, found, autocast_adapter_dtype)
    record.layer_names = list(targets)
    record.kept |= undefined(model) | trained_beside(model)
    record.statistics = statistics_of(model)
    model.__dict__["_reslora"] = record
    guard(model)
    watch_methods(model)
    trained_tokens.tie(model, record, adapted_layers(model))
    build_chains(model, plans)


def _refuse_layouts(targets: Mapping[str, nn.Module], plans: Sequence[ChainPlan], config: ResLoRAConfig) -> None:
    """ValueError where a tensor parallel plan spreads another target than an nn.Linear, or parts of a chain unlike.

    And where ZeRO-3 has spread a weight whose values adapters start from.
    """
    for name, base in targets.items():
        if not isinstance(base, nn.Linear) and placements_of(getattr(base, "weight", None)) != "whole":
            raise ValueError(
                f"{name!r} is spread by a tensor parallel plan and is no nn.Linear: leave it out of the plan, or out "
                "of target_modules and target_parameters"
            )
        if is_partitioned(getattr(base, "weight", None)) and (config.has_start or config.use_dora):
            raise ValueError(
                f"the weight of {name!r}, from whose values use_dora and init_lora_weights="
                f"{config.init_lora_weights!r} start, is partitioned by DeepSpeed ZeRO-3: gather it first (with "
                "deepspeed.zero.GatheredParameters(model.parameters()) in all processes)"
            )
    if config.shortcut == "none":
        return
    for plan in plans:
        layouts = {name: placements_of(getattr(targets[name], "weight", None)) for name in plan.names}
        other = next((name for name in layouts if layouts[name] != layouts[plan.names[0]]), None)
        if other is not None:
            raise ValueError(
                f"the tensor parallel plan spreads layers of one chain unlike: {plan.names[0]!r} is "
                f"{layouts[plan.names[0]]}, {other!r} is {layouts[other]}. Name all layers of a role in the plan, or "
                "give chains=, or shortcut='none'"
            )


def without_hand_over(config: ResLoRAConfig) -> ResLoRAConfig:
    """The same, without a hand-over."""
    if not hands_on(config.shortcut, config.pre_num):
        return config
    return replace(config, shortcut="none", gates="none", gates_init=1.0)


def _swap(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    config: ResLoRAConfig,
    configs: Mapping[str, ResLoRAConfig],
    autocast: bool,
    init_values: bool,
) -> None:
    """Replace the targets wherever they are registered; nothing is changed if building a layer fails."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        new = {id(one): _adapted(one, configs[name], autocast, init_values) for name, one in targets.items()}
    except Exception:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise
    put_in_place(model, [(base, new[id(base)]) for base in targets.values()])
    model.requires_grad_(False)
    for name, module in modules_of(model):
        if config.modules_to_save and matches(name, config.modules_to_save):
            module.requires_grad_(True)
    for layer in new.values():
        for name, parameter in layer.adapter_parameters().items():
            parameter.requires_grad_(name.startswith("lora_"))
        if layer.bias is not None and config.bias == "lora_only":
            layer.bias.requires_grad_(True)
    if config.bias == "all":
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(True)


def _adapted(module: Any, config: ResLoRAConfig, autocast_adapter_dtype: bool, init_values: bool) -> AdapterLayer:
    kind = ResLoRAExperts if isinstance(module, TargetParameter) else kind_of(module)
    assert kind is not None
    weight = weight_of(module)
    dtype = None if autocast_adapter_dtype or not weight.is_floating_point() else weight.dtype
    return kind.from_linear(module, config, dtype, init_values=init_values)


def put_in_place(model: nn.Module, pairs: Sequence[tuple[Any, AdapterLayer]]) -> None:
    """Let each layer take the place of the module that it adapts, or one beside the parameter that it adapts."""
    replace_modules(model, {id(base): layer for base, layer in pairs if isinstance(base, nn.Module)})
    for base, layer in pairs:
        if isinstance(base, TargetParameter):
            layer.take_place_of(base)


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put ``new`` in the place of the modules with these ids, wherever they are registered, or in a plain list."""
    for parent in list(model.modules()):
        for held in vars(parent).values():  # Mask2Former calls its layers from one
            if type(held) is list and any(id(one) in new for one in held):
                held[:] = [new.get(id(one), one) for one in held]
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]
                if isinstance(parent, nn.TransformerEncoderLayer):
                    parent.activation_relu_or_gelu = 0  # no fused inference: it reads linear1.weight past the adapter
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            _leave_out_padding(encoder)


def _leave_out_padding(encoder: Any) -> None:
    """Let ``encoder`` make nested tensors, for fused inference alone, as it did unless a layer of it is adapted."""
    if is_adapted(encoder):
        encoder.__dict__.setdefault(_NESTED, encoder.use_nested_tensor)
        encoder.use_nested_tensor = False
    else:
        encoder.use_nested_tensor = encoder.__dict__.pop(_NESTED, encoder.use_nested_tensor)
