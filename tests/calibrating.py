"""What tests of statistics and of the methods that take them share: made-up calls of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_init.methods import Layer, Method
from lora_init.statistics import Statistic, Tokens


def calls(
    out_features: int,
    in_features: int,
    sizes: Sequence[int] = (7, 33, 2, 50, 41),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    padding: bool = True,
) -> list[Tokens]:
    """Calls of a layer with anisotropic inputs of a mean, and gradients that depend on them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    spread = torch.arange(1, in_features + 1, dtype=torch.float64) ** -0.7
    mixing = normal(in_features, in_features) / in_features**0.5
    target = normal(in_features, out_features) * torch.arange(1, out_features + 1) ** -0.5
    shift = normal(in_features)
    found = []
    for n in sizes:
        x = (normal(n, in_features) * spread) @ mixing + shift
        dy = (x @ target + normal(n, out_features)) / n
        valid = torch.ones(n, dtype=torch.bool)
        if padding and n > 2:
            valid[-n // 4 :] = False
            dy[~valid] = 0
        found.append(Tokens(x.to(dtype), dy.to(dtype), valid))
    return found


def collect(statistic: Statistic, layer: Layer, data: Sequence[Tokens]) -> Mapping[str, Tensor]:
    """What a statistic makes of calls, each of which is a batch (and an example) of its own; one
    that is trained takes one step down their mean gradient.
    """
    state = statistic.start(layer)
    if statistic.trained:
        A, B = state["A"], state["B"]
        B -= (gradient(data) @ A.double().T).to(B.dtype)
        return statistic.finish(layer, state, len(data))
    for turn in range(statistic.passes):
        if turn:
            state = statistic.next_pass(layer, state)
        for tokens in data:
            statistic.add(layer, state, tokens)
    return statistic.finish(layer, state, len(data))


def collect_all(method: Method, layer: Layer, data: Sequence[Tokens]) -> dict[str, Tensor]:
    """All that a method needs of a layer."""
    return {
        key: value
        for statistic in method.statistics(layer)
        for key, value in collect(statistic, layer, data).items()
    }


def gradient(data: Sequence[Tokens]) -> Tensor:
    """(out, in) in fp64, as the definition has it."""
    total = sum(t.dy.double().T @ t.x.double() for t in data if t.dy is not None)
    assert isinstance(total, Tensor)
    return total / len(data)
