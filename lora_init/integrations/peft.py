"""PEFT models: initialise, save for the original base, resume. The only code that touches them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_init import engine
from lora_init.cache import CacheOption
from lora_init.checkpoints import SIDECAR, Start, read_safetensors, read_start, write_start
from lora_init.factors import Factors, LoraInitError
from lora_init.methods import Layer, Method, resolve_method
from lora_init.parallel import map_layers
from lora_init.report import Report, self_check

# peft.tuners.lora.Linear; its attributes are hidden from a type checker by nn.Module's __getattr__.
_LoraLinear = Any
_PREFIX = "base_model.model."
_ADAPTER_FILE = "adapter_model.safetensors"
# PEFT's own starts that change the base weight: what is left is not W.
_MUTATING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
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
    adapter = _adapter_name(model, adapter_name)
    modules = _modules(model, adapter, chosen.residual)
    layers = [
        Layer(name, _weight(module), module.r[adapter], float(module.scaling[adapter]), seed)
        for name, module in modules.items()
    ]
    solved = engine.solve(layers, chosen, cache=cache, progress=progress)
    stored = [
        solved[name].to(module.lora_A[adapter].weight.dtype, name)
        for name, module in modules.items()
    ]
    reports = self_check(layers, stored, chosen)
    start = Start.of(chosen, seed, layers, stored)
    before = None if example is None else _output(model, example, adapter_enabled=False)

    _commit(list(modules.values()), stored, adapter, chosen.residual)
    # PEFT would otherwise run another initialisation over these factors when it rebuilds the
    # adapter.
    _config(model, adapter).init_lora_weights = True
    notes = []
    if chosen.residual:
        _attach(model, adapter, start)
        notes.append(WEIGHT_DECAY_NOTE)
        _warn_dropout(modules, stored, layers, adapter, reports)
    drift = None
    if example is not None and before is not None:
        after = _output(model, example, adapter_enabled=True)
        drift = float(
            (after - before).abs().max()
            / before.abs().max().clamp(min=torch.finfo(before.dtype).tiny)
        )
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
    adapter = _adapter_name(model, adapter_name)
    with _staged(Path(directory)) as staging:
        if isinstance(model, _ResidualModel):
            model._save_plain(staging, [adapter])
        else:
            model.save_pretrained(str(staging), selected_adapters=[adapter])
        if adapter != "default":  # PEFT gives every other adapter a folder of its own
            _move_into(staging / adapter, staging)


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
    adapter = _adapter_name(model, adapter_name)
    start, current = read_start(checkpoint)
    others = _other_tensors(Path(checkpoint), start, current)
    if not (isinstance(model, _ResidualModel) and adapter in model._lora_init_starts):
        modules = _modules(model, adapter, residual=True)
        _check_same_layers(start, modules, adapter, checkpoint)
        names = list(modules)
        layers = [Layer(name, _weight(modules[name]), modules[name].r[adapter]) for name in names]
        for layer, digest in zip(
            layers, map_layers(lambda layer: layer.digest, layers), strict=True
        ):
            expected = start.layers[layer.name]
            if digest != expected.base_digest:
                raise LoraInitError(
                    f"{layer.name}: the base weight is not the one that {checkpoint} started from "
                    "(it was "
                    f"{expected.base_dtype}, this is "
                    f"{str(layer.weight.dtype).removeprefix('torch.')}): load that "
                    f"base model, in that dtype, with no other initialisation on it"
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
        _commit([modules[name] for name in names], factors, adapter, residual=True)
        _config(model, adapter).init_lora_weights = True
        _attach(model, adapter, start)
    assert isinstance(model, _ResidualModel)
    model._restore(adapter, start, current, others, checkpoint)


class _ResidualModel(PeftModel):
    """Mixed into a PEFT model's class once its base holds residuals: saves plain adapters, loads
    its own checkpoints.

    A mixin, not patched methods: `copy.deepcopy` and `pickle` of the model keep it, and each copy
    has its own starts.
    """

    _lora_init_starts: dict[str, Start]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As PEFT's, except that initialised adapters are written as plain LoRA on the original
        base.

        `lora_init/` beside each holds what `load_adapter` and `lora_init.resume` continue from.

        Raises:
            LoraInitError: pickles or PEFT's own conversion were asked for, or the directory cannot
                be written.
        """
        if not safe_serialization:
            raise LoraInitError(
                "safe_serialization=False writes pickles, which are never read back: leave it True"
            )
        if path_initial_model_for_weight_conversion is not None:
            raise LoraInitError(
                "path_initial_model_for_weight_conversion is not needed: this model's "
                "save_pretrained already "
                "writes plain LoRA for the original base"
            )
        names = list(selected_adapters or self.peft_config)
        kwargs["save_embedding_layers"] = save_embedding_layers
        if not is_main_process:  # joins whatever collectives gathering takes, writes nothing
            self._save_plain(Path(save_directory), names, is_main_process=False, **kwargs)
            return
        with _staged(Path(save_directory)) as staging:
            self._save_plain(staging, names, **kwargs)
            state = kwargs.get("state_dict") or self.state_dict()
            for adapter in names:
                if adapter in self._lora_init_starts:
                    folder = staging if adapter == "default" else staging / adapter
                    write_start(
                        folder, self._lora_init_starts[adapter], self._current(adapter, state)
                    )

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As PEFT's for an initialised adapter's own checkpoints; anything else does not fit a
        residual base.

        Raises:
            LoraInitError: not a checkpoint of this adapter's start.
        """
        if adapter_name not in self._lora_init_starts:
            known = ", ".join(self._lora_init_starts)
            raise LoraInitError(
                f"adapter {adapter_name!r} cannot be added: this model's base is the residual of "
                f"adapter {known}, so "
                f"another one would be added to R instead of W; load it on the original base model"
            )
        directory = Path(model_id) / (kwargs.get("subfolder") or "")
        start, current = read_start(directory)
        others = _other_tensors(directory, start, current)
        result = self._restore(adapter_name, start, current, others, directory)
        if not is_trainable:
            self.eval()
        return result

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        warnings.warn(
            "with its adapter disabled this model computes its residual base R, not the pretrained "
            "model: use the "
            "original base model for that",
            stacklevel=3,
        )
        with super().disable_adapter():
            yield

    def _save_plain(self, directory: Path, adapters: Sequence[str], **kwargs: Any) -> None:
        """PEFT's own save with the initialised adapters' tensors and configs exchanged for their
        plain form.
        """
        state = dict(kwargs.pop("state_dict", None) or self.state_dict())
        configs = cast("dict[str, LoraConfig]", self.peft_config)
        live = dict(configs)
        for adapter in adapters:
            if adapter in self._lora_init_starts:
                start = self._lora_init_starts[adapter]
                current = self._current(adapter, state)
                state |= {
                    _key(name, part, adapter): tensor
                    for (name, part), tensor in plain_tensors(start, current).items()
                }
                configs[adapter] = plain_config(
                    live[adapter], {n: 2 * x.A0.shape[0] for n, x in start.layers.items()}
                )
        try:
            super().save_pretrained(
                str(directory), selected_adapters=list(adapters), state_dict=state, **kwargs
            )
        finally:
            configs.update(live)

    def _current(self, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        current = {}
        for name in self._lora_init_starts[adapter].layers:
            for part in ("A", "B", "bias"):
                tensor = state.get(_key(name, part, adapter))
                if tensor is not None:
                    current[f"{name}.{part}"] = tensor
        return current

    def _restore(
        self,
        adapter: str,
        start: Start,
        current: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        source: str | os.PathLike[str],
    ) -> Any:
        mine = self._lora_init_starts[adapter]
        modules = {
            name: module for name, module in _lora_layers(self).items() if adapter in module.lora_A
        }
        _check_same_layers(start, modules, adapter, source)
        for name, layer in start.layers.items():
            if not (
                torch.equal(layer.A0, mine.layers[name].A0)
                and torch.equal(layer.B0, mine.layers[name].B0)
            ):
                raise LoraInitError(
                    f"{name}: {source} started from other factors ({start.method}, seed "
                    f"{start.seed}) than this model "
                    f"({mine.method}, seed {mine.seed}): initialise with those, or call "
                    "lora_init.resume on a model "
                    f"that is not initialised"
                )
        state = dict(others)
        for key, tensor in current.items():
            name, _, part = key.rpartition(".")
            state[_key(name, part)] = tensor
        return set_peft_model_state_dict(self, state, adapter_name=adapter)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: rebuild it from PEFT's own on unpickling and copying.
        state = object.__reduce_ex__(self, 2)[2]
        return _new_residual_model, (type(self).__bases__[1],), state


def _residual_class(cls: type) -> type:
    return type(
        cls.__name__, (_ResidualModel, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__}
    )


def _new_residual_model(cls: type) -> Any:
    return object.__new__(_residual_class(cls))


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


def plain_config(config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """A config without custom strings whose scaling is 1 at the given rank per layer.

    Pattern keys are full module names, escaped and anchored: PEFT matches them as suffix regexes.
    """
    plain = copy.deepcopy(config)
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    plain.r = plain.lora_alpha = common
    plain.rank_pattern, plain.alpha_pattern = pattern, dict(pattern)
    plain.use_rslora = False
    plain.init_lora_weights = True
    return plain


def _adapter_name(model: Any, adapter_name: str | None) -> str:
    if not isinstance(model, PeftModel):
        raise LoraInitError(
            f"a peft.PeftModel is needed, got {type(model).__name__}: pass the model from "
            "get_peft_model, outside any "
            f"DDP or torch.compile wrapper"
        )
    if adapter_name is None:
        if len(model.active_adapters) != 1:
            raise LoraInitError(
                f"adapters {model.active_adapters} are active: say which with adapter_name="
            )
        adapter_name = model.active_adapters[0]
    if adapter_name not in model.peft_config:
        raise LoraInitError(
            f"no adapter {adapter_name!r}; this model has {', '.join(model.peft_config)}"
        )
    if not isinstance(model.peft_config[adapter_name], LoraConfig):
        kind = model.peft_config[adapter_name].peft_type
        raise LoraInitError(
            f"adapter {adapter_name!r} is {kind}, not LoRA: make it with a LoraConfig"
        )
    return adapter_name


def _config(model: PeftModel, adapter: str) -> LoraConfig:
    return cast("LoraConfig", model.peft_config[adapter])


def _lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """LoRA layers by their module name in the base model."""
    return {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def _modules(model: PeftModel, adapter: str, residual: bool) -> dict[str, _LoraLinear]:
    """The adapter's layers by base module name, all of which can be initialised.

    Raises:
        LoraInitError: one cannot, or the base is not the pretrained one any more.
    """
    if isinstance(model, _ResidualModel):
        raise LoraInitError(
            "this model's base already is the residual of adapter "
            f"{', '.join(model._lora_init_starts)}: build it anew "
            f"from the original base to initialise again"
        )
    start = _config(model, adapter).init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_MUTATING_STARTS):
        raise LoraInitError(
            f"adapter {adapter!r} was made with init_lora_weights={start!r}, which already changed "
            "the base: make it "
            f"with init_lora_weights=True"
        )
    found = {
        name: module
        for name, module in _lora_layers(model).items()
        if adapter in module.lora_A or adapter in module.lora_embedding_A
    }
    if not found:
        raise LoraInitError(f"adapter {adapter!r} has no LoRA layer: check its target_modules")
    shared = _sharing(model, found) if residual else {}
    for name, module in found.items():
        reason = _why_not(module, adapter, residual) or shared.get(name)
        if reason:
            raise LoraInitError(
                f"{name}: {reason}; nothing was changed (leave the layer out of target_modules to "
                "initialise the rest)"
            )
    return found


def _why_not(module: LoraLayer, adapter: str, residual: bool) -> str | None:
    """Why this layer cannot be initialised, or None."""
    base = module.get_base_layer()
    if not isinstance(module, Linear) or not isinstance(base, nn.Linear | Conv1D):
        kind = f"{type(base).__name__} ({type(module).__name__})"
        return f"LoRA on {kind} is not supported, only on nn.Linear and Conv1D"
    if adapter in module.lora_variant:
        variant = type(module.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
        return f"its adapter is {variant}, not plain LoRA"
    weight = base.weight
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        kind = f"{type(weight).__name__} of {weight.dtype}"
        return (
            f"its base weight is a {kind} (quantised or sharded), not a plain floating-point tensor"
        )
    if weight.device.type == "meta" or module.lora_A[adapter].weight.device.type == "meta":
        return "its weights are on the meta device and have no values: load the model first"
    if module.merged:
        merged = ", ".join(module.merged_adapters)
        return f"adapter {merged} is merged into its base: call unmerge_adapter() first"
    others = [other for other in module.lora_A if other != adapter]
    if residual and others:
        return f"adapter {others[0]!r} shares it and would be added to the residual instead of W"
    return None


def _sharing(model: nn.Module, found: Mapping[str, LoraLayer]) -> dict[str, str]:
    """Why a target's base weight must not be written: another parameter lies in the same memory."""
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.device.type != "meta" and p.numel()
    )
    clashes: dict[str, str] = {}
    for (_, end, one), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            clashes.setdefault(one, other)
            clashes.setdefault(other, one)
    reasons = {}
    for name in found:
        clash = clashes.get(f"{_PREFIX}{name}.base_layer.weight")
        if clash:
            other = clash.removeprefix(_PREFIX).replace(".base_layer", "")
            reasons[name] = (
                f"its weight is shared with {other}, which would change too (tied weights)"
            )
    return reasons


def _weight(module: _LoraLinear) -> Tensor:
    """W (out, in) as a view of the base weight."""
    weight = module.get_base_layer().weight.detach()
    return weight.T if module.fan_in_fan_out else weight


def _commit(
    modules: Sequence[_LoraLinear], factors: Sequence[Factors], adapter: str, residual: bool
) -> None:
    """Write factors and residuals into the model; all that can fail has been tried before."""

    def one(item: tuple[_LoraLinear, Factors]) -> None:
        module, stored = item
        weight = _weight(module)
        if residual:
            stored.residual(weight, out=weight)
        module.lora_A[adapter].weight.copy_(stored.A)
        module.lora_B[adapter].weight.copy_(stored.B)

    with _deferred_interrupt():
        map_layers(one, list(zip(modules, factors, strict=True)))


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[None]:
    """Ctrl-C inside takes effect at the end, so that a model is never left half-initialised."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    pending: list[Any] = []
    previous = signal.signal(signal.SIGINT, lambda *args: pending.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pending and callable(previous):
            previous(*pending[0])


def _attach(model: PeftModel, adapter: str, start: Start) -> None:
    model.__class__ = _residual_class(type(model))
    cast("_ResidualModel", model)._lora_init_starts = {adapter: start}


def _key(name: str, part: str, adapter: str | None = None) -> str:
    """State-dict key of a layer's A, B or lora bias; without an adapter, the key in its file."""
    letter, leaf = ("B", "bias") if part == "bias" else (part, "weight")
    middle = f".{adapter}" if adapter else ""
    return f"{_PREFIX}{name}.lora_{letter}{middle}.{leaf}"


def _other_tensors(
    directory: Path, start: Start, current: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the adapter file holds beside the initialised layers' LoRA (modules_to_save, biases).

    Raises:
        LoraInitError: adapter file and sidecar are not of one save.
    """
    _, tensors = read_safetensors(directory / _ADAPTER_FILE)
    for name, layer in start.layers.items():
        stored = tensors.pop(_key(name, "A"), None)
        tensors.pop(_key(name, "B"), None)
        tensors.pop(_key(name, "bias"), None)
        if stored is None or not torch.equal(
            stored[: layer.A0.shape[0]].float(), current[f"{name}.A"].float()
        ):
            raise LoraInitError(
                f"{name}: {directory / _ADAPTER_FILE} and {SIDECAR} are not of one save: take an "
                "earlier checkpoint"
            )
    return tensors


def _check_same_layers(
    start: Start, modules: Mapping[str, LoraLayer], adapter: str, source: str | os.PathLike[str]
) -> None:
    missing, extra = (
        sorted(start.layers.keys() - modules),
        sorted(modules.keys() - start.layers.keys()),
    )
    if missing or extra:
        raise LoraInitError(
            f"{source} and this model adapt different layers (only there: {missing[:3]}, only "
            f"here: {extra[:3]}): use "
            f"the target_modules it was made with"
        )
    for name, layer in start.layers.items():
        here = (modules[name].r[adapter], modules[name].scaling[adapter])
        there = (layer.A0.shape[0], layer.scaling)
        if here != there:
            raise LoraInitError(
                f"{name}: r and scaling are {here} here and {there} in {source}: use the "
                "LoraConfig it was made with"
            )


def _warn_dropout(
    modules: Mapping[str, _LoraLinear],
    stored: Sequence[Factors],
    layers: Sequence[Layer],
    adapter: str,
    reports: Any,
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
            "because s·B₀A₀ is no "
            f"longer 0: set lora_dropout=0; and {WEIGHT_DECAY_NOTE}",
            stacklevel=3,
        )


def _output(
    model: PeftModel, example: Mapping[str, Tensor] | Tensor, adapter_enabled: bool
) -> Tensor:
    """The model's first output tensor on a batch, in eval mode, fp32; training mode is left as
    found.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        context = contextlib.nullcontext() if adapter_enabled else model.disable_adapter()
        with torch.no_grad(), context:
            output = model(**example) if isinstance(example, Mapping) else model(example)
    finally:
        for module in training:
            module.training = True
    if not isinstance(output, Tensor):
        output = (
            getattr(output, "logits", None)
            if getattr(output, "logits", None) is not None
            else output[0]
        )
    return output.detach().float()


@contextlib.contextmanager
def _staged(directory: Path) -> Iterator[Path]:
    """A folder inside `directory` whose files are moved up when the block ends well: never a
    half-written one.

    Raises:
        LoraInitError: the directory cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=directory, prefix=".saving-"))
    except OSError as error:
        raise LoraInitError(
            f"cannot write to {directory} ({error}): free space or choose another directory"
        ) from error
    try:
        yield staging
        _move_into(staging, directory)
    except OSError as error:
        raise LoraInitError(
            f"cannot write to {directory} ({error}): free space or choose another directory"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_into(source: Path, target: Path) -> None:
    """Move every file of a tree to the same place under `target`, replacing what is there."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        destination = target / path.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, destination)
