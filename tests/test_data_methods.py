"""Methods that start from data: what their bits depend on, and a model from end to end."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_init import Calibration, Factors, LoraInitError, approximate, initialize
from lora_init.methods import Layer, resolve_method
from lora_init.testing import DTYPES, gaussian, transposed
from tests.calibrating import calls, collect_all

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "eva": ("eva", {}),
    "corda": ("corda", {}),
    "corda kpm": ("corda", {"mode": "kpm"}),
    "lora_ga": ("lora_ga", {}),
    "lora_ga exact": ("lora_ga", {"exact_gradient": True}),
    "lora_one": ("lora_one", {}),
    "lora_one 1 pass": ("lora_one", {"passes": 1}),
    "lora_sb": ("lora_sb", {"lr": 0.5}),
    "lora_da": ("lora_da", {}),
    "hrp": ("hrp", {}),
}
SHAPES = {"a.q": (48, 64), "a.v": (64, 48), "b.q": (17, 130)}


def solve(
    case: tuple[str, dict[str, Any]], dtype: torch.dtype, names: Sequence[str], **more: Any
) -> dict[str, Factors]:
    method = resolve_method(*case)
    weights = {name: gaussian(*SHAPES[name], dtype) for name in names}
    collected = {
        name: collect_all(method, Layer(name, weight, 4), calls(*weight.shape, dtype=dtype))
        for name, weight in weights.items()
    }
    return approximate(weights, 4, method, statistics=collected, cache=False, **more)


def assert_same_bits(found: dict[str, Factors], expected: dict[str, Factors]) -> None:
    for name, f in found.items():
        assert torch.equal(f.A, expected[name].A), name
        assert torch.equal(f.B, expected[name].B), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", METHODS.values(), ids=METHODS)
def test_repeats_its_bits_and_says_what_it_is(
    case: tuple[str, dict[str, Any]], dtype: torch.dtype
) -> None:
    torch.set_num_threads(1)
    first = solve(case, dtype, list(SHAPES))
    assert_same_bits(solve(case, dtype, list(reversed(SHAPES))), first)
    assert_same_bits(solve(case, dtype, list(SHAPES), group_bytes=1), first)
    assert {f.info["method"] for f in first.values()} == {case[0]}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for f in first.values() for t in (f.A, f.B)} == {wide}


@pytest.mark.parametrize("case", METHODS.values(), ids=METHODS)
def test_bits_of_the_solve_do_not_depend_on_threads_or_settings(
    case: tuple[str, dict[str, Any]],
) -> None:
    method = resolve_method(*case)
    weights = {name: gaussian(*shape) for name, shape in SHAPES.items()}
    collected = {
        name: collect_all(method, Layer(name, weight, 4), calls(*weight.shape, dtype=torch.float32))
        for name, weight in weights.items()
    }

    def run(view: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, Factors]:
        viewed = {name: view(weight) for name, weight in weights.items()}
        return approximate(viewed, 4, method, statistics=collected, cache=False)

    torch.set_num_threads(1)
    expected = run()
    torch.set_num_threads(4)
    assert_same_bits(run(), expected)
    assert_same_bits(run(transposed), expected)
    surroundings: list[AbstractContextManager[object]] = [
        torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)
    ]  # fmt: skip
    for surrounding in surroundings:
        with surrounding:
            assert_same_bits(run(), expected)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted(base: nn.Module, r: int = 4, **config: Any) -> PeftModel:
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(base, LoraConfig(r=r, lora_alpha=8, target_modules=targets, **config))


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(4):
        tokens = torch.randint(0, 61, (3, 12), generator=generator)
        mask = torch.arange(12) < torch.tensor([12, 9, 10])[:, None]
        labels = tokens.masked_fill(~mask, -100)
        found.append({"input_ids": tokens, "attention_mask": mask.long(), "labels": labels})
    return found


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batches()[0]["input_ids"]).logits


@pytest.mark.parametrize("name", [name for name in METHODS if name != "hrp"])
def test_a_model_from_data_to_a_plain_adapter(name: str, tmp_path: Path) -> None:
    method, options = METHODS[name]
    base = llama()
    before, original = logits(base), copy.deepcopy(base)
    model = adapted(base)
    report = initialize(
        model, method, calibration=Calibration(batches(), cache=False), cache=False, **options
    )
    assert method in str(report)
    moved = (logits(model) - before).abs().max() > 1e-3
    # What the identities say of a start: at the pretrained model, or not.
    assert moved == (method in ("lora_one", "lora_sb", "lora_da"))
    again = adapted(llama())
    initialize(
        again, method, calibration=Calibration(batches(), cache=False), cache=False, **options
    )
    assert torch.equal(logits(again), logits(model))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.add_(0.01)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(original, tmp_path)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-3, atol=2e-4)


def gradients(base: nn.Module, examples: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """G of the mean of the losses by autograd, in fp64."""
    model = copy.deepcopy(base).double()
    weights = {n: p for n, p in model.named_parameters() if "q_proj" in n or "v_proj" in n}
    each = [torch.autograd.grad(model(**b).loss, list(weights.values())) for b in examples]
    return {
        name.removesuffix(".weight"): (sum(G) / len(examples)).numpy()
        for name, *G in zip(weights, *each, strict=True)
    }


@pytest.mark.parametrize("exact", [False, True], ids=["sketch", "exact"])
def test_lora_one_of_a_model_is_the_svd_of_autograds_gradient(exact: bool) -> None:
    base = llama()
    G = gradients(base, batches())
    model = adapted(base)
    data = Calibration(batches(), cache=False)
    initialize(model, "lora_one", calibration=data, cache=False, exact_gradient=exact)
    for name, gradient in G.items():
        module: Any = model.get_submodule(f"base_model.model.{name}")
        product = (module.lora_B.default.weight @ module.lora_A.default.weight).detach().double()
        U, S, Vh = np.linalg.svd(-gradient, full_matrices=False)
        expected = (U[:, :4] * S[:4]) @ Vh[:4] / (S[0] * 128)
        # 24 rows at most: the sketch is exact, and what is left is fp32 of the model.
        assert np.abs(product.numpy() - expected).max() < 1e-3 * np.abs(expected).max()


def test_lora_sb_and_lora_da_take_their_own_means() -> None:
    """By batch and by example: with masks of different lengths these are two gradients."""
    base = llama()
    examples = [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches()
        for i in range(3)
    ]
    by_batch, by_example = gradients(base, batches()), gradients(base, examples)
    model = adapted(base, 2)
    data = Calibration(batches(), cache=False)
    one = {"lr": 1.0, "warmup_ratio": 1.0, "total_steps": 1}
    initialize(model, "lora_sb", calibration=data, cache=False, **one)
    for name, G in by_batch.items():
        module: Any = model.get_submodule(f"base_model.model.{name}")
        product = module.lora_B.default.weight @ module.lora_A.default.weight
        U, S, Vh = np.linalg.svd(-np.sign(G), full_matrices=False)
        found = module.scaling["default"] * product.detach().double().numpy()
        assert np.abs(found - (U[:, :2] * S[:2]) @ Vh[:2]).max() < 0.02  # a sign may flip in fp32
    for name, G in by_batch.items():
        assert np.abs(G - by_example[name]).max() > 1e-3 * np.abs(G).max()
    model = adapted(llama(), 2)
    damped = {"epsilon": 1e6, "damping": 1e9, "beta_v": 0.0}
    initialize(model, "lora_da", calibration=data, cache=False, **damped)
    for name, G in by_example.items():
        # With Z and y damped away Δ is −Gᵀ, and A its leading directions.
        module = model.get_submodule(f"base_model.model.{name}")
        A = module.lora_A.default.weight.detach().double().numpy() * 32
        _, _, Vh = np.linalg.svd(G, full_matrices=False)
        assert np.abs(np.abs(A @ Vh[:2].T) - np.eye(2)).max() < 1e-3
        B = module.lora_B.default.weight.detach().double().numpy() * 32
        assert np.abs(B + (G / np.linalg.norm(G, 2)) @ A.T).max() < 1e-3


def test_eva_of_a_model_spans_pefts_directions() -> None:
    base = llama()
    # One batch over and over is what PEFT's incremental PCA converges on at once.
    batch = {key: value.repeat(8, 1) for key, value in batches()[0].items()}
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, tau=0.999, use_label_mask=True),
    )  # fmt: skip
    theirs = get_eva_state_dict(base, [batch], config, show_progress_bar=False)
    model = get_peft_model(
        base, dataclasses.replace(config, init_lora_weights=True, eva_config=None)
    )
    initialize(model, "eva", calibration=Calibration([batch], cache=False), cache=False, rho=1)
    assert len(theirs) == 4
    for name, directions in theirs.items():
        module: Any = model.get_submodule(f"base_model.model.{name}")
        ours = module.lora_A.default.weight.detach()
        cosines = torch.linalg.svdvals(ours.double() @ directions.double().T)
        assert cosines.min() > 0.99


def test_data_that_reaches_nothing_is_refused_and_the_model_is_as_it_was() -> None:
    base = llama()
    model = adapted(base)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masked = [b | {"labels": torch.full_like(b["labels"], -100)} for b in batches()]
    for method, data in (("lora_ga", masked), ("eva", masked)):
        with pytest.raises(LoraInitError, match="batch 0"):
            initialize(model, method, calibration=Calibration(data, cache=False), cache=False)
    with pytest.raises(LoraInitError, match=r"v_proj: lora_ga takes 16 .* is 12: lower r"):
        initialize(adapted(llama(), 8), "lora_ga", calibration=Calibration(batches(), cache=False))
    with pytest.raises(LoraInitError, match=r"calibration=lora_init\.Calibration"):
        initialize(model, "lora_da")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
