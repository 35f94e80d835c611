"""The command line end to end, on real and tiny checkpoints, against stock libraries."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    NomicBertConfig,
    NomicBertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import lora_init
from lora_init.__main__ import main as console_script
from lora_init.checkpoints import Checkpoint, read_start
from lora_init.cli import main
from lora_init.integrations.checkpoint import initialize_checkpoint
from lora_init.methods.inilora import IniLora
from lora_init.staging import PREFIX

TOKENS = torch.arange(32).reshape(2, 16)
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "vocab_size": 100}
STEPS = ("--steps", "20")


def save(model: PreTrainedModel, directory: Path, **options: object) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def llama_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, **HEADS, num_key_value_heads=2, initializer_range=0.1)
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(models: Path) -> Path:
    directory = save(llama_model(), models / "llama")
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def llama_sharded(models: Path) -> Path:
    directory = save(llama_model(), models / "llama-sharded", max_shard_size="40KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


@pytest.fixture(scope="module")
def llama_bf16(models: Path) -> Path:
    return save(llama_model().to(torch.bfloat16), models / "llama-bf16")


@pytest.fixture(scope="module")
def gpt2(models: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
    return save(GPT2LMHeadModel(config), models / "gpt2")


def cli(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def run(model: Path, out: Path, *arguments: object) -> dict:
    """`lora-init run` that must succeed; returns report.json."""
    assert cli("run", model, "--out", out, *arguments) == 0
    return json.loads((out / "report.json").read_text())


def files(directory: Path) -> set[Path]:
    return {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    result = model.eval()(TOKENS)
    return result.logits if "logits" in result else result[0]


def assert_close(one: Tensor, other: Tensor, limit: float = 1e-4) -> None:
    assert (one - other).abs().max() <= limit * other.abs().max()


def stock(out: Path, model_class: type = AutoModel, **options: object) -> PeftModel:
    residual = model_class.from_pretrained(out / "residual", **options)
    return PeftModel.from_pretrained(residual, out / "adapter")


CASES = {
    "minilm": ("minilm_dir", AutoModel, ["query", "value"], []),
    "llama": ("llama", LlamaForCausalLM, ["q_proj", "v_proj"], []),
    "gpt2": ("gpt2", GPT2LMHeadModel, ["c_attn"], []),
    "gpt2_mlp": ("gpt2", GPT2LMHeadModel, ["c_attn", "c_fc"], ["--target-modules", "c_attn,c_fc"]),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_what_initialize_gives_and_load_with_stock_peft(
    name, request, tmp_path, capsys
):
    fixture, model_class, modules, arguments = CASES[name]
    source = request.getfixturevalue(fixture)
    capsys.readouterr()  # transformers' bar of saving it
    out = tmp_path / "out"
    report = run(source, out, "-r", 4, "--alpha", 8, *STEPS, *arguments, "--seed", 3, "--no-cache")
    captured = capsys.readouterr()
    assert report["layers"][0]["name"] in captured.out
    assert captured.out.splitlines()[-4:] == [
        str(out / name) for name in ("adapter", "residual", "report.json", "report.png")
    ]
    assert captured.err == ""

    base = model_class.from_pretrained(source)
    expected = output(base)
    model = stock(out, model_class)
    assert_close(output(model), expected)
    assert 0 < report["output_drift"] < 1e-4
    assert model.peft_config["default"].init_lora_weights is True
    assert model.peft_config["default"].base_model_name_or_path == str(out / "residual")

    live = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=modules))
    lora_init.initialize(live, steps=20, seed=3, cache=False)
    for (key, mine), (_, theirs) in zip(
        model.state_dict().items(), live.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, theirs), key

    assert all(layer["bound"] <= layer["relative_error"] for layer in report["layers"])
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_residual_holds_every_file_and_leaves_other_tensors(minilm_dir, tmp_path):
    out = tmp_path / "out"
    report = run(minilm_dir, out, "--steps", 0, "--no-check")
    assert report["output_drift"] is None
    assert files(out / "residual") == files(minilm_dir) - {Path(".gitattributes")}
    before = load_file(minilm_dir / "model.safetensors")
    after = load_file(out / "residual" / "model.safetensors")
    changed = {f"{layer['name']}.weight" for layer in report["layers"]}
    assert {key for key in before if not torch.equal(before[key], after[key])} == changed


def test_second_run_solves_nothing(llama, tmp_path, monkeypatch):
    first = run(llama, tmp_path / "one", *STEPS)
    monkeypatch.setattr(IniLora, "solve", None)
    second = run(llama, tmp_path / "two", *STEPS)
    assert not any(layer["info"]["cached"] for layer in first["layers"])
    assert all(layer["info"]["cached"] for layer in second["layers"])
    for name in ("adapter/adapter_model.safetensors", "residual/model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_sharded_and_single_give_the_same(llama, llama_sharded, tmp_path):
    run(llama, tmp_path / "one", *STEPS, "--no-cache")
    run(llama_sharded, tmp_path / "many", *STEPS, "--no-cache")
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "one" / adapter).read_bytes() == (tmp_path / "many" / adapter).read_bytes()
    one, many = (Checkpoint(tmp_path / name / "residual") for name in ("one", "many"))
    assert len(many.shards) > 2
    assert one.entries.keys() == many.entries.keys()
    assert all(torch.equal(one.tensor(key), many.tensor(key)) for key in one.entries)
    assert_close(
        output(stock(tmp_path / "many", LlamaForCausalLM)),
        output(LlamaForCausalLM.from_pretrained(llama)),
    )


def test_bf16_checkpoint_keeps_its_dtype(llama_bf16, tmp_path):
    report = run(llama_bf16, tmp_path / "out", *STEPS)
    residual = load_file(tmp_path / "out" / "residual" / "model.safetensors")
    assert {tensor.dtype for tensor in residual.values()} == {torch.bfloat16}
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert 0 < report["output_drift"] < 0.05
    model = stock(tmp_path / "out", LlamaForCausalLM, dtype=torch.bfloat16)
    original = LlamaForCausalLM.from_pretrained(llama_bf16, dtype=torch.bfloat16)
    assert_close(output(model), output(original), 0.05)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_residual_starts_through_resume(name, request, tmp_path):
    fixture, model_class, *_ = CASES[name]
    source, out = request.getfixturevalue(fixture), tmp_path / "out"
    report = run(source, out, *STEPS, "--residual", "none")
    assert not (out / "residual").exists()
    assert any("lora_init.resume" in note for note in report["notes"])
    base = model_class.from_pretrained(source)
    expected = output(base)
    config = LoraConfig.from_pretrained(out / "adapter")
    assert config.base_model_name_or_path is None
    model = get_peft_model(base, config)
    lora_init.resume(model, out / "adapter")
    assert_close(output(model), expected)
    for layer, start in read_start(out / "adapter")[0].layers.items():
        adapted = model.get_submodule(f"base_model.model.{layer}")
        assert torch.equal(adapted.lora_A.default.weight, start.A0)
        assert start.B0.abs().max() > 0


@pytest.mark.parametrize(
    "method",
    [m for m, x in lora_init.methods().items() if x.needs == "nothing" and x.base != "replaced"],
)
def test_every_method_runs(method, llama, tmp_path):
    options = {"inilora": ("--option", "steps=5", "--option", 'init="global"', "--solver", "gd")}
    report = run(llama, tmp_path / "out", "--method", method, "-r", 2, *options.get(method, ()))
    assert report["method"] == method
    if method == "inilora":
        assert [report["options"][x] for x in ("steps", "init", "solver")] == [5, "global", "gd"]
    if method == "lora":
        assert not (tmp_path / "out" / "residual").exists()
        base = LlamaForCausalLM.from_pretrained(llama)
        expected = output(base)
        model = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
        assert model.peft_config["default"].base_model_name_or_path == str(llama)
        assert torch.equal(output(model), expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling(llama, tmp_path, rslora):
    out = tmp_path / "out"
    run(llama, out, *STEPS, "-r", 4, "--alpha", 16, *(["--rslora"] if rslora else []))
    start, _ = read_start(out / "adapter")
    assert {layer.scaling for layer in start.layers.values()} == {8.0 if rslora else 4.0}
    original = LlamaForCausalLM.from_pretrained(llama)
    assert_close(output(stock(out, LlamaForCausalLM)), output(original))


@pytest.mark.parametrize(
    ("modules", "count"),
    [("all-linear", 14), (" q_proj, mlp.up_proj", 4), ("model.layers.1.self_attn.k_proj", 1)],
)
def test_target_modules(llama, tmp_path, modules, count):
    report = run(llama, tmp_path / "out", "--steps", 1, "--target-modules", modules)
    assert len(report["layers"]) == count
    assert report["output_drift"] < 1e-5


def test_target_modules_may_be_a_pattern(llama, tmp_path):
    pattern = r".*\.layers\.1\..*_proj"
    report = initialize_checkpoint(llama, tmp_path / "out", steps=1, target_modules=pattern)
    assert len(report.layers) == 7
    config = LoraConfig.from_pretrained(tmp_path / "out" / "adapter")
    assert config.target_modules == pattern


@pytest.mark.parametrize(
    ("saved", "auto_class", "first"),
    [
        (BertForMaskedLM, "AutoModel", "encoder.layer.0.attention.self.query"),
        (BertForMaskedLM, None, "bert.encoder.layer.0.attention.self.query"),
        (BertModel, "AutoModelForMaskedLM", "bert.encoder.layer.0.attention.self.query"),
    ],
    ids=["strip", "as_it_is", "add"],
)
def test_names_are_those_of_the_class_that_is_loaded(saved, auto_class, first, tmp_path):
    save(saved(BertConfig(**SMALL, **HEADS)), tmp_path / "model")
    arguments = ["--auto-class", auto_class] if auto_class else []
    report = run(tmp_path / "model", tmp_path / "out", "--steps", 1, *arguments)
    assert report["layers"][0]["name"] == first
    assert 0 < report["output_drift"] < 1e-5


def test_modules_that_transformers_renames_on_loading(tmp_path, capsys):
    save(NomicBertModel(NomicBertConfig(**SMALL, **HEADS)), tmp_path / "model")
    keys = Checkpoint(tmp_path / "model").entries
    assert "encoder.layers.0.mlp.fc2.weight" in keys  # loaded as layers.0.mlp.down_proj
    arguments = ("--steps", 1, "--target-modules")
    report = run(tmp_path / "model", tmp_path / "out", *arguments, "down_proj", "--check")
    assert report["layers"][0]["name"] == "layers.0.mlp.down_proj"
    assert 0 < report["output_drift"] < 1e-5
    capsys.readouterr()
    arguments = ("run", tmp_path / "model", "--out", tmp_path / "o", "--target-modules", "q_proj")
    assert cli(*arguments) == 2
    assert "Wqkv.weight) and converted on loading" in capsys.readouterr().err


def test_encoder_decoder(tmp_path):
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=100)
    save(T5ForConditionalGeneration(config), tmp_path / "model")
    report = run(tmp_path / "model", tmp_path / "out", "--steps", 1)
    assert 0 < report["output_drift"] < 1e-5


def test_hub_id_from_the_local_cache(llama, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--us--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for path in llama.iterdir():
        (snapshot / path.name).symlink_to(path)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    report = run("us/tiny", tmp_path / "out", *STEPS)
    assert report["output_drift"] < 1e-5
    assert read_start(tmp_path / "out" / "adapter")[0].base_model == "us/tiny"


def test_json_is_all_there_is_on_stdout(llama, tmp_path, capsys):
    report = run(llama, tmp_path / "out", *STEPS, "--json")
    assert json.loads(capsys.readouterr().out) == report


def test_overwrite_replaces_the_outputs_of_an_earlier_run_only(llama, tmp_path):
    out = tmp_path / "out"
    run(llama, out, *STEPS)
    before = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    (out / "adapter" / "stale").write_text("")
    (out / "mine").write_text("kept")
    run(llama, out, *STEPS, "--seed", 1, "--residual", "none", "--overwrite")
    assert {p.name for p in out.iterdir()} == {"adapter", "report.json", "report.png", "mine"}
    assert not (out / "adapter" / "stale").exists()
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() != before


def test_failed_check_replaces_nothing_and_keeps_what_was_written(
    llama, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("lora_init.integrations.transformers.output_drift", lambda **_: 0.5)
    assert cli("run", llama, "--out", tmp_path / "out", *STEPS) == 1
    (kept,) = tmp_path.glob(f"{PREFIX}*")
    assert {p.name for p in kept.rglob("*") if p.is_dir()} >= {"outputs", "adapter", "residual"}
    assert [p.name for p in kept.iterdir()] == ["outputs"]
    assert not (tmp_path / "out").exists()
    assert_one_line(capsys.readouterr().err, str(kept / "outputs"))
    # Nobody takes it for a run to go on with, or removes it.
    assert cli("run", llama, "--out", tmp_path / "out", *STEPS, "--resume", "--no-check") == 0
    assert (kept / "outputs" / "adapter").exists()


def assert_one_line(err: str, message: str) -> None:
    assert err.count("\n") == 1
    assert err.startswith("lora-init: ")
    assert message in err


def change(model: Path, key: str, edit: object) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors[key] = edit(tensors[key])
    save_file(tensors, path, {"format": "pt"})


def with_nan(model: Path) -> None:
    change(
        model,
        "model.layers.1.self_attn.q_proj.weight",
        lambda t: t.index_fill(0, torch.tensor(3), torch.nan),
    )


def with_other_shape(model: Path) -> None:
    change(model, "model.layers.1.self_attn.q_proj.weight", lambda t: t[:, :16].contiguous())


def in_fp8(model: Path) -> None:
    change(model, "model.layers.0.self_attn.q_proj.weight", lambda t: t.to(torch.float8_e4m3fn))


def truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def pickled(model: Path) -> None:
    torch.save({"a": torch.zeros(2)}, model / "model.safetensors")


def pickle_only(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def configured(**changes: object) -> object:
    def edit(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def without_config(model: Path) -> None:
    (model / "config.json").unlink()


def unchanged(model: Path) -> None:
    pass


Q1 = "model.layers.1.self_attn.q_proj"
QUANTISED = {"quant_method": "gptq", "bits": 4}
BAD = {
    "method": (unchanged, ["--method", "nope"], "unknown method 'nope'; choose one of corda, "),
    "option": (unchanged, ["--option", "speed=9"], "inilora has no option 'speed'"),
    "option_form": (unchanged, ["--option", "steps"], "--option steps: must be KEY=VALUE"),
    "option_twice": (
        unchanged,
        ["--steps", 3, "--option", "steps=4"],
        "--steps 3 and --option steps=4",
    ),
    "steps": (unchanged, ["--steps", "-1"], "steps must be a whole number ≥ 0, got -1"),
    "flag": (unchanged, ["--speed"], "No such option: --speed"),
    "r_text": (unchanged, ["-r", "many"], "Invalid value for '-r'"),
    "module": (unchanged, ["--target-modules", "nope"], "linear layers are down_proj, gate_proj"),
    "one_module": (unchanged, ["--target-modules", "q_proj,vproj"], "'vproj' matches nothing"),
    "embedding": (
        unchanged,
        ["--target-modules", "embed_tokens"],
        "LoRA on Embedding is not supported",
    ),
    "norm": (unchanged, ["--target-modules", "norm"], "is not supported"),
    "tied": (
        configured(tie_word_embeddings=True),
        ["--target-modules", "lm_head"],
        "(tied weights)",
    ),
    "r_zero": (unchanged, ["-r", 0], "r must be a whole number ≥ 1, got 0"),
    "r_large": (unchanged, ["-r", 17], "r = 17 exceeds min(out, in) = 16"),
    "alpha": (unchanged, ["--alpha", 0], "the scaling must be a number > 0, got 0.0"),
    "device": (unchanged, ["--device", "warp"], "device 'warp' cannot be used"),
    "auto_class": (unchanged, ["--auto-class", "AutoNope"], "has no model class 'AutoNope'"),
    "auto_other": (unchanged, ["--auto-class", "AutoModelForMaskedLM"], "does not fit its config"),
    "cache": (unchanged, ["--cache-dir", "/dev/null/x"], "cannot write to the cache directory"),
    "nan": (with_nan, [], f"{Q1}: 32 of 1024 weights are NaN or infinite"),
    "shape": (with_other_shape, [], f"{Q1}: its weight is (32, 32) by config.json and (32, 16)"),
    "fp8": (in_fp8, [], "its weight is stored as F8_E4M3"),
    "truncated": (truncated, [], "model.safetensors: not a readable safetensors file"),
    "pickled": (pickled, [], "model.safetensors: not a readable safetensors file"),
    "pickle_only": (pickle_only, [], "only pickled weights (pytorch_model.bin)"),
    "no_config": (without_config, [], "transformers cannot read its config.json"),
    "model_type": (configured(model_type="new"), [], "transformers cannot read its config.json"),
    "architectures": (
        configured(architectures=None),
        [],
        "names no architecture: pass --auto-class",
    ),
    "custom_code": (configured(architectures=["Mine"]), [], "has no model class 'Mine'"),
    "quantised": (configured(quantization_config=QUANTISED), [], "is a quantised model"),
    "layers": (configured(num_hidden_layers=3), [], "no tensor of the checkpoint is its weight"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name, llama, tmp_path, capsys):
    damage, arguments, message = BAD[name]
    model = shutil.copytree(llama, tmp_path / "model")
    damage(model)
    assert cli("run", model, "--out", tmp_path / "out", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_one_line(captured.err, message)
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["model"]


def test_bad_places_are_refused_in_one_line(llama, llama_sharded, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "file").write_text("")
    broken = shutil.copytree(llama_sharded, tmp_path / "broken")
    next(broken.glob("model-00002-of-*")).unlink()
    run(llama, tmp_path / "done", "--steps", 0)
    inside = shutil.copytree(llama, tmp_path / "other" / "residual")
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    for model, target, message in [
        (tmp_path / "nowhere", out, "is neither a directory nor a model in the local Hugging Face"),
        ("no-such-model", out, "is neither a directory nor a model in the local Hugging Face"),
        (tmp_path / "file", out, "is a file: name the directory"),
        (broken, out, ".safetensors is missing"),
        (llama, tmp_path / "full", "is not empty (it holds mine)"),
        (llama, tmp_path / "file", "is a file: choose a directory"),
        (llama, tmp_path / "file" / "out", "cannot write to"),
        (llama, llama / "out", "lie in one another"),
        (inside, tmp_path / "other", "lie in one another"),
        (tmp_path / "done" / "residual", out, "is the residual of an earlier run"),
    ]:
        capsys.readouterr()
        assert cli("run", model, "--out", target, "--steps", 0) == 2
        assert_one_line(capsys.readouterr().err, message)
        assert sorted(tmp_path.rglob("*")) == before
    capsys.readouterr()
    assert cli("run", llama) == 2
    assert_one_line(capsys.readouterr().err, "Missing option '--out'")


def test_full_disk_is_said_before_anything_is_solved(llama, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert cli("run", llama, "--out", tmp_path / "out", *STEPS) == 2
    assert_one_line(capsys.readouterr().err, "free: free space or choose another directory")
    assert [p.name for p in tmp_path.iterdir()] == []


def test_disk_that_fills_up_costs_nothing_that_was_solved(llama, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = ("run", llama, "--out", tmp_path / "out", *STEPS, "--no-cache", "--no-check")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        assert cli(*arguments) == 2
    err = capsys.readouterr().err
    assert_one_line(err, "No space left on device")
    assert "4 finished layers are kept" in err
    assert "--resume" in err
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(IniLora, "solve", None)
        assert cli(*arguments, "--resume") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_interrupt_leaves_nothing(llama, tmp_path):
    # Long enough to be interrupted; a layer is left only at the end of 1/40 of its steps.
    command = [sys.executable, "-m", "lora_init", "run", llama, "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [*map(str, command), "--steps", "400000"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(f"{PREFIX}*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "lora-init: interrupted\n"
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_cluster_that_sets_world_size_is_not_torchrun(llama, tmp_path, monkeypatch):
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    run(llama, tmp_path / "out", "--steps", 0, "--no-check")


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "lora_init.cli")
    monkeypatch.delattr(lora_init, "cli")
    assert console_script() == 2
    assert_one_line(capsys.readouterr().err, "needs typer: pip install 'lora-init[cli]'")


def test_methods_are_listed(capsys):
    assert cli("methods") == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["method", "needs", "base", "source"]
    assert [line.split()[0] for line in lines] == list(lora_init.methods())
    starts = [header.index(title) for title in ("needs", "base", "source", "what")]
    for line, description in zip(lines, lora_init.methods().values(), strict=True):
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        assert cells == [description.needs, description.base, description.source, str(description)]
        assert all(cells)


def test_cache_is_shown_and_cleared(llama, tmp_path, capsys):
    run(llama, tmp_path / "out", *STEPS, "--cache-dir", tmp_path / "here")
    capsys.readouterr()
    assert cli("cache", "info", "--cache-dir", tmp_path / "here") == 0
    assert "4 entries" in capsys.readouterr().out
    assert cli("cache", "clear", "--cache-dir", tmp_path / "here") == 0
    assert cli("cache", "info", "--cache-dir", tmp_path / "here") == 0
    assert "removed 4 entries" in (out := capsys.readouterr().out)
    assert "0 entries, 0.0 MB" in out
    assert cli("cache", "info") == 0
    assert str(tmp_path / "cache") in capsys.readouterr().out
