"""What every method's start is to be, by the registry: the pretrained weight, or not."""

import math
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

import lora_init
from lora_init import Factors, LoraInitError, approximate, methods
from lora_init.integrations.peft.layers import lora_layers
from lora_init.methods import Layer, resolve_method
from lora_init.testing import gaussian
from tests.calibrating import calls, collect_all
from tests.test_peft import (
    adapted,
    assert_unchanged,
    distance,
    llama,
    logits,
    snapshot,
    train,
)

# R + s·B₀A₀ = W with R in the base's place; W with B₀A₀ = 0 on it; or neither.
RESIDUAL = {
    "corda", "inilora", "inilora_alpha", "inilora_beta", "init_ab", "lora_ga", "loram", "milora",
    "olora", "pissa",
}  # fmt: skip
ZERO = {"eva", "gaussian", "hrp", "init_a", "init_b", "lora", "orthogonal", "slora"}
ASIDE = {"init_ab_plus", "loftq", "lora_da", "lora_one", "lora_sb", "nlora"}

METHODS = [name for name in methods() if name != "loftq" or find_spec("bitsandbytes")]
OPTIONS = {"inilora": {"steps": 20, "init": "normal"}}
# What their ranks must be divided by, multiplied by to fit into min(out, in), and be at least.
# The last singular values of a gradient, or of what was trained, are what the data makes them, down
# to none.
RANKS = {
    "hrp": (1, 2, 1),
    "orthogonal": (2, 1, 2),
    "lora_ga": (1, 3, 1),
    "lora_one": (1, 2, 1),
    "loram": (1, 1, 2),
}
FROM_THE_WEIGHT = [name for name in METHODS if methods()[name].needs == "nothing"]


def start(method: str, weight: Tensor, r: int, scaling: float, seed: int) -> Factors:
    """Factors of a layer, from made-up data where the method wants some."""
    options = OPTIONS.get(method, {})
    layer = Layer("layers.0.q", weight, r, scaling, seed)
    data = calls(*weight.shape, seed=seed)
    found = approximate(
        {layer.name: weight},
        r,
        method,
        scaling=scaling,
        seed=seed,
        statistics={layer.name: collect_all(resolve_method(method, options), layer, data)},
        cache=False,
        **options,
    )
    return found[layer.name].to(torch.float32)


def test_every_method_is_here() -> None:
    assert set(methods()) <= RESIDUAL | ZERO | ASIDE
    assert len(RESIDUAL | ZERO | ASIDE) == len(RESIDUAL) + len(ZERO) + len(ASIDE)
    for name, description in methods().items():
        assert (description.base == "residual") == (name in RESIDUAL)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_start_is_the_weight_where_it_is_to_be(method: str, data: st.DataObject) -> None:
    divisor, share, least = RANKS.get(method, (1, 1, 1))
    out, in_ = (data.draw(st.integers(least * share, 40), label=x) for x in ("out", "in"))
    most = min(out, in_) // share // divisor
    r = divisor * data.draw(st.integers(-(-least // divisor), most), label="r / divisor")
    scaling = data.draw(st.floats(0.05, 20), label="scaling")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    W = gaussian(out, in_, dtype, seed % 1000)
    f = start(method, W, r, scaling, seed)
    assert (f.A.shape, f.B.shape, f.scaling) == ((r, in_), (out, r), scaling)
    product = scaling * (f.B.double() @ f.A.double())
    # Of r products summed in fp64.
    own = 2 * (r + 3) * 2.0**-53 * scaling * (f.B.double().abs() @ f.A.double().abs())
    if method in RESIDUAL:
        R = f.residual(W)
        half_ulp = torch.finfo(dtype).eps / 2 * R.double().abs()
        assert ((R.double() + product - W.double()).abs() <= half_ulp * 1.01 + own).all()
        return
    aside = product if f.base is None else product + f.base.double() - W.double()
    drift = f.fit(W, residual=resolve_method(method, {}).kind).start_drift
    assert drift == pytest.approx(float(aside.norm() / W.double().norm()), rel=1e-6, abs=1e-9)
    if method in ZERO - {"orthogonal"}:
        assert not product.any()
    elif method == "orthogonal":  # to one rounding of each entry
        rounding = 2.0**-23 * scaling * (f.B.double().abs() @ f.A.double().abs())
        assert (product.abs() <= rounding).all()
    elif method == "loftq":  # nearer than a 4-bit base alone would be
        assert drift < 0.3
    else:
        assert product.any()


@settings(max_examples=20, deadline=None)
@given(half=st.integers(1, 16), more=st.integers(0, 20), tall=st.booleans(), s=st.floats(0.1, 8))
def test_pissa_and_milora_share_the_weight(half: int, more: int, tall: bool, s: float) -> None:
    shape = (2 * half + more, 2 * half) if tall else (2 * half, 2 * half + more)
    W = gaussian(*shape, torch.float64, seed=half)
    halves = [
        approximate({"q": W}, half, method, scaling=s, cache=False, **options)["q"]
        for method, options in (("pissa", {"tol": 1e-12}), ("milora", {}))
    ]
    rebuilt = sum(f.product() for f in halves)
    assert float((rebuilt - W).norm() / W.norm()) < 1e-5


@pytest.mark.parametrize("residual", ["stored", "virtual"])
@pytest.mark.parametrize("method", [name for name in FROM_THE_WEIGHT if name != "loftq"])
def test_initialize_starts_there_and_saves_plain_lora(
    method: str, residual: str, tmp_path: object
) -> None:
    base = llama()
    model = adapted(base, r=4, lora_alpha=6)
    report = lora_init.initialize(
        model, method, residual=residual, cache=False, **OPTIONS.get(method, {})
    )
    drift = max(layer.start_drift for layer in report.layers)
    if method in ASIDE:
        assert drift > 1e-3
        assert distance(logits(model), logits(base)) > 1e-4
        for name, layer in lora_layers(model).items():
            W = base.get_submodule(name).weight
            assert torch.equal(layer.get_base_layer().weight, W)
    else:
        assert drift < 1e-5
        assert distance(logits(model), logits(base)) < 2e-5
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert distance(logits(loaded), logits(model)) < 2e-5


@pytest.mark.parametrize(
    ("method", "r", "message"),
    [
        ("loram", 1, r"layers\.1\.self_attn\.q_proj: loram scales .* r = 1"),
        ("orthogonal", 3, r"layers\.1\.self_attn\.q_proj: orthogonal .* r = 3 is odd"),
        ("nlora", 49, r"layers\.1\.self_attn\.q_proj: nlora takes r = 49 rows"),
        ("olora", 49, r"layers\.1\.self_attn\.q_proj: r = 49 exceeds"),
    ],
)
def test_one_layer_that_cannot_start_leaves_the_model_alone(
    method: str, r: int, message: str
) -> None:
    model = adapted(llama(), r=4, rank_pattern={"layers.1.self_attn.q_proj": r})
    before = snapshot(model)
    with pytest.raises(LoraInitError, match=message):
        lora_init.initialize(model, method)
    assert_unchanged(model, before)
    assert math.isfinite(float(logits(model).sum()))
