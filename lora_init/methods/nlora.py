"""Structured LoRA (three factors B·N·A) as starts of an adapter that has two: NLoRA and SLoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_init.draws import draw_factors, to_weight, zeros
from lora_init.factors import Factors, LoraInitError
from lora_init.methods import Layer, Method, Progress, register
from lora_init.methods.lora import kaiming_uniform
from lora_init.parallel import map_layers
from lora_init.solve.dense import wide


@dataclass(frozen=True)
class _ThreeFactors(Method):
    residual: ClassVar[bool] = False
    source: ClassVar[str] = "arXiv 2502.14482"

    train_n: bool = False

    def __post_init__(self) -> None:
        if self.train_n is not False:
            raise LoraInitError(
                f"{self.name}: train_n={self.train_n!r} asks for a third trainable factor N "
                "between A and B, which a LoRA adapter has no room for: leave train_n=False, and "
                "N is multiplied into one of them at the start"
            )


@register
@dataclass(frozen=True)
class NLora(_ThreeFactors):
    """NLoRA: B·N and A from W's first rows and columns; the base stays, so it starts beside W.

    A = W[:r, :], B = W[:, :r], N = W[:r, :r], and the paper trains y += s·B N A x with all three. A
    LoRA adapter has no N: it is multiplied into B, and what is trained is the product.

    Options:
        train_n: refused where it is true: there is no third factor.
    """

    name: ClassVar[str] = "nlora"

    def resolve(self, layers: Sequence[Layer]) -> list[dict[str, Any]]:
        for layer in layers:
            if layer.r > min(layer.weight.shape):
                raise LoraInitError(
                    f"{layer.name}: nlora takes r = {layer.r} rows and columns of a weight with "
                    f"min(out, in) = {min(layer.weight.shape)}: lower r for this layer "
                    "(rank_pattern)"
                )
        return super().resolve(layers)

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        return map_layers(_of_the_weight, layers)


@register
@dataclass(frozen=True)
class SLora(_ThreeFactors):
    """SLoRA: as NLoRA with A and N Kaiming-uniform and B = 0; the base stays as it is.

    N is multiplied into A here, since B = 0 would swallow it; B's first gradient is then the
    paper's, where N itself is trained too.

    Options:
        train_n: refused where it is true: there is no third factor.
    """

    name: ClassVar[str] = "slora"

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        return map_layers(_random, layers)


def _of_the_weight(layer: Layer) -> Factors:
    W, r = layer.weight, layer.r
    A, N = wide(W[:r]), wide(W[:r, :r])
    return Factors(to_weight(layer, A), to_weight(layer, wide(W[:, :r]) @ N), layer.scaling)


def _random(layer: Layer) -> Factors:
    def N_after_A(tensor: Tensor, generator: torch.Generator) -> None:
        kaiming_uniform(tensor, generator)
        N = torch.empty(layer.r, layer.r, dtype=torch.float32, device="cpu")
        kaiming_uniform(N, generator)
        tensor.copy_(N.double() @ tensor.double())

    return Factors(*draw_factors(layer, N_after_A, zeros), layer.scaling)
