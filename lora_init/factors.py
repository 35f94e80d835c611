"""Factors B·A of a weight: shapes, rounding, the frozen residual and its error.

Convention everywhere in the package: W (out, in), B (out, r), A (r, in), R = W − s·B·A.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

# Where W − s·B₀A₀ is: stored in the base weight's place, or W stays and the layer subtracts.
# "replaced": nowhere, `Factors.base` is in the base weight's place. None: W stays, and the start is
# W + s·B₀A₀ (W where B₀A₀ is 0).
Residual = Literal["stored", "virtual", "replaced"] | None

# Rows are taken in blocks of about this many elements, so that a pass over W needs a few megabytes
# of scratch whatever W's size, and so that the split depends on W's shape alone (same inputs, same
# bits). In fp64 2 MB, which an L2 cache holds: the squared error of a 4096² matrix took 24 ms on
# one core, with blocks of 2²⁰ 86 ms.
_BLOCK_ELEMENTS = 1 << 18
# A GPU wants few launches; 128 MB in fp64.
_GPU_BLOCK_ELEMENTS = 1 << 24
# The low bits of an fp64 number that leave 21 significant ones.
_LOST_BITS = (1 << 32) - 1


class LoraInitError(ValueError):
    """Bad input, refused before anything was changed; the message names the layer, the value and
    the way out.
    """


@dataclass(frozen=True)
class Factors:
    """The low-rank start of one layer.

    Attributes:
        A: (r, in).
        B: (out, r), same dtype and device as `A`.
        scaling: s of `y = x Rᵀ + s·x Aᵀ Bᵀ`.
        info: how the solve went; JSON-able (method, steps or reads of W, true loss, seconds, ...).
        base: (out, in), what W becomes where that is not W − s·B·A, in W's dtype; from methods that
            replace it.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0
    info: dict[str, Any] = field(default_factory=dict)
    base: Tensor | None = None

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise LoraInitError(
                f"A must be (r, in) and B (out, r), got A {tuple(self.A.shape)} and B "
                f"{tuple(self.B.shape)}"
            )

    @property
    def r(self) -> int:
        return self.A.shape[0]

    def to(self, dtype: torch.dtype, name: str = "layer") -> Factors:
        """The same factors rounded to the dtype they will be stored in (do this *before*
        `residual`).

        Raises:
            LoraInitError: a factor is not finite, or does not fit `dtype`.
        """
        A, B = self.A.to(dtype), self.B.to(dtype)
        for label, before, after in (("A", self.A, A), ("B", self.B, B)):
            if not bool(torch.isfinite(after).all()):
                top = before.abs().max().item()
                raise LoraInitError(
                    f"{name}: factor {label} is not finite in {dtype} (largest magnitude "
                    f"{top:.3g}, {dtype} "
                    f"holds {torch.finfo(dtype).max:.3g}): use a wider adapter dtype or a smaller "
                    "start"
                )
        return dataclasses.replace(self, A=A, B=B)

    def product(self, rows: slice = slice(None)) -> Tensor:
        """s·B[rows]·A, shape (rows, in), fp64 on the CPU and fp32 elsewhere (`exact_dtype`)."""
        dtype = exact_dtype(self.A)
        return (self.B[rows].to(dtype) @ self.A.to(dtype)).mul_(self.scaling)

    def drift_under_dropout(self, weight: Tensor, p: float) -> float:
        """Relative noise of the layer's output at step 0 when the input of A is dropped with
        probability p.

        E‖s·BA(drop(x) − x)‖² / E‖Wx‖² for white x, square-rooted: √(p/(1−p))·s‖BA‖_F/‖W‖_F.
        """
        norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        return (p / (1 - p)) ** 0.5 * self.norm() / norm if norm else 0.0

    def norm(self) -> float:
        """‖s·B·A‖_F, from the Gram matrices of A and B."""
        A, B = self.A.double(), self.B.double()
        return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()) * self.scaling

    @torch.no_grad()
    def residual(self, weight: Tensor, name: str = "layer", out: Tensor | None = None) -> Tensor:
        """R = W − s·B·A, computed in fp64 on the CPU (fp32 elsewhere) and rounded once to W's
        dtype.

        Args:
            weight: (out, in), any strides.
            out: (out, in) tensor to write, W itself allowed; a new one of W's dtype if None.

        Raises:
            LoraInitError: R does not fit W's dtype. `out` may be partly written then, so check with
                a scratch `out` first when it is W.
        """
        self.check_fits(weight, name)
        if out is None:
            out = torch.empty_like(weight)
        for rows in row_blocks(weight):
            exact = weight[rows].to(exact_dtype(weight)) - self.product(rows)
            out[rows] = _rounded_once(exact, out.dtype)
            _check_finite(out[rows], name)
        return out

    @torch.no_grad()
    def squared_error(self, weight: Tensor) -> float:
        """‖W − s·B·A‖²_F from a pass over W (the Gram form cancels near convergence), summed in
        fp64.
        """
        self.check_fits(weight)
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        for rows in row_blocks(weight):
            # Into the product's dense memory: one order of summation whatever W's strides.
            difference = self.product(rows).to(exact_dtype(weight)).sub_(weight[rows])
            total += torch.linalg.vector_norm(difference, dtype=torch.float64).square()
        return float(total)  # the only time that the host waits for a GPU

    @torch.no_grad()
    def fit(self, weight: Tensor, name: str = "layer", residual: Residual = "stored") -> Fit:
        """How well s·B·A and the start fit W: one pass over W by row blocks, R is never whole.

        The start is R + s·B·A with R stored in W's dtype or `base` in its place ("replaced"), W
        itself ("virtual"), or W + s·B·A.

        Raises:
            LoraInitError: as `residual`.
        """
        self.check_fits(weight, name)
        squares = energy = drift = worst = 0.0
        for rows in row_blocks(weight):
            product = self.product(rows)
            # Contiguous: one order of summation whatever the strides.
            exact = weight[rows].to(product.dtype).contiguous()
            difference = exact - product
            squares += _squared_norm(difference)
            energy += _squared_norm(exact)
            if residual == "virtual":
                continue
            error = product
            if residual == "replaced":
                assert self.base is not None
                error = product.add_(self.base[rows]).sub_(exact)
            elif residual == "stored":
                R = _rounded_once(difference, weight.dtype).to(weight.dtype)
                _check_finite(R, name)
                error = product.add_(R).sub_(exact)
            drift += _squared_norm(error)
            worst = max(worst, _largest(error))
        scale = energy or self.norm() ** 2
        relative = (drift / scale) ** 0.5 if scale else (0.0 if not drift else float("inf"))
        return Fit(squares, energy, worst, relative)

    def check_fits(self, weight: Tensor, name: str = "layer") -> None:
        """Raises `LoraInitError` unless A is (r, in) and B (out, r) for `weight` (out, in)."""
        if weight.ndim != 2 or (self.B.shape[0], self.A.shape[1]) != tuple(weight.shape):
            raise LoraInitError(
                f"{name}: B {tuple(self.B.shape)} and A {tuple(self.A.shape)} do not fit a weight "
                "of shape "
                f"{tuple(weight.shape)}"
            )


@dataclass(frozen=True)
class Fit:
    """What `Factors.fit` found.

    Attributes:
        squares: ‖W − s·B·A‖²_F.
        energy: ‖W‖²_F.
        start_error: largest |start − W|.
        start_drift: ‖start − W‖_F / ‖W‖_F, or relative to ‖s·B·A‖_F where W is zero. Of a stored
            residual its rounding is all that is there.
    """

    squares: float
    energy: float
    start_error: float
    start_drift: float


@torch.no_grad()
def shifted(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    start: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """W + s(B A − B₀A₀), or W + s·B·A without a start (A₀, B₀), computed in `exact_dtype` and
    rounded once to W's dtype: what merging a layer writes, and with −s what unmerging does.

    Equal factors cancel to the last bit.

    Args:
        weight: (out, in), any strides, which the result has too.
        A: (r, in). B: (out, r).
        start: (r₀, in) and (out, r₀).
    """
    wide, result = exact_dtype(weight), torch.empty_like(weight)
    pairs = [tuple(t.to(wide) for t in pair) for pair in ((A, B), *([start] if start else []))]
    for rows in row_blocks(weight):
        exact, *others = (b[rows] @ a for a, b in pairs)
        for product in others:
            exact -= product
        exact = exact.mul_(scaling).add_(weight[rows])
        result[rows] = _rounded_once(exact, result.dtype)
    return result


def weight_digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' dtypes, shapes and values, whatever their strides and devices."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # A dimension of size 1 has any stride in a "contiguous" tensor; a view as bytes wants 1.
        flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _largest(tensor: Tensor) -> float:
    """max|·|, NaN if there is one."""
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high))


def _squared_norm(tensor: Tensor) -> float:
    """‖·‖² of a contiguous tensor, in fp64. `vector_norm` took ten times as long as BLAS's dot."""
    flat = tensor.view(-1).double()
    return float(torch.dot(flat, flat))


def _check_finite(residual: Tensor, name: str) -> None:
    if not math.isfinite(_largest(residual)):  # a twentieth of the time of `torch.isfinite`
        raise LoraInitError(
            f"{name}: the residual W − s·B·A overflows {residual.dtype}: keep this base in a wider "
            f"dtype"
        )


def _rounded_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """`exact` (overwritten) such that its conversion to `dtype` rounds once.

    torch converts fp64 to a 16-bit float through fp32, and that first rounding can make a tie of
    what is none: 1.3 of 147,456 bf16 and 9 of fp16 residual entries were then off by more than half
    an ulp. Rounded to odd at 21 bits, which fp32 holds, all of them come out right.
    """
    if exact.dtype == torch.float64 and dtype.itemsize == 2:
        bits = exact.view(torch.int64)
        lost = bits.bitwise_and(_LOST_BITS).ne_(0)
        bits.bitwise_and_(~_LOST_BITS).bitwise_or_(lost.mul_(_LOST_BITS + 1))
    return exact


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which residuals and errors are computed: fp64 on the CPU and for fp64 weights,
    else fp32.
    """
    wide = tensor.device.type == "cpu" or tensor.dtype == torch.float64
    return torch.float64 if wide else torch.float32


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Row slices covering (out, in), set by the shape alone on one kind of device."""
    rows, columns = weight.shape
    elements = _BLOCK_ELEMENTS if weight.device.type == "cpu" else _GPU_BLOCK_ELEMENTS
    step = max(1, elements // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
