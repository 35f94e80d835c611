"""`initialize`, `save_adapter` and `resume`, against stock PEFT on the original base."""

import copy
import json
import math
import pickle
import signal
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_init
from lora_init import LoraInitError
from lora_init.integrations.peft import residual_model
from lora_init.integrations.peft.layers import lora_layers

STEPS = 50
TOKENS = torch.arange(32).reshape(2, 16)
PATTERNS = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 4},
    "alpha_pattern": {"v_proj": 5, "layers.0.self_attn.q_proj": 3},
}
CONFIGS = {
    "plain": {"r": 8, "lora_alpha": 16},
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True},
    "patterns": {"r": 8, "lora_alpha": 16, **PATTERNS},
    "rslora_patterns": {"r": 8, "lora_alpha": 16, "use_rslora": True, **PATTERNS},
    "modules_to_save": {"r": 4, "lora_alpha": 4, "modules_to_save": ["lm_head"]},
    "lora_bias": {"r": 4, "lora_alpha": 12, "lora_bias": True},
}


def llama(dtype: torch.dtype = torch.float32, bias: bool = False, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        attention_bias=bias,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted(base: nn.Module, **config: object) -> PeftModel:
    options = {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 16} | config
    return get_peft_model(copy.deepcopy(base), LoraConfig(**options)).eval()


def initialized(base: nn.Module, method: str = "inilora", **config: object) -> PeftModel:
    model = adapted(base, **config)
    lora_init.initialize(
        model, method, cache=False, **({"steps": STEPS} if method == "inilora" else {})
    )
    return model


def train(model: PeftModel, steps: int = 5) -> None:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
    for _ in range(steps):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits.float()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference relative to the logits' scale."""
    return float((one - other).abs().max() / other.abs().max())


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("method", ["inilora", "inilora_alpha", "inilora_beta", "lora"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_start_is_the_pretrained_model(method, config):
    base = llama(bias=True)
    model = initialized(base, method, **config)
    # fp32 rounding of R (its entries are up to ~4 for α) summed over 48 inputs and two layers
    assert distance(logits(model), logits(base)) < 2e-5


def test_each_layer_gets_its_own_rank_scaling_and_the_engine_s_bits():
    base = llama()
    model = initialized(base, **CONFIGS["rslora_patterns"])
    layers = lora_layers(model)
    assert {name: layer.r["default"] for name, layer in layers.items()} == {
        "model.layers.0.self_attn.q_proj": 8,
        "model.layers.0.self_attn.v_proj": 8,
        "model.layers.1.self_attn.q_proj": 4,
        "model.layers.1.self_attn.v_proj": 8,
    }
    weights = {name: base.get_submodule(name).weight for name in layers}
    expected = lora_init.approximate(
        weights,
        r={name: layer.r["default"] for name, layer in layers.items()},
        scaling={name: layer.scaling["default"] for name, layer in layers.items()},
        steps=STEPS,
        cache=False,
    )
    for name, layer in layers.items():
        assert torch.equal(layer.lora_A["default"].weight, expected[name].A)
        assert torch.equal(layer.lora_B["default"].weight, expected[name].B)
        exact = weights[name].double() - layer.scaling["default"] * (
            expected[name].B.double() @ expected[name].A.double()
        )
        assert torch.equal(layer.get_base_layer().weight, exact.float())


def test_conv1d_of_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=100, n_positions=32)
    base = GPT2LMHeadModel(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it sets fan_in_fan_out
        model = adapted(base, target_modules=["c_attn"])
    report = lora_init.initialize(model, "inilora", steps=STEPS, cache=False)
    assert report.layers[0].shape == (144, 48)
    assert distance(logits(model), logits(base)) < 1e-5
    weights = {name: base.get_submodule(name).weight.T for name in ["transformer.h.0.attn.c_attn"]}
    # alone, σ is the mean over one layer instead of two: the same to three decimals
    (expected,) = lora_init.approximate(
        weights, r=8, scaling=2.0, steps=STEPS, cache=False
    ).values()
    layer = model.get_submodule("base_model.model.transformer.h.0.attn.c_attn")
    assert torch.equal(layer.lora_A["default"].weight, expected.A)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("autocast", [True, False], ids=["fp32_adapter", "same_dtype_adapter"])
def test_half_precision_base(dtype, autocast):
    base = llama(dtype)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=8, lora_alpha=16)
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=autocast).eval()
    report = lora_init.initialize(model, "inilora", steps=STEPS, cache=False)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert layer.get_base_layer().weight.dtype == dtype
    assert layer.lora_A["default"].weight.dtype == (torch.float32 if autocast else dtype)
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().double()
    A = layer.lora_A["default"].weight.detach().double()
    B = layer.lora_B["default"].weight.detach().double()
    error = layer.get_base_layer().weight.detach().double() + 2.0 * B @ A - weight
    # one rounding of R to nearest, whatever the adapter's dtype
    assert error.abs().max() <= torch.finfo(dtype).eps / 2 * (weight - 2.0 * B @ A).abs().max()
    assert report.layers[0].start_error == pytest.approx(float(error.abs().max()), rel=1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_saved_adapter_fits_the_original_base(config, tmp_path):
    base = llama(bias=True)
    model = initialized(base, **config)
    train(model)
    live = logits(model)
    assert distance(live, logits(base)) > 1e-2  # it learned something
    lora_init.save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "checkpoint")
    for folder in ("adapter", "checkpoint"):
        stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
        assert distance(logits(stock), live) < 1e-5
        written = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert written["init_lora_weights"] is True
        assert written["use_rslora"] is False
        assert written["lora_alpha"] == written["r"]
        assert written["alpha_pattern"] == written["rank_pattern"]
        assert {layer.scaling["default"] for layer in lora_layers(stock).values()} == {1.0}
    assert not (tmp_path / "adapter" / "lora_init").exists()
    merged = model.merge_and_unload()
    assert distance(logits(merged), live) < 1e-5


def test_saved_files_are_what_peft_would_write_and_no_other(tmp_path):
    model = initialized(llama())
    model.save_pretrained(tmp_path)
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lora_init/start.safetensors",
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tuple(t.shape) for n, t in tensors.items() if "lora_A" in n} == {(16, 48)}


def test_another_adapter_name_goes_where_peft_puts_it(tmp_path):
    base = llama()
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], r=4), adapter_name="mine"
    )
    lora_init.initialize(model, steps=STEPS, cache=False)
    train(model)
    model.save_pretrained(tmp_path / "checkpoint")
    lora_init.save_adapter(model, tmp_path / "adapter")
    for folder in (tmp_path / "checkpoint" / "mine", tmp_path / "adapter"):
        stock = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        assert distance(logits(stock), logits(model)) < 1e-5
    assert not (tmp_path / "adapter" / "mine").exists()
    live = logits(model)
    train(model)
    model.load_adapter(tmp_path / "checkpoint" / "mine", "mine", is_trainable=True)
    assert torch.equal(logits(model), live)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_resume_on_a_fresh_base_is_exact(config, tmp_path):
    base = llama(bias=True)
    model = initialized(base, **config)
    train(model)
    model.save_pretrained(tmp_path)
    fresh = adapted(base, **config)
    lora_init.resume(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    assert_unchanged(fresh, snapshot(model))
    train(model, 2)
    train(fresh, 2)
    assert torch.equal(logits(fresh), logits(model))
    fresh.save_pretrained(tmp_path / "again")
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    assert distance(logits(stock), logits(model)) < 1e-5


def test_load_adapter_goes_back_to_a_checkpoint(tmp_path):
    model = initialized(llama())
    train(model)
    live = logits(model)
    model.save_pretrained(tmp_path)
    train(model)
    result = model.load_adapter(tmp_path, "default")
    assert not result.unexpected_keys
    assert torch.equal(logits(model), live)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_what_saving_needs(copied, tmp_path):
    base = llama()
    model = initialized(base)
    other = copied(model)
    assert isinstance(other, PeftModel)
    train(other)
    other.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert distance(logits(stock), logits(other)) < 1e-5
    assert distance(logits(model), logits(base)) < 1e-5  # the first model did not move


def test_the_lora_start_is_left_to_stock_peft(tmp_path):
    base = llama()
    model = initialized(base, "lora")
    train(model)
    lora_init.save_adapter(model, tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(stock), logits(model))
    assert not (tmp_path / "lora_init").exists()


def test_lora_start_has_peft_s_distribution():
    model = initialized(llama(), "lora")
    A = (
        model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        .lora_A["default"]
        .weight
    )
    A = A.detach()
    bound = 1 / math.sqrt(48)  # kaiming_uniform(a=√5)
    assert A.abs().max() <= bound
    assert A.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_report_and_example(capsys):
    model = adapted(llama())
    model.train()
    report = lora_init.initialize(
        model, steps=STEPS, cache=False, example={"input_ids": TOKENS}, seed=3
    )
    assert model.training
    assert report.output_drift < 1e-5
    assert report.seed == 3
    assert report.layers[0].name == "model.layers.0.self_attn.q_proj"
    assert all(layer.start_drift < 1e-6 for layer in report.layers)
    assert "weight_decay=0" in str(report)
    assert capsys.readouterr().err == ""  # no bar where there is no terminal


def test_dropout_warning_states_the_drift_that_is_there():
    base = llama()
    model = adapted(base, lora_dropout=0.1)
    with pytest.warns(
        UserWarning, match=r"lora_dropout=0.1 adds noise of [\d.]+% .* step 0"
    ) as caught:
        lora_init.initialize(model, steps=STEPS, cache=False)
    (message,) = [str(w.message) for w in caught if "lora_dropout" in str(w.message)]
    assert "weight_decay=0" in message
    stated = float(message.split("noise of ")[1].split("%")[0]) / 100
    name = message.split("output of ")[1].split(" ")[0]
    layer = model.get_submodule(f"base_model.model.{name}")
    layer.train()
    x = torch.randn(4000, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = x @ base.get_submodule(name).weight.T
        measured = float((layer(x) - exact).norm() / exact.norm())
    assert stated == pytest.approx(measured, rel=0.05)


def test_disable_adapter_warns_that_the_base_is_a_residual():
    model = initialized(llama())
    with pytest.warns(UserWarning, match="residual base"), model.disable_adapter():
        pass


def test_ctrl_c_while_writing_leaves_a_whole_model(monkeypatch, tmp_path):
    base = llama()
    model = adapted(base)
    residual = lora_init.Factors.residual

    def interrupted(self, weight, *args, **kwargs):
        if kwargs.get("out") is not None:  # the write into the model
            signal.raise_signal(signal.SIGINT)
        return residual(self, weight, *args, **kwargs)

    monkeypatch.setattr(lora_init.Factors, "residual", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lora_init.initialize(model, steps=STEPS, cache=False)
    assert distance(logits(model), logits(base)) < 1e-5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert distance(logits(loaded), logits(base)) < 1e-5


def test_ctrl_c_while_solving_changes_nothing(monkeypatch):
    model = adapted(llama())
    before = snapshot(model)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_init.solve.descent.descend", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lora_init.initialize(model, steps=STEPS, cache=False)
    assert_unchanged(model, before)
    assert type(model) is type(adapted(llama()))


def nan_weight(model):
    model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj").base_layer.weight.data[
        3, 5
    ] = math.nan


def other_adapter(model):
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))


def share_weights(model):
    layers = model.base_model.model.model.layers
    layers[1].self_attn.q_proj.base_layer.weight = layers[0].self_attn.q_proj.base_layer.weight


def share_views(model):
    layers = model.base_model.model.model.layers
    whole = torch.randn(2 * 48 - 8, 48)
    layers[0].self_attn.q_proj.base_layer.weight = nn.Parameter(whole[:48])
    layers[1].self_attn.q_proj.base_layer.weight = nn.Parameter(whole[40:88])


REFUSED = {
    "dora": ({"use_dora": True}, None, r"layers.0.self_attn.q_proj: its adapter is Dora"),
    "embedding": ({"target_modules": ["embed_tokens"]}, None, r"embed_tokens: LoRA on Embedding"),
    "tied_head": ({"target_modules": ["lm_head"]}, None, r"lm_head: its weight is shared with"),
    "pissa_before": ({"init_lora_weights": "pissa"}, None, "'pissa', which already changed"),
    "olora_before": ({"init_lora_weights": "olora"}, None, "'olora', which already changed"),
    "moe_parameters": (
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
        None,
        "ParamWrapper",
    ),
    "rank_too_large": ({"rank_pattern": {"v_proj": 25}}, None, r"v_proj: r = 25 exceeds .* = 24"),
    "zero_alpha": ({"lora_alpha": 0}, None, r"q_proj: the scaling must be .* got 0"),
    "nan": ({}, nan_weight, r"layers.1.self_attn.v_proj: 1 of 1152 weights are NaN"),
    "second_adapter": ({}, other_adapter, "adapter 'other' shares it"),
    "merged": ({}, lambda m: m.merge_adapter(), "call unmerge_adapter"),
    "shared": ({}, share_weights, "its weight is shared with model.layers.1.self_attn.q_proj"),
    "overlapping_views": ({}, share_views, "its weight is shared with model.layers.1"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "prepare", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name_and_nothing_changed(config, prepare, message):
    model = adapted(llama(tied=True), **config)
    if prepare:
        prepare(model)
    before = snapshot(model)
    with pytest.raises(LoraInitError, match=message):
        lora_init.initialize(model, steps=STEPS, cache=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) or tensor.isnan().any()


def test_conv2d_and_meta_are_refused_by_name():
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8)), LoraConfig(target_modules=["0"], r=2)
    )
    with pytest.raises(LoraInitError, match="0: LoRA on Conv2d"):
        lora_init.initialize(model, steps=STEPS)
    with torch.device("meta"):
        model = adapted(llama())
    with pytest.raises(LoraInitError, match=r"layers.0.self_attn.q_proj: .* meta device"):
        lora_init.initialize(model, steps=STEPS)


def test_a_quantised_weight_is_refused_by_name():
    model = adapted(llama())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    layer.weight = nn.Parameter(torch.zeros(48, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        LoraInitError, match=r"q_proj: its base weight is a Parameter of torch.int8"
    ):
        lora_init.initialize(model, steps=STEPS)


def test_twice_is_refused():
    model = initialized(llama())
    before = snapshot(model)
    with pytest.raises(LoraInitError, match="already is the residual of adapter default"):
        lora_init.initialize(model, steps=STEPS, cache=False)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: lora_init.initialize(m.get_base_model()),
            "a peft.PeftModel is needed, got Llama",
        ),
        (lambda m: lora_init.initialize(m, adapter_name="nope"), "no adapter 'nope'.* default"),
        (lambda m: lora_init.initialize(m, "nope"), "unknown method 'nope'; choose .*inilora"),
        (lambda m: lora_init.initialize(m, stepps=3), "inilora has no option 'stepps'.*steps"),
        (lambda m: lora_init.initialize(m, steps=-1), "steps must be a whole number ≥ 0, got -1"),
    ],
    ids=["not_peft", "adapter", "method", "option", "value"],
)
def test_bad_calls(call, message):
    model = adapted(llama())
    before = snapshot(model)
    with pytest.raises(LoraInitError, match=message):
        call(model)
    assert_unchanged(model, before)


def test_other_peft_types_are_refused():
    model = get_peft_model(
        llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    with pytest.raises(LoraInitError, match=r"is .*IA3.*, not LoRA"):
        lora_init.initialize(model)


def test_overflowing_adapter_and_residual_leave_the_model_alone():
    base = llama(torch.float16)
    base.model.layers[1].self_attn.q_proj.weight.data[0, 0] = 6e4
    config = LoraConfig(target_modules=["q_proj"], r=4, lora_alpha=4)
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    before = snapshot(model)
    with pytest.raises(
        LoraInitError, match=r"layers.0.self_attn.q_proj: factor A is not finite in torch.float16"
    ):
        lora_init.initialize(model, "inilora_alpha", sigma=1e6, cache=False)
    assert_unchanged(model, before)
    model = get_peft_model(copy.deepcopy(base), config)
    before = snapshot(model)
    with pytest.raises(LoraInitError, match=r"overflows torch\.float16"):
        lora_init.initialize(model, "inilora_alpha", sigma=300.0, cache=False)
    assert_unchanged(model, before)


def test_a_start_far_from_the_weight_warns_and_then_refuses():
    with pytest.warns(UserWarning, match=r"bfloat16, the residual starts \d.\d% away"):
        initialized(llama(torch.bfloat16), "inilora_alpha", target_modules=["q_proj"])
    model = adapted(llama(torch.bfloat16))
    before = snapshot(model)
    with pytest.raises(LoraInitError, match="keep this base in float32"):
        lora_init.initialize(model, "inilora_alpha", sigma=1.5, cache=False)
    assert_unchanged(model, before)


class TestDamagedCheckpoints:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        model = initialized(llama())
        train(model)
        model.save_pretrained(tmp_path)
        return tmp_path

    def refuse(self, checkpoint: Path, message: str, **config: object) -> None:
        model = adapted(llama(), **config)
        before = snapshot(model)
        with pytest.raises(LoraInitError, match=message):
            lora_init.resume(model, checkpoint)
        assert_unchanged(model, before)
        assert not isinstance(model, residual_model.ResidualModel)

    def test_no_sidecar(self, checkpoint):
        (checkpoint / "lora_init" / "start.safetensors").unlink()
        self.refuse(checkpoint, "not a checkpoint of an initialised model")

    def test_truncated_sidecar(self, checkpoint):
        path = checkpoint / "lora_init" / "start.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        self.refuse(checkpoint, "start.safetensors: not a readable safetensors file")

    def test_pickle_in_place_of_safetensors(self, checkpoint):
        torch.save({"a": torch.zeros(2)}, checkpoint / "lora_init" / "start.safetensors")
        self.refuse(checkpoint, "not a readable safetensors file .* pickle")

    def test_foreign_safetensors(self, checkpoint):
        save_file({"a": torch.zeros(2)}, checkpoint / "lora_init" / "start.safetensors")
        self.refuse(checkpoint, "not a lora-init sidecar")

    def test_truncated_adapter(self, checkpoint):
        path = checkpoint / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        self.refuse(checkpoint, "adapter_model.safetensors: not a readable")

    def test_adapter_of_another_save(self, checkpoint, tmp_path):
        path = checkpoint / "adapter_model.safetensors"
        save_file({n: t + 1 for n, t in load_file(path).items()}, path)
        self.refuse(checkpoint, "are not of one save")

    def test_other_rank(self, checkpoint):
        self.refuse(checkpoint, r"r and scaling are \(4, 4.0\) here and \(8, 2.0\) in", r=4)

    def test_other_targets(self, checkpoint):
        self.refuse(checkpoint, "adapt different layers", target_modules=["q_proj"])

    def test_other_base(self, checkpoint):
        model = adapted(llama(torch.bfloat16))
        with pytest.raises(
            LoraInitError,
            match=r"q_proj: the base weight is not .* \(it was float32, this is bfloat16\)",
        ):
            lora_init.resume(model, checkpoint)

    def test_other_start(self, checkpoint):
        model = adapted(llama())
        lora_init.initialize(model, steps=STEPS, seed=1, cache=False)
        before = snapshot(model)
        with pytest.raises(
            LoraInitError, match=r"other factors \(inilora, seed 0\) .* \(inilora, seed 1\)"
        ):
            model.load_adapter(checkpoint, "default")
        assert_unchanged(model, before)

    def test_plain_adapter_on_a_residual_base(self, checkpoint, tmp_path):
        model = initialized(llama())
        lora_init.save_adapter(model, tmp_path / "plain")
        with pytest.raises(LoraInitError, match="a plain adapter belongs on the original base"):
            model.load_adapter(tmp_path / "plain", "default")

    def test_second_adapter_on_a_residual_base(self, checkpoint):
        model = initialized(llama())
        with pytest.raises(LoraInitError, match="would be added to R instead of W"):
            model.load_adapter(checkpoint, "second")


def test_pickles_and_peft_s_own_conversion_are_refused(tmp_path):
    model = initialized(llama())
    with pytest.raises(LoraInitError, match="writes pickles"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(LoraInitError, match="is not needed"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="x")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = initialized(llama())
    model.save_pretrained(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    train(model)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(residual_model, "write_start", full)
    with pytest.raises(LoraInitError, match=r"cannot write to .* No space left"):
        model.save_pretrained(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (tmp_path / "file").touch()
    with pytest.raises(LoraInitError, match="cannot write to"):
        lora_init.save_adapter(model, tmp_path / "file")
