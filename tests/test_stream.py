"""Streamed runs: interrupted anywhere they give the same files, and what goes wrong is said."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers  # noqa: F401 - so that plans are made in this process
from filelock import FileLock
from safetensors.torch import save_file

from lora_init import LoraInitError
from lora_init.checkpoints import Checkpoint, Target
from lora_init.distributed import Ranks
from lora_init.integrations import child
from lora_init.integrations.checkpoint import initialize_checkpoint
from lora_init.journal import Journal
from lora_init.methods import Layer, resolve_method
from lora_init.stream import Stream, _ahead
from tests.streaming import (
    ARGUMENTS,
    OPTIONS,
    Files,
    Mishap,
    files,
    leftovers,
    save_model,
    worker_command,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "place" / "out"


@pytest.fixture
def expected(model: Path, out: Path) -> Files:
    """What an uninterrupted run writes to `out`, which is free again."""
    initialize_checkpoint(model, out, **OPTIONS)
    found = files(out)
    shutil.rmtree(out)
    return found


@pytest.fixture
def worker(model: Path, out: Path, tmp_path: Path) -> Callable[..., Any]:
    def start(*mishaps: Mishap, more: tuple[str, ...] = ()) -> Any:
        command = worker_command(model, out, tmp_path / "plan", mishaps, more)
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=120, check=False
        )

    return start


@pytest.mark.parametrize(
    ("point", "n"),
    [("survey", 1), ("layer", 4), ("shard", 3), ("place", 1)],
)
def test_killed_run_resumes_to_the_same_bytes(point, n, model, out, expected, worker, monkeypatch):
    process = worker((0, point, n, "kill"), more=("--group-bytes", "1"))
    assert process.returncode == -9
    assert not out.exists()
    (left,) = leftovers(out)
    done = len(list((left / "layers").iterdir()))
    assert done == {"survey": 0, "layer": n - 1, "place": 8}.get(point, done)
    saved = []
    save = Journal.save_layer
    monkeypatch.setattr(
        Journal, "save_layer", lambda self, i, *rest: saved.append(i) or save(self, i, *rest)
    )
    report = initialize_checkpoint(model, out, **OPTIONS, resume=True)
    assert files(out) == expected
    assert len(saved) == 8 - done
    assert len(report.layers) == 8
    assert {p.name for p in out.iterdir()} == {"adapter", "residual", "report.json", "report.png"}
    assert not leftovers(out)


def test_the_streaming_process_imports_neither_peft_nor_transformers(model, out, expected, worker):
    process = worker()
    assert process.returncode == 0
    assert process.stderr == "imported: []\n"
    assert files(out) == expected


def test_what_needs_them_is_asked_of_a_child(model, out, expected):
    # The check too: it loads both models.
    code = (
        "import sys; from lora_init.cli import main; status = main(sys.argv[1:]); "
        "print(status, {'peft', 'transformers'} & sys.modules.keys(), file=sys.stderr)"
    )
    arguments = ["run", model, "--out", out, *ARGUMENTS, "--check"]
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stderr == "0 set()\n"
    assert json.loads((out / "report.json").read_text())["output_drift"] < 1e-5
    assert files(out) == expected


def test_child_passes_errors_on(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LoraInitError, match=r"transformers cannot read its config\.json"):
        child.call("plan", directory=str(tmp_path), auto_class=None, lora={}, shapes={})
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(LoraInitError, match=r"'plan' ended with status 1: it said nothing"):
        child.call("plan")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("group_bytes", [1, "auto"])
def test_neither_groups_nor_threads_change_a_bit(threads, group_bytes, model, out, expected):
    torch.set_num_threads(threads)
    report = initialize_checkpoint(model, out, **OPTIONS, group_bytes=group_bytes)
    assert files(out) == expected
    assert report.stream["groups"] == (8 if group_bytes == 1 else 1)


@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_resume_with_nothing_left_over_just_starts(method, model, out):
    initialize_checkpoint(model, out, **OPTIONS | {"method": method}, resume=True)
    assert (out / "residual").exists() == (method == "pissa")


def test_sigterm_keeps_what_is_finished(out, worker):
    process = worker((0, "layer", 4, "terminate"), more=("--group-bytes", "1"))
    assert process.returncode == 143
    message = process.stderr.splitlines()[0]
    assert message.startswith("lora-init: terminated; 3 finished layers are kept in ")
    assert "--resume" in message
    assert len(leftovers(out)) == 1


@pytest.fixture
def interrupted(model: Path, out: Path, expected: Files, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run whose disk was full after three layers."""
    save = Journal.save_layer

    def full(self: Journal, index: int, *rest: Any) -> None:
        if self.finished() == 3:
            raise OSError(28, "No space left on device")
        save(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save_layer", full)
        with pytest.raises(LoraInitError, match="No space left on device") as caught:
            initialize_checkpoint(model, out, **OPTIONS)
    (left,) = leftovers(out)
    (note,) = caught.value.__notes__
    assert note == (f"3 finished layers are kept in {left}: run again with --resume (resume=True)")
    return left


def test_full_disk_is_resumed(interrupted, model, out, expected):
    initialize_checkpoint(model, out, **OPTIONS, resume=True)
    assert files(out) == expected


def test_without_resume_what_is_left_over_is_removed(interrupted, model, out):
    with pytest.warns(UserWarning, match="removed 3 layers that an earlier run"):
        initialize_checkpoint(model, out, **OPTIONS)
    assert not leftovers(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"r": 2}, "r was 4 and is 2"),
        ({"tol": 1e-2}, "option tol was 0.0001 and is 0.01"),
        ({"target_modules": ["q_proj"]}, r"target_modules was None and is \['q_proj'\]"),
    ],
)
def test_another_run_is_not_resumed(change, message, interrupted, model, out):
    with pytest.raises(LoraInitError, match=f"{message}; resume it with what it was given, or"):
        initialize_checkpoint(model, out, **OPTIONS | change, resume=True)
    assert interrupted.exists()


def test_a_live_run_is_left_alone(interrupted, model, out):
    lock = FileLock(interrupted / "lock")
    with lock:
        with pytest.raises(LoraInitError, match="is still alive"):
            initialize_checkpoint(model, out, **OPTIONS, resume=True)
        initialize_checkpoint(model, out, **OPTIONS)
        assert leftovers(out) == [interrupted]


def test_damaged_journal_entries_are_solved_again(interrupted, model, out, expected):
    first, second, _ = sorted((interrupted / "layers").iterdir())
    first.write_bytes(first.read_bytes()[:-4])
    shutil.copy(interrupted / "run.json", second)
    with pytest.warns(UserWarning, match="is unusable and will be recomputed"):
        initialize_checkpoint(model, out, **OPTIONS, resume=True)
    assert files(out) == expected


def test_a_shard_that_changes_during_the_run_is_named(model, out, tmp_path, monkeypatch):
    copy = shutil.copytree(model, tmp_path / "copy")
    save = Journal.save_layer
    shard = Checkpoint(copy).entries["model.layers.3.self_attn.q_proj.weight"].shard

    def save_and_touch(self: Journal, *rest: Any) -> None:
        save(self, *rest)
        os.utime(shard, (1, 1))

    monkeypatch.setattr(Journal, "save_layer", save_and_touch)
    message = rf"{shard.name} changed during the run \(time of change .* -> 1000000000\)"
    with pytest.raises(LoraInitError, match=message) as caught:
        initialize_checkpoint(copy, out, **OPTIONS)
    assert "finished layers are kept" in caught.value.__notes__[0]
    assert not out.exists()
    monkeypatch.undo()
    with pytest.raises(LoraInitError, match=rf"{shard.name} was \[.*\] and is \["):
        initialize_checkpoint(copy, out, **OPTIONS, resume=True)


def test_reading_is_ahead_within_its_limit(monkeypatch):
    monkeypatch.setattr("lora_init.stream._AHEAD_BYTES", 30)
    asked: list[int] = []

    def read(item: int) -> torch.Tensor:
        asked.append(item)
        return torch.tensor(item)

    got = []
    for tensor in _ahead(read, range(10), [10] * 10):
        got.append(int(tensor))
        assert len(asked) <= len(got) + 3
    assert got == asked == list(range(10))
    assert [int(x) for x in _ahead(read, [4, 2], [100, 100])] == [4, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_consecutive_and_about_equal(size, model, out):
    names = ["self_attn.q_proj", "mlp.down_proj", "self_attn.v_proj"]
    layers = [f"model.layers.{i}.{name}" for i in range(4) for name in names]
    targets = [Target(name, f"{name}.weight", False, 1.0) for name in layers]
    stream = Stream(
        Checkpoint(model),
        targets,
        resolve_method("pissa", {}),
        Journal(out, out, Ranks(0, size)),
        r=2,
    )
    shares = stream.shares(range(len(layers)))
    assert len(shares) == size
    order = [i for share in shares for i in share]
    assert sorted(order) == list(range(12))
    entries = stream.checkpoint.entries
    places = [(entries[targets[i].key].shard, entries[targets[i].key].offset) for i in order]
    assert places == sorted(places)
    costs = [sum(stream.layers[i].weight.numel() for i in share) for share in shares]
    assert max(costs) - min(costs) <= 2 * 64 * 96
    assert stream.shares([]) == [[] for _ in range(size)]


def test_stated_memory_is_respected(tmp_path):
    # 200 MB of weights; the process may take less than half of that.
    directory = tmp_path / "model"
    directory.mkdir()
    names = [f"layer.{i}" for i in range(24)]
    weight = torch.randn(2048, 2048).mul_(0.02).to(torch.bfloat16)
    tensors = {f"{name}.weight": weight.roll(i, 0) for i, name in enumerate(names)}
    save_file(tensors, directory / "model.safetensors")
    code = """
import json, sys
from pathlib import Path
import torch
from lora_init import stream as room
from lora_init.checkpoints import Checkpoint, Target
from lora_init.distributed import Ranks
from lora_init.journal import opened
from lora_init.methods import resolve_method

def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

room._AHEAD_BYTES = 16 << 20
torch.set_num_threads(1)
checkpoint = Checkpoint(Path(sys.argv[1]))
targets = [Target(key.removesuffix(".weight"), key, False, 1.0) for key in checkpoint.entries]
torch.linalg.eigh(torch.randn(300, 300).double() @ torch.randn(300, 300).double())
with opened(Path(sys.argv[2]), {}, Ranks()) as journal:
    stream = room.Stream(
        checkpoint, targets, resolve_method("pissa", {}), journal, r=4, group_bytes=48 << 20
    )
    everything = range(len(targets))
    groups = stream.groups(stream.shares(everything)[0])
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    stream.survey()
    resolved = stream.method.resolve(stream.layers)
    with room.ShardWriter(stream, journal.outputs, checkpoint.shards, [everything]) as writer:
        stream.solve(groups, resolved, None, False, writer.finished)
        writer.write_shared()
    print(json.dumps([1024 * (kib("VmHWM") - before), stream.peak_bytes(groups), len(groups)]))
"""
    process = subprocess.run(
        [sys.executable, "-c", code, directory, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    taken, stated, groups = json.loads(process.stdout)
    assert groups > 1
    assert taken <= stated < 150e6


def test_layers_keep_what_was_surveyed(model, out):
    """The moments of a streamed layer are those of its weight."""
    key = "model.layers.0.self_attn.q_proj"
    targets = [Target(key, f"{key}.weight", False, 1.0)]
    (out / "layers").mkdir(parents=True)
    journal = Journal(out, out, Ranks())
    stream = Stream(Checkpoint(model), targets, resolve_method("inilora", {}), journal, r=2)
    stream.survey()
    (layer,) = stream.layers
    whole = Layer(key, stream.checkpoint.tensor(f"{key}.weight"), 2)
    assert layer.weight.device.type == "meta"
    assert (layer.moments, layer.digest) == (whole.moments, whole.digest)
    assert journal.survey() == [{"digest": whole.digest, "moments": list(whole.moments)}]
