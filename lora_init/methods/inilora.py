"""IniLoRA and its two variants: arXiv 2510.03731, and the authors' code where it is silent."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lora_init.draws import Draw, draw_factors, drawn, normal
from lora_init.factors import Factors, LoraInitError
from lora_init.methods import Layer, Method, Progress, register
from lora_init.methods.pissa import truncate_layers
from lora_init.ops.descend import Optimizer
from lora_init.options import check_choice, check_positive, is_count, is_number, require
from lora_init.parallel import map_layers
from lora_init.solve import krylov
from lora_init.solve.descent import Stopping, descent, descent_bytes
from lora_init.solve.krylov import Truncation

# The starts that the authors compare (their ablation); "per_type" and "global" are normal draws
# whose mean and σ come from the weights.
_STARTS: dict[str, Draw] = {
    "uniform": lambda t, g: nn.init.uniform_(t, -0.1, 0.1, generator=g),
    "normal": lambda t, g: nn.init.normal_(t, std=0.01, generator=g),
    "constant": lambda t, g: nn.init.constant_(t, 0.001),
    "sparse": lambda t, g: _sparse(t, g),
    "orthogonal": lambda t, g: nn.init.orthogonal_(t, generator=g),
    "xavier_uniform": lambda t, g: nn.init.xavier_uniform_(t, generator=g),
    "xavier_normal": lambda t, g: nn.init.xavier_normal_(t, generator=g),
    "kaiming_uniform": lambda t, g: nn.init.kaiming_uniform_(t, generator=g),
    "kaiming_normal": lambda t, g: nn.init.kaiming_normal_(t, generator=g),
}
_FROM_WEIGHTS = ("per_type", "global")


@register
@dataclass(frozen=True)
class IniLora(Method):
    """IniLoRA: B·A descended to the weight by Adam; the base becomes the residual.

    Each mean((W − B·A)²) is minimised from a random start, then both factors are divided by √s so
    that s·B·A ≈ W for any scaling s (the authors ran s = 1; ours). arXiv 2510.03731, section 3.

    Options:
        steps: 4,000 by default, where the paper's loss levels off; 20,000 as published; 0 keeps the
            start.
        lr: of the first 4,999 steps; after that × gamma every `step_size` steps.
        init: "per_type" (the code: σ = mean of W.std() over the layers of one module type, rounded
            to three decimals unless that gives 0), "global" (the paper: N(μ, σ²) over all layers),
            or one of the ablation's starts: uniform, normal, constant, sparse, orthogonal,
            xavier_uniform, xavier_normal, kaiming_uniform, kaiming_normal.
        solver: "adam" (what was run), "gd" (plain gradient descent, the paper's equation 3), or
            "krylov" (ours): the minimum itself, in about ten reads of W, in the balanced gauge
            B = U√S·Q, A = Qᵀ√S·Vᵀ nearest to the same random start; of the options, `init` and
            `tol` apply to it.
        betas, eps, step_size, gamma: of Adam and StepLR, as published.
        tol, window: stop a layer early when its true loss improved by less than `tol` of itself
            over `window` steps; None never stops early. For krylov, `tol` is the excess over the
            minimum, relative to it, that is allowed (None: 1e-4).
    """

    name: ClassVar[str] = "inilora"
    residual: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2510.03731"
    cached: ClassVar[bool] = True

    steps: int = 4000
    lr: float = 5e-4
    init: str = "per_type"
    solver: Literal["adam", "gd", "krylov"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    step_size: int = 5000
    gamma: float = 0.9
    tol: float | None = None
    window: int = 200

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", _tupled(self.betas))
        check_choice("inilora", "init", self.init, [*_FROM_WEIGHTS, *_STARTS])
        check_choice("inilora", "solver", self.solver, ["adam", "gd", "krylov"])
        for field, ok, what in (
            ("steps", is_count(self.steps, 0), "a whole number ≥ 0"),
            ("lr", is_number(self.lr) and self.lr > 0, "a number > 0"),
            (
                "betas",
                isinstance(self.betas, tuple)
                and len(self.betas) == 2
                and all(is_number(b) and 0 <= b < 1 for b in self.betas),
                "two numbers in [0, 1)",
            ),
            ("eps", is_number(self.eps) and self.eps >= 0, "a number ≥ 0"),
            ("step_size", is_count(self.step_size, 1), "a whole number > 0"),
            ("gamma", is_number(self.gamma) and self.gamma > 0, "a number > 0"),
            (
                "tol",
                self.tol is None or (is_number(self.tol) and self.tol > 0),
                "None or a number > 0",
            ),
            ("window", is_count(self.window, 1), "a whole number > 0"),
        ):
            require("inilora", field, getattr(self, field), ok, what)

    def resolve(self, layers: Sequence[Layer]) -> list[dict[str, Any]]:
        if self.init not in _FROM_WEIGHTS:
            return [{} for _ in layers]
        moments = map_layers(
            lambda layer: layer.moments, layers, cost=lambda layer: layer.weight.numel()
        )
        groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
        keys = [layer.module_type if self.init == "per_type" else "all" for layer in layers]
        for key, moment in zip(keys, moments, strict=True):
            groups[key].append(moment)
        resolved = {}
        for key, members in groups.items():
            mean, sigma = (
                math.fsum(column) / len(members) for column in zip(*members, strict=True)
            )
            if sigma == 0:
                raise LoraInitError(
                    f"inilora: every {key} weight is constant, so init={self.init!r} would start "
                    "at A = B = 0 and "
                    f"never move: leave these modules out, or pass init='normal'"
                )
            if self.init == "per_type":
                resolved[key] = {"mean": 0.0, "sigma": round(sigma, 3) or sigma}
            else:
                resolved[key] = {"mean": mean, "sigma": sigma}
        return [resolved[key] for key in keys]

    def peak_bytes(self, layer: Layer) -> int:
        if self.solver == "krylov":
            return krylov.peak_bytes(layer.weight, layer.r)
        return descent_bytes(layer.weight, layer.r)

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        starts = [
            draw_factors(layer, self._start(options))
            for layer, options in zip(layers, resolved, strict=True)
        ]
        if self.solver == "krylov":
            return self._minimum(layers, starts, progress)
        optimizer = Optimizer(
            self.solver, self.lr, self.betas, self.eps, self.step_size, self.gamma
        )
        with progress.bar(self.steps, "step") as bar:

            def advance(steps: int, loss: float) -> None:
                bar.set_postfix_str(f"loss {loss:.3e}", refresh=False)
                bar.update(steps)

            solved = descent(
                [layer.weight for layer in layers],
                [A for A, _ in starts],
                [B for _, B in starts],
                optimizer,
                self.steps,
                Stopping(self.tol, self.window) if self.tol is not None else None,
                advance,
            )
        return [
            _scaled(factors, layer.scaling) for factors, layer in zip(solved, layers, strict=True)
        ]

    def _minimum(
        self, layers: Sequence[Layer], starts: Sequence[tuple[Tensor, Tensor]], progress: Progress
    ) -> list[Factors]:
        truncations = truncate_layers(layers, self.tol, progress)
        return map_layers(
            lambda item: _gauged(item[0].scaling, item[1], *item[2]),
            list(zip(layers, truncations, starts, strict=True)),
        )

    def _start(self, options: dict[str, Any]) -> Draw:
        if self.init in _FROM_WEIGHTS:
            return lambda t, g: nn.init.normal_(t, options["mean"], options["sigma"], generator=g)
        return _STARTS[self.init]


@register
@dataclass(frozen=True)
class IniLoraAlpha(Method):
    """IniLoRA-α: A, B ~ N(0, σ²) with σ = 0.5, no descent; the base becomes the residual.

    R then has entries ~0.7 where W had ~0.02: a 16-bit base loses several per cent of W (the
    self-check says how much), so keep the base in fp32. arXiv 2510.03731; σ swept from 1e-4 to 1.5
    there, best at 0.5.
    """

    name: ClassVar[str] = "inilora_alpha"
    residual: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2510.03731"

    sigma: float = 0.5

    def __post_init__(self) -> None:
        check_positive("inilora_alpha", "sigma", self.sigma)

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        return drawn(layers, normal(self.sigma))


@register
@dataclass(frozen=True)
class IniLoraBeta(Method):
    """IniLoRA-β: A, B Kaiming-normal (or uniform), no descent; the base becomes the residual.

    std(A) = √(2/in) and std(B) = √(2/r), or uniform within √(6/fan_in). arXiv 2510.03731.
    """

    name: ClassVar[str] = "inilora_beta"
    residual: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2510.03731"

    distribution: Literal["normal", "uniform"] = "normal"

    def __post_init__(self) -> None:
        check_choice("inilora_beta", "distribution", self.distribution, ["normal", "uniform"])

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        return drawn(layers, _STARTS[f"kaiming_{self.distribution}"])


def _sparse(tensor: Tensor, generator: torch.Generator) -> None:
    """`nn.init.sparse_(tensor, 0.5, std=0.5)`, which draws its zeros from the global generator."""
    nn.init.normal_(tensor, std=0.5, generator=generator)
    scores = torch.empty_like(tensor).uniform_(generator=generator)
    order = scores.argsort(dim=0, stable=True)
    tensor.scatter_(0, order[: math.ceil(0.5 * tensor.shape[0])], 0.0)


def _gauged(scaling: float, truncation: Truncation, A0: Tensor, B0: Tensor) -> Factors:
    """The balanced minimiser B = U√S·Q, A = Qᵀ√S·Vᵀ whose Q follows the random start.

    Q is the Gram–Schmidt of the rows of M = UᵀB₀ + VᵀA₀ᵀ, largest σ first: of the choices compared,
    the nearest to where Adam ends up from that start. A rotation, so flipping a pair of singular
    vectors changes nothing.
    """
    U, S, V = truncation.U.double(), truncation.S.double(), truncation.V.double()
    M = U.T @ B0.double() + V.T @ A0.T.double()
    rotation, triangle = torch.linalg.qr(M.T)
    Q = (rotation * torch.where(triangle.diagonal() < 0, -1.0, 1.0)).T
    root = (S / scaling).sqrt()
    dtype = truncation.U.dtype
    A, B = Q.T @ (root[:, None] * V.T), (U * root) @ Q
    return Factors(A.to(dtype), B.to(dtype), scaling, truncation.info)


def _scaled(factors: Factors, scaling: float) -> Factors:
    root = math.sqrt(scaling)
    return dataclasses.replace(factors, A=factors.A / root, B=factors.B / root, scaling=scaling)


def _tupled(value: object) -> object:
    """A list, as JSON has it, as a tuple."""
    return tuple(value) if isinstance(value, list) else value
