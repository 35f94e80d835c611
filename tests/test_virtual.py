"""`initialize(residual="virtual")`: the base stays as it is, whatever it is and is done to it."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

import lora_init
from lora_init import LoraInitError
from lora_init.integrations.peft import shares
from lora_init.integrations.peft.layers import lora_layers
from tests.test_fuse import curve, merged
from tests.test_peft import (
    CONFIGS,
    STEPS,
    TOKENS,
    adapted,
    assert_unchanged,
    distance,
    llama,
    logits,
    nan_weight,
    share_views,
    share_weights,
    snapshot,
    train,
)

FORMS = {"peft": lambda model: model, "fused": lambda model: (lora_init.fuse(model), model)[1]}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def initialize(model: PeftModel, method: str = "inilora", **more: Any) -> lora_init.report.Report:
    options = {"cache": False, "residual": "virtual"} | (
        {"steps": STEPS} if method == "inilora" else {}
    )
    return lora_init.initialize(model, method, **options | more)


def started(base: nn.Module, method: str = "inilora", **config: Any) -> PeftModel:
    model = adapted(base, **config)
    initialize(model, method)
    return model


def base_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}


@forms
@pytest.mark.parametrize("method", ["inilora", "inilora_alpha", "inilora_beta", "pissa", "lora"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_start_is_the_base_model_bit_for_bit(
    form: Callable, method: str, config: dict[str, Any], dropout: float
) -> None:
    base = llama(bias=True)
    model = form(started(base, method, **config, lora_dropout=dropout))
    model.train()  # whatever the dropout
    assert torch.equal(logits(model), logits(base))


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["fp32_adapter", "same_dtype_adapter"])
@forms
def test_16_bit_bases_start_exactly_too(form: Callable, dtype: torch.dtype, autocast: bool) -> None:
    base = llama(dtype)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=8, lora_alpha=16)
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=autocast).eval()
    # So far from W that a residual in 16 bits would be refused, or overflow.
    report = initialize(form(model), "inilora_alpha", sigma=1.5)
    assert torch.equal(logits(model), logits(base))
    assert {(layer.start_error, layer.start_drift) for layer in report.layers} == {(0.0, 0.0)}


@forms
def test_same_curve_as_the_stored_residual(form: Callable) -> None:
    curves = []
    for residual in ("stored", "virtual"):
        model = form(adapted(llama(bias=True), **CONFIGS["rslora_patterns"]))
        lora_init.initialize(model, steps=STEPS, cache=False, residual=residual)
        curves.append(curve(model))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[0][-1] < 0.9 * curves[0][0]


@pytest.mark.filterwarnings("error::UserWarning")
@forms
def test_disabled_it_is_the_base_model_and_the_base_never_changes(form: Callable) -> None:
    base = llama(bias=True)
    model = form(adapted(base))
    before, keys = base_of(model), list(model.state_dict())
    initialize(model)
    train(model)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(t, before[name]) for name, t in base_of(model).items())
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert distance(logits(model), logits(base)) > 1e-2


@forms
@pytest.mark.parametrize("config", ["plain", "patterns", "lora_bias"])
def test_merging_adds_the_difference_of_the_products(form: Callable, config: str) -> None:
    base = llama(bias=True)
    model = form(started(base, **CONFIGS[config]))
    model.merge_adapter()
    for name, layer in lora_layers(model).items():  # nothing is added at the start
        assert torch.equal(layer.base_layer.weight, base.get_submodule(name).weight)
    model.unmerge_adapter()
    starts = model.lora_init_starts["default"].layers
    train(model)
    live = logits(model)
    assert distance(merged(model), live) < 1e-5
    assert distance(logits(model), live) < 1e-5
    model.merge_adapter(safe_merge=True)
    for name, layer in lora_layers(model).items():
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        A0, B0 = starts[name].A0.double(), starts[name].B0.double()
        exact = base.get_submodule(name).weight + layer.scaling["default"] * (B @ A - B0 @ A0)
        torch.testing.assert_close(layer.base_layer.weight.double(), exact, rtol=0, atol=1e-6)
    model.unmerge_adapter()
    assert distance(logits(model.merge_and_unload()), live) < 1e-5


def test_conv1d_of_gpt2() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=100, n_positions=32)
    base = GPT2LMHeadModel(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it sets fan_in_fan_out
        model = adapted(base, target_modules=["c_attn"])
    initialize(model)
    assert torch.equal(logits(model), logits(base))
    train(model)
    live = logits(model)
    assert distance(merged(model), live) < 1e-5


@forms
def test_compile(form: Callable) -> None:
    model = form(started(llama(), lora_dropout=0.0))
    train(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.lora_A["default"].weight.grad is not None


# Saving


@forms
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_saved_adapter_fits_the_base_and_resume_is_exact(
    form: Callable, config: dict[str, Any], tmp_path: Path
) -> None:
    base = llama(bias=True)
    model = form(started(base, **config))
    train(model)
    live = logits(model)
    lora_init.save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "checkpoint")
    for folder in ("adapter", "checkpoint"):
        stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
        assert distance(logits(stock), live) < 1e-5
    fresh = form(adapted(base, **config))
    lora_init.resume(fresh, tmp_path / "checkpoint")
    assert torch.equal(logits(fresh), live)
    with fresh.disable_adapter():
        assert distance(logits(fresh), logits(base)) == 0
    train(model, 2)
    train(fresh, 2)
    assert torch.equal(logits(fresh), logits(model))
    model.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)
    assert torch.equal(logits(model), live)


@forms
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_start(copied: Callable, form: Callable, tmp_path: Path) -> None:
    base = llama()
    model = form(started(base))
    other = copied(model)
    train(other)
    with torch.no_grad(), other.disable_adapter():
        assert torch.equal(logits(other), logits(base))
    other.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert distance(logits(stock), logits(other)) < 1e-5
    assert torch.equal(logits(model), logits(base))  # the first model did not move


@forms
def test_the_start_follows_the_model_s_dtype(form: Callable) -> None:
    base = llama()
    model = form(started(base)).to(torch.bfloat16)
    assert torch.equal(logits(model), logits(base.to(torch.bfloat16)))


def test_initialised_in_inference_mode_it_trains_later() -> None:
    base = llama()
    model = adapted(base)
    with torch.inference_mode():
        initialize(model)
    train(model)
    assert distance(logits(model), logits(base)) > 1e-2


def test_a_start_that_moved_in_inference_mode_trains_later() -> None:
    layer = next(iter(lora_layers(started(llama())).values()))
    start = layer.lora_variant["default"]
    with torch.inference_mode():
        start.factors(torch.empty(1, device="meta"))
    assert (start.A0.device.type, start.B0.device.type) == ("meta", "meta")
    assert not start.A0.is_inference()
    assert not start.B0.is_inference()


# Several adapters


def two(form: Callable, base: nn.Module) -> PeftModel:
    model = form(adapted(base))
    model.add_adapter("other", LoraConfig(target_modules=["q_proj", "o_proj"], r=4))
    initialize(model)
    initialize(model, "pissa", adapter_name="other")
    return form(model.eval())


@forms
def test_two_initialised_adapters_on_one_base(form: Callable, tmp_path: Path) -> None:
    base = llama(bias=True)
    model = two(form, base)
    live = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        assert torch.equal(logits(model), logits(base))
        train(model)
        live[adapter] = logits(model)
    model.save_pretrained(tmp_path)
    for adapter, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        model.set_adapter(adapter)
        assert torch.equal(logits(model), live[adapter])
        stock = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        assert distance(logits(stock), live[adapter]) < 1e-5
    with torch.no_grad():
        names = ["default", "other"]
        mixed = model(TOKENS, adapter_names=names).logits
    for row, adapter in enumerate(names):
        assert distance(mixed[row], live[adapter][row]) < 1e-5
    model.base_model.set_adapter(names)
    both = merged(model)
    assert distance(logits(model), both) < 1e-5
    model.set_adapter("other")
    model.delete_adapter("default")
    assert distance(logits(model), live["other"]) < 1e-5
    model.save_pretrained(tmp_path / "left")
    assert all("default" not in layer.lora_variant for layer in lora_layers(model).values())


@forms
def test_a_plain_adapter_is_loaded_beside_it(form: Callable, tmp_path: Path) -> None:
    base = llama()
    model = form(started(base))
    train(model)
    live = logits(model)
    lora_init.save_adapter(model, tmp_path)
    model.load_adapter(tmp_path, "plain")
    model.set_adapter("plain")
    assert distance(logits(model), live) < 1e-5
    model.add_weighted_adapter(["plain"], [2.0], "twice")
    with pytest.raises(LoraInitError, match="knows B A only: save it with save_adapter"):
        model.add_weighted_adapter(["plain", "default"], [1.0, 1.0], "sum")


@forms
def test_reference_copies_as_trl_makes_them(form: Callable) -> None:
    base = llama(bias=True)
    model = form(started(base))
    train(model)
    before = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    assert torch.equal(logits(model), logits(base))
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    assert torch.equal(logits(model), before)
    model.set_adapter("default")
    train(model)
    assert not torch.equal(logits(model), before)
    model.set_adapter("ref")
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


@forms
def test_a_reference_copy_whose_values_come_later(form: Callable) -> None:
    base = llama()
    model = form(started(base))
    train(model)
    state = get_peft_model_state_dict(model)
    model.add_adapter("ref", model.peft_config["default"], low_cpu_mem_usage=True)
    for layer in lora_layers(model).values():
        assert layer.lora_A["ref"].weight.is_meta
        assert not layer.lora_variant["ref"].A0.is_meta
    set_peft_model_state_dict(model, state, "ref", low_cpu_mem_usage=True)
    live = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), live)
    assert distance(merged(model), live) < 1e-5


@forms
def test_trl_s_dpo_trainer(form: Callable, tmp_path: Path) -> None:
    """It adds a reference adapter and copies the parameters into it."""
    trl = pytest.importorskip("trl", reason="needs trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w0"
    )
    base = llama(bias=True)
    model = form(started(base))
    train(model)
    arguments = trl.DPOConfig(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    rows = [{"prompt": "w5 w6", "chosen": " w8 w9", "rejected": " w3 w4"}] * 6
    run = trl.DPOTrainer(
        model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6)  # model and reference are the same
    assert losses[-1] < 0.9 * losses[0]
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "checkpoint-3").eval()
    assert distance(logits(stock), logits(model.eval())) < 1e-5


def test_an_equal_config_of_its_own_makes_a_plain_adapter() -> None:
    model = started(llama())
    model.add_adapter("plain", copy.deepcopy(model.peft_config["default"]))
    assert set(model.lora_init_starts) == {"default"}
    assert all("plain" not in layer.lora_variant for layer in lora_layers(model).values())


@forms
def test_initialised_again(form: Callable, tmp_path: Path) -> None:
    base = llama()
    model = form(started(base))
    train(model)
    initialize(model, "pissa")
    assert torch.equal(logits(model), logits(base))
    assert model.lora_init_starts["default"].method == "pissa"
    train(model)
    initialize(model, "lora")
    assert torch.equal(logits(model), logits(base))
    train(model)
    live = logits(model)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert distance(logits(stock), live) < 1e-5
    assert not (tmp_path / "lora_init").exists()


def deleted(model: PeftModel) -> None:
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], r=4))
    model.set_adapter("other")
    model.delete_adapter("default")


@pytest.mark.parametrize("forget", [deleted, lambda m: initialize(m, "lora")], ids=["", "lora"])
def test_without_a_start_the_model_is_peft_s_again(forget: Callable) -> None:
    base = llama()
    model = adapted(base)
    own = type(model)
    initialize(model)
    forget(model)
    assert type(model) is own
    assert torch.equal(logits(model), logits(base))
    lora_init.initialize(model, "pissa", cache=False)  # a stored residual is refused no more
    assert distance(logits(model), logits(base)) < 2e-5


# What would have changed the base


def other_adapter(model: PeftModel) -> None:
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))


@forms
@pytest.mark.parametrize(
    ("config", "prepare"),
    [
        pytest.param({"target_modules": ["lm_head", "q_proj"]}, None, id="tied_head"),
        pytest.param({}, share_weights, id="shared"),
        pytest.param({}, share_views, id="overlapping_views"),
        pytest.param({}, other_adapter, id="second_adapter"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns of tied targets
def test_bases_that_must_not_change(
    form: Callable, config: dict[str, Any], prepare: Callable | None
) -> None:
    model = form(adapted(llama(tied=True), **config))
    if prepare:
        prepare(model)
    for layer in lora_layers(model).values():
        layer.base_layer.weight.requires_grad_(False)
    before = base_of(model)
    with model.disable_adapter():
        want = logits(model)
    initialize(model)
    assert torch.equal(logits(model), want)
    train(model)
    assert all(torch.equal(t, before[name]) for name, t in base_of(model).items())


def quantised(base: nn.Module, bits: int) -> nn.Module:
    """As `from_pretrained` with a BitsAndBytesConfig makes it."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    for name, module in list(base.named_modules()):
        if name.endswith("proj"):
            shape = (module.in_features, module.out_features, module.bias is not None)
            if bits == 4:
                new = bnb.nn.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(module.weight.data, False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(module.weight.data, False)
            new.bias = module.bias
            base.set_submodule(name, new.to("cpu"))
    setattr(base, f"is_loaded_in_{bits}bit", True)
    # In eval mode bitsandbytes packs 4-bit weights for inference, and they train no more.
    return base.requires_grad_(False).train()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
@forms
def test_quantised_bases_start_exactly_and_train(form: Callable, bits: int, tmp_path: Path) -> None:
    base = quantised(llama(bias=True), bits)
    want = logits(base)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=8, lora_alpha=16)
    model = form(get_peft_model(copy.deepcopy(base), config))
    layers = lora_layers(model)
    dequantised = {
        name: dequantize_bnb_weight(
            layer.base_layer.weight, getattr(layer.base_layer, "state", None)
        )
        for name, layer in layers.items()
    }
    expected = lora_init.approximate(dequantised, 8, "pissa", scaling=2.0, cache=False)
    initialize(model, "pissa")
    assert torch.equal(logits(model), want)
    for name, layer in layers.items():
        assert torch.equal(layer.lora_A["default"].weight, expected[name].A)
    losses = curve(model)
    model.train()
    assert losses[-1] < 0.9 * losses[0]
    live = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), want)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).train()
    assert distance(logits(stock), live) < 1e-5
    fresh = form(get_peft_model(copy.deepcopy(base), config))
    lora_init.resume(fresh, tmp_path)
    assert torch.equal(logits(fresh.train()), live)
    model.merge_adapter()  # rounded to so few bits again
    assert distance(logits(model), live) < (0.3 if bits == 4 else 0.1)


@pytest.mark.filterwarnings("ignore")
def test_qlora_of_a_model_that_transformers_quantised(smollm2_dir: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    base = AutoModelForCausalLM.from_pretrained(
        smollm2_dir,
        dtype=torch.float32,
        num_hidden_layers=2,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, **options),
        device_map="cpu",
    )
    base = prepare_model_for_kbit_training(base).train()
    want = logits(base)
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=8, lora_alpha=16)
    model = get_peft_model(base, config).train()
    initialize(model, "pissa")
    assert torch.equal(logits(model), want)
    losses = curve(model, 5)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_solved_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    base = quantised(llama(), 4)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=8)
    states = []
    for limit in (1 << 30, 1):
        monkeypatch.setattr(shares, "_DEQUANTISED_BYTES", limit)
        model = get_peft_model(copy.deepcopy(base), config)
        initialize(model)
        states.append({n: t for n, t in model.state_dict().items() if "lora_" in n})
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


@pytest.mark.filterwarnings("ignore")
def test_a_packed_base_is_refused() -> None:
    model = get_peft_model(quantised(llama(), 4), LoraConfig(target_modules=["q_proj"], r=8))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(LoraInitError, match="q_proj: bitsandbytes packed its weight for the CPU"):
        initialize(model)


@pytest.mark.filterwarnings("ignore")
def test_a_stored_residual_of_a_quantised_base_is_refused_with_the_way_out() -> None:
    model = get_peft_model(quantised(llama(), 4), LoraConfig(target_modules=["q_proj"], r=8))
    with pytest.raises(LoraInitError, match=r'q_proj: .*Params4bit \(quantised\).*"virtual"'):
        lora_init.initialize(model, steps=STEPS, cache=False)


@pytest.mark.filterwarnings("error::UserWarning")
def test_another_adapter_on_a_stored_residual_is_warned_of_and_a_reference_copy_is_not() -> None:
    model = adapted(llama())
    lora_init.initialize(model, "pissa", cache=False)
    model.add_adapter("ref", model.peft_config["default"])
    with pytest.warns(UserWarning, match="'other' is added to the residual of adapter default"):
        other_adapter(model)


# Refused


@pytest.mark.parametrize(
    ("prepare", "call", "message"),
    [
        (None, lambda m: lora_init.initialize(m, residual="real"), "\"virtual\", got 'real'"),
        (
            initialize,
            lora_init.initialize,
            'default needs this model\'s base as it is: .*"virtual"',
        ),
        (lora_init.initialize, initialize, "already is the residual of adapter default"),
        (nan_weight, initialize, "layers.1.self_attn.v_proj: 1 of 1152 weights are NaN"),
        (lambda m: m.merge_adapter(), initialize, "call unmerge_adapter"),
    ],
    ids=["value", "stored after", "stored before", "nan", "merged"],
)
def test_refused_and_nothing_changed(
    prepare: Callable | None, call: Callable, message: str
) -> None:
    model = adapted(llama())
    if prepare:
        prepare(model)
    before = {n: t.nan_to_num() for n, t in snapshot(model).items()}
    with pytest.raises(LoraInitError, match=message):
        call(model)
    for layer in lora_layers(model).values():
        layer.base_layer.weight.data.nan_to_num_()
    assert_unchanged(model, before)


def test_dora_is_refused_still() -> None:
    model = adapted(llama(), use_dora=True)
    with pytest.raises(LoraInitError, match="its adapter is Dora, not plain LoRA"):
        initialize(model)
