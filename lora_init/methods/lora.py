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
    source: ClassVar[str] = "arXiv 2106.09685"

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        return [self._start(layer) for layer in layers]

    @staticmethod
    def _start(layer: Layer) -> Factors:
        out_features, in_features = layer.weight.shape
        dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
        # Explicit, because users change torch's default dtype and device.
        A = torch.empty(layer.r, in_features, dtype=torch.float32, device="cpu")
        torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=layer.generator())
        A = A.to(layer.weight.device, dtype)
        return Factors(A, A.new_zeros(out_features, layer.r), layer.scaling)
