"""Everything that only a GPU can prove or measure, part by part: `benchmarks/gpu_check.sh OUT_DIR`.

Each part of PARTS is a process with a time limit of its own, inside a budget for all of them; one
that fails, crashes or hangs is noted and the next one runs. OUT_DIR gets

- `gpu_check.json`: every part's status, seconds and result; written anew after each,
- `summary.txt`: the same to read, with the figures as a table,
- `log.txt`: all that the parts printed.

The exit status is 1 if a part that proves correctness failed, broke off or ran out of time.

A new part is a function that returns its result as a dict, under the decorator `part`, and a line
in PARTS. The keys "failed" and "not measured" of a result say why, and decide the part's status.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

Result = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 510.0
"""Seconds for all parts: with an installation and a start, under 9 minutes. GPU_CHECK_SECONDS in
the environment says otherwise, where a machine is lent for less."""
_GRACE = 15.0
"""Of its limit, for a part that was interrupted to write what it has: xdist waits 10 s."""
_RESULT = "LORA_INIT_GPU_CHECK_RESULT"
"""Where a part's process writes its result, which may be several times."""
_BODIES: dict[str, Callable[[], Result]] = {}


@dataclass(frozen=True)
class Part:
    name: str
    seconds: float
    command: Sequence[str]
    proof: bool = False
    """Whether its failure is the check's."""


def part(body: Callable[[], Result]) -> Sequence[str]:
    """The command that runs a function of this file in a process of its own."""
    _BODIES[body.__name__] = body
    return (sys.executable, "-m", "benchmarks.gpu_check", "--part", body.__name__)


def check(parts: Sequence[Part], out: Path, budget: float = BUDGET) -> int:
    """Run all parts; the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")
    deadline = time.monotonic() + budget
    content: Result = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "parts": []}
    for one in parts:
        entry = _run(one, out, min(one.seconds, deadline - time.monotonic()))
        content["parts"].append(entry)
        bad = [e for e in content["parts"] if e["proof"] and e["status"] in ("failed", "timed out")]
        content["passed"] = not bad
        # A kill from outside leaves what there is so far.
        _write(out / "gpu_check.json", json.dumps(content, indent=1) + "\n")
        _write(out / "summary.txt", summary(content))
        print(_headline(entry), flush=True)
    print("\n" + (out / "summary.txt").read_text())
    return 0 if content["passed"] else 1


def _run(one: Part, out: Path, seconds: float) -> Result:
    entry: Result = {"part": one.name, "proof": one.proof, "status": "not measured", "seconds": 0}
    if seconds < min(1.0, one.seconds):
        return entry | {"reason": "no time was left"}
    grace = min(_GRACE, seconds / 4)
    result_path = out / f".{one.name.replace(' ', '-')}.json"
    result_path.unlink(missing_ok=True)
    began, timed_out = time.monotonic(), False
    with (out / "log.txt").open("a") as log:
        print(f"\n===== {one.name}", file=log, flush=True)
        start = log.tell()
        process = subprocess.Popen(
            one.command,
            cwd=ROOT,
            env=os.environ | {_RESULT: str(result_path), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds - grace)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        finally:
            _kill_session(process)
    entry["seconds"] = round(time.monotonic() - began, 1)
    result: Result = {}
    if result_path.exists():
        result = json.loads(result_path.read_text())
    for leftover in out.glob(f"{result_path.stem}.*"):
        leftover.unlink()
    entry |= {"result": result, "status": "passed"}
    if "failed" in result:
        entry |= {"status": "failed", "reason": result["failed"]}
    elif "not measured" in result:
        entry |= {"status": "not measured", "reason": result["not measured"]}
    elif timed_out:
        entry |= {"status": "timed out", "reason": f"took longer than {seconds:.0f} s"}
    elif process.returncode:
        reason = f"ended with exit status {process.returncode}"
        entry |= {"status": "failed", "reason": reason}
    if entry["status"] in ("failed", "timed out"):
        with (out / "log.txt").open(errors="replace") as log:
            log.seek(start)
            entry["last lines"] = [text.rstrip()[:300] for text in log.readlines()[-25:]]
    return entry


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """The part's process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summary(content: Mapping[str, Any]) -> str:
    """What a reader wants first: where, what passed, why not, the figures."""
    results = {entry["part"]: entry.get("result", {}) for entry in content["parts"]}
    where = results.get("environment", {})
    lines = [", ".join(f"{key} {where[key]}" for key in _IDENTITY if where.get(key)), ""]
    for entry in content["parts"]:
        lines.append(_headline(entry))
        for failure in entry.get("result", {}).get("failures", []):
            lines.append(f"    {failure}")
        lines += [f"    | {text}" for text in entry.get("last lines", [])]
    for name, result in results.items():
        if table := result.get("table"):
            lines += ["", f"{name}:", *table]
    proofs = Counter(entry["status"] for entry in content["parts"] if entry["proof"])
    lines += ["", "correctness: " + ", ".join(f"{n} {status}" for status, n in proofs.items())]
    return "\n".join(lines) + "\n"


_IDENTITY = ("device", "driver", "torch", "cuda", "triton", "python", "commit", "sources")


def _headline(entry: Mapping[str, Any]) -> str:
    note = entry.get("reason") or entry.get("result", {}).get("note") or ""
    return f"{entry['status']:<12} {entry['part']:<14} {entry['seconds']:>6} s  {note}".rstrip()


# The parts


@part
def environment() -> Result:
    """What a figure is worth nothing without."""
    found: Result = {
        "python": platform.python_version(),
        "commit": os.environ.get("LORA_INIT_COMMIT")
        or _output("git", "rev-parse", "--short", "HEAD"),
        "sources": _digest(),
        "cpus": os.cpu_count(),
    }
    missing = []
    requirements = ["lora-init", "triton"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        requirements += importlib.metadata.requires("lora-init") or []
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        if name and "extra ==" not in requirement:
            try:
                found[name[0]] = importlib.metadata.version(name[0])
            except importlib.metadata.PackageNotFoundError:
                missing.append(name[0])
    query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,temperature.gpu"
    found["nvidia-smi"] = _output("nvidia-smi", query, "--format=csv,noheader")
    found["driver"] = [*found["nvidia-smi"].split(", "), "", ""][1]
    if missing:
        found["failed"] = f"not installed here: {', '.join(missing)}"
    import torch

    found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "devices": torch.cuda.device_count(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory_GB": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_MB": round(properties.L2_cache_size / 1e6, 1),
        }
    found["note"] = found.get("device", "no CUDA device: what needs one is not measured")
    return found


@part
def build() -> Result:
    """The CUDA extension, where there is one to build."""
    if not list((ROOT / "csrc").rglob("*.cu")):
        return {"not measured": "none yet: csrc/ has no sources"}
    from lora_init import _C

    return {"note": _C.__file__}


@part
def self_test() -> Result:
    """The verdict of every backend on this device, anew."""
    import torch

    from lora_init import backends, selftest

    if reason := _no_cuda():
        return {"not measured": reason}
    device = torch.device("cuda", 0)
    shapes = ((8, 8), (2, 8), (8, 2))
    W, A, B = (torch.ones(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
    found: Result = {"verdicts": {}, "failures": []}
    for name, one in backends.available().items():
        if refusal := one.why_unsupported("lora_linear", W, W, A, B):
            found["verdicts"][name] = f"not run: {refusal}"
            continue
        began = time.monotonic()
        verdict = selftest.verdict(one, device)
        found["verdicts"][name] = {op: reason or "right" for op, reason in verdict.items()}
        found["failures"] += [f"{name}'s {op}: {why}" for op, why in verdict.items() if why]
        print(name, found["verdicts"][name], f"{time.monotonic() - began:.1f} s", flush=True)
        _keep(found)
    if found["failures"]:
        found["failed"] = f"{len(found['failures'])} ops are wrong here"
    found["note"] = ", ".join(found["verdicts"])
    return found


@part
def tests() -> Result:
    """`pytest -m gpu`, over the files that have such tests: others import what is not here."""
    import pytest

    if reason := _no_cuda():
        return {"not measured": reason}
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if re.search(r"mark\.(multi_)?gpu\b", path.read_text(encoding="utf-8"))
    ]
    report = Path(os.environ[_RESULT]).with_suffix(".xml")
    arguments = ["-m", "gpu or multi_gpu", "-q", "--durations=10", f"--junitxml={report}"]
    arguments += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    # Most of their time is compilation, one kernel at a time in each process.
    if importlib.util.find_spec("xdist"):
        arguments += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    # A kernel that hangs takes its own test with it, not the report.
    if importlib.util.find_spec("pytest_timeout"):
        arguments += ["--timeout=100", "--timeout-method=thread"]
    code = int(pytest.main([*arguments, *files]))
    if not report.exists():
        return {"failed": f"pytest ended with {code} and left no report"}
    found = read_junit(report)
    report.unlink()
    if code not in (0, 1, 5):
        found["failed"] = f"pytest broke off with {code}: {found['note']}"
    return found


def read_junit(path: Path) -> Result:
    """Counts, and each failure's name and first line."""
    counts: Counter[str] = Counter()
    failures, skipped = [], Counter[str]()
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        outcomes = {child.tag: child for child in case}
        outcome = next((k for k in ("failure", "error", "skipped") if k in outcomes), "passed")
        counts[outcome] += 1
        if outcome == "passed":
            continue
        message = (outcomes[outcome].get("message") or "").strip().partition("\n")[0][:200]
        if outcome == "skipped":
            skipped[message] += 1
        else:
            failures.append(f"{case.get('classname')}.{case.get('name')}: {message}")
    found: Result = {
        "counts": dict(counts),
        "failures": failures,
        "skipped": dict(skipped),
        "note": ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())),
    }
    if failures:
        found["failed"] = found["note"]
    elif not counts["passed"]:
        found["not measured"] = next(iter(skipped), "no test ran")
    return found


@part
def figures() -> Result:
    """The descent and the solver over their floors, and peers."""
    from benchmarks import bench_gpu

    return _figures(bench_gpu, bench_gpu.run)


@part
def lora_linear() -> Result:
    """Forward and backward of the adapted linear over their floors, and peers."""
    from benchmarks import bench_lora_linear as bench

    if reason := _no_cuda():
        return {"not measured": reason}
    return _figures(bench, partial(bench.run, bench.BRIEF, compiled=False))


def _figures(bench: Any, run: Callable[..., Result]) -> Result:
    """What a benchmark's `run` measured, with its table; a wrong result fails the part."""

    def result(content: Mapping[str, Any]) -> Result:
        rows = content["rows"]
        refused = [bench.line(row) for row in rows if row["status"].startswith("refused")]
        found = dict(content) | {"table": [bench.HEADER, *map(bench.line, rows)]}
        counts = Counter(row["status"].partition(":")[0] for row in rows)
        found["note"] = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
        if refused:
            found["failed"] = f"{len(refused)} results are wrong: {found['note']}"
        return found

    found = result(run(keep=lambda content: _keep(result(content))))
    return found | {"not measured": reason} if (reason := _no_cuda()) else found


@part
def kernel_report() -> Result:
    """Registers and spills as this machine's triton compiles for this machine's chip."""
    import torch

    if reason := _no_cuda():
        return {"not measured": reason}
    arch = "sm{}{} ".format(*torch.cuda.get_device_capability(0))
    jobs = str(min(12, os.cpu_count() or 1))
    command = [sys.executable, "-m", "benchmarks.kernel_report", "--only", arch, "--jobs", jobs]
    code, lines = _tee(command)
    total = next((text for text in reversed(lines) if "configurations" in text), "")
    if code == 2:
        return {"not measured": lines[-1] if lines else f"it knows no {arch}"}
    rows = [text for text in lines if text.lstrip().startswith(arch[2:])]
    found = {"failures": [row for row in rows if not row.endswith("kept")], "note": total.strip()}
    if code:
        found["failed"] = total or f"ended with exit status {code}"
    return found


@part
def memcheck() -> Result:
    return _sanitized("memcheck", "--report-api-errors", "no")  # torch probes what may fail


@part
def racecheck() -> Result:
    return _sanitized("racecheck")


def _sanitized(tool: str, *options: str) -> Result:
    """The self-test under a tool of compute-sanitizer."""
    if reason := _no_cuda():
        return {"not measured": reason}
    sanitizer = _sanitizer()
    if sanitizer is None:
        return {"not measured": "compute-sanitizer is not available"}
    command = [sanitizer, "--tool", tool, *options, "--print-limit", "20", *self_test]
    # Each tensor an allocation of its own, so that what is read beyond one is seen.
    environment = {k: v for k, v in os.environ.items() if k != _RESULT}
    environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        code, lines = _tee(command, environment)
    except KeyboardInterrupt:
        return {"not measured": f"{tool} took too long"}
    totals = [text for text in lines if "SUMMARY:" in text]
    if not totals:
        said = [text.lstrip("= ") for text in lines if text.startswith("=========")]
        why = next((text for text in said if "not supported" in text), "it printed no summary")
        return {"not measured": f"{tool}: {why} (exit status {code})"}
    found: Result = {"note": totals[-1].lstrip("= ")}
    errors = re.search(r"(\d+) errors?", found["note"])
    if code or errors is None or int(errors[1]):
        found["failed"] = found["note"] + (f", exit status {code}" if code else "")
    return found


def _sanitizer() -> str | None:
    places = [os.environ.get("CUDA_HOME", ""), *map(str, Path("/usr/local").glob("cuda*"))]
    places += [str(Path(nvcc).parent.parent)] if (nvcc := shutil.which("nvcc")) else []
    folders = [f"{place}/{sub}" for place in places for sub in ("bin", "compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    return shutil.which("compute-sanitizer", path=path)


# The tests first: they compile in parallel what the self-test then finds compiled.
PARTS = (
    Part("environment", 40, environment),
    Part("build", 40, build, proof=True),
    Part("tests", 160, tests, proof=True),
    Part("self-test", 60, self_test, proof=True),
    Part("figures", 120, figures, proof=True),
    Part("lora_linear", 60, lora_linear, proof=True),
    Part("kernel report", 75, kernel_report),
    Part("memcheck", 95, memcheck, proof=True),
    Part("racecheck", 95, racecheck, proof=True),
)


def _no_cuda() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def _tee(command: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[int, list[str]]:
    """Exit status and lines of a command, printed as they come."""
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        lines = []
        for text in process.stdout:
            print(text, end="", flush=True)
            lines.append(text.rstrip())
    return process.returncode, lines


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _digest() -> str:
    """Of all sources, for machines that get a tree without its history."""
    digest = hashlib.sha256()
    for folder in ("csrc", "triton_kernels", "lora_init"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cpp", ".h", ".cuh"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _keep(result: Mapping[str, Any]) -> None:
    """Write a part's result so far."""
    if path := os.environ.get(_RESULT):
        _write(Path(path), json.dumps(result))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    temporary.replace(path)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "--part":
        # A shell's background jobs inherit that it is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        result = _BODIES[arguments[1]]()
        _keep(result)
        return 1 if "failed" in result else 0
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m benchmarks.gpu_check OUT_DIR", file=sys.stderr)
        return 2
    budget = float(os.environ.get("GPU_CHECK_SECONDS", BUDGET))
    return check(PARTS, Path(arguments[0]).resolve(), budget)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
