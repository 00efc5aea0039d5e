"""Shared by all tests: one thread, which tiny models run fastest on, tests marked gpu only where there is one.

Without a GPU, Triton kernels run in its CPU interpreter. Triton reads the variable when it is first imported, so it is
set here; the interpreter itself is patched when the first test asks for it.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A test file at a time per processor, as a test has one thread; one in all where they would share a GPU."""
    return 0 if torch.cuda.is_available() else min(8, os.cpu_count() or 1)


SLOW_FIXTURES = {"emulated", "demo_run", "hopper"}  # kernels to compile, and a demo to run


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests come first, so that no process begins with one when all others have ended."""
    for item in items if not torch.cuda.is_available() else ():
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if not SLOW_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """What imports have made stays to the end: the garbage collector need not walk through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def patched_interpreter() -> Iterator[bool]:
    """Triton's interpreter as ``tests/triton_interpreter`` makes it, to the end of the run; False on a GPU."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield False
        return
    from .triton_interpreter import install, uninstall

    install()
    yield True
    uninstall()


@pytest.fixture
def triton_interpreter(patched_interpreter: bool) -> bool:
    """Whether kernels of this test run in the interpreter; programs run in the same random order in every run of it."""
    if patched_interpreter:
        from .triton_interpreter import set_program_order

        set_program_order(0)
    return patched_interpreter


PROSE = (
    "The quick brown fox jumps over the lazy dog. What is two plus two? Two plus two is four. "
    "A shortcut adds what an earlier layer saw, and the rank stays small. Thanks, you are welcome."
)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a 3-layer LLaMA of width 32 and a byte-level BPE tokenizer without a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer() -> Any:
    """A fresh copy of the base model's tokenizer, to be changed at will."""
    return make_tokenizer()


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        [PROSE] * 4, trainers.BpeTrainer(vocab_size=320, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
