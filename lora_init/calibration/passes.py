"""A pass of data through a model, which feeds the statistics of some layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_init.cache import digest_of
from lora_init.calibration import Calibration, moved, token_mask
from lora_init.calibration.tap import as_found, recomputed, tapped, version_of, watched
from lora_init.factors import LoraInitError, weight_digest
from lora_init.methods import Layer, Progress
from lora_init.parallel import map_layers, values
from lora_init.statistics import State, Statistic, TokenMask, Tokens

Wanted = list[tuple[str, Statistic]]
Results = dict[tuple[str, Statistic], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Source:
    """A model as data runs through it.

    Attributes:
        model: what the loss is computed with.
        modules: name -> the module of the pretrained model whose calls are a layer's.
        tensors: gives all that the pretrained model's output depends on, by name.
        pretrained: makes a context in which the model is the pretrained one.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    tensors: Callable[[], Mapping[str, Tensor]]
    pretrained: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def autocast(self) -> torch.dtype | Literal[False]:
        """What the caller has the model autocast to, if so."""
        kind = self.device.type
        return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)

    @cached_property
    def half(self) -> bool:
        """Whether the model computes in float16, as far as can be seen before it does."""
        inside = map(_compute_dtype, self.model.modules())
        parameters = (parameter.dtype for parameter in self.model.parameters())
        return torch.float16 in {self.autocast, *inside, *parameters}

    @property
    def encoder_decoder(self) -> bool:
        config = getattr(self.model, "config", None)
        return bool(getattr(config, "is_encoder_decoder", False))

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        parameters = self.model.parameters()
        return next((p.device for p in parameters if not p.is_meta), torch.device("cpu"))

    @cached_property
    def digest(self) -> str:
        """Of what the pretrained model computes: its values, its configuration and what autocasts
        it. Its code is known by the names of its classes only.
        """
        tensors = {name: t for name, t in self.tensors().items() if not t.is_meta}
        digests = map_layers(weight_digest, list(tensors.values()), cost=Tensor.numel)
        config = getattr(self.model, "config", None)
        settings: dict[str, Any] = getattr(config, "to_dict", dict)()
        ignored = ("_name_or_path", "use_cache", "transformers_version")
        kinds = {f"{type(x).__module__}.{type(x).__qualname__}" for x in self.model.modules()}
        # Adapters and what they are made of come and go.
        own = [kind for kind in kinds if kind.split(".")[0] not in ("lora_init", "peft", "torch")]
        return digest_of(
            {
                "tensors": dict(zip(tensors, digests, strict=True)),
                "classes": sorted(own),
                "config": {name: x for name, x in settings.items() if name not in ignored},
                "device": self.device.type,
                "autocast": self.autocast,
            }
        )


class Apart(Exception):
    """Layers that were fed one tensor are fed different ones now: their sum is of no use."""


class Rescale(Exception):
    """Gradients are float16, and the loss is not scaled or one of them is infinite or NaN: `scale`
    is the one to try next.
    """

    def __init__(self, scale: float):
        super().__init__(scale)
        self.scale = scale


# What a loss is multiplied by where gradients are float16, whose small ones would underflow (up to
# a quarter of a layer's on SmolLM2): the first at which none of an adapted layer overflows, in any
# batch. Most find that with their first batch. All are powers of two, so that nothing else is
# rounded otherwise, and none is 1, which means unscaled.
_SCALES = tuple(2.0**power for power in range(47, -26, -8))


@dataclass
class _Sum:
    """A statistic of one layer, or of several that are fed the same tensors.

    Attributes:
        layer: the first one, which adds.
        calls: of each layer by name, in this pass.
        input: number of the tensor that was added last.
    """

    layer: Layer
    state: State
    calls: dict[str, int]
    input: int = -1


class Run:
    """Data on its way through a model."""

    def __init__(
        self,
        source: Source,
        layers: Mapping[str, Layer],
        calibration: Calibration,
        single: bool,
        share: bool,
        recompute: bool,
        scale: float,
    ):
        self.source, self.layers, self.calibration = source, layers, calibration
        self.what = "example" if single else "batch"
        self.units = calibration.examples if single else calibration.batches
        self.share, self.recompute, self.scale = share, recompute, scale
        self.sums: dict[tuple[str, Statistic], _Sum] = {}
        self.active: dict[str, list[Statistic]] = {}
        # Of what goes through now.
        self.where = ""
        self.forward = False  # not where an activation checkpoint runs it again
        self.masks: dict[TokenMask, Tensor | None] = {}
        self.peaks: list[tuple[str, Tensor]] = []  # of inputs
        self.gradient_peaks: list[tuple[str, Tensor]] = []
        # The tensor that came last, its version and number, and the sums that it was added to.
        self.input: Tensor | None = None
        self.version: int | None = None
        self.inputs = 0
        self.fresh: dict[Statistic, _Sum] = {}

    def results(self, wanted: Wanted, bars: Progress) -> Results:
        """Every layer's and statistic's values."""
        passes = max(statistic.passes for _, statistic in wanted)
        with (
            torch.inference_mode(False),
            as_found(self.source.model) as seed,
            self.source.pretrained(),
            bars.bar(passes * len(self.units), self.what) as bar,
        ):
            for number in range(passes):
                active = [key for key in wanted if key[1].passes > number]
                if number:
                    self._next_pass(active)
                with self._tapped(active) as gradients:
                    for index, unit in enumerate(self.units):
                        self.where = f"{self.what} {index}"
                        seed()
                        self._one(unit, gradients)
                        bar.update(1)
                self._check_all_seen(active)
        return self._finished(wanted)

    @contextmanager
    def _tapped(self, active: Wanted) -> Iterator[bool]:
        """Yields whether a backward pass is wanted."""
        self.active = {}
        for name, statistic in active:
            self.active.setdefault(name, []).append(statistic)
        modules = {name: self.source.modules[name] for name in self.active}
        gradients = any(statistic.gradients for _, statistic in active)
        again = gradients and self.recompute
        with (
            recomputed(self.source.model) if again else nullcontext(),
            tapped(modules, self._seen, self._seen_backward if gradients else None),
            self._scaled() if gradients else nullcontext(),
        ):
            yield gradients

    def _scaled(self) -> AbstractContextManager[None]:
        """Inside, what asks for another scale is noticed in layers that are not collected now too,
        so that it is the same for any block of layers.
        """
        if self.scale == 1:
            return watched(_matrices(self.source.model), output_seen=_refuse_half)
        others = {n: x for n, x in self.source.modules.items() if n not in self.active}
        return watched(others, gradient_seen=self._gradient_peak)

    def _one(self, unit: Any, gradients: bool) -> None:
        batch = moved(unit, self.source.device)
        kinds = {self._mask_of(s) for statistics in self.active.values() for s in statistics}
        kinds |= {self._checked(name) for name in self.active}
        two = self.source.encoder_decoder
        self.masks = {kind: token_mask(batch, kind, two, self.where) for kind in sorted(kinds)}
        self.peaks, self.gradient_peaks, self.forward = [], [], True
        try:
            with torch.set_grad_enabled(gradients):
                if gradients:
                    loss = self.calibration.loss(self.source.model, batch, self.where)
                    self.forward = False
                    with torch.autograd.set_detect_anomaly(False):  # an overflow is none
                        loss.backward(torch.full_like(loss, self.scale))
                else:
                    self.calibration.output(self.source.model, batch)
        finally:
            self.forward, self.input, self.fresh = False, None, {}
        if any(len(set(total.calls.values())) > 1 for total in self.sums.values()):
            raise Apart
        peaks = [*self.peaks, *self.gradient_peaks]
        for i, peak in enumerate(values([peak for _, peak in peaks])):
            if math.isfinite(peak):
                continue
            if i >= len(self.peaks) and self.scale in _SCALES[:-1]:
                raise Rescale(_SCALES[_SCALES.index(self.scale) + 1])
            raise LoraInitError(
                f"{peaks[i][0]} has NaN or infinite values in {self.where}: leave that out, or run "
                "the model in a wider dtype"
            )

    @torch.no_grad()
    def _seen(self, name: str, x: Tensor) -> None:
        if not self.forward:
            return
        if x is not self.input or version_of(x) != self.version:
            self.input, self.version, self.fresh = x, version_of(x), {}
            self.inputs += 1
            peaks = torch.linalg.vector_norm(x, math.inf, dim=-1).flatten()
            counted = peaks.where(self._valid(name, self._checked(name), x), 0)
            if len(counted):  # an expert may be given no token
                self.peaks.append((f"{name}: its input", counted.amax()))
        for statistic in self.active[name]:
            if not statistic.gradients:
                self._add(name, statistic, x.detach(), None)

    @torch.no_grad()
    def _seen_backward(self, name: str, x: Tensor, dy: Tensor) -> None:
        self._gradient_peak(name, dy)
        if self.scale != 1:
            dy = dy.to(torch.promote_types(dy.dtype, torch.float32)) / self.scale
        for statistic in self.active[name]:
            if statistic.gradients:
                self._add(name, statistic, x, dy)

    @torch.no_grad()
    def _gradient_peak(self, name: str, dy: Tensor) -> None:
        if dy.numel():
            peak = torch.linalg.vector_norm(dy, math.inf)
            self.gradient_peaks.append((f"{name}: the gradient by its output", peak))

    def _add(self, name: str, statistic: Statistic, x: Tensor, dy: Tensor | None) -> None:
        """Of one call: x (..., in) and dy (..., out)."""
        layer = self.layers[name]
        total = self.sums.get((name, statistic))
        if total is None:
            total = self._shareable(layer, statistic)
            if total is None:
                total = _Sum(layer, statistic.start(layer), {})
            self.sums[name, statistic] = total
        total.calls[name] = calls = total.calls.get(name, 0) + 1
        if total.layer is not layer:
            if total.input != self.inputs or calls != total.calls[total.layer.name]:
                raise Apart
            return
        if any(others != calls - 1 for other, others in total.calls.items() if other != name):
            raise Apart
        device = layer.weight.device
        valid = self._valid(name, self._mask_of(statistic), x)
        x = x.reshape(-1, x.shape[-1]).to(device)
        dy = None if dy is None else dy.reshape(-1, dy.shape[-1]).to(device)
        tokens = Tokens(x, dy, valid.to(device))
        # fp32 products are not for autocast to round.
        with torch.autocast(device.type, enabled=False):
            statistic.add(layer, total.state, tokens)
        total.input = self.inputs
        self.fresh[statistic] = total

    def _shareable(self, layer: Layer, statistic: Statistic) -> _Sum | None:
        """The sum of another layer to which nothing but this input was added."""
        shared = self.share and statistic.shared and not statistic.gradients
        total = self.fresh.get(statistic) if shared else None
        if total is None or total.calls[total.layer.name] != 1:
            return None
        mine, theirs = layer.weight, total.layer.weight
        return total if (mine.dtype, mine.device) == (theirs.dtype, theirs.device) else None

    def _mask_of(self, statistic: Statistic) -> TokenMask:
        return statistic.mask or self.calibration.token_mask

    def _checked(self, name: str) -> TokenMask:
        """Which rows of a layer's input must be finite: a gradient has a product with each."""
        every = any(self._mask_of(statistic) == "all" for statistic in self.active[name])
        return "all" if every else "attention"

    def _valid(self, name: str, kind: TokenMask, x: Tensor) -> Tensor:
        """Which rows of x (..., in) count, (rows,)."""
        mask, shape = self.masks[kind], x.shape[:-1]
        if mask is None:
            return torch.ones(shape.numel(), dtype=torch.bool, device=x.device)
        # Theirs, or all in one; (tokens, batch) has as many rows in another order.
        if _plain(shape) not in (_plain(mask.shape), _plain([mask.numel()])):
            raise LoraInitError(
                f"{name}: its input is {tuple(x.shape)} in {self.where}, whose mask is "
                f"{tuple(mask.shape)}: leave the layer out of target_modules, or "
                + ("attention_mask" if kind == "attention" else "attention_mask and labels")
                + " out of the batches (all rows count then, so they must have no padding)"
            )
        return mask.flatten().to(x.device)

    def _next_pass(self, active: Wanted) -> None:
        for statistic, total in self._distinct(active):
            total.state = statistic.next_pass(total.layer, total.state)
            total.calls = dict.fromkeys(total.calls, 0)

    def _check_all_seen(self, active: Wanted) -> None:
        for name, statistic in active:
            total = self.sums.get((name, statistic))
            if total is None or not total.calls[name]:
                what = "got no gradient" if statistic.gradients else "was never called"
                raise LoraInitError(
                    f"{name}: it {what} in the calibration data: leave it out of target_modules, "
                    "or pass data that uses it (behind a reentrant checkpoint the model's "
                    "enable_input_require_grads() must be on)"
                )

    def _finished(self, wanted: Wanted) -> Results:
        sums = self._distinct(wanted)

        def finished(item: tuple[Statistic, _Sum]) -> Mapping[str, Tensor]:
            statistic, total = item
            state, total.state = total.state, {}  # gone as soon as it is used
            return statistic.finish(total.layer, state, len(self.units))

        found = map_layers(finished, sums, cost=lambda item: item[1].layer.weight.numel())
        by_sum = {id(total): parts for (_, total), parts in zip(sums, found, strict=True)}
        return {key: by_sum[id(self.sums[key])] for key in wanted}

    def _distinct(self, keys: Wanted) -> list[tuple[Statistic, _Sum]]:
        found = {id(self.sums[key]): (key[1], self.sums[key]) for key in keys}
        return list(found.values())


def _plain(shape: Sequence[int]) -> list[int]:
    """Without what is 1."""
    return [size for size in shape if size != 1]


def _refuse_half(module: nn.Module, output: Tensor) -> None:
    if torch.float16 in (output.dtype, _compute_dtype(module)):
        raise Rescale(_SCALES[0])


def _compute_dtype(module: nn.Module) -> Any:
    """What one of bitsandbytes' works in, whatever it takes and gives."""
    return getattr(module, "compute_dtype", None)


def _matrices(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model whose weight is a matrix: projections and embeddings."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    }
