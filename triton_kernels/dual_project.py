"""`dual_project`: W Aᵀ and Bᵀ W of a ragged group from one read of each W, in three launches.

`pack` brings the factors into the form that `products` (see `common`) multiplies, `sum_partials`
adds up what its programs left, always in the same order. A group of several dtypes, memory
orders or rank classes takes the first two launches once for each; nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_init.triton_kernels import common
from lora_init.triton_kernels.common import Plan, Variant

_PACK = ("source", "rank_stride", "stride", "ranks", "size", "target", "width", "unscale")
_PACK_FIELDS = tl.constexpr(len(_PACK))
_SPAN = 256
"""Columns that one program packs, of all ranks."""
_SUM_FIELDS = tl.constexpr(len(common.SUM))


@triton.jit
def pack(
    tasks,
    programs,
    dtype: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """SPAN columns of a factor as its parts: (ranks, size) -> (R·PARTS, width).

    Beside an fp16 W a rank is first scaled by a power of two to a largest entry in [2¹⁴, 2¹⁵), so
    that it neither overflows nor loses more than 2⁻⁴⁰ of that entry; `products` scales back.

    Args:
        tasks: int64 (tasks, len(_PACK)).
        programs: int32 (programs, 2): task, first column.
    """
    task = tasks + tl.load(programs + tl.program_id(0) * 2) * _PACK_FIELDS
    columns = tl.load(programs + tl.program_id(0) * 2 + 1) + tl.arange(0, SPAN)
    rank = tl.arange(0, R)
    source = tl.load(task).to(tl.pointer_type(tl.float32))
    source += (rank * tl.load(task + 1))[:, None]
    stride = tl.load(task + 2)
    inside = (rank < tl.load(task + 3))[:, None]
    size = tl.load(task + 4).to(tl.int32)
    target = tl.load(task + 5).to(tl.pointer_type(dtype))
    width = tl.load(task + 6)
    mask = inside & (columns < size)[None, :]
    x = tl.load(source + columns[None, :] * stride, mask=mask, other=0.0)
    if dtype == tl.float16:
        largest = tl.zeros([R], tl.float32)
        for first in range(0, size, SPAN):
            at = (first + tl.arange(0, SPAN))[None, :]
            y = tl.load(source + at * stride, mask=inside & (at < size), other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(y), axis=1))
        exponent = largest.to(tl.int32, bitcast=True) >> 23
        scale = tl.minimum(127 + 127 + 14 - exponent, 253)
        x *= (scale << 23).to(tl.float32, bitcast=True)[:, None]
        unscale = ((254 - scale) << 23).to(tl.float32, bitcast=True)
        tl.store(tl.load(task + 7).to(tl.pointer_type(tl.float32)) + rank, unscale)
    for part in tl.static_range(PARTS):
        rounded = x.to(dtype)
        place = target + (rank * PARTS + part)[:, None] * width + columns[None, :]
        tl.store(place, rounded, mask=(columns < width)[None, :])
        x -= rounded.to(tl.float32)
        if PARTS == 2 and dtype == tl.float16:
            x *= 2048.0


def pack_constants(form: Variant) -> dict[str, object]:
    """The constexpr arguments of `pack`."""
    return {
        "dtype": common.TRITON_DTYPES[form.operand],
        "R": form.rank,
        "PARTS": form.parts,
        "SPAN": _SPAN,
    }


@triton.jit
def sum_partials(tasks, programs, SPAN: tl.constexpr):
    """One span of one sum.

    Args:
        tasks: int64 (tasks, len(SUM)).
        programs: int32 (programs, 2): task, first element.
    """
    program = programs + tl.program_id(0) * 2
    common.sum_span(tasks + tl.load(program) * _SUM_FIELDS, tl.load(program + 1), SPAN)


@dataclass(frozen=True)
class _Piece:
    """Up to `Variant.rank` ranks of a layer's factors, and where its products go."""

    weight: Tensor
    A: Tensor  # (p, in)
    Bt: Tensor  # (q, out)
    left: Tensor  # (p, out)
    right: Tensor  # (q, in)
    plan: Plan


def dual_project(
    group: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], precision: str
) -> list[tuple[Tensor, Tensor]]:
    """(W Aᵀ, Bᵀ W) for every W of the group.

    Args:
        group: (outᵢ, inᵢ) in fp32, bf16 or fp16, any strides, on one device or several.
        A, B: (pᵢ, inᵢ) and (outᵢ, qᵢ); converted to fp32 where they are not.
        precision: beside a 16-bit W "full" keeps all bits of A and B, "fast" 16 of them (bf16) or
            22 (fp16); to round to W's dtype would save nothing, W's bytes being what takes time.

    Returns:
        Pairs ((outᵢ, pᵢ), (qᵢ, inᵢ)) in fp32. A layer's bits depend on its operands only.
    """
    pairs = []
    pieces: dict[tuple[Variant, torch.device], list[_Piece]] = {}
    for weight, a, b in zip(group, A, B, strict=True):
        parts = _parts(weight.dtype, (a.dtype, b.dtype), precision)
        weight, a, bt = weight.detach(), a.detach().float(), b.detach().T.float()
        (out_features, in_features), p, q = weight.shape, a.shape[0], bt.shape[0]
        left = common.scratch(p * out_features, torch.float32, weight.device).view(p, out_features)
        right = common.scratch(q * in_features, torch.float32, weight.device).view(q, in_features)
        pairs.append((left.T, right))
        if weight.numel() == 0:
            left.zero_(), right.zero_()
            continue
        form = common.variant(weight, max(p, q), parts)
        capability = common.capability_of(weight.device)
        blocks = common.plan(weight.shape, form, p, q, capability)
        members = pieces.setdefault((form, weight.device), [])
        if max(p, q) <= form.rank:
            members.append(_Piece(weight, a, bt, left, right, blocks))
            continue
        for first in range(0, max(p, q), form.rank):
            ranks = slice(first, first + form.rank)
            piece = (a[ranks], bt[ranks], left[ranks], right[ranks])
            members.append(_Piece(weight, *piece, blocks))
    for (form, device), members in pieces.items():
        with torch.cuda.device_of(members[0].weight):
            _run(form, members, device)
    return pairs


def _parts(weight: torch.dtype, factors: tuple[torch.dtype, torch.dtype], precision: str) -> int:
    if weight == torch.float32:
        return 4
    return 2 if precision == "fast" or factors == (weight, weight) else 4


def _run(form: Variant, pieces: list[_Piece], device: torch.device) -> None:
    rows = form.rank * form.parts
    sizes = [size for piece in pieces for size in (piece.A.shape[1], piece.Bt.shape[1])]
    widths = [common.padded(size) for size in sizes]
    packed = common.scratch(rows * sum(widths), form.operand, device)
    ends = packed.data_ptr() + np.cumsum([0, *widths]) * rows * form.operand.itemsize
    unscale = common.scratch(form.rank * len(widths), torch.float32, device)
    counts = [n for p in pieces for n in (p.plan.column_blocks, p.plan.row_blocks)]
    products = [product for piece in pieces for product in (piece.left, piece.right)]
    # A product that one program completes goes where it belongs at once.
    room = [n * t.numel() if n > 1 else 0 for n, t in zip(counts, products, strict=True)]
    partials = common.scratch(sum(room), torch.float32, device)
    starts = (partials.data_ptr() + 4 * np.cumsum([0, *room])).tolist()

    packs, layers, sums = [], [], []
    factors = [factor for piece in pieces for factor in (piece.A, piece.Bt)]
    unscales = range(unscale.data_ptr(), 1 << 63, 4 * form.rank)
    for factor, end, width, scale in zip(factors, ends.tolist(), widths, unscales, strict=False):
        source = (factor.data_ptr(), *factor.stride(), *factor.shape)
        packs.append((*source, end, width, scale))
    for i, piece in enumerate(pieces):
        left, right = (
            (starts[j] if counts[j] > 1 else products[j].data_ptr(), products[j].numel())
            for j in (2 * i, 2 * i + 1)
        )
        layers.append(
            (
                *(piece.weight.data_ptr(), *piece.weight.stride(), *piece.weight.shape),
                piece.plan.rows,
                *(packs[2 * i][5:7] + packs[2 * i + 1][5:7]),
                *(piece.A.shape[0], piece.Bt.shape[0], *left, *right),
                *(packs[2 * i][7], packs[2 * i + 1][7]),
            )
        )
    for count, product, start in zip(counts, products, starts, strict=False):
        if count > 1 and product.numel():
            sums.append((start, count, product.numel(), product.data_ptr()))

    tables = [np.zeros(1, np.int32), np.array(packs, np.int64)]
    tables += [common.span_programs(tuple(widths), _SPAN), np.array(layers, np.int64)]
    tables += [common.block_programs(tuple(piece.plan.blocks for piece in pieces))]
    if sums:
        sizes = tuple(size for _, _, size, _ in sums)
        tables += [np.array(sums, np.int64), common.span_programs(sizes)]
    counter, tasks, programs, layer_table, blocks, *reduction = common.upload(tables, device)
    common.launch(pack, len(programs), tasks, programs, **pack_constants(form))
    common.launch_products(form, layer_table, blocks, counter, sums=layer_table)
    if reduction:
        common.launch(sum_partials, len(reduction[1]), *reduction, SPAN=common.SPAN)
