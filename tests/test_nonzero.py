"""Non-zero initialisation: each factor's distribution, and what the base becomes."""

import math

import pytest
import torch

from lora_init import LoraInitError, approximate
from lora_init.methods import resolve_method
from lora_init.testing import gaussian
from tests.test_inilora import assert_drawn, normal

OUT, IN, R = 3000, 2000, 40
KAIMING = 1 / math.sqrt(IN)
# Standard deviations of A and B for a size β, from the paper; 0: no draw.
STARTS = {
    "init_a": (lambda beta: beta * KAIMING, None),
    "init_b": (None, lambda beta: beta / math.sqrt(R)),
    "init_ab": (lambda beta: beta * KAIMING, lambda beta: beta * KAIMING),
    "init_ab_plus": (lambda beta: beta * KAIMING, lambda beta: beta * KAIMING),
}


@pytest.mark.parametrize("options", [{}, {"beta": 0.25}, {"beta": 16}], ids=str)
@pytest.mark.parametrize("method", STARTS)
def test_factors_have_the_papers_variance(method: str, options: dict[str, float]) -> None:
    f = approximate({"q": gaussian(OUT, IN)}, R, method, scaling=2.0, **options)["q"]
    assert f.scaling == 2.0
    for matrix, deviation in zip((f.A, f.B), STARTS[method], strict=True):
        if deviation is None:
            assert not matrix.any()
        else:
            assert_drawn(matrix, normal(deviation(options.get("beta", 1.0))))


def test_only_init_ab_takes_its_product_from_the_base() -> None:
    assert [m for m in STARTS if resolve_method(m, {}).residual] == ["init_ab"]


def test_init_ab_plus_is_init_ab_on_the_untouched_base() -> None:
    weights = {"a.q": gaussian(24, 16), "b.q": gaussian(16, 24)}
    plain, plus = (approximate(weights, 4, m, beta=2.0) for m in ("init_ab", "init_ab_plus"))
    for name in weights:
        assert torch.equal(plain[name].A, plus[name].A)
        assert torch.equal(plain[name].B, plus[name].B)


@pytest.mark.parametrize("method", STARTS)
def test_draws_follow_seed_and_name(method: str) -> None:
    weights = {"a.q": gaussian(24, 16), "b.q": gaussian(24, 16)}
    first, other = (approximate(weights, 4, method, seed=seed) for seed in (0, 1))
    for name in weights:
        for one, two in ((first["a.q"], first["b.q"]), (first[name], other[name])):
            assert not (torch.equal(one.A, two.A) and torch.equal(one.B, two.B))


@pytest.mark.parametrize("method", STARTS)
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "1"], ids=repr)
def test_bad_sizes_are_refused(method: str, value: object) -> None:
    with pytest.raises(LoraInitError, match=f"{method}: beta must be a number > 0, got "):
        resolve_method(method, {"beta": value})
