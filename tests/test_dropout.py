"""The counter-based mask: the published generator, any tile alike, the right share dropped."""

from __future__ import annotations

import pytest
import torch

from reslora_kernels import dropout

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    """Known answers for philox4x32 with 7 rounds, from the authors' Random123 distribution."""
    assert [int(word) for word in dropout.philox(counter, [torch.tensor(part) for part in key])] == list(words)


def test_mask_is_the_documented_layout() -> None:
    """Element (row, column) reads 16 bits of word (column % 8) // 2 of the call at (column // 8, row)."""
    seed, p = torch.tensor(0x123456789ABCDEF0), 0.3
    mask = dropout.keep_mask(seed, 5, 19, p)
    key = [seed & ONES, seed >> 32]
    for row, column in ((0, 0), (0, 1), (3, 7), (4, 8), (2, 18)):
        word = int(dropout.philox((column // 8, row, 0, 0), key)[column % 8 // 2])
        assert bool(mask[row, column]) == ((word >> 16 * (column % 2)) & 0xFFFF >= round(p * 65536))


def test_any_part_of_the_mask_is_drawn_alike() -> None:
    """A kernel may draw any tile: a smaller mask is the corner of a larger one, also across chunks of the CPU path."""
    seed = torch.tensor(7)
    large = dropout.keep_mask(seed, 1500, 203, 0.5)
    assert torch.equal(dropout.keep_mask(seed, 33, 50, 0.5), large[:33, :50])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_dropped_is_p(p: float) -> None:
    """Within five standard deviations of the binomial, over all and in every one of the 8 lanes."""
    mask = dropout.keep_mask(torch.tensor(11), 1000, 512, p)
    for part in (mask, *(mask[:, lane::8] for lane in range(8))):
        deviation = (p * (1 - p) / part.numel()) ** 0.5
        assert abs(float((~part).double().mean()) - p) < 5 * deviation + 2**-16


def test_seeds_come_from_torchs_generator() -> None:
    """Checkpointing restores the generator's state and must get the same mask back."""
    torch.manual_seed(3)
    first, second = dropout.new_seed(torch.device("cpu")), dropout.new_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, dropout.new_seed(torch.device("cpu")))
    assert not torch.equal(first, second)


def test_dropped_infinity_is_zero() -> None:
    """0 times Inf would be NaN; a dropped element contributes nothing whatever it was."""
    x = torch.tensor([[float("inf"), 2.0]])
    assert dropout.apply_mask(x, torch.tensor([[False, True]]), 0.5).tolist() == [[0.0, 4.0]]
