"""A step of `descend` against the published loop: one matrix at a time, Adam and autograd.

    python -m benchmarks.run descend

For each case and rank: both loops are run for 200 steps from the same start and must reach the same
loss (1e-5 relative; no speed is reported otherwise), then they are timed in turn. The floor of a
step is the larger of its bytes over the measured copy rate and its FLOPs over the measured matmul
rate, both taken in the same run.
"""

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks import common, data
from lora_init.ops.descend import DescentState, Optimizer, descend

RANKS = {8: 3.0, 16: 2.5, 32: 1.8}
"""Rank -> the ratio that is asked for."""
CHECK_STEPS = 200
MEMORY_BAR = 1.2
"""Most memory beyond the weights, over the size of factors + two moments + gradients."""


def run() -> dict[str, Any]:
    ceilings = common.ceilings()
    print(
        f"ceilings: copy {ceilings['copy_GB_s']:.1f} GB/s, matmul {ceilings['matmul_GFLOP_s']:.0f} "
        "GFLOP/s"
    )
    print(
        f"{'case':<12} {'r':>3} {'ours us':>9} {'loop us':>9} {'ratio':>6} {'bar':>4} "
        f"{'x floor':>8} "
        f"{'GFLOP/s':>8} {'loss differs':>12} {f'memory (<{MEMORY_BAR})':>13}"
    )
    rows = []
    for name, load in CASES.items():
        try:
            weights = load()
        except data.Unavailable as reason:
            print(f"{name}: skipped, {reason}")
            continue
        for r, bar in RANKS.items():
            rows.append(_measure(name, weights, r, bar, ceilings))
    return {"machine": common.machine(), "ceilings": ceilings, "rows": rows}


def _measure(
    name: str,
    weights: list[Tensor],
    r: int,
    bar: float,
    ceilings: dict[str, float],
) -> dict[str, Any]:
    A, B = _starts(weights, r)
    state = DescentState.start(A, B, Optimizer())
    descend(weights, state, CHECK_STEPS)
    published = [
        PublishedLoop(w, a, b).run(CHECK_STEPS) for w, a, b in zip(weights, A, B, strict=True)
    ]
    losses = [_loss(w, a, b) for w, a, b in zip(weights, state.A, state.B, strict=True)]
    differs = max(abs(x / y - 1) for x, y in zip(losses, published, strict=True))
    row: dict[str, Any] = {"case": name, "r": r, "matrices": len(weights), "loss_differs": differs}
    if differs > 1e-5:
        print(f"{name:<12} {r:>3} the losses differ by {differs:.1e}: no speed is reported")
        return row | {"failed": "losses differ"}

    elements = sum(w.numel() for w in weights)
    params = sum(p.numel() for p in state.params)
    # Tenths of a second: the pools' start and OpenMP threads that still spin from the other loop
    # are then lost in it, as they are in the hundreds of steps of a real run.
    steps = max(5, round(1.5e9 / (elements * r)))
    loops = [PublishedLoop(w, a, b) for w, a, b in zip(weights, A, B, strict=True)]
    ours, theirs, ratio = common.paired_seconds(
        lambda: descend(weights, state, steps), lambda: [loop.run(steps) for loop in loops], 5
    )
    flop = 4 * elements * r
    # W, and the parameters and two moments read and written
    bytes_ = 4 * (elements + 6 * params)
    floor = max(bytes_ / ceilings["copy_GB_s"], flop / ceilings["matmul_GFLOP_s"]) / 1e9

    # Bytes per byte of factors, two moments and gradients, each the size of the parameters. Between
    # r and 2r, because threads' stacks and BLAS packing buffers (some 2 MB a thread) do not grow
    # with r.
    memory = None
    extra, twice = (common.in_fresh_process(_peak_extra_bytes, name, rank) for rank in (r, 2 * r))
    if extra is not None and twice is not None:
        memory = (twice - extra) / (4 * 4 * params)
    row |= {
        "ours_us_per_step": ours / steps * 1e6,
        "loop_us_per_step": theirs / steps * 1e6,
        "ratio": ratio,
        "bar": bar,
        "times_floor": ours / steps / floor,
        "GFLOP_s": flop * steps / ours / 1e9,
        "memory_over_state": memory,
        "peak_extra_MB": None if extra is None else extra / 1e6,
    }
    print(
        f"{name:<12} {r:>3} {row['ours_us_per_step']:>9.0f} {row['loop_us_per_step']:>9.0f} "
        f"{ratio:>6.2f} {bar:>4} "
        f"{row['times_floor']:>8.2f} {row['GFLOP_s']:>8.0f} {differs:>12.1e} "
        f"{'-' if memory is None else f'{memory:.2f}':>13}"
    )
    return row


def _starts(weights: list[Tensor], r: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(w: Tensor, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * w.std()

    return [draw(w, r, w.shape[1]) for w in weights], [draw(w, w.shape[0], r) for w in weights]


def _peak_extra_bytes(name: str, r: int) -> int | None:
    """Peak memory beyond the weights of a few steps, the state included."""
    weights = CASES[name]()
    A, B = _starts(weights, r)
    return common.peak_extra_bytes(
        lambda: descend(weights, DescentState.start(A, B, Optimizer()), 2)
    )


class PublishedLoop:
    """The authors' loop for one matrix (arXiv 2510.03731, code): autograd through mse_loss."""

    def __init__(self, weight: Tensor, A: Tensor, B: Tensor):
        self.weight = weight
        self.A, self.B = torch.nn.Parameter(A.clone()), torch.nn.Parameter(B.clone())
        self.optimizer = torch.optim.Adam([self.A, self.B], lr=5e-4)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=5000, gamma=0.9)

    def run(self, steps: int) -> float:
        """The true loss after that many more steps."""
        for _ in range(steps):
            loss = torch.nn.functional.mse_loss(self.B @ self.A, self.weight)
            self.optimizer.zero_grad()
            loss.backward()
            self.scheduler.step()
            self.optimizer.step()
        return _loss(self.weight, self.A.detach(), self.B.detach())


def _loss(weight: Tensor, A: Tensor, B: Tensor) -> float:
    return float((weight.double() - B.double() @ A.double()).square().mean())


def _minilm() -> list[Tensor]:
    return targets(data.minilm(), ("query.weight", "value.weight"))


def _smollm2() -> list[Tensor]:
    return targets(data.smollm2(), ("q_proj.weight", "v_proj.weight"))


def _gaussian() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2048, 2048, generator=generator) * 0.02 for _ in range(4)]


def targets(directory: Any, suffixes: tuple[str, ...]) -> list[Tensor]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        names = sorted(name for name in file.keys() if name.endswith(suffixes))  # noqa: SIM118
        return [file.get_tensor(name).clone() for name in names]


CASES = {"minilm_qv": _minilm, "smollm2_qv": _smollm2, "4x2048": _gaussian}
