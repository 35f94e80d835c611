"""Real models and data as fixtures, and what every test runs under."""

import os
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
