"""`lora_linear`: two launches forward, four backward, no float atomics.

Forward   1. `project`           S = c·drop(X) Aᵀ               one read of X
          2. `adapted_matmul`    Y = X Rᵀ + S Bᵀ (+ bias)      the frozen product, a longer K
Backward  1. `project_both`      dS = c·dY B, dB = dYᵀ S, dbias  one read of dY
          2. `project_columns`   dA = dSᵀ drop(X)               one read of X
          3. `adapted_matmul`    dX = dY R + drop(dS A)
          4. `sum_gradients`     dA, dB and dbias from their partials, in a fixed order

with c = s/(1−p). Split, the two `adapted_matmul` are torch's products, the low-rank one added to
the frozen one. Whatever is not asked for is not computed. The low-rank side of a product is
padded to 16, 32 or 64 ranks in registers; what is beyond 64 takes further goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from lora_init.ops.philox import keep_rate, threshold
from lora_init.triton_kernels import common
from lora_init.triton_kernels.common import Tile

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # triton 3.3
    TensorDescriptor = None

_INTERPRETED = tl.constexpr(common.INTERPRETED)
_LARGEST = tl.constexpr(torch.finfo(torch.bfloat16).max)
_SPAN = 64
"""Columns that one program of `sum_gradients` sums."""
PARTIALS = 4
"""Most partials of dS: a program that reads it has as many loads in flight."""
_SMS = 132
"""Programs aimed at: not the device's own number, so that splits depend on the shape alone."""
# The number of tokens changes from call to call: no kernel is compiled anew for it.
_UNSPECIALIZED = ("M", "block", "least", "a_count", "b_count", "a_programs", "b_programs")


@triton.jit
def _round(value, dtype: tl.constexpr):
    """fp32 to nearest; the interpreter would cut bf16 off."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & -0x10000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _kept(word, half: tl.constexpr, least):
    """Which of the elements that one half of a word decides are kept."""
    bits = word >> 16 if half == 1 else word & 0xFFFF
    return bits >= least.to(tl.uint32)


@triton.jit
def _multiplied(word, by: tl.constexpr):
    """The high and the low 32 bits of a product, by one instruction instead of two, of which
    `tl.umulhi` would run at a quarter of the rate.
    """
    if _INTERPRETED:
        product = word.to(tl.uint64) * by
        return (product >> 32).to(tl.uint32), product.to(tl.uint32)
    # As 64-bit integers of Triton's they would look too dear to be made again where accumulators
    # want them, and go through shared memory.
    return tl.inline_asm_elementwise(
        "{ .reg .b64 t; mul.wide.u32 t, $2, $3; mov.b64 {$1, $0}, t; }",
        "=r,=r,r,r",
        [word, by],
        dtype=(tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _words(seed, row0, column0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The four Philox words of a tile, each (ROWS // 2, COLUMNS // 4); see `ops.philox`."""
    key = tl.load(seed)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    row = (row0 // 2 + tl.arange(0, ROWS // 2)).to(tl.uint32)
    column = (column0 // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)
    # The first round, in which the other half of the counter is 0.
    high, low = _multiplied(column, 0xD2511F53)
    c0, c1 = row[:, None] ^ k0, tl.zeros([ROWS // 2, COLUMNS // 4], tl.uint32)
    c2, c3 = (high ^ k1)[None, :], low[None, :]
    c0, c2, c3 = c0 + c1, c2 + c1, c3 + c1
    for _ in tl.static_range(9):
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
        high0, low0 = _multiplied(c0, 0xD2511F53)
        high2, low2 = _multiplied(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


@triton.jit
def _keep(seed, row0, column0, least, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The dropout mask of a tile that begins at multiples of 16 and 128, for accumulators."""
    w0, w1, w2, w3 = _words(seed, row0, column0, ROWS, COLUMNS)
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    # (…, word // 2, word % 2, half): each join adds the last axis.
    bits = tl.join(word & 0xFFFF, word >> 16)
    bits = tl.reshape(bits, [ROWS // 16, 8, COLUMNS // 128, 32, 4, 2])
    return tl.reshape(tl.permute(bits, [0, 5, 1, 2, 4, 3]), [ROWS, COLUMNS]) >= least.to(tl.uint32)


@triton.jit
def _masked(acc, seed, row0, column0, least):
    """One half after the other: words for all at once would not fit the registers beside them."""
    ROWS: tl.constexpr = acc.shape[0] // 2
    COLUMNS: tl.constexpr = acc.shape[1]
    halves = tl.permute(tl.reshape(acc, [2, ROWS, COLUMNS]), [1, 2, 0])
    top, bottom = tl.split(halves)
    top = tl.where(_keep(seed, row0, column0, least, ROWS, COLUMNS), top, 0.0)
    bottom = tl.where(_keep(seed, row0 + ROWS, column0, least, ROWS, COLUMNS), bottom, 0.0)
    return tl.reshape(tl.permute(tl.join(top, bottom), [2, 0, 1]), [2 * ROWS, COLUMNS])


@triton.jit
def _tile(base, rows, columns, stride, row_end, column_end):
    mask = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask, other=0.0)


@triton.jit
def _spread(COUNT: tl.constexpr, run: tl.constexpr, apart: tl.constexpr):
    """Runs of neighbours whose first ones are `apart`: rows or columns that share Philox calls."""
    i = tl.arange(0, COUNT)
    return i // run * apart + i % run


@triton.jit
def _high(value):
    """The first bf16 part of fp32 numbers. The largest ones would be rounded to infinity."""
    return _round(tl.clamp(value, -_LARGEST, _LARGEST), tl.bfloat16)


@triton.jit
def _dot(factor, part, total, LEFT: tl.constexpr):
    if LEFT:
        return tl.dot(factor, part, total, input_precision="ieee")
    else:
        return tl.dot(part, factor, total, input_precision="ieee")


@triton.jit
def _skinny(
    factor,
    part,
    total,
    compute: tl.constexpr,
    SPLIT: tl.constexpr,
    LEFT: tl.constexpr,
    LARGEST: tl.constexpr = True,
):
    """total + factor part, or part factor unless LEFT; an fp32 factor of a bf16 matrix as three
    bf16 parts, which are all of its bits. Those of the LARGEST numbers too, unless it is a gradient
    by `project_columns`, which would spill on sm_100.
    """
    if SPLIT:
        high = _high(factor) if LARGEST else _round(factor, tl.bfloat16)
        factor -= high.to(tl.float32)
        mid = _round(factor, tl.bfloat16)
        low = _round(factor - mid.to(tl.float32), tl.bfloat16)
        total = _dot(low.to(compute), part, total, LEFT)
        total = _dot(mid.to(compute), part, total, LEFT)
        factor = high
    return _dot(factor.to(compute), part, total, LEFT)


@triton.jit
def _strip(
    low,
    high,
    x,
    a,
    rows,
    rank,
    k,
    word,
    M,
    K,
    ranks,
    x_stride,
    least,
    compute: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One word's share of `project`: some columns of rows, and of those 8 below."""
    factor = _tile(a, rank, k, K, ranks, K)
    part = _tile(x, rows, k, x_stride, M, K)
    part = tl.where(_kept(word, 0, least), part, 0.0).to(compute)
    low = _skinny(factor, tl.trans(part), low, compute, SPLIT, True)
    part = _tile(x, rows + 8, k, x_stride, M, K)
    part = tl.where(_kept(word, 1, least), part, 0.0).to(compute)
    high = _skinny(factor, tl.trans(part), high, compute, SPLIT, True)
    return low, high


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def project(
    x,
    a,
    seed,
    target,
    M,
    K,
    ranks,
    x_stride,
    scale,
    least,
    compute: tl.constexpr,
    SPLIT: tl.constexpr,
    DROPOUT: tl.constexpr,
    R: tl.constexpr,
    TM: tl.constexpr,
    TK: tl.constexpr,
):
    """target = scale·drop(x) aᵀ.

    Under dropout a tile is read as the eight parts whose elements share Philox calls: a mask of the
    whole tile would have to be put together in shared memory, which took as long as reading x.

    Args:
        x: (M, K), rows x_stride apart.
        a: (ranks, K), contiguous.
        seed, least: of the mask; see `ops.philox`.
        target: (M, ranks), contiguous, a's dtype.
        compute: what operands are multiplied in.
        SPLIT: see `_skinny`.
    """
    row_tiles = tl.cdiv(M, TM)
    row0 = tl.program_id(0) % row_tiles * TM
    rank = tl.program_id(0) // row_tiles * R + tl.arange(0, R)
    if DROPOUT:
        rows = row0 + _spread(TM // 2, 8, 16)
        low = tl.zeros([R, TM // 2], tl.float32)
        high = tl.zeros([R, TM // 2], tl.float32)
        for k0 in range(0, K, TK):
            k = k0 + _spread(TK // 4, 32, 128)
            words = _words(seed, row0, k0, TM, TK)
            for i in tl.static_range(4):
                low, high = _strip(
                    low, high, x, a, rows, rank, k + 32 * i, words[i], M, K, ranks, x_stride,
                    least, compute, SPLIT,
                )  # fmt: skip
        _store_projection(target, tl.trans(low), rows, rank, M, ranks, scale)
        _store_projection(target, tl.trans(high), rows + 8, rank, M, ranks, scale)
    else:
        rows = row0 + tl.arange(0, TM)
        total = tl.zeros([R, TM], tl.float32)
        for k0 in range(0, K, TK):
            k = k0 + tl.arange(0, TK)
            factor = _tile(a, rank, k, K, ranks, K)
            part = _tile(x, rows, k, x_stride, M, K).to(compute)
            total = _skinny(factor, tl.trans(part), total, compute, SPLIT, True)
        _store_projection(target, tl.trans(total), rows, rank, M, ranks, scale)


@triton.jit
def _store_projection(target, value, rows, rank, M, ranks, scale):
    place = target + rows.to(tl.int64)[:, None] * ranks + rank[None, :]
    value = _round(value * scale, target.dtype.element_ty)
    tl.store(place, value, mask=(rows < M)[:, None] & (rank < ranks)[None, :])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def project_both(
    dy,
    b,
    s,
    ds,
    db,
    M,
    N,
    ranks,
    trained,
    dy_stride,
    block,
    scale,
    compute: tl.constexpr,
    SPLIT: tl.constexpr,
    DS: tl.constexpr,
    DB: tl.constexpr,
    BIAS: tl.constexpr,
    FLAT: tl.constexpr,
    R: tl.constexpr,
    TM: tl.constexpr,
    TN: tl.constexpr,
):
    """Partials of dS = scale·dy b and of dbᵀ = sᵀ dy, and of dy's sum over rows as a rank of ones.

    Args:
        dy: (M, N), rows dy_stride apart.
        b: (N, ranks), contiguous.
        s: (M, ranks), contiguous, of which the first `trained` columns count.
        ds: (column blocks, M, ranks), b's dtype.
        db: fp32 (row blocks, trained + BIAS, N).
        block: columns that one program reads, a multiple of TN.
    """
    row_blocks = tl.cdiv(M, TM)
    column_blocks = tl.cdiv(N, block)
    row_block = tl.program_id(0) % row_blocks
    column_block = tl.program_id(0) // row_blocks % column_blocks
    rank = tl.program_id(0) // (row_blocks * column_blocks) * R + tl.arange(0, R)
    row0 = row_block * TM
    begin = tl.multiple_of(column_block * block, TN)
    rows = row0 + tl.arange(0, TM)
    total = tl.zeros([TM, R], tl.float32)
    known = tl.zeros([TM, R], tl.float32)
    width = trained
    if DB:
        known = _tile(s, rows, rank, ranks, M, trained)
    if BIAS:
        width += 1
        known = tl.where((rank == trained)[None, :], 1.0, known.to(tl.float32))
    for column0 in range(begin, tl.minimum(begin + block, N), TN):
        columns = column0 + tl.arange(0, TN)
        part = _tile(dy, rows, columns, dy_stride, M, N).to(compute)
        if DS:
            factor = _tile(b, columns, rank, ranks, N, ranks)
            total = _skinny(factor, part, total, compute, SPLIT, False)
        if DB or BIAS:
            if FLAT:
                product = tl.zeros([R, TN], tl.float32)
                product = _skinny(tl.trans(known), part, product, compute, SPLIT and DB, True)
            else:
                product = tl.zeros([TN, R], tl.float32)
                product = _skinny(known, tl.trans(part), product, compute, SPLIT and DB, False)
                product = tl.trans(product)
            place = db + (row_block * width + rank).to(tl.int64)[:, None] * N
            inside = (columns < N)[None, :] & (rank < width)[:, None]
            tl.store(place + columns[None, :], product, mask=inside)
    if DS:
        own = ds + column_block.to(tl.int64) * M * ranks
        _store_projection(own, total, rows, rank, M, ranks, scale)


@triton.jit
def _projected(ds, rows, rank, M, ranks, last, PARTIALS: tl.constexpr):
    """(rows, ranks) of a projection: the sum of its partials in order, ranks up to `last`."""
    total = _tile(ds, rows, rank, ranks, M, last)
    if PARTIALS > 1:
        total = total.to(tl.float32)
        for partial in tl.static_range(1, PARTIALS):
            own = ds + partial * M.to(tl.int64) * ranks
            total += _tile(own, rows, rank, ranks, M, last).to(tl.float32)
        total = _round(total, ds.dtype.element_ty)
    return total


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def project_columns(
    ds,
    x,
    seed,
    da,
    M,
    K,
    ranks,
    trained,
    x_stride,
    block,
    least,
    compute: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTIALS: tl.constexpr,
    DROPOUT: tl.constexpr,
    R: tl.constexpr,
    TM: tl.constexpr,
    TK: tl.constexpr,
):
    """Partials of dA = dsᵀ drop(x).

    Args:
        ds: (PARTIALS, M, ranks), contiguous, of which the first `trained` columns count.
        x: (M, K), rows x_stride apart.
        da: fp32 (row blocks, trained, K).
        block: rows that one program reads, a multiple of TM.
    """
    column_tiles = tl.cdiv(K, TK)
    row_blocks = tl.cdiv(M, block)
    row_block = tl.program_id(0) // column_tiles % row_blocks
    rank = tl.program_id(0) // (column_tiles * row_blocks) * R + tl.arange(0, R)
    column0 = tl.program_id(0) % column_tiles * TK
    begin = row_block * block
    end = tl.minimum(begin + block, M)
    own = da + (row_block * trained + rank).to(tl.int64)[:, None] * K
    inside = (rank < trained)[:, None]
    if DROPOUT:
        k = column0 + _spread(TK // 4, 32, 128)
        total0 = tl.zeros([R, TK // 4], tl.float32)
        total1, total2, total3 = total0, total0, total0
        for row0 in range(begin, end, TM):
            rows = row0 + _spread(TM // 2, 8, 16)
            w0, w1, w2, w3 = _words(seed, row0, column0, TM, TK)
            for half in tl.static_range(2):
                below = rows + 8 * half
                left = tl.trans(_projected(ds, below, rank, M, ranks, trained, PARTIALS))
                total0 = _dropped(total0, left, x, below, k, w0, half, end, K, x_stride, least,
                                  compute, SPLIT)  # fmt: skip
                total1 = _dropped(total1, left, x, below, k + 32, w1, half, end, K, x_stride, least,
                                  compute, SPLIT)  # fmt: skip
                total2 = _dropped(total2, left, x, below, k + 64, w2, half, end, K, x_stride, least,
                                  compute, SPLIT)  # fmt: skip
                total3 = _dropped(total3, left, x, below, k + 96, w3, half, end, K, x_stride, least,
                                  compute, SPLIT)  # fmt: skip
        tl.store(own + k[None, :], total0, mask=inside & (k < K)[None, :])
        tl.store(own + k[None, :] + 32, total1, mask=inside & (k + 32 < K)[None, :])
        tl.store(own + k[None, :] + 64, total2, mask=inside & (k + 64 < K)[None, :])
        tl.store(own + k[None, :] + 96, total3, mask=inside & (k + 96 < K)[None, :])
    else:
        k = column0 + tl.arange(0, TK)
        total = tl.zeros([R, TK], tl.float32)
        for row0 in range(begin, end, TM):
            rows = row0 + tl.arange(0, TM)
            left = tl.trans(_projected(ds, rows, rank, M, ranks, trained, PARTIALS))
            part = _tile(x, rows, k, x_stride, end, K).to(compute)
            total = _skinny(left, part, total, compute, SPLIT, True, False)
        tl.store(own + k[None, :], total, mask=inside & (k < K)[None, :])


@triton.jit
def _dropped(
    total,
    left,
    x,
    rows,
    k,
    word,
    half: tl.constexpr,
    end,
    K,
    x_stride,
    least,
    compute: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """total + left drop(x) of the elements that one half of a word decides."""
    part = _tile(x, rows, k, x_stride, end, K)
    part = tl.where(_kept(word, half, least), part, 0.0).to(compute)
    return _skinny(left, part, total, compute, SPLIT, True, False)


@triton.jit
def _low_rank(
    left,
    right,
    acc,
    low: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """acc + left right for (rows, R) and (R, columns); fp32 factors of a 16-bit product as two
    bf16 parts each, of which the product of the low ones is left out (2⁻¹⁶).
    """
    if SPLIT:
        left_high = _high(left)
        right_high = _high(right)
        left_low = _round(left - left_high.to(tl.float32), tl.bfloat16).to(low)
        right_low = _round(right - right_high.to(tl.float32), tl.bfloat16).to(low)
        acc = tl.dot(left_low, right_high.to(low), acc, input_precision="ieee")
        acc = tl.dot(left_high.to(low), right_low, acc, input_precision="ieee")
        return tl.dot(left_high.to(low), right_high.to(low), acc, input_precision="ieee")
    return tl.dot(left.to(low), right.to(low), acc, input_precision="ieee")


@triton.jit
def _low_right(right, columns, rank, N, ranks, last, TRANSPOSED: tl.constexpr):
    """(R, columns) of B ᵀ, from (N, ranks), or of A, from (ranks, N)."""
    if TRANSPOSED:
        place = columns.to(tl.int64)[None, :] * ranks + rank[:, None]
    else:
        place = rank.to(tl.int64)[:, None] * N + columns[None, :]
    inside = (columns < N)[None, :] & (rank < last)[:, None]
    return tl.load(right + place, inside, other=0.0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def adapted_matmul(
    x,
    r,
    y,
    left,
    right,
    bias,
    seed,
    M,
    N,
    K,
    ranks,
    trained,
    x_stride,
    r_stride,
    least,
    compute: tl.constexpr,
    low: tl.constexpr,
    SPLIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    HALVES: tl.constexpr,
    PARTIALS: tl.constexpr,
    TMA: tl.constexpr,
    R: tl.constexpr,
    TM: tl.constexpr,
    TN: tl.constexpr,
    TK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y = x r + drop(Σ left · right) + bias, both products in the same accumulators.

    The low-rank product comes first where it alone is masked, and where its two halves have to
    cancel: their difference is formed before anything is added to it.

    Args:
        x: (M, K), rows x_stride apart.
        r: (N, K) if TRANSPOSED, else (K, N), rows r_stride apart.
        y: (M, N), contiguous.
        left: (PARTIALS, M, ranks), contiguous.
        right: (N, ranks) if TRANSPOSED, else (ranks, N), contiguous.
        low: what the low-rank operands are multiplied in.
        HALVES: ranks = 2·trained, and the second half has the negatives of what the first half
            started from.
        EARLY: the low-rank operands, of R ranks, are loaded before the frozen product.
    """
    # Tiles of rows that share the columns' operand while it is in the L2.
    GROUP: tl.constexpr = 8
    row_tiles = tl.cdiv(M, TM)
    column_tiles = tl.cdiv(N, TN)
    tiles = row_tiles * column_tiles
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first = tile // (GROUP * column_tiles) * GROUP
        group = tl.minimum(row_tiles - first, GROUP)
        row0 = (first + tile % group) * TM
        column0 = tile % (GROUP * column_tiles) // group * TN
        rows = row0 + tl.arange(0, TM)
        columns = column0 + tl.arange(0, TN)
        acc = tl.zeros([TM, TN], tl.float32)
        if DROPOUT or HALVES:
            end = ranks
            if HALVES:
                end = trained
            for rank0 in tl.range(0, end, R, num_stages=1):
                rank = rank0 + tl.arange(0, R)
                some = _projected(left, rows, rank, M, ranks, end, PARTIALS)
                other = _low_right(right, columns, rank, N, ranks, end, TRANSPOSED)
                acc = _low_rank(some, other, acc, low, SPLIT)
            if HALVES:
                start = tl.zeros([TM, TN], tl.float32)
                for rank0 in tl.range(trained, ranks, R, num_stages=1):
                    rank = rank0 + tl.arange(0, R)
                    some = _projected(left, rows, rank, M, ranks, ranks, PARTIALS)
                    other = _low_right(right, columns, rank, N, ranks, ranks, TRANSPOSED)
                    start = _low_rank(some, other, start, low, SPLIT)
                acc += start
            if DROPOUT:
                acc = _masked(acc, seed, row0, column0, least)
        elif EARLY:
            rank = tl.arange(0, R)
            some = _projected(left, rows, rank, M, ranks, ranks, PARTIALS)
            other = _low_right(right, columns, rank, N, ranks, ranks, TRANSPOSED)
        for k0 in range(0, K, TK):
            if TMA:
                part = x.load([row0, k0])
                frozen = r.load([column0, k0]).T if TRANSPOSED else r.load([k0, column0])
            else:
                k = k0 + tl.arange(0, TK)
                part = _tile(x, rows, k, x_stride, M, K)
                if TRANSPOSED:
                    frozen = _tile(r, columns, k, r_stride, N, K).T
                else:
                    frozen = _tile(r, k, columns, r_stride, K, N)
            acc = tl.dot(part.to(compute), frozen.to(compute), acc, input_precision="ieee")
        if EARLY and not (DROPOUT or HALVES):
            acc = _low_rank(some, other, acc, low, SPLIT)
        elif not (DROPOUT or HALVES):
            for rank0 in tl.range(0, ranks, R, num_stages=1):
                rank = rank0 + tl.arange(0, R)
                some = _projected(left, rows, rank, M, ranks, ranks, PARTIALS)
                other = _low_right(right, columns, rank, N, ranks, ranks, TRANSPOSED)
                acc = _low_rank(some, other, acc, low, SPLIT)
        if BIAS:
            acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        if TMA:
            y.store([row0, column0], _round(acc, y.dtype))
        else:
            place = y + rows.to(tl.int64)[:, None] * N + columns[None, :]
            inside = (rows < M)[:, None] & (columns < N)[None, :]
            tl.store(place, _round(acc, y.dtype.element_ty), mask=inside)


# Nor for a single rank, which would be a constant.
@triton.jit(do_not_specialize=(*_UNSPECIALIZED, "trained"))
def sum_gradients(
    a_partials,
    b_partials,
    da,
    db,
    dbias,
    K,
    N,
    trained,
    a_count,
    b_count,
    a_programs,
    b_programs,
    DA: tl.constexpr,
    DB: tl.constexpr,
    BIAS: tl.constexpr,
    R: tl.constexpr,
    SPAN: tl.constexpr,
):
    """dA, dB and dbias from their partials, first to last.

    Args:
        a_partials: fp32 (a_count, trained, K).
        b_partials: fp32 (b_count, trained or, unless DB, 0, + BIAS, N).
        da: (trained, K), contiguous.
        db: (N, trained), contiguous.
        dbias: (N,).
        a_programs, b_programs: how many sum da, and db and dbias, for R ranks.
    """
    spans = a_programs + b_programs
    rank = tl.program_id(0) // spans * R + tl.arange(0, R)
    span = tl.program_id(0) % spans
    if DA and span < a_programs:
        columns = span * SPAN + tl.arange(0, SPAN)
        total = _sum(a_partials, a_count, trained, K, rank, columns)
        inside = (rank < trained)[:, None] & (columns < K)[None, :]
        at = rank.to(tl.int64)[:, None] * K + columns[None, :]
        tl.store(da + at, _round(total, da.dtype.element_ty), mask=inside)
    if (DB or BIAS) and span >= a_programs:
        columns = (span - a_programs) * SPAN + tl.arange(0, SPAN)
        width = trained if DB else 0
        total = _sum(b_partials, b_count, width + BIAS, N, rank, columns)
        if DB:
            inside = (rank < width)[:, None] & (columns < N)[None, :]
            at = columns.to(tl.int64)[None, :] * width + rank[:, None]
            tl.store(db + at, _round(total, db.dtype.element_ty), mask=inside)
        if BIAS:
            inside = (rank == width)[:, None] & (columns < N)[None, :]
            at = columns[None, :] + rank[:, None] * 0
            tl.store(dbias + at, _round(total, dbias.dtype.element_ty), mask=inside)


@triton.jit
def _sum(partials, count, ranks, size, rank, columns):
    place = partials + rank.to(tl.int64)[:, None] * size + columns[None, :]
    inside = (rank < ranks)[:, None] & (columns < size)[None, :]
    step = ranks.to(tl.int64) * size
    total = tl.zeros([rank.shape[0], columns.shape[0]], tl.float32)
    for partial in range(0, count, 4):
        for more in tl.static_range(4):  # four loads in flight
            mask = inside & (partial + more < count)
            total += tl.load(place + (partial + more) * step, mask=mask, other=0.0)
    return total


@dataclass(frozen=True)
class Matmul:
    """A tile of `adapted_matmul`: rows × columns × depth."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """How the kernel is compiled and launched."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    def blocks_of(self, transposed: bool) -> tuple[list[int], list[int], list[int]]:
        """What TMA moves at a time of x, r and y."""
        frozen = [self.depth, self.columns]
        return (
            [self.rows, self.depth],
            frozen[::-1] if transposed else frozen,
            [self.rows, self.columns],
        )


@dataclass(frozen=True)
class Schedule:
    """How a call is run: a tile for each kernel."""

    matmul: Matmul
    project: Tile
    both: Tile
    columns: Tile


@cache
def schedule(
    rows: int,
    ranks: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    dropout: bool,
    halves: bool,
    tma: bool,
    capability: tuple[int, int],
) -> Schedule:
    """By the rows' order of magnitude, the dtypes and the GPU alone: nothing is timed at run time.

    Args:
        rows: M, or any number of the same class; see `magnitude`.
        ranks: of all factors, trained or not.
        dtypes: of x and of A.
        dropout: the masks of S, dX and dA are made.
        halves: the start has to cancel, see `adapted_matmul`.
        tma: all operands of the frozen product can be read by TMA.
    """
    if dtypes[0] == torch.float32:
        matmul = _MATMUL_FP32
    else:
        kinds = (_MATMUL if tma else _MATMUL_POINTERS).get(capability, _MATMUL_SAFE)
        matmul = kinds[halves]
        if halves and tma and dtypes[0] != dtypes[1]:
            matmul = _MATMUL_SPLIT_START.get(capability, matmul)
    size, wide = magnitude(rows), padded(ranks, dtypes)
    if torch.float32 in dtypes:
        if not _split_factors(dtypes):
            return Schedule(matmul, **_SKINNY_FP32)
        return Schedule(matmul, **(_SKINNY_SPLIT | (_SPLIT_WIDE if wide > 32 else {})))
    project = Tile(16, 256, 4, 4, maxnreg=255 if dropout else None)
    if size == _ROWS[-1]:
        project = Tile(64, 128, 4, 3) if dropout else Tile(64, 256, 4, 3)
    if wide > 16:
        project = Tile(project.rows, 128, 8, 3, maxnreg=255)
    both = _BOTH.get(capability, _BOTH_SAFE)[size]
    return Schedule(matmul, project, both, _COLUMNS[dropout][wide])


_ROWS = (2048, 4096, 8192)


def magnitude(rows: int) -> int:
    """The class of a number of rows, by one of its members: as many programs as an H100 has SMs."""
    return next((size for size in _ROWS[:-1] if rows < 1.5 * size), _ROWS[-1])


# Timed on an H200 by `benchmarks.bench_lora_linear --tune` at r = 16: not the second matmul of a
# pair, for where a start has to cancel, which takes twice the accumulators; nor `project` and
# `_COLUMNS` under dropout, nor other dtypes and GPUs.
_MATMUL: dict[tuple[int, int], tuple[Matmul, Matmul]] = {
    (9, 0): (Matmul(128, 256, 64, 8, 3), Matmul(128, 128, 64, 8, 3)),
    (10, 0): (Matmul(128, 128, 64, 8, 3), Matmul(128, 128, 64, 8, 3)),
}
# Instead of the second, of split factors, which take three products each: in 128 rows they do not
# fit the tensor memory, and Triton 3.7 makes a kernel of it that traps.
_MATMUL_SPLIT_START = {(10, 0): Matmul(64, 128, 64, 8, 3)}
_MATMUL_SAFE = (Matmul(128, 128, 32, 8, 3), Matmul(64, 128, 32, 8, 3))
_MATMUL_POINTERS = {(10, 0): (_MATMUL_SAFE[0], Matmul(64, 128, 32, 8, 2))}
_MATMUL_FP32 = Matmul(64, 128, 16, 8, 2)
_BOTH = {
    (9, 0): {2048: Tile(64, 64, 4, 6), 4096: Tile(128, 64, 4, 5), 8192: Tile(256, 64, 8, 4)},
}
_BOTH_SAFE = {2048: Tile(64, 64, 4, 3), 4096: Tile(128, 64, 8, 3), 8192: Tile(128, 64, 8, 3)}
_COLUMNS = {
    False: {16: Tile(64, 256, 4, 3), 32: Tile(64, 256, 8, 3), 64: Tile(32, 256, 8, 3)},
    True: {16: Tile(64, 128, 4, 3), 32: Tile(32, 256, 8, 3), 64: Tile(32, 256, 8, 3)},
}
# Of a bf16 x with fp32 factors.
_SKINNY_SPLIT = {
    "project": Tile(16, 128, 4, 3, maxnreg=255),
    "both": Tile(64, 64, 4, 3),
    "columns": Tile(32, 128, 8, 3),
}
_SPLIT_WIDE = {"project": Tile(16, 128, 8, 3, maxnreg=255)}
_SKINNY_FP32 = {
    "project": Tile(16, 128, 8, 1, maxnreg=255),
    "both": Tile(32, 64, 8, 2, maxnreg=255),
    "columns": Tile(32, 128, 8, 2, maxnreg=255),
}


def forward(
    x: Tensor,
    R: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    trained: int,
    split: bool = False,
) -> tuple[Tensor, Tensor]:
    """y = x Rᵀ + S Bᵀ (+ bias), (M, out) in x's dtype, and S = c·drop(x) Aᵀ, (M, r) in A's.

    Args:
        x: (M, in), any strides.
        R: (out, in). A: (r, in). B: (out, r). bias: (out,).
        seed: (1,) int64 on the device if there is dropout.
        trained: r, or r/2 where the second halves of A and B have to cancel the first ones as long
            as these are not trained.
        split: torch's own products take the place of `adapted_matmul`: the frozen one, and then the
            low-rank one added to it. For A of x's dtype, of which all ranks are trained.
    """
    x, R = _matrix(x), _matrix(R)
    (M, _), N, ranks = x.shape, R.shape[0], A.shape[0]
    y = linear(x, R, bias) if split else common.scratch(M * N, x.dtype, x.device).view(M, N)
    S = common.scratch(M * ranks, A.dtype, x.device).view(M, ranks)
    if M:
        plan, tma = _schedule((x, R, y), A, seed is not None, ranks > trained)
        scale = scaling / keep_rate(dropout_p)
        _project(x, A.contiguous(), S, seed, dropout_p, scale, plan.project)
        if split:
            return y.addmm_(S, B.T), S
        b, bias = B.contiguous(), None if bias is None else bias.contiguous()
        _matmul(x, R, y, S[None], b, bias, None, 0.0, trained, True, tma, plan.matmul)
    return y, S


def backward(
    dy: Tensor,
    x: Tensor | None,
    R: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    trained: int,
    output_mask: Sequence[bool],
    split: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB, dbias), each None unless `output_mask` asks for it; dA is (trained, in), dB
    (out, trained).

    Args:
        dy: (M, out), any strides.
        x: (M, in), any strides; needed for dA. S: as `forward` gave it; needed for dB.
        split: as in `forward`, of dX and without dropout.
    """
    need_x, need_A, need_B, need_bias = output_mask
    dy, R = _matrix(dy), _matrix(R)
    (M, N), (ranks, K), device = dy.shape, A.shape, dy.device
    dx = None
    if need_x:
        dx = dy @ R if split else common.scratch(M * K, dy.dtype, device).view(M, K)
    dA = common.scratch(trained * K, A.dtype, device).view(trained, K) if need_A else None
    dB = common.scratch(N * trained, A.dtype, device).view(N, trained) if need_B else None
    dbias = common.scratch(N, dy.dtype, device) if need_bias else None
    if M == 0:
        for gradient in (dA, dB, dbias):
            if gradient is not None:
                gradient.zero_()
        return dx, dA, dB, dbias
    operands = (dy, R, dy if dx is None else dx)
    plan, tma = _schedule(operands, A, seed is not None, ranks > trained)
    scale = scaling / keep_rate(dropout_p)
    need_dS = need_x or need_A
    dS, b_partials = _project_both(
        dy, B.contiguous(), S if need_B else None, need_dS, need_bias, trained, scale, plan.both
    )
    a_partials = None
    if need_A:
        assert x is not None
        a_partials = _project_columns(dS, _matrix(x), trained, seed, dropout_p, plan.columns)
    if dx is not None and split:
        dx.addmm_(dS[0] if len(dS) == 1 else dS.sum(0), A)
    elif dx is not None:
        a = A.contiguous()
        _matmul(dy, R, dx, dS, a, None, seed, dropout_p, trained, False, tma, plan.matmul)
    if need_A or need_B or need_bias:
        _sum_gradients(a_partials, b_partials, dA, dB, dbias, trained)
    return dx, dA, dB, dbias


def _matrix(tensor: Tensor) -> Tensor:
    """With dense rows: what cannot be told from an address and one stride is copied."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _schedule(
    operands: tuple[Tensor, Tensor, Tensor], A: Tensor, dropout: bool, halves: bool
) -> tuple[Schedule, bool]:
    """For x, R and y, and whether TMA moves them."""
    x = operands[0]
    capability = common.capability_of(x.device)
    tma = capability >= (9, 0) and TensorDescriptor is not None
    tma = tma and all(_describable(tensor) for tensor in operands)
    dtypes, rows = (x.dtype, A.dtype), magnitude(x.shape[0])
    return schedule(rows, len(A), dtypes, dropout, halves, tma, capability), tma


def _describable(tensor: Tensor) -> bool:
    aligned = tensor.data_ptr() % 16 == tensor.stride(0) * tensor.element_size() % 16 == 0
    apart = tensor.stride(0) >= tensor.shape[1]  # not in the dy of `y.sum(0)`
    return aligned and apart and tensor.stride(1) == 1


def _project(
    x: Tensor,
    A: Tensor,
    target: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    tile: Tile,
) -> None:
    (M, K), ranks = x.shape, A.shape[0]
    constants = project_constants((x.dtype, A.dtype), ranks, seed is not None, tile)
    programs = _cdiv(M, tile.rows) * _cdiv(ranks, constants["R"])
    least = threshold(dropout_p)
    common.launch(
        project,
        programs,
        *(x, A, seed, target, M, K, ranks, x.stride(0), scale, least),
        **constants,
        **tile.options(),
    )


def _project_both(
    dy: Tensor,
    B: Tensor,
    S: Tensor | None,
    need_dS: bool,
    bias: bool,
    trained: int,
    scale: float,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """dS (partials, M, r) in B's dtype, and fp32 (partials, trained or 0 + bias, out) of dBᵀ."""
    (M, N), ranks = dy.shape, B.shape[1]
    width = (trained if S is not None else 0) + bias
    row_blocks = _cdiv(M, tile.rows)
    column_blocks = _split(N, tile.columns, min(PARTIALS, _cdiv(_SMS, row_blocks)))
    block = _cdiv(_cdiv(N, column_blocks), tile.columns) * tile.columns
    dS = common.scratch(column_blocks * M * ranks * need_dS, B.dtype, dy.device)
    partials = common.scratch(row_blocks * width * N, torch.float32, dy.device)
    widest = max(ranks * need_dS, width)
    flags = (need_dS, S is not None, bias)
    capability = common.capability_of(dy.device)
    constants = both_constants((dy.dtype, B.dtype), widest, flags, tile, capability)
    chunks = _cdiv(widest, constants["R"])
    common.launch(
        project_both,
        row_blocks * column_blocks * chunks,
        *(dy, B, S, dS, partials, M, N, ranks, width - bias, dy.stride(0), block, scale),
        **constants,
        **tile.options(),
    )
    shape = (column_blocks, M, ranks) if need_dS else (0, M, ranks)
    return dS.view(shape), partials.view(row_blocks, width, N)


def _project_columns(
    dS: Tensor, x: Tensor, trained: int, seed: Tensor | None, dropout_p: float, tile: Tile
) -> Tensor:
    """fp32 (partials, trained, in) of dA."""
    (M, K), (partials, _, ranks) = x.shape, dS.shape
    tiles = _cdiv(K, tile.columns)
    row_blocks = _split(M, tile.rows, _cdiv(2 * _SMS, tiles))
    block = _cdiv(_cdiv(M, row_blocks), tile.rows) * tile.rows
    found = common.scratch(row_blocks * trained * K, torch.float32, x.device)
    constants = columns_constants((x.dtype, dS.dtype), trained, seed is not None, partials, tile)
    chunks = _cdiv(trained, constants["R"])
    least = threshold(dropout_p)
    common.launch(
        project_columns,
        tiles * row_blocks * chunks,
        *(dS, x, seed, found, M, K, ranks, trained, x.stride(0), block, least),
        **constants,
        **tile.options(),
    )
    return found.view(row_blocks, trained, K)


def _cdiv(size: int, tile: int) -> int:
    """`triton.cdiv` takes a host 8 µs, and a backward calls it 27 times."""
    return -(-size // tile)


def _split(size: int, tile: int, most: int) -> int:
    """Into how many blocks of whole tiles: a power of two, none of them empty."""
    count = 1 << max(0, most.bit_length() - 1)
    tiles = _cdiv(size, tile)
    while (count - 1) * _cdiv(tiles, count) >= tiles:
        count //= 2
    return count


def _matmul(
    x: Tensor,
    R: Tensor,
    y: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    trained: int,
    transposed: bool,
    tma: bool,
    tile: Matmul,
) -> None:
    (M, K), N, (partials, _, ranks) = x.shape, y.shape[1], left.shape
    constants = matmul_constants(
        (x.dtype, left.dtype),
        (trained, ranks),
        (transposed, bias is not None, seed is not None),
        partials,
        tma,
        tile,
    )
    operands = (x, R, y)
    if tma:
        operands = [
            TensorDescriptor.from_tensor(tensor, block)
            for tensor, block in zip(operands, tile.blocks_of(transposed), strict=True)
        ]
    tiles = _cdiv(M, tile.rows) * _cdiv(N, tile.columns)
    sizes = (M, N, K, ranks, trained, x.stride(0), R.stride(0))
    common.launch(
        adapted_matmul,
        min(tiles, sms(x.device)),
        *(*operands, left, right, bias, seed, *sizes, threshold(dropout_p)),
        **constants,
        **tile.options(),
    )


def _sum_gradients(
    a_partials: Tensor | None,
    b_partials: Tensor,
    dA: Tensor | None,
    dB: Tensor | None,
    dbias: Tensor | None,
    trained: int,
) -> None:
    a_count, _, K = (0, 0, 0) if a_partials is None else a_partials.shape
    b_count, width, N = b_partials.shape
    widest = max(width, 0 if dA is None else trained)
    flags = (dA is not None, dB is not None, dbias is not None)
    constants = sum_constants(widest, flags)
    a_programs, b_programs = _cdiv(K, _SPAN), _cdiv(N, _SPAN) if width else 0
    common.launch(
        sum_gradients,
        (a_programs + b_programs) * _cdiv(widest, padded(widest)),
        *(a_partials, b_partials, dA, dB, dbias, K, N, trained, a_count, b_count),
        *(a_programs, b_programs),
        **constants,
    )


@cache
def sms(device: torch.device) -> int:
    """Streaming multiprocessors."""
    if device.type != "cuda":
        return 4  # interpreted: a program has several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


def padded(ranks: int, dtypes: tuple[torch.dtype, ...] = ()) -> int:
    """Ranks of a tile; what is beyond takes several. 64 of them that are multiplied one by one, as
    fp32, do not fit the registers.
    """
    most = 32 if torch.float32 in dtypes and not _split_factors(dtypes) else 64
    return 16 if ranks <= 16 else min(most, 32 if ranks <= 32 else 64)


def _compute(*dtypes: torch.dtype) -> object:
    """What operands are multiplied in: the interpreter's bf16 dot is wrong, its fp32 one right."""
    if _split_factors(dtypes) and not common.INTERPRETED:
        return tl.bfloat16
    if torch.float32 in dtypes or (common.INTERPRETED and torch.bfloat16 in dtypes):
        return tl.float32
    return common.TRITON_DTYPES[dtypes[0]]


def _split_factors(dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether fp32 factors of a matrix are multiplied as bf16 parts: where it is bf16. An fp16 one
    would have to be cut in two as well, and its factors' parts would need bf16's range.
    """
    return dtypes == (torch.bfloat16, torch.float32)


@cache
def project_constants(
    dtypes: tuple[torch.dtype, torch.dtype], ranks: int, dropout: bool, tile: Tile
) -> dict[str, object]:
    """The constexpr arguments of `project`."""
    return {
        "compute": _compute(*dtypes),
        "SPLIT": _split_factors(dtypes),
        "DROPOUT": dropout,
        "R": padded(ranks, dtypes),
        "TM": tile.rows,
        "TK": tile.columns,
    }


@cache
def both_constants(
    dtypes: tuple[torch.dtype, torch.dtype],
    widest: int,
    flags: tuple[bool, bool, bool],
    tile: Tile,
    capability: tuple[int, int],
) -> dict[str, object]:
    """The constexpr arguments of `project_both`; flags: dS, dB and dbias are asked for."""
    flat = capability not in _MATMUL
    return {
        "compute": _compute(*dtypes),
        "SPLIT": _split_factors(dtypes),
        **dict(zip(("DS", "DB", "BIAS"), flags, strict=True)),
        "FLAT": flat,
        "R": min(padded(widest, dtypes), 32 if flat else 64),
        "TM": tile.rows,
        "TN": tile.columns,
    }


@cache
def columns_constants(
    dtypes: tuple[torch.dtype, torch.dtype], ranks: int, dropout: bool, partials: int, tile: Tile
) -> dict[str, object]:
    """The constexpr arguments of `project_columns`."""
    return {
        "compute": _compute(*dtypes),
        "SPLIT": _split_factors(dtypes),
        "PARTIALS": partials,
        "DROPOUT": dropout,
        # Of 64, triton 3.6 cannot compile the parts for a B200.
        "R": min(padded(ranks, dtypes), 32 if dropout else 64),
        "TM": tile.rows,
        "TK": tile.columns,
    }


@cache
def matmul_constants(
    dtypes: tuple[torch.dtype, torch.dtype],
    ranks: tuple[int, int],
    flags: tuple[bool, bool, bool],
    partials: int,
    tma: bool,
    tile: Matmul,
) -> dict[str, object]:
    """The constexpr arguments of `adapted_matmul`.

    Args:
        ranks: trained ones and all.
        flags: R is read as (N, K), there is a bias, there is dropout.
    """
    trained, total = ranks
    split = dtypes[0] != dtypes[1]
    return {
        "compute": _compute(dtypes[0]),
        "low": _compute(torch.bfloat16) if split else _compute(dtypes[1]),
        "SPLIT": split,
        **dict(zip(("TRANSPOSED", "BIAS", "DROPOUT"), flags, strict=True)),
        "HALVES": total == 2 * trained,
        "PARTIALS": partials,
        "TMA": tma,
        # A thread has no room for more beside its accumulators, or for as many beside addresses.
        "R": min(padded(trained), 16 if torch.float32 in dtypes or not tma else 32),
        "TM": tile.rows,
        "TN": tile.columns,
        "TK": tile.depth,
        "EARLY": total <= 16 and dtypes[0] != torch.float32,
    }


@cache
def sum_constants(widest: int, flags: tuple[bool, bool, bool]) -> dict[str, object]:
    """The constexpr arguments of `sum_gradients`; flags: dA, dB and dbias are asked for."""
    asked = dict(zip(("DA", "DB", "BIAS"), flags, strict=True))
    return {**asked, "R": padded(widest), "SPAN": _SPAN}
