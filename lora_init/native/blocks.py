"""How csrc/descend.cu cuts matrices into blocks, one for a CTA, and what it is told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lora_init.ops.descend import DescentState

# Of csrc/blocks.h.
_TILE, _COUNTERS, _COUNTER_BYTES = 16, 2, 32
# Fewer rows a block would make more of what CTAs exchange than of W.
_LEAST_ROWS = 16


@dataclass(frozen=True)
class Variant:
    """A kernel of csrc/descend.cuh.

    Attributes:
        ranks: 8, 16 or 32, at least a matrix' r.
        element_bytes: of the matrices.
        streamed: a block is read anew each step, else it is kept on chip.
    """

    ranks: int
    element_bytes: int
    streamed: bool

    @classmethod
    def of(cls, weight: Tensor, params: Tensor, streamed: bool) -> Variant:
        """By the matrix' own rank, so that its bits do not depend on the group's."""
        ranks = next(ranks for ranks in (8, 16, 32) if ranks >= params.shape[0])
        return cls(ranks, weight.element_size(), streamed)

    def __iter__(self) -> Iterator[int | bool]:
        return iter((self.ranks, self.element_bytes, self.streamed))


@dataclass(frozen=True)
class Limits:
    """What a variant has on a device.

    Attributes:
        ctas: that run at a time.
        tiles: 16 × 16 elements, of a block's rows and columns: all that stay on chip are so large;
            of those that are streamed, the most columns, and 0 for rows, of which there is no most.
    """

    ctas: int
    tiles: tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """A matrix as blocks of one size; the last of a row or column may reach beyond it.

    Attributes:
        variant: that takes it.
        tiles: of a block's rows and columns.
        blocks: in a column and in a row of the matrix.
    """

    variant: Variant
    tiles: tuple[int, int]
    blocks: tuple[int, int]

    @property
    def count(self) -> int:
        return self.blocks[0] * self.blocks[1]


def cut(shape: Sequence[int], variant: Variant, limits: Limits) -> Cut | str:
    """The blocks that go at a time, by the shape alone; or why there are none."""
    rows, columns = (-(-size // _TILE) for size in shape)
    if variant.streamed:
        return _streamed(rows, columns, variant, limits)
    blocks = (-(-rows // limits.tiles[0]), -(-columns // limits.tiles[1]))
    found = Cut(variant, limits.tiles, blocks)
    if found.count > limits.ctas or not _all_update(found):
        height, width = (_TILE * tiles for tiles in limits.tiles)
        return (
            f"keeps {limits.ctas} blocks of {height} × {width} on chip, {tuple(shape)} has "
            f"{found.count}"
        )
    return found


def _streamed(rows: int, columns: int, variant: Variant, limits: Limits) -> Cut | str:
    widest = limits.tiles[1]
    least = -(-columns // widest)
    if least > limits.ctas:
        return f"streams up to {limits.ctas * widest * _TILE} columns, not {columns * _TILE}"
    # Half as wide is enough to use all CTAs; what they exchange grows with a block's edges.
    most = max(least, min(limits.ctas, columns // max(1, widest // 2)))
    cuts = []
    for across in range(least, most + 1):
        width = -(-columns // across)
        across = -(-columns // width)
        height = -(-rows // max(1, min(limits.ctas // across, rows // _LEAST_ROWS)))
        cuts.append(Cut(variant, (height, width), (-(-rows // height), across)))
    cuts = [found for found in cuts if _all_update(found)]

    def bytes_of_a_block(found: Cut) -> int:
        height, width = found.tiles
        weight = variant.element_bytes * _TILE**2 * height * width
        return weight + 2 * 4 * _TILE * variant.ranks * (height + width)

    return min(cuts, key=bytes_of_a_block)


def _all_update(found: Cut) -> bool:
    """Whether each CTA has something to update, without which Gram matrices are overwritten while
    they are read (csrc/blocks.h): some of the tiles of its blocks' row, or of its column.
    """
    return found.blocks[1] <= found.tiles[0] or found.blocks[0] <= found.tiles[1]


@dataclass(frozen=True)
class Table:
    """What csrc/descend.cuh is told about a group that one variant takes.

    Attributes:
        layers: int64, a row for each matrix: its address and strides, sizes and rank, the addresses
            of its state, its first block, its first counter and the size of its blocks.
        blocks: of all matrices.
        most_blocks: of one.
        counter_bytes: of all counters, which start at zero.
        region_bytes: of what a CTA leaves for others and keeps for itself.
    """

    layers: np.ndarray
    blocks: int
    most_blocks: int
    counter_bytes: int
    region_bytes: int


def table(
    group: Sequence[Tensor],
    state: DescentState,
    cuts: Sequence[Cut],
    region_bytes: Callable[[Cut], int],
) -> Table:
    rows, first = [], 0
    for i, (W, params, found) in enumerate(zip(group, state.params, cuts, strict=True)):
        # Plain descent touches no moments.
        tensors = (params, *(state.moments[i] if state.moments else (params, params)))
        addresses = (t.data_ptr() for t in tensors)
        size = (*W.shape, params.shape[0])
        place = (first, i * _COUNTERS, *found.tiles)
        rows.append((W.data_ptr(), *W.stride(), *size, *addresses, *place))
        first += found.count
    return Table(
        np.array(rows, np.int64),
        first,
        max(found.count for found in cuts),
        len(rows) * _COUNTERS * _COUNTER_BYTES,
        max(map(region_bytes, cuts)),
    )
