"""The fused LoRA linear against the frozen one, its floor, and how else it can be written.

    python -m benchmarks.run lora_linear
    python -m benchmarks.bench_lora_linear --quick | --brief
    python -m benchmarks.bench_lora_linear --tune OUT.json | --schedules OUT.json

The floor of a case is the frozen linear's time, measured beside it, and the passes that an adapter
cannot do without (X once forward; dY and X once backward) at the copy rate measured in the same
run. A case gets a time only if every result is within twice the error of the same-dtype expression
against fp64. Times are medians by CUDA events with the L2 flushed before each repeat, taken while
the GPU is kept waiting until the host has queued the whole call: in a model it is far ahead. What
it takes the host is a column of its own. q+k+v and gate+up are stacked: one frozen linear with all
their rows, and the block-diagonal B of `StackedLoRALinear`.

`--tune` times the tiles that the kernels could use; the choices in `triton_kernels/lora_linear.py`
come from there. They are compiled beforehand, in parallel and on small operands.

`--schedules` times whole passes of the Triton backend fused and split into matmul and addmm_, says
which wins, and prints the table that decides at run time, `SPLIT` in `backends/triton.py`, which a
test holds to the rows in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks import common
from benchmarks.bench_gpu import Bench
from lora_init import backends
from lora_init.ops.lora_linear import lora_linear
from lora_init.ops.philox import keep_mask, keep_rate

Row = dict[str, Any]
Call = Callable[[], object]

SCALING = 2.0
PASSES = {"forward": 1, "forward+backward": 3}
"""Of X- or dY-sized data that an adapter adds."""
TARGET = 1.05
ALL = [True, True, True, False]
SEED = 2024


@dataclass(frozen=True)
class Case:
    """A layer (out, in) and a call: M rows, rank r, dropout p; bf16 unless it says otherwise."""

    name: str
    M: int
    out: int
    columns: int
    r: int = 16
    p: float = 0.0
    adapter_dtype: torch.dtype = torch.bfloat16


def cases() -> Iterator[Case]:
    """LoRAFusion's grid, and the layers of Llama-3-8B alone and stacked (`StackedLoRALinear`)."""
    for n, M, p in product((4096, 5120, 8192), (2048, 4096, 8192), (0.0, 0.1)):
        yield Case("grid", M, n, n, p=p)
    layers = {"q, o": (4096, 4096), "k, v": (1024, 4096)}
    layers |= {"gate, up": (14336, 4096), "down": (4096, 14336)}
    for (name, shape), M, r in product(layers.items(), (4096, 8192), (8, 16, 32, 64)):
        yield Case(f"llama3 {name}", M, *shape, r=r)
    stacks = {"q+k+v": (3, 6144, 4096), "gate+up": (2, 28672, 4096)}
    for (name, (count, *shape)), M, r in product(stacks.items(), (4096, 8192), (8, 16, 32, 64)):
        yield Case(f"llama3 {name}", M, *shape, r=count * r)
    yield Case("fp32 adapters", 8192, 4096, 4096, adapter_dtype=torch.float32)


QUICK = (
    Case("grid", 8192, 4096, 4096),
    Case("grid", 8192, 4096, 4096, p=0.1),
    Case("grid", 2048, 4096, 4096),
    Case("llama3 k, v", 8192, 1024, 4096),
    Case("llama3 q, o", 8192, 4096, 4096, r=64),
    Case("fp32 adapters", 8192, 4096, 4096, adapter_dtype=torch.float32),
)


BRIEF = (
    Case("grid", 8192, 4096, 4096),
    Case("grid", 8192, 4096, 4096, p=0.1),
    Case("grid", 2048, 4096, 4096),
    Case("llama3 k, v", 8192, 1024, 4096),
    Case("llama3 gate, up", 8192, 14336, 4096),
)


class Operands:
    """x, R, A, B, dy of a case on the device, sized so that y is near 1."""

    def __init__(self, case: Case, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def draw(
            rows: int, columns: int, std: float, dtype: torch.dtype = torch.bfloat16
        ) -> Tensor:
            drawn = torch.randn(rows, columns, generator=generator, device=device)
            return (drawn * std).to(dtype)

        low = case.adapter_dtype
        self.case = case
        self.x, self.dy = draw(case.M, case.columns, 1), draw(case.M, case.out, 1)
        self.R = draw(case.out, case.columns, case.columns**-0.5)
        self.A = draw(case.r, case.columns, case.columns**-0.5, low)
        self.B = draw(case.out, case.r, 0.5 * case.r**-0.5, low)
        self.seed = None if not case.p else torch.tensor([SEED], device=device)
        self.leaves = [t.clone().requires_grad_() for t in (self.x, self.A, self.B)]

    def exact(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """y, dx, dA, dB in fp64, or as torch computes them in the operands' own dtypes."""
        wide = dtype or self.A.dtype
        x, R, dy = (t if dtype is None else t.to(dtype) for t in (self.x, self.R, self.dy))
        A, B = self.A.to(wide), self.B.to(wide)
        scale = SCALING / keep_rate(self.case.p)
        dropped, keep = x.to(wide), None
        if self.seed is not None:
            keep = keep_mask(self.seed, *x.shape, self.case.p)
            dropped = dropped.masked_fill(~keep, 0)
        S, dS = dropped @ A.T * scale, dy.to(wide) @ B * scale
        low = dS @ A if keep is None else (dS @ A).masked_fill(~keep, 0)
        y, dx = (linear(x, R) + S @ B.T).to(x.dtype), (dy @ R + low).to(x.dtype)
        return [y, dx, dS.T @ dropped, dy.to(wide).T @ S]


def ours(one: Operands, implementation: Any) -> tuple[Call, Call]:
    """Forward and forward with backward by a backend's own functions."""
    case = one.case
    options = (one.seed, SCALING, case.p, case.r)

    def forward() -> tuple[Tensor, Tensor]:
        return implementation.lora_linear_forward(one.x, one.R, one.A, one.B, None, *options)

    def both() -> list[Tensor]:
        y, S = forward()
        dx, dA, dB, _ = implementation.lora_linear_backward(
            one.dy, one.x, one.R, one.A, one.B, S, *options, ALL
        )
        return [y, dx, dA, dB]

    return forward, both


def differentiated(one: Operands, function: Callable[..., Tensor]) -> tuple[Call, Call]:
    """The same two by autograd, of a function of (x, R, A, B)."""
    x, A, B = one.leaves

    def forward() -> Tensor:
        return function(x, one.R, A, B)

    def both() -> list[Tensor]:
        y = forward()
        return [y, *torch.autograd.grad(y, one.leaves, one.dy)]

    return forward, both


def eager(x: Tensor, R: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    """PEFT's layer."""
    dropped = torch.nn.functional.dropout(x.to(A.dtype), p) if p else x.to(A.dtype)
    return (linear(x, R) + linear(linear(dropped, A), B) * SCALING).to(x.dtype)


class _ThreeMatmuls(torch.autograd.Function):
    """Unsloth's schedule: the low-rank products are added by `addmm_`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, A: Tensor, B: Tensor) -> Tensor:
        S = x @ A.T
        ctx.save_for_backward(x, R, A, B, S)
        return linear(x, R).addmm_(S, B.T, alpha=SCALING)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, R, A, B, S = ctx.saved_tensors
        dS = dy @ B
        dx = (dy @ R).addmm_(dS, A, alpha=SCALING)
        return dx, None, SCALING * (dS.T @ x), SCALING * (dy.T @ S)


def peers(one: Operands) -> Iterator[tuple[str, tuple[Call, Call]]]:
    """Other ways to run the case, by name."""
    p = one.case.p
    yield "PEFT eager", differentiated(one, partial(eager, p=p))
    if not p and one.A.dtype == one.x.dtype:
        yield "three matmuls", differentiated(one, _ThreeMatmuls.apply)
    compiled = torch.compile(eager, dynamic=False)
    yield "torch.compile", differentiated(one, partial(compiled, p=p))


def worst_error(found: Sequence[Tensor], same: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest error over that of the same-dtype expression."""
    return max(
        float((a.double() - e).norm() / (s.double() - e).norm())
        for a, s, e in zip(found, same, exact, strict=True)
    )


def peak_bytes(call: Call) -> int:
    """How far a call raises allocated memory at its highest."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


_WAIT_CYCLES = 2_000_000
"""Of a kernel that does nothing: some 1 ms, in which the host queues any call here."""


def milliseconds(bench: Bench, call: Call, repeats: int) -> tuple[float, float]:
    """Medians on the GPU and on the host of one call after one to warm up."""
    call()
    found, host = [], []
    for _ in range(repeats):
        _flusher(bench.device).zero_()
        torch.cuda._sleep(_WAIT_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        began = time.perf_counter()
        call()
        host.append((time.perf_counter() - began) * 1e3)
        end.record()
        end.synchronize()
        found.append(float(start.elapsed_time(end)))
    return median(found), median(host)


@cache
def _flusher(device: torch.device) -> Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)


def implementations(one: Operands) -> Iterator[tuple[str, Any]]:
    """Every backend with kernels that can run the case, by name."""
    for name, implementation in backends.available().items():
        reason = implementation.why_unsupported("lora_linear", one.x, one.R, one.A, one.B)
        if name != "reference" and reason is None:
            yield name, implementation


def measure(bench: Bench, case: Case, repeats: int, compiled: bool) -> list[Row]:
    """Ours and the peers of one case, forward and forward+backward."""
    one = Operands(case, bench.device)
    frozen_forward = milliseconds(bench, lambda: linear(one.x, one.R), repeats)[0]
    frozen = {
        "forward": frozen_forward,
        "forward+backward": frozen_forward
        + milliseconds(bench, lambda: one.dy @ one.R, repeats)[0],
    }
    gigabyte_ms = 1e-6 / bench.ceilings["copy_GB_s"]
    floors = {
        "forward": frozen["forward"] + one.x.nbytes * gigabyte_ms,
        "forward+backward": frozen["forward+backward"]
        + (2 * one.x.nbytes + one.dy.nbytes) * gigabyte_ms,
    }

    def op(x: Tensor, R: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_linear(x, R, A, B, SCALING, dropout_p=case.p)

    same, exact = one.exact(), one.exact(torch.float64)
    calls, errors = [], {}
    for name, implementation in implementations(one):
        calls.append((f"ours, {name}", ours(one, implementation)))
        errors[calls[-1][0]] = worst_error(calls[-1][1][1](), same, exact)
    calls.append(("ours, op", differentiated(one, op)))
    calls += list(peers(one))[: None if compiled else -1]
    rows = []
    for method, pair in calls:
        for unit, call in zip(floors, pair, strict=True):
            row: Row = {"case": case.name, "M": case.M, "out": case.out, "in": case.columns}
            row |= {"r": case.r, "p": case.p, "adapters": str(case.adapter_dtype)[6:]}
            row |= {"method": method, "unit": unit, "error": errors.get(method)}
            rows.append(row)
            if (row["error"] or 0) > 2:
                row["status"] = f"refused: error {row['error']:.1f} times that of torch"
                continue
            row["ms"], row["host_ms"] = milliseconds(bench, call, repeats)
            row["frozen_ms"], row["floor_ms"] = frozen[unit], floors[unit]
            row["x_frozen"], row["x_floor"] = row["ms"] / frozen[unit], row["ms"] / floors[unit]
            row["peak_MB"] = peak_bytes(call) / 1e6
            row["status"] = "measured"
            if method.startswith("ours"):
                row["status"] = "met" if row["x_floor"] <= TARGET else "missed"
    return rows


HEADER = (
    f"{'case':<18} {'M':>5} {'out':>5} {'in':>5} {'r':>3} {'p':>4} {'method':<15} {'unit':<16} "
    f"{'ms':>8} {'host':>6} {'frozen':>8} {'x frozen':>8} {'x floor':>8} {'peak MB':>8} "
    f"{'error':>5}  status"
)


def line(row: Row) -> str:
    """A row as text under HEADER."""
    head = (
        f"{row['case']:<18} {row['M']:>5} {row['out']:>5} {row['in']:>5} {row['r']:>3} "
        f"{row['p']:>4} {row['method']:<15} {row['unit']:<16} "
    )
    if "ms" not in row:
        return head + row["status"]
    return head + (
        f"{row['ms']:>8.4f} {row['host_ms']:>6.3f} {row['frozen_ms']:>8.4f} "
        f"{row['x_frozen']:>8.3f} {row['x_floor']:>8.3f} {row['peak_MB']:>8.0f} "
        f"{row['error'] or 0:>5.2f}  {row['status']}"
    )


def run(
    chosen: Sequence[Case] | None = None,
    repeats: int = 20,
    compiled: bool = True,
    keep: Callable[[dict[str, Any]], object] = lambda content: None,
) -> dict[str, Any]:
    """The chosen cases, or all, or why none was measured; `keep` gets what there is after each."""
    content: dict[str, Any] = {"machine": common.machine(), "rows": []}
    if not torch.cuda.is_available():
        content["rows"].append({"status": "not measured: no CUDA device"})
        print(content["rows"][0]["status"])
        return content
    bench = Bench(torch.device("cuda", torch.cuda.current_device()), {})
    content["ceilings"] = bench.ceilings
    print(bench.ceilings, HEADER, sep="\n")
    for case in chosen or tuple(cases()):
        for row in measure(bench, case, repeats, compiled):
            content["rows"].append(row)
            print(line(row), flush=True)
        keep(content)
    return content


# (kernel, M, out, in): what `--tune` times every candidate on.
LAYERS = ((8192, 4096, 4096), (2048, 4096, 4096), (8192, 1024, 4096))
DIRECTIONS = ("forward", "dX", "dX dropout")
SKINNY = ("project", "project dropout", "both", "columns", "columns dropout")


def candidates(kernel: str) -> list[Any]:
    """Tiles worth timing on an H100 or H200; a few more than fit, which are reported as that."""
    from lora_init.triton_kernels.common import Tile
    from lora_init.triton_kernels.lora_linear import Matmul

    tiles: dict[str, list[Any]] = {
        "forward": [
            Matmul(128, 256, 64, 8, 3),
            Matmul(256, 128, 64, 8, 3),
            Matmul(128, 128, 64, 8, 3),
            Matmul(128, 128, 64, 8, 4),
        ],
        "project": [
            Tile(64, 128, 4, 4),
            Tile(64, 128, 8, 4),
            Tile(64, 256, 8, 3),
            Tile(64, 256, 4, 3),
            Tile(32, 128, 4, 4),
            Tile(32, 256, 4, 4),
            Tile(32, 256, 8, 3),
            Tile(16, 256, 4, 4),
            Tile(16, 512, 4, 3),
            Tile(16, 256, 2, 5),
            Tile(128, 64, 8, 4),
        ],
        "both": [
            Tile(256, 64, 8, 3),
            Tile(256, 64, 8, 4),
            Tile(128, 64, 8, 4),
            Tile(128, 64, 4, 3),
            Tile(128, 64, 4, 5),
            Tile(128, 128, 8, 3),
            Tile(64, 64, 4, 4),
            Tile(64, 64, 4, 6),
            Tile(64, 128, 4, 3),
            Tile(256, 128, 8, 2),
        ],
        "columns": [
            Tile(64, 256, 8, 3),
            Tile(64, 256, 4, 3),
            Tile(128, 128, 8, 3),
            Tile(128, 128, 4, 3),
            Tile(64, 128, 4, 4),
            Tile(64, 128, 8, 4),
            Tile(32, 256, 4, 4),
            Tile(32, 512, 8, 3),
        ],
    }
    tiles["dX"] = tiles["dX dropout"] = tiles["forward"]
    tiles["project dropout"], tiles["columns dropout"] = tiles["project"], tiles["columns"]
    return [t for t in tiles[kernel] if "dropout" not in kernel or t.columns % 128 == 0]


def prepared(
    kernel: str, layer: tuple[int, int, int], device: torch.device
) -> tuple[Callable[[Any], Any], Call, int]:
    """What runs a kernel on a tile, what a peer does, and the bytes that it must read."""
    from lora_init.triton_kernels import lora_linear as launchers

    M, out, columns = layer
    p = 0.1 if "dropout" in kernel else 0.0
    one = Operands(Case("tune", M, out, columns, p=p), device)
    if kernel in ("forward", *SKINNY[:2]):
        S = torch.empty(M, 16, device=device, dtype=torch.bfloat16)
        if kernel != "forward":
            call = partial(launchers._project, one.x, one.A, S, one.seed, p, SCALING)
            return call, lambda: one.x @ one.A.T, one.x.nbytes
        S.copy_(one.x @ one.A.T)
        y = torch.empty_like(one.dy)
        call = partial(
            launchers._matmul, one.x, one.R, y, S[None], one.B, None, None, 0.0, 16, True, True
        )
        return lambda tile: (call(tile), y)[1], lambda: linear(one.x, one.R), 0
    dS = torch.randn(4, M, 16, device=device).bfloat16()
    if kernel == "both":
        S = dS[0].contiguous()
        call = partial(launchers._project_both, one.dy, one.B, S, True, False, 16, SCALING)
        return call, lambda: (one.dy @ one.B, one.dy.T @ S), one.dy.nbytes
    if kernel.startswith("columns"):
        call = partial(launchers._project_columns, dS, one.x, 16, one.seed, p)
        return call, lambda: dS[0].T @ one.x, one.x.nbytes
    dx = torch.empty_like(one.x)
    call = partial(
        launchers._matmul, one.dy, one.R, dx, dS, one.A, None, one.seed, p, 16, False, True
    )
    return lambda tile: (call(tile), dx)[1], lambda: one.dy @ one.R, 0


SCHEDULED_LAYERS = (
    *((4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)),
    *((5120, 5120), (8192, 8192), (2048, 2048), (8192, 2048), (2048, 8192)),
)
"""(out, in): Llama-3-8B's alone and stacked, LoRAFusion's grid, Llama-3.2-1B's."""
MARGIN = 0.02
"""What the split schedule must be faster by: less is noise, and it takes a launch more."""
Table = dict[tuple[tuple[int, int], str], frozenset[tuple[int, int, int]]]


def scheduled(one: Operands, split: bool) -> dict[str, Call]:
    """The two passes of the Triton backend."""
    from lora_init.triton_kernels import lora_linear as launchers

    options = (None, SCALING, 0.0, one.case.r)

    def forward() -> tuple[Tensor, Tensor]:
        return launchers.forward(one.x, one.R, one.A, one.B, None, *options, split)

    S = forward()[1]

    def backward() -> tuple[Tensor | None, ...]:
        return launchers.backward(
            one.dy, one.x, one.R, one.A, one.B, S, *options, ALL, split
        )  # fmt: skip

    return {"forward": forward, "backward": backward}


def schedules(out: Path) -> None:
    """Both schedules of either pass for all layers, and the table of where split is faster."""
    bench = Bench(torch.device("cuda", torch.cuda.current_device()), {})
    content: dict[str, Any] = {"machine": common.machine(), "ceilings": bench.ceilings, "rows": []}
    capability = torch.cuda.get_device_capability(bench.device)
    for (n, columns), M, r in product(SCHEDULED_LAYERS, (1024, 2048, 4096, 8192), (16, 64)):
        one = Operands(Case("schedule", M, n, columns, r=r), bench.device)
        same, exact = one.exact(), one.exact(torch.float64)
        ways = {name: scheduled(one, name == "split") for name in ("fused", "split")}
        for side, truth in (("forward", slice(1)), ("backward", slice(1, None))):
            row: Row = {"schedule": side, "capability": capability}
            row |= {"M": M, "out": n, "in": columns, "r": r}
            for name, passes in ways.items():
                found = [t for t in passes[side]() if t is not None]
                found = found[:1] if side == "forward" else found
                row[f"{name}_error"] = worst_error(found, same[truth], exact[truth])
                row[f"{name}_ms"] = milliseconds(bench, passes[side], 9)[0]
            row["right"] = max(row["fused_error"], row["split_error"]) <= 2
            content["rows"].append(row)
            faster = "split" if row["split_ms"] < row["fused_ms"] else "fused"
            print(
                f"{side:<8} {M:>5} x {n:>5} x {columns:>5} r {r}: fused {row['fused_ms']:.4f} ms, "
                f"split {row['split_ms']:.4f} ms, split/fused "
                f"{row['split_ms'] / row['fused_ms']:.3f}: {faster if row['right'] else 'WRONG'}",
                flush=True,
            )
        out.write_text(json.dumps(content, indent=1) + "\n")
    for key, sizes in table(content["rows"]).items():
        print(f"{key}: frozenset({sorted(sizes)}),")


def table(rows: Sequence[Row]) -> Table:
    """(compute capability, pass) -> buckets of which split won every case."""
    from lora_init.backends.triton import bucket

    won: dict[Any, list[bool]] = {}
    for row in rows:
        key = (tuple(row["capability"]), row["schedule"])
        place = (key, bucket(row["M"], row["out"], row["in"]))
        faster = row["split_ms"] < (1 - MARGIN) * row["fused_ms"]
        won.setdefault(place, []).append(row["right"] and faster)
    found: dict[Any, set[tuple[int, int, int]]] = {}
    for (key, sizes), each in won.items():
        if all(each):
            found.setdefault(key, set()).add(sizes)
    return {key: frozenset(sizes) for key, sizes in found.items()}


def committed_table() -> Table:
    """The table of the rows that `schedules` wrote in benchmarks/results/."""
    contents = [json.loads(path.read_text()) for path in sorted(common.RESULTS.glob("*.json"))]
    rows = [row for content in contents for row in content.get("rows", [])]
    return table([row for row in rows if "schedule" in row])


def _compile(job: tuple[str, Any]) -> str | None:
    """In a process of its own: leaves the kernel in Triton's cache."""
    try:
        prepared(job[0], (512, 1024, 1024), torch.device("cuda"))[0](job[1])
        torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler or the launch raises
        return f"{type(error).__name__}: {error}".partition("\n")[0][:120]
    return None


def tune(out: Path) -> None:
    """Every candidate on every layer, the fastest first in its list."""
    jobs = [(k, tile) for k in (*DIRECTIONS, *SKINNY) for tile in candidates(k)]
    processes = max(1, min(14, (os.cpu_count() or 1) - 2))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        problems = dict(zip(map(str, jobs), pool.map(_compile, jobs), strict=True))
    bench = Bench(torch.device("cuda", 0), {})
    content: dict[str, Any] = {"machine": common.machine(), "ceilings": bench.ceilings, "rows": []}
    print(content["ceilings"])
    for kernel, layer in product((*DIRECTIONS, *SKINNY), LAYERS):
        call, peer, size = prepared(kernel, layer, bench.device)
        peer_ms = milliseconds(bench, peer, 9)[0]
        first = None
        read_ms = size * 1e-6 / bench.ceilings["copy_GB_s"]
        print(f"{kernel}, {layer}: torch {peer_ms:.4f} ms, one read {read_ms:.4f} ms")
        for tile in candidates(kernel):
            row: Row = {"kernel": kernel, "layer": layer, "tile": astuple(tile)}
            row["problem"] = problems[str((kernel, tile))]
            if row["problem"] is None:
                found = call(tile)
                row["ms"], row["host_ms"] = milliseconds(bench, partial(call, tile), 9)
                row["x_torch"] = row["ms"] / peer_ms
                if kernel in DIRECTIONS:
                    first = found.clone() if first is None else first
                    row["off"] = float((found - first).norm() / first.norm())
                if size:
                    row["GB_s"] = size * 1e-6 / row["ms"]
            content["rows"].append(row | {"torch_ms": peer_ms})
            out.write_text(json.dumps(content, indent=1) + "\n")
        rows = [r for r in content["rows"] if (r["kernel"], r["layer"]) == (kernel, layer)]
        for row in sorted(rows, key=lambda r: r.get("ms", float("inf"))):
            values = {k: v for k, v in row.items() if k in ("x_torch", "GB_s", "off")}
            shown = row["problem"] or f"{row['ms']:.4f} ms " + " ".join(
                f"{k} {v:.3g}" for k, v in values.items()
            )
            print(f"  {row['tile']!s:<44} {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="six cases, no torch.compile")
    parser.add_argument("--tune", type=Path, metavar="OUT.json")
    parser.add_argument("--schedules", type=Path, metavar="OUT.json")
    parser.add_argument("--brief", action="store_true", help="five cases, under 25 s")
    arguments = parser.parse_args()
    if arguments.tune:
        tune(arguments.tune)
    elif arguments.schedules:
        schedules(arguments.schedules)
    elif arguments.brief:
        run(BRIEF, 7, False)
    elif arguments.quick:
        run(QUICK, 7, False)
    else:
        content = run()
        if "ceilings" in content:
            print(f"written to {common.write_results('lora_linear', content)}")


if __name__ == "__main__":
    main()
