"""EVA: directions of the activations, and ranks by how much of their variance these explain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lora_init.draws import to_weight
from lora_init.factors import Factors, LoraInitError
from lora_init.methods import Layer, Method, Needs, Progress, register
from lora_init.options import is_number, require
from lora_init.sketch import bucket
from lora_init.solve import dense
from lora_init.statistics import PrincipalComponents, Statistic, check_finite


@register
@dataclass(frozen=True)
class Eva(Method):
    """EVA: A = principal directions of the inputs, ranks by explained variance; the base stays.

    A layer's directions are those of its inputs around their mean, over tokens whose own label
    counts; B = 0. Of all layers' directions the Σr with the largest explained-variance ratios are
    taken, at most round(ρ·r) of a layer, which may so get none and lose its adapter. α follows, so
    that α/r stays: Paischer et al., arXiv 2410.07170. The directions are exact for the batches that
    are given, where the authors' incremental PCA goes on until they turn by less than a threshold.
    The largest entry of each row of A is positive (choice); equal ratios go to the earlier
    direction, then to the first name.

    Options:
        rho: ρ; 1 leaves the ranks as they are.
    """

    name: ClassVar[str] = "eva"
    residual: ClassVar[bool] = False
    needs: ClassVar[Needs] = "activations"
    source: ClassVar[str] = "arXiv 2410.07170"

    rho: float = 2.0

    def __post_init__(self) -> None:
        require(self.name, "rho", self.rho, is_number(self.rho) and self.rho >= 1, "a number ≥ 1")

    def statistics(self, layer: Layer) -> Sequence[Statistic]:
        return [PrincipalComponents(bucket(self._most(layer)))]

    def _most(self, layer: Layer) -> int:
        return round(self.rho * layer.r)

    def resolve(self, layers: Sequence[Layer]) -> list[dict[str, Any]]:
        candidates = []
        for layer in layers:
            for key in ("variances", "total_variance"):
                check_finite(layer, key, layer.statistics[key])
            total = float(layer.statistics["total_variance"])
            if total <= 0:
                raise LoraInitError(
                    f"{layer.name}: its inputs are the same for every token, so that they have no "
                    "directions: use more data, or leave the layer out of target_modules"
                )
            variances = layer.statistics["variances"].tolist()[: self._most(layer)]
            candidates += [(-v / total, i, layer.name) for i, v in enumerate(variances)]
        budget = sum(layer.r for layer in layers)
        ranks = Counter(name for _, _, name in sorted(candidates)[:budget])
        return [{"r": ranks[layer.name]} for layer in layers]

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        return [self._start(layer) for layer in layers]

    @staticmethod
    def _start(layer: Layer) -> Factors:
        out_features, in_features = layer.weight.shape
        directions = layer.statistics["components"]
        if directions.ndim != 2 or directions.shape[1] != in_features or len(directions) < layer.r:
            raise LoraInitError(
                f"{layer.name}: components must be at least ({layer.r}, {in_features}), got "
                f"{tuple(directions.shape)}: they were collected of another layer"
            )
        check_finite(layer, "components", directions)
        A = to_weight(layer, directions[: layer.r]).clone()
        if layer.r:
            A *= dense.signs(A.T)[:, None]
        return Factors(A, A.new_zeros(out_features, layer.r), layer.scaling)
