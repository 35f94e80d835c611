"""What every benchmark needs: the machine's identity and ceilings, fair timing, results on disk."""

import json
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Device, threads, versions and commit: what a figure is worth nothing without."""
    commit = _output("git", "rev-parse", "--short", "HEAD")
    dirty = bool(_output("git", "status", "--porcelain", "--", "lora_init", "benchmarks/*.py"))
    return {
        "device": _device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "lora_init": version("lora-init"),
        "commit": commit + ("+changes" if dirty else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def ceilings() -> dict[str, float]:
    """Measured now, fp32, all threads: copy rate (bytes read + written) and matmul rate."""
    source = torch.randn(64 << 20)  # 256 MB: far beyond any cache
    target = torch.empty_like(source)
    square = torch.randn(2048, 2048)
    copy = median_seconds(lambda: target.copy_(source), 5)
    matmul = median_seconds(lambda: square @ square, 5)
    return {
        "copy_GB_s": 2 * source.numel() * 4 / copy / 1e9,
        "matmul_GFLOP_s": 2 * 2048**3 / matmul / 1e9,
    }


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time of one call after one warm-up call."""
    function()
    return statistics.median(_seconds(function) for _ in range(repeats))


def paired_seconds(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int
) -> tuple[float, float, float]:
    """(median ours, median theirs, median of theirs/ours pair by pair), the two run in turn.

    Pairs, because these machines' speed drifts from minute to minute.
    """
    ours(), theirs()
    pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(repeats)]
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in pairs)


def peak_extra_bytes(function: Callable[[], object]) -> int | None:
    """How far resident memory rose at its highest during a call; None where it cannot be told."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = _status_kib("VmRSS")
    function()
    return (_status_kib("VmHWM") - before) * 1024


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a new process, where memory that earlier cases freed is not reused."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def write_results(name: str, content: dict[str, Any]) -> Path:
    """benchmarks/results/<name>-<device>.json"""
    device = "".join(c if c.isalnum() else "-" for c in _device_name()).strip("-").lower()
    path = RESULTS / f"{name}-{device}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(field)


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> str:
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    except FileNotFoundError:  # a lent machine may have no git
        return ""
    return done.stdout.strip()
