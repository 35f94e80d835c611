"""PEFT models: initialise, save for the original base, resume. The only code that touches them."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor

from lora_init import engine
from lora_init.cache import CacheOption
from lora_init.checkpoints import Start, read_start
from lora_init.factors import Factors, LoraInitError
from lora_init.integrations.peft.layers import (
    LoraLinear,
    base_weight,
    check_adapter,
    commit,
    initialisable_modules,
    lora_config,
)
from lora_init.integrations.peft.residual_model import (
    ResidualModel,
    attach,
    check_same_layers,
    check_untouched,
    other_tensors,
)
from lora_init.methods import Layer, Method, resolve_method
from lora_init.parallel import map_layers
from lora_init.report import Report, first_output, relative_drift, self_check
from lora_init.staging import merged_into, move_into

WEIGHT_DECAY_NOTE = (
    "train A and B with weight_decay=0: decay pulls B·A to 0, away from the A₀, B₀ that the base's "
    "residual is made for"
)


def initialize(
    model: PeftModel,
    method: str | Method = "inilora",
    *,
    adapter_name: str | None = None,
    seed: int = 0,
    cache: CacheOption = "auto",
    progress: bool | None = None,
    example: Mapping[str, Tensor] | Tensor | None = None,
    **options: Any,
) -> Report:
    """Initialise a PEFT model's LoRA adapter in place, all layers concurrently.

    Every LoRA layer on an `nn.Linear` or `Conv1D` gets factors of its own rank, scaling and dtype
    (`r`, `lora_alpha`, `use_rslora`, `rank_pattern`, `alpha_pattern`). Where the method says so its
    base weight becomes R = W − s·B₀A₀; from then on this model's `save_pretrained` writes a plain
    LoRA for the *original* base (see `save_adapter`) with `lora_init/` beside it, and its
    `load_adapter` restores from there: Trainer checkpoints, the best model at the end and resumed
    runs are right by themselves.

    Args:
        model: from `peft.get_peft_model`; not merged, its base not changed by another
            initialisation.
        method: a name from `lora_init.methods()` or a method object.
        adapter_name: the active adapter if None.
        seed, cache, progress, options: see `lora_init.approximate`.
        example: a batch (a mapping of keyword arguments, or one tensor) to measure the output's
            drift on.

    Returns:
        A `Report`; print it for the table.

    Raises:
        LoraInitError: naming the layer, the value and the way out; the model is then as it was.
    """
    began = time.perf_counter()
    chosen = resolve_method(method, options)
    adapter = check_adapter(model, adapter_name)
    check_untouched(model)
    modules = initialisable_modules(model, adapter, chosen.residual)
    layers = [
        Layer(name, base_weight(module), module.r[adapter], float(module.scaling[adapter]), seed)
        for name, module in modules.items()
    ]
    solved = engine.solve(layers, chosen, cache=cache, progress=progress)
    stored = [
        solved[name].to(module.lora_A[adapter].weight.dtype, name)
        for name, module in modules.items()
    ]
    reports = self_check(layers, stored, chosen)
    start = Start.of(chosen, seed, layers, stored)
    before = None
    if example is not None:
        with model.disable_adapter():
            before = first_output(model, example)

    commit(list(modules.values()), stored, adapter, chosen.residual)
    # PEFT would otherwise run another initialisation over these factors when it rebuilds the
    # adapter.
    lora_config(model, adapter).init_lora_weights = True
    notes = []
    if chosen.residual:
        attach(model, adapter, start)
        notes.append(WEIGHT_DECAY_NOTE)
        _warn_dropout(modules, stored, layers, adapter)
    drift = None
    if example is not None and before is not None:
        drift = relative_drift(first_output(model, example), before)
    seconds = time.perf_counter() - began
    return Report(chosen.name, dataclasses.asdict(chosen), seed, seconds, reports, drift, notes)


def save_adapter(
    model: PeftModel, directory: str | os.PathLike[str], adapter_name: str | None = None
) -> None:
    """Write the adapter as plain LoRA for the *original* base model, at any time during training.

    The update s(B_T A_T − B₀A₀) is a LoRA of rank 2r: A = [A_T; A₀], B = [s·B_T, −s·B₀], with s
    folded into B in fp32 so that its scaling is 1 everywhere, whatever the patterns and rsLoRA
    were. All other trained keys are kept. The files land in `directory` itself and load with stock
    `PeftModel.from_pretrained`.

    Args:
        model: a PEFT model, initialised by this package or not (its adapter is then saved as PEFT
            does).
        adapter_name: the active adapter if None.

    Raises:
        LoraInitError: the directory cannot be written.
    """
    adapter = check_adapter(model, adapter_name)
    with merged_into(Path(directory)) as staging:
        if isinstance(model, ResidualModel):
            model._save_plain(staging, [adapter])
        else:
            model.save_pretrained(str(staging), selected_adapters=[adapter])
        if adapter != "default":  # PEFT gives every other adapter a folder of its own
            move_into(staging / adapter, staging)


def resume(
    model: PeftModel, checkpoint: str | os.PathLike[str], adapter_name: str | None = None
) -> None:
    """Continue from a checkpoint of an initialised model: rebuild R from its A₀, B₀, never solve
    again.

    Args:
        model: a PEFT model on the *original* base with the run's LoRA config, or one initialised
            the same way.
        checkpoint: a directory that this model's `save_pretrained` (or a Trainer) wrote.
        adapter_name: the active adapter if None.

    Raises:
        LoraInitError: it is no such checkpoint, or of another base, config or start; the model is
            then as it was.
    """
    adapter = check_adapter(model, adapter_name)
    start, current = read_start(checkpoint)
    others = other_tensors(Path(checkpoint), start, current)
    if not (isinstance(model, ResidualModel) and adapter in model.lora_init_starts):
        check_untouched(model)
        modules = initialisable_modules(model, adapter, residual=True)
        check_same_layers(start, modules, adapter, checkpoint)
        layers = [
            Layer(name, base_weight(module), module.r[adapter]) for name, module in modules.items()
        ]
        for layer, digest in zip(
            layers, map_layers(lambda layer: layer.digest, layers), strict=True
        ):
            expected = start.layers[layer.name]
            if digest != expected.base_digest:
                raise LoraInitError(
                    f"{layer.name}: the base weight is not the one that {checkpoint} started from "
                    f"(it was {expected.base_dtype}, this is "
                    f"{str(layer.weight.dtype).removeprefix('torch.')}): load that base model, in "
                    f"that dtype, with no other initialisation on it"
                )
        factors = [
            Factors(x.A0.to(layer.weight.device), x.B0.to(layer.weight.device), x.scaling)
            for layer, x in ((layer, start.layers[layer.name]) for layer in layers)
        ]
        # Checks that every residual fits before the first one is written.
        map_layers(
            lambda pair: pair[1].residual(pair[0].weight, pair[0].name),
            list(zip(layers, factors, strict=True)),
        )
        commit(list(modules.values()), factors, adapter, residual=True)
        lora_config(model, adapter).init_lora_weights = True
        attach(model, adapter, start)
    assert isinstance(model, ResidualModel)
    model._restore(adapter, start, current, others, checkpoint)


def _warn_dropout(
    modules: Mapping[str, LoraLinear],
    stored: Sequence[Factors],
    layers: Sequence[Layer],
    adapter: str,
) -> None:
    noisy = [
        (factors.drift_under_dropout(layer.weight, p), layer.name, p)
        for layer, factors, module in zip(layers, stored, modules.values(), strict=True)
        if (p := float(getattr(module.lora_dropout[adapter], "p", 0.0))) > 0
    ]
    if noisy:
        drift, name, p = max(noisy)
        warnings.warn(
            f"lora_dropout={p:g} adds noise of {drift:.1%} to the output of {name} at step 0, "
            f"because s·B₀A₀ is no longer 0: set lora_dropout=0; and {WEIGHT_DECAY_NOTE}",
            stacklevel=3,
        )
