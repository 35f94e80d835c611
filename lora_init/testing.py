"""What the tests and benchmarks of an op share: cases, awkward memory, and the error rule."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# (out, in, r) by a readable id: the smallest, one of each side 1, no multiple of any tile, r from 1
# to min(out, in), the sizes of real layers in miniature (square, k/v, down).
SHAPES = {
    "1x1_r1": (1, 1, 1),
    "1x7_r1": (1, 7, 1),
    "9x1_r1": (9, 1, 1),
    "33x65_r3": (33, 65, 3),
    "17x130_r17": (17, 130, 17),
    "64x64_r8": (64, 64, 8),
    "48x192_r8": (48, 192, 8),
    "257x96_r17": (257, 96, 17),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def gaussian(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """(rows, columns) of N(0, 0.05²), the size of trained weights, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.05).to(dtype)


def misaligned(tensor: Tensor, offset: int = 8) -> Tensor:
    """The same dense tensor at an address `offset` mod 64, as in a mapped safetensors file."""
    size = tensor.numel() * tensor.element_size()
    raw = torch.empty(size + 64 + offset, dtype=torch.uint8, device=tensor.device)
    start = (offset - raw.data_ptr()) % 64
    return raw[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    """The same matrix in column-major memory."""
    return tensor.T.contiguous().T


def product(a: Tensor, b: Tensor) -> np.ndarray:
    """a·b to judge results by: in fp64, or in 80-bit floats if an operand is fp64 itself."""
    wide = np.longdouble if torch.float64 in (a.dtype, b.dtype) else np.float64
    left, right = (t.detach().cpu().double().numpy() for t in (a, b))
    return np.matmul(left.astype(wide), right.astype(wide))


def assert_accurate(
    actual: Tensor,
    exact: np.ndarray,
    *expressions: Tensor,
    terms: np.ndarray | None = None,
    label: str = "",
) -> None:
    """A kernel is right if its ‖error‖ is at most twice that of the same-dtype torch expression.

    Args:
        exact: see `product`.
        expressions: the ways to write it in torch, of which the least accurate counts: on the CPU
            A Wᵀ is up to twice as far off as W Aᵀ. An error of one rounding is always granted, for
            on a few elements an expression may be exact by luck.
        terms: Σ|aᵢ||bᵢ| of each element; that rounding is then of its terms, which a sum that
            cancels is not spared.
    """
    errors = []
    for result in (actual, *expressions):
        assert result.dtype == actual.dtype, f"{label}: {actual.dtype} for {result.dtype}"
        assert result.shape == exact.shape, f"{label}: {tuple(result.shape)} for {exact.shape}"
        errors.append(_norm(result.detach().cpu().double().numpy() - exact))
    allowed = 2 * max(
        *errors[1:], torch.finfo(actual.dtype).eps / 2 * _norm(exact if terms is None else terms)
    )
    assert errors[0] <= allowed, f"{label}: error {errors[0]:.3e} against fp64 > {allowed:.3e}"


def _norm(array: np.ndarray) -> float:
    return float(np.sqrt(np.square(array).sum()))
