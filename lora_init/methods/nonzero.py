"""Non-zero initialisation: Li et al., "Beyond Zero Initialization", ICML 2025.

1/in is Kaiming's variance and β the size of a start. The draws are Gaussian, and B of a layer that
is not square has A's variance (choices: the text gives variances, for square layers).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lora_init.draws import Draw, draw_factors, normal, zeros
from lora_init.factors import Factors
from lora_init.methods import Layer, Method, Progress, register
from lora_init.options import check_positive


@dataclass(frozen=True)
class _Sized(Method):
    source: ClassVar[str] = "Li et al., ICML 2025"

    beta: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.name, "beta", self.beta)

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        return [
            Factors(*draw_factors(layer, *self._draws(layer)), layer.scaling) for layer in layers
        ]

    @abstractmethod
    def _draws(self, layer: Layer) -> tuple[Draw, Draw]:
        """Of A and of B."""


@register
@dataclass(frozen=True)
class InitA(_Sized):
    """Init[A]: A ~ N(0, β²/in), B = 0; the base stays as it is.

    Options:
        beta: β, 1 for Kaiming's variance.
    """

    name: ClassVar[str] = "init_a"
    residual: ClassVar[bool] = False

    def _draws(self, layer: Layer) -> tuple[Draw, Draw]:
        return _kaiming(layer, self.beta), zeros


@register
@dataclass(frozen=True)
class InitB(_Sized):
    """Init[B]: A = 0, B ~ N(0, β²/r); the base stays as it is.

    Options:
        beta: 1 as published; other sizes are ours.
    """

    name: ClassVar[str] = "init_b"
    residual: ClassVar[bool] = False

    def _draws(self, layer: Layer) -> tuple[Draw, Draw]:
        return zeros, normal(self.beta / math.sqrt(layer.r))


@register
@dataclass(frozen=True)
class InitAB(_Sized):
    """Init[AB]: A, B ~ N(0, β²/in); the base becomes the residual.

    Options:
        beta: β; with r = α = 16, 1 to 16 was studied on T5-Base and 0.25 to 4 on Llama 3-8B.
    """

    name: ClassVar[str] = "init_ab"
    residual: ClassVar[bool] = True

    def _draws(self, layer: Layer) -> tuple[Draw, Draw]:
        both = _kaiming(layer, self.beta)
        return both, both


@register
@dataclass(frozen=True)
class InitABPlus(InitAB):
    """Init[AB+]: the factors of Init[AB] on the base as it is, so it starts beside W by s·B·A.

    As accurate as Init[AB] for moderate β, and collapses for a large one (β ≥ 8 on T5, there).

    Options:
        beta: as for Init[AB].
    """

    name: ClassVar[str] = "init_ab_plus"
    residual: ClassVar[bool] = False


def _kaiming(layer: Layer, beta: float) -> Draw:
    return normal(beta / math.sqrt(layer.weight.shape[1]))
