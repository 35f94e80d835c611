"""CUDA kernels, compiled into the optional module `lora_init._C`, on NVIDIA GPUs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_init import native
from lora_init.native import blocks
from lora_init.native.blocks import Cut, Limits, Variant
from lora_init.native.projections import RANKS, Form, Projection, projection_table
from lora_init.ops.descend import DescentState
from lora_init.ops.dual_project import Precision
from lora_init.ops.philox import keep_mask, keep_rate

NAME = "cuda"
PRIORITY = 20
VERIFIED: tuple[str, ...] = ()

_OPS = ("dual_project", "descend", "lora_linear")
# Of csrc/descend.cu.
_MOST_STEPS, _MOST_WORKSPACE = 1 << 20, 1 << 32
# DualProjectWeight of csrc/dual_project.h.
_WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Op -> the compute capabilities where a file in benchmarks/results/ shows it faster than Triton.
_FASTER: dict[str, tuple[tuple[int, int], ...]] = {}


@cache
def fingerprint() -> str:
    """What the kernels' code is: a verdict on them holds for this build."""
    module = native.module()
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest() if module else "not built"


def why_unsupported(op: str, *args: Any) -> str | None:
    if op not in _OPS:
        return f"has no op {op!r}"
    if native.module() is None:
        return "lora_init._C is not built: LORA_INIT_CUDA=1 pip install does that, or says why not"
    why_not: dict[str, Callable[..., str | None]] = {
        "dual_project": _why_not_dual_project,
        "descend": _why_not_descend,
        "lora_linear": _why_not_lora_linear,
    }
    return why_not[op](*args) or _why_not_captured(op, *args)


def _why_not_captured(op: str, *args: Any) -> str | None:
    """A captured copy would be made again, at every replay, from host memory that is gone."""
    needs_table = op == "descend" or (op == "dual_project" and len(args[0]) > 1)
    if needs_table and args[0][0].is_cuda and torch.cuda.is_current_stream_capturing():
        return (
            "a CUDA graph cannot keep the table of its matrices: capture dual_project of one matrix"
            " a call, and descend not at all (it is one launch for many steps)"
        )
    return None


def why_not_auto(op: str, *args: Any) -> str | None:
    """Why `auto` passes it over for calls on a device that it could run."""
    device = args[0].device if isinstance(args[0], Tensor) else args[0][0].device
    faster = _FASTER.get(op, ())
    if device.type == "cuda" and torch.cuda.get_device_capability(device) in faster:
        return None
    return "no committed result shows it faster here"


def dual_project(
    group: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], precision: Precision
) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    classes: dict[tuple[torch.device, Form], list[Projection]] = {}
    for weight, a, b in zip(group, A, B, strict=True):
        one = Projection.of(weight.detach(), a.detach(), b.detach().T, precision)
        pairs.append((one.left, one.right))
        if weight.stride(0) == 1 and weight.stride(1) != 1:
            one = one.transposed()  # its columns are what lies together
        classes.setdefault((weight.device, one.form), []).append(one)
    for (_, form), members in classes.items():
        _project_both(form, members)
    return pairs


def _project_both(
    form: Form,
    members: Sequence[Projection],
    scale: float = 1.0,
    blocks: int = 16,
    least: int = 256,
) -> None:
    """Both products of all members, in one launch, or in two where there is something to sum.

    Args:
        scale: of `left`; not 1 only where products are not fp32.
        blocks, least: of `projection_table`.
    """
    module = native.module()
    assert module is not None
    device = members[0].weight.device
    weight = _WEIGHTS[form.dtype]
    columns = module.dual_project_columns(weight, form.ranks, form.parts)
    table, _partials = projection_table(members, columns, blocks, least)
    # One row goes by value, which a graph can keep.
    layers = _uploaded(table, device) if len(table) > 1 else None
    module.dual_project(
        table=table.ctypes.data,
        layers=0 if layers is None else layers.data_ptr(),
        count=len(table),
        weight=weight,
        ranks=form.ranks,
        parts=form.parts,
        factors_are_half=form.own,
        scale=scale,
        half_targets=members[0].left.dtype != torch.float32,
        device=device.index,
        stream=torch.cuda.current_stream(device).cuda_stream,
    )


def descend(group: Sequence[Tensor], state: DescentState, steps: int) -> None:
    module = native.module()
    assert module is not None
    if not steps:
        return
    optimizer = state.optimizer
    schedule = optimizer.schedule(state.step, steps).astype(np.float32)
    classes: dict[tuple[torch.device, torch.dtype, Variant], list[tuple[int, Cut]]] = {}
    for i, (W, params) in enumerate(zip(group, state.params, strict=True)):
        found = _cut(W, params)
        assert isinstance(found, Cut), found
        classes.setdefault((W.device, W.dtype, found.variant), []).append((i, found))
    for (device, dtype, variant), members in classes.items():
        indices, cuts = zip(*members, strict=True)
        taken = [group[i] for i in indices]
        table = blocks.table(taken, state.take(indices), cuts, _region_bytes)
        limits = _limits(variant, device.index)
        assert isinstance(limits, Limits), limits
        ctas = min(table.blocks, limits.ctas)
        layers, rates = (_uploaded(t, device) for t in (table.layers, schedule))
        counters = torch.empty(table.counter_bytes, dtype=torch.uint8, device=device)
        workspace = torch.empty(table.region_bytes * ctas, dtype=torch.uint8, device=device)
        module.descend(
            variant=tuple(variant),
            layers=layers.data_ptr(),
            blocks=table.blocks,
            most_blocks=table.most_blocks,
            steps=steps,
            schedule=rates.data_ptr(),
            workspace=workspace.data_ptr(),
            region_bytes=table.region_bytes,
            counters=counters.data_ptr(),
            counter_bytes=table.counter_bytes,
            betas=optimizer.betas,
            eps=optimizer.eps,
            bf16=dtype == torch.bfloat16,
            adam=optimizer.name == "adam",
            ctas=ctas,
            device=device.index,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )


def _uploaded(array: np.ndarray, device: torch.device) -> Tensor:
    """From pinned memory, or the host would wait for all that the device was told before."""
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)


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
    # Copies come first: the product may start under the launch that makes S.
    x, A, B = _aligned(x), _aligned(A), _aligned(B)
    bias = None if bias is None else _aligned(bias[None])[0]
    S = _padded_empty(x, A.shape[0])
    _project(_dropped(x, seed, dropout_p), A, S, scaling / keep_rate(dropout_p))
    y = _matmul(x, R, S, B, bias, overlaps=True)
    return y, S.contiguous()


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
    dx = dA = dB = S_trained = None
    # Copies come first: of the launches below, each may start under the one before.
    dy, A, B = _aligned(dy), _aligned(A), _aligned(B)
    dropped = _aligned(_dropped(x, seed, dropout_p)) if need_A and x is not None else None
    if need_B and S is not None:
        S_trained, dB = _aligned(S[:, :trained]), B.new_empty(B.shape[0], trained)
    dS = _padded_empty(dy, B.shape[1])
    scale = scaling / keep_rate(dropout_p)
    if need_x or need_A:
        if S_trained is not None and dB is not None and B.shape[1] <= RANKS[-1]:
            # One read of dY for both.
            one = Projection(dy, B.T, S_trained.T, dS, dB.T)
            _project_both(one.form, [one], scale, blocks=256, least=64)
            S_trained = None
        else:
            _project(dy, B, dS, scale, transposed_f=True)
    if need_x and seed is None:
        dx = _matmul(dy, R, dS, A, transposed=True, overlaps=True)
    elif need_x:
        # The mask is of dS A alone, which the kernel never has apart.
        dx = _matmul(dy, R, transposed=True).add_(_dropped(dS @ A, seed, dropout_p))
    # The product lets go of its launch when dS is there, and has a last round that is not full.
    both = {"transposed_x": True, "transposed_f": True, "overlaps": need_x and seed is None}
    if S_trained is not None and dB is not None:
        _project(dy, S_trained, dB, **both)
    if dropped is not None:
        dA = A.new_empty(trained, A.shape[1])
        _project(dropped, dS[:, :trained], dA.T, **both)
    return dx, dA, dB, dy.sum(0) if need_bias else None


def _project(
    x: Tensor,
    f: Tensor,
    c: Tensor,
    scale: float = 1.0,
    *,
    transposed_x: bool = False,
    transposed_f: bool = False,
    overlaps: bool = False,
    splits: int = 0,
) -> None:
    """c = scale · x fᵀ, or with x and f transposed, in one launch that reads x once.

    Args:
        x: (m, k), or (k, m); fp16 or bf16, rows contiguous and aligned to 16 bytes.
        f: (r, k), or (k, r); likewise.
        c: (m, r), any strides; written.
        transposed_x: only with transposed_f.
        overlaps: may start before the launch before it ends, which made neither x nor f.
        splits: of csrc/project.h; 0 lets the shape decide.
    """
    k, m = x.shape if transposed_x else x.shape[::-1]
    if k == 0:
        c.zero_()
        return
    module = native.module()
    assert module is not None
    module.project(
        x=x.data_ptr(),
        f=f.data_ptr(),
        c=c.data_ptr(),
        sizes=(m, k, c.shape[1]),
        strides=(x.stride(0), f.stride(0), *c.stride()),
        bf16=x.dtype == torch.bfloat16,
        transposed_x=transposed_x,
        transposed_f=transposed_f,
        overlaps=overlaps,
        scale=scale,
        splits=splits,
        device=x.device.index,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )


def _matmul(
    x: Tensor,
    R: Tensor,
    S: Tensor | None = None,
    B: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    overlaps: bool = False,
    tile_n: int = 0,
    cluster: int = 0,
) -> Tensor:
    """x Rᵀ + S Bᵀ + bias, or x R + S B where `transposed`, in one launch.

    Args:
        x: (M, k), fp16 or bf16, any strides.
        R: (n, k), or (k, n); rows contiguous and aligned to 16 bytes.
        S: (M, r), r ≥ 1.
        B: (n, r), or (r, n).
        bias: (n,), contiguous and aligned to 4 bytes.
        overlaps: may start before the launch before it ends, which made S and nothing else of this.
        tile_n, cluster: of csrc/lora_linear.h; 0 lets the shape decide.

    Returns:
        (M, n), contiguous.
    """
    n = R.shape[1] if transposed else R.shape[0]
    y = x.new_empty(x.shape[0], n)
    x = _aligned(x)
    low_rank = (0, 0, 0, 0, 0)
    if S is not None and B is not None:
        S, B = _aligned(S), _aligned(B)
        low_rank = (S.data_ptr(), B.data_ptr(), S.shape[1], S.stride(0), B.stride(0))
    at_S, at_B, r, stride_S, stride_B = low_rank
    module = native.module()
    assert module is not None
    module.lora_linear(
        x=x.data_ptr(),
        R=R.data_ptr(),
        S=at_S,
        B=at_B,
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        sizes=(x.shape[0], n, x.shape[1], r),
        strides=(x.stride(0), R.stride(0), stride_S, stride_B, n),
        bf16=x.dtype == torch.bfloat16,
        transposed=transposed,
        overlaps=overlaps,
        tile_n=tile_n,
        cluster=cluster,
        device=x.device.index,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )
    return y


def _aligned(matrix: Tensor) -> Tensor:
    """The same matrix with rows that TMA can address: itself, or a copy."""
    if _why_not_aligned(matrix) is None:
        return matrix
    # On the stream that reads it, so that the allocator may give its memory away afterwards.
    return _padded_empty(matrix, matrix.shape[1]).copy_(matrix)


def _padded_empty(like: Tensor, columns: int) -> Tensor:
    """As many rows as `like` has, for TMA to address."""
    return like.new_empty(like.shape[0], -(-columns // 8) * 8)[:, :columns]


def _why_not_aligned(matrix: Tensor) -> str | None:
    """Why 16 bytes at a time, or TMA, cannot address a matrix' rows."""
    pitch, step = matrix.stride()
    apart = pitch * matrix.element_size()
    if step != 1 or pitch < matrix.shape[1] or apart % 16 or matrix.data_ptr() % 16:
        return (
            f"needs contiguous rows that start at multiples of 16 bytes, got strides "
            f"{(pitch, step)} at {matrix.data_ptr() % 16} mod 16"
        )
    return None


def _dropped(tensor: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    if seed is None:
        return tensor
    return tensor.masked_fill(~keep_mask(seed, tensor.shape[0], tensor.shape[1], dropout_p), 0)


def _why_not_dual_project(
    group: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], precision: Precision
) -> str | None:
    if not group:
        return "has nothing to do for no matrices"
    for W, a, b in zip(group, A, B, strict=True):
        for t in (W, a, b):
            if t.dtype not in _WEIGHTS:
                return f"multiplies float32, bfloat16 and float16, not {str(t.dtype)[6:]}"
        if max(a.shape[0], b.shape[1]) > RANKS[-1]:
            return f"takes up to {RANKS[-1]} ranks, not {max(a.shape[0], b.shape[1])}"
        if W.device.type != "cuda" or torch.version.cuda is None:
            return f"runs on NVIDIA GPUs; the tensors are on {W.device.type}"
        if reason := _why_no_dual_project(W.device.index):
            return reason
    return None


@cache
def _why_no_dual_project(index: int) -> str | None:
    module = native.module()
    assert module is not None
    reason: str | None = module.why_no_dual_project(index)
    return reason


def _why_not_descend(group: Sequence[Tensor], state: DescentState, steps: int) -> str | None:
    if not group:
        return "has nothing to do for no matrices"
    if steps >= _MOST_STEPS:
        return f"takes fewer than {_MOST_STEPS} steps a call, not {steps}"
    state_tensors = [*state.params, *(t for pair in state.moments for t in pair)]
    if not all(t.dtype == torch.float32 and t.is_contiguous() for t in state_tensors):
        return "descends contiguous float32 factors and moments"
    for W, params in zip(group, state.params, strict=True):
        if W.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"descends to float32, bfloat16 and float16 matrices, not {str(W.dtype)[6:]}"
        if params.shape[0] > 32:
            return f"takes up to 32 ranks, not {params.shape[0]}"
        if W.device.type != "cuda" or torch.version.cuda is None:
            return f"runs on NVIDIA GPUs; the tensors are on {W.device.type}"
        if isinstance(reason := _cut(W, params), str):
            return reason
    return None


def _cut(weight: Tensor, params: Tensor) -> Cut | str:
    """On chip where there is room for it, else streamed; or why neither."""
    resident, streamed = (Variant.of(weight, params, streamed) for streamed in (False, True))
    limits = _limits(resident, weight.device.index)
    found = limits if isinstance(limits, str) else blocks.cut(weight.shape, resident, limits)
    if isinstance(found, Cut):
        return found
    on_chip = f"on chip it {found}; " if isinstance(limits, Limits) else ""
    limits = _limits(streamed, weight.device.index)
    if isinstance(limits, str):
        return limits
    if reason := _why_not_aligned(weight):
        return f"{on_chip}streamed, W {reason}"
    found = blocks.cut(weight.shape, streamed, limits)
    if isinstance(found, str):
        return on_chip + found
    if (size := _region_bytes(found) * found.count) >= _MOST_WORKSPACE:
        return f"exchanges less than 4 GB; {tuple(weight.shape)} takes {size / 1e9:.1f}"
    return found


@cache
def _limits(variant: Variant, index: int) -> Limits | str:
    module = native.module()
    assert module is not None
    if reason := module.why_no_descend(tuple(variant), index):
        return str(reason)
    if not variant.streamed and (reason := _why_not_on(index)):
        return reason
    ctas = int(module.descend_capacity(tuple(variant), index))
    if ctas == 0:
        return "takes more of this device than there is for this process"
    return Limits(ctas, module.descend_tiles(tuple(variant)))


def _region_bytes(found: Cut) -> int:
    module = native.module()
    assert module is not None
    return int(module.descend_region_bytes(tuple(found.variant), found.tiles, found.blocks))


def _why_not_lora_linear(*args: Any) -> str | None:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    for device in {t.device for t in tensors}:
        if device.type != "cuda" or torch.version.cuda is None:
            return f"runs on NVIDIA GPUs; the tensors are on {device.type}"
        if reason := _why_not_on(device.index):
            return reason
    dtypes = {t.dtype for t in tensors}
    if not dtypes <= {torch.bfloat16} and not dtypes <= {torch.float16}:
        names = ", ".join(sorted(str(dtype)[6:] for dtype in dtypes))
        return f"computes with all operands in bfloat16 or all in float16, not {names}"
    for R in tensors[1:2]:
        if R.shape[0] % 8 or R.shape[1] % 8:
            return f"needs in and out to be multiples of 8, R is {tuple(R.shape)}"
        if reason := _why_not_aligned(R):
            return f"of R {reason}"
    return None


@cache
def _why_not_on(index: int) -> str | None:
    module = native.module()
    assert module is not None
    reason: str | None = module.why_no_hopper(index)
    # On a GPU that it was not built for, a kernel is empty.
    if reason is None and "90a" not in module.archs:
        reason = f"was built for {module.archs}, not for 90a: LORA_INIT_CUDA_ARCHS"
    return reason
