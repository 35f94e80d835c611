"""Data through the pretrained model: what is collected, against plain torch, and a model left as it
was found."""

import contextlib
import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import lora_init
from lora_init import Calibration, Factors, LoraInitError
from lora_init.cache import Cache
from lora_init.calibration import collection, passes
from lora_init.calibration.collection import Data
from lora_init.calibration.passes import Source
from lora_init.integrations.peft.layers import base_tensors, base_values, lora_layers, pretrained
from lora_init.methods import Layer, Method, Progress
from lora_init.sketch import GradientSketch
from lora_init.statistics import (
    Covariance,
    ExampleGradient,
    Gradient,
    PrincipalComponents,
    State,
    Statistic,
)
from tests import test_distributed as job
from tests.test_virtual import quantised

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


@dataclass(frozen=True)
class Product(Statistic):
    """B A of the temporary LoRA, from A = 0.1 and B = 0."""

    name: ClassVar[str] = "product"
    keys: ClassVar[tuple[str, ...]] = ("gradient",)
    trained: ClassVar[bool] = True

    def state_bytes(self, layer: Layer) -> int:
        return 0

    def start(self, layer: Layer) -> State:
        out_features, in_features = layer.weight.shape
        A = layer.weight.new_full((5, in_features), 0.1)
        return {"A": A, "B": A.new_zeros(out_features, 5)}

    def finish(self, layer: Layer, state: State, losses: int) -> dict[str, Tensor]:
        return {"gradient": state["B"] @ state["A"]}


@dataclass(frozen=True)
class Trains(Asks):
    """As `Asks`, of what was trained."""

    name: ClassVar[str] = "trains"
    needs: ClassVar[Any] = "training"

    wanted: tuple[Statistic, ...] = (Product(),)


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


def t5(**more: Any) -> nn.Module:
    """An encoder and a decoder."""
    torch.manual_seed(0)
    config = T5Config(
        d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, vocab_size=61,
        decoder_start_token_id=0, **more,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def projections(base: nn.Module) -> list[str]:
    return [name for name, _ in base.named_modules() if name.endswith("_proj")]


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


class Attention(nn.Module):
    """A model of one's own: two layers in checkpoints, one of them used twice, and dropout."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(20, 12)
        self.first = nn.Linear(12, 12)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(12, 5, bias=False)
        self.drop = nn.Dropout(0.5)
        self.reentrant = reentrant

    def _inner(self, x: Tensor) -> Tensor:
        return self.act(self.first(self.act(self.first(x))))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.reentrant is not None:
            if self.reentrant:
                x.requires_grad_(x.is_leaf or x.requires_grad)
            x = checkpoint(self._inner, x, use_reentrant=self.reentrant)
        else:
            x = self._inner(x)
        return self.second(self.drop(x))


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, target = batch
    return (model(tokens) - target).square().mean()


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["none", "new", "reentrant"])
def test_a_layer_used_twice_adds_up_once_for_each_use_under_any_checkpoint(reentrant):
    generator = torch.Generator().manual_seed(1)
    data = [
        (
            torch.randint(0, 20, (2, 5), generator=generator),
            torch.randn(2, 5, 5, generator=generator).double(),
        )
        for _ in range(3)
    ]
    plain = Attention().double().eval()
    weights = [plain.first.weight, plain.second.weight]
    mean = sum(squares(plain, batch) for batch in data) / 3
    expected = dict(zip(["first", "second"], torch.autograd.grad(mean, weights), strict=True))
    uses: list[Tensor] = []
    with torch.no_grad():
        handle = plain.first.register_forward_pre_hook(
            lambda _, args: uses.append(args[0].reshape(-1, 12).clone())
        )
        for tokens, _ in data:
            plain(tokens)
        handle.remove()

    model = adapted(Attention(reentrant).double(), ["first", "second"])
    model.train()
    found = collected(model, data, Gradient(), Covariance(), loss_fn=squares)
    for name, G in expected.items():
        assert relative(found[name]["gradient"], G) < 1e-13
    seen = torch.cat(uses).numpy()
    assert len(seen) == 2 * 3 * 10
    assert np.allclose(found["first"]["input_mean"], seen.mean(0), atol=1e-14)
    assert np.allclose(found["first"]["input_covariance"], np.cov(seen.T, bias=True), atol=1e-14)


def test_the_gradient_of_a_conv1d_is_out_in():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=61, n_positions=16)
    base = GPT2LMHeadModel(config).double().eval()
    data = batches()
    model = adapted(copy.deepcopy(base), ["c_attn", "c_fc"], fan_in_fan_out=True)
    found = collected(model, data, Gradient())
    for name, G in gradients(base, data, list(found)).items():
        assert (
            found[name]["gradient"].shape
            == lora_layers(model)[name].get_base_layer().weight.T.shape
        )
        assert relative(found[name]["gradient"], G) < 1e-12, name


MASKS = {
    "attention": lambda batch: batch["attention_mask"].bool(),
    "labels": lambda batch: (
        batch["attention_mask"].bool()
        & torch.cat([batch["labels"][:, 1:] != -100, torch.zeros(3, 1).bool()], 1)
    ),
    "own_label": lambda batch: batch["attention_mask"].bool() & (batch["labels"] != -100),
}


@dataclass(frozen=True)
class OwnLabel(Covariance):
    mask: ClassVar[Any] = "own_label"


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("mask", MASKS)
def test_covariances_are_over_the_tokens_that_count(mask, padding):
    data = batches(padding=padding)
    base = llama()
    inputs: list[Tensor] = []
    handle = base.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    with torch.no_grad():
        for batch in data:
            base(**batch)
    handle.remove()
    rows = torch.cat([x[MASKS[mask](batch)] for x, batch in zip(inputs, data, strict=True)]).numpy()
    model = adapted(base)
    statistic = OwnLabel() if mask == "own_label" else Covariance()
    token_mask = "attention" if mask == "own_label" else mask
    found = collected(model, data, statistic, token_mask=token_mask)
    one = found["model.layers.1.mlp.down_proj"]
    assert np.allclose(one["input_mean"], rows.mean(0), atol=1e-14)
    assert np.allclose(one["input_covariance"], np.cov(rows.T, bias=True), atol=1e-14)


def test_gradients_need_no_mask_for_a_decoder_that_has_other_tokens():
    base = t5(initializer_factor=3.0).double()
    data = [batch | {"labels": batch["labels"][:, :5].contiguous()} for batch in batches()]
    model = adapted(copy.deepcopy(base), ["q", "v"])
    found = collected(model, data, Gradient())
    assert len(found) == 12
    for name, G in gradients(base, data, list(found)).items():
        assert relative(found[name]["gradient"], G) < 1e-12, name


def test_what_counts_in_an_encoder_and_a_decoder_is_all_or_refused():
    """With as many tokens in both, a mask of one would fit the other's layers."""
    base = t5().double()
    ids = torch.randint(1, 61, (3, 7))
    attention = torch.ones_like(ids)
    whole = {"input_ids": ids, "attention_mask": attention, "labels": ids[:, :5].contiguous()}
    rows: list[Tensor] = []
    layer = base.decoder.block[1].layer[0].SelfAttention.q
    handle = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].reshape(-1, 24)))
    with torch.no_grad():
        base(**whole)
    handle.remove()
    model = adapted(copy.deepcopy(base), ["q", "v"])
    found = collected(model, [whole], Covariance())["decoder.block.1.layer.0.SelfAttention.q"]
    torch.testing.assert_close(found["input_mean"], rows[0].mean(0))
    padded = {"attention_mask": attention.tril(4), "labels": ids.masked_fill(ids > 30, -100)}
    for key, value in padded.items():
        for statistic in (Covariance(), PrincipalComponents(4)):
            with pytest.raises(LoraInitError, match=rf"0 has padding \({key}\).*encoder-decoder"):
                collected(model, [whole | {key: value}], statistic)
    with pytest.raises(LoraInitError, match='token_mask="labels" says nothing where the model is'):
        collected(model, [whole], Covariance(), token_mask="labels")


def test_gradients_need_no_mask_of_two_dimensions():
    base, whole = llama(), batches(padding="left")
    lower = torch.ones(7, 7, dtype=torch.bool).tril()
    data = [batch | {"attention_mask": lower.expand(3, 1, 7, 7)} for batch in whole]
    found = collected(adapted(copy.deepcopy(base)), data, Gradient())
    unmasked = [{k: v for k, v in batch.items() if k != "attention_mask"} for batch in whole]
    for name, G in gradients(base, unmasked, list(found)).items():
        assert relative(found[name]["gradient"], G) < 1e-12, name


class Experts(nn.Module):
    """Even tokens go to one layer and odd ones to another, which may get none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(61, 8)
        self.even, self.odd = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x, odd = self.embed(tokens), tokens % 2 == 1
        return torch.cat([self.even(x[~odd]), self.odd(x[odd])])


def test_a_call_without_tokens_adds_nothing():
    data = [torch.tensor([2, 4, 6]), torch.tensor([1, 3, 8])]
    model = adapted(Experts().double(), ["even", "odd"])
    wanted = (Gradient(), GradientSketch(4), PrincipalComponents(4))

    def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
        return model(tokens).square().mean()

    found = collected(model, data, *wanted, loss_fn=loss_fn)
    base = Experts().double()
    weights = [base.even.weight, base.odd.weight]
    loss = sum(loss_fn(base, tokens) for tokens in data) / 2
    for name, G in zip(["even", "odd"], torch.autograd.grad(loss, weights), strict=True):
        assert relative(found[name]["gradient"], G) < 1e-12, name
    assert all(found["odd"]["components"].isfinite().flatten())


def test_examples_one_by_one_have_each_their_own_loss():
    base, data = llama(), batches()
    examples = [{k: v[i : i + 1] for k, v in batch.items()} for batch in data for i in range(3)]
    found = collected(adapted(copy.deepcopy(base)), data, ExampleGradient(), Gradient())
    one_by_one = gradients(base, examples, list(found))
    together = gradients(base, data, list(found))
    expected = collected(adapted(copy.deepcopy(base)), examples, Gradient())
    apart = collected(adapted(copy.deepcopy(base)), data, ExampleGradient())
    for name in found:
        assert torch.equal(apart[name]["gradient"], expected[name]["gradient"])
        assert relative(apart[name]["gradient"], one_by_one[name]) < 1e-12
        assert relative(one_by_one[name], together[name]) > 1e-3


def test_bf16_models_are_summed_in_fp32():
    base, data = llama(torch.bfloat16), batches()
    found = collected(adapted(copy.deepcopy(base)), data, Gradient(), Covariance())
    assert {v.dtype for values in found.values() for v in values.values()} == {torch.float32}
    exact = gradients(base, data, list(found))
    assert max(relative(found[name]["gradient"], exact[name]) for name in found) < 0.1


def times(factor: float) -> dict[str, Any]:
    return {"loss_fn": lambda model, batch: model(**batch).loss * factor}


# At 1e-5 most of an unscaled gradient underflows, and at 1e6 it overflows.
@pytest.mark.parametrize("factor", [1e-8, 1e-5, 1.0, 1e3, 1e6])
def test_fp16_gradients_of_any_size_are_as_exact_as_fp16(factor):
    base, data = llama(torch.float16), batches()
    exact = gradients(base, data, projections(base))
    scale = max(float(G.abs().max()) for G in exact.values())
    if factor < 1e-4:
        assert scale * factor < torch.finfo(torch.float16).smallest_normal
    found = collected(adapted(base), data, Gradient(), **times(factor))
    assert {values["gradient"].dtype for values in found.values()} == {torch.float32}
    for name, G in exact.items():
        assert relative(found[name]["gradient"] / factor, G) < 0.02, name


def scales(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What runs multiply their losses by, from now on."""
    found: list[float] = []

    class Run(passes.Run):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.append(self.scale)

    monkeypatch.setattr(collection, "Run", Run)
    return found


def test_the_scale_of_fp16_gradients_does_not_depend_on_what_is_collected_together(monkeypatch):
    """Two layers' gradients differ by a factor: one overflows where the other does not."""
    base, data, tried = llama(torch.float16), batches(), scales(monkeypatch)
    targets = ["layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"]

    def last(targets: list[str], factor: float, **options: Any) -> float:
        model = adapted(copy.deepcopy(base), targets)
        collected(model, data, Gradient(), **options, **times(factor))
        return tried[-1]

    differ = 0
    for factor in (2.0**power for power in range(0, 8)):
        alone = {last([target], factor) for target in targets}
        differ += len(alone) - 1
        for order in (targets, targets[::-1]):
            assert last(order, factor, block_bytes=1) == min(alone)
    assert differ


def test_the_scale_is_the_first_at_which_nothing_overflows_and_found_once(monkeypatch):
    base, data, tried = llama(torch.float16), batches(), scales(monkeypatch)
    collected(adapted(copy.deepcopy(base)), data, Gradient(), block_bytes=1)
    assert tried == [1, 2.0**47, 2.0**39, 2.0**31, 2.0**23, 2.0**15] + [2.0**15] * 20
    tried.clear()
    broken = copy.deepcopy(base)
    broken.model.layers[1].mlp.down_proj.weight.data.fill_(torch.inf)
    with pytest.raises(LoraInitError):
        collected(adapted(broken), data, Gradient())
    assert tried == [1, 2.0**47]  # an input is what is infinite, at any scale


def test_blocks_and_checkpoints_change_no_bit_of_fp16_gradients():
    base, data = llama(torch.float16), batches()
    wanted = (Gradient(), GradientSketch(3), ExampleGradient())
    whole = collected(adapted(copy.deepcopy(base)), data, *wanted, **times(1e3))
    for options in ({"block_bytes": 1}, {"checkpointing": True}):
        model = adapted(copy.deepcopy(base))
        parts = collected(model, data, *wanted, **options, **times(1e3))
        assert not any(module._forward_hooks for module in model.modules())
        for name, values in whole.items():
            for key, value in values.items():
                assert torch.equal(parts[name][key], value), (name, key, options)


def test_an_overflow_is_no_anomaly():
    with torch.autograd.set_detect_anomaly(True):
        collected(adapted(llama(torch.float16)), batches(), Gradient())


def test_a_quantised_layer_that_computes_in_fp16_is_scaled_for():
    """What goes in and comes out of it is fp32, and so are all parameters."""
    bnb = pytest.importorskip("bitsandbytes")
    base, data = quantised(llama(torch.float32), 4), batches()
    found = {}
    for dtype in (torch.float32, torch.float16):
        for module in base.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.compute_dtype = dtype
        model = adapted(copy.deepcopy(base), ["q_proj", "v_proj"])
        found[dtype] = collected(model, data, Gradient(), **times(1e-5))
    for name, values in found[torch.float32].items():
        assert relative(found[torch.float16][name]["gradient"], values["gradient"]) < 0.02, name


def test_a_layer_that_is_kept_in_fp32_among_fp16_ones_is_scaled_for():
    """As T5 keeps `wo`: its own gradients do not say that those that they are made of are fp16."""
    base = t5().half()
    for name, module in base.named_modules():
        if name.endswith(".wo"):
            module.float()
    ids = torch.randint(1, 50, (2, 6))
    data = [{"input_ids": ids, "labels": ids.flip(1)}]
    found = collected(adapted(copy.deepcopy(base), ["wo"]), data, Gradient(), **times(1e-5))
    assert len(found) == 4
    for name, G in gradients(base, data, list(found)).items():
        assert relative(found[name]["gradient"] * 1e5, G) < 0.02, name


def test_a_layer_that_runs_in_fp16_under_its_model_s_own_autocast_is_scaled_for():
    """As accelerate wraps a model's forward for mixed precision: no parameter is fp16."""
    base, data = llama(torch.float32), batches()

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return model(**batch).loss * 1e-5

    exact = gradients(base, data, projections(base))
    found = collected(adapted(base), data, Gradient(), loss_fn=loss)
    for name, G in exact.items():
        assert relative(found[name]["gradient"] * 1e5, G) < 0.02, name


def test_a_gradient_that_is_infinite_at_every_scale_is_refused():
    base = llama(torch.float16)
    model = adapted(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(**batch).logits.float()
        return (logits - logits.detach()).abs().sqrt().sum()

    with pytest.raises(LoraInitError, match=r"the gradient by its output has NaN or .* in batch 0"):
        collected(model, batches(), Gradient(), loss_fn=loss)
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())


# -- memory ---------------------------------------------------------------------------------------


def test_blocks_and_checkpoints_change_no_bit():
    base, data = llama(torch.float32), batches()
    wanted = (Gradient(), Covariance())
    whole = collected(adapted(copy.deepcopy(base)), data, *wanted)
    for options in ({"block_bytes": 1}, {"block_bytes": 12_000}, {"checkpointing": True}):
        parts = collected(adapted(copy.deepcopy(base)), data, *wanted, **options)
        assert parts.keys() == whole.keys()
        for name, values in whole.items():
            for key, value in values.items():
                assert torch.equal(parts[name][key], value), (name, key, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("target", ["layers.0.mlp.down_proj", "layers.11.mlp.down_proj", "mlp"])
def test_checkpoints_keep_one_block_s_activations_whichever_layers_are_collected(target, dtype):
    held = most = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, most
            self.tensor = tensor
            held += tensor.numel()
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.tensor.numel()

    def peak(targets: list[str], **options: Any) -> int:
        nonlocal held, most
        held = most = 0
        model = adapted(llama(dtype, num_hidden_layers=12), targets)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            collected(model, batches(1, width=64), Gradient(), **options)
        return most

    targets = ["gate_proj", "down_proj"] if target == "mlp" else [target]
    kept = peak(["down_proj"], checkpointing=False)
    assert peak(targets, checkpointing=True, block_bytes=1) < kept / 5


def test_a_block_s_statistics_are_gone_before_the_next_is_collected(monkeypatch):
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    start = Gradient.start

    def counted(self: Gradient, layer: Layer) -> Any:
        nonlocal most
        state = start(self, layer)
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(state["sum"])]
        most = max(most, len(alive))
        return state

    monkeypatch.setattr(Gradient, "start", counted)
    for block_bytes, expected in ((1, 1), ("auto", 21)):
        data = Calibration(batches(), block_bytes=block_bytes, cache=False)
        lora_init.initialize(adapted(llama()), Asks(), calibration=data)
        assert most == expected


def test_layers_with_one_input_share_their_covariance(monkeypatch):
    added: list[str] = []
    add = Covariance.add

    def counted(self: Covariance, layer: Layer, *rest: Any) -> None:
        added.append(layer.name)
        add(self, layer, *rest)

    data = batches()
    found = collected(adapted(llama()), data, Covariance())
    monkeypatch.setattr(Covariance, "add", counted)
    again = collected(adapted(llama()), data, Covariance())
    assert len(added) == 3 * 9 * 4  # q/k/v, o, gate/up, down of three layers in nine examples
    alone = {}
    for kind in LINEAR:
        alone |= collected(adapted(llama(), [kind]), data, Covariance())
    assert alone.keys() == found.keys()
    for name, values in found.items():
        assert torch.equal(values["input_covariance"], alone[name]["input_covariance"])
        assert torch.equal(values["input_covariance"], again[name]["input_covariance"])


class Sometimes(nn.Module):
    """Two layers that are fed one tensor, until a batch says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor, how: str) -> Tensor:
        if how == "apart":
            return self.one(x) + self.two(x.flip(0) * 2)
        if how == "changed":
            y = self.one(x)
            return y + self.two(x.mul_(2))
        if how == "twice":
            return self.one(x) + self.two(x) + self.two(x)
        return self.one(x) + self.two(x)


@pytest.mark.parametrize("how", ["apart", "changed", "twice"])
@pytest.mark.parametrize("when", [0, 2])
def test_layers_whose_inputs_part_ways_are_summed_apart(how, when):
    x = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(0)).double()
    data = [{"x": x[i].clone(), "how": how if i == when else "same"} for i in range(4)]
    found = collected(adapted(Sometimes().double(), ["one", "two"]), data, Covariance())
    second = [torch.cat([x[i]] * 2) if (how, i) == ("twice", when) else x[i] for i in range(4)]
    if how != "twice":
        second[when] = second[when] * 2
    for name, rows in (("one", x.reshape(-1, 6)), ("two", torch.cat(second))):
        expected = np.cov(rows.numpy().T, bias=True)
        assert np.allclose(found[name]["input_covariance"], expected, atol=1e-14)


def test_a_batch_that_does_not_fit_is_run_with_checkpoints():
    base, data = llama(torch.float32), batches()
    calls = []

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        layers = model.get_base_model().model.layers
        calls.append("forward" in vars(layers[0]))
        if not calls[-1] and len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return model(**batch).loss

    model = adapted(copy.deepcopy(base))
    found = collected(model, data, Gradient(), loss_fn=loss_fn)
    assert calls == [False, False, True, True, True]
    assert "forward" not in vars(model.get_base_model().model.layers[0])
    expected = collected(adapted(copy.deepcopy(base)), data, Gradient())
    assert all(torch.equal(found[n]["gradient"], expected[n]["gradient"]) for n in expected)
    calls.clear()
    with pytest.raises(torch.OutOfMemoryError):
        collected(model, data, Gradient(), loss_fn=loss_fn, checkpointing=False)


# -- more than sums ------------------------------------------------------------------------------


def test_another_pass_goes_over_the_same_data_whatever_the_loader_shuffles():
    base = llama()
    torch.manual_seed(2)
    loader = torch.utils.data.DataLoader(batches(6), batch_size=None, shuffle=True)
    data = Calibration(loader, num_batches=4, cache=False)
    found = collected(adapted(copy.deepcopy(base)), data, GradientSketch(4, passes=3), Gradient())
    assert len(data.batches) == 4
    expected = gradients(base, data.batches, list(found))
    for name, G in expected.items():
        assert relative(found[name]["gradient"], G) < 1e-12, name
        U, S, V = (found[name][f"gradient_{part}"] for part in "USV")
        exact = torch.linalg.svd(G)
        best = exact.U[:, :4] * exact.S[:4] @ exact.Vh[:4]
        error = float((U * S @ V.T - G).square().sum())
        assert error < 1.05 * float((best - G).square().sum()) + 1e-12 * float(G.square().sum())


def test_a_training_step_trains_a_temporary_lora_of_the_pretrained_model():
    base, data = llama(), batches()
    model = adapted(copy.deepcopy(base), ["q_proj", "down_proj"])
    lm_head = model.get_base_model().lm_head.weight
    before = everything(model)
    optimizers: list[torch.optim.Optimizer] = []
    batch_losses = []

    def step(model: nn.Module, batch: dict[str, Tensor], parameters: list[nn.Parameter]) -> None:
        if not optimizers:
            optimizers.append(torch.optim.SGD(parameters, lr=0.1))
        loss = model(**batch).loss
        batch_losses.append(float(loss.detach()))
        loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        lm_head.requires_grad_(len(batch_losses) == len(data))

    found = collected(model, data, Product(), train_step=step)
    assert everything(model) == before
    # the same with peft's LoRA layers, alpha = r
    other = adapted(copy.deepcopy(base), ["q_proj", "down_proj"], r=5, lora_alpha=5)
    for module in lora_layers(other).values():
        nn.init.constant_(module.lora_A["default"].weight, 0.1)
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
    for batch, seen in zip(data, batch_losses, strict=True):
        loss = other(**batch).loss
        assert float(loss.detach()) == pytest.approx(seen, rel=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, module in lora_layers(other).items():
        expected = module.lora_B["default"].weight @ module.lora_A["default"].weight
        assert relative(found[name]["gradient"], expected) < 1e-5, name
    report = lora_init.initialize(
        model, Trains(), calibration=Calibration(data, train_step=step, num_batches=1)
    )
    assert len(report.layers) == 6


def test_a_training_step_that_diverges_is_refused():
    def step(model: nn.Module, batch: Any, parameters: list[nn.Parameter]) -> None:
        with torch.no_grad():
            parameters[1].fill_(float("inf"))

    with pytest.raises(LoraInitError, match=r"layers\.0\.self_attn\.q_proj: train_step made"):
        collected(adapted(llama()), batches(), Product(), train_step=step)


@dataclass(frozen=True)
class ByVariance(Method):
    """Ranks by all layers' leading variance, as EVA has it: needs all layers before it resolves."""

    name: ClassVar[str] = "by_variance"
    residual: ClassVar[bool] = False
    needs: ClassVar[Any] = "activations"
    source: ClassVar[str] = "this test"

    def statistics(self, layer: Layer) -> Sequence[Statistic]:
        return [PrincipalComponents(4)]

    def resolve(self, layers: Sequence[Layer]) -> list[dict[str, Any]]:
        order = sorted(layers, key=lambda layer: -float(layer.statistics["variances"][0]))
        ranks = {layer.name: 4 - i % 5 for i, layer in enumerate(order)}
        return [{"r": ranks[layer.name]} for layer in layers]

    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        starts = [layer.statistics["components"][: layer.r] for layer in layers]
        zeros = [layer.weight.new_zeros(len(layer.weight), layer.r) for layer in layers]
        return [Factors(*pair) for pair in zip(starts, zeros, strict=True)]


def test_a_method_that_resolves_over_all_layers_gets_all_their_statistics():
    ranks = []
    for block_bytes in ("auto", 1):
        model = adapted(llama(torch.float32))
        data = Calibration(batches(), block_bytes=block_bytes, cache=False)
        report = lora_init.initialize(model, ByVariance(), calibration=data)
        ranks.append([layer.r for layer in report.layers])
        assert sorted(ranks[-1])[:5] == [0, 0, 0, 0, 1]
        assert len(lora_layers(model)) == 17
    assert ranks[0] == ranks[1]


def test_a_start_that_is_not_the_pretrained_model_is_said_and_saved_plain(tmp_path):
    base = llama(torch.float32)
    model = adapted(copy.deepcopy(base), r=3)
    wanted = Asks((Gradient(), Covariance()))
    report = lora_init.initialize(model, wanted, calibration=Calibration(batches()))
    worst = max(report.layers, key=lambda layer: layer.start_drift)
    for name, module in lora_layers(model).items():
        A, B = (getattr(module, f"lora_{x}")["default"].weight.double() for x in "AB")
        W = base.get_submodule(name).weight.double()
        (one,) = (layer for layer in report.layers if layer.name == name)
        drift = float((8 / 3 * B @ A).norm().detach() / W.norm())
        assert one.start_drift == pytest.approx(drift, rel=1e-6)
    assert "training starts from W + s·B₀A₀, not from the pretrained model" in str(report)
    assert f"{worst.start_drift:.1e} of ‖W‖ ({worst.name})" in str(report)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "lora_init").exists()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)
    quiet = lora_init.initialize(adapted(copy.deepcopy(base)), "lora")
    assert "training starts from" not in str(quiet)


# -- cache ----------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch):
    """The layers and statistics of every run over data."""
    found: list[list[str]] = []
    run = Data._run

    def counted(self: Data, layers: Any, wanted: list[tuple[str, Statistic]]) -> Any:
        found.append([f"{name.removeprefix('model.layers.')} {s.name}" for name, s in wanted])
        return run(self, layers, wanted)

    monkeypatch.setattr(Data, "_run", counted)
    return found


def test_what_was_collected_is_kept_for_other_methods_ranks_and_layers(runs):
    targets = ["q_proj", "v_proj"]
    data, options = batches(), {"cache": "auto"}
    first = collected(adapted(llama(), targets), data, Gradient(), **options)
    second = collected(adapted(llama(), targets, r=2), data, Gradient(), **options)
    assert len(runs) == 1
    for name, values in first.items():
        assert torch.equal(values["gradient"], second[name]["gradient"])
    collected(adapted(llama(), ["q_proj", "k_proj"]), data, Gradient(), Covariance(), **options)
    assert runs[1:] == [
        [f"{i}.self_attn.k_proj gradient" for i in range(3)],
        [f"{i}.self_attn.{kind}_proj covariance" for i in range(3) for kind in "qk"],
    ]


CHANGES = {
    "weight": lambda: (changed(llama(), "model.layers.2.mlp.up_proj.weight"), batches(), {}),
    "norm": lambda: (changed(llama(), "model.norm.weight"), batches(), {}),
    "buffer": lambda: (changed(llama(), "model.rotary_emb.inv_freq"), batches(), {}),
    "config": lambda: (llama(rms_norm_eps=1e-5), batches(), {}),
    "order": lambda: (llama(), batches()[::-1], {}),
    "one_token": lambda: (llama(), with_batch(1, input_ids=TOKENS), {}),
    "fewer": lambda: (llama(), batches(), {"num_batches": 2}),
    "mask": lambda: (llama(), batches(), {"token_mask": "labels"}),
    "key": lambda: (llama(), batches(), {"loss_fn": halved, "key": "half"}),
}


def changed(model: nn.Module, name: str) -> nn.Module:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors[name].data.view(-1)[2] += 1
    return model


def halved(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss / 2


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_data_or_loss_is_collected_anew(runs, change):
    wanted = Covariance() if change == "mask" else Gradient()
    collected(adapted(llama(), ["q_proj"]), batches(), wanted, cache="auto")
    base, data, options = CHANGES[change]()
    collected(adapted(base, ["q_proj"]), data, wanted, cache="auto", **options)
    assert len(runs) == 2
    collected(adapted(base, ["q_proj"], r=1), data, wanted, cache="auto", **options)
    assert len(runs) == 2


class Described:
    """Prints alike whatever it holds, as graphs' batches do."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Described()"


def test_data_that_prints_alike_is_told_apart():
    def digest(batch: Any) -> str:
        return Calibration([batch]).digest

    one, other = np.zeros(5000), np.eye(1, 5000, 2500)[0]
    assert str(one) == str(other)
    assert digest((one, "a")) == digest((one.copy(), "a"))
    assert digest((one, "a")) != digest((other, "a"))
    assert digest({"graph": Described(1)}) != digest({"graph": Described(2)})
    assert digest({"x": TOKENS, "n": 1}) != digest({"x": TOKENS, "n": True})
    with pytest.raises(LoraInitError, match=r"batch 0 holds what cannot be pickled.*cache=False"):
        digest({"how": lambda: 1})
    model = adapted(llama(torch.float32), ["q_proj"])
    data = [batch | {"how": lambda: 1} for batch in batches()]
    collected(
        model, data, Gradient(), loss_fn=lambda model, batch: model(batch["input_ids"]).logits.sum()
    )


def test_a_loss_without_a_key_and_a_large_statistic_are_not_kept(runs, monkeypatch):
    for _ in range(2):
        model = adapted(llama(), ["q_proj"])
        collected(model, batches(), Gradient(), cache="auto", loss_fn=halved)
    assert len(runs) == 2
    monkeypatch.setattr(collection, "_CACHED_BYTES", 8 * 24 * 24 - 1)
    for cache in ("auto", "auto", True, True):
        collected(adapted(llama(), ["q_proj"]), batches(), Gradient(), cache=cache)
    assert len(runs) == 5


def test_a_damaged_entry_is_collected_again(runs, tmp_path):
    first = collected(adapted(llama(), ["q_proj"]), batches(), Gradient(), cache=tmp_path)
    store = Cache(tmp_path)
    assert len(store.files()) == 3
    content = bytearray(store.files()[1].read_bytes())
    content[-5] ^= 4
    store.files()[1].write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="is unusable and will be recomputed"):
        again = collected(adapted(llama(), ["q_proj"]), batches(), Gradient(), cache=tmp_path)
    assert [len(run) for run in runs] == [3, 1]
    for name, values in first.items():
        assert torch.equal(values["gradient"], again[name]["gradient"])
    collected(adapted(llama(), ["q_proj"]), batches(), Gradient(), cache=tmp_path)
    assert len(runs) == 2
    assert store.clear() == 3


# -- the model as it was --------------------------------------------------------------------------


class Counting(nn.Module):
    """Everything that a pass could leave behind: batch statistics, a buffer that counts calls, one
    that a call makes, dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(20, 12)
        self.norm = nn.BatchNorm1d(12)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.5))])
        self.head = nn.Linear(12, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scale", torch.ones(1))
        self.config = LlamaConfig(use_cache=True)

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        self.scale = self.scale * 2
        self.register_buffer("last", tokens)
        x = self.norm(self.embed(tokens).flatten(0, 1))
        for layer in self.layers:
            x = layer(x)
        return self.head(x + torch.randn(12).double())


def everything(model: nn.Module) -> dict[str, Any]:
    """All of a model's state that a pass might touch, and the generator's."""
    found: dict[str, Any] = {"rng": torch.get_rng_state().tolist()}
    for name, parameter in model.named_parameters():
        grad = None if parameter.grad is None else parameter.grad.tolist()
        found[f"parameter {name}"] = (parameter.tolist(), parameter.requires_grad, grad)
    for name, buffer in model.named_buffers():
        found[f"buffer {name}"] = (id(buffer), buffer.tolist())
    for name, module in model.named_modules():
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        found[f"module {name}"] = (
            module.training,
            [list(getattr(module, kind).values()) for kind in hooks],
            "forward" in vars(module),
            getattr(module, "_disable_adapters", None),
            getattr(module, "active_adapters", None),
        )
    found["use_cache"] = model.get_base_model().config.use_cache
    return found


def unusual(disabled: bool) -> PeftModel:
    """A model in as many states as it can be in."""
    model = adapted(Counting().double(), ["0.0", "head"], lora_dropout=0.1)
    model.train()
    model.get_base_model().norm.eval()
    model.get_base_model().norm.weight.requires_grad_(True)
    model.get_base_model().norm.weight.grad = torch.ones(12).double()
    layers = lora_layers(model)
    layers["head"].lora_A["default"].weight.requires_grad_(False)
    layers["head"].lora_B["default"].weight.grad = torch.ones(3, 4).double()
    layers["head"].get_base_layer().register_forward_hook(lambda *_: None)
    if disabled:
        model.base_model.disable_adapter_layers()
    return model


def failing(error: BaseException | None, at: int) -> Any:
    calls = []

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        loss = model(batch).square().mean()
        if len(calls) > at and error is not None:
            raise error
        return loss

    return loss_fn


@pytest.mark.parametrize("disabled", [False, True], ids=["enabled", "disabled"])
@pytest.mark.parametrize(
    "error",
    [None, KeyboardInterrupt(), ValueError("mine"), torch.OutOfMemoryError("full")],
    ids=["fine", "ctrl_c", "error", "memory"],
)
@pytest.mark.parametrize("wanted", [Gradient(), Covariance()], ids=["gradients", "activations"])
def test_the_model_is_left_as_it_was(wanted, error, disabled):
    data = [torch.arange(6).reshape(2, 3) + i for i in range(3)]
    loader = torch.utils.data.DataLoader(data, batch_size=None, shuffle=True)
    model = unusual(disabled)
    torch.manual_seed(11)
    before = everything(model)
    with contextlib.ExitStack() as stack:
        if error is not None:
            stack.enter_context(pytest.raises(type(error)))
        collected(model, loader, wanted, loss_fn=failing(error, 1), checkpointing=True)
    after = everything(model)
    assert after.keys() == before.keys()
    for what, value in before.items():
        assert after[what] == value, what


def test_a_configuration_that_a_model_writes_into_is_left_as_it_was_and_hits_the_cache(runs):
    """A transformers classifier notes there what its labels look like."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        vocab_size=61,
    )  # fmt: skip
    model = adapted(BertForSequenceClassification(config).eval(), ["query"])
    data = [batch | {"labels": torch.tensor([0, 1, 1])} for batch in batches()]
    for _ in range(2):
        collected(model, data, Gradient(), cache="auto")
        assert config.problem_type is None
    assert len(runs) == 1


def test_a_model_made_in_inference_mode_is_refused_and_left_as_it_was():
    with torch.inference_mode():
        model = adapted(llama(torch.float32), ["q_proj"])
    wants = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(LoraInitError, match=r"weight was made under torch.inference_mode\(\)"):
        lora_init.initialize(model, "eva", calibration=Calibration(batches(), cache=False))
    assert [parameter.requires_grad for parameter in model.parameters()] == wants


def test_an_adapter_that_is_merged_elsewhere_is_refused_and_stays_merged():
    model = get_peft_model(
        llama(torch.float32), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="first"
    )
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    model.merge_adapter(["first"])
    data = Calibration(batches(), cache=False)
    with pytest.raises(LoraInitError, match=r"q_proj: adapter first is merged .*unmerge_adapter"):
        lora_init.initialize(
            model, "lora_ga", adapter_name="second", residual="virtual", calibration=data
        )
    merged = [m.merged for n, m in lora_layers(model).items() if n.endswith("q_proj")]
    assert merged == [True] * 3


def test_a_failed_initialisation_changes_nothing():
    model = unusual(False)
    before = everything(model)
    data = Calibration([torch.arange(6)[None]] * 3, failing(KeyboardInterrupt(), 1))
    with pytest.raises(KeyboardInterrupt):
        lora_init.initialize(model, Asks(), calibration=data)
    assert everything(model) == before


def test_gradients_are_of_the_pretrained_model_in_eval_mode():
    base, data = llama(attention_dropout=0.5), batches()
    model = adapted(copy.deepcopy(base), lora_dropout=0.3)
    for module in lora_layers(model).values():
        nn.init.normal_(module.lora_B["default"].weight)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.train()
    found = collected(model, data, Gradient())
    for name, G in gradients(base, data, list(found)).items():
        assert relative(found[name]["gradient"], G) < 1e-12, name


def test_fused_models_and_those_with_another_start_are_their_base_too():
    base, data = llama(torch.float32), batches()
    expected = collected(adapted(copy.deepcopy(base)), data, Gradient())
    model = adapted(copy.deepcopy(base))
    lora_init.initialize(model, "pissa", residual="virtual")
    lora_init.fuse(model)
    found = collected(model, data, Gradient())
    assert all(torch.equal(found[n]["gradient"], expected[n]["gradient"]) for n in expected)
    assert len(lora_init.fuse(model).fused) == 21


def test_calls_under_no_grad_inference_mode_or_autocast_collect_the_same():
    data = batches()
    expected = collected(adapted(llama(torch.float32)), data, Gradient(), Covariance())
    for mode in (torch.no_grad(), torch.inference_mode()):
        model = adapted(llama(torch.float32))
        with mode:
            found = collected(model, data, Gradient(), Covariance())
        for name, values in expected.items():
            assert all(torch.equal(values[key], found[name][key]) for key in values)
    with torch.autocast("cpu", torch.bfloat16):
        found = collected(adapted(llama(torch.float32)), data, Gradient(), Covariance())
    for name, values in expected.items():
        assert found[name]["gradient"].dtype == torch.float32
        assert relative(found[name]["gradient"], values["gradient"]) < 0.1


# -- refused --------------------------------------------------------------------------------------


def with_batch(index: int, **changes: Any) -> list[dict[str, Tensor]]:
    data = batches()
    data[index] = {k: v for k, v in (data[index] | changes).items() if v is not None}
    return data


def nan_weights(model: PeftModel) -> PeftModel:
    """NaN after the embedding of one token that only the second batch has."""
    model.get_base_model().model.embed_tokens.weight.data[60] = float("nan")
    return model


NOTHING = torch.zeros(3, 7, dtype=torch.long)
TOKENS = torch.arange(21).reshape(3, 7)
REFUSED = {
    "no_token": (
        with_batch(1, attention_mask=NOTHING),
        {},
        r"batch 1 has no token that counts \(attention mask\): leave it out",
    ),
    "no_label": (
        with_batch(1, labels=NOTHING - 100),
        {},
        "the loss is nan in batch 1: check its labels",
    ),
    "no_label_that_counts": (
        with_batch(2, labels=NOTHING - 100),
        {"token_mask": "labels"},
        r"example 6 has no token that counts \(labels mask\)",
    ),
    "labels_of_sentences": (
        with_batch(0, labels=torch.zeros(3, dtype=torch.long)),
        {"token_mask": "labels"},
        'token_mask="labels", but example 0 has no labels of one for each token',
    ),
    "labels_of_no_mapping": (
        [tuple(batch.values()) for batch in batches()],
        {
            "token_mask": "labels",
            "loss_fn": lambda model, batch: model(batch[0], labels=batch[2]).loss,
        },
        'token_mask="labels" says nothing where example 0 is no mapping: use "attention"',
    ),
    "no_labels": (
        with_batch(1, labels=None),
        {},
        "the model's output has no loss in batch 1: put labels into the batches, or pass loss_fn",
    ),
    "mask_of_four_dimensions": (
        with_batch(0, attention_mask=torch.ones(3, 1, 7, 7)),
        {},
        r"attention_mask must be \(batch, tokens\), got \(1, 1, 7, 7\) in example 0",
    ),
    "loss_of_several": (
        batches(),
        {"loss_fn": lambda model, batch: model(**batch).logits},
        r"the loss must be a tensor of one number, got \(3, 7, 61\) in batch 0",
    ),
    "loss_of_nothing": (
        batches(),
        {"loss_fn": lambda model, batch: torch.zeros(())},
        "the loss does not depend on any adapted layer in batch 0",
    ),
    "loss_without_grad": (
        batches(),
        {"loss_fn": torch.no_grad()(lambda model, batch: model(**batch).loss)},
        "the loss does not depend on any adapted layer in batch 0",
    ),
    "infinite_loss": (
        batches(),
        {"loss_fn": lambda model, batch: model(**batch).loss / 0},
        "the loss is inf in batch 0",
    ),
    "tuples_without_loss_fn": ([(TOKENS, TOKENS)], {}, "a batch is a tuple: pass loss_fn"),
    "no_batches": ([], {}, "the calibration dataloader gave no batch"),
}


@pytest.mark.parametrize(("data", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_data_is_refused_and_the_model_untouched(data, options, message):
    model = adapted(llama(torch.float32))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = Asks((Covariance(),) if "example" in message else (Gradient(), Covariance()))
    with pytest.raises(LoraInitError, match=message):
        lora_init.initialize(model, wanted, calibration=Calibration(data, **options))
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


def test_values_that_are_not_finite_name_the_layer_and_batch():
    clean = [{k: v.clamp(max=59) for k, v in batch.items()} for batch in batches()]
    clean[1]["input_ids"][0, 0] = 60
    model = nan_weights(adapted(llama(torch.float32, tie_word_embeddings=False)))
    expected = r"layers\.0\.self_attn\.q_proj: its input has NaN or infinite values in batch 1"
    with pytest.raises(LoraInitError, match=expected):
        collected(model, clean, PrincipalComponents(4))
    # of a token that the mask leaves out it does not matter
    clean[1]["input_ids"][0, 0], clean[1]["input_ids"][1, -1] = 1, 60
    assert not clean[1]["attention_mask"][1, -1]
    collected(adapted(llama(torch.float32)), clean, PrincipalComponents(4))

    def exploding(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(**batch).logits.float()
        return (logits.sum() * 0).abs().sqrt() + model(**batch).loss  # d√0

    expected = r"layers\.2\.\S+: the gradient by its output has NaN or infinite values in batch 0"
    with pytest.raises(LoraInitError, match=expected):
        collected(adapted(llama(torch.float32)), batches(), Gradient(), loss_fn=exploding)


class Pooled(nn.Module):
    """A layer that sees one token a sentence, as BERT's pooler, and one that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.dense = nn.Embedding(61, 8), nn.Linear(8, 4)
        self.pooler, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.pooler(self.dense(self.embed(input_ids))[:, 0])


def test_a_layer_whose_rows_are_not_the_mask_s_is_named():
    data = [{"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}]
    model = adapted(Pooled(), ["dense", "pooler"])
    message = r"pooler: its input is \(3, 4\) in batch 0, whose mask is \(3, 7\): leave the layer"
    with pytest.raises(LoraInitError, match=message):
        collected(model, data, PrincipalComponents(2))
    found = collected(model, [{"input_ids": TOKENS}], PrincipalComponents(2))
    assert found["pooler"]["components"].shape == (2, 4)


class TokensFirst(nn.Module):
    """A layer that sees (tokens, batch): as many rows as the mask has, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.dense = nn.Embedding(61, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.dense(self.embed(input_ids).transpose(0, 1))


def test_a_layer_whose_rows_lie_in_another_order_is_named():
    data = [{"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}]
    message = r"dense: its input is \(7, 3, 8\) in batch 0, whose mask is \(3, 7\)"
    with pytest.raises(LoraInitError, match=message):
        collected(adapted(TokensFirst(), ["dense"]), data, PrincipalComponents(2))


def test_a_layer_that_the_data_does_not_reach_is_named():
    model = adapted(Pooled(), ["dense", "unused"])
    with pytest.raises(LoraInitError, match="unused: it was never called in the calibration data"):
        collected(model, [{"input_ids": TOKENS}], PrincipalComponents(2))
    model = adapted(Attention(reentrant=True), ["first", "second"])
    data = [(TOKENS % 20, torch.zeros(3, 7, 5))]

    def detached(model: nn.Module, batch: Any) -> Tensor:
        return squares(lambda tokens: model(tokens).detach() + model.second(torch.ones(12)), batch)

    with pytest.raises(LoraInitError, match=r"first: it got no gradient .*enable_input_require"):
        collected(model, data, Gradient(), loss_fn=detached)


OPTIONS = {
    "dataloader": ({"dataloader": 3}, "dataloader must be an iterable of batches, got int"),
    "loss_fn": ({"loss_fn": 3}, r"loss_fn must be a function of \(model, batch\), got 3"),
    "num_batches": ({"num_batches": 0}, "num_batches must be a whole number ≥ 1, got 0"),
    "block_bytes": ({"block_bytes": "all"}, "block_bytes must be a whole number ≥ 1, got 'all'"),
    "token_mask": (
        {"token_mask": "all"},
        'token_mask must be "attention" or "labels", got \'all\'',
    ),
    "checkpointing": ({"checkpointing": 2}, 'checkpointing must be True, False or "auto", got 2'),
    "key": ({"loss_fn": squares, "cache": True}, "the cache cannot know what loss_fn computes"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_bad_options_are_refused(options, message):
    with pytest.raises(LoraInitError, match=message):
        Calibration(**{"dataloader": batches()} | options)


def test_calls_that_do_not_fit_the_method_are_refused():
    model, data = adapted(llama(torch.float32)), Calibration(batches())
    with pytest.raises(LoraInitError, match=r"asks starts from data \(gradients\): pass"):
        lora_init.initialize(model, Asks())
    with pytest.raises(LoraInitError, match=r"pissa starts from the weights alone .*leave calibr"):
        lora_init.initialize(model, "pissa", calibration=data)
    step = Calibration(batches(), train_step=lambda *_: None)
    with pytest.raises(LoraInitError, match="asks does not train: leave train_step out"):
        lora_init.initialize(model, Asks(), calibration=step)
    with pytest.raises(LoraInitError, match=r"trains starts from training: pass .*train_step="):
        lora_init.initialize(model, Trains(), calibration=data)
    weight = {"q": torch.ones(4, 4)}
    with pytest.raises(LoraInitError, match="q: asks starts from data, and 'gradient' of this"):
        lora_init.approximate(weight, 2, Asks())


def test_a_checkpoint_on_disk_has_no_model_for_data_to_run_through(tmp_path):
    llama(torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(LoraInitError, match=r"eva starts from data \(activations\), which runs"):
        lora_init.initialize_checkpoint(tmp_path / "model", tmp_path / "out", "eva")
    assert not (tmp_path / "out").exists()


def test_a_batch_that_cannot_be_cut_into_examples_is_refused():
    ragged = {"input_ids": TOKENS, "labels": TOKENS, "lengths": torch.ones(2)}
    with pytest.raises(LoraInitError, match=r"batch 1 cannot be cut .* tensors have \[2, 3\] rows"):
        _ = Calibration([{"input_ids": TOKENS}, ragged]).examples


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
    assert "4 of 6 layers got another rank, 2 of them 0 and no adapter: an opt" in str(report)
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


class RedistributesResiduals(Redistributes):
    """As above, on residuals."""

    residual: ClassVar[bool] = True


@pytest.mark.parametrize("residual", ["stored", "virtual"])
def test_a_model_on_residuals_whose_layers_got_other_ranks_is_saved_and_resumed(tmp_path, residual):
    base, tokens = llama(torch.float32), batches()[0]["input_ids"]
    model = adapted(copy.deepcopy(base), ["q_proj", "v_proj"])
    lora_init.initialize(model, RedistributesResiduals((3, 0, 4, 2, 0, 7)), residual=residual)
    assert relative(model.eval()(tokens).logits, base(tokens).logits) < 2e-5
    with torch.no_grad():
        for module in lora_layers(model).values():
            module.lora_B["default"].weight.mul_(1.01)
    logits = model(tokens).logits
    assert relative(logits, base(tokens).logits) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative(loaded(tokens).logits, logits) < 2e-5
    again = get_peft_model(copy.deepcopy(base), copy.deepcopy(model.peft_config["default"]))
    lora_init.resume(again, tmp_path)
    assert torch.equal(again.eval()(tokens).logits, logits)


def test_layers_of_other_ranks_train_when_inference_mode_was_on():
    model = adapted(llama(torch.float32), ["q_proj"])
    with torch.inference_mode():
        lora_init.initialize(model, Redistributes((3, 2, 4)))
    model.train()(**batches()[0]).loss.backward()
    for module in lora_layers(model).values():
        assert module.lora_A["default"].weight.grad.any()
        assert module.lora_B["default"].weight.grad.any()


def test_a_checkpoint_run_refuses_a_method_that_changes_ranks(tmp_path):
    llama(torch.float32).save_pretrained(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    message = r"v_proj: redistributes gives it rank 4, and a run writes .*lora_init\.initialize"
    with pytest.raises(LoraInitError, match=message):
        lora_init.initialize_checkpoint(
            tmp_path / "model", tmp_path / "out", Redistributes((8, 4, 8, 8, 8, 8)), cache=False
        )
    assert sorted(tmp_path.rglob("*")) == before


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


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 1e-5), (8, 0.05)], ids=["nf4", "int8"])
def test_gradients_of_a_quantised_model_are_of_its_dequantised_weights(bits, tolerance):
    data = batches()
    model = adapted(quantised(llama(torch.float32), bits), ["q_proj", "v_proj"])
    model.train()
    plain = llama(torch.float32)
    for name, module in plain.named_modules():
        if name.endswith("proj"):
            wrapped = model.get_base_model().get_submodule(name)
            own = wrapped.get_base_layer() if isinstance(wrapped, LoraLayer) else wrapped
            state = getattr(own, "state", None)
            module.weight.data = dequantize_bnb_weight(own.weight, state).float()
    method, calibration = Asks((Gradient(),)), Calibration(data, checkpointing=True)
    report = lora_init.initialize(model, method, calibration=calibration)
    assert len(report.layers) == 6
    for name, G in gradients(plain, data, list(lora_layers(model))).items():
        assert relative(lora_layers(model)[name].lora_B["default"].weight, G[:, :4]) < tolerance
    assert all(module.training for module in model.modules())
    model(**data[0]).loss.backward()  # not packed for the CPU, which could not train

    with model.disable_adapter(), torch.no_grad():
        before = model(**data[0]).logits
    lora_init.initialize(model, "lora_ga", residual="virtual", calibration=Calibration(data))
    assert float(lora_layers(model)[name].lora_B["default"].weight.detach().norm()) > 0
    assert torch.equal(model(**data[0]).logits, before)


@pytest.mark.gpu
def test_on_a_gpu_the_same_is_collected_and_its_generator_left_alone():
    base, data = llama(torch.float32), batches()
    expected = collected(adapted(copy.deepcopy(base)), data, Gradient(), Covariance())
    model = adapted(copy.deepcopy(base)).cuda()
    before = torch.cuda.get_rng_state()
    found = collected(model, data, Gradient(), Covariance(), checkpointing=True)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    for name, parts in expected.items():
        for key, value in parts.items():
            assert found[name][key].is_cuda
            assert relative(found[name][key].cpu(), value) < 1e-3, (name, key)


# -- several processes ----------------------------------------------------------------------------


def run_of(name: str, data: Any, **more: Any) -> tuple[dict[str, Tensor], list[Any]]:
    """A whole initialisation: the model's state, and the layers' ranks."""
    method = {"asks": Asks((Gradient(), PrincipalComponents(4))), "ranks": ByVariance()}[name]
    model = adapted(llama(torch.float32))
    calibration = Calibration(data, cache=False, block_bytes=20_000)
    report = lora_init.initialize(model, method, calibration=calibration, **more)
    return dict(model.state_dict()), [layer.r for layer in report.layers]


def alike_job(name: str) -> Any:
    started: list[str] = []
    start = Gradient.start

    def counted(self: Gradient, layer: Layer) -> State:
        started.append(layer.name)
        return start(self, layer)

    Gradient.start = counted
    try:
        return *run_of(name, batches()), started
    finally:
        Gradient.start = start


@pytest.mark.parametrize("name", ["asks", "ranks"])
def test_ranks_collect_their_layers_alone_and_get_the_same_bits(tmp_path, name):
    torch.set_num_threads(1)
    expected, ranks = run_of(name, batches())
    results = job.run(2, alike_job, name, folder=tmp_path / "job")
    for state, got, _ in results:
        assert got == ranks
        job.assert_same(state, expected)
    if name == "asks":
        (*_, one), (*_, other) = results
        assert sorted(one + other) == sorted(lora_layers(adapted(llama())))
        assert min(len(one), len(other)) > 5


def apart_job() -> dict[str, str]:
    rank = torch.distributed.get_rank()
    found = {}

    def failing_on(at: int, **more: Any) -> Any:
        def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return model(**batch).loss * (float("nan") if rank == at else 1)

        return lambda: lora_init.initialize(
            adapted(llama()), Asks(), calibration=Calibration(batches(), loss_fn), **more
        )

    def sharded() -> Any:
        model = adapted(llama(torch.float32))
        fully_shard(model)
        return lora_init.initialize(model, Asks(), calibration=Calibration(batches()))

    cases = {
        "data": lambda: run_of("asks", batches()[rank:]),
        "training": lambda: lora_init.initialize(
            adapted(llama()), Trains(), calibration=Calibration(batches(), train_step=print)
        ),
        "nan": failing_on(1),
        "sharded": sharded,
        "wrapped": lambda: lora_init.initialize(
            DistributedDataParallel(adapted(llama())), Asks(), calibration=Calibration(batches())
        ),
    }
    for name, case in cases.items():
        try:
            case()
        except LoraInitError as error:
            found[name] = str(error)
    run_of("asks", batches()[rank:], distributed=False)
    return found


def test_ranks_that_differ_all_get_one_error(tmp_path):
    one, other = job.run(2, apart_job, folder=tmp_path / "job")
    assert one["data"] == other["data"]
    assert "the content of the calibration batches is" in one["data"]
    for found in (one, other):
        assert "trains trains all layers together" in found["training"]
        assert "distributed=False" in found["training"]
        assert "the loss is nan in batch 0" in found["nan"]
        assert "is sharded over ranks" in found["sharded"]
        assert "initialise before fully_shard" in found["sharded"]
        assert "outside any DDP" in found["wrapped"]
    assert one["nan"] == f"rank 1: {other['nan']}"


# -- real models ----------------------------------------------------------------------------------


def test_minilm_s_gradients_with_left_out_tokens(minilm_dir, movie_reviews):
    base = AutoModelForSequenceClassification.from_pretrained(minilm_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    data = []
    for part in (movie_reviews[:3], movie_reviews[3:5]):
        texts, labels = zip(*part, strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=24)
        data.append(batch | {"labels": list(labels)})
    data = [{key: torch.tensor(value) for key, value in batch.items()} for batch in data]
    model = adapted(copy.deepcopy(base), ["query", "value", "output.dense"])
    found = collected(model, data, Gradient())
    assert len(found) == 24
    for name, G in gradients(base, data, list(found)).items():
        assert relative(found[name]["gradient"], G) < 1e-4, name
