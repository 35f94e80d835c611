"""Whole matrices in fp64, and their factorisations on one thread: slow and exact."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_init.parallel import single_threaded


def wide(matrix: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """A copy in fp64 on a device, row-major: the bits of a product depend on where its operands
    lie, and on their strides.
    """
    return torch.empty(matrix.shape, dtype=torch.float64, device=device).copy_(matrix)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k,) largest first and V (in, k) in fp64, k = min(out, in)."""
    with single_threaded():  # the bits of a factorisation depend on the threads
        U, S, Vh = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    return U, S, Vh.T


def svd_bytes(matrix: Tensor) -> int:
    """Memory beyond the matrix that `svd` takes: a copy, the factors, and LAPACK's 4k² or so."""
    small = min(matrix.shape)
    return 8 * (2 * matrix.numel() + small * sum(matrix.shape) + 5 * small**2)


def signs(columns: Tensor) -> Tensor:
    """±1 for each column (n, k), which make the largest entry of each positive.

    Of entries that are the largest to 1e-6 it is the first: those of a matrix with equal rows tie,
    and rounding would decide.
    """
    sizes = columns.abs()
    first = (sizes >= sizes.amax(0) * (1 - 1e-6)).to(torch.uint8).argmax(0, keepdim=True)
    largest = columns.gather(0, first)[0]
    return torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)
