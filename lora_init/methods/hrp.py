"""HRP: a start from the first steps of a LoRA of higher rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_init.draws import draw_factors, to_weight, zeros
from lora_init.factors import Factors, LoraInitError
from lora_init.methods import Layer, Method, Needs, Progress, register
from lora_init.methods.lora import kaiming_uniform
from lora_init.ops.dual_project import product_dtype
from lora_init.options import check_rank, is_count, require
from lora_init.parallel import single_threaded
from lora_init.solve import dense
from lora_init.statistics import State, Statistic, collected


@dataclass(frozen=True)
class TrainedProduct(Statistic):
    """The singular values and right singular vectors of B·A (out, in) of a LoRA of rank `rank` that
    was trained, min(rank, out, in) of them. Its start is the usual one.
    """

    name: ClassVar[str] = "trained_product"
    # (k,) largest first, and (in, k).
    keys: ClassVar[tuple[str, ...]] = ("trained_S", "trained_V")
    trained: ClassVar[bool] = True

    rank: int

    def state_bytes(self, layer: Layer) -> int:
        return product_dtype(layer.weight).itemsize * self.rank * sum(layer.weight.shape)

    def start(self, layer: Layer) -> State:
        A, B = draw_factors(layer.changed(r=self.rank), kaiming_uniform, zeros)
        return {"A": A, "B": B}

    def finish(self, layer: Layer, state: State, losses: int) -> Mapping[str, Tensor]:
        A, B = state["A"], state["B"]
        with single_threaded():  # the bits of a factorisation depend on the threads
            right, upper = torch.linalg.qr(A.to(torch.float64).T)
            lower = torch.linalg.qr(B.to(torch.float64), mode="r")[1]
            _, S, V = dense.svd(lower @ upper.T)
        return {"trained_S": S.to(A.dtype), "trained_V": (right @ V).to(A.dtype).contiguous()}


@register
@dataclass(frozen=True)
class Hrp(Method):
    """HRP: A = the leading directions of a LoRA of higher rank after a few steps; the base stays.

    `Calibration.train_step` trains a temporary LoRA of rank R with s = 1 on all layers together,
    one step for each batch; of its product, U·S·Vᵀ, A = V_rᵀ, and B = 0. R, the steps and B = 0 are
    choices: we found none of them in arXiv 2502.07739. The largest entry of each row of A is
    positive.

    Options:
        higher: R, as a multiple of a layer's r.
    """

    name: ClassVar[str] = "hrp"
    residual: ClassVar[bool] = False
    needs: ClassVar[Needs] = "training"
    source: ClassVar[str] = "arXiv 2502.07739"

    higher: int = 4

    def __post_init__(self) -> None:
        require(self.name, "higher", self.higher, is_count(self.higher, 1), "a whole number ≥ 1")

    def statistics(self, layer: Layer) -> Sequence[Statistic]:
        most, why = min(layer.weight.shape), "beyond which a product has no directions"
        check_rank(layer.name, layer.r, most, "min(out, in)", why)
        return [TrainedProduct(self.higher * layer.r)]

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        return [self._start(layer) for layer in layers]

    def _start(self, layer: Layer) -> Factors:
        out_features, in_features = layer.weight.shape
        width = min(self.higher * layer.r, out_features, in_features)
        S = collected(layer, "trained_S", width)
        V = collected(layer, "trained_V", in_features, width)[:, : layer.r]
        rank = int((torch.finfo(layer.statistics["trained_S"].dtype).eps * S[0] < S).sum())
        if rank < layer.r:
            raise LoraInitError(
                f"{layer.name}: the temporary LoRA has rank {rank} after its training, and r is "
                f"{layer.r}: "
                + ("train it on more batches" if rank else "train_step did not change it")
            )
        A = to_weight(layer, (V * dense.signs(V)).T).contiguous()
        return Factors(A, A.new_zeros(out_features, layer.r), layer.scaling)
