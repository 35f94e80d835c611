"""`LoRALinear` in a trainer of one's own, against PEFT's layer and the untouched linear."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lora_init
from lora_init import Factors, LoraInitError
from lora_init.nn import LoRALinear

bf16 = torch.bfloat16


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 20, bias=bias, dtype=dtype)


def layer(**options: object) -> LoRALinear:
    return LoRALinear(linear(), **({"r": 4, "lora_alpha": 6} | options))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def packed() -> nn.Linear:
    module = linear()
    module.weight = nn.Parameter(torch.zeros(20, 24, dtype=torch.uint8), requires_grad=False)
    return module


def factors(scaling: float = 1.5, r: int = 4) -> Factors:
    g = torch.Generator().manual_seed(1)
    return Factors(
        torch.randn(r, 24, generator=g) * 0.2, torch.randn(20, r, generator=g) * 0.2, scaling
    )


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2)).to(dtype)


def train(module: nn.Module, steps: int = 5) -> list[float]:
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(steps):
        loss = (module(inputs()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_starts_as_the_base_layer_with_peft_s_names_and_distribution() -> None:
    module = layer()
    assert torch.equal(module(inputs()), linear()(inputs()))
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == {
        "base_layer.weight": (20, 24),
        "base_layer.bias": (20,),
        "lora_A.default.weight": (4, 24),
        "lora_B.default.weight": (20, 4),
    }
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"lora_A.default.weight", "lora_B.default.weight"}
    assert 0.5 * 24**-0.5 < module.A.abs().max() <= 24**-0.5
    assert module.scaling == 1.5
    assert layer(use_rslora=True).scaling == 3.0
    assert repr(module).startswith("LoRALinear(\n  r=4, scaling=1.5, lora_dropout=0")


@pytest.mark.parametrize("residual", ["none", "stored", "virtual"])
def test_peft_s_layer_has_the_same_state_and_trains_the_same(residual: str) -> None:
    peft = pytest.importorskip("peft")
    module = layer()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(linear()), config)
    if residual != "none":
        lora_init.initialize(model, steps=20, cache=False, residual=residual)
        found = lora_init.approximate(
            {"0": linear().weight}, r=4, scaling=1.5, steps=20, cache=False
        )
        module.initialize(found["0"], residual)
    other = model.base_model.model[0]
    if residual == "none":
        other.load_state_dict(module.state_dict())
    state = {name: t for name, t in module.state_dict().items() if "0" not in name}
    assert state.keys() == other.state_dict().keys()
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in state.items())
    assert train(module) == pytest.approx(train(model), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, bf16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_virtual_residual_starts_exactly_and_keeps_the_weight(
    dtype: torch.dtype, bias: bool
) -> None:
    module = LoRALinear(linear(dtype, bias), 4, 6, lora_dropout=0.3, dtype=torch.float32)
    module.initialize(factors(), "virtual")
    want = linear(dtype, bias)
    assert module.A.dtype == torch.float32
    assert torch.equal(module(inputs(dtype)), want(inputs(dtype)))
    assert torch.equal(module.base_layer.weight, want.weight)
    assert "virtual residual" in repr(module)


def test_a_stored_residual_starts_within_its_rounding() -> None:
    module = layer()
    module.initialize(factors())
    exact = linear().weight.double() - factors().product()
    assert torch.equal(module.base_layer.weight, exact.float())
    torch.testing.assert_close(module(inputs()), linear()(inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", ["stored", "virtual"])
def test_merge_and_unmerge(residual: str) -> None:
    module = layer()
    module.initialize(factors(), residual)
    train(module)
    live, weight = module(inputs()), module.base_layer.weight.clone()
    for _ in range(2):  # the second call finds it done
        module.merge()
    assert module.merged
    torch.testing.assert_close(module(inputs()), live, rtol=1e-5, atol=1e-5)
    with pytest.raises(LoraInitError, match=r"call unmerge\(\) first"):
        module.initialize(factors())
    for _ in range(2):
        module.unmerge()
    torch.testing.assert_close(module.base_layer.weight, weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(module(inputs()), live, rtol=1e-5, atol=1e-5)


def test_merging_at_a_virtual_start_changes_nothing() -> None:
    module = layer()
    module.initialize(factors(), "virtual")
    module.merge()
    assert torch.equal(module.base_layer.weight, linear().weight)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "load"],
    ids=["deepcopy", "pickle", "load"],
)
def test_state_dict_and_copies_bring_the_start_along(copied: object) -> None:
    module = layer()
    module.initialize(factors(), "virtual")
    train(module)
    if copied == "load":
        other = layer()
        other.load_state_dict(module.state_dict())
    else:
        other = copied(module)
    assert torch.equal(other(inputs()), module(inputs()))
    assert train(other) == train(module)
    assert {"lora_A0", "lora_B0"} < module.state_dict().keys()


def test_dropout_is_of_training_alone_and_repeats_under_a_seed() -> None:
    module = layer(lora_dropout=0.5)
    module.initialize(factors())
    outputs = []
    for _ in range(2):
        torch.manual_seed(4)
        outputs.append(module(inputs()))
    assert torch.equal(*outputs)
    assert not torch.equal(module(inputs()), outputs[0])
    module.eval()
    assert torch.equal(module(inputs()), module(inputs()))


def test_compile_and_autocast() -> None:
    module = layer(lora_dropout=0.1)
    module.initialize(factors(), "virtual")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs()), module(inputs()))
    compiled(inputs()).sum().backward()
    assert module.A.grad is not None
    with torch.autocast("cpu", dtype=bf16):
        assert module(inputs()).dtype == bf16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LoRALinear(nn.Conv1d(1, 1, 1)), "must be an nn.Linear, got Conv1d"),
        (lambda: LoRALinear(Doubled(24, 20)), "must be an nn.Linear, got Doubled"),
        (lambda: LoRALinear(packed()), "floating-point weight, got torch.uint8"),
        (lambda: layer(r=0), "r must be ≥ 1, .* got r=0"),
        (lambda: layer(lora_alpha=0), "lora_alpha > 0 .* got r=4, lora_alpha=0"),
        (lambda: layer(lora_dropout=1.0), r"lora_dropout in \[0, 1\), .* lora_dropout=1\.0"),
        (lambda: layer().initialize(factors(), "real"), '"stored" or "virtual", got \'real\''),
        (lambda: layer().initialize(factors(2.0)), "scaling 2.0, the layer 4 and 1.5"),
        (lambda: layer().initialize(factors(r=3)), "r 3 and scaling 1.5, the layer 4"),
        (lambda: layer().initialize(Factors(torch.zeros(4, 20), torch.zeros(20, 4))), "do not fit"),
    ],
    ids=[
        "conv",
        "subclass",
        "packed",
        "rank",
        "alpha",
        "dropout",
        "residual",
        "scaling",
        "factors' rank",
        "shape",
    ],
)
def test_errors(call: object, message: str) -> None:
    with pytest.raises(LoraInitError, match=message):
        call()


def test_a_stored_residual_on_a_virtual_start_is_refused() -> None:
    module = layer()
    module.initialize(factors(), "virtual")
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(LoraInitError, match='pass residual="virtual" again'):
        module.initialize(factors())
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    module.initialize(factors(), "virtual")


SIZES = {"q": 20, "k": 8, "v": 12}


def stackable(dtype: torch.dtype = torch.float64, **options: object) -> dict[str, LoRALinear]:
    """q, k and v of one input, trained away from B = 0."""
    torch.manual_seed(3)
    layers = {}
    for name, out_features in SIZES.items():
        base = nn.Linear(24, out_features, dtype=dtype)
        layers[name] = LoRALinear(base, **({"r": 4, "lora_alpha": 6} | options))
        nn.init.normal_(layers[name].B, std=0.3)
    return layers


def start_at(layers: dict[str, LoRALinear]) -> None:
    for layer in layers.values():
        weight = layer.base_layer.weight
        found = lora_init.approximate(
            {"w": weight}, r=len(layer.A), method="pissa", scaling=layer.scaling, cache=False
        )
        layer.initialize(found["w"], "virtual")


@pytest.mark.parametrize("virtual", [False, True])
@pytest.mark.parametrize("scalings", ["one", "several"])
def test_stacked_layers_compute_and_train_as_they_do_alone(virtual: bool, scalings: str) -> None:
    layers = stackable()
    if scalings == "several":
        layers["k"].scaling = 0.5
    if virtual:
        start_at(layers)
        with torch.no_grad():
            for layer in layers.values():
                layer.A.mul_(1.1)
    alone = copy.deepcopy(layers)
    stacked = lora_init.nn.StackedLoRALinear(layers)
    x, y = (inputs(torch.float64).requires_grad_() for _ in range(2))
    got, expected = stacked(x), [layer(y) for layer in alone.values()]
    torch.autograd.backward(got, [torch.sin(t.detach()) for t in got])
    torch.autograd.backward(expected, [torch.sin(t.detach()) for t in expected])
    for one, other in zip((*got, x.grad), (*expected, y.grad), strict=True):
        assert one is not None
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-12)
    for name, layer in layers.items():
        for one, other in ((layer.A, alone[name].A), (layer.B, alone[name].B)):
            assert torch.allclose(one.grad, other.grad, rtol=1e-11, atol=1e-12)
        assert layer.base_layer.weight.grad is None


def loaded(stacked: nn.Module) -> nn.Module:
    other = lora_init.nn.StackedLoRALinear(stackable(torch.float32))
    other.load_state_dict(copy.deepcopy(stacked).state_dict(), assign=True)
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, loaded])
def test_stacked_weights_of_a_copy_are_those_that_it_compiles(copied: Callable) -> None:
    stacked = lora_init.nn.StackedLoRALinear(stackable(torch.float32))
    with torch.no_grad():
        for layer in stacked.layers.values():
            layer.base_layer.weight.mul_(2)
    other = copied(stacked)
    with torch.no_grad():
        for layer in other.layers.values():
            layer.base_layer.weight.mul_(3)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for one, layer in zip(compiled(inputs()), other.layers.values(), strict=True):
        torch.testing.assert_close(one, layer(inputs()), rtol=1e-5, atol=1e-5)


def test_stacked_weights_are_one_tensor_that_survives_copies_and_casts() -> None:
    layers = stackable(torch.float32)
    states = {name: copy.deepcopy(layer.state_dict()) for name, layer in layers.items()}
    stacked = lora_init.nn.StackedLoRALinear(layers)
    x = inputs()
    expected = [layer(x) for layer in layers.values()]
    for module in (stacked, copy.deepcopy(stacked), pickle.loads(pickle.dumps(stacked))):
        for one, other in zip(module(x), expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
        weights = [layer.base_layer.weight for layer in module.layers.values()]
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
        for name, state in states.items():
            for key, value in state.items():
                assert torch.equal(module.state_dict()[f"layers.{name}.{key}"], value)
    assert [t.dtype for t in stacked.to(bf16)(x.to(bf16))] == [bf16] * 3
    assert stacked._is_stacked()


def test_stacked_layers_share_one_mask() -> None:
    layers = stackable(torch.float32, lora_dropout=0.5)
    same = {"q": layers["q"], "k": copy.deepcopy(layers["q"])}
    q, k = lora_init.nn.StackedLoRALinear(same)(inputs())
    assert torch.equal(q, k)
    assert not torch.equal(q, layers["q"].eval()(inputs()))


def test_layers_that_cannot_be_stacked_are_refused() -> None:
    layers = stackable()
    before = layers["q"].base_layer.weight.data_ptr()
    refused = {
        "two layers or more, got 1": {"q": layers["q"]},
        "k must be a LoRALinear, got Linear": {"q": layers["q"], "k": nn.Linear(24, 8)},
        r"its in_features is 8, not 24": {
            "q": layers["q"],
            "k": LoRALinear(nn.Linear(8, 8, dtype=torch.float64), r=4),
        },
        r"k cannot be stacked on q: its bias is False, not True": {
            "q": layers["q"],
            "k": LoRALinear(nn.Linear(24, 8, bias=False, dtype=torch.float64), r=4),
        },
    }
    for message, group in refused.items():
        with pytest.raises(LoraInitError, match=message):
            lora_init.nn.StackedLoRALinear(group)
    layers["v"].merge()
    with pytest.raises(LoraInitError, match="v is merged"):
        lora_init.nn.StackedLoRALinear(layers)
    assert layers["q"].base_layer.weight.data_ptr() == before
    layers["v"].unmerge()
    stacked = lora_init.nn.StackedLoRALinear(layers)
    layers["k"].merge()
    with pytest.raises(LoraInitError, match="k is merged"):
        stacked(inputs(torch.float64))


def test_half_a_start_is_not_loaded() -> None:
    module = layer()
    module.initialize(factors(), "virtual")
    state = module.state_dict()
    del state["lora_B0"]
    fresh = layer()
    with pytest.raises(RuntimeError, match="lora_A0 is half of a virtual start"):
        fresh.load_state_dict(state)
    assert fresh.start is None
