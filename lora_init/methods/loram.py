"""LoRAM: fixed sine bases, as large as the weight says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_init.draws import to_weight
from lora_init.factors import Factors, LoraInitError
from lora_init.methods import Layer, Method, Progress, register
from lora_init.parallel import map_layers


@register
@dataclass(frozen=True)
class LoraM(Method):
    """LoRAM: r columns of sine transforms, sized by W's variance; the base becomes the residual.

    Φ_m[i, j] = √(2/(m+1))·sin((i+1)(j+1)π/(m+1)) for j < r, A = βΦ_inᵀ, B = βΦ_out, with
    β⁴ = log_{min(out, in)}(r)·Var(W)/Var(Φ_outΦ_inᵀ): arXiv 2507.06558. Draws nothing.
    """

    name: ClassVar[str] = "loram"
    residual: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2507.06558"

    def resolve(self, layers: Sequence[Layer]) -> list[dict[str, Any]]:
        return [
            {"beta": beta}
            for beta in map_layers(_beta, layers, cost=lambda layer: layer.weight.numel())
        ]

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        factors = []
        for layer, options in zip(layers, resolved, strict=True):
            B, A = (options["beta"] * _sines(m, layer.r) for m in layer.weight.shape)
            A = A.T.contiguous()
            factors.append(Factors(to_weight(layer, A), to_weight(layer, B), layer.scaling))
        return factors


def _beta(layer: Layer) -> float:
    r, smaller = layer.r, min(layer.weight.shape)
    _, deviation = layer.moments
    if r == 1:
        raise LoraInitError(
            f"{layer.name}: loram scales its factors by log(r), which is 0 for r = 1: take r ≥ 2, "
            "or leave the layer out of target_modules"
        )
    if deviation == 0:
        raise LoraInitError(
            f"{layer.name}: every weight is the same, and loram's factors would be 0 as their "
            "variance is: leave the layer out of target_modules, or choose another method"
        )
    # The products' mean and mean square, from r×r sums.
    out, in_ = (_sines(m, r) for m in layer.weight.shape)
    count = layer.weight.numel()
    squares = float(((out.T @ out) * (in_.T @ in_)).sum())
    total = float(out.sum(0) @ in_.sum(0))
    variance = (squares - total**2 / count) / (count - 1)
    return float((math.log(r) / math.log(smaller) * deviation**2 / variance) ** 0.25)


def _sines(m: int, r: int) -> Tensor:
    """Φ_m (m, r), fp64 on the CPU; orthonormal columns."""
    index = torch.arange(1, m + 1, dtype=torch.float64, device="cpu")
    # Reduced by their period as whole numbers: sin of a large multiple of π/(m + 1) loses digits.
    phase = torch.outer(index, index[:r]).remainder_(2 * (m + 1))
    return phase.mul_(math.pi / (m + 1)).sin_().mul_(math.sqrt(2 / (m + 1)))
