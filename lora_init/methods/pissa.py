"""Starts from the singular value decomposition of the weight: PiSSA and MiLoRA."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lora_init.factors import Factors
from lora_init.methods import Layer, Method, Progress, energies, register
from lora_init.options import check_positive
from lora_init.solve import bottom, krylov
from lora_init.solve.krylov import Truncation, truncate


@register
@dataclass(frozen=True)
class Pissa(Method):
    """PiSSA: the r largest singular triplets, √S to each side; the base becomes the residual.

    B = U√(S/s), A = √(S/s)Vᵀ: Meng et al., arXiv 2404.02948, section 3. The triplets come from
    block Krylov iteration in about ten reads of W instead of a full SVD.

    Options:
        tol: the excess of ‖W − s·BA‖² over its minimum, relative to it, that is allowed.
    """

    name: ClassVar[str] = "pissa"
    residual: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2404.02948"

    tol: float = 1e-4

    def __post_init__(self) -> None:
        check_positive("pissa", "tol", self.tol)

    def peak_bytes(self, layer: Layer) -> int:
        return krylov.peak_bytes(layer.weight, layer.r)

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        return split(layers, truncate_layers(layers, self.tol, progress))


@register
@dataclass(frozen=True)
class Milora(Method):
    """MiLoRA: as PiSSA with the r smallest singular triplets; the base becomes the residual.

    Wang et al., arXiv 2406.09044. The last r of W's min(out, in) triplets.
    """

    name: ClassVar[str] = "milora"
    residual: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2406.09044"
    cached: ClassVar[bool] = True

    def peak_bytes(self, layer: Layer) -> int:
        return bottom.peak_bytes(layer.weight)

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        with progress.bar(len(layers), "layer") as bar:
            truncations = bottom.smallest(
                [layer.weight for layer in layers],
                [layer.r for layer in layers],
                lambda _: bar.update(1),
            )
        return split(layers, truncations)


def truncate_layers(
    layers: Sequence[Layer], tol: float | None, progress: Progress
) -> list[Truncation]:
    """Every layer's leading r singular triplets, to `tol` (None: 1e-4); warns if it is missed."""
    with progress.bar(len(layers), "layer") as bar:
        truncations = truncate(
            [layer.weight for layer in layers],
            [layer.r for layer in layers],
            [layer.generator() for layer in layers],
            energies(layers),
            1e-4 if tol is None else tol,
            advance=lambda _: bar.update(1),
        )
    for layer, truncation in zip(layers, truncations, strict=True):
        if not truncation.info["converged"]:
            warnings.warn(
                f"{layer.name}: after {truncation.info['reads']} reads the loss is still an "
                f"estimated {truncation.info['excess']:.1e} above its minimum, relative to it: "
                f"raise tol",
                stacklevel=2,
            )
    return truncations


def split(layers: Sequence[Layer], truncations: Sequence[Truncation]) -> list[Factors]:
    """√(S/s) to each side; signs so that the largest entry of each column of U is positive.

    On a GPU layers of one shape go through it at once: 64 of them one by one took its host 10 ms.
    """
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, x in enumerate(truncations):
        alone = i if x.U.device.type == "cpu" else None
        alike[x.U.shape, x.V.shape, x.U.dtype, x.U.device, alone].append(i)
    found: dict[int, Factors] = {}
    for indices in alike.values():
        members = [truncations[i] for i in indices]
        U, S, V = (torch.stack([getattr(x, name) for x in members]) for name in ("U", "S", "V"))
        largest = U.gather(1, U.abs().argmax(1, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
        scalings = [layers[i].scaling for i in indices]
        root = (S / torch.tensor(scalings, dtype=S.dtype, device=S.device)[:, None]).sqrt()
        signed = sign * root[:, None]
        for i, A, B in zip(indices, (V * signed).mT, U * signed, strict=True):
            # Memory of their own: factors outlive those of other layers.
            A, B = (x.clone(memory_format=torch.contiguous_format) for x in (A, B))
            found[i] = Factors(A, B, layers[i].scaling, truncations[i].info)
    return [found[i] for i in range(len(layers))]
