"""Run a study, or what is missing of it, and write its verdict and figure from its table.

    python -m benchmarks.studies toy [--seeds N] [--every N]
    python -m benchmarks.studies lm [MODEL ...] [--seeds N] [--methods NAME ...]

A study runs on one thread, and in one process at a time.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

import torch
from filelock import FileLock, Timeout

from benchmarks import common, data
from benchmarks.studies import figures, lm, toy, verdicts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    studies = parser.add_subparsers(dest="study", required=True)
    command = studies.add_parser("toy", help="Beyond Zero Initialization, MNIST to Fashion-MNIST")
    command.add_argument("--seeds", type=int, default=5, help="10 were published")
    command.add_argument(
        "--every", type=int, default=1, metavar="N", help="only every Nth σ and lr of the grid"
    )
    command = studies.add_parser("lm", help="language models on movie reviews")
    command.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(lm.TASKS))
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--methods", nargs="+", metavar="NAME", default=lm.available())
    options = parser.parse_args()
    # One thread: the same bits on any number of cores. Adam's moments of dead units are denormal.
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    {"toy": _toy, "lm": _lm}[options.study](options)


def _toy(options: argparse.Namespace) -> None:
    with _alone("toy") as path:
        results = toy.table(path)
        grid = (toy.SIGMAS[:: options.every], toy.LRS[:: options.every])
        images = (data.mnist(), data.fashion_mnist())
        toy.run(results, toy.Toy(), *images, range(options.seeds), *grid)
        verdict = verdicts.toy(results)
        print(verdicts.toy_text(verdict))
        figures.toy(results, path.with_suffix(".png"))
        common.write_results("study-toy", {"machine": common.machine(), **verdict})


def _lm(options: argparse.Namespace) -> None:
    for model in options.models or lm.TASKS:
        with _alone(model) as path:
            results = lm.table(path)
            lm.run(results, lm.TASKS[model](), options.methods, range(options.seeds))
            rows = verdicts.lm_rows(results)
            print(verdicts.lm_text(rows))
            figures.lm_study(results, rows, model, path.with_suffix(".png"))
            content = {"winners": verdicts.lm_winners(rows), "rows": rows}
            common.write_results(f"study-{model}", {"machine": common.machine(), **content})


@contextmanager
def _alone(study: str) -> Iterator[Path]:
    """The path of a study's table, for this process only."""
    data.DATA.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(data.DATA / f"study-{study}.lock", timeout=0):
            yield common.RESULTS / f"study-{study}.csv"
    except Timeout:
        sys.exit(f"another process is running the study {study}")


if __name__ == "__main__":
    main()
