"""The studies' figures. Needs matplotlib."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.studies import lm
from benchmarks.studies.table import Table, interval
from benchmarks.studies.toy import INITS


def toy(results: Table, path: Path) -> None:
    """Heat maps over (lr, σ) of the mean over seeds: test loss and accuracy of each start, and what
    init_ab has over init_a.
    """
    sigmas, lrs = (sorted({row[key] for row in results.rows} - {0}) for key in ("sigma", "lr"))
    figure, axes = pyplot.subplots(2, 4, figsize=(16, 8), constrained_layout=True)
    for row, (score, colours) in enumerate({"loss": "viridis_r", "accuracy": "viridis"}.items()):
        cells: dict[tuple[Any, ...], list[float]] = {}
        for run in results.rows:
            cells.setdefault((run["init"], run["sigma"], run["lr"]), []).append(run[score])
        grids = {
            init: [[statistics.fmean(cells[init, s, lr]) for lr in lrs] for s in sigmas]
            for init in INITS
        }
        low, high = (f(v for g in grids.values() for r in g for v in r) for f in (min, max))
        for axis, init in zip(axes[row], INITS, strict=False):
            title = f"{init}: test {score}"
            _heat_map(axis, title, grids[init], sigmas, lrs, cmap=colours, vmin=low, vmax=high)
        difference = [
            [ab - a for ab, a in zip(*pair, strict=True)]
            for pair in zip(grids["init_ab"], grids["init_a"], strict=True)
        ]
        most = max(abs(value) for line in difference for value in line)
        signed = {"cmap": "RdBu" if score == "accuracy" else "RdBu_r", "vmin": -most, "vmax": most}
        _heat_map(axes[row][3], f"{score}: init_ab − init_a", difference, sigmas, lrs, **signed)
    _save(figure, path)


def _heat_map(
    axis: Axes,
    title: str,
    grid: list[list[float]],
    sigmas: Sequence[float],
    lrs: Sequence[float],
    **options: Any,
) -> None:
    image = axis.imshow(grid, aspect="auto", **options)
    axis.set_xticks(range(len(lrs)), [f"{lr:.0e}" for lr in lrs], rotation=60, fontsize=7)
    axis.set_yticks(range(len(sigmas)), [f"{s:.0e}" for s in sigmas], fontsize=7)
    axis.set(title=title, xlabel="lr", ylabel="σ")
    axis.figure.colorbar(image, ax=axis)


def lm_study(results: Table, verdict: Sequence[dict[str, Any]], name: str, path: Path) -> None:
    """Validation loss across learning rates, training loss at each method's best, and there its
    test loss beside plain LoRA's, seed by seed, with 95% intervals.
    """
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(17, 5.5), constrained_layout=True
    )
    adapted = [row for row in verdict if row["method"] != "none"]
    for i, row in enumerate(sorted(adapted, key=lambda row: row["method"])):
        method = row["method"]
        style = {"color": f"C{i % 10}", "ls": "-" if i < 10 else "--", "label": method}
        points = [
            (lr, *interval([run["val_loss"] for run in lm.finals(results, method=method, lr=lr)]))
            for lr in row["lrs"]
        ]
        left.plot([p[0] for p in points], [p[1] for p in points], marker=".", **style)
        steps: dict[int, list[float]] = {}
        for run in results.select(method=method, lr=row["lr"]):
            steps.setdefault(run["step"], []).append(run["train_loss"])
        middle.plot(list(steps), [statistics.fmean(each) for each in steps.values()], **style)
    finite = [row["val_loss"][0] for row in adapted]
    spread = max(finite) - min(finite)
    left.set(xscale="log", xlabel="lr", ylabel="validation loss", title=f"{name}: every lr")
    left.set_ylim(min(finite) - 0.1 * spread, max(finite) + 2 * spread)
    middle.set(xlabel="step", ylabel="training loss", title="each method at its best lr")
    middle.legend(fontsize=8)
    for place, row in enumerate(reversed(adapted)):
        mean, half = row["test_loss_over_lora"]
        right.errorbar(mean, place, xerr=half, fmt="o", color="C0", capsize=3)
    right.axvline(0, color="0.7", lw=1)
    right.set_yticks(range(len(adapted)), [f"{r['method']}, {r['lr']:g}" for r in adapted[::-1]])
    seeds = max(row["seeds"] for row in adapted)
    right.set(xlabel=f"test loss − lora's, {seeds} seeds paired, 95%", title="at its best lr")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
