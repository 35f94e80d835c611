"""PEFT models: initialise, save for the original base, resume. The only code that touches them."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from peft import PeftModel
from torch import Tensor

from lora_init.cache import CacheOption
from lora_init.calibration import Calibration
from lora_init.checkpoints import Start, read_start
from lora_init.distributed import Ranks, ranks
from lora_init.engine import GroupBytes
from lora_init.factors import Factors, LoraInitError, Residual, weight_digest
from lora_init.integrations.peft.data import check_calibration, check_runnable, data_of
from lora_init.integrations.peft.fusion import FuseReport, fuse, unfuse
from lora_init.integrations.peft.layers import (
    LoraLinear,
    any_sharded,
    check_adapter,
    commit,
    deferred_interrupt,
    initialisable_modules,
    lora_config,
    on,
    settle_ranks,
)
from lora_init.integrations.peft.residual_model import (
    ResidualModel,
    attach,
    check_base,
    check_same_layers,
    detach,
    note_replaced,
    other_tensors,
)
from lora_init.integrations.peft.sharded import reshard
from lora_init.integrations.peft.shares import ALIKE, Solved, describe, dropout, read, solve
from lora_init.methods import Layer, Method, resolve_method
from lora_init.parallel import map_layers
from lora_init.report import WEIGHT_DECAY_NOTE, Report, first_output, relative_drift, start_note
from lora_init.staging import merged_into, move_into

__all__ = ["FuseReport", "fuse", "initialize", "resume", "save_adapter", "unfuse"]

T = TypeVar("T")


def initialize(
    model: PeftModel,
    method: str | Method = "inilora",
    *,
    adapter_name: str | None = None,
    residual: Literal["stored", "virtual"] = "stored",
    calibration: Calibration | None = None,
    seed: int = 0,
    cache: CacheOption = "auto",
    progress: bool | None = None,
    group_bytes: GroupBytes = "auto",
    example: Mapping[str, Tensor] | Tensor | None = None,
    distributed: bool = True,
    **options: Any,
) -> Report:
    """Initialise a PEFT model's LoRA adapter in place, all layers concurrently.

    Every LoRA layer on an `nn.Linear` or `Conv1D` gets factors of its own rank, scaling and dtype
    (`r`, `lora_alpha`, `use_rslora`, `rank_pattern`, `alpha_pattern`). Where the method says so its
    base weight becomes R = W − s·B₀A₀; from then on this model's `save_pretrained` writes a plain
    LoRA for the *original* base (see `save_adapter`) with `lora_init/` beside it, and its
    `load_adapter` restores from there: Trainer checkpoints, the best model at the end and resumed
    runs are right by themselves.

    With `residual="virtual"` the base weights are not touched: the layer computes
    W x + s(B A − B₀A₀) x, which is W x to the last bit at the start, whatever the dropout. Then
    `disable_adapter()` is the base model, `merge_adapter` adds s(B A − B₀A₀), several adapters can
    be initialised on one base, and so can tied weights and 4- and 8-bit bitsandbytes bases (the
    solve sees the dequantised weight, the forward pass the quantised layer). It costs the low-rank
    work a second time, which `fuse` makes small.

    In a torch.distributed job all ranks call this at the same place: each solves its share of the
    layers and gets all factors, with the same bits on every rank and as in one process. That works
    on plain models before DistributedDataParallel wraps them, on parameters that FSDP2
    (`fully_shard`) or DeepSpeed ZeRO-3 has sharded, and must come before DeepSpeed makes its
    optimizer, which copies the parameters. Ranks whose calls, layers or base weights differ all get
    one error, and so do all if one of them fails.

    Args:
        model: from `peft.get_peft_model`; not merged, its base not changed by another
            initialisation.
        method: a name from `lora_init.methods()` or a method object.
        adapter_name: the active adapter if None.
        residual: "stored" in the base weights, or "virtual"; of no effect on a method that has no
            residual.
        calibration: the data for a method that starts from data, which runs through the pretrained
            model (no adapter, eval mode) and leaves it as it was. See `lora_init.Calibration`.
        seed, cache, progress, group_bytes, options: see `lora_init.approximate`.
        example: a batch (a mapping of keyword arguments, or one tensor) to measure the output's
            drift on; the largest of the ranks is reported.
        distributed: False solves everything on this rank alone, for ranks that hold different
            models or are not all here; its parameters must not be sharded then.

    Returns:
        A `Report`; print it for the table.

    Raises:
        LoraInitError: naming the layer, the value and the way out; the model is then as it was, on
            every rank.
    """
    began = time.perf_counter()

    def prepare() -> tuple[Method, Residual, str, dict[str, LoraLinear], dict[str, str]]:
        if residual not in ("stored", "virtual"):
            raise LoraInitError(f'residual must be "stored" or "virtual", got {residual!r}')
        chosen = resolve_method(method, options)
        check_calibration(chosen, calibration)
        _check_replacing(chosen, residual, job.size)
        kind = residual if chosen.residual else chosen.kind
        adapter = check_adapter(model, adapter_name)
        check_base(model, kind)
        modules = _modules(model, adapter, kind, distributed)
        call = {
            "the method": chosen.name,
            "its options": str(dataclasses.asdict(chosen)),
            "the residual": str(kind),
            "the seed": str(seed),
            "the adapter": adapter,
            "the example": "none" if example is None else "given",
        }
        if calibration is not None:
            check_runnable(model)
            if chosen.needs == "training" and job.size > 1:
                raise LoraInitError(
                    f"{chosen.name} trains all layers together, which ranks do not share: pass "
                    "distributed=False on each"
                )
            if job.size > 1:
                call["the content of the calibration batches"] = calibration.digest
                call["the calibration's token_mask"] = calibration.token_mask
        return chosen, kind, adapter, modules, call | describe(job, modules, adapter)

    with ranks(distributed) as job:
        chosen, kind, adapter, modules, description = job.together(prepare)
        job.agree(description, ALIKE)
        solved = solve(
            job,
            modules,
            adapter,
            chosen,
            kind,
            data_of(model, modules, calibration, progress if job.rank == 0 else False),
            seed=seed,
            cache=cache,
            progress=progress,
            group_bytes=group_bytes,
        )
        stored = [layer.stored for layer in solved]
        adapted = [x for x in solved if x.stored.r]  # those of rank 0 lose their adapter
        layers, kept = [x.layer for x in adapted], [x.stored for x in adapted]
        start = Start.of(chosen, seed, layers, kept, kind == "virtual")

        def forward() -> Tensor:
            return _output(model, example)

        # Sharded models compute together: a rank that failed would not be waited for by the others.
        run = _alone if any_sharded(modules.values(), adapter) else job.together
        before = None
        if example is not None:
            with model.disable_adapter():
                before = run(forward)

        # Before the weights are written: the model knows of them when Ctrl-C takes effect.
        reports = [layer.report for layer in solved]
        note = start_note(reports, kind)
        notes = [note] if note else []
        if kind is None or kind == "replaced":
            detach(model, adapter)
        else:
            attach(model, adapter, start)
            notes.append(WEIGHT_DECAY_NOTE)
        # PEFT would otherwise run another initialisation over these factors when it rebuilds the
        # adapter.
        lora_config(model, adapter).init_lora_weights = True
        changed = _changed_ranks(modules, adapter, stored)
        with deferred_interrupt():
            commit(list(modules.values()), stored, adapter, kind)
            if kind == "replaced":
                note_replaced(model, chosen.name)
            if changed:
                notes.append(changed)
                settle_ranks(model, adapter, modules)
        if kind == "stored" and job.rank == 0:
            _warn_dropout(solved, modules, adapter)
        drift = None
        if before is not None:
            drift = max(job.gather(relative_drift(run(forward), before)))
    seconds = time.perf_counter() - began
    return Report(chosen.name, dataclasses.asdict(chosen), seed, seconds, reports, drift, notes)


def save_adapter(
    model: PeftModel,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
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
        state_dict: all of the model's, where FSDP2 or ZeRO-3 sharded it: what
            `accelerator.get_state_dict(model)` returns. Call this on one rank only.

    Raises:
        LoraInitError: the directory cannot be written, or parameters are sharded and no whole
            `state_dict` is given.
    """
    adapter = check_adapter(model, adapter_name)
    with merged_into(Path(directory)) as staging:
        if isinstance(model, ResidualModel):
            model._save_plain(staging, [adapter], model._whole_state(state_dict))
        else:
            model.save_pretrained(str(staging), selected_adapters=[adapter], state_dict=state_dict)
        if adapter != "default":  # PEFT gives every other adapter a folder of its own
            move_into(staging / adapter, staging)


def resume(
    model: PeftModel,
    checkpoint: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    distributed: bool = True,
) -> None:
    """Continue from a checkpoint of an initialised model: rebuild R from its A₀, B₀, stored or
    virtual as it was, never solve again.

    Args:
        model: a PEFT model on the *original* base with the run's LoRA config, or one initialised
            the same way.
        checkpoint: a directory that this model's `save_pretrained` (or a Trainer) wrote; every rank
            reads it.
        adapter_name: the active adapter if None.
        distributed: as for `initialize`.

    Raises:
        LoraInitError: it is no such checkpoint, or of another base, config or start; the model is
            then as it was, on every rank.
    """

    def prepare() -> tuple[str, Start, dict[str, Tensor], dict[str, Tensor], dict[str, LoraLinear]]:
        adapter = check_adapter(model, adapter_name)
        start, current = read_start(checkpoint)
        others = other_tensors(Path(checkpoint), start, current)
        if isinstance(model, ResidualModel) and adapter in model.lora_init_starts:
            return adapter, start, current, others, {}
        kind = _kind(start)
        check_base(model, kind)
        modules = _modules(model, adapter, kind, distributed)
        check_same_layers(start, modules, adapter, checkpoint)
        return adapter, start, current, others, modules

    with ranks(distributed) as job:
        adapter, start, current, others, modules = job.together(prepare)
        factors = [t for layer in start.layers.values() for t in (layer.A0, layer.B0)]
        description = {"the adapter": adapter, "the start's digest": weight_digest(*factors)}
        job.agree(description | job.together(lambda: describe(job, modules, adapter)), ALIKE)
        if modules:
            _rebuild(job, model, adapter, modules, start, checkpoint)
        assert isinstance(model, ResidualModel)
        model._restore(adapter, start, current, others, checkpoint)


def _rebuild(
    job: Ranks,
    model: PeftModel,
    adapter: str,
    modules: Mapping[str, LoraLinear],
    start: Start,
    source: str | os.PathLike[str],
) -> None:
    """Make a model start where a checkpoint did: its base the residual, stored or virtual."""
    kind = _kind(start)
    own = read(job, modules, adapter)

    def check(layer: Layer) -> None:
        expected = start.layers[layer.name]
        if layer.digest != expected.base_digest:
            raise LoraInitError(
                f"{layer.name}: the base weight is not the one that {source} started from "
                f"(it was {expected.base_dtype}, this is "
                f"{str(layer.weight.dtype).removeprefix('torch.')}): load that base model, in "
                f"that dtype, with no other initialisation on it"
            )
        if kind == "stored":  # every residual fits before the first one is written
            factors = Factors(expected.A0, expected.B0, expected.scaling)
            on(layer.weight.device, factors).residual(layer.weight, layer.name)

    job.together(lambda: map_layers(check, list(own.values())))
    factors = dict(zip(start.layers, start.factors(), strict=True))
    attach(model, adapter, start)
    lora_config(model, adapter).init_lora_weights = True
    commit(list(modules.values()), [factors[name] for name in modules], adapter, kind)


def _kind(start: Start) -> Residual:
    return "virtual" if start.virtual else "stored"


def _modules(
    model: PeftModel, adapter: str, residual: Residual, distributed: bool
) -> dict[str, LoraLinear]:
    reshard(model)
    modules = initialisable_modules(model, adapter, residual)
    if not distributed and any_sharded(modules.values(), adapter):
        raise LoraInitError(
            "distributed=False, but the parameters of this model are sharded over ranks, which "
            "must read them together: leave distributed=True"
        )
    return modules


def _check_replacing(method: Method, residual: str, ranks: int) -> None:
    if method.replaces and residual == "virtual":
        raise LoraInitError(
            f'{method.name} replaces the weights of the base, which residual="virtual" leaves as '
            "they are: leave that out, or choose another method"
        )
    if method.replaces and ranks > 1:
        raise LoraInitError(
            f"{method.name} replaces the weights of the base, which ranks do not send each other: "
            "pass distributed=False on each"
        )


def _changed_ranks(
    modules: Mapping[str, LoraLinear], adapter: str, stored: Sequence[Factors]
) -> str | None:
    """What is to be known of layers whose factors have another rank than they."""
    pairs = zip(modules.values(), stored, strict=True)
    ranks = [new.r for module, new in pairs if module.r[adapter] != new.r]
    if not ranks:
        return None
    lost = f", {ranks.count(0)} of them 0 and no adapter" if 0 in ranks else ""
    return (
        f"{len(ranks)} of {len(stored)} layers got another rank{lost}: an optimizer that was made "
        "before has parameters that are gone"
    )


def _output(model: PeftModel, example: Any) -> Tensor:
    output = first_output(model, example)
    reshard(model)
    return output


def _alone(function: Callable[[], T]) -> T:
    return function()


def _warn_dropout(
    solved: Sequence[Solved], modules: Mapping[str, LoraLinear], adapter: str
) -> None:
    worst = max(solved, key=lambda layer: layer.noise)
    if worst.noise:
        name = worst.layer.name
        warnings.warn(
            f"lora_dropout={dropout(modules[name], adapter):g} adds noise of {worst.noise:.1%} to "
            f"the output of {name} at step 0, because s·B₀A₀ is no longer 0: set lora_dropout=0; "
            f"and {WEIGHT_DECAY_NOTE}",
            stacklevel=3,
        )
