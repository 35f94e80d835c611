"""Factors: rounding, the residual and its error, and what identifies a weight."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_init import factors as factors_module
from lora_init.factors import (
    Factors,
    Fit,
    LoraInitError,
    row_blocks,
    shifted,
    weight_digest,
)
from lora_init.testing import DTYPES, SHAPES, gaussian, misaligned, transposed


def make(
    out_features: int, in_features: int, r: int, scaling: float = 1.0, seed: int = 1
) -> Factors:
    A = gaussian(r, in_features, seed=seed)
    B = gaussian(out_features, r, seed=seed + 1)
    return Factors(A, B, scaling)


def exact_residual(factors: Factors, weight: Tensor) -> np.ndarray:
    """W − s·B·A in 80-bit floats: 24-bit factors have exact products there, 11 bits to spare."""
    A, B, W = (t.double().numpy().astype(np.longdouble) for t in (factors.A, factors.B, weight))
    return W - np.longdouble(factors.scaling) * (B @ A)


def half_ulp(exact: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Half the spacing of `dtype` around each number, subnormals included."""
    info = torch.finfo(dtype)
    _, exponent = np.frexp(np.maximum(np.abs(exact), np.longdouble(info.smallest_normal)))
    return np.ldexp(np.longdouble(info.eps), exponent - 2)


def own_rounding(factors: Factors, weight: Tensor) -> np.ndarray:
    """What fp64 arithmetic may add: r products and sums, a scaling, a subtraction, all rounded."""
    A, B, W = (t.double().abs().numpy() for t in (factors.A, factors.B, weight))
    return (factors.r + 3) * 2.0**-53 * (W + factors.scaling * (B @ A))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_residual_is_rounded_once(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    factors = make(*shape, scaling=1.7)
    weight = gaussian(*shape[:2], dtype=dtype)
    R = factors.residual(weight)
    assert (R.dtype, R.shape) == (dtype, weight.shape)
    exact = exact_residual(factors, weight)
    error = np.abs(R.double().numpy() - exact)
    assert (error <= half_ulp(exact, dtype) + own_rounding(factors, weight)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.clone, transposed], ids=["rows", "columns"])
def test_shifted_is_rounded_once_and_equal_factors_cancel(
    dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    columns = 700
    rows = factors_module._BLOCK_ELEMENTS // columns + 3  # two blocks
    weight, f, start = (
        gaussian(rows, columns, dtype),
        make(rows, columns, 5),
        make(rows, columns, 3),
    )
    found = shifted(layout(weight), f.A, f.B, 1.7, (start.A, start.B))
    assert (found.dtype, found.stride()) == (dtype, layout(weight).stride())
    both = Factors(torch.cat([f.A, start.A]), torch.cat([-f.B, start.B], 1), 1.7)
    exact = exact_residual(both, weight)
    error = np.abs(found.double().numpy() - exact)
    assert (error <= half_ulp(exact, dtype) + own_rounding(both, weight)).all()
    assert torch.equal(shifted(weight, -f.A, f.B, 1.7), Factors(f.A, f.B, 1.7).residual(weight))
    assert torch.equal(shifted(weight, f.A, f.B, 1.7, (f.A.clone(), f.B.clone())), weight)


# fp16 has subnormals below 6e-5, which trained weights reach: scales on both sides of that.
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    r=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    factor_dtype=st.sampled_from(DTYPES[1:]),
    scaling=st.floats(0.01, 64),
    size=st.floats(1e-6, 30),
    seed=st.integers(0, 2**20),
)
def test_residual_is_rounded_once_whatever_the_sizes(
    shape: tuple[int, int],
    r: int,
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    scaling: float,
    size: float,
    seed: int,
) -> None:
    factors = make(*shape, r, scaling, seed)
    factors = Factors(factors.A.to(factor_dtype), factors.B.to(factor_dtype), scaling)
    weight = (gaussian(*shape, seed=seed + 2) * size).to(dtype)
    exact = exact_residual(factors, weight)
    error = np.abs(factors.residual(weight).double().numpy() - exact)
    assert (error <= half_ulp(exact, dtype) + own_rounding(factors, weight)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_residual_just_beyond_a_tie_rounds_away_from_it(dtype: torch.dtype, sign: float) -> None:
    # 1 + half an ulp + 2⁻⁴⁰: in fp32 the last term is lost, a tie is left, and it would round to 1.
    eps = torch.finfo(dtype).eps
    factors = Factors(torch.tensor([[-1.0], [-1.0]]), sign * torch.tensor([[eps / 2, 2.0**-40]]))
    R = factors.residual(torch.tensor([[sign]], dtype=dtype))
    assert R.item() == sign * (1 + eps)


def test_residual_of_several_row_blocks_may_be_written_over_the_weight() -> None:
    columns = 700
    rows = 2 * factors_module._BLOCK_ELEMENTS // columns + 3
    factors, weight = make(rows, columns, 4), gaussian(rows, columns)
    assert len(list(row_blocks(weight))) == 3
    expected = factors.residual(weight)
    exact = exact_residual(factors, weight)
    error = np.abs(expected.double().numpy() - exact)
    assert (error <= half_ulp(exact, weight.dtype) + own_rounding(factors, weight)).all()
    assert factors.residual(weight, out=weight) is weight
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_depends_on_neither_memory_nor_threads(dtype: torch.dtype) -> None:
    factors, weight = make(96, 130, 8), gaussian(96, 130, dtype=dtype)
    expected = factors.residual(weight)
    for view in (misaligned(weight), transposed(weight), torch.cat([weight, weight], 1)[:, :130]):
        assert torch.equal(factors.residual(view), expected)
        assert factors.squared_error(view) == factors.squared_error(weight)
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        assert torch.equal(factors.residual(weight), expected)


def test_residual_of_a_parameter_keeps_no_graph() -> None:
    weight = torch.nn.Parameter(gaussian(5, 4))
    R = make(5, 4, 2).residual(weight)
    assert not R.requires_grad


def test_residual_that_overflows_is_refused() -> None:
    factors = Factors(torch.full((1, 3), 300.0), torch.full((2, 1), -300.0))
    weight = torch.ones(2, 3, dtype=torch.float16)
    with pytest.raises(LoraInitError, match=r"q_proj: .*overflows torch\.float16.*wider dtype"):
        factors.residual(weight, "q_proj")
    assert torch.equal(weight, torch.ones_like(weight))


def test_residual_of_another_shape_is_refused() -> None:
    with pytest.raises(LoraInitError, match=r"q: B \(5, 2\) and A \(2, 4\) .*\(4, 5\)"):
        make(5, 4, 2).residual(gaussian(4, 5), "q")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_start_is_exact_to_one_rounding_only_with_factors_rounded_first(dtype: torch.dtype) -> None:
    factors, weight = make(40, 30, 8), gaussian(40, 30)
    stored = factors.to(dtype)
    assert (stored.A.dtype, stored.B.dtype) == (dtype, dtype)
    assert (stored.scaling, stored.info) == (factors.scaling, factors.info)
    start = stored.residual(weight).double() + stored.B.double() @ stored.A.double()
    # R in fp32 is the only thing rounded: half an ulp of its largest entry (and fp64's own 1e-16).
    bound = float(half_ulp(stored.residual(weight).abs().max().double().numpy(), torch.float32))
    assert (start - weight.double()).abs().max() <= bound * 1.01
    late = factors.residual(weight).double() + stored.B.double() @ stored.A.double()
    assert (late - weight.double()).abs().max() > 100 * bound


def test_factor_that_does_not_fit_its_dtype_is_refused() -> None:
    factors = Factors(gaussian(2, 4), torch.full((3, 2), 7e4))
    with pytest.raises(LoraInitError, match=r"k_proj: factor B .*float16.*7e\+04.*6\.55e\+04"):
        factors.to(torch.float16, "k_proj")
    assert torch.isfinite(factors.to(torch.bfloat16).B).all()


def test_factors_of_different_rank_are_refused() -> None:
    with pytest.raises(LoraInitError, match=r"A \(3, 4\) and B \(5, 2\)"):
        Factors(torch.zeros(3, 4), torch.zeros(5, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_error_near_convergence(dtype: torch.dtype) -> None:
    # ‖W‖² ~ 4e4 against an error of one rounding each: the Gram form would return noise.
    factors = Factors(gaussian(8, 300) * 20, gaussian(500, 8) * 20)
    weight = (factors.B.double() @ factors.A.double()).to(dtype) * (1 + 2.0**-6)
    exact = float((exact_residual(factors, weight) ** 2).sum())
    noise = 2 * np.sqrt(exact) * np.linalg.norm(own_rounding(factors, weight))
    # 150,000 squares summed in fp64 blocks: far less than 1e-12 of a sum of positive terms.
    assert abs(factors.squared_error(weight) - exact) <= 1e-12 * exact + noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fit_measures_and_changes_nothing(dtype: torch.dtype) -> None:
    # Of more than one row block.
    factors, weight = make(600, 500, 3, scaling=2.0), gaussian(600, 500, dtype=dtype)
    before = weight.clone()
    fit = factors.fit(weight)
    assert torch.equal(weight, before)
    BA = 2.0 * factors.B.double().numpy() @ factors.A.double().numpy()
    W = weight.double().numpy()
    error = factors.residual(weight).double().numpy() + BA - W
    if dtype != torch.float64:  # where the error is the rounding of this very expression
        largest, drift = np.abs(error).max(), np.linalg.norm(error) / np.linalg.norm(W)
        assert fit.start_error == pytest.approx(largest, rel=1e-6)
        assert fit.start_drift == pytest.approx(drift, rel=1e-6)
    rounding = 2 * torch.finfo(dtype).eps * np.linalg.norm(BA) / np.linalg.norm(W)
    assert 0 < fit.start_drift < rounding
    assert fit.squares == pytest.approx(np.linalg.norm(W - BA) ** 2, rel=1e-12)
    assert fit.energy == pytest.approx(np.linalg.norm(W) ** 2, rel=1e-12)
    assert factors.fit(weight.T.contiguous().T) == fit


def test_start_without_a_stored_residual_is_the_weight_or_moved_by_the_whole_product() -> None:
    factors, weight = make(600, 500, 3, scaling=2.0), gaussian(600, 500)
    BA = 2.0 * factors.B.double().numpy() @ factors.A.double().numpy()
    moved, virtual = factors.fit(weight, residual=None), factors.fit(weight, residual="virtual")
    norm = np.linalg.norm(weight.double().numpy())
    assert moved.start_drift == pytest.approx(np.linalg.norm(BA) / norm, rel=1e-12)
    assert moved.start_error == pytest.approx(np.abs(BA).max(), rel=1e-12)
    assert (virtual.start_drift, virtual.start_error) == (0.0, 0.0)
    assert moved.squares == virtual.squares == factors.fit(weight).squares


def test_start_of_a_zero_weight_is_relative_to_the_product() -> None:
    factors, weight = make(60, 50, 3), torch.zeros(60, 50)
    fit = factors.fit(weight)
    assert fit.start_error > 0
    assert 1e-9 < fit.start_drift <= 2.0**-24  # one rounding of R = −B·A
    nothing = Factors(torch.zeros(3, 50), torch.zeros(60, 3))
    assert nothing.fit(weight) == Fit(0.0, 0.0, 0.0, 0.0)


def test_norm_is_that_of_the_product() -> None:
    factors = make(60, 50, 3, scaling=2.5)
    product = 2.5 * factors.B.double().numpy() @ factors.A.double().numpy()
    assert factors.norm() == pytest.approx(np.linalg.norm(product), rel=1e-12)
    assert factors.product(slice(3, 9)).numpy() == pytest.approx(product[3:9], rel=1e-12)


def test_drift_under_dropout_is_that_of_torch_dropout() -> None:
    factors, weight = make(24, 20, 3, scaling=2.0), gaussian(24, 20)
    torch.manual_seed(0)
    x = torch.randn(40_000, 20)
    noise = 2.0 * (torch.nn.functional.dropout(x, 0.3) - x) @ factors.A.T @ factors.B.T
    measured = float(noise.norm() / (x @ weight.T).norm())
    # 40,000 samples of at least 3 independent directions: 0.5 / √(120,000) = 0.14%, twice; times 5.
    assert factors.drift_under_dropout(weight, 0.3) == pytest.approx(measured, rel=0.015)
    assert factors.drift_under_dropout(torch.zeros(24, 20), 0.3) == 0.0


@given(rows=st.integers(1, 3000), columns=st.sampled_from([1, 7, 1024, 2**18, 2**18 + 1, 2**19]))
def test_row_blocks_cover_every_row_once(rows: int, columns: int) -> None:
    weight = torch.empty(rows, columns, device="meta")
    covered = [row for block in row_blocks(weight) for row in range(block.start, block.stop)]
    assert covered == list(range(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (6, 7)], ids=str)
def test_digest_is_of_the_values_not_of_the_memory(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = gaussian(*shape, dtype=dtype)
    views = [
        misaligned(weight),
        transposed(weight),
        torch.cat([weight, weight], 1)[:, : shape[1]],
        torch.stack([weight, weight], -1)[..., 0],
        torch.nn.Parameter(weight),
    ]
    assert {weight_digest(view) for view in views} == {weight_digest(weight)}


def test_digest_tells_values_dtypes_and_shapes_apart() -> None:
    weight = gaussian(6, 4)
    other = weight.clone()
    other[3, 2] = torch.nextafter(other[3, 2], torch.tensor(9.0))
    different = [
        weight,
        other,
        weight.view(4, 6),
        weight.view(torch.int32),
        weight.T.contiguous(),
        -weight,
    ]
    assert len({weight_digest(tensor) for tensor in different}) == len(different)
    assert weight_digest(weight, other) != weight_digest(other, weight)
