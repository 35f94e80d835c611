"""Philox4x32-10 in torch: the dropout mask of `lora_linear`, made again from a seed, never stored.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), and `tl.rand` of
Triton for how a word becomes a uniform number. A kernel draws the same mask, bit for bit, when it
computes for element (row, column) of a (rows, columns) tensor

    offset  = row·columns + column                     (64 bits)
    counter = (low 32 bits of offset, high 32 bits of offset, 0, 0)
    key     = (low 32 bits of seed, high 32 bits of seed)
    w       = first output word; if w ≥ 2³¹ then w := 2³² − 1 − w, so that 0 ≤ w < 2³¹
    uniform = fp32(w) · fp32(4.6566127342e-10)         in [0, 1)
    keep    = uniform ≥ fp32(p)

That is `tl.rand(seed, offset)`, with one trap: at 64-bit offsets triton 3.3 goes over to Philox4x64
and 3.7 does not. `tl.philox(seed, low, high, 0, 0)` on uint32 words is the same in both.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
# The published multipliers less 2³²: their products with a word fit int64 (2³¹·2³²), those of the
# multipliers themselves do not, and the high word of the real product is just the word more.
_MULTIPLIERS = (0xD2511F53 - (1 << 32), 0xCD9E8D57 - (1 << 32))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# tl.rand's: the largest fp32 number that keeps (2³¹ − 1)·scale below 1.
_UNIFORM_SCALE = 4.6566127342e-10


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Which elements of a (rows, columns) tensor dropout keeps: bool, on the seed's device.

    Each is False with probability p and depends on (seed, row·columns + column) alone.

    Args:
        seed: (1,) int64, not negative.
        p: in [0, 1), rounded to fp32.
    """
    keep = torch.empty(rows * columns, dtype=torch.bool, device=seed.device)
    # Ten rounds of a dozen int64 operations, in blocks so that scratch is bounded: small ones on a
    # CPU, to stay in cache (24 ns an element, 56 at 2¹⁸), large ones where each is a launch.
    block = 1 << (16 if seed.device.type == "cpu" else 22)
    for start in range(0, keep.numel(), block):
        stop = min(start + block, keep.numel())
        offsets = torch.arange(start, stop, dtype=torch.int64, device=seed.device)
        torch.ge(uniform(seed, offsets), p, out=keep[start:stop])
    return keep.view(rows, columns)


def uniform(seed: Tensor, offsets: Tensor) -> Tensor:
    """fp32 numbers in [0, 1), one for each of the int64 `offsets`: `tl.rand(seed, offsets)`."""
    zero = torch.zeros_like(seed)
    word = philox4x32((offsets & _WORD, offsets >> 32, zero, zero), (seed & _WORD, seed >> 32))[0]
    return torch.minimum(word, _WORD - word).to(torch.float32) * _UNIFORM_SCALE


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on 32-bit words held in int64 tensors that broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of word·(multiplier + 2³²), see `_MULTIPLIERS`."""
    product = word * multiplier
    return (product >> 32) + word, product & _WORD
