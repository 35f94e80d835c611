"""Adapter directories: say what one is, and make a plain adapter of a training run's checkpoint."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lora_init.cache import write_atomically
from lora_init.checkpoints import SIDECAR, Start, read_safetensors, read_start
from lora_init.factors import LoraInitError
from lora_init.report import Report
from lora_init.staging import staged

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_README = "README.md"
_REPORT = "report.json"
MODEL_PREFIX = "base_model.model."


def describe(directory: str | os.PathLike[str]) -> str:
    """What is in a directory: the report of a run, the start of a checkpoint, or a plain adapter.

    Raises:
        LoraInitError: it is none of these.
    """
    directory = Path(directory)
    if (directory / _REPORT).is_file():
        try:
            return str(Report.from_dict(json.loads((directory / _REPORT).read_bytes())))
        except (ValueError, KeyError, TypeError) as error:
            raise LoraInitError(
                f"{directory / _REPORT} is no report of a run ({error!r})"
            ) from error
    if (directory / SIDECAR).is_file():
        return _describe_start(read_start(directory)[0])
    config = _read_config(directory)
    _, tensors = read_safetensors(directory / ADAPTER_FILE)
    return (
        f"plain {config.get('peft_type')} adapter: r {config.get('r')}, alpha "
        f"{config.get('lora_alpha')}, {len(tensors)} tensors, for the base model "
        f"{config.get('base_model_name_or_path')}\n"
        f"target modules: {_listed(config.get('target_modules'))}"
    )


def export_adapter(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    initial: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a checkpoint's adapter as plain LoRA for the original base model.

    A checkpoint that an initialised model saved already holds it, beside `lora_init/` and the
    trainer's state. One that stock PEFT trained on a `residual/` becomes s_T·B_T A_T − s·B₀A₀, of
    rank 2r; s_T is that of its own config, and everything else that was trained is kept.

    Args:
        checkpoint: a directory with adapter_config.json and adapter_model.safetensors.
        out: a new or empty directory.
        initial: the `adapter/` of the run; by default found beside the `residual/` that the
            checkpoint's config names as its base.

    Returns:
        `out`.

    Raises:
        LoraInitError: it is no LoRA checkpoint, its start is not found, or they do not fit.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    config = _read_config(checkpoint)
    _, tensors = read_safetensors(checkpoint / ADAPTER_FILE)
    source = _find_start(checkpoint, config, initial)
    start, _ = read_start(source)
    if _is_plain(start, tensors):
        with staged(out, (CONFIG_FILE, ADAPTER_FILE, _README)) as stage:
            for name in (CONFIG_FILE, ADAPTER_FILE, _README):
                if (checkpoint / name).is_file():
                    shutil.copyfile(checkpoint / name, stage / name)
        return out
    _write_difference(checkpoint, tensors, start, source, out)
    return out


def adapter_key(name: str, part: str, adapter: str | None = None) -> str:
    """State-dict key of a layer's A, B or lora bias; without an adapter, the key in its file."""
    letter, leaf = ("B", "bias") if part == "bias" else (part, "weight")
    middle = f".{adapter}" if adapter else ""
    return f"{MODEL_PREFIX}{name}.lora_{letter}{middle}.{leaf}"


def plain_tensors(start: Start, current: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """(layer, "A" | "B" | "bias") -> fp32 tensors of the rank-2r LoRA with scaling 1 on the
    original base.
    """
    plain = {}
    for name, layer in start.layers.items():
        A, B = current[f"{name}.A"].float().cpu(), current[f"{name}.B"].float().cpu()
        plain[name, "A"] = torch.cat([A, layer.A0.float()])
        plain[name, "B"] = torch.cat([B, -layer.B0.float()], dim=1).mul_(layer.scaling)
        if f"{name}.bias" in current:
            plain[name, "bias"] = current[f"{name}.bias"].float().cpu() * layer.scaling
    return plain


def plain_config(config: Any, ranks: Mapping[str, int]) -> Any:
    """A LoraConfig without custom strings whose scaling is 1 at the given rank per layer."""
    plain = copy.deepcopy(config)
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = exact_pattern(ranks, common)
    plain.r = plain.lora_alpha = common
    plain.rank_pattern, plain.alpha_pattern = pattern, dict(pattern)
    plain.use_rslora = False
    plain.init_lora_weights = True
    return plain


def exact_pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A LoraConfig's rank_pattern or alpha_pattern for values by module name.

    Its keys are full names, escaped and anchored: PEFT matches them as suffix regexes.
    """
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def _describe_start(start: Start) -> str:
    layers = start.layers.values()
    ranks = sorted({layer.A0.shape[0] for layer in layers})
    scalings = sorted({layer.scaling for layer in layers})
    options = ", ".join(f"{name}={value}" for name, value in start.options.items())
    return "\n".join(
        [
            f"{start.method} start: {len(start.layers)} layers, seed {start.seed}, r "
            f"{_listed(ranks)}, scaling {_listed(scalings)}, base weights in "
            f"{_listed(sorted({layer.base_dtype for layer in layers}))}",
            f"base model: {start.base_model or 'not recorded'}",
            f"options: {options or 'none'}",
            f"layers: {_listed(start.layers)}",
        ]
    )


def _listed(values: Any) -> str:
    return values if isinstance(values, str) else ", ".join(map(str, values or ["none"]))


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise LoraInitError(f"{directory}: no {CONFIG_FILE} here, so this is no adapter")
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise LoraInitError(f"{path} is no PEFT config ({error})") from error


def _find_start(
    checkpoint: Path, config: Mapping[str, Any], initial: str | os.PathLike[str] | None
) -> Path:
    """The directory whose sidecar says what the checkpoint's base was made from."""
    if initial is not None:
        return Path(initial)
    if (checkpoint / SIDECAR).is_file():
        return checkpoint
    base = config.get("base_model_name_or_path")
    found = Path(base or "").resolve().parent / "adapter"
    if not (found / SIDECAR).is_file():
        raise LoraInitError(
            f"{checkpoint} was trained on {base}, and there is no {found / SIDECAR}: pass "
            f"--initial (initial=) with the adapter/ directory of the run that made the residual; "
            f"an adapter that was trained on the original base is plain already"
        )
    return found


def _is_plain(start: Start, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the file holds [A_T; A₀], as initialised models save it, and not just A_T."""
    for name, layer in start.layers.items():
        A = tensors.get(adapter_key(name, "A"))
        r = layer.A0.shape[0]
        if A is None or A.shape[0] != 2 * r or not torch.equal(A[r:].float(), layer.A0.float()):
            return False
    return True


def _write_difference(
    checkpoint: Path, tensors: dict[str, Tensor], start: Start, source: Path, out: Path
) -> None:
    from peft import LoraConfig

    try:
        config = LoraConfig.from_pretrained(str(checkpoint))
    except (ValueError, TypeError, KeyError) as error:
        raise LoraInitError(f"{checkpoint / CONFIG_FILE}: not a LoRA config ({error})") from error
    if not isinstance(config, LoraConfig):
        raise LoraInitError(f"{checkpoint} is a {config.peft_type} adapter, not LoRA")
    trained = dict(tensors)
    current: dict[str, Tensor] = {}
    for name, layer in start.layers.items():
        A, B, bias = (trained.pop(adapter_key(name, part), None) for part in ("A", "B", "bias"))
        if A is None or B is None:
            raise LoraInitError(
                f"{name}: {checkpoint} has no LoRA for it, but the residual of {source} was made "
                f"for one: is this the run that the checkpoint was trained on?"
            )
        fits = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] > 0
        if not fits or (B.shape[0], A.shape[1]) != (layer.B0.shape[0], layer.A0.shape[1]):
            raise LoraInitError(
                f"{name}: A {tuple(A.shape)} and B {tuple(B.shape)} of {checkpoint} do not fit the "
                f"start's {tuple(layer.A0.shape)} and {tuple(layer.B0.shape)} (a sharded optimiser "
                f"must gather them before it saves)"
            )
        # `plain_tensors` multiplies B and its bias by the start's s.
        factor = _scaling(config, name, A.shape[0]) / layer.scaling
        current |= {f"{name}.A": A, f"{name}.B": B if factor == 1 else B.float() * factor}
        if bias is not None:
            current[f"{name}.bias"] = bias if factor == 1 else bias.float() * factor
    left = [key for key in trained if ".lora_" in key]
    if left:
        raise LoraInitError(
            f"{left[0]} is not plain LoRA on a layer of {source}: only A, B and their bias can be "
            f"exported"
        )
    plain = plain_tensors(start, current)
    for (name, part), tensor in plain.items():
        trained[adapter_key(name, part)] = tensor.contiguous()
    exported = plain_config(config, {name: plain[name, "A"].shape[0] for name in start.layers})
    exported.base_model_name_or_path = start.base_model
    with staged(out, (CONFIG_FILE, ADAPTER_FILE)) as stage:
        exported.save_pretrained(str(stage))
        write_atomically(stage / ADAPTER_FILE, save(trained, {"format": "pt"}))


def _scaling(config: Any, name: str, r: int) -> float:
    """s of a layer as PEFT computes it."""
    from peft.utils.other import get_pattern_key

    alpha = config.alpha_pattern.get(
        get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha
    )
    return float(alpha / math.sqrt(r) if config.use_rslora else alpha / r)
