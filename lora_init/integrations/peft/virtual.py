"""The virtual residual of a PEFT layer: W stays, the low-rank branch subtracts the start."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor
from torch.nn.functional import linear

from lora_init.factors import Factors, shifted


class VirtualStart(LoraVariant):
    """Has a layer compute W x + s(B A − B₀A₀) drop(x), exactly W x while A = A₀ and B = B₀.

    PEFT asks an adapter's variant for all that depends on its formula: the forward pass, also with
    several adapters active or a mixed batch, merging and unmerging, on plain and on quantised
    weights. Nothing of it is in the state dict.
    """

    def __init__(self, start: Factors, device: torch.device):
        """
        Args:
            start: A₀ (r, in) and B₀ (out, r), which are copied; s is the layer's own.
            device: of the layer's factors.
        """
        # PEFT's low_cpu_mem_usage has those on meta until they are loaded: this must keep values.
        where = None if device.type == "meta" else device
        with torch.inference_mode(False):  # what that makes could not train later
            A0, B0 = (t.detach().to(where, copy=True) for t in (start.A, start.B))
            self.A0, self.B0 = A0.contiguous(), B0.contiguous()

    def factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(A₀, B₀) on the device of `like`, where they stay, in its dtype."""
        A0, B0 = self.A0, self.B0  # DataParallel's threads share this object, each on its device
        if A0.device != like.device or B0.device != like.device:
            # module.to() does not know of them.
            with torch.inference_mode(False):
                A0, B0 = A0.to(like.device), B0.to(like.device)
            self.A0, self.B0 = A0, B0
        return A0.to(like.dtype), B0.to(like.dtype)

    def forward(  # type: ignore[override]  # PEFT's are static, and called on the instance
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        A0, B0 = self.factors(x)
        x = module.lora_dropout[active_adapter](x)  # one mask for both products
        update = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        update = update - linear(linear(x, A0), B0)
        return result + update * module.scaling[active_adapter]

    def merge_safe(  # type: ignore[override]
        self, module: Any, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        return self._shifted(module, active_adapter, orig_weight, 1)

    def merge_unsafe(  # type: ignore[override]
        self, module: Any, active_adapter: str, orig_weight: Tensor
    ) -> None:
        orig_weight.data.copy_(self._shifted(module, active_adapter, orig_weight, 1))

    def unmerge(  # type: ignore[override]
        self, module: Any, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        return self._shifted(module, active_adapter, orig_weight, -1)

    def supports_lora_conversion(self) -> bool:
        return False  # PEFT would convert B A alone

    def _shifted(self, module: Any, adapter: str, weight: Tensor, sign: int) -> Tensor:
        """weight ± s(B A − B₀A₀)."""
        A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        oriented = weight.detach().T if module.fan_in_fan_out else weight.detach()
        found = shifted(oriented, A, B, sign * module.scaling[adapter], self.factors(A))
        return found.T if module.fan_in_fan_out else found
