"""What the tables of the studies say: paired differences with 95% intervals, and who wins."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.studies import lm
from benchmarks.studies.table import Row, Table, interval

SCORES = {"accuracy": 1, "loss": -1}
"""Each score's sign: which way is better."""

PAIRS = (("init_ab", "init_a"), ("init_ab_plus", "init_a"), ("init_ab", "init_ab_plus"))


def toy(results: Table) -> dict[str, Any]:
    """Of the toy study, over the seeds that are complete: for each pair of starts and each score,
    in how many (σ, lr) cells the first is better or worse beyond the interval over seeds (not
    corrected for their number), by how much at each lr and each σ, and between both ones' best.
    """
    found = {(row["seed"], row["init"], row["sigma"], row["lr"]): row for row in results.rows}
    cells = {cell[1:] for cell in found}
    seeds = [
        seed
        for seed in sorted({cell[0] for cell in found})
        if all((seed, *cell) in found for cell in cells)
    ]
    sigmas, lrs = (sorted({cell[i] for cell in cells} - {0}) for i in (1, 2))
    grid = list(itertools.product(seeds, sigmas, lrs))
    rows = []
    for score, sign in SCORES.items():
        of = {
            init: np.array([found[seed, init, s, lr][score] for seed, s, lr in grid]).reshape(
                len(seeds), len(sigmas), len(lrs)
            )
            for init in {init for pair in PAIRS for init in pair}
        }
        for one, other in PAIRS:
            gain = of[one] - of[other]
            each = [interval(gain[:, i, j]) for i in range(len(sigmas)) for j in range(len(lrs))]
            # A cell that diverged is no one's best.
            means = [sign * of[init].mean(0) for init in (one, other)]
            bests = [np.unravel_index(np.nanargmax(mean), mean.shape) for mean in means]
            between = of[one][:, *bests[0]] - of[other][:, *bests[1]]
            rows.append(
                {
                    "pair": f"{one} − {other}",
                    "score": score,
                    "cells": len(each),
                    "better": sum(sign * mean > half for mean, half in each),
                    "worse": sum(-sign * mean > half for mean, half in each),
                    "all": interval(gain.mean((1, 2))),
                    "by_lr": {lr: interval(gain[:, :, j].mean(1)) for j, lr in enumerate(lrs)},
                    "by_sigma": {s: interval(gain[:, i].mean(1)) for i, s in enumerate(sigmas)},
                    "best_cells": [(sigmas[i], lrs[j]) for i, j in bests],
                    "best": interval(between),
                }
            )
    references = {
        init: {
            score: interval([found[seed, init, 0, 0][score] for seed in seeds]) for score in SCORES
        }
        for init in ("mnist", "none")
    }
    return {"seeds": len(seeds), "references": references, "rows": rows}


def toy_text(verdict: dict[str, Any]) -> str:
    lines = []
    for row in verdict["rows"]:
        digits = 4 if row["score"] == "accuracy" else 3
        lines.append(
            f"{row['pair']}, {row['score']}: better in {row['better']}, worse in {row['worse']} of "
            f"{row['cells']} cells; mean {_show(row['all'], digits)}; at their best "
            f"{_show(row['best'], digits)} (σ, lr = {row['best_cells'][0]} and "
            f"{row['best_cells'][1]})"
        )
        for key in ("by_lr", "by_sigma"):
            parts = (f"{at:g}: {_show(value, digits)}" for at, value in row[key].items())
            lines.append(f"  {key}: " + ", ".join(parts))
    return "\n".join(lines)


def lm_rows(results: Table, baseline: str = "lora") -> list[dict[str, Any]]:
    """Of a language model: each method at its best learning rate by validation loss, best first:
    its test scores, and their differences from the baseline's, seed by seed.
    """
    names = sorted({row["method"] for row in results.rows})
    best = {name: lm.best_lr(results, name) for name in names}
    runs = {name: _by_seed(lm.finals(results, method=name, lr=best[name])) for name in names}
    rows = []
    for name in names:
        tried = sorted({row["lr"] for row in results.select(method=name)})
        row: dict[str, Any] = {
            "method": name,
            "lr": best[name],
            "lrs": tried,
            "inside": len(tried) == 1 or best[name] not in (tried[0], tried[-1]),
            "seeds": len(runs[name]),
            "val_loss": interval([run["val_loss"] for run in runs[name].values()]),
        }
        for score in SCORES:
            key = f"test_{score}"
            row[key] = interval([run[key] for run in runs[name].values()])
            row[f"{key}_over_{baseline}"] = interval(
                [
                    run[key] - runs[baseline][seed][key]
                    for seed, run in runs[name].items()
                    if seed in runs[baseline]
                ]
            )
        rows.append(row)
    return sorted(rows, key=lambda row: row["test_loss"][0])


def lm_text(rows: Sequence[dict[str, Any]], baseline: str = "lora") -> str:
    lines = [
        f"{'method':<15} {'best lr':>8} {'test loss':>18} {f'over {baseline}':>20} "
        f"{'accuracy':>16} {f'over {baseline}':>18}"
    ]
    for row in rows:
        edge = "" if row["inside"] else " (at an end of the ladder)"
        lines.append(
            f"{row['method']:<15} {row['lr']:>8g} {_show(row['test_loss'], 4):>18} "
            f"{_show(row[f'test_loss_over_{baseline}'], 4):>20} "
            f"{_show(row['test_accuracy'], 3):>16} "
            f"{_show(row[f'test_accuracy_over_{baseline}'], 3):>18}{edge}"
        )
    return "\n".join([*lines, *lm_winners(rows, baseline)])


def lm_winners(rows: Sequence[dict[str, Any]], baseline: str = "lora") -> list[str]:
    """One sentence for each score: who beats the baseline beyond the interval, who loses to it."""
    sentences = []
    for score, sign in SCORES.items():
        others = [row for row in rows if row["method"] not in (baseline, "none")]
        of = {row["method"]: row[f"test_{score}_over_{baseline}"] for row in others}
        wins = [name for name, (mean, half) in of.items() if sign * mean > half]
        loses = [name for name, (mean, half) in of.items() if -sign * mean > half]
        sentences.append(
            f"test {score}: better than {baseline} beyond 95%: {', '.join(wins) or 'none'}; "
            f"worse: {', '.join(loses) or 'none'}"
        )
    return sentences


def _by_seed(rows: Sequence[Row]) -> dict[int, Row]:
    return {row["seed"]: row for row in rows}


def _show(value: tuple[float, float], digits: int) -> str:
    return f"{value[0]:+.{digits}f} ± {value[1]:.{digits}f}"
