"""The kernel report: all that dispatch can pick is in it, the main kernels keep their bounds."""

import os
from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import kernel_report
from benchmarks.kernel_report import Case, Row
from lora_init.triton_kernels import common, descend, dual_project

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="a process that interprets cannot compile"
)

# What the published setting runs (r = 8 in bf16), the widest tiles, and an exact kernel.
CHOSEN = [
    "products bf16 rows r8 in 2 parts",
    "products bf16 rows r16 in 2 parts",
    "products bf16 columns r32 in 2 parts",
    "products fp16 rows r16 in 4 parts",
    "products bf16 any r16 in 2 parts",
    "products fp32 rows r16 in 4 parts",
    "update bf16 2·r8 in 2 parts whole adam",
    "update bf16 1·r32 in 2 parts adam",
    "pack bf16 r16 in 4 parts",
    "sum_partials",
]


@pytest.mark.parametrize("arch", kernel_report.SHARED_LIMIT)
def test_main_kernels_keep_their_bounds(arch: int) -> None:
    found = {case.name.split(",")[0]: case for case in kernel_report.cases([arch])}
    # The limits of sm_89 are the tightest, wgmma is for sm_90.
    names = CHOSEN if arch in (89, 90) else CHOSEN[1:2] + CHOSEN[5:6]
    if arch == 100:
        names = [*names, "adapted_matmul forward bf16/fp32 r16 halves by TMA"]
    for name in names:
        row = kernel_report.measure(found[name])
        assert row.broken == [], name
        assert 0 < row.registers <= 255
        if arch == 90 and "rows" in name and "fp32" not in name:
            # W is on its way while the tile before is multiplied.
            assert row.counts["cp.async"] > 0
            assert row.counts["wgmma"] > row.counts["mma"] == 0


@pytest.mark.slow
def test_every_kernel_keeps_its_bounds() -> None:
    rows = kernel_report.report(list(kernel_report.cases()), jobs=2)
    assert [(row.arch, row.case, row.broken) for row in rows if row.broken] == []


def test_names_are_unique() -> None:
    names = [(case.arch, case.name) for case in kernel_report.cases()]
    assert len(set(names)) == len(names) > 200


@pytest.mark.parametrize("arch", kernel_report.SHARED_LIMIT)
def test_all_that_dispatch_picks_is_in_the_report(arch: int) -> None:
    capability = divmod(arch, 10)

    def key(kernel: object, constants: dict[str, object], options: dict[str, int]) -> object:
        return kernel, *sorted((k, str(v)) for k, v in (constants | options).items())

    listed = {key(c.kernel, c.constants, c.options) for c in kernel_report.cases([arch])}
    base = torch.empty(64, 64)
    for dtype, r, view in product(
        common.TRITON_DTYPES,
        (1, 8, 9, 16, 17, 32, 33, 100),
        (lambda t: t, lambda t: t.T, lambda t: t[:, 1:]),
    ):
        weight = view(base.to(dtype))
        for precision, factors in product(("full", "fast"), ((torch.float32,) * 2, (dtype,) * 2)):
            form = common.variant(weight, r, dual_project._parts(dtype, factors, precision))
            constants, options = form.constants(capability), form.tile(capability).options()
            assert key(common.products, constants, options) in listed
            assert key(dual_project.pack, dual_project.pack_constants(form), {}) in listed
        form = common.variant(weight, r, descend.parts_of(dtype))
        constants, options = form.constants(capability), form.tile(capability).options()
        assert key(common.products, constants, options) in listed
        for adam, first in product((True, False), repeat=2):
            update = descend.update_variant(dtype, r, adam, first)
            for whole in {False, update.adam and not update.chunked}:
                form = replace(update, whole=whole)
                assert key(descend.update, form.constants(), form.options()) in listed


def row_of(**values: object) -> Row:
    counts = {"wgmma": 4, "waits": 1, "mma": 0, "tcgen05": 0, "tf32": 0, "cp.async": 8, "traps": 0}
    counts |= values.pop("counts", {})  # type: ignore[arg-type]
    kept = {"case": "c", "arch": 90, "registers": 100, "stack": 0, "spills": 0, "shared": 1000}
    return Row(**(kept | values), counts=counts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "broken"),
    [
        ({}, []),
        ({"stack": 8}, []),  # a clean sm_100 kernel has one
        ({"spills": 2}, ["2 spills"]),
        ({"shared": 227 * 1024}, []),
        ({"shared": 227 * 1024 + 1}, ["shared memory 232449 > 232448"]),
        ({"counts": {"traps": 1}}, ["traps"]),
        ({"counts": {"tf32": 1}}, ["1 TF32 instructions"]),
        ({"counts": {"wgmma": 0, "mma": 4}}, ["no wgmma"]),
        ({"counts": {"waits": 4}}, ["every wgmma waits for the one before"]),
    ],
)
def test_each_bound_breaks(values: dict[str, object], broken: list[str]) -> None:
    case = Case("c", None, {}, {}, 90, {}, wgmma=True)
    assert list(kernel_report.broken_bounds(case, row_of(**values))) == broken


def test_a_broken_bound_fails_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["kernel_report", "--only", "sm90 sum_partials"])
    rows = [row_of(), row_of(broken=["2 spills"])]
    monkeypatch.setattr(kernel_report, "report", lambda chosen, jobs: rows)
    assert kernel_report.main() == 1
    assert "2 configurations, 1 break a bound" in capsys.readouterr().out
    rows.pop()
    assert kernel_report.main() == 0
