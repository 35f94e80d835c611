"""The usual zero start, for comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lora_init.factors import Factors
from lora_init.methods import Layer, Method, Progress, register


@register
@dataclass(frozen=True)
class Lora(Method):
    """The usual LoRA start: A Kaiming-uniform, B = 0; the base stays as it is.

    As PEFT's `init_lora_weights=True` (Hu et al., arXiv 2106.09685), with draws seeded per layer.
    """

    name: ClassVar[str] = "lora"
    residual: ClassVar[bool] = False

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        return [self._start(layer) for layer in layers]

    @staticmethod
    def _start(layer: Layer) -> Factors:
        out_features, in_features = layer.weight.shape
        A = torch.empty(layer.r, in_features)
        torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=layer.generator())
        device = layer.weight.device
        return Factors(
            A.to(device), torch.zeros(out_features, layer.r, device=device), layer.scaling
        )
