"""``reslora demo``: train, merge, export and compare all shortcuts on a small language model."""

from reslora_kernels.cli.demo.command import demo

__all__ = ["demo"]
