"""The truncated SVD by block Krylov against what people have: error over Eckart–Young and time.

    python -m benchmarks.run krylov

Peers: `torch.svd_lowrank` at niter 4 and 16, PEFT's own `pissa`, `pissa_niter_4` and
`pissa_niter_16` (the calls that `get_peft_model` makes, on the same weights, residual included),
and our Adam descent with 4,000 steps. Times are for all matrices of a case together.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks import common, data
from benchmarks.bench_descend import targets
from lora_init import approximate

REPEATS = 3
Result = list[Tensor]
"""s·B·A per matrix."""


def run() -> dict[str, Any]:
    print(
        f"{'case':<14} {'r':>3} {'method':<16} {'ms':>9} {'mean excess':>12} {'worst':>9} "
        f"{'reads':>6}"
    )
    rows = []
    for name, (load, ranks, slow) in CASES.items():
        try:
            weights = load()
        except data.Unavailable as reason:
            print(f"{name}: skipped, {reason}")
            continue
        for r in ranks:
            rows += _compare(name, weights, r, slow)
    return {"machine": common.machine(), "rows": rows}


def _compare(name: str, weights: list[Tensor], r: int, slow: bool) -> list[dict[str, Any]]:
    minima = [_minimum(weight, r) for weight in weights]
    methods: dict[str, Callable[[], Result]] = {
        "krylov": lambda: _ours(weights, r),
        "svd_lowrank 4": lambda: _svd_lowrank(weights, r, 4),
        "svd_lowrank 16": lambda: _svd_lowrank(weights, r, 16),
        "peft niter_4": lambda: _peft(weights, r, "pissa_niter_4"),
        "peft niter_16": lambda: _peft(weights, r, "pissa_niter_16"),
        "peft pissa": lambda: _peft(weights, r, "pissa"),
    }
    if slow:
        methods["adam 4000"] = lambda: _ours(weights, r, "inilora", steps=4000)
    # In turn, so that the machine's drift falls on all of them alike; the slowest only once.
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    results: dict[str, Result] = {}
    for repeat in range(REPEATS + 1):
        for method, call in methods.items():
            if method in ("adam 4000", "peft pissa") and repeat > 1:
                continue
            began = time.perf_counter()
            results[method] = call()
            if repeat or method == "adam 4000":  # the first round warms up
                seconds[method].append(time.perf_counter() - began)
            if method == "adam 4000" and repeat == 0:
                methods = {m: c for m, c in methods.items() if m != method}
    reads = [f.info["reads"] for f in _factors(weights, r).values()]
    rows = []
    for method, products in results.items():
        excess = [
            (float((w.double() - p.double()).square().sum()) - m) / m
            for w, p, m in zip(weights, products, minima, strict=True)
        ]
        row = {
            "case": name,
            "r": r,
            "matrices": len(weights),
            "method": method,
            "ms": sorted(seconds[method])[len(seconds[method]) // 2] * 1e3,
            "mean_excess": sum(excess) / len(excess),
            "worst_excess": max(excess),
        }
        if method == "krylov":
            row |= {"mean_reads": sum(reads) / len(reads), "worst_reads": max(reads)}
        rows.append(row)
        print(
            f"{name:<14} {r:>3} {method:<16} {row['ms']:>9.1f} {row['mean_excess']:>12.1e} "
            f"{row['worst_excess']:>9.1e} {row.get('mean_reads', float('nan')):>6.1f}"
        )
    return rows


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


# case -> weights, ranks, whether Adam's 4,000 steps are affordable
CASES: dict[str, tuple[Callable[[], list[Tensor]], tuple[int, ...], bool]] = {
    "minilm_qv": (_minilm, (8, 32), True),
    "smollm2_qkvo": (_smollm2, (8,), False),
    "gaussian_1024": (lambda: _gaussian(1024, 4), (16,), False),
    "gaussian_2048": (lambda: _gaussian(2048, 4), (16,), False),
    "decaying_2048": (_decaying, (16,), False),
}
