"""What each rank of a job does of an initialisation: layers are shared by their size, solved where
they belong, and known everywhere in the end. A process on its own has all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_init import engine, selftest
from lora_init.cache import CacheOption
from lora_init.calibration.collection import Data
from lora_init.distributed import Ranks, alive
from lora_init.factors import Factors, Residual, row_blocks
from lora_init.integrations.peft.layers import LoraLinear, base_values, is_quantised, rescaled
from lora_init.integrations.peft.sharded import is_sharded, whole, whole_shape
from lora_init.methods import Layer, Method
from lora_init.parallel import map_layers
from lora_init.report import LayerReport, judge, measure

ALIKE = (
    "call it with the same arguments on the same model and base weights on every rank (a random "
    "base needs the same torch.manual_seed; FSDP's cpu_ram_efficient_loading leaves the weights to "
    "rank 0 until they are sharded), or on models that differ with distributed=False"
)
# So much of a quantised model is dequantised at once: all of it would take four times its memory.
_DEQUANTISED_BYTES = 1 << 30
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Solved:
    """A solved layer.

    Attributes:
        layer: with what was measured of it; in a job of several ranks without its weight.
        stored: its factors as they will be stored.
        noise: see `Factors.drift_under_dropout`; 0 without dropout.
    """

    layer: Layer
    stored: Factors
    report: LayerReport
    noise: float


def describe(job: Ranks, modules: Mapping[str, LoraLinear], adapter: str) -> dict[str, str]:
    """All that must be the same on every rank for the layers to be shared; for `Ranks.agree`."""
    if job.size == 1:
        return {}
    plain: dict[str, Tensor] = {}
    description = {}
    for name, module in modules.items():
        weight, A = module.get_base_layer().weight, module.lora_A[adapter].weight
        description[name] = (
            f"{whole_shape(weight)} {weight.dtype} on {weight.device.type}"
            f"{' in shards' if is_sharded(weight) else ''}, r {module.r[adapter]}, scaling "
            f"{module.scaling[adapter]}, factors in {A.dtype}"
            f"{' in shards' if is_sharded(A) else ''}"
        )
        if not is_sharded(weight):
            plain[f"the checksum of {name}'s base weight"] = weight.detach()
    sums = map_layers(_checksum, list(plain.values()), cost=lambda weight: weight.numel())
    return description | dict(zip(plain, map(str, sums), strict=True))


def read(
    job: Ranks, modules: Mapping[str, LoraLinear], adapter: str, seed: int = 0
) -> dict[str, Layer]:
    """This rank's layers by name. A weight in shards is gathered by all ranks, one at a time, and
    kept where it belongs; of a quantised one only what was measured is kept.
    """
    weights = [module.get_base_layer().weight for module in modules.values()]
    owners = job.owners([torch.Size(whole_shape(weight)).numel() for weight in weights])
    own = {}
    for (name, module), parameter, owner in zip(modules.items(), weights, owners, strict=True):
        if owner != job.rank and not is_sharded(parameter):
            continue
        with alive():
            values = whole(parameter)
        if owner == job.rank:
            scaling = float(module.scaling[adapter])
            layer = Layer(name, base_values(module, values), module.r[adapter], scaling, seed)
            own[name] = _measured(layer) if is_quantised(parameter) else layer
    return own


def solve(
    job: Ranks,
    modules: Mapping[str, LoraLinear],
    adapter: str,
    method: Method,
    residual: Residual,
    data: Data | None = None,
    *,
    seed: int,
    cache: CacheOption,
    progress: bool | None,
    group_bytes: engine.GroupBytes,
) -> list[Solved]:
    """Every layer solved and checked, in the order of `modules`, the same on every rank; the model
    is only read.

    Raises:
        LoraInitError: see `engine.approximate`; on every rank, whichever it happened on.
    """
    own = read(job, modules, adapter, seed)
    # `resolve` is over all layers, and so over what was collected of them, which is then small.
    resolves = data is not None and type(method).resolve is not Method.resolve

    def known() -> dict[str, Layer]:
        """What statistics over all layers need to know of this rank's."""
        held = [layer for layer in own.values() if not layer.weight.is_meta]
        if held:
            engine.check_layers(held, method)
        if data is not None and resolves:
            for block in data.blocks(list(own.values()), method):
                own.update((layer.name, layer) for layer in data.given(block, method))
        if job.size == 1:
            return own
        return {layer.name: layer for layer in map_layers(_measured, list(own.values()))}

    layers = _merged(job.gather(job.together(known)), modules)
    selftest.ensure({module.get_base_layer().weight.device for module in modules.values()}, job)

    def solved() -> dict[str, Solved]:
        options = dict(zip(layers, method.resolve(list(layers.values())), strict=True))
        mine = list(own.values())
        blocks = [mine] if data is None or resolves else data.blocks(mine, method)
        done: dict[str, Solved] = {}
        for block in blocks:
            done |= solved_block(block, options)
        return done

    def solved_block(
        block: Sequence[Layer], options: Mapping[str, dict[str, Any]]
    ) -> dict[str, Solved]:
        """In a call of its own: what was collected of one block goes before the next is."""
        if data is not None and not resolves:
            block = data.given(block, method)
        done: dict[str, Solved] = {}
        for part in _parts(block, modules):
            done |= batch(part, options)
        return done

    def batch(part: list[Layer], options: Mapping[str, dict[str, Any]]) -> dict[str, Solved]:
        engine.check_layers(part, method)  # a quantised layer's weight is first here
        engine.check_statistics(part, method)
        part = [_ranked(layer, options[layer.name], modules[layer.name], adapter) for layer in part]
        found = engine.solve_resolved(
            part,
            method,
            [options[layer.name] for layer in part],
            cache=cache,
            progress=progress if job.rank == 0 else False,
            group_bytes=group_bytes,
        )
        stored = [
            factors.to(modules[layer.name].lora_A[adapter].weight.dtype, layer.name)
            for layer, factors in zip(part, found, strict=True)
        ]
        reports = measure(part, stored, residual)
        return {
            layer.name: Solved(
                layers[layer.name],
                factors if job.size == 1 else _portable(factors),
                report,
                _noise(layer, factors, dropout(modules[layer.name], adapter)),
            )
            for layer, factors, report in zip(part, stored, reports, strict=True)
        }

    found: list[Solved] = list(_merged(job.gather(job.together(solved)), modules).values())
    judge([x.report for x in found], [x.layer for x in found], residual, warn=job.rank == 0)
    return found


def _measured(layer: Layer) -> Layer:
    """A layer without its weight, and what others need to know of it."""
    _ = (layer.moments, layer.digest)
    collected = {key: value.cpu() for key, value in layer.statistics.items()}
    return layer.without_weight().changed(statistics=collected)


def _parts(block: Sequence[Layer], modules: Mapping[str, LoraLinear]) -> Iterator[list[Layer]]:
    """The layers whose weights are there, then those of quantised weights, some at a time."""
    held = [layer for layer in block if not layer.weight.is_meta]
    if held:
        yield held
    rest = [layer for layer in block if layer.weight.is_meta]
    for part in engine.pack([layer.weight.nbytes for layer in rest], _DEQUANTISED_BYTES):
        yield [
            rest[i].with_weight(base_values(modules[rest[i].name], rest[i].weight)) for i in part
        ]


def _ranked(layer: Layer, options: Mapping[str, Any], module: LoraLinear, adapter: str) -> Layer:
    r = options.get("r", layer.r)
    return layer if r == layer.r else layer.changed(r=r, scaling=rescaled(module, adapter, r)[1])


def dropout(module: LoraLinear, adapter: str) -> float:
    return float(getattr(module.lora_dropout[adapter], "p", 0.0))


def _noise(layer: Layer, factors: Factors, p: float) -> float:
    return factors.drift_under_dropout(layer.weight, p) if p > 0 else 0.0


def _merged(shares: Iterable[Mapping[str, Any]], modules: Iterable[str]) -> dict[str, Any]:
    found = {name: value for share in shares for name, value in share.items()}
    return {name: found[name] for name in modules}


def _portable(factors: Factors) -> Factors:
    """On the CPU and in memory of their own: a view would take all that it looks at along."""
    A, B = (t.detach().to("cpu", copy=True).contiguous() for t in (factors.A, factors.B))
    return Factors(A, B, factors.scaling, factors.info)


def _checksum(weight: Tensor) -> int:
    """Of the bits as integers: exact, so in any order, and one pass."""
    bits = weight.view(_BITS[weight.element_size()])
    return sum(int(bits[rows].sum(dtype=torch.int64)) for rows in row_blocks(bits))
