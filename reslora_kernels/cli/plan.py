"""``reslora plan``: what each GPU would hold and send, computed from a model's configuration on the meta device."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.cli.options import (
    DEFAULTS,
    ExcludeModules,
    Gates,
    LayersToTransform,
    PreNum,
    Rank,
    Shortcut,
    TargetModules,
    TrustRemoteCode,
    adapted_without_weights,
    load_model_config,
    make_config,
)
from reslora_kernels.layers.adapter import AdapterLayer
from reslora_kernels.layers.shortcuts import hands_on
from reslora_kernels.training.many_gpus import Footprint, Sizes, Split, footprints

GIB = 2**30
PROBE = 4099  # tokens of the trial run; a prime, so that a dimension of this size is one of tokens
Blocks = list[tuple[str, nn.Module]]


def plan(
    model: Annotated[str, typer.Argument(help="Folder of a Transformers model, or its id on the Hugging Face Hub.")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many GPUs.")] = 8,
    gpu_memory: Annotated[float, typer.Option("--gpu-memory", min=0, help="Of each, in GiB.")] = 80,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens of a batch, for each GPU or tensor parallel group.")
    ] = 4096,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tp", min=1, help="GPUs of a tensor parallel group. Not given: up to 8.")
    ] = None,
    r: Rank = DEFAULTS["r"],
    target_modules: TargetModules = DEFAULTS["target_modules"],
    exclude_modules: ExcludeModules = None,
    layers_to_transform: LayersToTransform = None,
    shortcut: Shortcut = DEFAULTS["shortcut"],
    pre_num: PreNum = DEFAULTS["pre_num"],
    gates: Gates = DEFAULTS["gates"],
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """What each of N GPUs would hold and send while MODEL trains, by layout, and which layouts fit.

    Only the model's configuration is read: the model is made on the meta device, and a trial run there says what
    backward keeps. Attention matrices are not counted (flash attention keeps none); nor are the library's workspaces
    and what the allocator leaves unused: leave a tenth free.
    """
    config = make_config(
        r=r,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        layers_to_transform=layers_to_transform,
        shortcut=shortcut,
        pre_num=pre_num,
        gates=gates,
    )
    if tensor_parallel is not None and gpus % tensor_parallel:
        raise ValueError(f"--tp must divide --gpus {gpus}, got {tensor_parallel}")
    adapted = adapted_without_weights(load_model_config("MODEL", model, trust_remote_code), config, trust_remote_code)
    sizes = sizes_of(adapted)
    found = list(footprints(sizes, gpus, tokens, tensor_parallel))
    if json_output:
        rows = [{**asdict(one), "fits": one.fits(gpu_memory * GIB)} for one in found]
        typer.echo(
            json.dumps(
                {"model": model, "config": config.to_dict(), "handed": sizes.handed * tokens, "layouts": rows}, indent=2
            )
        )
        return
    show(found, sizes, gpus, gpu_memory, tokens)


def show(found: list[Footprint], sizes: Sizes, gpus: int, gpu_memory: float, tokens: int) -> None:
    """The layouts as a table, in GiB."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(
        f"{gpus} GPUs of {gpu_memory:g} GiB, {tokens} tokens in a batch; GiB of each GPU, and GiB it sends in a step",
        highlight=False,
    )
    table = Table()
    for name in (
        "layout", "weights", "gathered", "adapters", "optimizer", "activations", "checkpointed", "total", "sent",
    ):  # fmt: skip
        table.add_column(name, justify="left" if name == "layout" else "right")
    table.add_column("fits")
    for one in found:
        answer = one.fits(gpu_memory * GIB)
        held = (one.weights, one.gathered, one.adapters, one.optimizer, one.activations, one.recomputed)
        numbers = (*held, one.total(answer != "yes"), one.sent)
        table.add_row(one.layout, *(f"{part / GIB:.2f}" for part in numbers), answer)
    console.print(table)
    console.print(
        f"of the activations, {sizes.handed * tokens / 2**20:.1f} MiB are handed from layer to layer, r values of a "
        "token each time; no layout sends any of them",
        highlight=False,
    )


def sizes_of(model: nn.Module) -> Sizes:
    """What of an adapted model on the meta device counts."""
    blocks = blocks_of(model)
    cut = cut_parameters(model)
    inside = {id(p): index for index, (_, block) in enumerate(blocks) for p in block.parameters()}
    held = [Split() for _ in blocks]
    around, adapters, quantizable, widest = Split(), Split(), 0.0, 0.0
    layers = adapted_layers(model)
    own = {id(p): (layer, name) for layer in layers.values() for name, p in layer.adapter_parameters().items()}
    layer_names = {id(layer): name for name, layer in layers.items()}
    for name, parameter in model.named_parameters():
        size = float(parameter.numel() * parameter.element_size())
        if id(parameter) in own:
            layer, kind = own[id(parameter)]
            adapters += split_adapter(cut.get(f"{layer_names[id(layer)]}.weight"), kind, size)
            continue
        part = Split(cut=size) if name in cut else Split(whole=size)
        if id(parameter) in inside:
            held[inside[id(parameter)]] += part
        else:
            around += part
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in inside:
            quantizable += module.weight.numel()
            widest = max(widest, float(module.weight.numel() * module.weight.element_size()))
    kept, outside = kept_for_backward(model, [block for _, block in blocks])
    return Sizes(
        blocks=sum(held, Split()),
        block=max(held, key=lambda part: part.total, default=Split()),
        around=around,
        quantizable=quantizable,
        widest=widest,
        weight_bytes=next(iter(layers.values())).weight.element_size(),
        adapters=adapters,
        block_count=len(blocks),
        inside=sum(kept, Split()),
        block_inside=max(kept, key=lambda part: part.total, default=Split()),
        block_input=float(hidden_size(model) * next(iter(layers.values())).weight.element_size()),
        outside=outside,
        handed=float(sum([values_handed_on(layer) for layer in layers.values()])),
        summed=reductions(layers, cut),
        heads=key_heads(model),
    )


def blocks_of(model: nn.Module) -> Blocks:
    """The modules that repeat: children of lists of modules which are in no other block."""
    found: Blocks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{block}.") for block, _ in found):
            found += [(f"{name}.{child}", block) for child, block in module.named_children()]
    return found


def cut_parameters(model: nn.Module) -> dict[str, str]:
    """The parameters that the model's own tensor parallel plan cuts, and the style that does."""
    rules = getattr(model, "_tp_plan", None) or {}
    cut = {}
    for name, _ in model.named_parameters():
        general = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        style = rules.get(general) or rules.get(general.rpartition(".")[0])
        if style is not None and ("colwise" in style or ("rowwise" in style and not name.endswith(".bias"))):
            cut[name] = style
    return cut


def split_adapter(style: str | None, kind: str, size: float) -> Split:
    """An adapter's parameter under its layer's style: A is cut with rowwise W, B and magnitudes with colwise W."""
    cut = style is not None and kind != "lora_gates" and ("rowwise" in style) == kind.endswith("_A")
    return Split(cut=size) if cut else Split(whole=size)


def kept_for_backward(model: nn.Module, blocks: list[nn.Module]) -> tuple[list[Split], float]:
    """Bytes a token that autograd keeps in each block and around them, of a trial run; weights are not counted.

    Raises:
        RuntimeError: the model does not run without weights.
    """
    parts = [Split() for _ in blocks]
    outside, running = 0.0, [-1]
    known: dict[int, Tensor] = {
        _storage(p): p for p in model.parameters()
    }  # keeps them alive: a storage's address may be used again
    width = hidden_size(model)

    def enter(index: int) -> Any:
        return lambda module, args: running.append(index)

    def keep(tensor: Tensor) -> Tensor:
        nonlocal outside
        if _storage(tensor) in known or not tensor.dim() or tensor.shape[-2:] == (PROBE, PROBE):
            return tensor
        known[_storage(tensor)] = tensor
        size = tensor.untyped_storage().nbytes() / PROBE
        if running[-1] < 0:
            outside += size
        else:
            whole = tensor.shape[-1] in (width, 1)
            parts[running[-1]] += Split(whole=size) if whole else Split(cut=size)
        return tensor

    handles = [block.register_forward_pre_hook(enter(index)) for index, block in enumerate(blocks)]
    handles += [block.register_forward_hook(lambda *_: void(running.pop()), always_call=True) for block in blocks]
    tokens = torch.zeros(1, PROBE, dtype=torch.int64, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.train()(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens, use_cache=False)
    except Exception as error:  # whatever the model's own code says to tokens and labels
        raise RuntimeError(
            f"what training keeps is counted in a run of {type(model).__name__} without weights, which failed "
            f"({type(error).__name__}: {error}). It must be a language model that takes input_ids, attention_mask and "
            f"labels, {PROBE} of them; rotary embeddings run without weights from Transformers 5 on"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return parts, outside


def void(value: object) -> None:
    """Nothing, whatever the value: what a hook returns would take the place of the output."""


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def values_handed_on(layer: AdapterLayer) -> int:
    """Bytes a token that the layer hands on to the next one of its chain."""
    config = layer.config
    last = layer.chain is None or layer.neighbours.following is None
    hands = not last and hands_on(config.shortcut, config.pre_num)
    return config.r * int(layer.weight.element_size()) if hands else 0


def reductions(layers: dict[str, AdapterLayer], cut: dict[str, str]) -> tuple[float, float]:
    """Bytes a token that a plan adds up over its processes: outputs of rowwise layers, gradients of colwise inputs."""
    forward = backward = 0.0
    for name, layer in layers.items():
        style = cut.get(f"{name}.weight", "")
        forward += layer.out_features * layer.weight.element_size() if "rowwise" in style else 0
        backward += layer.in_features * layer.weight.element_size() if "colwise" in style else 0
    return forward, backward


def hidden_size(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def key_heads(model: Any) -> int:
    config = model.config.get_text_config()
    heads: Any = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    return int(heads)
