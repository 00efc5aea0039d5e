"""English prose and Python source that come with CPython, as bytes, and fixed batches of them."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT_MODULES = ("argparse", "calendar", "configparser", "copy", "heapq", "shelve", "textwrap", "uuid")
HELD_OUT_TOPICS = 8  # every eighth topic
SMALLEST = 20_000  # bytes of a part of the data below which nothing useful can be learnt or measured


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes, each a 1-dimensional int64 tensor of values 0 to 255."""

    train: Tensor
    held_out: Tensor


def prose() -> Corpus:
    """The help topics of ``pydoc``; every eighth is held out.

    Raises:
        RuntimeError: this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise RuntimeError("this Python has no pydoc_data.topics, the English prose that the demo trains on") from None
    texts = [topics[name].encode() for name in sorted(topics)]
    held_out = texts[::HELD_OUT_TOPICS]
    train = [text for i, text in enumerate(texts) if i % HELD_OUT_TOPICS]
    return Corpus(_joined(train, "pydoc_data.topics"), _joined(held_out, "pydoc_data.topics"))


def python_source() -> Corpus:
    """The modules at the top of the standard library; those in ``HELD_OUT_MODULES`` are held out.

    Raises:
        RuntimeError: this Python keeps its standard library elsewhere than in source files.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    train: list[bytes] = []
    held_out: list[bytes] = []
    for path in sorted(folder.glob("*.py")):
        (held_out if path.stem in HELD_OUT_MODULES else train).append(path.read_bytes())
    return Corpus(_joined(train, str(folder)), _joined(held_out, str(folder)))


def random_batches(data: Tensor, count: int, sequences: int, length: int, seed: int) -> Tensor:
    """Crops at random places [count, sequences, length], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - length + 1, (count, sequences), generator=generator)
    return data[starts[..., None] + torch.arange(length)]


def spread_batch(data: Tensor, sequences: int, length: int) -> Tensor:
    """Crops at even distances over all of the data [sequences, length]."""
    starts = torch.linspace(0, len(data) - length, sequences).long()
    return data[starts[:, None] + torch.arange(length)]


def _joined(texts: Sequence[bytes], where: str) -> Tensor:
    joined = b"\n".join(texts)
    if len(joined) < SMALLEST:
        raise RuntimeError(f"the demo needs {SMALLEST:,} bytes of text out of {where}, found {len(joined):,}")
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()
