"""ResLoRA (arXiv 2402.18039): low-rank adapters with residual paths between them, at the price of the frozen matmul."""

from ._version import __version__
from .adapt.apply import apply_reslora
from .adapt.coverage import inspect
from .adapt.switching import (
    adapter_names,
    adapters_per_sample,
    add_adapter,
    delete_adapter,
    disable_adapter,
    set_adapter,
)
from .config import ResLoRAConfig
from .files.peft_export import export_peft
from .files.peft_import import load_peft_adapter
from .files.save_load import load_adapter, save_adapter
from .layers.checkpointing import checkpoint_context
from .layers.kinds import link
from .layers.linear import ResLoRALinear
from .merge.combination import add_weighted_adapter
from .merge.merging import merge_and_unload, merge_reslora, unload, unmerge_reslora
from .merge.statistics import collect_statistics
from .training.many_gpus import shard_reslora
from .training.methods import RankAllocator, loraplus_groups, restart_reslora
from .training.pipeline import pipeline_reslora
from .training.starts import start_adapters

__all__ = [
    "RankAllocator",
    "ResLoRAConfig",
    "ResLoRALinear",
    "__version__",
    "adapter_names",
    "adapters_per_sample",
    "add_adapter",
    "add_weighted_adapter",
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
    "merge_and_unload",
    "merge_reslora",
    "pipeline_reslora",
    "restart_reslora",
    "save_adapter",
    "set_adapter",
    "shard_reslora",
    "start_adapters",
    "unload",
    "unmerge_reslora",
]
