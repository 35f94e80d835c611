"""The starts with B = 0 that PEFT has: the usual one, for comparison, and a Gaussian one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_init.draws import draw_factors, drawn, normal, zeros
from lora_init.factors import Factors
from lora_init.methods import Layer, Method, Progress, register


def kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> object:
    """As `nn.Linear` draws its weight: uniform within 1/√fan_in."""
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


@register
@dataclass(frozen=True)
class Lora(Method):
    """The usual LoRA start: A Kaiming-uniform, B = 0; the base stays as it is.

    As PEFT's `init_lora_weights=True` (Hu et al., arXiv 2106.09685), with draws seeded per layer.
    """

    name: ClassVar[str] = "lora"
    residual: ClassVar[bool] = False
    source: ClassVar[str] = "arXiv 2106.09685"

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        return drawn(layers, kaiming_uniform, zeros)


@register
@dataclass(frozen=True)
class Gaussian(Method):
    """Gaussian: A ~ N(0, 1/r²), B = 0; the base stays as it is.

    As PEFT's `init_lora_weights="gaussian"`, with draws seeded per layer.
    """

    name: ClassVar[str] = "gaussian"
    residual: ClassVar[bool] = False
    source: ClassVar[str] = "arXiv 2106.09685, as in PEFT"

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        return [
            Factors(*draw_factors(layer, normal(1 / layer.r), zeros), layer.scaling)
            for layer in layers
        ]
