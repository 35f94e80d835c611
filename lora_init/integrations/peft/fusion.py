"""`fuse` and `unfuse`: PEFT's LoRA layers computed by the op `lora_linear`, and nothing else
changed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from lora_init import selftest
from lora_init.distributed import ranks
from lora_init.factors import LoraInitError
from lora_init.integrations.peft.layers import LoraLinear, lora_layers
from lora_init.integrations.peft.mixins import Mixin, mixed, unmixed
from lora_init.integrations.peft.sharded import here, is_partitioned, is_sharded
from lora_init.integrations.peft.virtual import VirtualStart
from lora_init.ops.lora_linear import lora_linear

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did.

    Attributes:
        fused: names of the layers that run `lora_linear` now, by their module names in the base.
        left: name -> why the layer still runs PEFT's own forward.
    """

    fused: list[str]
    left: dict[str, str]

    def __str__(self) -> str:
        by_reason = defaultdict(list)
        for name, reason in self.left.items():
            by_reason[reason].append(name)
        lines = [f"{len(self.fused)} LoRA layers fused, {len(self.left)} left to PEFT"]
        for reason, names in by_reason.items():
            lines.append(f"  {len(names)} ({names[0]}{', ...' if names[1:] else ''}): {reason}")
        return "\n".join(lines)


def fuse(model: nn.Module, *, distributed: bool = True) -> FuseReport:
    """Have a model's LoRA layers run the fused op `lora_linear`, forward and backward.

    Only the forward of `peft.tuners.lora.Linear` on an `nn.Linear` is exchanged. Parameters, state
    dict, saving, `merge_adapter`, `disable_adapter`, `set_adapter` and all else is PEFT's, and
    whenever a call is not one plain active adapter's (none or several are active, it is merged or
    disabled, `adapter_names` is given, someone hooked into the base layer) PEFT's forward runs.
    Before or after `initialize`, and before DDP, FSDP2 or torch.compile wrap the model. The same
    layers may be fused again, after an adapter was added. Kernels are self-tested on the devices
    that the layers are on now: move a model that will train on a GPU there first.

    Dropout has the op's mask, not nn.Dropout's: without dropout the results are PEFT's but for
    rounding.

    Args:
        model: a PEFT model, or any module with PEFT's LoRA layers in it.
        distributed: in a torch.distributed job all ranks call this at the same place, and a kernel
            that fails its self-test on one is used on none; False asks this rank alone.

    Returns:
        A `FuseReport`; print it to see which layers were left, and why.

    Raises:
        LoraInitError: the model has no LoRA layer; on every rank, if that of one has none.
    """
    with ranks(distributed) as job:
        layers = job.together(lambda: _layers(model))
        devices = {here(next(layer.parameters())).device for layer in layers.values()}
        selftest.ensure({device for device in devices if device.type != "meta"}, job)
    fused, left = [], {}
    for name, layer in layers.items():
        reasons = [_why_not(layer, adapter) for adapter in layer.lora_A] or [_not_linear(layer)]
        if None in reasons:
            if not isinstance(layer, FusedLinear):
                layer.__class__ = mixed(FusedLinear, type(layer))
            fused.append(name)
        else:
            left[name] = str(reasons[0])
    return FuseReport(fused, left)


def unfuse(model: nn.Module) -> None:
    """Give every layer PEFT's own forward back; the model is then as if never fused.

    Raises:
        LoraInitError: the model has no LoRA layer, or something else changed a fused layer's class
            (`fully_shard` on that very layer); no layer is changed then.
    """
    found = []
    for name, layer in _layers(model).items():
        if isinstance(layer, FusedLinear):
            own = unmixed(layer, FusedLinear)
            if own is None:
                raise LoraInitError(
                    f"{name}: its class was changed to {type(layer)} after fuse(): call unfuse() "
                    "before"
                )
            found.append((layer, own))
    for layer, own in found:
        layer.__class__ = own


class FusedLinear(Mixin, Linear):
    """Mixed into a PEFT LoRA layer's class: runs `lora_linear` where that is the same function."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., in). Returns (..., out), as PEFT's."""
        adapter = None if args or kwargs else _fusible_adapter(self)
        if adapter is None:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        return _run(self, adapter, x)


def _fusible_adapter(layer: LoraLinear) -> str | None:
    """The one adapter that a call is of; None where PEFT's own forward is to run."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(active) != 1 or _why_not(layer, active[0]):
        return None
    # FSDP2 gathers parameters around the modules that it wrapped: then not yet around these.
    sharded = is_sharded(layer.base_layer.weight) or is_sharded(layer.lora_A[active[0]].weight)
    return None if sharded else active[0]


def _run(layer: LoraLinear, adapter: str, x: Tensor) -> Tensor:
    base, A = layer.base_layer, layer.lora_A[adapter].weight
    dropout, variant = layer.lora_dropout[adapter], layer.lora_variant.get(adapter)
    return lora_linear(
        x,
        base.weight,
        A,
        layer.lora_B[adapter].weight,
        layer.scaling[adapter],
        base.bias,
        dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        start=None if variant is None else variant.factors(A),
    )


def _layers(model: nn.Module) -> dict[str, LoraLinear]:
    layers: dict[str, LoraLinear] = dict(lora_layers(model))
    if not layers:
        raise LoraInitError(
            f"{type(model).__name__} has no LoRA layer of PEFT: pass the model from get_peft_model"
        )
    return layers


def _not_linear(layer: LoraLinear) -> str | None:
    base = layer.base_layer
    if not isinstance(layer, Linear) or type(base).forward is not nn.Linear.forward:
        return f"LoRA on {type(base).__name__} ({type(layer).__name__}), not on a plain nn.Linear"
    # A forward that was set on the object, as accelerate's hooks are, would go on to call PEFT's.
    own = type(layer).forward is Linear.forward and "forward" not in vars(layer)
    return None if own or isinstance(layer, FusedLinear) else "its forward is not PEFT's own"


def _why_not(layer: LoraLinear, adapter: str) -> str | None:
    """Why PEFT's own forward must run for this adapter of a layer, or None."""
    if reason := _not_linear(layer):
        return reason
    variant = layer.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, VirtualStart):
        name = type(variant).__name__.removesuffix("LinearVariant")
        return f"its adapter is {name}, not plain LoRA"
    base, A, B = layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]
    for label, part in (("lora_A", A), ("lora_B", B)):
        # FSDP1 as transformers sets it up for PEFT wraps each, and gathers it around its forward.
        if type(part).forward is not nn.Linear.forward:
            return f"its {label} is a {type(part).__name__}, not a plain nn.Linear"
    if not isinstance(layer.scaling[adapter], int | float):
        return f"its scaling is a {type(layer.scaling[adapter]).__name__} (compiled hot-swapping)"
    if B.bias is not None:
        return "lora_bias=True"
    dropout = layer.lora_dropout[adapter]
    if not isinstance(dropout, nn.Identity) and not (type(dropout) is nn.Dropout and dropout.p < 1):
        return f"its dropout is {dropout}"
    weight = here(base.weight)
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in _DTYPES:
        return f"its base weight is a {type(weight).__name__} of {weight.dtype}"
    if base.weight.requires_grad:
        return "its base weight is trained"
    if is_partitioned(base.weight) or is_partitioned(A.weight):
        return "DeepSpeed ZeRO-3 gathers its parameters for PEFT's forward only"
    for label, part in (("base layer", base), ("lora_A", A), ("lora_B", B), ("dropout", dropout)):
        if _intercepted(part):
            return f"its {label} has hooks or another forward, which would not run"
    return None


def _intercepted(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )
