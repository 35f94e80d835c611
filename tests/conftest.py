"""Real models and data as fixtures, and what every test runs under."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

# Read when huggingface_hub and tokenizers are first imported, so before anything else is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from benchmarks import data

T = TypeVar("T")


def pytest_runtest_setup(item: pytest.Item) -> None:
    devices = torch.cuda.device_count()
    if item.get_closest_marker("gpu") and devices < 1:
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("multi_gpu") and devices < 2:
        pytest.skip(f"needs two CUDA devices, there are {devices}")


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache for each test, and the thread count that it found."""
    monkeypatch.setenv("LORA_INIT_CACHE_DIR", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _fetch(get: Callable[[], T]) -> T:
    try:
        return get()
    except data.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    return _fetch(data.minilm)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    return _fetch(data.smollm2)


@pytest.fixture(scope="session")
def movie_reviews() -> list[tuple[str, int]]:
    return _fetch(data.movie_reviews)


# For the files whose case_* run Triton kernels: tests/test_triton_*.py.


@pytest.fixture
def run_cases(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Runs the test file's case_* in a new process, with more options and environment."""

    def run(*options: str, **environment: str) -> None:
        left_out = ("PYTEST_ADDOPTS", "TRITON_INTERPRET")
        kept = {k: v for k, v in os.environ.items() if k not in left_out}
        alone = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "python_functions=case_*"]
        command = [sys.executable, "-m", "pytest", str(request.path), *alone, *options]
        done = subprocess.run(command, env=kept | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """All memory that kernels are given to write starts as NaN."""
    from lora_init.triton_kernels import common

    scratch = common.scratch
    monkeypatch.setattr(common, "scratch", lambda *args: scratch(*args).fill_(float("nan")))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched so far."""
    from lora_init.triton_kernels import common

    names: list[str] = []
    launch = common.launch

    def counted(kernel: object, *args: object, **options: object) -> None:
        names.append(kernel.__name__)  # type: ignore[attr-defined]
        launch(kernel, *args, **options)

    monkeypatch.setattr(common, "launch", counted)
    return names
