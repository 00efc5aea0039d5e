"""What keeps a layer from being adapted as it stands: an owner that reads its weight, or another library's hooks.

Owners that read the weight itself, past the module, are those of Mamba's dt_proj, of the projections of
nn.MultiheadAttention and WavLM's attention, and, in its fused training path, of Mamba's out_proj. The owner's source
tells: its forward, and the methods that it calls, name ``self.<layer>.weight`` as a value, not for its dtype or shape
alone.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..config import ResLoRAConfig, matches, with_parents
from ..layers.adapter import AdapterLayer
from ..layers.offloading import is_hooked, offloader
from ..layers.tensor_parallel import is_parallelized
from ..layers.wrappers import at

_FACTS = ("dtype", "device", "shape", "ndim", "size", "dim", "requires_grad", "is_cuda")  # nothing of the values
_JOINTS = {  # what diffusers' attention runs when it is fused, and in whose place
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
_CHECKS = ("isinstance", "hasattr", "getattr", "type")


def read_past(owner: nn.Module, child: str) -> str | None:
    """How ``owner`` reads the weight of its layer ``child``: "only", "instead" or "also"; None where it does not.

    "also" means that it runs the layer in any case, "instead" that it does so under a condition.
    """
    if isinstance(owner, nn.TransformerEncoderLayer):
        return None  # its fused path, which would, is switched off for an adapted layer
    kind: Any = type(owner)
    read, called, branched = _uses(kind, getattr(vars(owner).get("forward"), "__func__", None))
    if child not in read:
        return None
    return "also" if child in called else "instead" if child in branched else "only"


def reader_of_given(model: nn.Module) -> str | None:
    """The class of a module that reads the weight of an embedding that its forward is given, as heads of DeBERTa do.

    What the argument is told by its name alone.
    """
    return next((kind.__name__ for kind in dict.fromkeys(map(type, model.modules())) if _reads_given(kind)), None)


@functools.cache
def _reads_given(kind: Any) -> bool:
    tree = None if kind.__module__.startswith("torch.") else _source(kind.forward)
    nodes = [] if tree is None else [*_nodes(tree)]
    given = {argument.arg for node, _, _ in nodes if isinstance(node, ast.arguments) for argument in node.args[1:]}
    given = {name for name in given if "emb" in name}
    weights = [node for node, parent, _ in nodes if isinstance(node, ast.Attribute) and _is_value(node, parent)]
    return any(isinstance(weight.value, ast.Name) and weight.value.id in given for weight in weights)


@functools.cache
def _uses(kind: Any, forward: Any = None) -> tuple[set[str], set[str], set[str]]:
    """What ``kind``, a class of modules, reads the weight of in its forward; what it runs there; what in branches.

    ``forward`` is what another library has put on the instance in the place of the class's.
    """
    read: set[str] = set()
    called: set[str] = set()
    branched: set[str] = set()
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        method = waiting.pop()
        tree = _source(forward if method == "forward" and forward is not None else getattr(kind, method))
        for node, parent, in_branch in _nodes(tree) if tree is not None else ():
            name = _of_self(node)
            if name is not None and name not in seen and inspect.isfunction(getattr(kind, name, None)):
                seen.add(name)
                waiting.append(name)
            if isinstance(node, ast.Call) and (name := _of_self(node.func)):
                (branched if in_branch else called).add(name)
            if isinstance(node, ast.Attribute) and _is_value(node, parent) and (name := _of_self(node.value)):
                read.add(name)
    return read, called, branched


def _source(method: Any) -> ast.AST | None:
    """The syntax tree of a method; None where there is no source."""
    function = inspect.unwrap(method)
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _nodes(
    tree: ast.AST, parent: ast.AST | None = None, in_branch: bool = False
) -> Iterator[tuple[ast.AST, ast.AST | None, bool]]:
    """Every node with the one around it, and whether it runs under a condition only."""
    yield tree, parent, in_branch
    for child in ast.iter_child_nodes(tree):
        yield from _nodes(child, tree, in_branch or isinstance(tree, (ast.If, ast.IfExp)))


def _of_self(node: ast.AST) -> str | None:
    """x of ``self.x``."""
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if is_own and isinstance(node, ast.Attribute) else None


def _is_value(node: ast.Attribute, parent: ast.AST | None) -> bool:
    """Whether it is a weight whose values are used, not one of its facts, and nothing is assigned to it."""
    if node.attr != "weight" or not isinstance(node.ctx, ast.Load):
        return False
    if isinstance(parent, ast.Attribute) and parent.attr in _FACTS:
        return False
    return not (isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in _CHECKS)


def refuse_foreign_hooks(model: nn.Module, targets: Mapping[str, nn.Module], config: ResLoRAConfig) -> None:
    """Raise a ValueError that names the first module that cannot be adapted, or trained, as it stands."""
    for fault in _faults(model, targets, config):
        raise ValueError(fault)


def _faults(model: nn.Module, targets: Mapping[str, nn.Module], config: ResLoRAConfig) -> Iterator[str]:
    for name, module in model.named_modules():
        registry = vars(module).get("_diffusers_hook")
        if registry is not None and "group_offloading" in registry.hooks:
            yield f"{name or 'model'!r} is under diffusers' group offloading: call apply_reslora first, then offload"
        hook = offloader(module)
        if hook is not None and hook.place_submodules and any(target.startswith(f"{name}.") for target in targets):
            yield (
                f"accelerate loads {name!r} with all its submodules (preload_module_classes), which would look for the "
                "adapters among the offloaded weights: leave it out of preload_module_classes"
            )
        if hook is not None and _is_trained(name, module, config, targets):
            yield (
                f"{name!r} would be trained (modules_to_save, bias), but accelerate offloads it, so that every forward "
                "starts from the old value: keep it on a device in device_map"
            )
    if fault := _rescaled(model):
        yield fault
    for name, linear in targets.items():
        if fault := _fused(model, name):
            yield fault
        if isinstance(linear, nn.Module) and _is_replaced(linear):
            yield (
                f"the forward of {name!r} is replaced on the instance by {_whose(linear)}, which an adapter would "
                "lose: call apply_reslora first and replace it afterwards. For diffusers' layerwise casting that is "
                "enable_layerwise_casting(skip_modules_classes=(ResLoRALinear,)): adapters are not held in 8 bits"
            )


def _rescaled(model: nn.Module) -> str | None:
    """What is wrong if the model divides weights of its later blocks in evaluation, as RWKV does: not their updates."""
    for module in model.modules():
        settings: Any = getattr(module, "config", None)
        every = getattr(settings, "rescale_every", 0) if hasattr(module, "layers_are_rescaled") else 0
        if 0 < every < settings.num_hidden_layers:
            return (
                f"{type(module).__name__} divides the weights of its blocks from {every} on in evaluation, past their "
                "adapters: set model.config.rescale_every = 0 first"
            )
    return None


def refuse_fused(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    """ValueError, which names it, if diffusers runs another layer in the place of one of ``layers``."""
    for fault in filter(None, (_fused(model, name) for name, layer in layers.items() if not has_no_say(layer))):
        raise ValueError(fault)


def _fused(model: nn.Module, name: str) -> str | None:
    """What is wrong if diffusers has fused a layer's weight with its neighbours' (``fuse_qkv_projections``)."""
    path, _, child = name.rpartition(".")
    owner = at(model, path)
    if owner is None or not is_fused(owner):
        return None
    joint = next((joint for joint, parts in _JOINTS.items() if joint in owner._modules and child in parts), None)
    if joint is None:
        return None
    return (
        f"{name!r} does not run: diffusers' fuse_qkv_projections has put {joint!r} in its place, with the weights of "
        "then. Call unfuse_qkv_projections() first; a merged model can be fused"
    )


def is_fused(owner: nn.Module) -> bool:
    """Whether diffusers has fused its projections.

    Of some classes a processor decides, whatever the mark says after ``unfuse_qkv_projections``.
    """
    marked = vars(owner).get("fused_projections", False)
    processor = type(getattr(owner, "processor", None)).__name__ if marked else ""
    return marked and (hasattr(owner, "unfuse_projections") or processor.startswith("Fused"))


def has_no_say(layer: Any) -> bool:
    """Whether the layer computes what the frozen one does."""
    return bool(layer.merged or layer.disabled)


def _is_trained(name: str, module: nn.Module, config: ResLoRAConfig, targets: Mapping[str, nn.Module]) -> bool:
    if config.modules_to_save and any(matches(parent, config.modules_to_save) for parent in with_parents(name)):
        return True
    biases = any(parameter.endswith("bias") for parameter, _ in module.named_parameters(recurse=False))
    return biases and (config.bias == "all" or (config.bias == "lora_only" and name in targets))


def _is_replaced(linear: nn.Module) -> bool:
    """Whether ``forward`` is another than the class's, and not by accelerate or Transformers' tensor parallel styles,
    which are carried over."""
    forward = vars(linear).get("forward")
    own = getattr(forward, "__func__", None) is type(linear).forward
    return forward is not None and not own and not is_hooked(linear) and not is_parallelized(linear)


def _whose(linear: nn.Module) -> str:
    registry = vars(linear).get("_diffusers_hook")
    if registry is not None and registry.hooks:
        return f"diffusers ({', '.join(registry.hooks)})"
    forward = vars(linear)["forward"]
    forward = getattr(forward, "func", forward)
    return f"{getattr(forward, '__module__', '?')}.{getattr(forward, '__qualname__', type(forward).__name__)}"
