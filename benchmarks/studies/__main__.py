"""Run a study, or what is missing of it, and write its verdict and figure from its table.

python -m benchmarks.studies toy [--seeds 5] [--every 1]
"""

import argparse
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

import torch

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
    results = toy.table(common.RESULTS / "study-toy.csv")
    mnist, fashion = data.mnist(), data.fashion_mnist()
    grid = (toy.SIGMAS[:: options.every], toy.LRS[:: options.every])
    toy.run(results, toy.Toy(), mnist, fashion, range(options.seeds), *grid)
    verdict = verdicts.toy(results)
    print(verdicts.toy_text(verdict))
    figures.toy(results, results.path.with_suffix(".png"))
    common.write_results("study-toy", {"machine": common.machine(), **verdict})


def _lm(options: argparse.Namespace) -> None:
    for model in options.models or lm.TASKS:
        results = lm.table(common.RESULTS / f"study-{model}.csv")
        lm.run(results, lm.TASKS[model](), options.methods, range(options.seeds))
        rows = verdicts.lm_rows(results)
        print(verdicts.lm_text(rows))
        figures.lm_study(results, rows, model, results.path.with_suffix(".png"))
        content = {"machine": common.machine(), "winners": verdicts.lm_winners(rows), "rows": rows}
        common.write_results(f"study-{model}", content)


if __name__ == "__main__":
    main()
