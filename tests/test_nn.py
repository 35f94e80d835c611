"""`LoRALinear` in a trainer of one's own, against PEFT's layer and the untouched linear."""

import copy
import pickle

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
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "load"], ids=str
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
        (lambda: layer(r=0), "r must be ≥ 1 .* got r=0"),
        (lambda: layer(lora_dropout=1.0), r"lora_dropout in \[0, 1\), .* 1\.0"),
        (lambda: layer().initialize(factors(), "real"), '"stored" or "virtual", got \'real\''),
        (lambda: layer().initialize(factors(2.0)), "scaling 2.0, the layer 4 and 1.5"),
        (lambda: layer().initialize(factors(r=3)), "r 3 and scaling 1.5, the layer 4"),
        (lambda: layer().initialize(Factors(torch.zeros(4, 20), torch.zeros(20, 4))), "do not fit"),
    ],
    ids=["conv", "rank", "dropout", "residual", "scaling", "factors' rank", "shape"],
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
