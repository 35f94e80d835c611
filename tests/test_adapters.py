"""`lora-init export` and `inspect`: what they write and say, against the live model's logits."""

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_init
from lora_init import LoraInitError
from lora_init.adapters import describe, export_adapter
from lora_init.cli import main
from lora_init.integrations.checkpoint import initialize_checkpoint

TOKENS = torch.arange(32).reshape(2, 16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    directory = tmp_path_factory.mktemp("models") / "llama"
    LlamaForCausalLM(LlamaConfig(**size, **heads, initializer_range=0.1)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models") / "gpt2"
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def train(model: PeftModel) -> PeftModel:
    torch.manual_seed(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(TOKENS).logits


def assert_same_model(exported: Path, base: nn.Module, live: nn.Module) -> None:
    start = logits(base)
    model = PeftModel.from_pretrained(base, exported)
    expected = logits(live)
    assert (expected - start).abs().max() > 1e-2 * start.abs().max()  # it was trained
    assert (logits(model) - expected).abs().max() <= 1e-4 * expected.abs().max()


def export(*arguments: object) -> None:
    assert main(["export", *map(str, arguments)]) == 0


def trained_on_residual(run: Path, model_class: type, checkpoint: Path) -> PeftModel:
    residual = model_class.from_pretrained(run / "residual")
    live = train(PeftModel.from_pretrained(residual, run / "adapter", is_trainable=True))
    live.save_pretrained(checkpoint)
    return live


def test_export_of_an_initialised_models_checkpoint(llama, tmp_path):
    base = LlamaForCausalLM.from_pretrained(llama)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    lora_init.initialize(model, steps=20, cache=False)
    train(model).save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "optimizer.pt").write_text("state")

    export(tmp_path / "checkpoint", "--out", tmp_path / "plain")
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert_same_model(tmp_path / "plain", LlamaForCausalLM.from_pretrained(llama), model)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"r": 4, "lora_alpha": 8}),
        ("llama", {"r": 4, "lora_alpha": 16, "use_rslora": True}),
        ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_fc"]}),
    ],
    ids=["llama", "rslora", "gpt2"],
)
def test_export_of_stock_training_on_the_residual(name, options, request, tmp_path):
    source = request.getfixturevalue(name)
    model_class = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}[name]
    initialize_checkpoint(source, tmp_path / "run", steps=20, cache=False, check=False, **options)
    live = trained_on_residual(tmp_path / "run", model_class, tmp_path / "checkpoint")

    export(tmp_path / "checkpoint", "--out", tmp_path / "plain")
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    config = LoraConfig.from_pretrained(tmp_path / "plain")
    assert config.r == config.lora_alpha == 2 * options["r"]
    assert config.base_model_name_or_path == str(source)
    assert_same_model(tmp_path / "plain", model_class.from_pretrained(source), live)


def test_export_after_the_run_moved(llama, tmp_path, capsys):
    initialize_checkpoint(llama, tmp_path / "run", r=4, steps=20, cache=False, check=False)
    live = trained_on_residual(tmp_path / "run", LlamaForCausalLM, tmp_path / "checkpoint")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert main(["export", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "plain")]) == 2
    assert "pass --initial" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()
    initial = ("--initial", moved / "adapter")
    export(tmp_path / "checkpoint", "--out", tmp_path / "plain", *initial)
    assert_same_model(tmp_path / "plain", LlamaForCausalLM.from_pretrained(llama), live)

    # Exporting what is plain already must not subtract the start once more.
    export(tmp_path / "plain", "--out", tmp_path / "again", *initial)
    one, other = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("plain", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_export_with_another_config_and_more_trained_keys(llama, tmp_path):
    """A fresh adapter of another rank, scaling and bias on the residual, and a trained head."""
    initialize_checkpoint(llama, tmp_path / "run", r=4, steps=20, cache=False, check=False)
    residual = LlamaForCausalLM.from_pretrained(tmp_path / "run" / "residual")
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        lora_bias=True,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 5},
        alpha_pattern={"v_proj": 7},
        modules_to_save=["lm_head"],
    )
    live = train(get_peft_model(residual, config))
    live.save_pretrained(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", "--out", tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert any("lm_head" in key for key in tensors)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), tmp_path / "plain")
    expected = logits(live)
    assert (logits(model) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_export_of_the_untrained_start_changes_nothing(llama, tmp_path):
    initialize_checkpoint(llama, tmp_path / "run", r=4, steps=20, cache=False, check=False)
    export(tmp_path / "run" / "adapter", "--out", tmp_path / "plain")
    base = LlamaForCausalLM.from_pretrained(llama)
    expected = logits(base)
    model = PeftModel.from_pretrained(base, tmp_path / "plain")
    assert (logits(model) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_export_refuses_what_it_cannot_do(llama, tmp_path):
    initialize_checkpoint(llama, tmp_path / "run", r=4, steps=0, cache=False, check=False)
    initial = tmp_path / "run" / "adapter"
    out = tmp_path / "out"

    def saved(name: str, config: object) -> Path:
        base = LlamaForCausalLM.from_pretrained(llama)
        get_peft_model(base, config).save_pretrained(tmp_path / name)
        return tmp_path / name

    modules = ["q_proj", "v_proj"]
    plain = saved("plain", LoraConfig(target_modules=modules))
    dora = saved("dora", LoraConfig(target_modules=modules, use_dora=True))
    fewer = saved("fewer", LoraConfig(target_modules=["q_proj"]))
    more = saved("more", LoraConfig(target_modules=[*modules, "k_proj"]))
    hollow = saved("hollow", LoraConfig(target_modules=modules))
    tensors = load_file(hollow / "adapter_model.safetensors")
    empty = {key: torch.empty(0) for key in tensors}  # as an ungathered ZeRO-3 model is saved
    save_file(empty, hollow / "adapter_model.safetensors")
    ia3 = saved("ia3", IA3Config(target_modules=modules, feedforward_modules=[]))
    for checkpoint, start, message in [
        (tmp_path / "run", None, "no adapter_config.json here"),
        (plain, None, "trained on the original base is plain already"),
        (plain, plain, "no lora_init/start.safetensors here"),
        (dora, initial, "lora_magnitude_vector.* is not plain LoRA"),
        (fewer, initial, "v_proj: .* has no LoRA for it"),
        (more, initial, "k_proj.* is not plain LoRA on a layer of"),
        (hollow, initial, r"A \(0,\) and B \(0,\) .* do not fit"),
        (ia3, initial, "is a .*IA3 adapter, not LoRA"),
    ]:
        with pytest.raises(LoraInitError, match=message):
            export_adapter(checkpoint, out, start)
        assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(LoraInitError, match="is not empty"):
        export_adapter(initial, out)


def test_inspect(llama, tmp_path, capsys):
    report = initialize_checkpoint(
        llama, tmp_path / "run", r=4, lora_alpha=8, steps=7, seed=5, cache=False
    )
    get_peft_model(
        LlamaForCausalLM.from_pretrained(llama), LoraConfig(r=3, target_modules=["q_proj"])
    ).save_pretrained(tmp_path / "plain")
    for directory, expected in [
        ("run", [str(report)]),
        ("run/adapter", ["inilora", "4 layers", "seed 5", "r 4", "scaling 2.0", "float32"]),
        ("run/adapter", [str(llama), "steps=7", "model.layers.0.self_attn.q_proj"]),
        ("plain", ["plain LORA adapter", "r 3", "4 tensors", "q_proj", str(llama)]),
    ]:
        assert main(["inspect", str(tmp_path / directory)]) == 0
        out = capsys.readouterr().out
        assert all(text in out for text in expected)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no adapter_config.json here"),
        ({"report.json": "{}"}, "is no report of a run"),
        ({"report.json": "["}, "is no report of a run"),
        ({"adapter_config.json": "["}, "is no PEFT config"),
        ({"adapter_config.json": "{}"}, "adapter_model.safetensors: not a readable"),
    ],
)
def test_inspect_refuses_other_directories(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(LoraInitError, match=message):
        describe(tmp_path)
