"""The truncated SVD by block Krylov against what people have: error over Eckart–Young and time.

    python -m benchmarks.run krylov

Peers: `torch.svd_lowrank` at niter 4 and 16, PEFT's own `get_peft_model` with `pissa`,
`pissa_niter_4` and `pissa_niter_16`, alternating least squares, and our Adam descent with 4,000
steps. "krylov" is `approximate` at a tolerance, "initialize" all of a user's call, checks and
report included. Times are for all matrices of a case together, with their residuals. "krylov is
3×" says that our run of equal or smaller mean error was three times faster, the median of ratios
round by round; exact peers are held against the default, 1e-4.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks import common, data
from benchmarks.bench_descend import targets
from lora_init import approximate, initialize

ROUNDS = 5
TOLERANCES = (2e-3, 1e-3, 6e-4, 3e-4, 1e-4, 1e-5)
# These take seconds to minutes: one round.
SLOW = ("peft pissa", "adam 4000")
Prepare = Callable[[list[Tensor]], Callable[[], list[Tensor]]]
"""From copies of the weights, outside the clock, to the call that is timed: it makes factors and
returns the residuals W − B·A, in the copies' memory if it likes.
"""


def run() -> dict[str, Any]:
    print(
        f"{'case':<14} {'r':>3} {'method':<14} {'ms':>9} {'krylov is':>10} {'mean excess':>12} "
        f"{'worst':>9} {'reads':>6}"
    )
    rows = []
    for name, (load, ranks, adam) in CASES.items():
        try:
            weights = load()
        except data.Unavailable as reason:
            print(f"{name}: skipped, {reason}")
            continue
        for r in ranks:
            rows += _compare(name, weights, r, adam)
    return {"machine": common.machine(), "rows": rows}


def _compare(name: str, weights: list[Tensor], r: int, adam: bool) -> list[dict[str, Any]]:
    minima = [_minimum(weight, r) for weight in weights]
    methods: dict[str, Prepare] = {
        **{f"krylov {tol:.0e}": partial(_ours, r, tol=tol) for tol in TOLERANCES},
        "initialize": partial(_initialize, r),
        "svd_lowrank 4": partial(_svd_lowrank, r, 4),
        "svd_lowrank 16": partial(_svd_lowrank, r, 16),
        "als 16": partial(_als, r, 16),
        "peft niter_4": partial(_peft, r, "pissa_niter_4"),
        "peft niter_16": partial(_peft, r, "pissa_niter_16"),
        "peft pissa": partial(_peft, r, "pissa"),
    }
    if adam:
        methods["adam 4000"] = partial(_ours, r, method="inilora", steps=4000)
    # In turn, so that the machine's drift falls on all of them alike. The first round warms up.
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    excess: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(ROUNDS + 1):
        # Each round in another order: threads of a library go on spinning after its call.
        for method in _rotated(list(methods), turn):
            prepare = methods[method]
            if method in SLOW and turn != 1:
                continue
            call = prepare([weight.clone() for weight in weights])
            began = time.perf_counter()
            residuals = call()
            took = time.perf_counter() - began
            if turn:
                seconds[method].append(took)
                excess[method] += [  # of every round: the peers draw anew in each
                    (float(R.double().square().sum()) - m) / m
                    for R, m in zip(residuals, minima, strict=True)
                ]
    rows = []
    for method in methods:
        row: dict[str, Any] = {
            "case": name,
            "r": r,
            "matrices": len(weights),
            "method": method,
            "ms": statistics.median(seconds[method]) * 1e3,
            "mean_excess": statistics.mean(excess[method]),
            "worst_excess": max(excess[method]),
        }
        if method.startswith("krylov"):
            tol = float(method.partition(" ")[2])
            reads = [f.info["reads"] for f in _factors(weights, r, tol=tol).values()]
            row |= {"mean_reads": statistics.mean(reads), "worst_reads": max(reads)}
        else:
            ours = _equal_or_better(excess, row["mean_excess"])
            pairs = zip(seconds[ours], seconds[method], strict=False)
            row |= {
                "krylov": ours,
                "krylov_faster_by": statistics.median(theirs / own for own, theirs in pairs),
            }
        rows.append(row)
        faster = f"{row['krylov_faster_by']:.1f}×" if "krylov_faster_by" in row else ""
        print(
            f"{name:<14} {r:>3} {method:<14} {row['ms']:>9.1f} {faster:>10} "
            f"{row['mean_excess']:>12.1e} {row['worst_excess']:>9.1e} "
            f"{row.get('mean_reads', float('nan')):>6.1f}"
        )
    return rows


def _rotated(items: list[str], turn: int) -> list[str]:
    first = turn * 3 % len(items)
    return items[first:] + items[:first]


def _equal_or_better(excess: dict[str, list[float]], mean: float) -> str:
    """The loosest of our runs whose mean excess is no larger; the default against exact peers."""
    ours = [f"krylov {tol:.0e}" for tol in TOLERANCES]
    return next((one for one in ours if statistics.mean(excess[one]) <= mean), "krylov 1e-04")


def _factors(weights: list[Tensor], r: int, method: str = "pissa", **options: Any) -> Any:
    named = {str(i): weight for i, weight in enumerate(weights)}
    return approximate(named, r=r, method=method, cache=False, **options)


def _subtracted(weights: list[Tensor], factors: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    pairs = zip(weights, factors, strict=True)
    return [weight.addmm_(B, A, alpha=-1) for weight, (B, A) in pairs]


def _ours(
    r: int, weights: list[Tensor], method: str = "pissa", **options: Any
) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        found = _factors(weights, r, method, **options).values()
        return _subtracted(weights, [(factors.B, factors.A) for factors in found])

    return call


def _svd_lowrank(r: int, niter: int, weights: list[Tensor]) -> Callable[[], list[Tensor]]:
    def one(weight: Tensor) -> tuple[Tensor, Tensor]:
        U, S, V = torch.svd_lowrank(weight, q=r, niter=niter)
        return U * S, V.T

    return lambda: _subtracted(weights, map(one, weights))


def _als(r: int, sweeps: int, weights: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Alternating least squares on ‖W − BA‖², each half a solve of r × r normal equations."""

    def one(weight: Tensor) -> tuple[Tensor, Tensor]:
        B = torch.randn(weight.shape[0], r)
        for _ in range(sweeps):
            A = torch.linalg.solve(B.T @ B, B.T @ weight)
            B = torch.linalg.solve(A @ A.T, A @ weight.T).T
        return B, A

    return lambda: _subtracted(weights, map(one, weights))


class _Model(nn.Module):
    def __init__(self, weights: list[Tensor]):
        super().__init__()
        self.layers = nn.ModuleList()
        for weight in weights:
            with torch.device("meta"):
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.layers.append(layer)


def _peft(r: int, start: bool | str, weights: list[Tensor]) -> Callable[[], list[Tensor]]:
    model = _Model(weights)
    names = [f"layers.{i}" for i in range(len(weights))]
    config = LoraConfig(r=r, lora_alpha=r, target_modules=names, init_lora_weights=start)

    def call() -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, config).base_model.model
        return [layer.base_layer.weight.data for layer in adapted.layers]

    return call


def _initialize(r: int, weights: list[Tensor]) -> Callable[[], list[Tensor]]:
    """All that a user's call does beside solving: checks, digests, report, residuals in fp64."""
    model = _Model(weights)
    names = [f"layers.{i}" for i in range(len(weights))]

    def call() -> list[Tensor]:
        adapted = get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=names))
        initialize(adapted, "pissa")
        return [layer.base_layer.weight.data for layer in adapted.base_model.model.layers]

    return call


def _minimum(weight: Tensor, r: int) -> float:
    return float(torch.linalg.svdvals(weight.double())[r:].square().sum())


def _minilm() -> list[Tensor]:
    return targets(data.minilm(), ("query.weight", "value.weight"))


def _smollm2() -> list[Tensor]:
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
    return targets(data.smollm2(), names)


def _gaussian(n: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, n, generator=generator) for _ in range(count)]


def _decaying() -> list[Tensor]:
    """q and v of two layers, 2048², σᵢ = i^-½ between random orthonormal bases."""
    S = torch.arange(1, 2049) ** -0.5
    return [
        torch.linalg.qr(a)[0] * S @ torch.linalg.qr(b)[0].T
        for a, b in zip(_gaussian(2048, 4), _gaussian(2048, 8)[4:], strict=True)
    ]


# case -> weights, ranks, whether to run Adam's 4,000 steps (seconds to minutes)
CASES: dict[str, tuple[Callable[[], list[Tensor]], tuple[int, ...], bool]] = {
    "minilm_qv": (_minilm, (8, 32), True),
    "smollm2_qkvo": (_smollm2, (8,), False),
    "gaussian_1024": (lambda: _gaussian(1024, 4), (16,), False),
    "gaussian_2048": (lambda: _gaussian(2048, 4), (16,), True),
    "decaying_2048": (_decaying, (16,), False),
}
