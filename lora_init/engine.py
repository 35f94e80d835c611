"""Layers in, factors out: checks, cache and method, with no model in sight.

Both writers (`integrations.peft`, `checkpoints`) come through `solve`, so a layer gets the same
bits either way.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lora_init import cache as cache_module
from lora_init import selftest
from lora_init.cache import Cache, CacheOption
from lora_init.factors import Factors, LoraInitError, row_blocks
from lora_init.methods import Layer, Method, Progress, energies, resolve_method
from lora_init.options import check_rank
from lora_init.parallel import map_layers, values

# On the CPU a layer is solved by one thread: larger groups gain nothing.
_CPU_GROUP_BYTES = 1 << 30
GroupBytes = int | Literal["auto"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def approximate(
    weights: Mapping[str, Tensor],
    r: int | Mapping[str, int] = 8,
    method: str | Method = "inilora",
    *,
    scaling: float | Mapping[str, float] = 1.0,
    seed: int = 0,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    cache: CacheOption = "auto",
    progress: bool | None = None,
    group_bytes: GroupBytes = "auto",
    **options: Any,
) -> dict[str, Factors]:
    """Low-rank factors for a dict of weights, no model needed; all layers are solved concurrently.

    Args:
        weights: name -> W (out, in), any float dtype, strides and device; never written.
        r: rank, or name -> rank.
        method: a name from `lora_init.methods()` or a method object.
        scaling: s > 0 in W ≈ s·B·A, or name -> s.
        seed: with the layer's name it decides every random draw.
        statistics: name -> what a method that starts from data needs of the layer, by key (see its
            `statistics`).
        cache: True, False, a directory, or "auto" (on for methods that descend).
        progress: True or False, or None for a bar on terminals only.
        group_bytes: layers are solved in groups that need at most so much memory beyond their
            weights; "auto" is half of what a GPU has free, and 1 GiB on the CPU. One layer is
            always taken. Changes no bit of the result.
        options: of the method, if it was given by name.

    Returns:
        name -> Factors(A (r, in), B (out, r), scaling, info) in fp32 (fp64 for fp64 weights), on
            W's device.

    Raises:
        LoraInitError: naming the layer, the value and the way out.
    """
    chosen = resolve_method(method, options)
    layers = [
        Layer(
            name,
            weight,
            _per_layer(r, name, "r"),
            _per_layer(scaling, name, "scaling"),
            seed,
            (statistics or {}).get(name, {}),
        )
        for name, weight in weights.items()
    ]
    return solve(layers, chosen, cache=cache, progress=progress, group_bytes=group_bytes)


def solve(
    layers: Sequence[Layer],
    method: Method,
    *,
    cache: CacheOption = "auto",
    progress: bool | None = None,
    group_bytes: GroupBytes = "auto",
) -> dict[str, Factors]:
    """Factors for every layer by name, from the cache where they are there; see `approximate`."""
    check_layers(layers, method)
    check_statistics(layers, method)
    selftest.ensure(layer.weight.device for layer in layers)
    resolved = method.resolve(layers)
    ranked = [
        layer.changed(r=options.get("r", layer.r))
        for layer, options in zip(layers, resolved, strict=True)
    ]
    factors = solve_resolved(
        ranked,
        method,
        resolved,
        cache=cache,
        progress=progress,
        group_bytes=group_bytes,
    )
    return {layer.name: x for layer, x in zip(layers, factors, strict=True)}


def solve_resolved(
    layers: Sequence[Layer],
    method: Method,
    resolved: Sequence[dict[str, Any]],
    *,
    cache: CacheOption,
    progress: bool | None,
    group_bytes: GroupBytes,
) -> list[Factors]:
    """Factors for some of a run's layers, checked before, in groups that fit memory.

    Args:
        layers: with the rank "r" that `resolved` says, where it does.
        resolved: theirs of `method.resolve`, which has seen all layers of the run.
    """
    store, bars = cache_module.open_cache(cache, method), Progress(method.name, progress)
    return [
        factors
        for group in groups(layers, method, group_bytes)
        for factors in solve_group(
            [layers[i] for i in group], method, [resolved[i] for i in group], store, bars
        )
    ]


def solve_group(
    layers: Sequence[Layer],
    method: Method,
    resolved: Sequence[dict[str, Any]],
    store: Cache | None,
    progress: Progress,
) -> list[Factors]:
    """Factors for one group of layers, all at once, from the cache where they are there.

    Returns:
        Factors whose `info` holds `method`, `cached`, what the method resolved from statistics,
        and what its solver reports.

    Raises:
        LoraInitError: factors are not finite; what else was solved is in the cache.
    """
    found: list[Factors | None] = [None] * len(layers)
    keys: list[str] = []
    if store:
        keys = map_layers(
            lambda item: cache_module.key(item[0], method, item[1]),
            list(zip(layers, resolved, strict=True)),
            cost=lambda item: item[0].weight.numel(),
        )
        for i, (layer, key) in enumerate(zip(layers, keys, strict=True)):
            hit = store.get(key)
            if hit is not None:
                device = layer.weight.device
                info = hit.info | {"cached": True}
                found[i] = Factors(hit.A.to(device), hit.B.to(device), hit.scaling, info)
    missing = [i for i, hit in enumerate(found) if hit is None]
    if missing:
        began = time.perf_counter()
        solved = method.solve(
            [layers[i] for i in missing], [resolved[i] for i in missing], progress
        )
        seconds = time.perf_counter() - began
        # The largest magnitudes, which are NaN where an entry is; rank 0 has none.
        peaks = [
            torch.linalg.vector_norm(t, math.inf) if t.numel() else t.new_zeros(())
            for x in solved
            for t in (x.A, x.B)
        ]
        finite = [math.isfinite(peak) for peak in values(peaks)]
        for i, result, *fine in zip(missing, solved, finite[::2], finite[1::2], strict=True):
            if not all(fine):
                why = (
                    "it diverged: lower lr"
                    if hasattr(method, "lr")
                    else "the weight, what was collected or an option is too large for it: leave "
                    "the layer out of target_modules, or choose another method or a smaller option"
                )
                raise LoraInitError(
                    f"{layers[i].name}: {method.name} gave factors that are not finite; {why}"
                )
            info = {"method": method.name, "seconds": seconds} | resolved[i] | result.info
            info["cached"] = False
            # Row-major, as files want them.
            A, B = result.A.contiguous(), result.B.contiguous()
            found[i] = kept = dataclasses.replace(result, A=A, B=B, info=info)
            if store:
                store.put(keys[i], kept)
    return [factors for factors in found if factors is not None]


def groups(
    layers: Sequence[Layer], method: Method, group_bytes: GroupBytes = "auto"
) -> list[list[int]]:
    """Indices of consecutive layers that are solved at once: as many as `group_bytes` has room for.

    One layer is always taken. No bit of a result depends on the groups.
    """
    return pack(
        [method.peak_bytes(layer) for layer in layers],
        group_limit(layers[0].weight.device, group_bytes),
    )


def pack(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of consecutive items whose sizes add up to `limit` at most, or of one larger item."""
    found: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not found or size > room:
            found.append([])
            room = limit
        found[-1].append(index)
        room -= size
    return found


def peak_bytes(layers: Sequence[Layer], method: Method, group_bytes: GroupBytes = "auto") -> int:
    """Memory beyond weights and factors that `solve` takes at most: known before a run starts."""
    return max(
        sum(method.peak_bytes(layers[i]) for i in group)
        for group in groups(layers, method, group_bytes)
    )


def group_limit(
    device: torch.device, group_bytes: GroupBytes, on_cpu: int = _CPU_GROUP_BYTES
) -> int:
    """`group_bytes` in bytes, "auto" being `on_cpu` or half of what a GPU has free.

    Raises:
        LoraInitError: it is neither "auto" nor a whole number of bytes.
    """
    if group_bytes != "auto":
        if not isinstance(group_bytes, int) or isinstance(group_bytes, bool) or group_bytes < 1:
            raise LoraInitError(
                f"group_bytes must be 'auto' or a whole number of bytes ≥ 1, got {group_bytes!r}"
            )
        return group_bytes
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else on_cpu


def check_layers(layers: Sequence[Layer], method: Method) -> None:
    """Raises `LoraInitError` for the first layer that cannot be solved, before any work is done."""
    if not layers:
        raise LoraInitError(
            "there is no layer to initialise: name at least one weight or target module"
        )
    for layer in layers:
        name, weight, r = layer.name, layer.weight, layer.r
        dense = weight.dtype in _DTYPES and weight.layout == torch.strided
        if weight.ndim != 2 or not dense or not weight.numel():
            raise LoraInitError(
                f"{name}: the weight must be a non-empty dense matrix (out, in) of float64, "
                "float32, bfloat16 or float16, got "
                f"{tuple(weight.shape)} {weight.dtype} {weight.layout}"
            )
        if weight.device.type == "meta":
            raise LoraInitError(
                f"{name}: the weight is on the meta device and has no values: load it first"
            )
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise LoraInitError(f"{name}: r must be a whole number ≥ 1, got {r!r}")
        if method.residual:
            why = "beyond which B·A gains nothing"
            check_rank(name, r, min(weight.shape), "min(out, in)", why)
        scaling = layer.scaling
        if not isinstance(scaling, int | float) or not 0 < scaling < float("inf"):
            raise LoraInitError(
                f"{name}: the scaling must be a number > 0, got {scaling!r} (see lora_alpha)"
            )
    for layer, energy in zip(layers, energies(layers), strict=True):
        # Only a finite energy is final: its squares overflow before W does.
        if not math.isfinite(energy) and not _is_finite(layer.weight):
            bad = int((~torch.isfinite(layer.weight)).sum())
            raise LoraInitError(
                f"{layer.name}: {bad} of {layer.weight.numel()} weights are NaN or infinite: "
                "repair the checkpoint, or "
                f"leave the layer out of target_modules"
            )


def check_statistics(layers: Sequence[Layer], method: Method) -> None:
    """Raises `LoraInitError` for the first layer without what the method needs of data."""
    for layer in layers:
        for key in (key for needed in method.statistics(layer) for key in needed.keys):
            if key not in layer.statistics:
                raise LoraInitError(
                    f"{layer.name}: {method.name} starts from data, and {key!r} of this layer is "
                    "not there: pass calibration=lora_init.Calibration(dataloader) to "
                    "lora_init.initialize, or statistics= to lora_init.approximate"
                )


def _is_finite(weight: Tensor) -> bool:
    return all(bool(torch.isfinite(weight[rows]).all()) for rows in row_blocks(weight))


def _per_layer(value: Any | Mapping[str, Any], name: str, what: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise LoraInitError(f"{name}: {what} was given per layer and lacks this one")
    return value[name]
