"""Every kernel that dispatch can pick, compiled ahead of time and held to its bounds.

    python -m benchmarks.kernel_report [--only TEXT]

Compiles each configuration for sm_80 (A100), sm_89 (4090), sm_90 (H100, H200) and sm_100 (B200) and
prints registers, spills, shared memory and tensor-core instructions as they are in the cubin; that
needs no GPU.
Exits with 1 if one spills, traps (what Triton makes of a kernel that does not fit), needs more
shared memory than that chip gives a block, uses TF32, or reads a 16-bit W on sm_90 by `mma.sync`
although its memory is aligned: wgmma is what reaches the full rate there, and not where ptxas lets
each wait for the one before (its note C7515).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import common as results
from lora_init.triton_kernels import common, descend, dual_project, lora_linear
from lora_init.triton_kernels.common import Variant
from lora_init.triton_kernels.descend import UpdateVariant

SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes that one block may have."""
RESULT = results.RESULTS / "kernel-report.json"
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Dtypes = tuple[torch.dtype, torch.dtype]
_LORA_DTYPES: tuple[Dtypes, ...] = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)
_LORA_ROWS = (2048, 4096, 8192)
"""One of each class of rows that `lora_linear.magnitude` tells apart."""
_LORA_ALIGNED = ("K", "N", "ranks", "trained", "x_stride", "r_stride", "dy_stride")
_ALIGNED = [["tt.divisibility", 16]]  # what the launch tells the compiler: `common.upload`


@dataclass(frozen=True)
class Case:
    """One configuration: a kernel, its compile-time constants, and how it is launched."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    arch: int
    options: dict[str, int]
    wgmma: bool = False
    """Whether it must use wgmma."""
    aligned: tuple[str, ...] = ()
    """Numbers that the launch tells the compiler to be multiples of 16."""


@dataclass
class Row:
    """What the compiler made of a case."""

    case: str
    arch: int
    registers: int
    stack: int
    spills: int
    shared: int
    counts: dict[str, int]
    broken: list[str] = field(default_factory=list)


def cases(archs: Sequence[int] = tuple(SHARED_LIMIT)) -> Iterator[Case]:
    """Every configuration of every kernel on these chips."""
    for arch in archs:
        yield from _products(arch)
        yield from _updates(arch)
        yield from _small(arch)
        yield from _lora_linear(arch)


def variants() -> Iterator[Variant]:
    """Every variant that `common.variant` can return for the parts that its callers ask for."""
    for dtype, memory in product(common.TRITON_DTYPES, common.MEMORIES):
        for count in (4,) if dtype == torch.float32 else (2, 4):
            for rank in common.RANKS[count]:
                yield Variant(dtype, memory, rank, count)


def _products(arch: int) -> Iterator[Case]:
    capability = divmod(arch, 10)
    for form in variants():
        tile = form.tile(capability)
        yield Case(
            f"products {_short(form.dtype)} {form.memory} r{form.rank} in {form.parts} parts, "
            f"{tile.rows}x{tile.columns}",
            common.products,
            {"layers": "*i64", "programs": "*i32", "counter": "*i32", "sums": "*i64"},
            form.constants(capability),
            arch,
            tile.options(),
            wgmma=arch == 90 and form.dtype != torch.float32 and form.memory != "any",
        )


def _updates(arch: int) -> Iterator[Case]:
    signature = {"layers": "*i64", "programs": "*i32", "counter": "*i32", "schedule": "*fp32"}
    signature |= dict.fromkeys(("one_minus_beta1", "beta2", "one_minus_beta2", "eps"), "fp32")
    forms = {
        descend.update_variant(dtype, r, adam, first)
        for dtype, r, adam, first in product(
            common.TRITON_DTYPES, (1, 16, 17, 32, 33, 100), (True, False), (True, False)
        )
    }
    forms |= {replace(form, whole=True) for form in forms if form.adam and not form.chunked}
    for form in sorted(forms, key=_update_name):
        constants = form.constants()
        options = form.options()
        yield Case(_update_name(form), descend.update, signature, constants, arch, options)


def _update_name(form: UpdateVariant) -> str:
    flags = [name for name in ("chunked", "whole", "adam", "first") if getattr(form, name)]
    rank = f"{form.groups}·r{form.rank // form.groups}"
    return " ".join(["update", _short(form.dtype), rank, f"in {form.parts} parts", *flags])


def _small(arch: int) -> Iterator[Case]:
    signature = {"tasks": "*i64", "programs": "*i32"}
    for form in variants():
        if form.memory == "rows":
            constants = dual_project.pack_constants(form)
            name = f"pack {_short(form.dtype)} r{form.rank} in {form.parts} parts"
            yield Case(name, dual_project.pack, signature, constants, arch, {})
    constants = {"SPAN": common.SPAN}
    yield Case("sum_partials", dual_project.sum_partials, signature, constants, arch, {})


def _lora_linear(arch: int) -> Iterator[Case]:
    """What `lora_linear.schedule` picks, with nothing left out of the backward."""
    found = {}
    for dtypes, ranks in product(_LORA_DTYPES, (16, 32, 64)):
        on = (False, True)
        for rows, dropout, halves, tma in product(_LORA_ROWS, on, on, {arch >= 90, False}):
            plan = lora_linear.schedule(rows, ranks, dtypes, dropout, halves, tma, divmod(arch, 10))
            for case in (
                *_projections(arch, dtypes, ranks, dropout, plan),
                *_matmuls(arch, dtypes, ranks, dropout, halves, tma, plan.matmul),
            ):
                found[case.name] = case
    yield from found.values()


def _projections(
    arch: int, dtypes: Dtypes, ranks: int, dropout: bool, plan: lora_linear.Schedule
) -> Iterator[Case]:
    x, low = (f"*{common.TRITON_DTYPES[dtype].name}" for dtype in dtypes)
    label = f"{_short(dtypes[0])}/{_short(dtypes[1])} r{ranks}{' dropout' if dropout else ''}"
    sizes = dict.fromkeys(("M", "K", "ranks", "x_stride"), "i32")
    seed = "*i64" if dropout else "constexpr"
    tile = plan.project
    yield Case(
        f"project {label}, {tile.rows}x{tile.columns}",
        lora_linear.project,
        {"x": x, "a": low, "seed": seed, "target": low, **sizes, "scale": "fp32", "least": "i32"},
        lora_linear.project_constants(dtypes, ranks, dropout, tile),
        arch,
        tile.options(),
        aligned=_LORA_ALIGNED,
    )
    tile = plan.columns
    sizes = dict.fromkeys(("M", "K", "ranks", "trained", "x_stride", "block", "least"), "i32")
    for partials in (1, lora_linear.PARTIALS):
        yield Case(
            f"project_columns {label} of {partials}, {tile.rows}x{tile.columns}",
            lora_linear.project_columns,
            {"ds": low, "x": x, "seed": seed, "da": "*fp32", **sizes},
            lora_linear.columns_constants(dtypes, ranks, dropout, partials, tile),
            arch,
            tile.options(),
            aligned=_LORA_ALIGNED,
        )
    tile = plan.both
    sizes = dict.fromkeys(("M", "N", "ranks", "trained", "dy_stride", "block"), "i32")
    for bias in (False, True):
        flags = (True, True, bias)
        yield Case(
            f"project_both {label}{' bias' if bias else ''}, {tile.rows}x{tile.columns}",
            lora_linear.project_both,
            {"dy": x, "b": low, "s": low, "ds": low, "db": "*fp32", **sizes, "scale": "fp32"},
            lora_linear.both_constants(dtypes, ranks, flags, tile, divmod(arch, 10)),
            arch,
            tile.options(),
            aligned=_LORA_ALIGNED,
        )
    names = ("K", "N", "trained", "a_count", "b_count", "a_programs", "b_programs")
    yield Case(
        f"sum_gradients {_short(dtypes[0])}/{_short(dtypes[1])} r{ranks}",
        lora_linear.sum_gradients,
        {"a_partials": "*fp32", "b_partials": "*fp32", "da": low, "db": low, "dbias": x}
        | dict.fromkeys(names, "i32"),
        lora_linear.sum_constants(ranks, (True, True, True)),
        arch,
        {},
        aligned=("K", "N"),
    )


def _matmuls(
    arch: int,
    dtypes: Dtypes,
    ranks: int,
    dropout: bool,
    halves: bool,
    tma: bool,
    tile: lora_linear.Matmul,
) -> Iterator[Case]:
    x, low = (f"*{common.TRITON_DTYPES[dtype].name}" for dtype in dtypes)
    sizes = ("M", "N", "K", "ranks", "trained", "x_stride", "r_stride", "least")
    for transposed in (True, False):
        masked = dropout and not transposed
        operands = dict.fromkeys(("x", "r", "y"), x)
        if tma:
            blocks = tile.blocks_of(transposed)
            operands = {
                name: f"tensordesc<{x[1:]}[{rows},{columns}]>"
                for name, (rows, columns) in zip(operands, blocks, strict=True)
            }
        partials = 1 if transposed else lora_linear.PARTIALS
        flags = [name for name, on in (("dropout", masked), ("halves", halves)) if on]
        yield Case(
            " ".join(
                [
                    "adapted_matmul forward" if transposed else "adapted_matmul dX",
                    f"{_short(dtypes[0])}/{_short(dtypes[1])} r{ranks}",
                    *flags,
                    "by TMA," if tma else "by pointers,",
                    f"{tile.rows}x{tile.columns}x{tile.depth}",
                ]
            ),
            lora_linear.adapted_matmul,
            operands
            | {"left": low, "right": low}
            | {"bias": x if transposed else "constexpr", "seed": "*i64" if masked else "constexpr"}
            | dict.fromkeys(sizes, "i32"),
            lora_linear.matmul_constants(
                dtypes,
                (ranks, ranks * (1 + halves)),
                (transposed, transposed, masked),
                partials,
                tma,
                tile,
            ),
            arch,
            tile.options(),
            wgmma=arch == 90 and dtypes[0] != torch.float32,
            aligned=_LORA_ALIGNED,
        )


def measure(case: Case) -> Row:
    """Compile a case and read its cubin."""
    signature = case.signature | dict.fromkeys(case.constants, "constexpr")
    none = {name: None for name, kind in case.signature.items() if kind == "constexpr"}
    attributes = {
        (i,): _ALIGNED
        for i, (name, kind) in enumerate(case.signature.items())
        if kind.startswith("*") or name in case.aligned
    }
    compiled = triton.compile(
        ASTSource(case.kernel, signature, case.constants | none, attributes),
        target=GPUTarget("cuda", case.arch, 32),
        options=case.options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (_cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    row = Row(
        case.name,
        case.arch,
        *map(int, match.groups()),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared=compiled.metadata.shared,
        counts={
            "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
            "waits": len(re.findall(r"\bHGMMA\b[^;]*\bgsb0\b", sass)),
            "mma": len(re.findall(r"\bHMMA\b", sass)),
            "tcgen05": len(re.findall(r"\bUTC\w*MMA\b", sass)),
            "tf32": len(re.findall("TF32", sass)),
            "cp.async": len(re.findall(r"\bLDGSTS\b", sass)),
            "traps": len(re.findall(r"\btrap;", compiled.asm["ptx"])),
        },
    )
    row.broken = list(broken_bounds(case, row))
    return row


def broken_bounds(case: Case, row: Row) -> Iterator[str]:
    """In words, each bound that the row breaks."""
    if row.spills:
        yield f"{row.spills} spills"
    if row.counts["traps"]:
        yield "traps"
    if row.shared > SHARED_LIMIT[row.arch]:
        yield f"shared memory {row.shared} > {SHARED_LIMIT[row.arch]}"
    if row.counts["tf32"]:
        yield f"{row.counts['tf32']} TF32 instructions"
    if case.wgmma and not row.counts["wgmma"]:
        yield "no wgmma"
    if row.counts["wgmma"] >= 4 and row.counts["waits"] == row.counts["wgmma"]:
        yield "every wgmma waits for the one before"


def report(chosen: Sequence[Case], jobs: int) -> list[Row]:
    """Rows of all cases, compiled in `jobs` processes; a table on the way."""
    print(
        f"{'sm':>3} {'configuration':<48} {'regs':>4} {'spills':>6} {'shared':>7} {'of':>4} "
        f"{'wgmma':>5} {'mma':>4} {'tc05':>4} {'tf32':>4}  bounds"
    )
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for row in pool.map(_measure, [(c.arch, c.name) for c in chosen], chunksize=8):
            counts, limit = row.counts, SHARED_LIMIT[row.arch]
            print(
                f"{row.arch:>3} {row.case:<48} {row.registers:>4} {row.spills:>6} "
                f"{row.shared / 1024:>5.0f}kB {limit >> 10:>4} {counts['wgmma']:>5} "
                f"{counts['mma']:>4} {counts['tcgen05']:>4} {counts['tf32']:>4}  "
                f"{'; '.join(row.broken) or 'kept'}",
                flush=True,
            )
            rows.append(row)
    return rows


def _measure(key: tuple[int, str]) -> Row:
    """`measure` by name: kernels cannot be pickled."""
    arch, name = key
    return measure(next(case for case in cases([arch]) if case.name == name))


def _cuobjdump(flag: str, path: str) -> str:
    command = [str(_BINARIES / "cuobjdump"), flag, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="part of 'smNN configuration'")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    chosen = [case for case in cases() if arguments.only in f"sm{case.arch} {case.name}"]
    if not chosen:
        parser.error(f"nothing is called {arguments.only!r}")
    rows = report(chosen, arguments.jobs)
    broken = [row for row in rows if row.broken]
    print(f"{len(rows)} configurations, {len(broken)} break a bound")
    if not arguments.only:
        machine = results.machine() | {"triton": triton.__version__}
        content = {"machine": machine, "rows": [asdict(row) for row in rows]}
        RESULT.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written to {RESULT.relative_to(RESULT.parent.parent.parent)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
