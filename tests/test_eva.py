"""eva against numpy and PEFT: directions, and how ranks go to where the variance is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_init import Factors, LoraInitError, approximate
from lora_init.methods import Layer, resolve_method
from lora_init.statistics import Tokens
from lora_init.testing import DTYPES, gaussian
from tests.calibrating import calls, collect_all

SHAPES = {"a.q": (24, 32), "a.v": (8, 32), "b.q": (24, 40), "b.v": (8, 5)}


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, list[Tokens]]:
    """Of layers whose inputs' variance falls off at different rates."""
    found = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        data = calls(*shape, dtype=dtype, seed=i)
        flat = torch.arange(1, shape[1] + 1, dtype=torch.float64) ** (0.7 - i / 2)
        found[name] = [Tokens((t.x.double() * flat).to(dtype), None, t.valid) for t in data]
    return found


def solve(
    data: dict[str, list[Tokens]], r: int | dict[str, int] = 4, **options: float
) -> dict[str, Factors]:
    method = resolve_method("eva", options)
    weights = {name: gaussian(*SHAPES[name], data[name][0].x.dtype) for name in data}
    ranks = r if isinstance(r, dict) else dict.fromkeys(data, r)
    collected = {
        name: collect_all(method, Layer(name, weights[name], ranks[name]), data[name])
        for name in data
    }
    return approximate(weights, ranks, method, statistics=collected, cache=False)


def centred(data: list[Tokens]) -> np.ndarray:
    x = np.concatenate([t.x[t.valid].double().numpy() for t in data])
    return x - x.mean(0)


def expected_ranks(
    data: dict[str, list[Tokens]], ranks: dict[str, int], rho: float
) -> dict[str, int]:
    ratios = []
    for name, tokens in data.items():
        S = np.linalg.svd(centred(tokens), compute_uv=False) ** 2
        ratios += [(ratio, name) for ratio in (S / S.sum())[: round(rho * ranks[name])]]
    taken = [name for _, name in sorted(ratios, reverse=True)[: sum(ranks.values())]]
    return {name: taken.count(name) for name in data}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_directions_are_those_of_the_centred_inputs(dtype: torch.dtype) -> None:
    data = inputs(dtype)
    for name, f in solve(data, rho=1).items():
        _, _, Vh = np.linalg.svd(centred(data[name]), full_matrices=False)
        sizes = np.abs(Vh[:4])
        first = (sizes >= sizes.max(1, keepdims=True) * (1 - 1e-6)).argmax(1)
        signed = Vh[:4] * np.sign(Vh[np.arange(4), first])[:, None]
        assert f.r == 4
        assert np.abs(f.A.double().numpy() - signed).max() < (1e-9 if dtype.itemsize == 8 else 1e-3)
        assert not f.B.any()


@pytest.mark.parametrize("rho", [1, 1.3, 2, 3.5])
@pytest.mark.parametrize("each", [(4, 4, 4, 4), (1, 3, 5, 2)], ids=str)
def test_ranks_go_to_the_largest_ratios(each: tuple[int, ...], rho: float) -> None:
    ranks = dict(zip(SHAPES, each, strict=True))
    data = inputs()
    found = {name: f.r for name, f in solve(data, ranks, rho=rho).items()}
    assert found == expected_ranks(data, ranks, rho)
    assert sum(found.values()) == sum(ranks.values())
    if rho == 1:
        assert found == ranks
    else:
        assert found != ranks


def statistics(variances: list[float], total: float, in_features: int = 6) -> dict[str, Tensor]:
    return {
        "components": torch.eye(in_features)[: len(variances)],
        "variances": torch.tensor(variances),
        "total_variance": torch.tensor(total),
    }


def test_a_layer_may_get_none_and_ties_go_by_name() -> None:
    collected = {
        "c": statistics([0.5, 0.4, 0.3, 0.2], 2.0),
        "b": statistics([0.5, 0.4, 0.3, 0.2], 2.0),
        "a": statistics([1, 1, 1, 1], 100.0),
    }
    weights = {name: gaussian(5, 6) for name in collected}
    for names in (("a", "b", "c"), ("c", "a", "b")):
        found = approximate(
            {name: weights[name] for name in names}, 2, "eva", statistics=collected, cache=False
        )
        assert {name: f.r for name, f in found.items()} == {"a": 0, "b": 3, "c": 3}
        assert found["a"].A.shape == (0, 6)
        assert found["a"].B.shape == (5, 0)
        assert found["b"].info["r"] == 3
    odd = approximate(weights, {"a": 1, "b": 2, "c": 2}, "eva", statistics=collected, cache=False)
    assert {name: f.r for name, f in odd.items()} == {"a": 0, "b": 3, "c": 2}


def test_what_cannot_be_is_refused() -> None:
    weights = {"a.q": gaussian(5, 6)}
    good = statistics([0.5, 0.4, 0.3, 0.2], 2.0)
    for rho in (0.5, float("nan"), "2"):
        with pytest.raises(LoraInitError, match=f"^eva: rho must be a number ≥ 1, got {rho!r}"):
            resolve_method("eva", {"rho": rho})
    for bad, message in (
        (statistics([0.0, 0.0], 0.0), r"a\.q: its inputs are the same for every token"),
        (good | {"total_variance": torch.tensor(torch.nan)}, r"a\.q: total_variance is not fin"),
        (good | {"components": torch.eye(7)}, r"a\.q: components must be at least \(4, 6\)"),
        (good | {"components": torch.full((4, 6), torch.inf)}, r"a\.q: components is not finite"),
    ):
        with pytest.raises(LoraInitError, match=message):
            approximate(weights, 4, "eva", statistics={"a.q": bad}, cache=False)
