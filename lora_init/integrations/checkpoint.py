"""Initialise a checkpoint on disk, its adapted weights a few at a time; no model is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lora_init.adapters import ADAPTER_FILE, adapter_key
from lora_init.cache import CacheOption, open_cache, write_atomically
from lora_init.checkpoints import SIDECAR, Checkpoint, Start, Target, copy_other_files, write_start
from lora_init.distributed import Ranks, ranks
from lora_init.engine import GroupBytes
from lora_init.factors import LoraInitError
from lora_init.integrations.child import call
from lora_init.journal import opened
from lora_init.methods import Method, resolve_method
from lora_init.report import WEIGHT_DECAY_NOTE, LayerReport, Report, judge, start_note
from lora_init.staging import CheckFailed, require_space
from lora_init.stream import ShardWriter, Stream

ADAPTER, RESIDUAL, REPORT, PLOT = "adapter", "residual", "report.json", "report.png"
OUTPUTS = (ADAPTER, RESIDUAL, REPORT, PLOT)
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
    resume: bool = False,
    group_bytes: GroupBytes = "auto",
    **options: Any,
) -> Report:
    """Initialise a safetensors checkpoint without loading it; same bits as `lora_init.initialize`.

    Weights are read and solved a few at a time, so models may be larger than memory. Where the
    process is in a torch.distributed job, all ranks must call this alike, with one file system for
    the output; they share the layers, and the files are the same for any number of them.

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
        resume: go on where a run with these arguments to `out` was killed or failed, if there was
            one; without it, what such a run left is removed.
        group_bytes: what the weights that are solved at once and the work on them may take; "auto"
            is half of what a GPU has free, and 512 MiB on the CPU. Changes no bit of the result.

    Raises:
        LoraInitError: naming the layer or file, the value and the way out, on every rank; `out` is
            as it was. What was finished is kept beside it for `resume`, and a note of the exception
            says so.
        CheckFailed: the output of an fp32 model moved by more than 1e-3 of its largest value; `out`
            is as it was, and the files are kept beside it.
    """
    began = time.perf_counter()
    chosen = resolve_method(method, options)
    if chosen.replaces:
        raise LoraInitError(
            f"{chosen.name} replaces the weights of the base, and a run writes residuals and "
            "adapters only: call lora_init.initialize on a PEFT model, and save its base too"
        )
    if chosen.needs != "nothing":
        raise LoraInitError(
            f"{chosen.name} starts from data ({chosen.needs}), which runs through a model, and "
            "none is loaded here: call lora_init.initialize(model, ..., calibration=...) on one"
        )
    if r < 1:
        raise LoraInitError(f"r must be a whole number ≥ 1, got {r}")
    out = Path(out).resolve()
    lora = {
        "r": r,
        "lora_alpha": r if lora_alpha is None else lora_alpha,
        "use_rslora": use_rslora,
        "target_modules": target_modules,
    }
    with_residual = chosen.residual and save_residual
    with ranks() as team:
        checkpoint = team.together(lambda: _checkpoint(os.fspath(model), out))
        original = str(checkpoint.directory) if Path(model).is_dir() else os.fspath(model)
        base = str(out / RESIDUAL) if with_residual else None if chosen.residual else original
        plan = team.once(lambda: _plan(checkpoint, auto_class, lora, base))
        where = team.together(lambda: _device(device, team))
        arguments = lora | {"seed": seed, "auto_class": auto_class, "save_residual": save_residual}
        run = _identity(checkpoint, chosen, arguments, where, plan)
        team.agree(
            {name: json.dumps(value) for name, value in run.items()},
            "start all ranks with the same arguments, on the same files",
        )
        with opened(out, run, team, resume=resume, overwrite=overwrite) as journal:
            targets = [Target(**fields) for fields in plan["targets"]]
            stream = team.together(
                lambda: Stream(
                    checkpoint,
                    targets,
                    chosen,
                    journal,
                    r=r,
                    seed=seed,
                    device=where,
                    group_bytes=group_bytes,
                )
            )
            spent = _solve(stream, cache, progress, with_residual)

            def finish() -> Report:
                reports = _write_adapter(stream, plan["files"], original)
                if with_residual:
                    copy_other_files(checkpoint, journal.outputs / RESIDUAL)
                drift = None
                if check is True or (check is None and 4 * checkpoint.elements < _CHECK_BYTES):
                    drift = _drift(stream, plan["model_class"], with_residual, reports)
                settings = dataclasses.asdict(chosen)
                notes = _notes(chosen, with_residual, reports)
                seconds = time.perf_counter() - began
                report = Report(chosen.name, settings, seed, seconds, reports, drift, notes, spent)
                content = json.dumps(report.to_dict(), indent=1).encode()
                write_atomically(journal.outputs / REPORT, content)
                report.plot(journal.outputs / PLOT)
                journal.place(OUTPUTS, overwrite)
                return report

            return journal.once(finish)


def _checkpoint(model: str, out: Path) -> Checkpoint:
    """The model's files, whose headers have been read, apart from those that are to be written."""
    source = find_model(model)
    _check_apart(source, out)
    checkpoint = Checkpoint(source)
    checkpoint.entries  # noqa: B018
    return checkpoint


def find_model(name: str) -> Path:
    """The directory of a model: a local one, or a hub id's snapshot that was downloaded before.

    Raises:
        LoraInitError: neither is there.
    """
    path = Path(name)
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise LoraInitError(f"{name} is a file: name the directory that holds the model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise LoraInitError(
            f"{name} is neither a directory nor a model in the local Hugging Face cache: check the "
            f"path, or download it first (hf download {name})"
        ) from error


def _plan(
    checkpoint: Checkpoint,
    auto_class: str | None,
    lora: dict[str, Any],
    base: str | None,
) -> dict[str, Any]:
    """What `integrations.transformers.plan` says."""
    return call(
        "plan",
        directory=str(checkpoint.directory),
        auto_class=auto_class,
        lora=lora | {"base_model_name_or_path": base},
        shapes={key: entry.shape for key, entry in checkpoint.entries.items()},
    )


def _identity(
    checkpoint: Checkpoint,
    method: Method,
    arguments: dict[str, Any],
    device: torch.device,
    plan: dict[str, Any],
) -> dict[str, Any]:
    """All that a run's bits depend on, by the names that users know."""
    return {
        "model": str(checkpoint.directory),
        "method": method.name,
        **{f"option {name}": value for name, value in dataclasses.asdict(method).items()},
        **arguments,
        "device": device.type,
        # Without their inodes: the same file may come from another mount next time.
        **{name: stamp[:2] for name, stamp in checkpoint.stamps.items()},
        "plan": hashlib.sha256(json.dumps(plan).encode()).hexdigest(),
        "lora-init": version("lora-init"),
        "torch": torch.__version__,
    }


def _solve(
    stream: Stream, cache: CacheOption, progress: bool | None, with_residual: bool
) -> dict[str, float]:
    """Finish every layer of the run and every weight file of its residual model, on all ranks.

    Returns:
        What becomes `Report.stream`.
    """
    journal, team, method = stream.journal, stream.ranks, stream.method
    shards = stream.checkpoint.shards if with_residual else []
    directory = journal.outputs / RESIDUAL

    def left() -> tuple[list[int], list[Path]]:
        if shards:
            directory.mkdir(exist_ok=True)
        missing = [shard for shard in shards if not (directory / shard.name).exists()]
        require_space(journal.directory, sum(shard.stat().st_size for shard in missing))
        layers = enumerate(stream.layers)
        return [i for i, layer in layers if journal.layer(i, layer.name) is None], missing

    layers, missing = journal.once(left)
    store = journal.together(lambda: open_cache(cache, method))
    began = time.perf_counter()
    stream.survey()
    surveyed = time.perf_counter()
    resolved = journal.together(lambda: _resolved(stream))
    shares = stream.shares(layers)
    groups = stream.groups(shares[team.rank])
    with ShardWriter(stream, directory, missing, shares) as writer:
        journal.together(lambda: stream.solve(groups, resolved, store, progress, writer.finished))
        journal.together(writer.write_shared)
    return {
        "groups": len(groups),
        "peak_bytes": stream.peak_bytes(groups),
        "target_bytes": stream.size,
        "survey_seconds": surveyed - began,
        "solve_seconds": time.perf_counter() - surveyed,
    }


def _resolved(stream: Stream) -> list[dict[str, Any]]:
    """Every layer's of `method.resolve`, none of which changes a rank."""
    resolved = stream.method.resolve(stream.layers)
    for layer, options in zip(stream.layers, resolved, strict=True):
        if options.get("r", layer.r) != layer.r:
            raise LoraInitError(
                f"{layer.name}: {stream.method.name} gives it rank {options['r']}, and a run "
                "writes one rank for all layers: call lora_init.initialize on a PEFT model"
            )
    return resolved


def _drift(
    stream: Stream, model_class: str, with_residual: bool, reports: Sequence[LayerReport]
) -> float | None:
    """How far the written model's output is from the original's; None if it takes no token ids, or
    starts right through `lora_init.resume` only.

    Raises:
        CheckFailed: the output of an fp32 model moved by more than `_MAX_DRIFT`, though no layer is
            to start away from its weight.
    """
    if stream.method.residual and not with_residual:
        return None
    stage, source = stream.journal.outputs, stream.checkpoint.directory
    # The widest dtype, so that nothing stored is rounded on loading.
    dtype = max((x.weight.dtype for x in stream.layers), key=lambda x: torch.finfo(x).bits)
    drift = call(
        "output_drift",
        model_class=model_class,
        original=str(source),
        base=str(stage / RESIDUAL if with_residual else source),
        adapter=str(stage / ADAPTER),
        dtype=str(dtype).removeprefix("torch."),
    )
    if start_note(reports, stream.method.kind) is None:
        _check_drift(drift, dtype, stage)
    return drift


def _check_drift(drift: float | None, dtype: torch.dtype, stage: Path) -> None:
    # Rounding a 16-bit residual alone moves the output by per cents; `self_check` has judged that.
    if drift is not None and torch.finfo(dtype).bits >= 32 and not drift <= _MAX_DRIFT:
        raise CheckFailed(
            f"the written model's output is {drift:.1e} away from the original's, more than "
            f"{_MAX_DRIFT:g}: no output was replaced, and what was written is kept in {stage}"
        )


def _notes(method: Method, with_residual: bool, reports: Sequence[LayerReport]) -> list[str]:
    if not method.residual:
        note = start_note(reports, method.kind)
        return [note] if note else []
    return [WEIGHT_DECAY_NOTE] if with_residual else [_NO_RESIDUAL_NOTE, WEIGHT_DECAY_NOTE]


def _check_apart(source: Path, out: Path) -> None:
    if out.is_relative_to(source) or source.is_relative_to(out / RESIDUAL):
        raise LoraInitError(f"{out} and the model {source} lie in one another: write elsewhere")
    if source.name == RESIDUAL and (source.parent / ADAPTER / SIDECAR).is_file():
        raise LoraInitError(
            f"{source} is the residual of an earlier run: initialise the original model"
        )


def _device(name: str, team: Ranks) -> torch.device:
    if name == "auto" and torch.cuda.is_available():
        # Of several processes on a machine, each has a GPU of its own.
        own = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        name = f"cuda:{own}" if team.size > 1 else "cuda"
    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LoraInitError(f"device {name!r} cannot be used ({error})") from error
    return device


def _write_adapter(stream: Stream, files: Mapping[str, str], original: str) -> list[LayerReport]:
    """Write the step-0 adapter from the finished layers; returns their reports."""
    finished = [stream.finished(i) for i in range(len(stream.layers))]
    stored, reports = [factors for factors, _ in finished], [report for _, report in finished]
    judge(reports, stream.layers, stream.method.kind)
    directory = stream.journal.outputs / ADAPTER
    for name, text in files.items():
        write_atomically(directory / name, text.encode())
    parts: dict[tuple[str, str], Tensor] = {}
    for layer, factors in zip(stream.layers, stored, strict=True):
        parts |= {(layer.name, "A"): factors.A, (layer.name, "B"): factors.B}
    tensors = {adapter_key(name, part): tensor for (name, part), tensor in parts.items()}
    write_atomically(directory / ADAPTER_FILE, save(tensors, {"format": "pt"}))
    if stream.method.residual:
        seed = stream.layers[0].seed
        start = Start.of(stream.method, seed, stream.layers, stored)
        current = {f"{name}.{part}": tensor for (name, part), tensor in parts.items()}
        write_start(directory, dataclasses.replace(start, base_model=original), current)
    return reports
