"""`Checkpoint` and what is written of it, and a `Start` there and back."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_init import Factors, LoraInitError
from lora_init.checkpoints import (
    Checkpoint,
    Start,
    copy_other_files,
    read_start,
    write_shard,
    write_start,
)
from lora_init.methods import Layer, resolve_method

TENSORS = {
    "a.weight": torch.randn(3, 5),
    "a.bias": torch.arange(7, dtype=torch.int64),
    "b.weight": torch.randn(4, 6).to(torch.bfloat16),
    "b.scalar": torch.tensor(2.5, dtype=torch.float16),
    "c.weight": torch.randn(2, 3).to(torch.float8_e4m3fn),
}


def single(directory: Path) -> Path:
    directory.mkdir()
    save_file(TENSORS, directory / "model.safetensors", {"format": "pt", "made by": "us"})
    return directory


def sharded(directory: Path) -> Path:
    directory.mkdir()
    files = {key: f"model-0000{1 + (key[0] > 'a')}-of-00002.safetensors" for key in TENSORS}
    for name in set(files.values()):
        part = {key: TENSORS[key] for key in TENSORS if files[key] == name}
        save_file(part, directory / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.float(), other.float())


def write_residual(model: Path, out: Path, residuals: dict[str, Callable[[], Tensor]]) -> None:
    checkpoint = Checkpoint(model)
    for directory in (out, out.parent / "scratch"):
        directory.mkdir()
    copy_other_files(checkpoint, out)
    for shard in checkpoint.shards:
        own = {k: r for k, r in residuals.items() if checkpoint.entries[k].shard == shard}
        write_shard(checkpoint, shard, out, own, out.parent / "scratch")
    assert not list((out.parent / "scratch").iterdir())


@pytest.mark.parametrize("layout", [single, sharded])
def test_tensors_are_read_one_by_one(tmp_path, layout):
    checkpoint = Checkpoint(layout(tmp_path / "model"))
    assert checkpoint.entries.keys() == TENSORS.keys()
    assert checkpoint.elements == 15 + 7 + 24 + 1 + 6
    assert checkpoint.size == sum(
        p.stat().st_size for p in (tmp_path / "model").glob("*.safetensors")
    )
    for key, tensor in TENSORS.items():
        assert checkpoint.entries[key].shape == tuple(tensor.shape)
        assert same(checkpoint.tensor(key), tensor)
        assert checkpoint.tensor(key).data_ptr() % 64 == 0


def test_read_tensors_hold_no_file_and_no_more_than_themselves(tmp_path):
    source = single(tmp_path / "model")
    tensor = Checkpoint(source).tensor("a.weight")
    tensor.zero_()
    assert same(load_file(source / "model.safetensors")["a.weight"], TENSORS["a.weight"])
    assert str(source) not in Path("/proc/self/maps").read_text()


def test_a_shard_shorter_than_its_header_says_is_truncated(tmp_path):
    source = single(tmp_path / "model")
    checkpoint = Checkpoint(source)
    entry = checkpoint.entries["a.weight"]
    size = checkpoint.size
    checkpoint.entries["a.weight"] = replace(entry, offset=size - 20)
    with pytest.raises(LoraInitError, match=r"model\.safetensors is truncated: it ends 40 bytes"):
        checkpoint.tensor("a.weight")


def rewritten(shard: Path) -> None:
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content)


def shortened(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 1)


def touched(shard: Path) -> None:
    os.utime(shard, (1, 1))


@pytest.mark.parametrize(
    ("change", "what"), [(rewritten, "time of change"), (shortened, "size"), (touched, "time")]
)
def test_changed_shards_are_neither_read_nor_written(tmp_path, change, what):
    checkpoint = Checkpoint(sharded(tmp_path / "model"))
    entry = checkpoint.entries["a.weight"]
    change(entry.shard)
    message = rf"00001-of-00002\.safetensors changed during the run \({what}"
    with pytest.raises(LoraInitError, match=message):
        checkpoint.tensor("a.weight")
    with pytest.raises(LoraInitError, match=message):
        write_shard(checkpoint, entry.shard, tmp_path, {}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert same(checkpoint.tensor("b.weight"), TENSORS["b.weight"])
    entry.shard.unlink()
    with pytest.raises(LoraInitError, match=r"a\.weight cannot be read"):
        checkpoint.tensor("a.weight")


@pytest.mark.parametrize("layout", [single, sharded])
def test_residual_replaces_its_tensors_and_nothing_else(tmp_path, layout):
    source = layout(tmp_path / "model")
    for name in ("config.json", "vocab.txt", "1_Pooling/config.json", "original/params.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    for name in ("model.onnx", "pytorch_model.bin", "consolidated.00.pth", "onnx/model.onnx_data"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("other weights")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("hidden")

    new = {"a.weight": torch.randn(5, 3).T, "b.weight": torch.randn(4, 6).to(torch.bfloat16)}
    calls = []
    residuals = {key: lambda key=key: calls.append(key) or new[key] for key in new}
    write_residual(source, tmp_path / "out", residuals)

    assert sorted(calls) == sorted(new)
    written = Checkpoint(tmp_path / "out")
    for key, tensor in TENSORS.items():
        assert same(written.tensor(key), new.get(key, tensor))
    for shard in Checkpoint(source).shards:
        with (
            safe_open(shard, "pt") as one,
            safe_open(tmp_path / "out" / shard.name, "pt") as other,
        ):
            assert one.metadata() == other.metadata()
            assert one.offset_keys() == other.offset_keys()
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    shards = {shard.name for shard in written.shards}
    index = {"model.safetensors.index.json"} if layout is sharded else set()
    others = {"config.json", "vocab.txt", "1_Pooling/config.json", "original/params.json"}
    assert names == shards | index | others
    assert (tmp_path / "out" / "vocab.txt").read_text() == "vocab.txt"


def test_written_files_follow_links(tmp_path):
    # A snapshot in the Hugging Face cache is links to read-only files elsewhere.
    source = single(tmp_path / "blobs")
    (source / "model.safetensors").chmod(0o444)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(source / "model.safetensors")
    R = torch.zeros(3, 5)
    write_residual(tmp_path / "snapshot", tmp_path / "out", {"a.weight": lambda: R})
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert same(load_file(tmp_path / "out" / "model.safetensors")["a.weight"], R)
    assert same(load_file(source / "model.safetensors")["a.weight"], TENSORS["a.weight"])


def drop_shard(model: Path) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()


def truncate(model: Path) -> None:
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def pickle_instead(model: Path) -> None:
    torch.save(TENSORS, model / "model-00001-of-00002.safetensors")


def escape(model: Path) -> None:
    index = {"weight_map": {"a.weight": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def misplace(model: Path) -> None:
    path = model / "model.safetensors.index.json"
    path.write_text(
        path.read_text().replace('"b.scalar": "model-00002', '"b.scalar": "model-00001')
    )


def twice(model: Path) -> None:
    save_file(TENSORS, model / "model-00002-of-00002.safetensors")


def no_json(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("{")


def only_pickles(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()
    torch.save(TENSORS, model / "pytorch_model.bin")


def nothing(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, "00002-of-00002.safetensors is missing"),
        (truncate, "00002-of-00002.safetensors: not a readable safetensors file"),
        (pickle_instead, "00001-of-00002.safetensors: not a readable safetensors file"),
        (escape, "must give each tensor's file in this directory"),
        (misplace, "says b.scalar is in model-00001-of-00002.safetensors, where it is not"),
        (twice, "a.weight is also in|a.bias is also in"),
        (no_json, "not a readable index"),
        (only_pickles, r"only pickled weights \(pytorch_model.bin\).*convert them"),
        (nothing, "no model.safetensors and no model.safetensors.index.json here"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, damage, message):
    model = sharded(tmp_path / "model")
    damage(model)
    with pytest.raises(LoraInitError, match=message):
        Checkpoint(model).entries  # noqa: B018


def test_start_there_and_back(tmp_path):
    layers = [Layer("x.y", torch.randn(4, 6), 2, 0.5), Layer("x.z", torch.randn(3, 6), 1, 2.0)]
    factors = [
        Factors(torch.randn(x.r, 6), torch.randn(len(x.weight), x.r), x.scaling) for x in layers
    ]
    start = Start.of(resolve_method("inilora", {"steps": 3}), 7, layers, factors)
    current = {"x.y.A": torch.randn(2, 6), "x.z.bias": torch.randn(3)}
    write_start(tmp_path, start, current)
    back, tensors = read_start(tmp_path)
    assert (back.method, back.seed, back.options["steps"], back.base_model) == (
        "inilora",
        7,
        3,
        None,
    )
    for layer, stored in zip(layers, factors, strict=True):
        entry = back.layers[layer.name]
        assert torch.equal(entry.A0, stored.A)
        assert torch.equal(entry.B0, stored.B)
        assert (entry.scaling, entry.base_digest) == (layer.scaling, layer.digest)
    assert tensors.keys() == current.keys()
    assert all(torch.equal(tensors[key], current[key]) for key in current)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04pickle", None], ids=["empty", "pickle", "foreign"]
)
def test_damaged_start_is_refused(tmp_path, content):
    path = tmp_path / "lora_init" / "start.safetensors"
    path.parent.mkdir()
    if content is None:
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(LoraInitError, match=r"start\.safetensors"):
        read_start(tmp_path)
