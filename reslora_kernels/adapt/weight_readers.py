"""Linear layers whose owner reads the weight itself, past the module, so that an adapter in the module takes no part.

Such are Mamba's dt_proj, the projections of nn.MultiheadAttention and WavLM's attention, and, in its fused training
path, Mamba's out_proj. The owner's source tells: its forward, and the methods that it calls, name
``self.<layer>.weight`` as a value, not for its dtype or shape alone.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

_FACTS = ("dtype", "device", "shape", "ndim", "size", "dim", "requires_grad", "is_cuda")  # nothing of the values
_CHECKS = ("isinstance", "hasattr", "getattr", "type")


def read_past(owner: nn.Module, child: str) -> str | None:
    """How ``owner`` reads the weight of its layer ``child``: "only", "instead" or "also"; None where it does not.

    "also" means that it runs the layer in any case, "instead" that it does so under a condition.
    """
    if isinstance(owner, nn.TransformerEncoderLayer):
        return None  # its fused path, which would, is switched off for an adapted layer
    kind: Any = type(owner)
    read, called, branched = _uses(kind)
    if child not in read:
        return None
    return "also" if child in called else "instead" if child in branched else "only"


@functools.cache
def _uses(kind: Any) -> tuple[set[str], set[str], set[str]]:
    """What ``kind``, a class of modules, reads the weight of in its forward; what it runs there; what in branches."""
    read: set[str] = set()
    called: set[str] = set()
    branched: set[str] = set()
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        tree = _source(kind, waiting.pop())
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


def _source(kind: Any, method: str) -> ast.AST | None:
    """The syntax tree of a method; None where there is no source."""
    function = inspect.unwrap(getattr(kind, method))
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
