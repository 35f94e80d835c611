"""Pure torch: the truth for every op in tests, and the CPU path.

On the CPU layers run in parallel, each on one thread, and a large matrix is split into row blocks
that its shape alone decides and whose products are added in order, so that the bits depend on
neither threads nor grouping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_init.ops.descend import DescentState
from lora_init.ops.dual_project import Precision, product_dtype
from lora_init.ops.philox import keep_mask, keep_rate
from lora_init.parallel import Map, map_nested

NAME = "reference"
PRIORITY = 0

S = TypeVar("S")

# A row block of 2¹⁹ fp32 elements (2 MB) is read once from memory and a second time from the L2/L3
# cache.
_BLOCK_ELEMENTS = 1 << 19
# The same GEMM gives other bits when its operands are aligned differently; a mapped safetensors
# file is often 8 mod 16, torch's own allocations are multiples of 64.
_ALIGNMENT = 64
# So many rows keep every block of an aligned matrix aligned, whatever its number of columns.
_ALIGNED_ROWS = 32
# MKL packs W anew for every skinny product; oneDNN reads it as it lies, with AVX-512 on AMD too: 20
# rows times 2048² take 1.3 and 2.0 ms (a Wᵀ, a W) instead of 2.6 on one core of an EPYC, with an
# error against fp64 of 5.7e-7 instead of 2.5e-7. torch.mm itself uses it for 16 bits only.
_ONEDNN = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    else None
)
# Multiplications from which its 10 µs a call are made up for.
_ONEDNN_FROM = 1 << 21


def why_unsupported(op: str, *args: Any) -> str | None:
    return None if op in ("dual_project", "descend", "lora_linear") else f"has no op {op!r}"


def dual_project(
    group: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], precision: Precision
) -> list[tuple[Tensor, Tensor]]:
    def one(i: int, inner: Map) -> tuple[Tensor, Tensor]:
        dtype = product_dtype(group[i], A[i], B[i])
        weight = group[i].detach()
        a, bt = (_operand(t, dtype) for t in (A[i], B[i].T))
        left, right = (
            a.new_empty(a.shape[0], weight.shape[0]),
            a.new_empty(bt.shape[0], weight.shape[1]),
        )
        _products(weight, a, bt, left, right, inner)
        return left.T, right

    return _per_matrix(one, group)


def descend(group: Sequence[Tensor], state: DescentState, steps: int) -> None:
    schedule = state.optimizer.schedule(state.step, steps).tolist()

    def one(i: int, inner: Map) -> None:
        params = state.params[i]
        weight = _operand(group[i], params.dtype)
        out_features, in_features = weight.shape
        bt, a = params[:, :out_features], params[:, out_features:]
        gradient, scratch = torch.empty_like(params), torch.empty_like(params)
        g_bt, g_a = gradient[:, :out_features], gradient[:, out_features:]
        mean = 2.0 / (out_features * in_features)
        beta1, beta2 = state.optimizer.betas
        for alpha, inverse_root in schedule:
            _products(weight, a, bt, g_bt, g_a, inner)
            torch.addmm(g_bt, a @ a.T, bt, beta=-mean, alpha=mean, out=g_bt)
            torch.addmm(g_a, bt @ bt.T, a, beta=-mean, alpha=mean, out=g_a)
            if not state.moments:
                params.sub_(gradient, alpha=alpha)
                continue
            m, v = state.moments[i]
            m.lerp_(gradient, 1 - beta1)
            v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            torch.sqrt(v, out=scratch).mul_(inverse_root).add_(state.optimizer.eps)
            params.addcdiv_(m, scratch, value=-alpha)

    _per_matrix(one, group)


def lora_linear_forward(
    x: Tensor,
    R: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    trained: int,
) -> tuple[Tensor, Tensor]:
    keep = None if seed is None else keep_mask(seed, x.shape[0], x.shape[1], dropout_p)
    dropped = _dropped(x.to(A.dtype), keep)
    # 1/(1−p) goes into s: scaling x by it would round a 16-bit x once more.
    scale = scaling / keep_rate(dropout_p)
    factors = _trained_and_start(A, B, trained)
    parts = [(dropped @ a.T).mul_(scale) for a, _ in factors]
    y = torch.nn.functional.linear(x, R, bias)
    _add_products(y, [(S, b.T) for S, (_, b) in zip(parts, factors, strict=True)])
    return y, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def lora_linear_backward(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_A, need_B, need_bias = output_mask
    dx = dA = dB = None
    if need_x or need_A:
        scale = scaling / keep_rate(dropout_p)
        factors = _trained_and_start(A, B, trained)[: None if need_x else 1]
        parts = [(dy.to(A.dtype) @ b).mul_(scale) for _, b in factors]
        keep = None if seed is None else keep_mask(seed, dy.shape[0], A.shape[1], dropout_p)
        if need_x:
            dx = dy @ R
            _add_products(dx, [(dS, a) for dS, (a, _) in zip(parts, factors, strict=True)], keep)
        if need_A:
            assert x is not None
            dA = parts[0].T @ _dropped(x.to(A.dtype), keep)
    if need_B:
        assert S is not None
        dB = dy.to(A.dtype).T @ S[:, :trained]
    return dx, dA, dB, dy.sum(0) if need_bias else None


def _trained_and_start(A: Tensor, B: Tensor, trained: int) -> list[tuple[Tensor, Tensor]]:
    """(A, B), or (A, B) and (A₀, −B₀): apart, and dense and aligned alike, so that equal halves
    give products that cancel to the last bit.
    """
    if trained == A.shape[0]:
        return [(A, B)]
    dense = torch.contiguous_format
    return [
        (A[half].clone(memory_format=dense), B[:, half].clone(memory_format=dense))
        for half in (slice(trained), slice(trained, None))
    ]


def _add_products(
    total: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], keep: Tensor | None = None
) -> None:
    """total += Σ left @ right, masked by `keep`."""
    (left, right), *others = pairs
    if total.dtype == left.dtype and not others and keep is None:
        total.addmm_(left, right)
        return
    update = left @ right
    for left, right in others:
        update += left @ right
    total.add_(_dropped(update, keep))  # promotes, and rounds the sum once to its dtype


def _dropped(tensor: Tensor, keep: Tensor | None) -> Tensor:
    return tensor if keep is None else tensor.masked_fill(~keep, 0)


def _products(
    weight: Tensor, a: Tensor, bt: Tensor, left: Tensor, right: Tensor, inner: Map
) -> None:
    """left (p, out) = A Wᵀ and right (q, in) = Bᵀ W by row blocks, so that W comes from cache the
    second time, and a copy in another dtype never from memory.
    """
    single = not (len(a) and len(bt))
    # One product has W in cache once anyway, and is faster for every block less.
    whole = single and weight.dtype == a.dtype
    blocks = _row_blocks(weight, 8 * _BLOCK_ELEMENTS if whole else _BLOCK_ELEMENTS)
    multiply = _onednn_mm if single else torch.mm
    if len(blocks) == 1:
        block = _operand(weight, a.dtype)
        multiply(a, block.T, out=left)
        multiply(bt, block, out=right)
        return

    def one(rows: slice) -> Tensor:
        block = _operand(weight[rows], a.dtype)
        multiply(a, block.T, out=left[:, rows])
        partial = torch.empty_like(right)
        multiply(bt[:, rows], block, out=partial)
        return partial

    right.zero_()
    for partial in inner(one, blocks):
        right.add_(partial)


def _onednn_mm(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """`torch.mm` of few rows and a large matrix, or the transpose of one."""
    if _ONEDNN is None or a.dtype != torch.float32 or len(a) * b.numel() < _ONEDNN_FROM:
        torch.mm(a, b, out=out)
    else:
        out.copy_(_ONEDNN(a.contiguous(), b.T, None, "none", [], ""))


def _row_blocks(weight: Tensor, elements: int = _BLOCK_ELEMENTS) -> list[slice]:
    rows, columns = weight.shape
    count = max(1, rows * columns // elements)
    step = -(-rows // count)
    if count > 1:
        step = -(-step // _ALIGNED_ROWS) * _ALIGNED_ROWS
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`, dense and aligned; itself where it already is."""
    tensor = tensor.detach()
    if tensor.dtype != dtype or not tensor.is_contiguous():
        return tensor.to(dtype).contiguous()
    if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
        return tensor.clone()
    return tensor


def _per_matrix(one: Callable[[int, Map], S], group: Sequence[Tensor]) -> list[S]:
    if all(w.device.type == "cpu" for w in group):
        return map_nested(one, range(len(group)), cost=lambda i: group[i].numel())
    with torch.no_grad():
        return [one(i, map) for i in range(len(group))]
