"""What `dual_project` and `descend` share: the kernel that reads W, its variants, tiles and blocks.

`products` makes W Aᵀ and Bᵀ W from one read of W. A program owns a block of W, one tile wide and as
tall as there are programs enough, and walks it from top to bottom: Bᵀ W stays in registers until it
is done, W Aᵀ of a tile is complete for these columns and stored at once.

So a block costs one partial of each product, 8·r·out·in·(1/columns + 1/rows) bytes written and
read for the layer: 6% of W's at 4096², r = 8, bf16. Blocks of several tiles' width, where W Aᵀ adds
to what the earlier tiles left, save partials and lose more time in waiting for them (`plan`).

The factors come packed: rank by rank, padded with zeros to whole tiles, in W's dtype or in bf16 for
an fp32 W; each rank is 2 rows (hi, lo: 16 bits of a bf16 pair, 22 of an fp16 one) or 4 (hi, mid, lo
and what is left: all bits of fp32). They are neighbours in one operand, so a tile of W is read from
shared memory once for all parts, and the parts of a product lie in the same thread. Packing in the
inner loop instead costs 60 registers and spills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# What tensor cores multiply: an fp32 W and its factors go in as bf16 parts, three of 8 bits each.
OPERANDS = {
    torch.float32: torch.bfloat16,
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float16,
}
MEMORIES = ("rows", "columns", "any")
"""Row-major or column-major at 16-byte alignment, or any pair of strides, element by element."""
SPAN = 1024
"""Elements that one program sums."""
PADDING = 512
"""Packed factors are as long as this many times something: a whole number of every tile."""

# A layer as `products` sees it: one row of an int64 table.
LAYER = (
    "weight", "row_stride", "column_stride", "out", "in", "block_rows",
    "a", "a_stride", "b", "b_stride", "p", "q",
    "left", "left_stride", "right", "right_stride", "a_unscale", "b_unscale",
)  # fmt: skip
_FIELDS = tl.constexpr(len(LAYER))
SUM = ("source", "count", "size", "target")
"""A sum of `count` partials of `size` fp32 elements that lie one after the other."""
_SUM_FIELDS = tl.constexpr(len(SUM))


@triton.jit
def join_parts(x, R: tl.constexpr, PARTS: tl.constexpr, low: tl.constexpr):
    """(n, R·PARTS) -> (n, R): the sum of each rank's parts, the lo one of two times `low`."""
    if PARTS == 2:
        hi, lo = tl.split(tl.reshape(x, [x.shape[0], R, 2]))
        return hi + lo * low
    return tl.sum(tl.reshape(x, [x.shape[0], R, PARTS]), axis=2)


@triton.jit
def _operand(w, UPCAST: tl.constexpr):
    """bf16, or the same numbers in fp32 for the interpreter, whose bf16 dot is wrong."""
    w = w.to(tl.bfloat16)
    return w.to(tl.float32) if UPCAST else w


@triton.jit
def sum_span(task, first, SPAN: tl.constexpr):
    """One span of the sum of a task's partials (`SUM`), first to last."""
    at = first + tl.arange(0, SPAN)
    source = tl.load(task).to(tl.pointer_type(tl.float32))
    count = tl.load(task + 1).to(tl.int32)
    size = tl.load(task + 2)
    target = tl.load(task + 3).to(tl.pointer_type(tl.float32))
    total = tl.zeros([SPAN], tl.float32)
    for partial in range(0, count, 4):
        for more in tl.static_range(4):  # four loads in flight
            mask = (at < size) & (partial + more < count)
            total += tl.load(source + (partial + more) * size + at, mask=mask, other=0.0)
    tl.store(target + at, total, mask=at < size)


@triton.jit
def products(
    layers,
    programs,
    counter,
    sums,
    dtype: tl.constexpr,
    MEMORY: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    TM: tl.constexpr,
    TN: tl.constexpr,
    FLAT: tl.constexpr,
    WGMMA: tl.constexpr,
    UPCAST: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Both products of one block of one layer; see the module and `LAYER`.

    Args:
        layers: int64 (layers, len(LAYER)).
        programs: int32 (programs, 3): layer, row block, column block; or −1 − task and the first
            element of a span of a sum, which the next launch needs and which hides here.
        counter: int32, counted up by the first program.
        sums: int64 (tasks, len(SUM)).
        FLAT: Bᵀ W is accumulated as (R·PARTS, TN) instead of its transpose: `mma.sync` then takes
            both operands of both products from one shared tile, so that loads are pipelined;
            wgmma wants the long side as M.
        WGMMA: the products are wgmma's, on sm_90.
        UPCAST: the interpreter's bf16 dot is wrong, its fp32 one is right.

    An fp32 W is split in registers into three bf16 parts. Their products are summed in fp32, the
    smallest first, tile by tile: tensor cores cut off what they add up, and over a whole column
    that would show.
    """
    program = programs + tl.program_id(0) * 3
    index = tl.load(program)
    if tl.program_id(0) == 0:
        tl.store(counter, tl.load(counter) + 1)
    if index < 0:
        sum_span(sums - (index + 1) * _SUM_FIELDS, tl.load(program + 1), SPAN)
        return
    layer = layers + index * _FIELDS
    row_block = tl.load(program + 1)
    col_block = tl.load(program + 2)
    weight = tl.load(layer).to(tl.pointer_type(dtype))
    row_stride = tl.load(layer + 1)
    col_stride = tl.load(layer + 2)
    out_size = tl.load(layer + 3).to(tl.int32)
    in_size = tl.load(layer + 4).to(tl.int32)
    # The compiler pipelines a load only if it can tell that it moves 4 bytes or more at a time.
    block_rows = tl.multiple_of(tl.load(layer + 5).to(tl.int32), TM)
    operand: tl.constexpr = tl.bfloat16 if dtype == tl.float32 else dtype
    a_base = tl.multiple_of(tl.load(layer + 6).to(tl.pointer_type(operand)), 16)
    a_stride = tl.multiple_of(tl.load(layer + 7).to(tl.int32), 16)
    b_base = tl.multiple_of(tl.load(layer + 8).to(tl.pointer_type(operand)), 16)
    b_stride = tl.multiple_of(tl.load(layer + 9).to(tl.int32), 16)
    p = tl.load(layer + 10).to(tl.int32)
    q = tl.load(layer + 11).to(tl.int32)
    left_base = tl.load(layer + 12).to(tl.pointer_type(tl.float32))
    left_base += col_block * tl.load(layer + 13)
    right_base = tl.load(layer + 14).to(tl.pointer_type(tl.float32))
    right_base += row_block * tl.load(layer + 15)
    vector: tl.constexpr = 4 if dtype == tl.float32 else 8
    if MEMORY == "rows":
        weight = tl.multiple_of(weight, 16)
        row_stride = tl.multiple_of(row_stride, vector)
        in_size = tl.multiple_of(in_size, vector)
        col_stride = 1
    if MEMORY == "columns":
        weight = tl.multiple_of(weight, 16)
        col_stride = tl.multiple_of(col_stride, vector)
        out_size = tl.multiple_of(out_size, vector)
        row_stride = 1

    part = tl.arange(0, R * PARTS)[:, None]
    rank = tl.arange(0, R)[None, :]
    i = tl.arange(0, TM)
    k = tl.arange(0, TN)
    # 32 bits are enough within a tile (`_memory` sees to it) and save 40 registers.
    tile = i[:, None] * tl.cast(row_stride, tl.int32) + k[None, :] * tl.cast(col_stride, tl.int32)
    low: tl.constexpr = 1.0 / 2048 if PARTS == 2 and dtype == tl.float16 else 1.0
    if dtype == tl.float16:
        a_unscale = tl.load(tl.load(layer + 16).to(tl.pointer_type(tl.float32)) + rank)
        b_unscale = tl.load(tl.load(layer + 17).to(tl.pointer_type(tl.float32)) + rank)
    row_begin = row_block * block_rows
    row_end = tl.minimum(row_begin + block_rows, out_size)
    # Without a way around the loop ptxas keeps several wgmma under way; with one it lets each wait
    # for the one before (C7515): 843 µs instead of 600 for 64 layers of 4096², r = 16 (H200). Other
    # chips only get more to spill by it.
    if WGMMA:
        tl.assume(row_begin < row_end)
    col0 = col_block * TN
    cols = col0 + k
    a = tl.load(a_base + part * a_stride + cols[None, :])
    if UPCAST:
        a = a.to(tl.float32)
    right = tl.zeros([R * PARTS, TN] if FLAT else [TN, R * PARTS], dtype=tl.float32)
    for row0 in range(row_begin, row_end, TM):
        rows = row0 + i
        # Element by element, keeping a thread's 64 offsets over the loop would spill.
        if MEMORY == "any":
            place = rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64) * col_stride
        else:
            place = row0 * row_stride + col0 * col_stride + tile
        w = tl.load(
            weight + place,
            mask=(rows < out_size)[:, None] & (cols < in_size)[None, :],
            other=0.0,
        )
        b = tl.load(b_base + part * b_stride + rows[None, :])
        if UPCAST:
            b = b.to(tl.float32)
        if dtype == tl.float32:
            hi = _operand(w, UPCAST)
            w -= hi.to(tl.float32)
            mid = _operand(w, UPCAST)
            lo = _operand(w - mid.to(tl.float32), UPCAST)
            left = tl.dot(lo, tl.trans(a), input_precision="ieee")
            left = tl.dot(mid, tl.trans(a), left, input_precision="ieee")
            left = tl.dot(hi, tl.trans(a), left, input_precision="ieee")
            if FLAT:
                more = tl.dot(b, lo, input_precision="ieee")
                more = tl.dot(b, mid, more, input_precision="ieee")
                right += tl.dot(b, hi, more, input_precision="ieee")
            else:
                more = tl.dot(tl.trans(lo), tl.trans(b), input_precision="ieee")
                more = tl.dot(tl.trans(mid), tl.trans(b), more, input_precision="ieee")
                right += tl.dot(tl.trans(hi), tl.trans(b), more, input_precision="ieee")
        else:
            if UPCAST:
                w = w.to(tl.float32)
            left = tl.dot(w, tl.trans(a), input_precision="ieee")
            if FLAT:
                right = tl.dot(b, w, right, input_precision="ieee")
            else:
                right = tl.dot(tl.trans(w), tl.trans(b), right, input_precision="ieee")
        left = join_parts(left, R, PARTS, low)
        if dtype == tl.float16:
            left *= a_unscale
        at = left_base + rank.to(tl.int64) * out_size + rows[:, None]
        tl.store(at, left, mask=(rank < p) & (rows < out_size)[:, None])
    if FLAT:
        right = tl.trans(right)
    right = join_parts(right, R, PARTS, low)
    if dtype == tl.float16:
        right *= b_unscale
    at = right_base + rank.to(tl.int64) * in_size + cols[:, None]
    tl.store(at, right, mask=(rank < q) & (cols < in_size)[:, None])


INTERPRETED = not isinstance(products, triton.JITFunction)
"""Whether this process runs kernels on CPU tensors (TRITON_INTERPRET=1)."""


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    warps: int
    stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, int]:
        """How a kernel on this tile is compiled and launched."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


# By columns of a packed factor (16, 32, 64). Wide tiles because what a tile costs beside its own
# bytes, the factor of its rows and the left partial, falls with its width. The limits: shared
# memory (227 kB on H100 and H200, 163 on A100, 99 on 4090) and 255 registers a thread, which `make
# kernel-report` checks. Timed on an H200 (benchmarks/tune.py); what is not for it, nowhere.
_FP32 = {32: Tile(64, 64, 8, 3), 64: Tile(64, 64, 8, 3)}
_FP32_MMA_SYNC = {32: Tile(32, 64, 8, 2), 64: Tile(32, 32, 8, 2)}
_MMA_SYNC = {16: Tile(32, 256, 8, 2), 32: Tile(32, 256, 8, 2), 64: Tile(32, 256, 8, 2)}
_TILES = {
    "A100, 4090 and what is not listed": _MMA_SYNC,
    "H100, H200": {16: Tile(64, 512, 8, 3), 32: Tile(64, 256, 4, 3), 64: Tile(64, 256, 8, 3)},
    "B200": {16: Tile(64, 256, 8, 3), 32: Tile(64, 128, 8, 3), 64: Tile(64, 256, 8, 3)},
}
_BY_CAPABILITY = {(9, 0): "H100, H200", (10, 0): "B200"}

# Ranks a variant is compiled for, by parts. What is beyond the last takes several reads of W: at
# 128 columns the tensor work would take longer than a second read, and A100 spills.
RANKS = {2: (8, 16, 32), 4: (8, 16)}


@dataclass(frozen=True)
class Variant:
    """A compiled form of `products`."""

    dtype: torch.dtype
    memory: str
    rank: int
    parts: int

    @property
    def operand(self) -> torch.dtype:
        """Of the packed factors."""
        return OPERANDS[self.dtype]

    def tile(self, capability: tuple[int, int]) -> Tile:
        tiles = _tiles(capability)
        if self.dtype == torch.float32:
            tiles = _FP32_MMA_SYNC if tiles is _MMA_SYNC else _FP32
        tile = tiles[self.rank * self.parts]
        if self.memory != "any":
            return tile
        # Single elements are not pipelined, 64×256 of them spill, and so does ptxas to fit a second
        # block beside the first. The tensor cores add up K in steps of 16 either way.
        return Tile(tile.rows, min(tile.columns, (1 << 13) // tile.rows), 8, 1, maxnreg=255)

    def constants(self, capability: tuple[int, int]) -> dict[str, object]:
        """The constexpr arguments of `products`."""
        tile = self.tile(capability)
        return {
            "dtype": TRITON_DTYPES[self.dtype],
            "MEMORY": self.memory,
            "R": self.rank,
            "PARTS": self.parts,
            "TM": tile.rows,
            "TN": tile.columns,
            "FLAT": _tiles(capability) is _MMA_SYNC,
            "WGMMA": capability == (9, 0) and self.memory != "any",
            "UPCAST": INTERPRETED and OPERANDS[self.dtype] == torch.bfloat16,
            "SPAN": SPAN,
        }


def _tiles(capability: tuple[int, int]) -> dict[int, Tile]:
    return _TILES[_BY_CAPABILITY.get(capability, next(iter(_TILES)))]


def variant(weight: Tensor, r: int, parts: int) -> Variant:
    """The form of `products` that reads this weight (out, in), for factors of up to r ranks."""
    ranks = RANKS[parts]
    rank = next((rank for rank in ranks if rank >= r), ranks[-1])
    return Variant(weight.dtype, _memory(weight), rank, parts)


def _memory(weight: Tensor) -> str:
    aligned = 16 // weight.element_size()
    rows, columns = weight.stride()
    small = 64 * rows + 512 * columns < 1 << 31  # offsets within a tile take 32 bits
    for memory, inner in (("rows", 1), ("columns", 0)):
        if (
            small
            and weight.stride(inner) == 1
            and weight.stride(1 - inner) % aligned == 0
            and weight.shape[inner] % aligned == 0
            and weight.data_ptr() % 16 == 0
        ):
            return memory
    return "any"


@dataclass(frozen=True)
class Plan:
    """How a weight (out, in) is cut into blocks, one program each.

    Attributes:
        rows, columns: of a block; whole tiles, so the last block of a row or column may reach
            beyond the weight.
        reads: of W; more than one where r is beyond the variant's ranks.
        partial_bytes: of partial products, written and read again.
    """

    rows: int
    columns: int
    row_blocks: int
    column_blocks: int
    reads: int
    partial_bytes: int

    @property
    def blocks(self) -> tuple[int, int]:
        return self.row_blocks, self.column_blocks

    @property
    def programs(self) -> int:
        return self.row_blocks * self.column_blocks * self.reads


@lru_cache(maxsize=256)
def plan(
    shape: tuple[int, int],
    form: Variant,
    p: int,
    q: int,
    capability: tuple[int, int] = (9, 0),
) -> Plan:
    """The blocks of one layer, by nothing but its own shape, dtype and rank.

    One tile wide, so that no product of a tile waits for an earlier one's: with two tiles side by
    side the reads alone take 25% longer at 4096², r = 16 (H200: 747 µs against 599 for 64 layers),
    more than the partials that they save. About 8 of 512 columns in a large layer; at least 2¹⁷
    elements (256 kB in bf16) in a small one; at most 4096 rows, for what tensor cores cut off as
    they add up grows with their number.

    Args:
        shape: (out, in).
        p, q: ranks of A and B.
    """
    out_features, in_features = shape
    tile = form.tile(capability)
    area = max(1 << 17, _power_of_two(out_features * in_features / 8))
    columns = tile.columns
    # Tiles of strange memory are shorter, their blocks are not: the same partials.
    rows = min(max(64, area // columns), 4096)
    row_blocks, column_blocks = -(-out_features // rows), -(-in_features // columns)
    return Plan(
        rows,
        columns,
        row_blocks,
        column_blocks,
        reads=max(1, -(-max(p, q) // form.rank)),
        partial_bytes=8 * (p * out_features * column_blocks + q * in_features * row_blocks),
    )


def _power_of_two(size: float) -> int:
    return 1 << max(0, int(size).bit_length() - 1)


@lru_cache(maxsize=256)
def capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def scratch(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for partials and packed factors, and for results."""
    return torch.empty(elements, dtype=dtype, device=device)


def padded(size: int) -> int:
    return -(-size // PADDING) * PADDING


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays on the device after one copy that the host does not wait for, each at a multiple
    of 16 bytes: kernels are compiled for that.
    """
    starts = np.cumsum([0, *(-(-array.nbytes // 16) * 16 for array in arrays)])
    pin = device.type == "cuda"
    buffer = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=pin)
    for array, start in zip(arrays, starts, strict=False):
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        buffer[start : start + raw.size] = torch.from_numpy(raw)
    buffer = buffer.to(device, non_blocking=True)
    return [
        buffer[start : start + array.nbytes]
        .view(torch.from_numpy(array[:0]).dtype)
        .view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]


def launch(kernel: object, programs: int, *args: object, **options: object) -> None:
    """Every launch of this package goes through here; the current stream is the caller's."""
    kernel[(programs,)](*args, **options)  # type: ignore[index]


def launch_products(
    form: Variant,
    layers: Tensor,
    programs: Tensor,
    counter: Tensor,
    sums: Tensor,
) -> None:
    """Both products of all layers of one variant; see `products` for the tables."""
    capability = capability_of(layers.device)
    tile = form.tile(capability)
    launch(
        products,
        len(programs),
        layers,
        programs,
        counter,
        sums,
        **form.constants(capability),
        **tile.options(),
    )


@lru_cache(maxsize=256)
def block_programs(blocks: tuple[tuple[int, int], ...]) -> np.ndarray:
    """int32 (programs, 3) for `products`: layer, row block, column block.

    Args:
        blocks: (row blocks, column blocks) of each layer.
    """
    tables = [
        np.stack(
            [np.full(rows * columns, layer), *np.indices((rows, columns)).reshape(2, -1)],
            axis=1,
        )
        for layer, (rows, columns) in enumerate(blocks)
    ]
    return np.concatenate(tables).astype(np.int32)


@lru_cache(maxsize=256)
def span_programs(sizes: tuple[int, ...], span: int = SPAN) -> np.ndarray:
    """int32 (programs, 2): task, first element; as many as cover each task's size."""
    tables = [
        np.stack([np.full(-(-size // span), task), np.arange(0, size, span)], axis=1)
        for task, size in enumerate(sizes)
    ]
    return np.concatenate(tables).astype(np.int32)
