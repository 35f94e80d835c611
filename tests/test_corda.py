"""corda against numpy and against PEFT's own."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_init import Factors, LoraInitError, approximate
from lora_init.methods import Layer, resolve_method
from lora_init.statistics import Tokens
from lora_init.testing import DTYPES, gaussian, transposed
from tests.calibrating import calls, collect_all

SHAPES = {"33x65": (33, 65), "64x48": (64, 48), "17x130": (17, 130)}


def solve(
    weight: Tensor, data: list[Tokens], r: int = 4, scaling: float = 1.0, **options: Any
) -> Factors:
    method = resolve_method("corda", options)
    collected = collect_all(method, Layer("a.q", weight, r, scaling), data)
    return approximate(
        {"a.q": weight}, r, method, scaling=scaling, statistics={"a.q": collected}, cache=False
    )["a.q"]


def damped(data: list[Tokens]) -> np.ndarray:
    """C as published, at the damping that is tried first."""
    parts = [t.x[t.valid].double().numpy() for t in data]
    C = sum((x / abs(x.max())).T @ (x / abs(x.max())) for x in parts) / len(parts)
    return C + 0.01 * np.diag(C).mean() * np.eye(len(C))


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_its_definition(shape: tuple[int, int], mode: str) -> None:
    weight, data, r, scaling = gaussian(*shape, torch.float64), calls(*shape), 4, 3.0
    found = solve(weight, data, r, scaling, mode=mode)
    C = damped(data)
    U, S, Vh = np.linalg.svd(weight.numpy() @ C, full_matrices=False)
    part = slice(None, r) if mode == "ipm" else slice(len(S) - r, None)
    U, S, Vh = U[:, part], S[part], Vh[part]
    sign = np.sign(U[np.abs(U).argmax(0), np.arange(r)])
    size = np.sqrt(S / scaling) * sign
    A, B = size[:, None] * Vh @ np.linalg.inv(C), U * size
    assert np.abs(found.A.numpy() - A).max() < 1e-7 * np.abs(A).max()
    assert np.abs(found.B.numpy() - B).max() < 1e-7 * np.abs(B).max()
    assert found.info["damping"] == 0.01
    # What is taken off W is its part in the span of B.
    assert np.abs(scaling * B @ A - U @ U.T @ weight.numpy()).max() < 1e-9


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_is_pefts(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's code for one layer, which it runs in fp32."""
    if "attr" not in sys.modules:  # it imports attrs, undeclared, for one class
        attr = ModuleType("attr")
        attr.dataclass = dataclasses.dataclass  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "attr", attr)
    from peft.tuners.lora.config import CordaConfig, LoraConfig
    from peft.tuners.lora.corda import preprocess_corda

    weight, r = gaussian(24, 20), 4
    data = calls(24, 20, sizes=(90, 80, 110), dtype=torch.float32, padding=False)
    model = nn.Sequential(nn.Linear(20, 24, bias=False))
    model[0].weight.data.copy_(weight)
    config = LoraConfig(
        r=r, target_modules=["0"], init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )  # fmt: skip
    preprocess_corda(model, config, run_model=lambda: [model(t.x[None]) for t in data])
    theirs: Any = model[0].eigens
    found = solve(weight, data, r, mode=mode)
    # Each triplet up to its sign: B·A is what counts, and the singular values.
    product = (theirs.U_WC * theirs.S_WC) @ theirs.V_WC.T
    assert (found.B @ found.A - product).abs().max() < 2e-4 * product.abs().max()
    S = found.B.square().sum(0)
    assert (S - theirs.S_WC).abs().max() < 1e-4 * theirs.S_WC.max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_starts_at_the_weight_in_every_dtype(dtype: torch.dtype) -> None:
    weight, data = gaussian(33, 65, dtype), calls(33, 65, dtype=dtype)
    found = solve(weight, data, scaling=2.0)
    start = found.residual(weight).double() + found.product().double()
    assert (start - weight.double()).abs().max() <= torch.finfo(dtype).eps * weight.abs().max()


def test_bits_do_not_depend_on_a_weight_s_strides() -> None:
    weight = gaussian(511, 333, torch.float64)
    given = {"a.q": {"scaled_squares": torch.eye(333).double() + gaussian(333, 333).double() ** 2}}
    one, other = (
        approximate({"a.q": w}, 4, "corda", statistics=given, cache=False)["a.q"]
        for w in (weight, transposed(weight))
    )
    assert torch.equal(one.A, other.A)
    assert torch.equal(one.B, other.B)


def test_scale_of_the_covariance_moves_size_from_a_to_b() -> None:
    weight, data = gaussian(33, 65, torch.float64), calls(33, 65)
    layer = Layer("a.q", weight, 4)
    collected = collect_all(resolve_method("corda", {}), layer, data)

    def scaled(c: float) -> Factors:
        given = {"a.q": {"scaled_squares": collected["scaled_squares"] * c}}
        return approximate({"a.q": weight}, 4, "corda", statistics=given, cache=False)["a.q"]

    one, other = scaled(1.0), scaled(9.0)
    torch.testing.assert_close(other.B, one.B * 3)
    torch.testing.assert_close(other.A, one.A / 3)


def test_damping_doubles_until_the_inverse_is_good() -> None:
    # Damped once, it has eigenvalues from 1 down to 1e-17, which fp64 does not invert.
    weight = gaussian(20, 12, torch.float64)
    spread = torch.logspace(0, -17, 12, dtype=torch.float64)
    basis = torch.linalg.qr(gaussian(12, 12, torch.float64))[0]
    eye = torch.eye(12, dtype=torch.float64)
    given = {"scaled_squares": (basis * spread) @ basis.T - 0.01 * spread.mean() / 1.01 * eye}
    f = approximate({"a.q": weight}, 4, "corda", statistics={"a.q": given}, cache=False)["a.q"]
    assert f.info["damping"] == 0.02
    assert torch.isfinite(f.A).all()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(LoraInitError, match=r"^corda: mode must be one of ipm, kpm, got 'best'"):
        resolve_method("corda", {"mode": "best"})
    weight = gaussian(9, 6)
    zero = {"a.q": {"scaled_squares": torch.zeros(6, 6)}}
    with pytest.raises(LoraInitError, match=r"a\.q: its inputs are zero for every token"):
        approximate({"a.q": weight}, 4, "corda", statistics=zero, cache=False)
    with pytest.raises(LoraInitError, match=r"a\.q: r = 7 exceeds min\(out, in\) = 6"):
        approximate({"a.q": weight}, 7, "corda", statistics=zero, cache=False)
