"""Times the tiles that `products` could use on this GPU: the choices in `common` come from here.

    python -m benchmarks.tune OUT.json

Every candidate is compiled first, in parallel, then timed on 64 × 4096² bf16: a step of `descend`
and its two launches alone, over the floor that `bench_gpu` holds them to. One that does not
compile or gives other results than the first is reported as that.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_gpu import LLAMA, SIZES, Bench
from benchmarks.common import machine
from lora_init.ops.descend import DescentState, Optimizer
from lora_init.triton_kernels import common, descend
from lora_init.triton_kernels.common import Tile

STEPS = 40
# By rank. Shared memory decides how many blocks an SM holds: one of 192 kB, or two of 96.
CANDIDATES = {
    8: (Tile(64, 512, 8, 3), Tile(64, 256, 4, 3), Tile(64, 256, 4, 5), Tile(64, 256, 8, 6)),
    16: (Tile(64, 256, 4, 3), Tile(64, 256, 4, 5), Tile(64, 256, 8, 5), Tile(128, 128, 8, 4)),
    32: (Tile(64, 256, 8, 3), Tile(64, 256, 8, 4), Tile(128, 128, 8, 3), Tile(64, 128, 4, 6)),
}


@contextmanager
def _using(tile: Tile) -> Iterator[None]:
    """Every 16-bit variant on this tile."""
    name = common._BY_CAPABILITY.get(torch.cuda.get_device_capability(), next(iter(common._TILES)))
    kept = common._TILES[name]
    common._TILES[name] = dict.fromkeys(kept, tile)
    _forget()
    try:
        yield
    finally:
        common._TILES[name] = kept
        _forget()


def _forget() -> None:
    common.plan.cache_clear()
    descend._latest.clear()


def _run(weights: Sequence[Tensor], state: DescentState, steps: int) -> descend._Session:
    optimizer = state.optimizer
    arguments = (weights, state.out_features, state.params, state.moments)
    descend.descend(*arguments, optimizer.betas, optimizer.eps, optimizer.schedule(0, steps))
    return next(iter(descend._latest.values()))[0]


def _compile(job: tuple[int, Tile]) -> str | None:
    """In a process of its own: leaves the kernels in Triton's cache."""
    r, tile = job
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    factor = torch.randn(r, 4096, device="cuda")
    with _using(tile):
        try:
            _run([weight], DescentState.start([factor], [factor.T], Optimizer()), 1)
            torch.cuda.synchronize()
        except Exception as error:  # whatever the compiler or the launch raises
            return f"{type(error).__name__}: {error}".partition("\n")[0][:120]
    return None


def _time(bench: Bench, r: int, tile: Tile, expected: list[Tensor]) -> dict[str, Any]:
    weights = bench.weights(LLAMA)
    with _using(tile):
        state = DescentState.start(*bench.starts(LLAMA, r), Optimizer())
        session = _run(weights, state, STEPS)
        if not expected:
            expected += [p.clone() for p in state.params[:2]]
        pairs = zip(state.params, expected, strict=False)
        off = max(float((p - e).norm() / e.norm()) for p, e in pairs)

        def products() -> None:
            common.launch_products(
                session._form, session._layers, session._blocks, session._counter, session._sums
            )

        def ms(call: Callable[[], object], times: int) -> float:
            return bench.ms(lambda: [call() for _ in range(times)], 3) / times

        step = ms(lambda: _run(weights, state, STEPS), 1) / STEPS
        return {
            "step_ms": step,
            "products_ms": ms(products, 10),
            "update_ms": ms(lambda: session._launch_update(session._update), 10),
            "ratio_to_floor": step / bench.floor_ms(LLAMA, r),
            "off": off,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    jobs = [(r, tile) for r, tiles in CANDIDATES.items() for tile in tiles]
    processes = max(1, min(14, (os.cpu_count() or 1) - 2))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        problems = list(pool.map(_compile, jobs))
    bench = Bench(torch.device("cuda", 0), SIZES)
    content: dict[str, Any] = {"machine": machine(), "ceilings": bench.ceilings, "rows": []}
    expected: dict[int, list[Tensor]] = {r: [] for r in CANDIDATES}
    for (r, tile), problem in zip(jobs, problems, strict=True):
        name = "x".join(map(str, (tile.rows, tile.columns, tile.warps, tile.stages)))
        found = {"problem": problem} if problem else _time(bench, r, tile, expected[r])
        content["rows"].append({"r": r, "tile": name, **found})
        values = ", ".join(f"{k} {v:.4g}" for k, v in found.items() if k != "problem")
        print(f"r {r:<3} {name:<14} {problem or values}", flush=True)
        out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
