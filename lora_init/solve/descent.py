"""Gradient descent on ‖W − B·A‖², all layers at once: the trace of the true loss, early stopping,
progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lora_init.factors import Factors
from lora_init.ops.descend import DescentState, Optimizer, descend
from lora_init.ops.dual_project import product_dtype
from lora_init.parallel import map_layers

# The true loss costs a few steps' worth of work, so this many points add a few per cent.
_TRACE_POINTS = 40

Advance = Callable[[int, float], None]
"""Progress callback: (steps just done, mean loss over the layers)."""


@dataclass(frozen=True)
class Stopping:
    """Stop a layer when its true loss improved by less than `tol` of itself over the last `window`
    steps.
    """

    tol: float
    window: int = 200


def descent(
    weights: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    optimizer: Optimizer,
    steps: int,
    stopping: Stopping | None = None,
    advance: Advance | None = None,
) -> list[Factors]:
    """Factors with s = 1 after `steps` steps from (A, B) on each mean((W − B·A)²).

    Args:
        weights: W (outᵢ, inᵢ), any float dtypes, read in place.
        A, B: starts (rᵢ, inᵢ) and (outᵢ, rᵢ), fp32 or fp64.

    Returns:
        Factors per weight, whose `info` holds `steps` (done by this layer), `loss` (true mean
        squared error at the end), `trace` ([[step, loss], ...]), `stopped_early`, and `seconds`
        (wall time of the whole group).
    """
    began = time.perf_counter()
    state = DescentState.start(A, B, optimizer)
    traces = [[[0, loss]] for loss in _losses(weights, state)]
    interval = stopping.window if stopping else max(1, -(-steps // _TRACE_POINTS))
    running = list(range(len(weights)))
    stopped: set[int] = set()
    while running and state.step < steps:
        group, part = [weights[i] for i in running], state.take(running)
        chunk = min(interval, steps - state.step)
        descend(group, part, chunk)
        state.step = part.step
        for i, loss in zip(running, _losses(group, part), strict=True):
            before = traces[i][-1][1]
            traces[i].append([state.step, loss])
            if (
                stopping
                and chunk == interval
                and state.step < steps
                and before - loss < stopping.tol * before
            ):
                stopped.add(i)
        running = [i for i in running if i not in stopped]
        if advance:
            advance(chunk, sum(t[-1][1] for t in traces) / len(traces))
    seconds = time.perf_counter() - began
    return [
        Factors(
            a.contiguous(),
            b.contiguous(),
            info={
                "steps": trace[-1][0],
                "loss": trace[-1][1],
                "stopped_early": i in stopped,
                "trace": trace,
                "seconds": seconds,
            },
        )
        for i, (a, b, trace) in enumerate(zip(state.A, state.B, traces, strict=True))
    ]


def descent_bytes(weight: Tensor, r: int) -> int:
    """Memory beyond the weight that `descent` takes for a layer.

    Start, parameters, two moments, gradient and scratch, and on the CPU the weight in the dtype of
    its factors where that is another.
    """
    itemsize = product_dtype(weight).itemsize
    converted = weight.numel() * itemsize if weight.element_size() < itemsize else 0
    return 6 * r * sum(weight.shape) * itemsize + converted


def _losses(weights: Sequence[Tensor], state: DescentState) -> list[float]:
    """mean((W − B·A)²) per layer."""

    def one(item: tuple[Tensor, Tensor, Tensor]) -> float:
        weight, a, b = item
        return Factors(a, b).squared_error(weight) / weight.numel()

    return map_layers(
        one, list(zip(weights, state.A, state.B, strict=True)), cost=lambda x: x[0].numel()
    )
