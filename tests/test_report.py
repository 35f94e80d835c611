"""The self-check's numbers and limits, the table, JSON and the plot."""

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_init import Factors, LoraInitError, approximate
from lora_init import report as report_module
from lora_init.methods import Layer, resolve_method
from lora_init.report import LayerReport, Report, eckart_young, self_check
from lora_init.testing import DTYPES, gaussian


def check(
    weights: dict[str, Tensor],
    method: str = "inilora",
    dtype: torch.dtype = torch.float32,
    r: int = 4,
    scaling: float = 1.0,
    **options: object,
) -> tuple[list[LayerReport], list[Factors]]:
    """Reports, and the factors as stored in `dtype`."""
    factors = approximate(weights, r, method, scaling=scaling, cache=False, **options)
    stored = [f.to(dtype, name) for name, f in factors.items()]
    layers = [Layer(name, weight, r, scaling) for name, weight in weights.items()]
    return self_check(layers, stored, resolve_method(method, options)), stored


def model(dtype: torch.dtype = torch.float32, size: float = 1.0) -> dict[str, Tensor]:
    shapes = {"layers.0.q": (48, 64), "layers.0.v": (64, 48), "layers.1.q": (17, 130)}
    return {
        name: (gaussian(*shape, seed=i) * size).to(dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_self_check_measures_what_will_be_stored(dtype: torch.dtype) -> None:
    weights = model(dtype)
    before = {name: weight.clone() for name, weight in weights.items()}
    reports, stored = check(weights, dtype=torch.bfloat16, scaling=2.0, steps=200)
    for (name, weight), report, f in zip(weights.items(), reports, stored, strict=True):
        assert torch.equal(weight, before[name])
        W = weight.double().numpy()
        product = 2.0 * f.B.double().numpy() @ f.A.double().numpy()
        error = f.residual(weight).double().numpy() + product - W
        assert (report.name, report.shape, report.r) == (name, tuple(weight.shape), 4)
        assert report.scaling == 2.0
        assert report.info["steps"] == 200
        assert report.loss == pytest.approx(((W - product) ** 2).mean(), rel=1e-12)
        relative = np.linalg.norm(W - product) / np.linalg.norm(W)
        assert report.relative_error == pytest.approx(relative, rel=1e-12)
        if dtype == torch.float64:  # then all of the error is in how fp64 sums four products
            assert report.start_error <= 8 * 2.0**-53 * np.abs(W - product).max()
            continue
        assert report.start_error == pytest.approx(np.abs(error).max(), rel=1e-6)
        drift = np.linalg.norm(error) / np.linalg.norm(W)
        assert report.start_drift == pytest.approx(drift, rel=1e-6)


def test_methods_that_leave_the_base_start_without_drift() -> None:
    reports, _ = check(model(), "lora")
    for (_, weight), report in zip(model().items(), reports, strict=True):
        assert (report.start_error, report.start_drift) == (0.0, 0.0)
        assert report.relative_error == pytest.approx(1.0, rel=1e-12)
        assert report.loss == pytest.approx(float(weight.double().square().mean()), rel=1e-12)


def test_a_small_drift_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model(torch.bfloat16), steps=200)
        check(model(), "inilora_alpha")


def test_alpha_on_a_bf16_base_warns_of_its_six_percent() -> None:
    # W of 0.02, as large models have, against R of 0.25·√8 = 0.71: published as 5.8%.
    weights = {"layers.0.q": (gaussian(384, 384) * 0.4).bfloat16()}
    with pytest.warns(UserWarning, match=r"layers\.0\.q: .*bfloat16.*starts 6\.\d% away.*float32"):
        (report,), (f,) = check(weights, "inilora_alpha", r=8)
    assert report.start_drift == pytest.approx(0.058, rel=0.06)
    # Rounding errs uniformly within an ulp, 2⁻⁷ of the power of two below: rms ulp/√12.
    W = weights["layers.0.q"].double().numpy()
    _, exponent = np.frexp(W - f.B.double().numpy() @ f.A.double().numpy())
    ulp = np.ldexp(2.0**-7, exponent - 1)
    expected = np.sqrt((ulp**2).sum() / 12) / np.linalg.norm(W)
    assert report.start_drift == pytest.approx(expected, rel=0.01)


def test_a_start_too_far_from_the_weight_is_refused() -> None:
    weights = model(torch.bfloat16, size=0.4)
    weights["layers.0.v"] *= 0.1  # ten times as far, and the one to be named
    message = r"layers\.0\.v: stored in torch\.bfloat16.*[56]\d\.\d% away.*float32, or .* smaller"
    with pytest.raises(LoraInitError, match=message):
        check(weights, "inilora_alpha", r=8)


def test_limits_are_those_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    drift = max(report.start_drift for report in check(model(torch.bfloat16), steps=50)[0])
    monkeypatch.setattr(report_module, "WARN_START_DRIFT", drift * 0.99)
    with pytest.warns(UserWarning, match="away from the pretrained weight"):
        check(model(torch.bfloat16), steps=50)
    monkeypatch.setattr(report_module, "MAX_START_DRIFT", drift * 0.99)
    with pytest.raises(LoraInitError, match="away from the pretrained weight"):
        check(model(torch.bfloat16), steps=50)


def test_residual_that_overflows_is_refused_with_the_layer() -> None:
    weights = {"a.q": torch.full((4, 4), 6e4, dtype=torch.float16), "b.q": torch.ones(4, 4).half()}
    factors = [Factors(torch.ones(1, 4), torch.full((4, 1), -6e4)) for _ in weights]
    layers = [Layer(name, weight, 1) for name, weight in weights.items()]
    with pytest.raises(LoraInitError, match=r"a\.q: the residual .* overflows torch\.float16"):
        self_check(layers, factors, resolve_method("inilora", {}))
    assert (weights["a.q"] == 6e4).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_layer_among_others_passes(dtype: torch.dtype) -> None:
    weights = model(dtype) | {"layers.2.q": torch.zeros(20, 30, dtype=dtype)}
    reports, _ = check(weights, steps=50)
    assert reports[-1].relative_error == 0.0
    assert reports[-1].start_drift <= torch.finfo(dtype).eps


def random_report(**changes: object) -> Report:
    reports, _ = check(model(), steps=20)
    bounds = eckart_young(list(model().values()), [4] * 3)
    layers = [dataclasses.replace(r, bound=b) for r, b in zip(reports, bounds, strict=True)]
    return dataclasses.replace(
        Report("inilora", {"steps": 20, "betas": [0.9, 0.999]}, 7, 1.25, layers), **changes
    )


def test_table_has_a_line_for_each_layer() -> None:
    report = random_report(output_drift=1.5e-4, notes=["no weight decay"])
    report.layers[1].info["cached"] = True
    lines = str(report).splitlines()
    header, *rows = (lines[i].split() for i in (0, 2, 3, 4))
    assert " ".join(header) == "layer shape r s steps loss error bound start drift"
    for layer, row in zip(report.layers, rows, strict=True):
        assert row[:3] == [layer.name, "x".join(map(str, layer.shape)), "4"]
        assert row[3:5] == ["1", "cached" if layer.info["cached"] else "20"]
        expected = [layer.loss, layer.relative_error, layer.bound, layer.start_drift]
        for cell, value, precision in zip(row[5:], expected, (1e-3, 1e-3, 1e-3, 0.1), strict=True):
            assert float(cell) == pytest.approx(value, rel=precision)
    worst = max(layer.start_drift for layer in report.layers)
    assert lines[5] == (
        f"inilora: 3 layers (2 solved, 1 from the cache) in 1.2 s; worst start drift {worst:.1e}; "
        "output drift 1.5e-04"
    )
    assert lines[6:] == ["note: no weight decay"]
    assert len({len(line) for line in lines[:5]}) == 1


def test_table_without_bounds() -> None:
    report = random_report()
    layers = [dataclasses.replace(layer, bound=None, info={}) for layer in report.layers]
    rows = str(dataclasses.replace(report, layers=layers)).splitlines()[2:5]
    assert [row.split()[4] for row in rows] == ["-"] * 3
    assert [row.split()[7] for row in rows] == ["-"] * 3


@pytest.mark.parametrize("drift", [None, 3e-5])
def test_json_round_trip(drift: float | None) -> None:
    report = random_report(output_drift=drift, notes=["a note"])
    text = json.dumps(report.to_dict(), allow_nan=False)
    again = Report.from_dict(json.loads(text))
    assert json.dumps(again.to_dict()) == text
    assert str(again) == str(report)
    assert again.layers[0].shape == (48, 64)
    assert again.options == report.options


@pytest.mark.parametrize("kind", ["full", "no trace, bound or drift", "one layer"])
def test_plot_is_a_picture(kind: str, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    report = random_report(output_drift=1e-4)
    if kind == "one layer":
        report = dataclasses.replace(report, layers=report.layers[:1], output_drift=None)
    elif kind != "full":
        bare = {"bound": None, "info": {}, "start_drift": 0.0}
        layers = [dataclasses.replace(layer, **bare) for layer in report.layers]
        report = dataclasses.replace(report, layers=layers, output_drift=None)
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(tmp_path / "report.png")
    height, width = pixels.shape[:2]
    assert width > 2 * height > 600
    for panel in range(3):  # something is drawn in each
        part = pixels[:, panel * width // 3 : (panel + 1) * width // 3, :3]
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bound_is_that_of_numpys_svd(dtype: torch.dtype) -> None:
    shapes = [(48, 64, 8), (64, 48, 1), (1, 7, 1), (9, 1, 1), (33, 65, 32)]
    weights = [gaussian(m, n, dtype, seed=m) for m, n, _ in shapes]
    bounds = eckart_young(weights, [r for *_, r in shapes])
    for weight, (*_, r), bound in zip(weights, shapes, bounds, strict=True):
        squares = np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2
        assert bound == pytest.approx(np.sqrt(squares[r:].sum() / squares.sum()), rel=1e-10)


def test_bound_of_a_zero_weight_and_of_too_much_work() -> None:
    assert eckart_young([torch.zeros(4, 5)], [2]) == [0.0]
    llama = [torch.empty(4096, 4096, device="meta") for _ in range(64)]
    assert eckart_young(llama, [8] * 64) is None  # would take minutes


def test_no_start_is_better_than_its_bound() -> None:
    weights = model()
    reports, _ = check(weights, r=8, steps=4000)
    bounds = eckart_young(list(weights.values()), [8] * 3)
    for report, bound in zip(reports, bounds, strict=True):
        assert bound <= report.relative_error * (1 + 1e-12)
        assert report.relative_error < bound * 1.02
