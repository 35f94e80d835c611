"""lora_ga, lora_one, lora_sb and lora_da against numpy, from their published definitions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_init import Factors, LoraInitError, approximate
from lora_init.methods import Layer, resolve_method
from lora_init.statistics import Tokens
from lora_init.testing import DTYPES, gaussian
from tests.calibrating import calls, collect_all, gradient

SHAPES = {"33x65": (33, 65), "64x48": (64, 48), "17x130": (17, 130)}


def solve(
    method: str,
    data: list[Tokens],
    r: int = 4,
    scaling: float = 1.0,
    statistics: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Factors:
    """Factors of a layer that was called with the data."""
    assert data[0].dy is not None
    weight = gaussian(data[0].dy.shape[1], data[0].x.shape[1], data[0].x.dtype)
    chosen = resolve_method(method, options)
    layer = Layer("a.q", weight, r, scaling)
    given_ = collect_all(chosen, layer, data) if statistics is None else statistics
    return approximate(
        {"a.q": weight}, r, chosen, scaling=scaling, statistics={"a.q": given_}, cache=False
    )["a.q"]


def numpy_svd(matrix: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, S and V."""
    U, S, Vh = np.linalg.svd(np.asarray(matrix), full_matrices=False)
    return U, S, Vh.T


def positive(columns: np.ndarray) -> np.ndarray:
    """Signs that make the largest entry of each column, the first of those, positive."""
    sizes = np.abs(columns)
    first = (sizes >= sizes.max(0) * (1 - 1e-6)).argmax(0)
    return np.sign(columns[first, np.arange(columns.shape[1])])


def arrays(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    return factors.A.double().numpy(), factors.B.double().numpy()


def assert_near(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lora_ga_is_its_definition(shape: tuple[int, int]) -> None:
    data, r, gamma = calls(*shape), 4, 9.0
    A, B = arrays(solve("lora_ga", data, r, exact_gradient=True, gamma=gamma, scaling=3.0))
    U, _, V = numpy_svd(gradient(data))
    c = shape[0] ** 0.25 / math.sqrt(gamma)
    right, left = V[:, :r], U[:, r : 2 * r]
    assert_near(A, c * (right * positive(right)).T, 1e-9)
    assert_near(B, c * left * positive(left), 1e-9)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lora_one_is_its_definition(shape: tuple[int, int]) -> None:
    data, r, gamma = calls(*shape), 4, 50.0
    A, B = arrays(solve("lora_one", data, r, exact_gradient=True, gamma=gamma, scaling=3.0))
    U, S, V = numpy_svd(-gradient(data))
    sign, size = positive(U[:, :r]), np.sqrt(S[:r] / S[0] / gamma)
    assert_near(A, (V[:, :r] * sign * size).T, 1e-9)
    assert_near(B, U[:, :r] * sign * size, 1e-9)
    # A step downhill: along −G.
    assert np.sum((B @ A) * np.asarray(gradient(data))) < 0


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lora_sb_is_the_best_rank_of_a_sign_step(shape: tuple[int, int]) -> None:
    data, r, scaling = calls(*shape), 4, 3.0
    options = {"lr": 2e-3, "warmup_ratio": 0.1, "total_steps": 50}
    A, B = arrays(solve("lora_sb", data, r, scaling, **options))
    U, S, V = numpy_svd(-np.sign(np.asarray(gradient(data))) * 2e-3 / (0.1 * 50))
    assert_near(scaling * B @ A, (U[:, :r] * S[:r]) @ V[:, :r].T, 1e-9)
    sign = positive(U[:, :r])
    # The core is folded into B; A keeps the orthonormal directions.
    assert_near(A * math.sqrt(scaling), (V[:, :r] * sign).T, 1e-9)
    assert_near(B * math.sqrt(scaling), U[:, :r] * sign * S[:r], 1e-9)


def numpy_lora_da(
    data: list[Tokens], r: int, train_size: int, beta_v: float, gamma: float, damping: float | None
) -> tuple[np.ndarray, np.ndarray]:
    G = np.asarray(gradient(data))
    x = np.concatenate([t.x[t.valid].numpy() for t in data])
    dy = np.concatenate([t.dy[t.valid].numpy() for t in data if t.dy is not None])
    Z = x.T @ x / len(x) + 1e-6 * np.eye(x.shape[1])
    y = (dy**2).mean(0)
    # torch's median: the lower of the two in the middle.
    epsilon = 1e-6 if damping is None else damping * np.sort(y)[(len(y) - 1) // 2]
    y = 1 / (y + epsilon)
    delta = -np.linalg.inv(Z) @ G.T @ np.diag(y)
    sigma = np.linalg.norm(delta, 2)
    delta /= sigma
    omega = -delta @ delta.T + beta_v * (y.sum() / (train_size * sigma**2)) * np.linalg.inv(Z)
    _, vectors = np.linalg.eigh((omega + omega.T) / 2)
    a = vectors[:, :r] * positive(vectors[:, :r])
    return a.T / math.sqrt(gamma), (a.T @ delta).T / math.sqrt(gamma)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {"train_size": 100_000, "beta_v": 0.03, "gamma": 1024.0, "damping": None},
        {"train_size": 7, "beta_v": 30.0, "gamma": 2.0, "damping": 0.1},
    ],
    ids=["published", "others"],
)
def test_lora_da_is_its_definition(shape: tuple[int, int], options: dict[str, Any]) -> None:
    data = calls(*shape, sizes=(70, 80, 90))
    A, B = arrays(solve("lora_da", data, 4, 3.0, **options))
    expected_A, expected_B = numpy_lora_da(data, 4, **options)
    assert_near(A, expected_A, 1e-7)
    assert_near(B, expected_B, 1e-7)


def test_balancing_keeps_the_product_of_lora_da() -> None:
    data = calls(33, 65)
    plain, balanced = (arrays(solve("lora_da", data, balanced=b)) for b in (False, True))
    assert_near(balanced[1] @ balanced[0], plain[1] @ plain[0], 1e-12)
    norms = [np.linalg.norm(balanced[0], axis=1), np.linalg.norm(balanced[1], axis=0)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["lora_ga", "lora_one", "lora_sb", "lora_da"])
def test_the_models_dtype_costs_its_rounding_alone(method: str, dtype: torch.dtype) -> None:
    data = calls(33, 65, sizes=(70, 80, 90), dtype=dtype)
    wide = [Tokens(t.x.double(), None if t.dy is None else t.dy.double(), t.valid) for t in data]
    found, exact = (arrays(solve(method, d)) for d in (data, wide))
    for a, b in zip(found, exact, strict=True):
        # Z's condition number is 5e7 here.
        rounded = 2e-2 if method == "lora_da" else 1e-4
        assert_near(a, b, 1e-12 if dtype == torch.float64 else rounded)


shapes = st.tuples(st.integers(4, 60), st.integers(4, 60))


@settings(max_examples=25, deadline=None)
@given(
    shape=shapes, part=st.floats(0.01, 1), scaling=st.floats(0.1, 8), exact=st.booleans(),
    passes=st.integers(1, 3),
)  # fmt: skip
def test_lora_ga_moves_along_the_best_rank_2r(
    shape: tuple[int, int], part: float, scaling: float, exact: bool, passes: int
) -> None:
    r = max(1, round(part * min(shape) / 2))
    data = calls(*shape, sizes=(90,))
    gamma = math.sqrt(shape[0])  # c = 1: the factors are orthonormal
    A, B = arrays(
        solve("lora_ga", data, r, scaling, exact_gradient=exact, passes=passes, gamma=gamma)
    )
    assert np.abs(A @ A.T - np.eye(r)).max() < 1e-9
    assert np.abs(B.T @ B - np.eye(r)).max() < 1e-9
    if exact or min(shape) <= 32:  # 32 columns: a sketch of so few rows is exact
        G = np.asarray(gradient(data))
        U, S, V = numpy_svd(G)
        best = (U[:, : 2 * r] * S[: 2 * r]) @ V[:, : 2 * r].T
        assert_near(B @ B.T @ G + G @ A.T @ A, best, 1e-8)


@settings(max_examples=25, deadline=None)
@given(shape=shapes, part=st.floats(0.01, 1), scaling=st.floats(0.1, 8))
def test_lora_one_and_lora_sb_are_best_approximations(
    shape: tuple[int, int], part: float, scaling: float
) -> None:
    r = max(1, round(part * min(shape)))
    data = calls(*shape, sizes=(90,))
    G = np.asarray(gradient(data))
    for method, step, size in (
        ("lora_one", -G, 1 / (128 * np.linalg.norm(G, 2) * 1)),
        ("lora_sb", -np.sign(G), 1e-4 / (0.02 * 1000) / scaling),
    ):
        options = {"exact_gradient": True} if method == "lora_one" else {}
        A, B = arrays(solve(method, data, r, scaling, **options))
        _, S, _ = numpy_svd(step)
        error = np.linalg.norm(B @ A - size * step)
        assert error == pytest.approx(
            size * np.sqrt((S[r:] ** 2).sum()), rel=1e-9, abs=1e-9 * size * S[0]
        )


@pytest.mark.parametrize("method", ["lora_ga", "lora_one"])
def test_sketches_give_what_exact_gradients_do(method: str) -> None:
    data = calls(96, 120, sizes=(200, 200))
    exact = arrays(solve(method, data, 8, exact_gradient=True))

    # Angles of a row space with A's and a column space with B's, their cosines' least.
    def nearness(other: tuple[np.ndarray, np.ndarray]) -> float:
        cosines = []
        for a, b in ((exact[0].T, other[0].T), (exact[1], other[1])):
            spans = [np.linalg.qr(x)[0] for x in (a, b)]
            cosines += list(np.linalg.svd(spans[0].T @ spans[1], compute_uv=False))
        return float(np.mean(cosines))

    found = [nearness(arrays(solve(method, data, 8, passes=passes))) for passes in (1, 2, 3)]
    assert found == sorted(found)
    assert found[1] > 0.99
    assert found[2] > 0.999


BAD_OPTIONS = {
    "gamma": ("lora_ga", {"gamma": 0}, "gamma must be a number > 0, got 0"),
    "passes": ("lora_one", {"passes": 0}, "passes must be a whole number ≥ 1, got 0"),
    "exact_gradient": ("lora_ga", {"exact_gradient": 1}, "exact_gradient must be True or False"),
    "lr": ("lora_sb", {"lr": -1.0}, "lr must be a number > 0"),
    "total_steps": ("lora_sb", {"total_steps": 0}, "total_steps must be a number > 0"),
    "train_size": ("lora_da", {"train_size": 0}, "train_size must be a whole number > 0"),
    "beta_v": ("lora_da", {"beta_v": -0.1}, "beta_v must be a number ≥ 0"),
    "epsilon": ("lora_da", {"epsilon": 0.0}, "epsilon must be a number > 0"),
    "damping": ("lora_da", {"damping": 0}, "damping must be a number > 0"),
    "balanced": ("lora_da", {"balanced": "yes"}, "balanced must be True or False"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_refused(case: tuple[str, dict[str, Any], str]) -> None:
    method, options, message = case
    with pytest.raises(LoraInitError, match=f"^{method}: {message}"):
        resolve_method(method, options)


@pytest.mark.parametrize(
    ("method", "r", "message"),
    [
        ("lora_ga", 5, r"a\.q: lora_ga takes 10 singular vectors .* is 9: lower r"),
        ("lora_one", 10, r"a\.q: lora_one takes 10 singular vectors .* is 9: lower r"),
        ("lora_sb", 10, r"a\.q: r = 10 exceeds min\(out, in\) = 9.*lower r"),
        ("lora_da", 21, r"a\.q: r = 21 exceeds in = 20.*lower r"),
    ],
)
def test_too_large_a_rank_is_refused(method: str, r: int, message: str) -> None:
    with pytest.raises(LoraInitError, match=message):
        solve(method, calls(9, 20), r, statistics={})


ALL = ("lora_ga", "lora_one", "lora_sb", "lora_da")


@pytest.mark.parametrize("exact", [False, True], ids=["sketch", "exact"])
@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_zero_gradient_is_refused(method: str, exact: bool, dtype: torch.dtype) -> None:
    data = [Tokens(t.x, torch.zeros(len(t.x), 9, dtype=dtype), t.valid)
            for t in calls(9, 20, dtype=dtype)]  # fmt: skip
    options = {"exact_gradient": exact} if method in ("lora_ga", "lora_one") else {}
    with pytest.raises(LoraInitError, match=r"a\.q: the gradient .* does not depend on the layer"):
        solve(method, data, **options)


@pytest.mark.parametrize("exact", [False, True], ids=["sketch", "exact"])
@pytest.mark.parametrize(("method", "needed"), [("lora_ga", 8), ("lora_one", 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_of_too_low_a_rank_is_refused(
    method: str, needed: int, exact: bool, dtype: torch.dtype
) -> None:
    few = [3] if needed == 4 else [4, 3]  # tokens, and so its rank
    data = calls(60, 80, sizes=few, dtype=dtype, padding=False)
    message = rf"a\.q: the gradient of the loss has rank {sum(few)}, and {method} takes {needed}"
    with pytest.raises(LoraInitError, match=message):
        solve(method, data, exact_gradient=exact)


@pytest.mark.parametrize("method", ALL)
def test_what_is_not_finite_or_of_another_shape_is_refused(method: str) -> None:
    data = calls(16, 20)
    layer = Layer("a.q", gaussian(16, 20), 4)
    good = collect_all(resolve_method(method, {}), layer, data)
    for key, value in good.items():
        bad = value.clone()
        bad.view(-1)[-1] = torch.inf
        with pytest.raises(LoraInitError, match=rf"a\.q: {key} is not finite"):
            solve(method, data, statistics=good | {key: bad})
        with pytest.raises(LoraInitError, match=rf"a\.q: {key} must be \({value.shape[0]},"):
            solve(method, data, statistics=good | {key: value[..., :-1]})
        missing = {k: v for k, v in good.items() if k != key}
        with pytest.raises(LoraInitError, match=rf"a\.q: {method} starts from data, and '{key}'"):
            solve(method, data, statistics=missing)


def test_inputs_that_lora_da_cannot_invert_are_refused() -> None:
    data = calls(9, 20)
    layer = Layer("a.q", gaussian(9, 20), 4)
    good = collect_all(resolve_method("lora_da", {}), layer, data)
    negative = good["input_covariance"] - 2 * torch.eye(20, dtype=torch.float64)
    with pytest.raises(LoraInitError, match=r"a\.q: E\[xᵀx\].* is singular.* raise epsilon"):
        solve("lora_da", data, statistics=good | {"input_covariance": negative})
    with pytest.raises(LoraInitError, match=r"a\.q: more than half of the outputs.*damping=None"):
        solve("lora_da", data, damping=0.1, statistics=good | {"output_squares": torch.zeros(9)})


def test_ranks_and_methods_take_what_was_collected_once() -> None:
    data = calls(60, 80)
    layer = Layer("a.q", gaussian(60, 80), 8)
    once = collect_all(resolve_method("lora_ga", {}), layer, data)
    for method, r in (("lora_ga", 8), ("lora_ga", 3), ("lora_one", 16), ("lora_one", 1)):
        assert solve(method, data, r, statistics=once).r == r
