"""`dual_project`: one read of each big matrix, two skinny products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lora_init import backends
from lora_init.factors import LoraInitError

Precision = Literal["full", "fast"]


def dual_project(
    group: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    precision: Precision = "full",
) -> list[tuple[Tensor, Tensor]]:
    """(W Aᵀ, Bᵀ W) for every W of a ragged group, each W read once, in place and in its own dtype.

    Args:
        group: matrices (outᵢ, inᵢ) of any shapes, float dtypes and strides.
        A: (pᵢ, inᵢ), one per matrix.
        B: (outᵢ, qᵢ), one per matrix; pᵢ and qᵢ may differ.
        precision: how an accelerated backend treats A and B beside a 16-bit W: "full" keeps all
            their bits (in three 16-bit parts), "fast" may keep two of the parts or one. The
            reference is always full.

    Returns:
        One pair ((outᵢ, pᵢ), (qᵢ, inᵢ)) per matrix, in fp64 where any operand is fp64 and else in
        fp32.

    Raises:
        LoraInitError: lengths, shapes, dtypes or devices do not fit.
    """
    if not len(group) == len(A) == len(B):
        raise LoraInitError(
            f"dual_project needs as many A and B as matrices, got {len(group)} matrices, {len(A)} "
            f"A, {len(B)} B"
        )
    if precision not in ("full", "fast"):
        raise LoraInitError(f"precision must be 'full' or 'fast', got {precision!r}")
    for i, (w, a, b) in enumerate(zip(group, A, B, strict=True)):
        check_operands(f"matrix {i}", w, a, b)
    return backends.select("dual_project", group, A, B, precision).dual_project(
        group, A, B, precision
    )


def check_operands(name: str, weight: Tensor, A: Tensor, B: Tensor) -> None:
    """Raises `LoraInitError` unless W is (out, in), A (·, in), B (out, ·), all real floats on one
    device.
    """
    for label, tensor in (("W", weight), ("A", A), ("B", B)):
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise LoraInitError(
                f"{name}: {label} must be a floating-point matrix, got {tuple(tensor.shape)} "
                f"{tensor.dtype}"
            )
        if tensor.device != weight.device:
            raise LoraInitError(
                f"{name}: {label} is on {tensor.device}, W on {weight.device}: move one"
            )
        if tensor.device.type == "meta":
            raise LoraInitError(
                f"{name}: {label} is on the meta device and has no values: load it first"
            )
    out_features, in_features = weight.shape
    if A.shape[1] != in_features:
        hint = ": transpose it" if A.shape[0] == in_features else ""
        raise LoraInitError(f"{name}: A must be (r, {in_features}), got {tuple(A.shape)}{hint}")
    if B.shape[0] != out_features:
        hint = ": transpose it" if B.shape[1] == out_features else ""
        raise LoraInitError(f"{name}: B must be ({out_features}, r), got {tuple(B.shape)}{hint}")


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 where any operand is fp64, else fp32: the dtype products are accumulated and returned
    in.
    """
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
