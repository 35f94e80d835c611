"""What is summed over data, against numpy and autograd: exact sums, and sketches of a gradient."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_init import LoraInitError
from lora_init.methods import Layer
from lora_init.sketch import GradientSketch, bucket
from lora_init.statistics import (
    Covariance,
    ExampleGradient,
    Gradient,
    OutputSquares,
    PrincipalComponents,
    ScaledSquares,
    Statistic,
    Tokens,
)
from lora_init.testing import DTYPES
from tests.calibrating import calls, collect, gradient

SHAPES = {"33x65": (33, 65), "64x48": (64, 48), "1x7": (1, 7), "9x1": (9, 1)}
ALL = {
    "covariance": Covariance(),
    "principal_components": PrincipalComponents(16),
    "scaled_squares": ScaledSquares(),
    "gradient": Gradient(),
    "example_gradient": ExampleGradient(),
    "output_squares": OutputSquares(),
    "sketch, 1 pass": GradientSketch(4, 1),
    "sketch, 2 passes": GradientSketch(4, 2),
}


def layer(
    out_features: int, in_features: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Layer:
    return Layer("a.q", torch.zeros(out_features, in_features, dtype=dtype), 4, seed=seed)


def valid_inputs(data: list[Tokens]) -> np.ndarray:
    return np.concatenate([t.x[t.valid].double().numpy() for t in data])


def rounding(dtype: torch.dtype) -> float:
    """Of sums over a hundred tokens, relative to the largest entry."""
    return 1e-14 if dtype == torch.float64 else 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mean_and_covariance_of_the_valid_tokens(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    data = calls(*shape, dtype=dtype)
    for tokens in data:
        tokens.x[~tokens.valid] = torch.nan  # padding may hold anything
    found = collect(Covariance(), layer(*shape, dtype), data)
    x = valid_inputs(data)
    expected = np.cov(x.T, bias=True).reshape(shape[1], shape[1])
    tolerance = rounding(dtype) * max(np.abs(expected).max(), 1e-3)
    assert np.abs(found["input_mean"].double().numpy() - x.mean(0)).max() <= 10 * rounding(dtype)
    assert np.abs(found["input_covariance"].double().numpy() - expected).max() <= tolerance


def test_covariance_does_not_cancel_where_the_mean_is_large() -> None:
    generator = torch.Generator().manual_seed(0)
    # fp32 holds these to 6e-5, which squares of 1e6 would be known to 0.06 by.
    x = torch.randn(400, 5, generator=generator) * 0.1 + 1000
    data = [Tokens(part, None, torch.ones(len(part), dtype=torch.bool)) for part in x.split(37)]
    found = collect(Covariance(), layer(3, 5, torch.float32), data)["input_covariance"]
    expected = np.cov(x.double().numpy().T, bias=True)
    assert np.abs(found.double().numpy() - expected).max() <= 1e-4 * expected.max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 16, 200])
def test_principal_components_are_those_of_the_centred_tokens(
    width: int, dtype: torch.dtype
) -> None:
    data = calls(8, 24, dtype=dtype)
    found = {
        key: value.double().numpy()
        for key, value in collect(PrincipalComponents(width), layer(8, 24, dtype), data).items()
    }
    x = valid_inputs(data)
    _, S, Vh = np.linalg.svd(x - x.mean(0), full_matrices=False)
    variances, k = S**2 / len(x), min(width, 24)
    assert found["variances"] == pytest.approx(variances[:k], abs=rounding(dtype) * variances[0])
    assert found["total_variance"] == pytest.approx(variances.sum(), rel=10 * rounding(dtype))
    components = found["components"]
    assert components.shape == (k, 24)
    assert np.abs(components @ components.T - np.eye(k)).max() <= rounding(dtype)
    gaps = np.abs(np.diff(variances)).min() if dtype == torch.float64 else variances[2] / 10
    cosines = np.abs(np.sum(components * Vh[:k], axis=1))
    assert (1 - cosines[:3] <= rounding(dtype) * variances[0] / gaps).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_squares_are_over_the_signed_maximum_of_each_call(dtype: torch.dtype) -> None:
    data = calls(8, 24, dtype=dtype)
    data[1].x[0, 0] = -50  # the largest in magnitude, and not the maximum
    data[2].x.copy_(-data[2].x.abs() - 0.5)  # the maximum is negative
    found = collect(ScaledSquares(), layer(8, 24, dtype), data)["scaled_squares"]
    parts = [t.x[t.valid].double().numpy() for t in data]
    scaled = [x / abs(x.max()) for x in parts]
    expected = sum(x.T @ x for x in scaled) / len(scaled)
    limit = rounding(dtype) * np.abs(expected).max()
    assert np.abs(found.double().numpy() - expected).max() <= limit


@pytest.mark.parametrize("statistic", [Gradient(), ExampleGradient()], ids=["batch", "example"])
def test_gradient_is_autograds(statistic: Gradient) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(9, 13, generator=generator, dtype=torch.float64, requires_grad=True)
    data, losses = [], []
    for n in (5, 1, 8):
        x = torch.randn(n, 13, generator=generator, dtype=torch.float64)
        y = x @ W.T
        y.retain_grad()
        loss = y.sin().square().mean()
        loss.backward(retain_graph=True)
        # Padding is not for the loss to say: rows that do not count are in the gradient too.
        data.append(Tokens(x, y.grad, torch.zeros(n, dtype=torch.bool)))
        losses.append(loss)
    W.grad = None
    torch.stack(losses).mean().backward()
    found = collect(statistic, layer(9, 13), data)["gradient"]
    torch.testing.assert_close(found, W.grad, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_squares_are_of_the_valid_tokens(dtype: torch.dtype) -> None:
    data = calls(33, 20, dtype=dtype)
    data = [dataclasses.replace(t, dy=t.dy + 1) for t in data]  # also where it is padding
    found = collect(OutputSquares(), layer(33, 20, dtype), data)["output_squares"]
    dy = np.concatenate([t.dy[t.valid].double().numpy() for t in data])
    assert found.double().numpy() == pytest.approx((dy**2).mean(0), rel=rounding(dtype))


def decaying(out_features: int, in_features: int, power: float, rank: int | None = None) -> Tensor:
    """A gradient with singular values i^-power up to its rank."""
    generator = torch.Generator().manual_seed(3)
    k = min(out_features, in_features)
    bases = [
        torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
        for n in (out_features, in_features)
    ]
    S = torch.arange(1, k + 1, dtype=torch.float64) ** -power
    if rank is not None:
        S[rank:] = 0
    return (bases[0] * S) @ bases[1].T


def as_calls(G: Tensor, count: int = 3, dtype: torch.dtype = torch.float64) -> list[Tokens]:
    """Calls of `in` tokens each whose mean gradient is G."""
    generator = torch.Generator().manual_seed(4)
    n = G.shape[1]
    found = []
    for _ in range(count):
        X = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        found.append(Tokens(X.to(dtype), (X @ G.T).to(dtype), torch.ones(n, dtype=torch.bool)))
    return found


def sketched(statistic: GradientSketch, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = collect(statistic, layer(*G.shape), as_calls(G))
    U, S, V = (found[f"gradient_{part}"] for part in "USV")
    for columns in (U, V):
        eye = torch.eye(columns.shape[1], dtype=torch.float64)
        assert (columns.T @ columns - eye).abs().max() < 1e-12
    assert (S.diff() <= 0).all()
    return U, S, V


def lost(U: Tensor, V: Tensor, G: Tensor) -> float:
    """Of the energy that the best rank as many columns captures."""
    best = torch.linalg.svdvals(G)[: U.shape[1]].square().sum()
    return 1 - float((U.T @ G @ V).square().sum() / best)


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((70, 90), 8), ((90, 70), 5), ((12, 70), 12), ((70, 12), 12), ((6, 5), 5), ((1, 7), 1)],
    ids=str,
)
def test_a_sketch_of_low_rank_or_few_rows_is_exact(
    shape: tuple[int, int], rank: int, passes: int
) -> None:
    G = decaying(*shape, 1.0, rank)
    U, S, V = sketched(GradientSketch(8, passes), G)
    k = min(8, *shape)
    assert U.shape == (shape[0], k)
    assert V.shape == (shape[1], k)
    assert (S - torch.linalg.svdvals(G)[:k]).abs().max() < 1e-12
    kept = min(k, rank)
    assert lost(U[:, :kept], V[:, :kept], G) < 1e-11


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=str)
@pytest.mark.parametrize(
    ("power", "limits"), [(2.0, (1e-4, 5e-8, 1e-10)), (1.0, (8e-2, 8e-4, 3e-5))], ids=str
)
def test_every_pass_comes_nearer_to_the_singular_vectors(
    shape: tuple[int, int], power: float, limits: tuple[float, ...]
) -> None:
    G = decaying(*shape, power)
    for passes, limit in enumerate(limits, start=1):
        U, S, V = sketched(GradientSketch(16, passes), G)
        assert lost(U[:, :8], V[:, :8], G) < limit
        assert (S[:8] / torch.linalg.svdvals(G)[:8] - 1).abs().max() < 5 * limit**0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sketch_in_the_models_dtype_is_that_of_the_rounded_calls(dtype: torch.dtype) -> None:
    data = as_calls(decaying(40, 56, 1.0), dtype=dtype)
    found = collect(GradientSketch(16, 2), layer(40, 56, dtype), data)
    wide = [Tokens(t.x.double(), t.dy.double(), t.valid) for t in data]
    expected = collect(GradientSketch(16, 2), layer(40, 56), wide)
    assert {value.dtype for value in found.values()} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }
    product, exact = (
        (x["gradient_U"] * x["gradient_S"] @ x["gradient_V"].T).double() for x in (found, expected)
    )
    assert (product - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("passes", [1, 2])
def test_a_sketch_of_nothing_is_zero(passes: int) -> None:
    _, S, _ = sketched(GradientSketch(8, passes), torch.zeros(30, 20, dtype=torch.float64))
    assert not S.any()


def test_a_sketch_does_not_depend_on_seed_rank_or_memory_layout() -> None:
    data = as_calls(decaying(40, 56, 1.0), dtype=torch.float32)
    expected = collect(GradientSketch(16), layer(40, 56, torch.float32), data)
    strided = [
        Tokens(t.x.T.contiguous().T, torch.stack([t.dy, t.dy], 2)[..., 1], t.valid) for t in data
    ]
    other = dataclasses.replace(layer(40, 56, torch.float32, seed=5), r=7)
    torch.set_num_threads(1)
    found = collect(GradientSketch(16), other, strided)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_sums_of_a_loss_without_a_mean() -> None:
    """`y.sum()` hands down one gradient for all, expanded to the output's shape."""
    x = calls(6, 9)[1].x
    dy = torch.ones((), dtype=torch.float64).expand(len(x), 6)
    data = [Tokens(x, dy, torch.ones(len(x), dtype=torch.bool))]
    assert torch.allclose(collect(Gradient(), layer(6, 9), data)["gradient"], dy.T @ x)
    found = collect(GradientSketch(4), layer(6, 9), data)
    U, S, V = (found[f"gradient_{part}"] for part in "USV")
    assert torch.allclose((U * S) @ V.T, dy.T @ x)


@pytest.mark.parametrize("statistic", ALL.values(), ids=ALL)
def test_states_take_what_they_say_and_calls_without_tokens_nothing(statistic: Statistic) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        state = statistic.start(layer(33, 65, dtype))
        taken = sum(t.numel() * t.element_size() for t in state.values() if t.ndim)
        assert taken == statistic.state_bytes(layer(33, 65, dtype))
    empty = Tokens(torch.zeros(0, 65), torch.zeros(0, 33), torch.zeros(0, dtype=torch.bool))
    data = calls(33, 65, dtype=torch.float32)
    one = layer(33, 65, torch.float32)
    # Each call is a loss of its own to `collect`: on both sides as many.
    with_empty = collect(statistic, one, [*data, empty])
    state = statistic.start(one)
    for turn in range(statistic.passes):
        state = statistic.next_pass(one, state) if turn else state
        for tokens in data:
            statistic.add(one, state, tokens)
    expected = statistic.finish(one, state, len(data) + 1)
    assert set(expected) == set(statistic.keys)
    for key, value in expected.items():
        assert torch.equal(with_empty[key], value), key


@pytest.mark.parametrize(
    "name", ["covariance", "principal_components", "scaled_squares", "output_squares"]
)
def test_no_token_is_refused(name: str) -> None:
    data = [dataclasses.replace(t, valid=torch.zeros_like(t.valid)) for t in calls(8, 9)]
    with pytest.raises(LoraInitError, match=r"a\.q: no token .* use more data"):
        collect(ALL[name], layer(8, 9), data)


@pytest.mark.parametrize("name", ["principal_components", "sketch, 1 pass", "sketch, 2 passes"])
def test_nan_is_refused_before_a_factorisation(name: str) -> None:
    data = calls(8, 9, padding=False)
    data[1].x[2, 3] = torch.nan
    with pytest.raises(LoraInitError, match=r"a\.q: .* is not finite: run the model in a wider"):
        collect(ALL[name], layer(8, 9), data)


def test_inputs_without_a_scale_are_refused() -> None:
    data = calls(8, 9)
    data[2].x.zero_()
    with pytest.raises(LoraInitError, match=r"a\.q: .* is 0, which corda divides by"):
        collect(ScaledSquares(), layer(8, 9), data)


@pytest.mark.gpu
@pytest.mark.parametrize("statistic", ALL.values(), ids=ALL)
def test_a_gpu_collects_what_the_cpu_does(statistic: Statistic) -> None:
    data = calls(33, 65, dtype=torch.float32)
    expected = collect(statistic, layer(33, 65, torch.float32), data)
    on_gpu = Layer("a.q", torch.zeros(33, 65, device="cuda"), 4)
    moved = [
        Tokens(t.x.cuda(), None if t.dy is None else t.dy.cuda(), t.valid.cuda()) for t in data
    ]
    for key, value in collect(statistic, on_gpu, moved).items():
        assert value.is_cuda
        columns = key in ("components", "gradient_U", "gradient_V")  # up to their signs
        mine, theirs = (x.abs() if columns else x for x in (value.cpu(), expected[key]))
        kept = mine[:3] if key == "components" else mine[:, :3] if columns else mine
        assert (kept - theirs[tuple(map(slice, kept.shape))]).abs().max() <= 1e-3 * theirs.max()


def test_ranks_share_what_is_collected() -> None:
    assert [bucket(n) for n in (1, 8, 16, 17, 32, 33, 100)] == [16, 16, 16, 32, 32, 64, 128]
    assert gradient(calls(5, 6)).shape == (5, 6)
