"""Which LoRA layers of a PEFT model can be initialised, and the write into them."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_init.adapters import MODEL_PREFIX
from lora_init.factors import Factors, LoraInitError
from lora_init.parallel import map_layers

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


def initialisable_modules(model: PeftModel, adapter: str, residual: bool) -> dict[str, LoraLinear]:
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
        clash = clashes.get(f"{MODEL_PREFIX}{name}.base_layer.weight")
        if clash:
            other = clash.removeprefix(MODEL_PREFIX).replace(".base_layer", "")
            reasons[name] = (
                f"its weight is shared with {other}, which would change too (tied weights)"
            )
    return reasons


def base_weight(module: LoraLinear) -> Tensor:
    """W (out, in) as a view of the base weight."""
    weight = module.get_base_layer().weight.detach()
    return weight.T if module.fan_in_fan_out else weight


def commit(
    modules: Sequence[LoraLinear], factors: Sequence[Factors], adapter: str, residual: bool
) -> None:
    """Write factors and residuals into the model; all that can fail has been tried before."""

    def one(item: tuple[LoraLinear, Factors]) -> None:
        module, stored = item
        weight = base_weight(module)
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
