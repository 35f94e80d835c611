"""Philox4x32-10 in torch: the dropout mask of `lora_linear`, made again from a seed, never stored.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). One call gives four
32-bit words, so eight elements take 16 bits each: a call for each element would take a GPU longer
than reading x does. Element (row, column) has

    counter = (column // 128 · 32 + column % 32, row // 16 · 8 + row % 8, 0, 0)
    key     = (low 32 bits of seed, high 32 bits of seed)
    bits    = half row // 8 % 2 (0: low) of output word column // 32 % 4
    keep    = bits ≥ `threshold(p)`

The eight are apart by 32, 64 and 96 columns and by 8 rows, since those lie in the same thread of a
tensor core's accumulators: a kernel spreads the words over a tile without moving any. They depend
on neither the rows nor the columns there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_LEVELS = 1 << 16
# The published multipliers less 2³²: their products with a word fit int64 (2³¹·2³²), those of the
# multipliers themselves do not, and the high word of the real product is just the word more.
_MULTIPLIERS = (0xD2511F53 - (1 << 32), 0xCD9E8D57 - (1 << 32))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def threshold(p: float) -> int:
    """The smallest 16 bits that are kept when p, in [0, 1), of all are dropped."""
    return min(round(p * _LEVELS), _LEVELS - 1)


def keep_rate(p: float) -> float:
    """How probable it is that an element is kept: 1 − p, rounded to a multiple of 2⁻¹⁶. What is
    kept is divided by this, so that its mean is exact.
    """
    return 1 - threshold(p) / _LEVELS


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Which elements of a (rows, columns) tensor dropout keeps: bool, on the seed's device.

    Each is True with probability `keep_rate(p)` and depends on seed, row and column alone.

    Args:
        seed: (1,) int64, not negative.
        p: in [0, 1).
    """
    row_groups, column_groups = -(-rows // 16), -(-columns // 128)
    keep = torch.empty(row_groups * 16, column_groups * 128, dtype=torch.bool, device=seed.device)
    least, device = threshold(p), seed.device
    column_counter = torch.arange(column_groups * 32, dtype=torch.int64, device=device)
    zero, key = torch.zeros_like(seed), (seed & _WORD, seed >> 32)
    # Ten rounds of a dozen int64 operations, in blocks so that scratch is bounded: small ones on a
    # CPU, to stay in cache, large ones where each is a launch.
    step = max(1, (1 << (13 if device.type == "cpu" else 19)) // max(1, column_groups * 256))
    for first in range(0, row_groups, step):
        last = min(first + step, row_groups)
        row_counter = torch.arange(first * 8, last * 8, dtype=torch.int64, device=device)[:, None]
        words = torch.stack(philox4x32((column_counter, row_counter, zero, zero), key))
        bits = torch.stack((words & (_LEVELS - 1), words >> 16))  # half, word, row, column
        bits = bits.view(2, 4, last - first, 8, column_groups, 32).permute(2, 0, 3, 4, 1, 5)
        block = keep[first * 16 : last * 16].view(bits.shape)
        torch.ge(bits, least, out=block)
    return keep[:rows, :columns]


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
