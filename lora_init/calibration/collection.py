"""A user's data run through the pretrained model: what methods that start from data need of it.

A method names `Statistic`s; `Data` runs the batches and feeds them, for some layers at a time. What
is collected depends on the model, the data and the statistic only (and on the CPU on torch's number
of threads, which the model's own passes run in; and of a gradient in fp16, on which layers are
adapted): not on which other layers are collected with it, in what blocks, or by how many processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from lora_init.cache import Cache, digest_of, open_cache
from lora_init.calibration import Calibration, moved
from lora_init.calibration.passes import Apart, Rescale, Results, Run, Source, Wanted
from lora_init.calibration.tap import as_found, with_lora
from lora_init.engine import group_limit, pack
from lora_init.factors import LoraInitError
from lora_init.methods import Layer, Method, Progress
from lora_init.statistics import Statistic

# Of statistics' states at once on the CPU; a GPU's limit is half of what it has free.
_CPU_BLOCK_BYTES = 4 << 30
# `cache="auto"` keeps a layer's statistic up to this size: sketches and components of any layer,
# gradients and covariances of small ones.
_CACHED_BYTES = 32 << 20
# Part of every key: raise it when the same inputs would give other values.
_FORMAT = 2


@dataclass(frozen=True, eq=False)
class Data:
    """A user's data and the model that it runs through."""

    calibration: Calibration
    source: Source
    progress: bool | None = None
    # Of the loss, for batches and for single examples, as found by the first block of layers.
    scales: dict[bool, float] = field(default_factory=dict, init=False)

    def blocks(self, layers: Sequence[Layer], method: Method) -> list[list[Layer]]:
        """Consecutive layers whose statistics are collected at once, as many as memory allows; all
        that are trained together.
        """
        seen = [self._seen(layer) for layer in layers]
        if any(s.trained for layer in seen for s in method.statistics(layer)) or not layers:
            return [list(layers)]
        sizes = [sum(s.state_bytes(layer) for s in set(method.statistics(layer))) for layer in seen]
        device = seen[0].weight.device
        limit = group_limit(device, self.calibration.block_bytes, _CPU_BLOCK_BYTES)
        return [[layers[i] for i in block] for block in pack(sizes, limit)]

    def given(self, layers: Sequence[Layer], method: Method) -> list[Layer]:
        """The layers with what the method needs of the data in their `statistics`.

        Raises:
            LoraInitError: naming the layer or the batch; the model is as it was.
        """
        found: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in layers}
        seen = {layer.name: self._seen(layer) for layer in layers}
        runs: dict[tuple[bool, bool], Wanted] = {}
        for name, layer in seen.items():
            for statistic in dict.fromkeys(method.statistics(layer)):
                kind = statistic.trained, statistic.single
                runs.setdefault(kind, []).append((name, statistic))
        for wanted in runs.values():
            for (name, _), collected in self._collected(seen, wanted).items():
                found[name] |= collected
        return [layer.changed(statistics=found[layer.name]) for layer in layers]

    def _seen(self, layer: Layer) -> Layer:
        """A layer as statistics see it: a quantised one's weight has one value here, which takes no
        memory.
        """
        if not layer.weight.is_meta:
            return layer
        device = next(self.source.modules[layer.name].parameters()).device
        one = torch.zeros((), dtype=layer.weight.dtype, device=device)
        return layer.with_weight(one.expand(layer.weight.shape))

    def _collected(self, layers: Mapping[str, Layer], wanted: Wanted) -> Results:
        """Statistics that go through in one run, from the cache where they are there."""
        store: Cache | None = None
        if not self.calibration.unnamed:
            store = open_cache(self.calibration.cache)
        trained = wanted[0][1].trained
        together = [name for name, _ in wanted] if trained else []
        keys, found = {}, Results()
        if store is not None:
            for name, statistic in wanted:
                keys[name, statistic] = key = self._key(layers[name], statistic, together)
                hit = store.get_tensors(key, statistic.keys)
                if hit is not None:
                    device = layers[name].weight.device
                    found[name, statistic] = {part: value.to(device) for part, value in hit.items()}
        missing = [key for key in wanted if key not in found]
        if missing and trained:
            missing, found = wanted, {}  # layers are trained together
        collected: Results = {}
        if missing:
            collected = self._trained(layers, missing) if trained else self._run(layers, missing)
        if store is not None:
            for one, parts in collected.items():
                size = sum(value.nbytes for value in parts.values())
                if self.calibration.cache != "auto" or size <= _CACHED_BYTES:
                    store.put_tensors(keys[one], parts)
        return found | collected

    def _key(self, layer: Layer, statistic: Statistic, together: list[str]) -> str:
        """All that a statistic's values depend on.

        Args:
            together: layers whose values depend on one another.
        """
        scaled = statistic.gradients and self.source.half
        return digest_of(
            {
                "format": _FORMAT,
                "model": self.source.digest,
                "data": self.calibration.digest,
                "loss": self.calibration.key,
                "statistic": f"{type(statistic).__module__}.{type(statistic).__qualname__}",
                "options": asdict(statistic),
                "mask": statistic.mask or self.calibration.token_mask,
                "layer": layer.name,
                # The scale of fp16 gradients, whose small ones underflow, is one for all of these.
                "beside": sorted(self.source.modules) if scaled else None,
                "together": together,
                "seed": layer.seed if statistic.trained else None,
            }
        )

    def _trained(self, layers: Mapping[str, Layer], wanted: Wanted) -> Results:
        """The factors of a temporary LoRA after the user's training steps."""
        step, units = self.calibration.train_step, self.calibration.batches
        assert step is not None
        bars = Progress("training", self.progress)
        with (
            torch.inference_mode(False),
            as_found(self.source.model) as seed,
            self.source.pretrained(),
            torch.enable_grad(),
            bars.bar(len(units), "batch") as bar,
        ):
            states = {key: key[1].start(layers[key[0]]) for key in wanted}
            factors = {
                name: (nn.Parameter(state["A"]), nn.Parameter(state["B"]))
                for (name, _), state in states.items()
            }
            parameters = [parameter for pair in factors.values() for parameter in pair]
            seed()
            with with_lora(self.source.modules, factors):
                for unit in units:
                    step(self.source.model, moved(unit, self.source.device), parameters)
                    bar.update(1)
        found = {}
        for (name, statistic), state in states.items():
            A, B = (parameter.detach() for parameter in factors[name])
            if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
                raise LoraInitError(
                    f"{name}: train_step made its factors NaN or infinite: lower its learning rate"
                )
            found[name, statistic] = statistic.finish(
                layers[name], state | {"A": A, "B": B}, len(units)
            )
        return found

    def _run(self, layers: Mapping[str, Layer], wanted: Wanted) -> Results:
        calibration = self.calibration
        bars = Progress("calibration", self.progress)
        share, recompute, single = True, calibration.checkpointing is True, wanted[0][1].single
        while True:
            scale = self.scales.get(single, 1.0)
            try:
                run = Run(self.source, layers, calibration, single, share, recompute, scale)
                return run.results(wanted, bars)
            except Apart:
                share = False
            except Rescale as other:
                self.scales[single] = other.scale
            except torch.OutOfMemoryError:
                if recompute or calibration.checkpointing is False:
                    raise
                recompute = True
