"""Triton kernels on NVIDIA GPUs; on CPU tensors in a process that interprets (TRITON_INTERPRET=1).

Triton is imported at the first call that could use it: it takes a second, and need not be there.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from math import log2
from typing import Any

import torch
from torch import Tensor

from lora_init.ops.descend import DescentState
from lora_init.ops.dual_project import Precision

NAME = "triton"
PRIORITY = 10
VERIFIED = ("dual_project", "descend")

_OPS = ("dual_project", "descend", "lora_linear")
_OLDEST = (3, 3)
_MOST_ROWS = 8192

Bucket = tuple[int, int, int]
SPLIT: dict[tuple[tuple[int, int], str], frozenset[Bucket]] = {}
"""(compute capability, pass of `lora_linear`) -> the sizes, as `bucket` has them, at which torch's
matmul and addmm_ were faster than the kernel that does both: what `bench_lora_linear --schedules`
prints of a run whose rows are in benchmarks/results/. Empty because no such run is there yet.
h200-2026-11-27.json has the products alone, of tiles before the present ones: 0.95 of cuBLAS's rate
forward and 0.84 to 0.94 in dX, where reading and writing dX once more takes 0.09 to 0.32 of the
product's time.
"""


def fingerprint() -> str:
    """What the kernels' code and their compiler are: a verdict on them holds for these."""
    folder = files("lora_init.triton_kernels")
    sources = sorted((file.name, file.read_bytes()) for file in folder.iterdir() if file.is_file())
    digest = hashlib.sha256(b"".join(content for _, content in sources))
    return f"{digest.hexdigest()} triton {_triton_version()}"


def why_unsupported(op: str, *args: Any) -> str | None:
    if op not in _OPS:
        return f"has no op {op!r}"
    tensors = list(_tensors(args))
    for dtype in {t.dtype for t in tensors}:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"computes in float32, bfloat16 and float16, not {str(dtype)[6:]}"
    if op == "descend" and not all(_contiguous_fp32(state) for state in args[1:2]):
        return "descends contiguous float32 factors and moments"
    if op == "lora_linear" and (reason := _why_not_dtypes(*args[:3])):
        return reason
    for device in {t.device for t in tensors}:
        if reason := _why_not_on(device):
            return reason
    return None if tensors else _triton_missing()


def dual_project(
    group: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], precision: Precision
) -> list[tuple[Tensor, Tensor]]:
    return _kernels("dual_project").dual_project(group, A, B, precision) if group else []


def descend(group: Sequence[Tensor], state: DescentState, steps: int) -> None:
    if not group or not steps:
        return
    optimizer = state.optimizer
    _kernels("descend").descend(
        group,
        state.out_features,
        state.params,
        state.moments,
        optimizer.betas,
        optimizer.eps,
        optimizer.schedule(state.step, steps),
    )


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
    split = why_fused("forward", x, R, A, start=trained < len(A)) is None
    with torch.cuda.device_of(x):
        y, S = _kernels("lora_linear").forward(
            x, R, A, B, bias, seed, scaling, dropout_p, trained, split
        )
    return y, S


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
) -> tuple[Tensor | None, ...]:
    reason = why_fused("backward", dy, R, A, start=trained < len(A), dropout=seed is not None)
    with torch.cuda.device_of(dy):
        dx, dA, dB, dbias = _kernels("lora_linear").backward(
            dy, x, R, A, B, S, seed, scaling, dropout_p, trained, output_mask, reason is None
        )
    return dx, dA, dB, dbias


def how(op: str, *args: Any) -> str | None:
    """The schedules of a call (x, R, A, …) of `lora_linear`, and why."""
    if op != "lora_linear" or len(args) < 3:
        return None
    reasons = {side: why_fused(side, *args[:3]) for side in ("forward", "backward")}
    if len(set(reasons.values())) == 1:
        reasons = {" and ".join(reasons): reasons["forward"]}
    return ", ".join(
        f"{side} split into matmul and addmm_: measured faster at these sizes on this GPU"
        if reason is None
        else f"{side} fused: {reason}"
        for side, reason in reasons.items()
    )


def why_fused(
    side: str, x_or_dy: Tensor, R: Tensor, A: Tensor, *, start: bool = False, dropout: bool = False
) -> str | None:
    """Why one kernel adds the low-rank product to the frozen one in the "forward" or "backward"
    pass; None where torch's matmul and addmm_ do.
    """
    faster = SPLIT.get((_capability(x_or_dy.device), side))
    if not faster:
        return "no committed result shows matmul and addmm_ faster on this GPU"
    rows = x_or_dy.numel() // max(1, x_or_dy.shape[-1])
    if bucket(rows, *R.shape) not in faster:
        return "no committed result shows matmul and addmm_ faster at these sizes on this GPU"
    if x_or_dy.dtype != A.dtype or A.dtype.itemsize != 2:
        return "only 16-bit tensors with factors of their dtype were timed otherwise"
    if start:
        return "a virtual start has to cancel before anything is added to it"
    return "only there the dropout mask is made" if dropout and side == "backward" else None


def bucket(rows: int, out_features: int, in_features: int) -> Bucket:
    """The class of sizes that a measurement stands for: the nearest powers of two, of up to 8192
    rows.
    """
    rows, *others = (1 << round(log2(max(1, n))) for n in (rows, out_features, in_features))
    return min(rows, _MOST_ROWS), others[0], others[1]


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    capability: tuple[int, int] = _kernels("common").capability_of(device)
    return capability


def _kernels(name: str) -> Any:
    return importlib.import_module(f"lora_init.triton_kernels.{name}")


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, DescentState):
            yield from arg.params
        elif isinstance(arg, Sequence) and not isinstance(arg, str):
            yield from _tensors(arg)


def _contiguous_fp32(state: DescentState) -> bool:
    tensors = [*state.params, *(t for pair in state.moments for t in pair)]
    return all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def _why_not_dtypes(*operands: Tensor) -> str | None:
    """Of x, R, A where they are known."""
    if len(operands) < 3 or operands[0].dtype == operands[2].dtype:
        return None
    if operands[2].dtype == torch.float32:
        return None
    x, A = (str(operands[i].dtype)[6:] for i in (0, 2))
    return f"adapts {x} by {x} or float32 factors, not by {A} ones"


def _why_not_on(device: torch.device) -> str | None:
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return _triton_missing()
        return "runs on NVIDIA GPUs; the tensors are on the CPU"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"runs on NVIDIA GPUs; the tensors are on {device.type}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 runs kernels on the CPU only"
    return _triton_missing() or _too_old(device.index)


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


@cache
def _triton_missing() -> str | None:
    found = _triton_version()
    if found is None:
        return "triton is not installed: pip install triton"
    numbers = tuple(int(number) for number in found.split(".")[:2])
    if numbers < _OLDEST:
        return f"needs triton 3.3 or newer, found {found}"
    return None


@cache
def _too_old(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        name = torch.cuda.get_device_name(index)
        return f"needs compute capability 8.0 or newer, {name} has {major}.{minor}"
    return None
