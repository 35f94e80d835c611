"""LoftQ: a quantised base, and factors that make up for what it lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lora_init.factors import Factors, LoraInitError
from lora_init.methods import Layer, Method, Progress, register
from lora_init.methods.pissa import split, truncate_layers
from lora_init.ops.dual_project import product_dtype
from lora_init.options import check_choice, check_positive, check_rank, is_count, require
from lora_init.parallel import map_layers
from lora_init.solve import krylov

_BLOCK = 64


@register
@dataclass(frozen=True)
class LoftQ(Method):
    """LoftQ: a quantised base, and factors that make up for what it lost; the base becomes Q.

    From B·A = 0, T times: Q = quant(W − s·B·A), then s·B·A is the rank-r truncated SVD of W − Q,
    √(S/s) on each side. Li et al., arXiv 2310.08659. The published code leaves s out; here
    Q + s·B·A ≈ W for any s. The SVD is block Krylov iteration to `tol`, as for `pissa`.

    The base gets Q's values in W's dtype: it must be saved with the adapter, and a copy of it that
    is loaded in the same quantisation is the same base, to the rounding of W's dtype. bitsandbytes
    quantises (the extra `qlora`). Never cached.

    Options:
        quantization: "nf4", in blocks of 64 without double quantisation, or "int8", by rows; as
            bitsandbytes' 4- and 8-bit layers have them.
        iterations: T.
        tol: the excess of ‖W − Q − s·BA‖² over its minimum for this Q, relative to it, that is
            allowed.
    """

    name: ClassVar[str] = "loftq"
    residual: ClassVar[bool] = False
    replaces: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2310.08659"

    quantization: Literal["nf4", "int8"] = "nf4"
    iterations: int = 5
    tol: float = 1e-4

    def __post_init__(self) -> None:
        check_choice(self.name, "quantization", self.quantization, ["nf4", "int8"])
        whole = is_count(self.iterations, 1)
        require(self.name, "iterations", self.iterations, whole, "a whole number ≥ 1")
        check_positive(self.name, "tol", self.tol)

    def resolve(self, layers: Sequence[Layer]) -> list[dict[str, Any]]:
        if find_spec("bitsandbytes") is None:
            raise LoraInitError(
                "loftq quantises with bitsandbytes, which is not installed: pip install "
                "'lora-init[qlora]'"
            )
        for layer in layers:
            most = min(layer.weight.shape)
            check_rank(layer.name, layer.r, most, "min(out, in)", "the most that an SVD has")
        return super().resolve(layers)

    def peak_bytes(self, layer: Layer) -> int:
        # What is quantised, in fp32, its copy in 16 bits or dequantised, Q and W − Q.
        copies = 4 * product_dtype(layer.weight).itemsize * layer.weight.numel()
        return copies + krylov.peak_bytes(layer.weight, layer.r)

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        found: list[Factors] = []
        for _ in range(self.iterations):
            left = [_left(*pair) for pair in zip(layers, found, strict=True)] if found else None
            sources = left or [layer.weight for layer in layers]
            bases = map_layers(self._quantised, list(zip(layers, sources, strict=True)))
            lost = [
                dataclasses.replace(layer, weight=_difference(layer.weight, base))
                for layer, base in zip(layers, bases, strict=True)
            ]
            found = split(lost, truncate_layers(lost, self.tol, progress))
        return [dataclasses.replace(x, base=base) for x, base in zip(found, bases, strict=True)]

    def _quantised(self, item: tuple[Layer, Tensor]) -> Tensor:
        """Values of W's shape and dtype that the quantisation can hold (but for their rounding)."""
        layer, values = item
        base = _nf4(values) if self.quantization == "nf4" else _int8(values)
        base = base.to(layer.weight.dtype)
        if not bool(torch.isfinite(base).all()):
            raise LoraInitError(
                f"{layer.name}: values up to {float(values.abs().max()):.3g} do not survive the "
                f"quantisation to {self.quantization}: leave the layer out of target_modules"
            )
        return base


def _nf4(values: Tensor) -> Tensor:
    from bitsandbytes import functional

    # As one row of whole blocks, which run over the ends of rows: on the CPU bitsandbytes (0.50.2)
    # misreads them in matrices of, say, 96 columns, and compiles for 10 s where a number is odd.
    count = values.numel()
    row = nn.functional.pad(values.to(torch.float32).reshape(-1), (0, -count % _BLOCK))
    codes, state = functional.quantize_4bit(row, blocksize=_BLOCK, quant_type="nf4")
    return functional.dequantize_4bit(codes, state).reshape(-1)[:count].view(values.shape)


def _int8(values: Tensor) -> Tensor:
    from bitsandbytes import functional

    # In fp16, as bitsandbytes' layers have their weight quantised.
    codes, scales, _ = functional.int8_vectorwise_quant(values.to(torch.float16).contiguous())
    return functional.int8_vectorwise_dequant(codes, scales)


def _difference(weight: Tensor, base: Tensor) -> Tensor:
    dtype = product_dtype(weight)
    return weight.to(dtype) - base.to(dtype)


def _left(layer: Layer, factors: Factors) -> Tensor:
    """W − s·B·A, fp32."""
    out = torch.empty(layer.weight.shape, dtype=torch.float32, device=layer.weight.device)
    return factors.residual(layer.weight, layer.name, out)
