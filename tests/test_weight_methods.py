"""OLoRA, LoRAM, NLoRA, SLoRA, gaussian and orthogonal against their definitions, or PEFT's own."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_init import Factors, LoraInitError, approximate
from lora_init.methods import Layer, resolve_method
from lora_init.testing import DTYPES, gaussian
from tests.test_inilora import assert_drawn, normal

SHAPES = {"wide": (48, 130), "tall": (257, 96), "square": (64, 64), "full rank": (7, 65)}
RANKS = {"wide": 8, "tall": 17, "square": 4, "full rank": 7}


def solve(weight: Tensor, r: int, method: str, **options: object) -> Factors:
    return approximate({"layers.0.q": weight}, r, method, cache=False, **options)["layers.0.q"]


def peft_start(weight: Tensor, r: int, start: str, alpha: int) -> tuple[Tensor, Tensor, Tensor]:
    """PEFT's A, B and base weight after `init_lora_weights=start` on one linear layer."""
    out_features, in_features = weight.shape
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=False))
    model[0].weight.data = weight.clone()
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], init_lora_weights=start)
    layer = get_peft_model(model, config).base_model.model[0]
    return layer.lora_A.default.weight, layer.lora_B.default.weight, layer.base_layer.weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_olora_is_numpys_qr(case: str, dtype: torch.dtype) -> None:
    weight, r = gaussian(*SHAPES[case], dtype), RANKS[case]
    f = solve(weight, r, "olora", scaling=2.0)
    Q, R = np.linalg.qr(weight.double().numpy())
    sign = np.where(np.diag(R) < 0, -1.0, 1.0)
    # As accurate as the columns are far from dependent (condition < 30).
    eps = 100 * float(torch.finfo(f.A.dtype).eps)
    np.testing.assert_allclose(f.B, (Q * sign)[:, :r], atol=eps, rtol=0)
    np.testing.assert_allclose(f.A, (sign[:, None] * R)[:r], atol=eps, rtol=0)
    assert (f.A.diagonal() >= 0).all()
    assert torch.equal(f.A[:, :r], f.A[:, :r].triu())


@pytest.mark.parametrize("case", SHAPES)
def test_olora_starts_where_pefts_does(case: str) -> None:
    weight, r = gaussian(*SHAPES[case]), RANKS[case]
    f = solve(weight, r, "olora", scaling=2.0)
    A, B, base = peft_start(weight, r, "olora", alpha=2 * r)
    assert (f.B @ f.A - B @ A).abs().max() < 1e-6
    assert (f.residual(weight) - base).abs().max() < 1e-6


def test_olora_of_dependent_columns() -> None:
    weight = gaussian(40, 30)
    weight[:, 1] = 3 * weight[:, 0]
    weight[:, 2] = 0
    f = solve(weight, 6, "olora")
    Q = f.B.double()
    assert (Q.T @ Q - torch.eye(6)).abs().max() < 1e-6
    assert (Q @ f.A.double() - Q @ Q.T @ weight.double()).abs().max() < 1e-6


def sines(m: int, r: int) -> np.ndarray:
    return np.array(
        [
            [math.sqrt(2 / (m + 1)) * math.sin((i + 1) * (j + 1) * math.pi / (m + 1))
             for j in range(r)]
            for i in range(m)
        ]
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_loram_is_its_definition(case: str, dtype: torch.dtype) -> None:
    weight, r = (gaussian(*SHAPES[case]) + 0.01).to(dtype), RANKS[case]
    f = solve(weight, r, "loram", scaling=2.0)
    out, in_ = (sines(m, r) for m in SHAPES[case])
    variances = [x.var(ddof=1) for x in (weight.double().numpy(), out @ in_.T)]
    gain = math.log(r, min(SHAPES[case]))
    beta = (gain * variances[0] / variances[1]) ** 0.25
    assert f.info["beta"] == pytest.approx(beta, rel=1e-10)
    np.testing.assert_allclose(f.A, beta * in_.T, atol=1e-7 * beta, rtol=0)
    np.testing.assert_allclose(f.B, beta * out, atol=1e-7 * beta, rtol=0)
    # What β is for: the product has log(r) of the weight's variance.
    product = f.B.double() @ f.A.double()
    assert float(product.var()) == pytest.approx(gain * variances[0], rel=1e-5)


def test_loram_keeps_its_digits_on_long_sides() -> None:
    weight = gaussian(3, 14336)
    A = solve(weight, 3, "loram").A.double()
    i = np.arange(1, 14337, dtype=np.longdouble)
    exact = np.sin(3 * i * np.longdouble("3.14159265358979323846264338327950288") / 14337)
    np.testing.assert_allclose(A[2] / A[2].norm(), exact / np.linalg.norm(exact), atol=1e-9)


@pytest.mark.parametrize(
    ("weight", "r", "message"),
    [
        (gaussian(6, 5), 1, r"a\.q: loram scales .*log\(r\).* 0 for r = 1: take r ≥ 2"),
        (torch.full((6, 5), 0.1), 2, r"a\.q: every weight is the same.*another method"),
        (gaussian(6, 5), 6, r"a\.q: r = 6 exceeds min\(out, in\) = 5"),
    ],
    ids=["r = 1", "constant", "r > min"],
)
def test_loram_refuses(weight: Tensor, r: int, message: str) -> None:
    with pytest.raises(LoraInitError, match=message):
        approximate({"b.q": gaussian(6, 5), "a.q": weight}, {"b.q": 2, "a.q": r}, "loram")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_nlora_is_rows_and_columns_of_the_weight(case: str, dtype: torch.dtype) -> None:
    weight, r = gaussian(*SHAPES[case], dtype), RANKS[case]
    f = solve(weight, r, "nlora", scaling=0.5)
    W = weight.double().numpy()
    np.testing.assert_array_equal(f.A, W[:r])
    np.testing.assert_allclose(f.B, W[:, :r] @ W[:r, :r], rtol=1e-5, atol=1e-9)
    assert f.scaling == 0.5


def test_nlora_refuses_more_rows_than_there_are() -> None:
    with pytest.raises(LoraInitError, match=r"a\.q: nlora takes r = 6 rows .*= 5: lower r"):
        approximate({"a.q": gaussian(6, 5)}, 6, "nlora")


@pytest.mark.parametrize("method", ["nlora", "slora"])
def test_a_third_factor_is_refused(method: str) -> None:
    assert resolve_method(method, {"train_n": False})
    with pytest.raises(LoraInitError, match=rf"{method}: train_n=True .*third trainable factor N"):
        resolve_method(method, {"train_n": True})


def test_slora_is_two_kaiming_draws_and_zero() -> None:
    out_features, in_features, r = 30, 200, 16
    f = solve(gaussian(out_features, in_features), r, "slora")
    generator = Layer("layers.0.q", gaussian(1, 1), r).generator()
    A, N = (
        torch.empty(r, columns).uniform_(
            -1 / math.sqrt(columns), 1 / math.sqrt(columns), generator=generator
        )
        for columns in (in_features, r)
    )
    np.testing.assert_allclose(f.A, N.double() @ A.double(), rtol=1e-5, atol=1e-7)
    assert not f.B.any()
    assert f.B.shape == (out_features, r)


def test_gaussian_is_pefts() -> None:
    f = solve(gaussian(100, 3000), 40, "gaussian")
    assert_drawn(f.A, normal(1 / 40))
    assert not f.B.any()
    A, B, _ = peft_start(gaussian(100, 3000), 40, "gaussian", alpha=40)
    assert_drawn(A.detach(), normal(1 / 40))
    assert not B.any()


@pytest.mark.parametrize("r", [2, 8, 40])
def test_orthogonal_is_pefts(r: int) -> None:
    weight = gaussian(1500, 2000)
    f = solve(weight, r, "orthogonal")
    torch.manual_seed(1)
    A, B, base = peft_start(weight, r, "orthogonal", alpha=r)
    assert torch.equal(base, weight)
    # Both are random: compared in what their distribution fixes, and in what is exact.
    for ours, theirs in ((f.A, A), (f.B.T, B.T)):
        singular = [torch.linalg.svdvals(x.detach().double()) for x in (ours, theirs)]
        expected = math.sqrt(ours.shape[1]) / 10
        for values in singular:
            assert (values[: r // 2] / expected - 1).abs().max() < 0.3
            assert values[r // 2 :].max() < 1e-5
        assert singular[0].sum() == pytest.approx(float(singular[1].sum()), rel=0.1)
    assert (f.B.double() @ f.A.double()).abs().max() < r * 1e-8


def test_orthogonal_refuses_odd_ranks() -> None:
    with pytest.raises(LoraInitError, match=r"a\.q: orthogonal .*r = 3 is odd: take an even r"):
        approximate(
            {"b.q": gaussian(6, 5), "a.q": gaussian(6, 5)}, {"b.q": 2, "a.q": 3}, "orthogonal"
        )
