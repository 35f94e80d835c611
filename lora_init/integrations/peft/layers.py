"""Which LoRA layers of a PEFT model can be initialised, and the write into them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_init.adapters import MODEL_PREFIX, exact_pattern
from lora_init.distributed import alive
from lora_init.factors import Factors, LoraInitError, Residual
from lora_init.integrations.peft.sharded import gathered, here, is_sharded, whole_shape
from lora_init.integrations.peft.virtual import VirtualStart
from lora_init.parallel import map_layers, single_threaded

# peft.tuners.lora.Linear; its attributes are hidden from a type checker by nn.Module's __getattr__.
LoraLinear = Any
# PEFT's own starts that change the base weight: what is left is not W.
_MUTATING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def check_adapter(model: Any, adapter_name: str | None) -> str:
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


def lora_config(model: PeftModel, adapter: str) -> LoraConfig:
    return cast("LoraConfig", model.peft_config[adapter])


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """LoRA layers by their module name in the base model."""
    return {
        name.removeprefix(MODEL_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def initialisable_modules(
    model: PeftModel, adapter: str, residual: Residual
) -> dict[str, LoraLinear]:
    """The adapter's layers by base module name, all of which can be initialised.

    Raises:
        LoraInitError: one cannot, or the base is not the pretrained one any more.
    """
    start = lora_config(model, adapter).init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_MUTATING_STARTS):
        raise LoraInitError(
            f"adapter {adapter!r} was made with init_lora_weights={start!r}, which already changed "
            "the base: make it "
            f"with init_lora_weights=True"
        )
    found = {
        name: module
        for name, module in lora_layers(model).items()
        if adapter in module.lora_A or adapter in module.lora_embedding_A
    }
    if not found:
        raise LoraInitError(f"adapter {adapter!r} has no LoRA layer: check its target_modules")
    for name, module in found.items():
        if reason := _why_not(module, adapter):
            raise _refusal(name, reason, "")
    if residual in ("stored", "replaced"):
        shared = _sharing(model, found)
        virtual = 'initialize(residual="virtual") leaves the base as it is, or '
        for name, module in found.items():
            if reason := _why_base_must_stay(module, adapter) or shared.get(name):
                raise _refusal(name, reason, virtual if residual == "stored" else "")
    return found


def _refusal(name: str, reason: str, way_out: str) -> LoraInitError:
    return LoraInitError(
        f"{name}: {reason}; nothing was changed ({way_out}leave the layer out of target_modules to "
        "initialise the rest)"
    )


def _why_not(module: LoraLinear, adapter: str) -> str | None:
    """Why this layer cannot be initialised in any way, or None."""
    base = module.get_base_layer()
    weight: Any = getattr(base, "weight", None)
    quantised = is_quantised(weight)
    if not (isinstance(module, Linear) and isinstance(base, nn.Linear | Conv1D)) and not quantised:
        kind = f"{type(base).__name__} ({type(module).__name__})"
        return f"LoRA on {kind} is not supported, only on nn.Linear and Conv1D"
    if not isinstance(module.lora_variant.get(adapter), VirtualStart | None):
        variant = type(module.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
        return f"its adapter is {variant}, not plain LoRA"
    if module.merged:
        merged = ", ".join(module.merged_adapters)
        return f"adapter {merged} is merged into its base: call unmerge_adapter() first"
    if quantised:
        return _why_not_quantised(weight)
    if type(here(weight)) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        kind = f"{type(weight).__name__} of {weight.dtype}"
        return f"its base weight is a {kind} (quantised), not a plain floating-point tensor"
    if len(whole_shape(weight)) != 2:
        return (
            f"its base weight has the shape {whole_shape(weight)} instead of (out, in): initialise "
            f"before FullyShardedDataParallel flattens it, or use fully_shard (FSDP2)"
        )
    if "meta" in (here(weight).device.type, here(module.lora_A[adapter].weight).device.type):
        return "its weights are on the meta device and have no values: load the model first"
    return None


def _why_not_quantised(weight: Any) -> str | None:
    if weight.is_floating_point():
        return f"its {type(weight).__name__} is not quantised yet: move the model to its device"
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        return (
            "bitsandbytes packed its weight for the CPU when the model ran in eval mode, and "
            "cannot train it any more: load the model again and initialise it first"
        )
    return None


def _why_base_must_stay(module: LoraLinear, adapter: str) -> str | None:
    """Why this layer's base weight cannot become the residual, or None."""
    weight = module.get_base_layer().weight
    if is_quantised(weight):
        return f"its base weight is a {type(weight).__name__} (quantised)"
    others = [other for other in module.lora_A if other != adapter]
    if others:
        return f"adapter {others[0]!r} shares it and would be added to the residual instead of W"
    return None


def _sharing(model: nn.Module, found: Mapping[str, LoraLayer]) -> dict[str, str]:
    """Why a target's base weight must not be written: another parameter lies in the same memory, or
    is the same object (of a sharded one there may be nothing in this process' memory).
    """
    parameters = [
        (name, parameter, here(parameter))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    ]
    clashes: dict[str, str] = {}

    def clash(one: str, other: str) -> None:
        clashes.setdefault(one, other)
        clashes.setdefault(other, one)

    spans = sorted(
        (part.data_ptr(), part.data_ptr() + part.numel() * part.element_size(), name)
        for name, _, part in parameters
        if part.device.type != "meta" and part.numel()
    )
    for (_, end, one), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            clash(one, other)
    names: dict[int, str] = {}
    for name, parameter, _ in parameters:
        first = names.setdefault(id(parameter), name)
        if first != name:
            clash(first, name)
    reasons = {}
    for name in found:
        shared = clashes.get(f"{MODEL_PREFIX}{name}.base_layer.weight")
        if shared:
            other = shared.removeprefix(MODEL_PREFIX).replace(".base_layer", "")
            reasons[name] = (
                f"its weight is shared with {other}, which would change too (tied weights)"
            )
    return reasons


def is_quantised(weight: Any) -> bool:
    """Whether it is one of bitsandbytes."""
    return bool(get_bnb_param_type(weight))


def base_values(module: LoraLinear, weight: Tensor) -> Tensor:
    """The values W (out, in) of a layer whose base weight, gathered, is `weight`; a copy where it
    is quantised.
    """
    base = module.get_base_layer()
    if is_quantised(base.weight):
        # An 8-bit weight's scales are in the layer's state.
        return dequantize_bnb_weight(base.weight, getattr(base, "state", None))
    return oriented(module, weight)


def oriented(module: LoraLinear, weight: Tensor) -> Tensor:
    """A base weight's values as W (out, in); Conv1D keeps them as (in, out)."""
    return weight.T if module.fan_in_fan_out else weight


@contextlib.contextmanager
def pretrained(model: nn.Module) -> Iterator[None]:
    """Inside, a PEFT model is its base model.

    Not by PEFT's own `disable_adapter`, which leaves adapters on and their parameters to be trained
    however it found them.
    """
    adapted = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [module._disable_adapters for module in adapted]
    try:
        for module in adapted:
            module._disable_adapters = True  # type: ignore[assignment]
        yield
    finally:
        for module, disabled in zip(adapted, before, strict=True):
            module._disable_adapters = disabled


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that a PEFT model without its adapters computes with, by its name in the base model:
    parameters, buffers, and the state of quantised weights.
    """
    found = {}
    for name, tensor in (model.state_dict() | dict(model.named_buffers())).items():
        parts = name.removeprefix(MODEL_PREFIX).split(".")
        own = not any(part.startswith("lora_") or part == "modules_to_save" for part in parts)
        if own and isinstance(tensor, Tensor):
            wrappers = ("base_layer", "original_module")
            found[".".join(part for part in parts if part not in wrappers)] = tensor
    return found


def rescaled(module: LoraLinear, adapter: str, r: int) -> tuple[float, float]:
    """(α, s) of a layer that gets another rank: α/r stays, and s is what PEFT makes of the two. A
    layer of rank 0 keeps both.
    """
    old = module.r[adapter]
    alpha, scaling = module.lora_alpha[adapter], float(module.scaling[adapter])
    if r in (0, old):
        return alpha, scaling
    alpha *= r / old
    return alpha, alpha / (math.sqrt(r) if module.use_rslora[adapter] else r)


def commit(
    modules: Sequence[LoraLinear], factors: Sequence[Factors], adapter: str, residual: Residual
) -> None:
    """Write factors, from whatever device, and residuals or what replaces the base into the model;
    all that can fail has been tried before.
    """

    def one(item: tuple[LoraLinear, Factors]) -> None:
        module, stored = item
        if module.r[adapter] != stored.r:
            _resize(module, adapter, stored.r)
        writes = residual in ("stored", "replaced")
        base = [module.get_base_layer().weight] if writes else []
        targets = [module.lora_A[adapter].weight, module.lora_B[adapter].weight]
        with gathered(*targets, *base, write=True) as (A, B, *weights):
            for values in weights:
                weight = oriented(module, values)
                if stored.base is not None:
                    weight.copy_(stored.base)
                else:
                    on(weight.device, stored).residual(weight, out=weight)
            A.copy_(stored.A)
            B.copy_(stored.B)
            if residual == "virtual":
                module.lora_variant[adapter] = VirtualStart(stored, A.device)
            else:
                module.lora_variant.pop(adapter, None)

    items = list(zip(modules, factors, strict=True))
    with deferred_interrupt():
        if any_sharded(modules, adapter):
            # Collectives: in one order on all ranks, from the thread whose device the caller set.
            with alive(), single_threaded(), torch.no_grad():
                for item in items:
                    one(item)
        else:
            map_layers(one, items)


def _resize(module: LoraLinear, adapter: str, r: int) -> None:
    """Give a layer factors of another rank, not initialised, that are trained as its own were."""
    module.lora_alpha[adapter], module.scaling[adapter] = rescaled(module, adapter, r)
    module.r[adapter] = r
    A, B = module.lora_A[adapter], module.lora_B[adapter]
    A.out_features = B.in_features = r
    for linear in (A, B):
        old, shape = linear.weight, (linear.out_features, linear.in_features)
        with torch.inference_mode(False):  # one that was made in it gets no gradient
            linear.weight = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)


def settle_ranks(model: PeftModel, adapter: str, modules: Mapping[str, LoraLinear]) -> None:
    """Have a model and its config agree with the ranks that its layers got: those of rank 0 lose
    their adapter, and PEFT makes the others alike when it loads what is saved.
    """
    config, base = lora_config(model, adapter), model.get_base_model()
    kept = {name: module for name, module in modules.items() if module.r[adapter]}
    for name in modules.keys() - kept.keys():
        module = modules[name]
        own = [*module.adapter_layer_names, *module.other_param_names, "lora_variant"]
        for parts in (getattr(module, attribute) for attribute in own):
            if adapter in parts:
                del parts[adapter]
        if not module.lora_A:
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.get_base_layer())
    if len(kept) < len(modules):
        config.target_modules = sorted(kept)
    ranks = {name: module.r[adapter] for name, module in kept.items()}
    alphas = {name: module.lora_alpha[adapter] for name, module in kept.items()}
    config.rank_pattern = exact_pattern(ranks, config.r)
    config.alpha_pattern = exact_pattern(alphas, config.lora_alpha)


def any_sharded(modules: Iterable[LoraLinear], adapter: str) -> bool:
    """Whether a base weight or a factor is."""
    return any(
        is_sharded(layer.weight)
        for module in modules
        for layer in (module.get_base_layer(), module.lora_A[adapter], module.lora_B[adapter])
    )


def on(device: torch.device, factors: Factors) -> Factors:
    """The factors on a device, themselves if they are there."""
    base = None if factors.base is None else factors.base.to(device)
    return dataclasses.replace(factors, A=factors.A.to(device), B=factors.B.to(device), base=base)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
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
