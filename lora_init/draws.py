"""Random starts: all draws of a layer are its own generator's, in one order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lora_init.factors import Factors
from lora_init.methods import Layer
from lora_init.parallel import single_threaded

# Fills a tensor in place.
Draw = Callable[[Tensor, torch.Generator], object]


def normal(std: float) -> Draw:
    """N(0, std²)."""
    return lambda tensor, generator: nn.init.normal_(tensor, std=std, generator=generator)


def zeros(tensor: Tensor, generator: torch.Generator) -> object:
    """0, which draws nothing."""
    return nn.init.zeros_(tensor)


def draw_factors(layer: Layer, A: Draw, B: Draw | None = None) -> tuple[Tensor, Tensor]:
    """A (r, in) then B (out, r), which is drawn as A is if None.

    In fp32 on the CPU, so that the values are the same everywhere, then in fp32 (fp64 for an fp64
    weight) on the weight's device.
    """
    out_features, in_features = layer.weight.shape
    generator = layer.generator()
    # Explicit, because users change torch's default dtype and device.
    drawn_A = torch.empty(layer.r, in_features, dtype=torch.float32, device="cpu")
    drawn_B = torch.empty(out_features, layer.r, dtype=torch.float32, device="cpu")
    # orthogonal_ factorises, whose bits depend on the threads.
    with torch.no_grad(), single_threaded():
        A(drawn_A, generator)
        (B or A)(drawn_B, generator)
    return to_weight(layer, drawn_A), to_weight(layer, drawn_B)


def drawn(layers: Sequence[Layer], A: Draw, B: Draw | None = None) -> list[Factors]:
    """Factors that are drawn and nothing else."""
    return [Factors(*draw_factors(layer, A, B), layer.scaling) for layer in layers]


def to_weight(layer: Layer, values: Tensor) -> Tensor:
    """A factor's values in the dtype that methods return, fp32 or that of an fp64 weight, and on
    the weight's device.
    """
    dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    return values.to(layer.weight.device, dtype)
