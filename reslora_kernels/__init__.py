"""ResLoRA (arXiv 2402.18039): low-rank adapters with residual paths between them, at the price of the frozen matmul."""

from ._version import __version__
from .adapters import load_adapter, save_adapter
from .checkpointing import checkpoint_context
from .config import ResLoRAConfig
from .coverage import inspect
from .distributed import shard_reslora
from .linear import ResLoRALinear, link
from .loraplus import loraplus_groups
from .merging import merge_reslora, unmerge_reslora
from .model import apply_reslora
from .peft_export import export_peft
from .peft_import import load_peft_adapter
from .rank_allocation import RankAllocator
from .relora import restart_reslora
from .statistics import collect_statistics
from .switching import adapter_names, add_adapter, delete_adapter, disable_adapter, set_adapter

__all__ = [
    "RankAllocator",
    "ResLoRAConfig",
    "ResLoRALinear",
    "__version__",
    "adapter_names",
    "add_adapter",
    "apply_reslora",
    "checkpoint_context",
    "collect_statistics",
    "delete_adapter",
    "disable_adapter",
    "export_peft",
    "inspect",
    "link",
    "load_adapter",
    "load_peft_adapter",
    "loraplus_groups",
    "merge_reslora",
    "restart_reslora",
    "save_adapter",
    "set_adapter",
    "shard_reslora",
    "unmerge_reslora",
]
