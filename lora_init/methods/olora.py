"""OLoRA: a start from the QR decomposition of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_init.draws import to_weight
from lora_init.factors import Factors
from lora_init.methods import Layer, Method, Progress, register
from lora_init.ops.dual_project import dual_project
from lora_init.parallel import map_layers
from lora_init.solve.dense import wide


@register
@dataclass(frozen=True)
class OLora(Method):
    """OLoRA: W = QR, B = the first r columns of Q, A = BᵀW; the base becomes the residual.

    Büyükakyüz, arXiv 2406.01775; A is the first r rows of the triangle. Its diagonal is made ≥ 0,
    which fixes all signs (LAPACK, and so PEFT, leaves them as they come; B·A is the same). The
    first r columns of W have those of Q: one read of W instead of a QR of it.
    """

    name: ClassVar[str] = "olora"
    residual: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2406.01775"

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        decomposed = map_layers(_leading, layers)
        Qs = [to_weight(layer, Q) for layer, (Q, _) in zip(layers, decomposed, strict=True)]
        weights = [layer.weight for layer in layers]
        nothing = [weight.new_empty(0, weight.shape[1]) for weight in weights]
        factors = []
        for layer, Q, (_, triangle), (_, A) in zip(
            layers, Qs, decomposed, dual_project(weights, nothing, Qs), strict=True
        ):
            A[:, : layer.r] = to_weight(layer, triangle)
            factors.append(Factors(A, Q, layer.scaling))
        return factors


def _leading(layer: Layer) -> tuple[Tensor, Tensor]:
    """Q (out, r) and R (r, r) of the first r columns, fp64 on the CPU."""
    Q, R = torch.linalg.qr(wide(layer.weight[:, : layer.r]))
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R.dtype)
    return Q * sign, sign[:, None] * R
