"""The truncated SVD by block Krylov against what people have: error over Eckart–Young and time.

    python -m benchmarks.run krylov

Peers: `torch.svd_lowrank` at niter 4 and 16, PEFT's own `pissa`, `pissa_niter_4` and
`pissa_niter_16` (the calls that `get_peft_model` makes, on the same weights, residual included),
alternating least squares, and our Adam descent with 4,000 steps. Times are for all matrices of a
case together. "krylov is 3×" says that our run of equal or smaller mean error was three times
faster, the median of ratios round by round; exact peers are held against the default, 1e-4.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks import common, data
from benchmarks.bench_descend import targets
from lora_init import approximate

ROUNDS = 5
TOLERANCES = (1e-3, 7e-4, 4e-4, 1e-4, 1e-5)
# These take seconds to minutes: one round.
SLOW = ("peft pissa", "adam 4000")
Result = list[Tensor]
"""s·B·A per matrix."""


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
    calls: dict[str, Callable[[], Result]] = {
        **{f"krylov {tol:.0e}": partial(_ours, weights, r, tol=tol) for tol in TOLERANCES},
        "svd_lowrank 4": lambda: _svd_lowrank(weights, r, 4),
        "svd_lowrank 16": lambda: _svd_lowrank(weights, r, 16),
        "als 16": lambda: _als(weights, r, 16),
        "peft niter_4": lambda: _peft(weights, r, "pissa_niter_4"),
        "peft niter_16": lambda: _peft(weights, r, "pissa_niter_16"),
        "peft pissa": lambda: _peft(weights, r, "pissa"),
    }
    if adam:
        calls["adam 4000"] = lambda: _ours(weights, r, "inilora", steps=4000)
    # In turn, so that the machine's drift falls on all of them alike. The first round warms up.
    seconds: dict[str, list[float]] = {method: [] for method in calls}
    excess: dict[str, list[float]] = {method: [] for method in calls}
    for turn in range(ROUNDS + 1):
        for method, call in calls.items():
            if method in SLOW and turn != 1:
                continue
            began = time.perf_counter()
            products = call()
            took = time.perf_counter() - began
            if turn:
                seconds[method].append(took)
                excess[method] += [  # of every round: the peers draw anew in each
                    (float((w.double() - p.double()).square().sum()) - m) / m
                    for w, p, m in zip(weights, products, minima, strict=True)
                ]
    rows = []
    for method in calls:
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


def _equal_or_better(excess: dict[str, list[float]], mean: float) -> str:
    """The loosest of our runs whose mean excess is no larger; the default against exact peers."""
    ours = [f"krylov {tol:.0e}" for tol in TOLERANCES]
    return next((one for one in ours if statistics.mean(excess[one]) <= mean), "krylov 1e-04")


def _factors(weights: list[Tensor], r: int, method: str = "pissa", **options: Any) -> Any:
    named = {str(i): weight for i, weight in enumerate(weights)}
    return approximate(named, r=r, method=method, cache=False, **options)


def _ours(weights: list[Tensor], r: int, method: str = "pissa", **options: Any) -> Result:
    """Factors, and the residual too: PEFT's calls make it."""
    products = []
    for weight, factors in zip(
        weights, _factors(weights, r, method, **options).values(), strict=True
    ):
        product = factors.B @ factors.A
        weight - product
        products.append(product)
    return products


def _svd_lowrank(weights: list[Tensor], r: int, niter: int) -> Result:
    products = []
    for weight in weights:
        U, S, V = torch.svd_lowrank(weight, q=r, niter=niter)
        products.append((U * S) @ V.T)
    return products


def _als(weights: list[Tensor], r: int, sweeps: int) -> Result:
    """Alternating least squares on ‖W − BA‖², each half a solve of r × r normal equations."""
    products = []
    for weight in weights:
        B = torch.randn(weight.shape[0], r)
        for _ in range(sweeps):
            A = torch.linalg.solve(B.T @ B, B.T @ weight)
            B = torch.linalg.solve(A @ A.T, A @ weight.T).T
        products.append(B @ A)
    return products


class _Model(nn.Module):
    def __init__(self, weights: list[Tensor]):
        super().__init__()
        self.layers = nn.ModuleList()
        for weight in weights:
            with torch.device("meta"):
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
            self.layers.append(layer)


def _peft(weights: list[Tensor], r: int, start: str) -> Result:
    names = [f"layers.{i}" for i in range(len(weights))]
    config = LoraConfig(r=r, lora_alpha=r, target_modules=names, init_lora_weights=start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(_Model(weights), config)
    layers = [model.base_model.model.layers[i] for i in range(len(weights))]
    return [x.lora_B["default"].weight.data @ x.lora_A["default"].weight.data for x in layers]


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
