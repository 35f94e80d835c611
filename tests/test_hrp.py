"""hrp: from the product of a temporary LoRA that a user's step trains."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_init import Calibration, LoraInitError, approximate, initialize
from lora_init.methods import Layer, resolve_method
from lora_init.methods.hrp import TrainedProduct
from lora_init.testing import DTYPES, gaussian


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33, 65), (64, 48), (9, 130)], ids=str)
def test_directions_are_those_of_the_product(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, rank, r = gaussian(*shape, dtype), 12, 3
    layer = Layer("a.q", weight, r)
    statistic = TrainedProduct(rank)
    state = statistic.start(layer)
    A, B = state["A"], state["B"]
    assert A.shape == (rank, shape[1])
    assert not B.any()
    assert A.abs().max() <= 1 / shape[1] ** 0.5
    B += gaussian(shape[0], rank, B.dtype, seed=2)
    found = statistic.finish(layer, state, 1)
    _, S, Vh = np.linalg.svd((B.double() @ A.double()).numpy(), full_matrices=False)
    k = min(rank, *shape)
    assert found["trained_S"].double().numpy() == pytest.approx(S[:k], rel=1e-5)
    factors = approximate({"a.q": weight}, r, "hrp", statistics={"a.q": found}, cache=False)["a.q"]
    expected = Vh[:r] * np.sign(Vh[np.arange(r), np.abs(Vh[:r]).argmax(1)])[:, None]
    assert np.abs(factors.A.double().numpy() - expected).max() < 1e-4
    assert not factors.B.any()


def test_the_temporary_start_is_the_layers_own() -> None:
    one, two = (TrainedProduct(5).start(Layer(n, gaussian(8, 9), 2))["A"] for n in ("a", "b"))
    assert not torch.equal(one, two)
    other = TrainedProduct(5).start(Layer("a", gaussian(8, 9), 4))["A"]
    assert torch.equal(one, other)  # not of the rank that is asked for


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted(base: nn.Module, r: int) -> PeftModel:
    config = LoraConfig(r=r, lora_alpha=r, target_modules=["q_proj", "v_proj"])
    return get_peft_model(base, config)


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 61, (3, 12), generator=generator) for _ in range(5)]
    return [{"input_ids": x, "labels": x} for x in tokens]


class Step:
    """A user's: Adam on whatever it is given."""

    def __init__(self, lr: float = 0.01):
        self.lr, self.optimizer = lr, None

    def __call__(self, model: nn.Module, batch: Any, parameters: list[nn.Parameter]) -> None:
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(parameters, lr=self.lr)
        self.optimizer.zero_grad()
        model(**batch).loss.backward()
        self.optimizer.step()


def test_a_model_starts_from_where_a_higher_rank_went() -> None:
    base, r, higher = llama(), 2, 3
    model = adapted(copy.deepcopy(base), r)
    data = Calibration(batches(), train_step=Step(), cache=False)
    initialize(model, "hrp", calibration=data, cache=False, higher=higher)
    # The same by PEFT: a LoRA of rank 6, from the same A.
    other = adapted(copy.deepcopy(base), r * higher)
    for name, module in other.named_modules():
        if hasattr(module, "lora_A"):
            layer = Layer(name.removeprefix("base_model.model."), module.base_layer.weight.data, r)
            start = TrainedProduct(r * higher).start(layer)["A"]
            module.lora_A.default.weight.data.copy_(start)
    step = Step()
    for batch in batches():
        step(other, batch, [p for p in other.parameters() if p.requires_grad])
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            theirs = other.get_submodule(name)
            product = theirs.lora_B.default.weight @ theirs.lora_A.default.weight
            _, _, Vh = np.linalg.svd(product.detach().double().numpy())
            A = module.lora_A.default.weight.detach().double().numpy()
            assert np.linalg.svd(A @ Vh[:r].T, compute_uv=False).min() > 1 - 1e-4
            assert not module.lora_B.default.weight.any()
    tokens = batches()[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, base(tokens).logits)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(LoraInitError, match=r"^hrp: higher must be a whole number ≥ 1, got 0"):
        resolve_method("hrp", {"higher": 0})
    untouched = Calibration(batches(), train_step=lambda *_: None, cache=False)
    with pytest.raises(LoraInitError, match=r"q_proj: .* rank 0 .* train_step did not change it"):
        initialize(adapted(llama(), 2), "hrp", calibration=untouched, cache=False)
    with pytest.raises(LoraInitError, match="train_step="):
        initialize(adapted(llama(), 2), "hrp", calibration=Calibration(batches(), cache=False))
    with pytest.raises(LoraInitError, match=r"v_proj: r = 13 exceeds min\(out, in\) = 12"):
        initialize(adapted(llama(), 13), "hrp", calibration=untouched)
