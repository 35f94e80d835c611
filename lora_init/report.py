"""How an initialisation went: the self-check of every layer, a table, JSON and a plot."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_init.factors import Factors, LoraInitError, Residual
from lora_init.methods import Layer, Method
from lora_init.parallel import map_layers

WEIGHT_DECAY_NOTE = (
    "train A and B with weight_decay=0: decay pulls B·A to 0, away from the A₀, B₀ that the "
    "residual is made for"
)
# Of a start on the base as it is: what rounding makes of a B·A that is to be 0 (orthogonal).
START_ROUNDING = 1e-6
# Relative distance ‖R + s·BA − W‖/‖W‖ of the start from the pretrained layer. Rounding alone
# explains 1e-7 (fp32) to 3e-3 (bf16) with factors of W's size; IniLoRA-α on a bf16 base reaches
# 6e-2 at r = 8.
WARN_START_DRIFT = 1e-2
MAX_START_DRIFT = 1e-1
# Work above which the Eckart–Young bound is left out: an SVD costs about out·in·min(out, in).
_BOUND_WORK = 2e10


@dataclass(frozen=True)
class LayerReport:
    """One layer after initialisation.

    Attributes:
        loss: mean((W − s·BA)²), from a pass over W with the factors as stored.
        relative_error: ‖W − s·BA‖_F / ‖W‖_F.
        start_error: largest |R + s·BA − W|, R being the base as it is stored: W for methods that
            leave it, Q for those that replace it.
        start_drift: ‖R + s·BA − W‖_F / ‖W‖_F: rounding, unless the method leaves the base and
            starts from BA ≠ 0.
        bound: the smallest relative_error that rank r allows (Eckart–Young), if it was computed.
        info: from the solver (steps, trace, ...).
    """

    name: str
    shape: tuple[int, int]
    r: int
    scaling: float
    loss: float
    relative_error: float
    start_error: float
    start_drift: float
    bound: float | None = None
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What `initialize` and `lora-init run` did. `print(report)` is the table; `to_dict()` is
    JSON-able.

    Attributes:
        output_drift: largest |Δ output| over the largest |output| on the example batch, if one was
            given.
        notes: what the user should know.
        stream: of a run on a checkpoint: `groups` that this process solved, `peak_bytes` they took
            at most, `target_bytes` of all weights that were adapted, and `survey_seconds` and
            `solve_seconds` of reading them, once for each.
    """

    method: str
    options: dict[str, Any]
    seed: int
    seconds: float
    layers: list[LayerReport]
    output_drift: float | None = None
    notes: list[str] = field(default_factory=list)
    stream: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Report:
        layers = [
            LayerReport(**layer | {"shape": tuple(layer["shape"])}) for layer in content["layers"]
        ]
        return cls(**content | {"layers": layers})

    def __str__(self) -> str:
        header = ("layer", "shape", "r", "s", "steps", "loss", "error", "bound", "start drift")
        rows = [
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                str(layer.r),
                f"{layer.scaling:g}",
                "cached" if layer.info.get("cached") else str(layer.info.get("steps", "-")),
                f"{layer.loss:.3e}",
                f"{layer.relative_error:.4f}",
                "-" if layer.bound is None else f"{layer.bound:.4f}",
                f"{layer.start_drift:.1e}",
            )
            for layer in self.layers
        ]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in [header, *rows]
        ]
        lines.insert(1, "-" * len(lines[0]))
        solved = sum(not layer.info.get("cached") for layer in self.layers)
        summary = (
            f"{self.method}: {len(self.layers)} layers ({solved} solved, "
            f"{len(self.layers) - solved} from the cache) "
            f"in {self.seconds:.1f} s; worst start drift "
            f"{max(layer.start_drift for layer in self.layers):.1e}"
        )
        if self.output_drift is not None:
            summary += f"; output drift {self.output_drift:.1e}"
        return "\n".join([*lines, summary, *(f"note: {note}" for note in self.notes)])

    def plot(self, path: str | Path) -> None:
        """A PNG: loss against step, each layer's error against its bound, and the start's drift.
        Needs matplotlib.
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.lines import Line2D

        figure, (left, middle, right) = pyplot.subplots(
            1, 3, figsize=(17, 5), constrained_layout=True
        )
        types = sorted({layer.name.rpartition(".")[2] for layer in self.layers})
        colours = {t: f"C{i % 10}" for i, t in enumerate(types)}
        for layer in self.layers:
            trace = layer.info.get("trace")
            if trace:
                left.plot(
                    *zip(*trace, strict=True),
                    color=colours[layer.name.rpartition(".")[2]],
                    alpha=0.5,
                    lw=1,
                )
        left.set(
            xlabel="step",
            ylabel="mean((W − BA)²)",
            yscale="log",
            title="true loss, one line a layer",
        )
        left.legend(handles=[Line2D([], [], color=c, label=t) for t, c in colours.items()])

        index = range(len(self.layers))
        middle.scatter(
            index,
            [layer.relative_error for layer in self.layers],
            c=[colours[layer.name.rpartition(".")[2]] for layer in self.layers],
            s=18,
            label="this start",
        )
        if all(layer.bound is not None for layer in self.layers):
            bounds = [layer.bound for layer in self.layers]
            middle.scatter(
                index, bounds, marker="_", color="black", s=60, label="Eckart–Young bound"
            )
        middle.set(
            xlabel="layer",
            ylabel="‖W − s·BA‖ / ‖W‖",
            title="error per layer against the best of its rank",
        )
        middle.legend()

        right.scatter(
            index,
            [layer.start_drift for layer in self.layers],
            color="C3",
            s=18,
            label="‖R + s·BA − W‖ / ‖W‖",
        )
        if self.output_drift is not None:
            right.axhline(self.output_drift, color="black", ls="--", label="model output, relative")
        right.set(xlabel="layer", title="drift from the pretrained model at step 0")
        if any(layer.start_drift for layer in self.layers):
            right.set_yscale("log")
        right.legend()
        figure.suptitle(f"{self.method}: {len(self.layers)} layers, {self.seconds:.1f} s")
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def self_check(
    layers: Sequence[Layer], factors: Sequence[Factors], method: Method
) -> list[LayerReport]:
    """`measure`, then `judge`: before any model or file is changed.

    Raises:
        LoraInitError: a residual overflows its dtype, or a start is further than `MAX_START_DRIFT`
            from W.
    """
    residual = method.kind
    reports = measure(layers, factors, residual)
    judge(reports, layers, residual)
    return reports


def measure(
    layers: Sequence[Layer], factors: Sequence[Factors], residual: Residual
) -> list[LayerReport]:
    """Report on each layer from its weight and its factors *as stored*.

    Raises:
        LoraInitError: a residual overflows its dtype.
    """

    def one(item: tuple[Layer, Factors]) -> LayerReport:
        layer, stored = item
        weight = layer.weight
        fit = stored.fit(weight, layer.name, residual)
        norm = math.sqrt(fit.energy)
        return LayerReport(
            name=layer.name,
            shape=(weight.shape[0], weight.shape[1]),
            r=stored.r,
            scaling=stored.scaling,
            loss=fit.squares / weight.numel(),
            relative_error=math.sqrt(fit.squares) / norm if norm else 0.0,
            start_error=fit.start_error,
            start_drift=fit.start_drift,
            info=stored.info,
        )

    pairs = list(zip(layers, factors, strict=True))
    return map_layers(one, pairs, cost=lambda pair: pair[0].weight.numel())


def judge(
    reports: Sequence[LayerReport],
    layers: Sequence[Layer],
    residual: Residual,
    warn: bool = True,
) -> None:
    """Warn of the worst start if its stored residual is further than `WARN_START_DRIFT` from W
    (unless not `warn`). A start that is not meant to be W is only reported.

    Args:
        layers: of the reports at least; only their names and dtypes are looked at.

    Raises:
        LoraInitError: it is further than `MAX_START_DRIFT` away.
    """
    if residual != "stored":
        return
    worst = max(reports, key=lambda report: report.start_drift)
    dtype = next(layer.weight.dtype for layer in layers if layer.name == worst.name)
    message = (
        f"{worst.name}: stored in {dtype}, the residual starts {worst.start_drift:.1%} away from "
        "the pretrained weight "
        f"(‖R + s·BA − W‖/‖W‖): keep this base in float32, or choose a smaller start"
    )
    if worst.start_drift > MAX_START_DRIFT:
        raise LoraInitError(message)
    if warn and worst.start_drift > WARN_START_DRIFT:
        warnings.warn(message, stacklevel=4)


def start_note(reports: Sequence[LayerReport], residual: Residual) -> str | None:
    """What to know of a start that is not the pretrained model, or of a base that is no longer its
    own.
    """
    worst = max(reports, key=lambda report: report.start_drift)
    if residual == "replaced":
        return (
            "the base is no longer the pretrained one: training starts from Q + s·B₀A₀, where Q is "
            f"what replaced W, up to {worst.start_drift:.1e} of ‖W‖ away ({worst.name}); save the "
            "base model too, as the adapter fits no other (after the adapter: model.unload() gives "
            "the base, and leaves nothing of the adapter)"
        )
    if residual is not None or worst.start_drift <= START_ROUNDING:
        return None
    return (
        "training starts from W + s·B₀A₀, not from the pretrained model: ‖s·B₀A₀‖ is up to "
        f"{worst.start_drift:.1e} of ‖W‖ ({worst.name})"
    )


def first_output(model: Any, batch: Mapping[str, Tensor] | Tensor) -> Tensor:
    """A model's logits, or its first output where it has none, in fp32 or wider.

    Run in eval mode and without autograd; which modules were training is left as found.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for module in training:
            module.training = True
    if not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
        output = output[0] if logits is None else logits
    return output if output.dtype == torch.float64 else output.float()


def relative_drift(after: Tensor, before: Tensor) -> float:
    """max|after − before| / max|before|."""
    scale = before.abs().max().clamp(min=torch.finfo(before.dtype).tiny)
    return float((after - before).abs().max() / scale)


def bounds_affordable(weights: Sequence[Tensor]) -> bool:
    """Whether `eckart_young` would take no longer than minutes for all these weights together."""
    return sum(w.numel() * min(w.shape) for w in weights) <= _BOUND_WORK


def eckart_young(weights: Sequence[Tensor], ranks: Sequence[int]) -> list[float] | None:
    """√(Σ_{i>r} σᵢ² / Σ σᵢ²) per weight, the least relative error of rank r; None if the SVDs would
    take minutes.
    """
    if not bounds_affordable(weights):
        return None

    def one(item: tuple[Tensor, int]) -> float:
        weight, r = item
        squares = torch.linalg.svdvals(weight.to(torch.float64)).square()
        return float(
            (squares[r:].sum() / squares.sum().clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
        )

    return map_layers(
        one, list(zip(weights, ranks, strict=True)), cost=lambda item: item[0].numel()
    )
