"""A start of two non-zero factors whose product is zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lora_init.draws import to_weight
from lora_init.factors import Factors, LoraInitError
from lora_init.methods import Layer, Method, Progress, register
from lora_init.parallel import map_layers


@register
@dataclass(frozen=True)
class Orthogonal(Method):
    """Orthogonal: A and B random in orthogonal halves of the rank, so B·A = 0; the base stays.

    As PEFT's `init_lora_weights="orthogonal"`: with Q the orthonormal factor of an r×r Gaussian,
    Q₀ its even and Q₁ its odd rows (counted from 0), A = Q₀ᵀG/10 and B = HQ₁/10, G (r/2, in) and
    H (out, r/2) standard Gaussian. B·A is 0 to the factors' rounding. r must be even.
    """

    name: ClassVar[str] = "orthogonal"
    residual: ClassVar[bool] = False
    source: ClassVar[str] = "datta0.github.io, as in PEFT"

    def resolve(self, layers: Sequence[Layer]) -> list[dict[str, Any]]:
        for layer in layers:
            if layer.r % 2:
                raise LoraInitError(
                    f"{layer.name}: orthogonal gives half of the rank to A and half to B, and "
                    f"r = {layer.r} is odd: take an even r"
                )
        return super().resolve(layers)

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        return map_layers(_start, layers)


def _start(layer: Layer) -> Factors:
    out_features, in_features = layer.weight.shape
    generator = layer.generator()

    def gaussian(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
        return drawn.normal_(generator=generator).double()

    Q, _ = torch.linalg.qr(gaussian(layer.r, layer.r))
    A = Q[0::2].T @ gaussian(layer.r // 2, in_features) / 10
    B = gaussian(out_features, layer.r // 2) @ Q[1::2] / 10
    return Factors(to_weight(layer, A), to_weight(layer, B), layer.scaling)
