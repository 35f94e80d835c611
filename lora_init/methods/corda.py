"""CorDA: the singular vectors of a weight as its inputs see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lora_init.draws import to_weight
from lora_init.factors import Factors, LoraInitError
from lora_init.methods import Layer, Method, Needs, Progress, register
from lora_init.options import check_choice
from lora_init.solve import dense
from lora_init.statistics import ScaledSquares, Statistic, collected

# Of ‖C·C⁻¹ − I‖_F, at which the authors double the damping.
_INVERSE_ERROR = 0.05


@register
@dataclass(frozen=True)
class Corda(Method):
    """CorDA: singular triplets of W·C, C the inputs' covariance; the base becomes the residual.

    C is the mean over examples of X̃ᵀX̃, X̃ = X/|max X| over tokens, plus 0.01·mean(diag C)·I, the
    factor doubled until ‖C·C⁻¹ − I‖_F < 0.05. SVD(W·C) = USVᵀ, and of r triplets B = U√(S/s),
    A = √(S/s)VᵀC⁻¹: Yang et al., arXiv 2406.05223, who take 256 sequences of 2,048 tokens. All is
    in fp64 here; padding does not count. Each column of B has its largest entry positive (choice).

    Options:
        mode: "ipm", instruction-previewed, the r largest triplets: what the data uses most is
            trained; or "kpm", knowledge-preserved, the r smallest: it is kept.
    """

    name: ClassVar[str] = "corda"
    residual: ClassVar[bool] = True
    needs: ClassVar[Needs] = "activations"
    source: ClassVar[str] = "arXiv 2406.05223"
    cached: ClassVar[bool] = True

    mode: Literal["ipm", "kpm"] = "ipm"

    def __post_init__(self) -> None:
        check_choice(self.name, "mode", self.mode, ["ipm", "kpm"])

    def statistics(self, layer: Layer) -> Sequence[Statistic]:
        return [ScaledSquares()]

    def peak_bytes(self, layer: Layer) -> int:
        # W and W·C, and of (in, in) C, its damped copy and inverse, and their product.
        return dense.svd_bytes(layer.weight) + 8 * (
            2 * layer.weight.numel() + 5 * layer.weight.shape[1] ** 2
        )

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        return progress.map_layers(self._factors, layers, cost=lambda layer: layer.weight.numel())

    def _factors(self, layer: Layer) -> Factors:
        C, inverse, damping = _damped(layer)
        U, S, V = dense.svd(dense.wide(layer.weight, layer.weight.device) @ C)
        part = slice(layer.r) if self.mode == "ipm" else slice(len(S) - layer.r, None)
        U, S, V = U[:, part], S[part], V[:, part]
        size = dense.signs(U) * (S / layer.scaling).sqrt()
        A, B = (V * size).T @ inverse, U * size
        return Factors(
            to_weight(layer, A), to_weight(layer, B), layer.scaling, {"damping": damping}
        )


def _damped(layer: Layer) -> tuple[Tensor, Tensor, float]:
    """C (in, in) as it is inverted, its inverse, and the damping that this took."""
    in_features = layer.weight.shape[1]
    plain = collected(layer, "scaled_squares", in_features, in_features)
    mean = plain.diagonal().mean()
    if not mean > 0:
        raise LoraInitError(
            f"{layer.name}: its inputs are zero for every token: leave the layer out of "
            "target_modules"
        )
    eye = torch.eye(in_features, dtype=plain.dtype, device=plain.device)
    damping = 0.01
    while True:
        C = plain + damping * mean * eye
        inverse, _ = torch.linalg.inv_ex(C)
        if torch.dist(C @ inverse, eye) < _INVERSE_ERROR:  # not if it is NaN
            return C, inverse, damping
        damping *= 2
