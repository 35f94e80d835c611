"""gpu_check.py with parts of its own, and the GPU benchmark, both on a machine without a GPU."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_gpu, gpu_check
from benchmarks.bench_gpu import Bench, Figure
from benchmarks.gpu_check import Part

WRITE = "import json, os, pathlib; R = pathlib.Path(os.environ['LORA_INIT_GPU_CHECK_RESULT']); "


def part(name: str, code: str, seconds: float = 20, proof: bool = True) -> Part:
    return Part(name, seconds, (sys.executable, "-S", "-c", WRITE + code), proof)


def entries(out: Path) -> dict[str, dict[str, Any]]:
    return {e["part"]: e for e in json.loads((out / "gpu_check.json").read_text())["parts"]}


def test_a_part_that_fails_crashes_or_hangs_does_not_stop_the_rest(tmp_path: Path) -> None:
    survivor = tmp_path / "survivor"
    # Deaf to an interrupt, and with a child of its own.
    hang = f"""
import signal, subprocess, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
R.write_text(json.dumps({{"so far": 1}}))
subprocess.Popen(["sh", "-c", "sleep 3; touch {survivor}"])
time.sleep(60)
"""
    parts = [
        part("environment", "R.write_text(json.dumps({'device': 'a toy', 'note': 'toy'}))"),
        part("wrong", "print('a', 'line'); R.write_text(json.dumps({'failed': 'two are wrong'}))"),
        part("raises", "raise RuntimeError('its message')"),
        part("crashes", "os.abort()"),
        part("hangs", hang, 2),
        part("absent", "R.write_text(json.dumps({'not measured': 'no such tool'}))"),
        part("last", f"print(pathlib.Path({str(tmp_path)!r}, 'gpu_check.json').read_text())"),
    ]
    began = time.monotonic()
    assert gpu_check.check(parts, tmp_path) == 1
    assert time.monotonic() - began < 8
    found = entries(tmp_path)
    assert {name: e["status"] for name, e in found.items()} == {
        "environment": "passed",
        "wrong": "failed",
        "raises": "failed",
        "crashes": "failed",
        "hangs": "timed out",
        "absent": "not measured",
        "last": "passed",
    }
    assert found["wrong"]["reason"] == "two are wrong"
    assert found["raises"]["last lines"][-1] == "RuntimeError: its message"
    assert found["hangs"]["result"] == {"so far": 1}
    assert found["absent"]["reason"] == "no such tool"
    # What the last part read of the others: written after each.
    assert '"no such tool"' in (tmp_path / "log.txt").read_text().partition("===== last")[2]
    summary = (tmp_path / "summary.txt").read_text()
    assert summary.startswith("device a toy\n")
    assert "its message" in summary
    assert summary.endswith("correctness: 2 passed, 3 failed, 1 timed out, 1 not measured\n")
    # Only what a reader wants is left, and nothing that a part started.
    assert {p.name for p in tmp_path.iterdir()} == {"gpu_check.json", "summary.txt", "log.txt"}
    time.sleep(max(0.0, began + 4 - time.monotonic()))
    assert not survivor.exists()


def test_exit_status_is_that_of_the_proofs(tmp_path: Path) -> None:
    fine, wrong = part("fine", ""), part("slow kernel", "raise SystemExit(3)", proof=False)
    assert gpu_check.check([fine, wrong], tmp_path) == 0
    assert entries(tmp_path)["slow kernel"]["reason"] == "ended with exit status 3"
    assert gpu_check.check([part("wrong", "raise SystemExit(3)"), fine], tmp_path) == 1


def test_parts_beyond_the_budget_are_not_run(tmp_path: Path) -> None:
    parts = [part("long", "import time; time.sleep(30)"), part("late", "")]
    assert gpu_check.check(parts, tmp_path, budget=2.0) == 1
    found = entries(tmp_path)
    assert found["long"]["status"] == "timed out"
    assert found["late"]["reason"] == "no time was left"


def test_an_interrupted_part_may_write_what_it_has(tmp_path: Path) -> None:
    code = """
import time
try:
    time.sleep(30)
except KeyboardInterrupt:
    R.write_text(json.dumps({'counts': 7, 'not measured': 'too slow'}))
"""
    assert gpu_check.check([part("racecheck", code, 2)], tmp_path) == 0
    found = entries(tmp_path)["racecheck"]
    assert (found["status"], found["reason"]) == ("not measured", "too slow")
    assert found["result"]["counts"] == 7


def test_real_parts_fit_in_nine_minutes() -> None:
    assert gpu_check.BUDGET + 20 < 9 * 60
    names = [one.name for one in gpu_check.PARTS]
    assert len(set(names)) == len(names)
    for one in gpu_check.PARTS:
        assert one.command[-1] in gpu_check._BODIES
        assert one.seconds < gpu_check.BUDGET / 2
    # What proves and measures most comes before what may take its time.
    assert sum(one.seconds for one in gpu_check.PARTS[:5]) < gpu_check.BUDGET


def test_wrong_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == gpu_check.main(["--help"]) == 2
    assert "gpu_check OUT_DIR" in capsys.readouterr().err


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_gpu" name="test_a[bf16]"/>
<testcase classname="tests.test_gpu" name="test_b">
<failure message="error 3e-4 &#10;more">x</failure></testcase>
<testcase classname="tests.test_gpu" name="test_c"><skipped message="needs two"/></testcase>
<testcase classname="tests.test_gpu" name="test_d"><error message="CUDA error">x</error></testcase>
</testsuite></testsuites>"""


def test_junit_report_is_read(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(JUNIT)
    found = gpu_check.read_junit(path)
    assert found["counts"] == {"passed": 1, "failure": 1, "skipped": 1, "error": 1}
    assert found["failures"] == [
        "tests.test_gpu.test_b: error 3e-4 ",
        "tests.test_gpu.test_d: CUDA error",
    ]
    assert found["skipped"] == {"needs two": 1}
    assert found["failed"] == "1 error, 1 failure, 1 passed, 1 skipped"
    path.write_text(
        '<testsuite><testcase name="a"><skipped message="no GPU"/></testcase></testsuite>'
    )
    assert gpu_check.read_junit(path)["not measured"] == "no GPU"


SANITIZER = {
    "========= ERROR SUMMARY: 0 errors": (0, "passed"),
    "========= ERROR SUMMARY: 3 errors": (86, "failed"),
    "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)": (0, "passed"),
    "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)": (0, "failed"),
    "========= Error: Device not supported. Please refer to ...": (1, "not measured"),
    "": (1, "not measured"),
}


@pytest.mark.parametrize("said", SANITIZER)
def test_sanitizer_is_found_run_and_read(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, status = SANITIZER[said]
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_check, "_no_cuda", lambda: None)
    monkeypatch.setenv("PATH", "/nowhere")
    if not gpu_check._sanitizer():
        assert gpu_check._BODIES["memcheck"]() == {
            "not measured": "compute-sanitizer is not available"
        }
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    result = gpu_check._BODIES["memcheck"]()
    found = next((key for key in ("failed", "not measured") if key in result), "passed")
    assert found == status, result
    if "not supported" in said:
        assert "Device not supported" in result["not measured"]


def test_a_sanitizer_that_is_too_slow_proves_nothing_either_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "_no_cuda", lambda: None)
    monkeypatch.setattr(gpu_check, "_sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(gpu_check, "_tee", interrupted)
    assert gpu_check._BODIES["racecheck"]() == {"not measured": "racecheck took too long"}


REPORT = [
    " sm configuration                                      regs spills  bounds",
    " 90 products bf16 rows r8 in 2 parts, 64x512            125      0  kept",
    " 90 products fp32 any r32, 16x32                        255      4  4 spills",
    "2 configurations, 1 break a bound",
]


def test_kernel_report_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def tee(command: list[str], code: int = 1) -> tuple[int, list[str]]:
        assert command[command.index("--only") + 1] == "sm90 "
        return code, REPORT

    monkeypatch.setattr(gpu_check, "_no_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu_check, "_tee", tee)
    found = gpu_check._BODIES["kernel_report"]()
    assert found["failures"] == [REPORT[2]]
    assert found["failed"] == found["note"] == REPORT[3]
    monkeypatch.setattr(gpu_check, "_tee", lambda command: (2, ["nothing is called 'sm90 '"]))
    assert gpu_check._BODIES["kernel_report"]() == {"not measured": "nothing is called 'sm90 '"}


# The benchmark


def test_without_a_gpu_every_figure_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kept: list[int] = []
    content = bench_gpu.run(keep=lambda content: kept.append(len(content["rows"])))
    rows = content["rows"]
    assert kept == list(range(1, len(rows) + 1))
    assert {row["status"] for row in rows} == {"not measured: no CUDA device"}
    assert capsys.readouterr().out.count("not measured: no CUDA device") == len(rows)
    json.dumps(content)
    named = {(row["case"], row["r"], row["method"], row["unit"]): row["target"] for row in rows}
    assert len(named) == len(rows)
    llama, roberta = bench_gpu.LLAMA, bench_gpu.ROBERTA
    for r in (8, 16, 32):
        assert named[llama, r, "descend triton", "step"] == "ratio_to_floor ≤ 1.15"
        assert named[llama, r, "descend cuda", "step"] == "ratio_to_floor ≤ 1.05"
    assert named[llama, 8, "descend triton", "4000 steps"] == "ms ≤ 3500"
    assert named[llama, 16, "dual cuda", "read"] == "ratio_to_floor ≤ 1.05"
    assert named[llama, 16, "krylov", "solve"] == "ms ≤ 150"
    assert named[roberta, 8, "descend triton", "step"] == "ratio_to_floor ≤ 1"
    assert named[roberta, 8, "descend cuda", "step"] == "ratio_to_floor ≤ 0.666667"
    peers = {row["method"] for row in rows if row["target"] is None}
    assert {"torch.bmm", "torch.mm", "torch.compile", "published loop", "svd_lowrank 16"} <= peers


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Bench:
    sizes = {name: (2, 48, dtype) for name, (_, _, dtype) in bench_gpu.SIZES.items()}
    monkeypatch.setattr(bench_gpu, "ADAM_STEPS", 300)
    monkeypatch.setattr(bench_gpu, "SMALL_STEPS", 20)
    monkeypatch.setattr(bench_gpu, "BACKENDS", {"reference": (1.15, 1.0)})
    monkeypatch.setenv("LORA_INIT_SELFTEST", "0")
    return Bench(torch.device("cpu"), sizes)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_every_figure_is_measured_and_right(tiny: Bench) -> None:
    ours: dict[Any, float] = {}
    for figure in bench_gpu.figures():
        if figure.method != "torch.compile":  # minutes, on a CPU
            row = bench_gpu.measure(figure, tiny, ours)
            assert row["status"] in ("measured", "met", "missed"), row
            assert row["ms"] > 0
            assert figure.peer == (row["ratio_to_peer"] is not None)
            assert f"{row['ms']:.4g}" in bench_gpu.line(row)


def test_a_wrong_result_gets_no_speed(tiny: Bench) -> None:
    def figure(**found: float) -> Figure:
        return Figure("c", 8, "m", "step", lambda *_: found, ("ms", 2.0))

    def row(one: Figure) -> dict[str, Any]:
        return bench_gpu.measure(one, tiny, {})

    assert row(figure(ms=1, floor_ms=0.5, error=1e-9))["ratio_to_floor"] == 2
    assert row(figure(ms=1, floor_ms=0.5, error=1e-9))["status"] == "met"
    assert row(figure(ms=3, floor_ms=0.5, error=1e-9))["status"] == "missed"
    for error in (1e-3, float("nan")):
        refused = row(figure(ms=1, floor_ms=0.5, error=error))
        assert refused["status"].startswith("refused: error")
        assert refused["ms"] is refused["ratio_to_floor"] is None
    broken = row(Figure("c", 8, "m", "step", lambda *_: [][0], ("ms", 2.0)))
    assert broken["status"] == "not measured: IndexError: list index out of range"
