"""Initialise a checkpoint on disk: only its adapted weights are read, no model is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor

from lora_init import engine
from lora_init.adapters import ADAPTER_FILE, adapter_key
from lora_init.cache import CacheOption, write_atomically
from lora_init.checkpoints import SIDECAR, Checkpoint, Start, write_residual, write_start
from lora_init.factors import Factors, LoraInitError
from lora_init.integrations.peft import WEIGHT_DECAY_NOTE
from lora_init.integrations.transformers import (
    Target,
    find_model,
    find_targets,
    meta_model,
    output_drift,
)
from lora_init.methods import Layer, Method, resolve_method
from lora_init.report import LayerReport, Report, eckart_young, self_check
from lora_init.staging import CheckFailed, require_space, staged

ADAPTER, RESIDUAL, REPORT, PLOT = "adapter", "residual", "report.json", "report.png"
OUTPUTS = (ADAPTER, RESIDUAL, REPORT, PLOT)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NO_RESIDUAL_NOTE = (
    "no residual was saved: this adapter starts right only through lora_init.resume(model, "
    "adapter) on a PEFT model of the original base"
)
# The check loads the original and the written model, one after the other.
_CHECK_BYTES = 4e9
_MAX_DRIFT = 1e-3


def initialize_checkpoint(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: str | Method = "inilora",
    *,
    r: int = 8,
    lora_alpha: int | None = None,
    use_rslora: bool = False,
    target_modules: list[str] | str | None = None,
    seed: int = 0,
    device: str = "auto",
    save_residual: bool = True,
    auto_class: str | None = None,
    check: bool | None = None,
    overwrite: bool = False,
    cache: CacheOption = "auto",
    progress: bool | None = None,
    **options: Any,
) -> Report:
    """Initialise a safetensors checkpoint without loading it; same bits as `lora_init.initialize`.

    `out` gets, all or nothing: `adapter/` (the step-0 PEFT adapter with its `lora_init/` sidecar),
    `residual/` (the model that it starts on; none for methods that leave the base as it is),
    `report.json` and `report.png`. Either train `adapter/` on `residual/` with stock PEFT, and then
    `export_adapter`; or `lora_init.resume(model, out/adapter)` on a PEFT model of the original.

    Args:
        model: a directory with safetensors weights, or a hub id that was downloaded before.
        out: a new or empty directory.
        method, seed, cache, progress, options: see `lora_init.approximate`.
        r, lora_alpha, use_rslora, target_modules: as in `peft.LoraConfig`; None means an alpha of
            r, and the modules that PEFT adapts by default in this type of model.
        device: to solve on; "auto" is CUDA where there is one.
        save_residual: False leaves `residual/` out, for use with `lora_init.resume` only.
        auto_class: e.g. "AutoModelForCausalLM"; the architecture that the config names if None.
        check: load original and outputs with stock libraries and compare what they compute; None
            means if the model takes less than 4 GB in fp32.
        overwrite: replace the outputs of an earlier run; all else in `out` stays.

    Raises:
        LoraInitError: naming the layer or file, the value and the way out; `out` is as it was.
        CheckFailed: the output of an fp32 model moved by more than 1e-3 of its largest value; `out`
            is as it was, and the files are kept beside it.
    """
    began = time.perf_counter()
    chosen = resolve_method(method, options)
    if r < 1:
        raise LoraInitError(f"r must be a whole number ≥ 1, got {r}")
    source, out = find_model(os.fspath(model)), Path(out).resolve()
    _check_apart(source, out)
    checkpoint = Checkpoint(source)
    config = LoraConfig(
        r=r,
        lora_alpha=r if lora_alpha is None else lora_alpha,
        use_rslora=use_rslora,
        target_modules=target_modules,
    )
    shapes = {key: entry.shape for key, entry in checkpoint.entries.items()}
    skeleton = meta_model(source, auto_class)
    targets = find_targets(skeleton, config, shapes)
    original = str(source) if Path(model).is_dir() else os.fspath(model)
    with_residual = chosen.residual and save_residual
    if with_residual:
        config.base_model_name_or_path = str(out / RESIDUAL)
    elif not chosen.residual:
        config.base_model_name_or_path = original

    with staged(out, OUTPUTS, overwrite) as stage:
        if with_residual:
            require_space(stage, checkpoint.size)
        layers = _layers(checkpoint, targets, r, seed, _device(device))
        solved = engine.solve(layers, chosen, cache=cache, progress=progress)
        stored = [solved[layer.name].to(torch.float32, layer.name) for layer in layers]
        reports = self_check(layers, stored, chosen)
        start, base = None, source
        if chosen.residual:
            start = dataclasses.replace(Start.of(chosen, seed, layers, stored), base_model=original)
            reports = _with_bounds(reports, layers)
        _write_adapter(stage / ADAPTER, config, layers, stored, start)
        if with_residual:
            base = stage / RESIDUAL
            write_residual(checkpoint, base, _residuals(targets, layers, stored))
        drift = None
        if check is None:
            check = 4 * checkpoint.elements < _CHECK_BYTES
        if check and with_residual == chosen.residual:
            # The widest dtype, so that nothing stored is rounded on loading.
            dtype = max((x.weight.dtype for x in layers), key=lambda dtype: torch.finfo(dtype).bits)
            drift = output_drift(type(skeleton), source, base, stage / ADAPTER, dtype)
            _check_drift(drift, dtype, stage)
        seconds = time.perf_counter() - began
        settings, notes = dataclasses.asdict(chosen), _notes(chosen, with_residual)
        report = Report(chosen.name, settings, seed, seconds, reports, drift, notes)
        write_atomically(stage / REPORT, json.dumps(report.to_dict(), indent=1).encode())
        report.plot(stage / PLOT)
    return report


def _check_drift(drift: float | None, dtype: torch.dtype, stage: Path) -> None:
    # Rounding a 16-bit residual alone moves the output by per cents; `self_check` has judged that.
    if drift is not None and torch.finfo(dtype).bits >= 32 and not drift <= _MAX_DRIFT:
        raise CheckFailed(
            f"the written model's output is {drift:.1e} away from the original's, more than "
            f"{_MAX_DRIFT:g}: no output was replaced, and what was written is kept in {stage}"
        )


def _notes(method: Method, with_residual: bool) -> list[str]:
    if not method.residual:
        return []
    return [WEIGHT_DECAY_NOTE] if with_residual else [_NO_RESIDUAL_NOTE, WEIGHT_DECAY_NOTE]


def _check_apart(source: Path, out: Path) -> None:
    if out.is_relative_to(source) or source.is_relative_to(out / RESIDUAL):
        raise LoraInitError(f"{out} and the model {source} lie in one another: write elsewhere")
    if source.name == RESIDUAL and (source.parent / ADAPTER / SIDECAR).is_file():
        raise LoraInitError(
            f"{source} is the residual of an earlier run: initialise the original model"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LoraInitError(f"device {name!r} cannot be used ({error})") from error
    return device


def _layers(
    checkpoint: Checkpoint, targets: Sequence[Target], r: int, seed: int, device: torch.device
) -> list[Layer]:
    layers = []
    for target in targets:
        weight = checkpoint.tensor(target.key).to(device)
        if weight.dtype not in _DTYPES:
            raise LoraInitError(
                f"{target.name}: its weight is stored as {weight.dtype}, which cannot hold a "
                f"residual: convert the model to bfloat16 or wider"
            )
        weight = weight.T if target.transposed else weight
        layers.append(Layer(target.name, weight, r, target.scaling, seed))
    return layers


def _residuals(
    targets: Sequence[Target], layers: Sequence[Layer], stored: Sequence[Factors]
) -> dict[str, Callable[[], Tensor]]:
    """Checkpoint key -> function giving R as it lies in the file."""

    def residual(target: Target, layer: Layer, factors: Factors) -> Tensor:
        R = factors.residual(layer.weight, layer.name)
        return R.T if target.transposed else R

    items = zip(targets, layers, stored, strict=True)
    return {item[0].key: partial(residual, *item) for item in items}


def _with_bounds(reports: list[LayerReport], layers: Sequence[Layer]) -> list[LayerReport]:
    bounds = eckart_young([layer.weight for layer in layers], [layer.r for layer in layers])
    if bounds is None:
        return reports
    return [dataclasses.replace(x, bound=b) for x, b in zip(reports, bounds, strict=True)]


def _write_adapter(
    directory: Path,
    config: LoraConfig,
    layers: Sequence[Layer],
    stored: Sequence[Factors],
    start: Start | None,
) -> None:
    modules: Any = config.target_modules
    if isinstance(modules, set):  # which PEFT would save in another order each time
        config.target_modules = sorted(modules)
    config.save_pretrained(str(directory))
    tensors: dict[str, Tensor] = {}
    current: dict[str, Tensor] = {}
    for layer, factors in zip(layers, stored, strict=True):
        for part, tensor in (("A", factors.A), ("B", factors.B)):
            dense = tensor.cpu().contiguous()
            tensors[adapter_key(layer.name, part)] = dense
            current[f"{layer.name}.{part}"] = dense
    write_atomically(directory / ADAPTER_FILE, save(tensors, {"format": "pt"}))
    if start:
        write_start(directory, start, current)
