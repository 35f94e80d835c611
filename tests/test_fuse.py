"""`fuse` and `unfuse`: stock PEFT's numbers and behaviour, by the op."""

import copy
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import lora_init
from benchmarks import bench_fuse
from lora_init import LoraInitError
from lora_init.integrations.peft import fusion
from lora_init.integrations.peft.layers import lora_layers
from tests import test_distributed as job
from tests.test_peft import (
    CONFIGS,
    STEPS,
    TOKENS,
    adapted,
    assert_unchanged,
    distance,
    llama,
    logits,
    snapshot,
    train,
)


def curve(
    model: nn.Module, steps: int = 20, batches: torch.Tensor = TOKENS[None], autocast: bool = False
) -> list[float]:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)
    losses = []
    for step in range(steps):
        tokens = batches[step % len(batches)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def fused(model: PeftModel) -> PeftModel:
    assert not lora_init.fuse(model).left
    return model


def pair(**config: Any) -> tuple[PeftModel, PeftModel]:
    """Two models with the same weights, B ≠ 0: stock, and fused."""
    torch.manual_seed(1)
    stock = adapted(llama(bias=True), **config)
    for layer in lora_layers(stock).values():
        for B in layer.lora_B.values():
            nn.init.normal_(B.weight, std=0.1)
    other = copy.deepcopy(stock)
    lora_init.fuse(other)
    return stock, other


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of the op."""
    made: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(1)
        return lora_init.lora_linear(*args, **kwargs)

    monkeypatch.setattr(fusion, "lora_linear", counted)
    return made


# Training


@pytest.mark.parametrize("config", ["plain", "rslora_patterns", "modules_to_save"])
def test_stock_peft_s_loss_curve(config: str, calls: list[int]) -> None:
    stock, other = pair(**CONFIGS[config])
    assert curve(other) == pytest.approx(curve(stock), rel=1e-5)
    assert len(calls) == 20 * 4


@pytest.mark.slow
def test_smollm2_has_stock_peft_s_loss_curve(
    smollm2_dir: Path, movie_reviews: list[tuple[str, int]]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    text = tokenizer(" ".join(text for text, _ in movie_reviews[:200]))["input_ids"]
    batches = torch.tensor(text[: 20 * 2 * 32]).view(20, 2, 32)
    curves = []
    for prepare in (lambda model: model, fused):
        torch.manual_seed(0)
        config = LoraConfig(target_modules="all-linear", r=8, lora_alpha=16)
        curves.append(curve(prepare(get_peft_model(copy.deepcopy(base), config)), 20, batches))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def interpret(*arguments: str) -> None:
    """`interpreted` in a process that interprets Triton's kernels."""
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "1", "LORA_INIT_SELFTEST": "0", "OMP_NUM_THREADS": "1"}
    code = f"from tests.test_fuse import interpreted; interpreted(*{arguments})"
    command = [sys.executable, "-c", code]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stdout + done.stderr


def interpreted(folder: str = "") -> None:
    base, tokens = llama(bias=True), TOKENS[None]
    if folder:
        base = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, num_hidden_layers=2
        )
        text = "It was the best of times, it was the worst of times, it was the age of wisdom,"
        tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][None]
    curves = []
    for prepare in (lambda model: model, fused):
        torch.manual_seed(0)
        curves.append(curve(prepare(adapted(base)), 20, tokens))
    layer = next(iter(lora_layers(adapted(base)).values()))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.zeros(1, A.shape[1])
    chosen = lora_init.explain("lora_linear", x, layer.base_layer.weight, A, B)
    assert "triton: runs lora_linear" in chosen, chosen
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_triton_s_kernels_have_stock_peft_s_loss_curve() -> None:
    interpret()


@pytest.mark.slow
def test_triton_s_kernels_have_stock_peft_s_loss_curve_on_two_layers_of_smollm2(
    smollm2_dir: Path,
) -> None:
    interpret(str(smollm2_dir))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_precision(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(1)
    stock = adapted(llama(dtype))  # its adapter is fp32
    for layer in lora_layers(stock).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    other = fused(copy.deepcopy(stock))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert distance(logits(other), logits(stock)) < 2e-2
    want = curve(stock, 5, autocast=autocast)
    assert curve(other, 5, autocast=autocast) == pytest.approx(want, rel=2e-3)


def test_gradient_checkpointing_and_dropout_repeat_the_mask() -> None:
    curves = []
    for checkpointing in (False, True):
        _, other = pair(lora_dropout=0.2)
        if checkpointing:
            other.gradient_checkpointing_enable({"use_reentrant": False})
            other.enable_input_require_grads()
        torch.manual_seed(3)
        curves.append(curve(other, 5))
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)
    stock, other = pair(lora_dropout=0.2)
    assert distance(logits(other), logits(stock)) < 1e-5  # no dropout in eval mode


def test_compile() -> None:
    _, other = pair()
    layer = other.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 48)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with other.disable_adapter():
        torch.testing.assert_close(compiled(x), layer.base_layer(x))


# What stays as it was


def test_only_the_class_of_the_layers_is_exchanged_and_unfuse_gives_it_back() -> None:
    stock, other = pair()
    before, parameters = snapshot(other), [id(p) for p in other.parameters()]
    types = [type(module) for module in stock.modules()]
    assert not fused(other).training
    lora_init.fuse(other)  # a second time is of no effect
    assert_unchanged(other, before)
    assert [id(p) for p in other.parameters()] == parameters
    assert [name for name, _ in other.named_modules()] == [
        name for name, _ in stock.named_modules()
    ]
    assert all(
        isinstance(module, kind) for module, kind in zip(other.modules(), types, strict=True)
    )
    assert repr(other) == repr(stock)
    lora_init.unfuse(other)
    assert [type(module) for module in other.modules()] == types
    assert torch.equal(logits(other), logits(stock))
    lora_init.unfuse(other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused_and_independent(copied: Callable, calls: list[int]) -> None:
    _, model = pair()
    other = copied(model)
    live = logits(model)
    assert torch.equal(logits(other), live)
    assert len(calls) == 8
    train(other)
    assert not torch.equal(logits(other), live)
    assert torch.equal(logits(model), live)
    lora_init.unfuse(other)


def second(model: PeftModel) -> PeftModel:
    torch.manual_seed(2)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=4)
    model.add_adapter("second", config)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["second"].weight, std=0.1)
    return model.eval()


@torch.no_grad()
def disabled(model: PeftModel) -> torch.Tensor:
    with model.disable_adapter():
        return logits(model)


def merged(model: PeftModel) -> torch.Tensor:
    model.merge_adapter()
    result = logits(model)
    model.unmerge_adapter()
    return result


@torch.no_grad()
def mixed_batch(model: PeftModel) -> torch.Tensor:
    names = ["second", "__base__"]
    return second(model)(TOKENS, adapter_names=names).logits


def both_active(model: PeftModel) -> torch.Tensor:
    second(model).base_model.set_adapter(["default", "second"])
    return logits(model)


def none_active(model: PeftModel) -> torch.Tensor:
    second(model).base_model.set_adapter([])
    return logits(model)


def hooked(model: PeftModel) -> torch.Tensor:
    for layer in lora_layers(model).values():
        layer.base_layer.register_forward_hook(lambda module, args, output: output * 1.01)
    return logits(model)


@pytest.mark.parametrize(
    "state",
    [disabled, merged, mixed_batch, both_active, none_active, hooked],
    ids=lambda f: f.__name__,
)
def test_peft_s_own_forward_runs_where_a_call_is_not_one_plain_adapter_s(
    state: Callable, calls: list[int]
) -> None:
    stock, other = pair()
    assert torch.equal(state(other), state(stock))
    assert not calls
    assert torch.equal(disabled(other), disabled(stock))


def test_adapters_are_switched_added_and_deleted(calls: list[int]) -> None:
    stock, other = pair()
    for model in (stock, other):
        second(model).set_adapter("second")
    assert distance(logits(other), logits(stock)) < 1e-5
    assert len(calls) == 4
    for model in (stock, other):
        model.set_adapter("default")
        model.delete_adapter("second")
    assert distance(logits(other), logits(stock)) < 1e-5
    assert len(calls) == 8
    assert torch.equal(
        other.merge_and_unload()(TOKENS).logits, stock.merge_and_unload()(TOKENS).logits
    )


def test_an_adapter_on_more_layers_is_fused_by_another_call() -> None:
    _, other = pair()
    other.add_adapter("wide", LoraConfig(target_modules=["q_proj", "o_proj"], r=4))
    report = lora_init.fuse(other)
    assert len(report.fused) == 6
    assert not report.left


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("residual", ["stored", "virtual"])
def test_initialize_save_and_resume(when: str, residual: str, tmp_path: Path) -> None:
    base = llama(bias=True)
    model = adapted(base)
    if when == "before":
        fused(model)
    lora_init.initialize(model, steps=STEPS, cache=False, residual=residual)
    fused(model)
    assert distance(logits(model), logits(base)) < 2e-5
    train(model)
    live = logits(model)
    model.save_pretrained(tmp_path / "checkpoint")
    lora_init.save_adapter(model, tmp_path / "adapter")
    for folder in ("checkpoint", "adapter"):
        stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
        assert distance(logits(stock), live) < 1e-5
    fresh = fused(adapted(base))
    lora_init.resume(fresh, tmp_path / "checkpoint")
    assert torch.equal(logits(fresh), live)
    train(model)
    model.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)
    assert torch.equal(logits(model), live)


# The report


def trained_base(model: PeftModel) -> None:
    for layer in lora_layers(model).values():
        layer.base_layer.weight.requires_grad_(True)


def other_forward(model: PeftModel) -> None:
    for layer in lora_layers(model).values():
        layer.base_layer.forward = layer.base_layer.forward


def other_dropout(model: PeftModel) -> None:
    for layer in lora_layers(model).values():
        layer.lora_dropout["default"] = nn.AlphaDropout(0.1)


def hooked_by_accelerate(model: PeftModel) -> None:
    for layer in lora_layers(model).values():
        add_hook_to_module(layer, ModelHook())


def wrapped_factor(model: PeftModel) -> None:
    class Wrapper(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    for layer in lora_layers(model).values():
        layer.lora_A["default"].__class__ = Wrapper


def hot_swapped(model: PeftModel) -> None:
    prepare_model_for_compiled_hotswap(model)


LEFT = {
    "dora": ({"use_dora": True}, None, "its adapter is Dora, not plain LoRA"),
    "lora_bias": ({"lora_bias": True}, None, "lora_bias=True"),
    "trained base": ({}, trained_base, "its base weight is trained"),
    "forward": ({}, other_forward, "its base layer has hooks or another forward"),
    "dropout": ({}, other_dropout, "its dropout is AlphaDropout"),
    "own forward": ({}, hooked_by_accelerate, "its forward is not PEFT's own"),
    "wrapper": ({}, wrapped_factor, "its lora_A is a Wrapper, not a plain nn.Linear"),
    "hot swap": ({}, hot_swapped, "its scaling is a Tensor (compiled hot-swapping)"),
    "embedding": ({"target_modules": ["embed_tokens"]}, None, "LoRA on Embedding (Embedding), not"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "prepare", "reason"), LEFT.values(), ids=LEFT)
def test_layers_that_are_left(config: dict, prepare: Callable | None, reason: str) -> None:
    model = adapted(llama(bias=True), **config)
    if prepare:
        prepare(model)
    before = logits(model)
    report = lora_init.fuse(model)
    assert not report.fused
    assert all(reason in why for why in report.left.values())
    assert f"0 LoRA layers fused, {len(report.left)} left to PEFT" in str(report)
    assert reason in str(report)
    assert torch.equal(logits(model), before)


def test_zero3_layers_are_left() -> None:
    model = adapted(llama())
    job.Partitions(model)
    assert set(lora_init.fuse(model).left.values()) == {
        "DeepSpeed ZeRO-3 gathers its parameters for PEFT's forward only"
    }


def test_conv1d_is_left_and_the_rest_fused() -> None:
    config = GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=100, n_positions=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it sets fan_in_fan_out
        lora = LoraConfig(target_modules=["c_attn", "lm_head"], r=4)
        model = get_peft_model(GPT2LMHeadModel(config), lora)
    report = lora_init.fuse(model)
    assert report.fused == ["lm_head"]
    assert report.left == {
        "transformer.h.0.attn.c_attn": "LoRA on Conv1D (Linear), not on a plain nn.Linear"
    }


def test_a_layer_without_a_weight_of_its_own_is_left() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    report = lora_init.fuse(get_peft_model(model, LoraConfig(target_modules=["0", "1"], r=2)))
    assert "1" in report.fused
    assert "LoRA on MultiheadAttention" in report.left["0"]


def test_models_without_lora_layers_are_refused() -> None:
    for function in (lora_init.fuse, lora_init.unfuse):
        with pytest.raises(LoraInitError, match=r"Llama.* has no LoRA layer of PEFT"):
            function(llama())


def test_kernels_are_tested_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[torch.device]] = []
    monkeypatch.setattr(
        "lora_init.selftest.ensure", lambda devices, job: asked.append(set(devices))
    )
    pair()
    assert asked == [{torch.device("cpu")}]


def spoiled(model: PeftModel) -> PeftModel:
    nn.init.normal_(model.base_model.model.lm_head.weight)
    return model


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"autocast": True}], ids=str)
def test_the_benchmark_gives_no_way_a_speed_whose_losses_are_not_stock_peft_s(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = [*bench_fuse.ways(quick=True), ("broken", spoiled)]
    monkeypatch.setattr(bench_fuse, "ways", lambda quick: ways)
    case = bench_fuse.Case(2, 16, **options)
    rows = bench_fuse.measure(bench_fuse.TINY, case, torch.device("cpu"), 1, 1)
    assert [row["status"].partition(":")[0] for row in rows] == [*["measured"] * 3, "refused"]


# Trainers and jobs


def trainer_losses(model: PeftModel, out: Path, **arguments: Any) -> list[float]:
    from transformers import Trainer, TrainingArguments

    options = {
        "max_steps": 5,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    run = Trainer(model, TrainingArguments(str(out), **options | arguments), train_dataset=rows)
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_trainer(checkpointing: bool, tmp_path: Path, calls: list[int]) -> None:
    arguments = {"gradient_checkpointing": checkpointing}
    stock, other = (trainer_losses(m, tmp_path, **arguments) for m in pair())
    assert other == pytest.approx(stock, rel=1e-4)
    assert len(calls) == 5 * 4 * (2 if checkpointing else 1)


@pytest.mark.parametrize("packing", [False, True], ids=["", "packing"])
def test_trl_s_sft_trainer(packing: bool, tmp_path: Path, calls: list[int]) -> None:
    trl = pytest.importorskip("trl", reason="needs trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(100)}
    words = Tokenizer(models.WordLevel(vocabulary, "w0"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w0"
    )
    rows = Dataset.from_list([{"input_ids": row.tolist()} for row in TOKENS] * 4)
    curves = []
    for model in pair():
        arguments = trl.SFTConfig(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            max_length=32,
            packing=packing,
            gradient_checkpointing=True,
        )
        run = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
        run.train()
        curves.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert len(curves[0]) == 4
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert calls


def in_a_job(form: str, residual: str) -> dict[str, Any]:
    """Of a rank: what stock PEFT and the fused model compute after some steps."""
    results = {}
    for name in ("stock", "fused"):
        torch.manual_seed(0)
        model = job.adapted()
        if name == "fused" and form == "ddp":
            fused(model)
        if form == "fsdp2":
            model = job.shard(model)
        if name == "fused" and form == "fsdp2":
            fused(model)
        job.initialize(model, "inilora", residual=residual)
        results[f"{name} start"] = job.logits(model)
        job.train(model, DistributedDataParallel(model) if form == "ddp" else model)
        results[name] = job.logits(model)
    return results


@pytest.mark.parametrize("residual", ["stored", "virtual"])
@pytest.mark.parametrize("form", ["ddp", "fsdp2"])
def test_distributed_training(form: str, residual: str, tmp_path: Path) -> None:
    one, other = job.run(2, in_a_job, form, residual, folder=tmp_path / "job")
    assert all(torch.equal(one[name], other[name]) for name in one)
    job.assert_close(one["fused"], one["stock"])
    base = job.logits(job.base_model())
    assert distance(one["fused"], base) > 0.05  # it learned
    if residual == "virtual":
        assert torch.equal(one["fused start"], base)
        assert torch.equal(one["stock start"], base)
    assert not dist.is_initialized()


def without_layers_on_one_rank() -> str:
    with pytest.raises(LoraInitError) as raised:
        lora_init.fuse(job.adapted() if dist.get_rank() == 0 else job.base_model())
    return str(raised.value)


def test_a_rank_without_lora_layers_is_an_error_on_all(tmp_path: Path) -> None:
    for message in job.run(2, without_layers_on_one_rank, folder=tmp_path / "job", wait=60):
        assert "has no LoRA layer of PEFT" in message
