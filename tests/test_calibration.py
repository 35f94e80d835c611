"""Data through the pretrained model: what is collected, against plain torch, and a model left as it
was found."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lora_init
from lora_init import Calibration, Factors
from lora_init.collection import Data, Source
from lora_init.integrations.peft.layers import base_tensors, base_values, lora_layers, pretrained
from lora_init.methods import Layer, Method, Progress
from lora_init.statistics import Covariance, Gradient, Statistic

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Asks(Method):
    """Gives B = the first r columns of G, or 0; A = the first r rows of the covariance, or 0."""

    name: ClassVar[str] = "asks"
    residual: ClassVar[bool] = False
    needs: ClassVar[Any] = "gradients"
    source: ClassVar[str] = "this test"

    wanted: tuple[Statistic, ...] = (Gradient(),)

    def statistics(self, layer: Layer) -> Sequence[Statistic]:
        return self.wanted

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        found = []
        for layer in layers:
            out_features, in_features = layer.weight.shape
            G = layer.statistics.get("gradient", torch.zeros(out_features, layer.r))
            C = layer.statistics.get("input_covariance", torch.zeros(layer.r, in_features))
            found.append(Factors(C[: layer.r], G[:, : layer.r], layer.scaling))
        return found


def llama(dtype: torch.dtype = torch.float64, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 61,
            "initializer_range": 0.2,
        }
        | more
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted(base: nn.Module, targets: Sequence[str] = LINEAR, **config: Any) -> PeftModel:
    config = {"r": 4, "lora_alpha": 8, "target_modules": list(targets)} | config
    return get_peft_model(base, LoraConfig(**config))


def batches(count: int = 3, padding: str = "right", width: int = 7) -> list[dict[str, Tensor]]:
    """Sentences of different lengths, some labels left out."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        tokens = torch.randint(0, 61, (3, width), generator=generator)
        lengths = torch.tensor([width, 2 + i % 4, 4])
        mask = torch.arange(width) < lengths[:, None]
        mask = mask.flip(1) if padding == "left" else mask
        labels = tokens.masked_fill(~mask, -100)
        labels[0, :3] = -100
        found.append({"input_ids": tokens, "attention_mask": mask.long(), "labels": labels})
    return found


def collected(
    model: PeftModel, data: Any, *wanted: Statistic, **options: Any
) -> dict[str, dict[str, Tensor]]:
    """What calibration gives each layer."""
    modules = lora_layers(model)
    base = {name: module.get_base_layer() for name, module in modules.items()}
    source = Source(model, base, partial(base_tensors, model), partial(pretrained, model))
    layers = [
        Layer(name, base_values(module, module.get_base_layer().weight), 4)
        for name, module in modules.items()
    ]
    options = {"cache": False} | options
    calibration = data if isinstance(data, Calibration) else Calibration(data, **options)
    whole, method = Data(calibration, source), Asks(wanted)
    found = [x for block in whole.blocks(layers, method) for x in whole.given(block, method)]
    return {layer.name: dict(layer.statistics) for layer in found}


def gradients(base: nn.Module, data: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """G of the mean of the batches' losses by autograd, as W lies: (out, in)."""
    model = copy.deepcopy(base).double().eval()
    weights = {name: model.get_submodule(name).weight for name in names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.removesuffix(".weight") in weights)
    # One by one: transformers computes a loss in fp32, whatever the model's dtype.
    each = [torch.autograd.grad(model(**batch).loss, list(weights.values())) for batch in data]
    means = {name: sum(G) / len(data) for name, *G in zip(weights, *each, strict=True)}
    return {
        name: G.T if isinstance(model.get_submodule(name), Conv1D) else G
        for name, G in means.items()
    }


def relative(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_gradients_are_autograd_s(padding, checkpointing):
    base = llama()
    data = batches(padding=padding)
    model = adapted(copy.deepcopy(base))
    found = collected(model, data, Gradient(), checkpointing=checkpointing)
    expected = gradients(base, data, list(found))
    assert len(found) == 21
    for name, G in expected.items():
        assert relative(found[name]["gradient"], G) < 1e-12, name


def test_initialize_collects_what_the_method_asks_for():
    base = llama()
    data = batches()
    model = adapted(copy.deepcopy(base), r=3)
    lora_init.initialize(
        model, Asks((Gradient(), Covariance())), calibration=Calibration(data), cache=False
    )
    expected = gradients(base, data, list(lora_layers(model)))
    for name, module in lora_layers(model).items():
        assert relative(module.lora_B["default"].weight, expected[name][:, :3]) < 1e-12, name
        assert torch.equal(module.get_base_layer().weight, base.get_submodule(name).weight), name


@dataclass(frozen=True)
class Redistributes(Method):
    """Gives layers other ranks than theirs."""

    name: ClassVar[str] = "redistributes"
    residual: ClassVar[bool] = False
    source: ClassVar[str] = "this test"

    ranks: tuple[int, ...] = ()

    def resolve(self, layers: Sequence[Layer]) -> list[dict[str, Any]]:
        return [{"r": r} for r, _ in zip(self.ranks, layers, strict=True)]

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        assert [layer.r for layer in layers] == [options["r"] for options in resolved]
        return [self._one(layer) for layer in layers]

    @staticmethod
    def _one(layer: Layer) -> Factors:
        generator = layer.generator()
        out_features, in_features = layer.weight.shape
        A = torch.randn(layer.r, in_features, generator=generator, dtype=layer.weight.dtype)
        B = torch.randn(out_features, layer.r, generator=generator, dtype=layer.weight.dtype)
        return Factors(A, B, layer.scaling)


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("fused", [False, True], ids=["peft", "fused"])
def test_layers_get_other_ranks(tmp_path, rslora, fused):
    base = llama(torch.float32)
    targets = ["q_proj", "v_proj"]
    pattern = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 6}}
    model = adapted(copy.deepcopy(base), targets, use_rslora=rslora, **pattern)
    if fused:
        lora_init.fuse(model)
    report = lora_init.initialize(model, Redistributes((3, 0, 4, 2, 0, 7)))
    assert [layer.r for layer in report.layers] == [3, 0, 4, 2, 0, 7]
    assert "4 of 6 layers got another rank, and 2 of these none" in str(report)
    layers = lora_layers(model)
    # α/r is as it was: 6/4 of a q, 8/2 of a v
    kept = {
        "model.layers.0.self_attn.q_proj": (3, 4.5),
        "model.layers.1.self_attn.q_proj": (4, 6),
        "model.layers.1.self_attn.v_proj": (2, 8),
        "model.layers.2.self_attn.v_proj": (7, 28),
    }
    assert {n: (m.r["default"], m.lora_alpha["default"]) for n, m in layers.items()} == kept
    for name, module in layers.items():
        r, alpha = kept[name]
        out_features, in_features = module.get_base_layer().weight.shape
        A, B = module.lora_A["default"], module.lora_B["default"]
        assert (A.weight.shape, B.weight.shape) == ((r, in_features), (out_features, r))
        assert (A.weight.requires_grad, B.weight.requires_grad) == (True, True)
        assert module.scaling["default"] == alpha / (r**0.5 if rslora else r)
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.2.self_attn.q_proj"):
        assert type(model.get_base_model().get_submodule(name)) is nn.Linear

    tokens = batches()[0]["input_ids"]
    logits = model.eval()(tokens).logits
    assert relative(logits, base(tokens).logits) > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert lora_layers(loaded).keys() == kept.keys()
    assert relative(loaded(tokens).logits, logits) < 1e-6
    model.train()(tokens, labels=tokens).loss.backward()
    merged = model.eval().merge_and_unload()
    assert relative(merged(tokens).logits, logits) < 1e-5


def test_a_layer_that_loses_one_adapter_keeps_the_other():
    model = adapted(llama(torch.float32), ["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("default")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    lora_init.initialize(model, Redistributes((0, 4, 5)))
    first = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    assert (list(first.lora_A), first.active_adapters) == (["other"], ["default"])
    after = {n: p.requires_grad for n, p in model.named_parameters()}
    assert after.items() <= before.items()
    model.delete_adapter("other")
