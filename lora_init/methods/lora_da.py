"""LoRA-DA: a start from the asymptotics of fine-tuning on a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_init.draws import to_weight
from lora_init.factors import Factors, LoraInitError
from lora_init.methods import Layer, Method, Needs, Progress, register
from lora_init.options import check_positive, check_rank, is_count, is_number, require
from lora_init.solve import dense
from lora_init.statistics import (
    Covariance,
    ExampleGradient,
    OutputSquares,
    Statistic,
    collected,
)


@register
@dataclass(frozen=True)
class LoraDa(Method):
    """LoRA-DA: where fine-tuning goes, less where a sample cannot tell; the base stays as it is.

    G is the mean gradient over examples, Z = E[xᵀx] + ε·I and y = E[(∂L/∂out)²] over tokens:
        Δ = −Z⁻¹Gᵀdiag(1/(y + ε)), divided by its largest singular value σ: (in, out)
        Ω = −ΔΔᵀ + β_v·(Σ 1/(y + ε) / (N·σ²))·Z⁻¹: (in, in)
        A = aᵀ/√γ, B = (aᵀΔ)ᵀ/√γ, a the r eigenvectors of Ω with the smallest eigenvalues.
    arXiv 2510.24561 and the authors' code, which takes 256 examples one by one, r = 8, α = 16 and
    rank-stabilised LoRA. σ and a are exact here; their LOBPCG of 10 iterations and power iteration
    leave B·A about 1% off. The start is W + s·B·A, not the pretrained model. The largest entry of
    each column of a is positive.

    Options:
        train_size: N, how many examples the training set has.
        beta_v: β_v, the weight of what a sample cannot tell.
        gamma: γ.
        epsilon: ε of Z.
        damping: ε of y, as a ratio of its median over the outputs; None for 1e-6 itself.
        balanced: give each row of A and its column of B one norm; the product stays (ours).
    """

    name: ClassVar[str] = "lora_da"
    residual: ClassVar[bool] = False
    needs: ClassVar[Needs] = "gradients"
    source: ClassVar[str] = "arXiv 2510.24561"

    train_size: int = 100_000
    beta_v: float = 0.03
    gamma: float = 1024.0
    epsilon: float = 1e-6
    damping: float | None = None
    balanced: bool = False

    def __post_init__(self) -> None:
        require(
            self.name,
            "train_size",
            self.train_size,
            is_count(self.train_size, 1),
            "a whole number > 0",
        )
        require(
            self.name,
            "beta_v",
            self.beta_v,
            is_number(self.beta_v) and self.beta_v >= 0,
            "a number ≥ 0",
        )
        check_positive(self.name, "gamma", self.gamma)
        check_positive(self.name, "epsilon", self.epsilon)
        if self.damping is not None:
            check_positive(self.name, "damping", self.damping)
        require(
            self.name, "balanced", self.balanced, isinstance(self.balanced, bool), "True or False"
        )

    def statistics(self, layer: Layer) -> Sequence[Statistic]:
        why = "and lora_da's directions are of the inputs"
        check_rank(layer.name, layer.r, layer.weight.shape[1], "in", why)
        return [ExampleGradient(), OutputSquares(), Covariance()]

    def peak_bytes(self, layer: Layer) -> int:
        # Of (in, in) Z, its Cholesky factor and inverse, then Ω, ΔΔᵀ and what eigh works in:
        # measured, 95 MB for 1000², 150 for (500, 1500) and 36 for (1500, 500).
        out_features, in_features = layer.weight.shape
        return 8 * (8 * in_features**2 + 4 * in_features * out_features)

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        def one(layer: Layer) -> Factors:
            A, B = self._factors(layer)
            return Factors(to_weight(layer, A), to_weight(layer, B), layer.scaling)

        return progress.map_layers(one, layers, cost=lambda layer: layer.weight.shape[1] ** 2)

    def _factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        out_features, in_features = layer.weight.shape
        G = collected(layer, "gradient", out_features, in_features)
        weights = self._inverse_squares(layer)
        L = self._cholesky(layer)
        delta = torch.cholesky_solve(G.T * -weights, L)
        sigma = torch.linalg.matrix_norm(delta, 2)
        if not sigma > 0:
            raise LoraInitError(
                f"{layer.name}: the gradient of the loss is zero: the loss does not depend on the "
                "layer"
            )
        delta /= sigma
        variance = self.beta_v * weights.sum() / (self.train_size * sigma**2)
        omega = torch.cholesky_inverse(L).mul_(variance).sub_(delta @ delta.T)
        _, vectors = torch.linalg.eigh((omega + omega.T) / 2)
        a = vectors[:, : layer.r]
        a = a * dense.signs(a)
        A, B = (x / math.sqrt(self.gamma) for x in (a.T, delta.T @ a))
        return _balanced(A, B) if self.balanced else (A, B)

    def _inverse_squares(self, layer: Layer) -> Tensor:
        """1/(y + ε) (out,)."""
        y = collected(layer, "output_squares", layer.weight.shape[0])
        epsilon = 1e-6 if self.damping is None else self.damping * float(y.median())
        if not bool((y + epsilon > 0).all()):
            raise LoraInitError(
                f"{layer.name}: more than half of the outputs have no gradient, so that damping by "
                "their median is none: pass damping=None"
            )
        return 1 / (y + epsilon)

    def _cholesky(self, layer: Layer) -> Tensor:
        """L of Z = LLᵀ (in, in)."""
        in_features = layer.weight.shape[1]
        mean = collected(layer, "input_mean", in_features)
        Z = collected(layer, "input_covariance", in_features, in_features)
        Z = torch.addr((Z + Z.T) / 2, mean, mean)
        Z.diagonal().add_(self.epsilon)
        L, failed = torch.linalg.cholesky_ex(Z)
        if failed:
            raise LoraInitError(
                f"{layer.name}: E[xᵀx] + {self.epsilon:g}·I of the inputs is singular to rounding: "
                "use more data, or raise epsilon"
            )
        return L


def _balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with one norm for each row of A and its column of B; where one is zero,
    they stay.
    """
    ratio = torch.linalg.vector_norm(B, dim=0) / torch.linalg.vector_norm(A, dim=1)
    root = torch.where(ratio > 0, ratio, 1).sqrt()
    return A * root[:, None], B / root
