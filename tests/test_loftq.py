"""LoftQ against its definition in numpy, and through PEFT."""

import copy
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import lora_init
from lora_init import Factors, LoraInitError, approximate
from lora_init.factors import Residual
from lora_init.integrations.peft import _check_replacing
from lora_init.integrations.peft.layers import lora_layers
from lora_init.methods import resolve_method
from lora_init.testing import DTYPES, gaussian, misaligned, transposed
from tests.test_peft import adapted, assert_unchanged, distance, llama, logits, snapshot, train

pytest.importorskip("bitsandbytes", reason="LoftQ quantises with bitsandbytes, which is missing")

# Of NF4: quantiles of the normal distribution between the largest values, as QLoRA's appendix E
# lists them.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0]
)  # fmt: skip
# Of the third, blocks of 64 end in the middle of rows.
SHAPES = {"blocks": (48, 64), "odd": (33, 65), "halves": (64, 96), "one block": (5, 7)}


def nf4(values: np.ndarray) -> np.ndarray:
    """Each block of 64 in a row-major matrix: the nearest of its largest magnitude times the 16."""
    flat = values.reshape(-1)
    padded = np.pad(flat, (0, -len(flat) % 64)).reshape(-1, 64)
    scale = np.abs(padded).max(1, keepdims=True)
    nearest = np.abs(padded[..., None] / np.where(scale, scale, 1)[..., None] - NF4).argmin(-1)
    return (NF4[nearest] * scale).reshape(-1)[: len(flat)].reshape(values.shape)


def int8(values: np.ndarray) -> np.ndarray:
    """Each row: the nearest of 255 equal steps between its largest magnitude's two signs."""
    half = values.astype(np.float16).astype(np.float64)
    scale = np.abs(half).max(1, keepdims=True)
    return np.round(half * 127 / scale) * scale / 127


QUANTISE = {"nf4": nf4, "int8": int8}


def loftq(W: np.ndarray, r: int, quantization: str, iterations: int) -> list[np.ndarray]:
    """Q and the product B·A after `iterations`, in fp64."""
    product = np.zeros_like(W)
    for _ in range(iterations):
        Q = QUANTISE[quantization](W - product)
        U, S, V = np.linalg.svd(W - Q, full_matrices=False)
        product = (U[:, :r] * S[:r]) @ V[:r]
    return [Q, product]


def solve(weight: Tensor, r: int = 4, **options: object) -> Factors:
    return approximate({"layers.0.q": weight}, r, "loftq", cache=False, **options)["layers.0.q"]


def error(f: Factors, W: Tensor) -> float:
    assert f.base is not None
    start = f.base.double() + f.scaling * f.B.double() @ f.A.double()
    return float(((start - W.double()).norm() / W.double().norm()).detach())


@pytest.mark.parametrize("quantization", QUANTISE)
@pytest.mark.parametrize("case", SHAPES)
def test_one_iteration_is_the_definition(case: str, quantization: str) -> None:
    W = gaussian(*SHAPES[case])
    f = solve(W, quantization=quantization, iterations=1, tol=1e-10, scaling=2.5)
    Q, product = loftq(W.double().numpy(), 4, quantization, 1)
    # The steps are far larger than a rounding in fp32 (in int8 at a tie, one step is allowed for).
    step = {"nf4": 0, "int8": np.abs(W.numpy()).max() / 127}[quantization]
    off = np.abs(f.base.double().numpy() - Q)
    assert off.max() <= step * 1.01 + 1e-7
    assert (off > 1e-4 * np.abs(Q).max()).mean() < 0.01
    if off.max() < 1e-6:
        np.testing.assert_allclose(f.product(), product, atol=2e-5 * np.abs(W.numpy()).max())
    # √(S/s) on each side.
    A, B = f.A.double().numpy(), f.B.double().numpy()
    np.testing.assert_allclose(A @ A.T, B.T @ B, atol=1e-6 * np.linalg.norm(B) ** 2)


@pytest.mark.parametrize("quantization", QUANTISE)
@pytest.mark.parametrize("case", SHAPES)
def test_five_iterations_come_as_near_as_the_definition(case: str, quantization: str) -> None:
    W = gaussian(*SHAPES[case])
    f = solve(W, quantization=quantization, scaling=0.5, tol=1e-8)
    Q, product = loftq(W.double().numpy(), 4, quantization, 5)
    expected = np.linalg.norm(Q + product - W.numpy()) / np.linalg.norm(W.numpy())
    assert error(f, W) == pytest.approx(expected, rel=0.02)
    once = solve(W, quantization=quantization, iterations=1)
    assert error(f, W) < 1.05 * error(once, W)


@pytest.mark.parametrize("quantization", QUANTISE)
def test_the_factors_make_up_for_much_of_the_loss(quantization: str) -> None:
    W = gaussian(64, 96)
    lost = np.linalg.norm(QUANTISE[quantization](W.double().numpy()) - W.numpy())
    assert error(solve(W, r=32, quantization=quantization), W) < 0.6 * lost / float(W.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", QUANTISE)
def test_base_is_held_by_the_quantisation(quantization: str, dtype: torch.dtype) -> None:
    W = gaussian(33, 130, dtype)
    f = solve(W, quantization=quantization)
    assert (f.base.dtype, f.base.shape) == (dtype, W.shape)
    assert {f.A.dtype, f.B.dtype} == {torch.float64 if dtype == torch.float64 else torch.float32}
    again = QUANTISE[quantization](f.base.double().numpy())
    # Half an ulp of fp16, which int8's scales are rounded to, or of W's dtype.
    eps = max(torch.finfo(dtype).eps, 2.0**-10 if quantization == "int8" else 1e-7)
    np.testing.assert_allclose(again, f.base.double(), atol=eps * float(W.abs().max()))
    assert 0 < error(f, W) < 0.12


def test_bits_depend_on_the_values_alone() -> None:
    W = gaussian(40, 65, torch.bfloat16)
    expected = solve(W)
    torch.set_num_threads(2)
    for view in (transposed(W), misaligned(W), W.clone()):
        others = {"a.q": gaussian(9, 8), "layers.0.q": view}
        f = approximate(others, 4, "loftq", cache=True)["layers.0.q"]
        assert all(
            torch.equal(getattr(f, name), getattr(expected, name)) for name in ("A", "B", "base")
        )


def test_zero_weights_stay_zero() -> None:
    f = solve(torch.zeros(20, 30))
    assert not f.base.any()
    assert not f.product().any()


@pytest.mark.parametrize("residual", ["replaced", None])
def test_fit_measures_the_start_with_its_base(residual: Residual) -> None:
    W = gaussian(40, 65)
    f = solve(W).to(torch.float32)
    drift = f.fit(W, residual=residual).start_drift
    if residual:
        assert drift == pytest.approx(error(f, W), rel=1e-6)
    else:
        assert drift == pytest.approx(f.norm() / float(W.norm()), rel=1e-4)


class TestPeft:
    def test_base_and_factors_are_written_and_reported(self) -> None:
        base = llama()
        model = adapted(base, r=4, lora_alpha=6)
        batch = {"input_ids": torch.arange(32).reshape(2, 16)}
        report = lora_init.initialize(model, "loftq", example=batch)
        weights = {name: base.get_submodule(name).weight for name in lora_layers(model)}
        expected = approximate(weights, 4, "loftq", scaling=1.5)
        for (name, layer), line in zip(lora_layers(model).items(), report.layers, strict=True):
            f = expected[name]
            assert torch.equal(layer.get_base_layer().weight, f.base)
            assert torch.equal(layer.lora_A.default.weight, f.A)
            assert torch.equal(layer.lora_B.default.weight, f.B)
            assert line.start_drift == pytest.approx(error(f, weights[name]), rel=1e-5)
        assert report.output_drift == pytest.approx(distance(logits(model), logits(base)), rel=1e-3)
        (note,) = report.notes
        assert "after the adapter: model.unload() gives the base" in note
        assert "no longer the pretrained one" in note
        assert "save the base model too" in note

    def test_saved_with_its_base_it_is_plain_lora(self, tmp_path: object) -> None:
        model = adapted(llama(), r=4)
        lora_init.initialize(model, "loftq")
        train(model)
        model.save_pretrained(tmp_path)
        expected = logits(model)
        # On the pretrained base the adapter is wrong, as the note says.
        strange = PeftModel.from_pretrained(llama(), tmp_path).eval()
        assert distance(logits(strange), expected) > 1e-3
        loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path).eval()
        assert torch.equal(logits(loaded), expected)

    @pytest.mark.parametrize("method", ["loftq", "pissa", "lora"])
    def test_a_base_that_was_replaced_is_no_pretrained_one(self, method: str) -> None:
        model = adapted(llama(), r=4)
        lora_init.initialize(model, "loftq")
        before = snapshot(model)
        for again in (model, copy.deepcopy(model)):
            with pytest.raises(LoraInitError, match=r"loftq replaced this model's base.*anew from"):
                lora_init.initialize(again, method)
        assert_unchanged(model, before)
        # Made a model of its own, it is the one that is initialised.
        lora_init.initialize(adapted(model.unload(), r=4), method)

    def test_conv1d_is_quantised_as_out_in(self) -> None:
        from transformers.pytorch_utils import Conv1D

        model = nn.Sequential(Conv1D(24, 40))
        W = model[0].weight.detach().T.clone()
        model = adapted(model, target_modules=["0"], r=4, fan_in_fan_out=True)
        lora_init.initialize(model, "loftq")
        f = approximate({"0": W}, 4, "loftq", scaling=4.0)["0"]
        assert torch.equal(model.base_model.model[0].get_base_layer().weight.T, f.base)

    @pytest.mark.parametrize("case", ["virtual", "tied", "second adapter", "virtual before"])
    def test_a_base_that_must_stay_is_refused(self, case: str) -> None:
        options: dict[str, object] = {}
        model = adapted(llama(tied=case == "tied"), target_modules=["lm_head", "q_proj"], r=4)
        message = {
            "virtual": r'loftq replaces the weights.*residual="virtual" leaves',
            "tied": r"lm_head: its weight is shared.*nothing was changed \(leave the layer out",
            "second adapter": r"q_proj: adapter 'other' shares it",
            "virtual before": r"needs this model's base as it is: build it anew",
        }[case]
        if case == "virtual":
            options["residual"] = "virtual"
        if case == "second adapter":
            model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        if case == "virtual before":
            lora_init.initialize(model, "pissa", residual="virtual")
        before = snapshot(model)
        with pytest.raises(LoraInitError, match=message):
            lora_init.initialize(model, "loftq", **options)
        assert_unchanged(model, before)


def test_a_checkpoint_run_refuses_it_before_anything_is_written(tmp_path: object) -> None:
    llama().save_pretrained(tmp_path / "model")
    with pytest.raises(LoraInitError, match=r"loftq replaces .*lora_init\.initialize"):
        lora_init.initialize_checkpoint(tmp_path / "model", tmp_path / "out", "loftq")
    assert not (tmp_path / "out").exists()


def test_own_layers_refuse_what_is_no_start_at_the_weight() -> None:
    layer = lora_init.nn.LoRALinear(nn.Linear(8, 9, bias=False), r=2, lora_alpha=2)
    before = snapshot(layer)
    with pytest.raises(LoraInitError, match=r"copy factors\.base, A and B into base_layer"):
        layer.initialize(solve(layer.base_layer.weight, 2))
    assert_unchanged(layer, before)


def test_jobs_of_several_ranks_are_refused() -> None:
    with pytest.raises(LoraInitError, match=r"loftq replaces .* pass distributed=False on each"):
        _check_replacing(resolve_method("loftq", {}), "stored", ranks=2)


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lora_init.methods.loftq"], "find_spec", lambda name: None)
    with pytest.raises(LoraInitError, match=r"pip install 'lora-init\[qlora\]'"):
        solve(gaussian(9, 8), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "fp4"}, r"quantization must be one of nf4, int8, got 'fp4'"),
        ({"iterations": 0}, r"iterations must be a whole number ≥ 1, got 0"),
        ({"tol": 0}, r"tol must be a number > 0, got 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(LoraInitError, match=f"loftq: {message}"):
        resolve_method("loftq", options)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (gaussian(9, 8), {"r": 9}, r"a\.q: r = 9 exceeds min\(out, in\) = 8"),
        (
            gaussian(9, 8) * 1e7,
            {"r": 2, "quantization": "int8"},
            r"a\.q: values up to .* do not survive the quantisation to int8",
        ),
    ],
    ids=["r", "fp16"],
)
def test_layers_it_cannot_do_are_named(
    weight: Tensor, options: dict[str, object], message: str
) -> None:
    with pytest.raises(LoraInitError, match=message):
        approximate({"a.q": weight}, method="loftq", **options)
