"""Starts from the singular vectors of the loss' gradient: LoRA-GA, LoRA-One and LoRA-SB."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_init.draws import to_weight
from lora_init.factors import Factors, LoraInitError
from lora_init.methods import Layer, Method, Needs, Progress, register
from lora_init.options import check_positive, check_rank, is_count, require
from lora_init.sketch import GradientSketch, bucket
from lora_init.solve import dense
from lora_init.statistics import Gradient, Statistic, collected

# Singular values this much smaller than the largest, in roundings, are those of a matrix of less
# rank: its sums are rounded.
_NOISE = 8.0


@dataclass(frozen=True)
class _FromGradient(Method):
    """What works on layers one by one, from their gradients."""

    needs: ClassVar[Needs] = "gradients"

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        def one(layer: Layer) -> Factors:
            A, B = self._factors(layer)
            return Factors(to_weight(layer, A), to_weight(layer, B), layer.scaling)

        return progress.map_layers(one, layers, cost=lambda layer: layer.weight.numel())

    @abstractmethod
    def _factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of one layer."""


@dataclass(frozen=True)
class _FromSingularVectors(_FromGradient):
    exact_gradient: bool = False
    passes: int = 2
    gamma: float = 16.0

    def __post_init__(self) -> None:
        require(
            self.name,
            "exact_gradient",
            self.exact_gradient,
            isinstance(self.exact_gradient, bool),
            "True or False",
        )
        require(self.name, "passes", self.passes, is_count(self.passes, 1), "a whole number ≥ 1")
        check_positive(self.name, "gamma", self.gamma)

    @abstractmethod
    def _needed(self, r: int) -> int:
        """How many singular triplets rank r takes."""

    def statistics(self, layer: Layer) -> Sequence[Statistic]:
        needed, most = self._needed(layer.r), min(layer.weight.shape)
        if needed > most:
            raise LoraInitError(
                f"{layer.name}: {self.name} takes {needed} singular vectors of the gradient for "
                f"r = {layer.r}, and min(out, in) is {most}: lower r for this layer (rank_pattern)"
            )
        if self.exact_gradient:
            return [Gradient()]
        return [GradientSketch(bucket(needed), self.passes)]

    def peak_bytes(self, layer: Layer) -> int:
        if self.exact_gradient:
            return dense.svd_bytes(layer.weight)
        return 8 * bucket(self._needed(layer.r)) * sum(layer.weight.shape)

    def _triplets(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, k), S (k,) and V (in, k), fp64, of the k triplets that are needed.

        Raises:
            LoraInitError: the gradient has less than k.
        """
        out_features, in_features = layer.weight.shape
        needed = self._needed(layer.r)
        if self.exact_gradient:
            stored = layer.statistics["gradient"].dtype
            U, S, V = dense.svd(collected(layer, "gradient", out_features, in_features))
        else:
            stored = layer.statistics["gradient_S"].dtype
            width = min(bucket(needed), out_features, in_features)
            U = collected(layer, "gradient_U", out_features, width)
            S = collected(layer, "gradient_S", width)
            V = collected(layer, "gradient_V", in_features, width)
        rank = int((_NOISE * torch.finfo(stored).eps * S[0] < S).sum())
        if rank < needed:
            raise LoraInitError(
                f"{layer.name}: the gradient of the loss has rank {rank}, and {self.name} takes "
                f"{needed} of its singular vectors for r = {layer.r}: "
                + ("lower r, or use more data" if rank else "the loss does not depend on the layer")
            )
        return U[:, :needed], S[:needed], V[:, :needed]


@register
@dataclass(frozen=True)
class LoraGa(_FromSingularVectors):
    """LoRA-GA: singular vectors 1 … r and r+1 … 2r of the gradient; the base becomes the residual.

    G = USVᵀ, A = c·V[:, :r]ᵀ, B = c·U[:, r:2r], c = out^¼/√γ: Wang, Yu & Li, arXiv 2407.05000, who
    take 64 batches of 2. The largest entry of every singular vector is positive (choice).

    Options:
        gamma: γ.
        exact_gradient: form G (out, in) of every layer, and factorise it whole, instead of two
            narrow products of it.
        passes: over the data for these products; more are nearer to G's own singular vectors.
    """

    name: ClassVar[str] = "lora_ga"
    residual: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2407.05000"

    def _needed(self, r: int) -> int:
        return 2 * r

    def _factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        U, _, V = self._triplets(layer)
        c = layer.weight.shape[0] ** 0.25 / math.sqrt(self.gamma)
        right, left = V[:, : layer.r], U[:, layer.r :]
        return (right * (c * dense.signs(right))).T, left * (c * dense.signs(left))


@register
@dataclass(frozen=True)
class LoraOne(_FromSingularVectors):
    """LoRA-One: the gradient's leading r triplets, a step downhill; the base stays as it is.

    −G = USVᵀ, B = U_r√(S_r/S₁)/√γ, A = √(S_r/S₁)V_rᵀ/√γ: Zhang, Liu & Chen, arXiv 2502.01235, whose
    code takes 8 samples and rank-stabilised LoRA. The start is W + s·B·A, not the pretrained model.
    The largest entry of each column of B is positive (choice).

    Options:
        gamma: γ.
        exact_gradient: form G (out, in) of every layer, and factorise it whole, instead of two
            narrow products of it.
        passes: over the data for these products; more are nearer to G's own singular vectors.
    """

    name: ClassVar[str] = "lora_one"
    residual: ClassVar[bool] = False
    source: ClassVar[str] = "arXiv 2502.01235"

    gamma: float = 128.0

    def _needed(self, r: int) -> int:
        return r

    def _factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        U, S, V = self._triplets(layer)
        size = dense.signs(U) * (S / (S[0] * self.gamma)).sqrt()
        return (V * -size).T, U * size


@register
@dataclass(frozen=True)
class LoraSb(_FromGradient):
    """LoRA-SB: the best rank r of a first step by the gradient's sign; the base stays as it is.

    ΔW = −η·sign(G) = USVᵀ to rank r, exactly (the authors' `svd_lowrank` in bf16 is 40% off on sign
    matrices), η = lr/(warmup_ratio·total_steps): Ponkshe et al., arXiv 2411.19557. There B = U and
    A = Vᵀ stay fixed and the core R = diag(S) between them trains, with s = 1. A plain adapter has
    no core: here it is folded into B, and A and B train; both are divided by √s, so that s·B·A is
    ΔW for any scaling. The start is W + ΔW, not the pretrained model. The largest entry of each
    column of B is positive (choice).

    Options:
        lr, warmup_ratio, total_steps: of the training run that follows; they set ΔW's size, η, and
            nothing else. The defaults are a choice.
    """

    name: ClassVar[str] = "lora_sb"
    residual: ClassVar[bool] = False
    source: ClassVar[str] = "arXiv 2411.19557"

    lr: float = 1e-4
    warmup_ratio: float = 0.02
    total_steps: int = 1000

    def __post_init__(self) -> None:
        check_positive(self.name, "lr", self.lr)
        check_positive(self.name, "warmup_ratio", self.warmup_ratio)
        check_positive(self.name, "total_steps", self.total_steps)

    def statistics(self, layer: Layer) -> Sequence[Statistic]:
        most, why = min(layer.weight.shape), "beyond which there is nothing to start from"
        check_rank(layer.name, layer.r, most, "min(out, in)", why)
        return [Gradient()]

    def peak_bytes(self, layer: Layer) -> int:
        return dense.svd_bytes(layer.weight)

    def _factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        sign = collected(layer, "gradient", *layer.weight.shape).sign()
        if not bool(sign.any()):
            raise LoraInitError(
                f"{layer.name}: the gradient of the loss is zero: the loss does not depend on the "
                "layer"
            )
        U, S, V = (x[..., : layer.r] for x in dense.svd(sign))
        step = self.lr / (self.warmup_ratio * self.total_steps)
        root, sign = math.sqrt(layer.scaling), dense.signs(U)
        return (V * (-sign / root)).T, U * (sign * S * step / root)
