"""The cache: what a key depends on, damage of every kind, full disks, several processes."""

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_init import Factors, LoraInitError, approximate
from lora_init import cache as cache_module
from lora_init.cache import Cache, default_directory, key, open_cache, write_atomically
from lora_init.methods import Layer, Method
from lora_init.methods.inilora import IniLora, IniLoraBeta
from lora_init.testing import gaussian, misaligned, transposed

WEIGHTS = {name: gaussian(16, 12, seed=i) for i, name in enumerate(("a.q", "a.v", "b.q"))}


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the layers that each call of `IniLora.solve` got."""
    calls: list[list[str]] = []
    original = IniLora.solve

    def solve(self: Method, layers: list[Layer], *rest: Any) -> list[Factors]:
        calls.append([layer.name for layer in layers])
        return original(self, layers, *rest)

    monkeypatch.setattr(IniLora, "solve", solve)
    return calls


def run(
    cache: Any = True, weights: dict[str, Tensor] = WEIGHTS, **options: Any
) -> dict[str, Factors]:
    return approximate(weights, **{"r": 3, "steps": 5, "cache": cache, **options})


def entries(directory: Path | None = None) -> list[Path]:
    """Everything that lies in the cache, temporary files included, but the self-test's verdicts,
    which the first test of a process leaves beside it.
    """
    files = [p for p in (directory or default_directory()).rglob("*") if p.is_file()]
    return sorted(p for p in files if p.parent.name != "selftest")


def assert_same(factors: dict[str, Factors], expected: dict[str, Factors]) -> None:
    for name, f in factors.items():
        assert torch.equal(f.A, expected[name].A)
        assert torch.equal(f.B, expected[name].B)
        assert f.scaling == expected[name].scaling


def test_second_run_solves_nothing_and_gives_the_same(solved: list[list[str]]) -> None:
    first = run(scaling=2.0)
    second = run(scaling=2.0)
    assert solved == [list(WEIGHTS)]
    assert_same(second, first)
    for name, f in second.items():
        assert f.info == first[name].info | {"cached": True}
        assert not first[name].info["cached"]
    assert len(entries()) == 3


@pytest.mark.parametrize("view", [misaligned, transposed, torch.nn.Parameter, Tensor.clone])
def test_the_same_weight_in_other_memory_is_a_hit(solved: list[list[str]], view: Any) -> None:
    run()
    run(weights={name: view(w) for name, w in WEIGHTS.items()})
    assert len(solved) == 1


def test_only_what_is_missing_is_solved(solved: list[list[str]]) -> None:
    # Not per_type: its σ is that of all layers, and part of the key.
    two = {name: WEIGHTS[name] for name in ("b.q", "a.q")}
    run(weights=two, init="normal")
    mixed = run(init="normal")
    assert solved == [["b.q", "a.q"], ["a.v"]]
    assert list(mixed) == list(WEIGHTS)
    assert [f.info["cached"] for f in mixed.values()] == [True, False, True]


def test_factors_of_fp64_weights_come_back_in_fp64() -> None:
    weights = {name: w.double() for name, w in WEIGHTS.items()}
    first, second = run(weights=weights), run(weights=weights)
    assert second["a.q"].info["cached"]
    assert second["a.q"].A.dtype == torch.float64
    assert_same(second, first)


BASE = {"r": 3, "steps": 5, "init": "normal"}
CHANGES = {
    "weight": {"weights": {"a.q": WEIGHTS["a.q"] * 1.0000002}},
    "weight dtype": {"weights": {"a.q": WEIGHTS["a.q"].double()}},
    "name": {"weights": {"a.k": WEIGHTS["a.q"]}},
    "r": {"r": 2},
    "scaling": {"scaling": 2.0},
    "seed": {"seed": 1},
    "steps": {"steps": 6},
    "lr": {"lr": 1e-3},
    "init": {"init": "uniform"},
    "solver": {"solver": "gd"},
    "betas": {"betas": (0.9, 0.99)},
    "eps": {"eps": 1e-7},
    "step_size": {"step_size": 3},
    "gamma": {"gamma": 0.5},
    "tol": {"tol": 1e-9},
    "window": {"window": 3},
    "statistics": {"init": "per_type"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_key_changes_with_everything_the_factors_depend_on(
    solved: list[list[str]], change: dict[str, Any]
) -> None:
    base = {"weights": {"a.q": WEIGHTS["a.q"]}, **BASE}
    run(**base)
    run(**{**base, **change})
    assert len(solved) == 2
    assert len(entries()) == 2


class Twin(IniLora):
    """Another method with the same options."""

    name = "twin"


def test_key_changes_with_the_method_and_with_resolved_statistics() -> None:
    layer = Layer("a.q", WEIGHTS["a.q"], 3)
    methods = [IniLora(), IniLora(steps=1), IniLoraBeta(), IniLoraBeta("uniform"), Twin()]
    keys = [key(layer, method, {}) for method in methods]
    keys += [key(layer, IniLora(), {"mean": 0.0, "sigma": sigma}) for sigma in (0.05, 0.051)]
    assert len(set(keys)) == 7
    assert keys[0] == key(Layer("a.q", WEIGHTS["a.q"].clone(), 3), IniLora(), {})


def test_a_whole_scaling_has_the_key_of_the_same_float(solved: list[list[str]]) -> None:
    run(scaling=2)
    run(scaling=2.0)
    assert len(solved) == 1


def flip_a_bit(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def in_metadata(**changes: Any) -> Any:
    def damage(path: Path, other: Path) -> None:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata()
            tensors = {name: file.get_tensor(name) for name in ("A", "B")}
        text = json.dumps({**json.loads(meta["lora_init"]), **changes})
        save_file(tensors, path, {**meta, "lora_init": text})

    return damage


DAMAGE = {
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-40]),
    "header only": lambda path, other: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path, other: path.write_bytes(b""),
    "garbage": lambda path, other: path.write_bytes(bytes(range(256)) * 8),
    "pickle": lambda path, other: path.write_bytes(pickle.dumps({"A": 1})),
    "torch.save": lambda path, other: torch.save({"A": torch.zeros(3, 12)}, path),
    "bit flip": flip_a_bit,
    "another entry": lambda path, other: path.write_bytes(other.read_bytes()),
    "no metadata": lambda path, other: save_file({"A": torch.zeros(3, 12)}, path),
    "foreign metadata": lambda path, other: save_file(
        {"A": torch.zeros(3, 12)}, path, {"lora_init": "[1]"}
    ),
    "key of another": in_metadata(key="0" * 64),
    "other scaling": in_metadata(scaling=9.0),
    "no info": in_metadata(info=None),
    "no JSON": lambda path, other: save_file({"A": torch.zeros(3, 12)}, path, {"lora_init": "{"}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_warns_is_recomputed_and_repaired(
    solved: list[list[str]], damage: Any
) -> None:
    first = run()
    path, other = entries()[:2]
    damage(path, other)
    with pytest.warns(UserWarning, match=f"{path.name} is unusable and will be recomputed"):
        again = run()
    assert_same(again, first)
    assert sum(f.info["cached"] for f in again.values()) == 2
    assert [len(names) for names in solved] == [3, 1]
    assert all(f.info["cached"] for f in run().values())
    assert len(entries()) == 3


def test_a_directory_in_place_of_an_entry_warns_and_goes_on() -> None:
    first = run()
    path = entries()[0]
    path.unlink()
    path.mkdir()
    with (
        pytest.warns(UserWarning, match="is unusable and will be recomputed"),
        pytest.warns(UserWarning, match="could not write to the cache"),
    ):
        assert_same(run(), first)
    assert len(entries()) == 2


def test_a_pickle_is_never_run() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return pytest.fail, ("unpickled",)

    run()
    entries()[0].write_bytes(pickle.dumps(Evil()))
    with pytest.warns(UserWarning, match="unusable"):
        run()


@pytest.mark.parametrize("option", [True, "auto"])
def test_an_unusable_default_directory_warns_and_goes_on(
    option: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: list[list[str]]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LORA_INIT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"cannot write .*: nothing is cached"):
        factors = run(cache=option)
    assert len(factors) == 3
    assert len(solved) == 1


@pytest.mark.parametrize("place", ["a file", "under a file", "read-only"])
def test_an_unusable_named_directory_is_an_error_before_anything_is_solved(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: list[list[str]]
) -> None:
    (tmp_path / "file").write_text("in the way")
    named = {"a file": tmp_path / "file", "under a file": tmp_path / "file" / "deeper"}
    if place == "read-only":  # not by permissions, which root ignores

        def refuse(*arguments: Any, **keywords: Any) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(cache_module.tempfile, "TemporaryFile", refuse)
    with pytest.raises(LoraInitError, match=r"cannot write .*name another one, or pass"):
        run(cache=named.get(place, tmp_path / "new"))
    assert solved == []


def full_disk(*arguments: Any, **keywords: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "function"), [(cache_module.tempfile, "mkstemp"), (os, "fdopen"), (os, "replace")]
)
def test_a_full_disk_warns_and_keeps_the_factors(
    module: Any, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(cache=False)
    with monkeypatch.context() as patch:
        patch.setattr(module, function, full_disk)
        with pytest.warns(UserWarning, match="could not write to the cache .*No space left"):
            factors = run(cache=tmp_path / "named")
    assert_same(factors, expected)
    assert entries(tmp_path / "named") == []
    assert all(not f.info["cached"] for f in run(cache=tmp_path / "named").values())
    assert all(f.info["cached"] for f in run(cache=tmp_path / "named").values())


def test_a_write_that_fails_half_way_leaves_nothing() -> None:
    resource = pytest.importorskip("resource")  # a real failure of write(2), after 512 bytes
    expected = run(cache=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        with pytest.warns(UserWarning, match="could not write to the cache .*File too large"):
            factors = run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(factors, expected)
    assert entries() == []


@pytest.mark.parametrize("interrupted", ["replace", "chmod"])
def test_an_interrupted_write_leaves_no_half_file(
    interrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, interrupted, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert entries() == []
    assert len(run()) == 3


def test_write_atomically_replaces_or_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert [p.read_bytes() for p in entries(tmp_path / "deep")] == [b"new"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_size_and_clear() -> None:
    store = Cache(default_directory())
    assert (store.size(), store.clear()) == (0, 0)
    run()
    assert store.size() == sum(path.stat().st_size for path in entries()) > 3 * 3 * 28 * 4
    assert store.clear() == 3
    assert entries() == []
    assert store.size() == 0


def test_which_cache_an_option_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = default_directory()
    assert default == tmp_path / "cache"  # set by conftest
    assert open_cache(False, IniLora()) is None
    assert open_cache("auto", IniLoraBeta()) is None  # cheaper than hashing W
    assert open_cache("auto", IniLora()) == open_cache(True, IniLoraBeta()) == Cache(default)
    assert open_cache(tmp_path / "x" / "y", IniLoraBeta()) == Cache(tmp_path / "x" / "y")
    assert open_cache(str(tmp_path / "x"), IniLora()) == Cache(tmp_path / "x")
    monkeypatch.delenv("LORA_INIT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert default_directory().name == "lora-init"


def test_cached_factors_of_a_method_that_is_not_cached_by_default(solved: list[list[str]]) -> None:
    arguments = {"r": 3, "method": "inilora_beta"}
    assert not approximate(WEIGHTS, cache=True, **arguments)["a.q"].info["cached"]
    assert approximate(WEIGHTS, cache=True, **arguments)["a.q"].info["cached"]
    assert not approximate(WEIGHTS, **arguments)["a.q"].info["cached"]


JOB = """
import sys, time, pathlib, torch
from lora_init import approximate
from lora_init.testing import gaussian

start = pathlib.Path(sys.argv[1])
weights = {f"{i}.q": gaussian(40, 30, seed=i) for i in range(24)}
(start / sys.argv[2]).touch()
while len(list(start.iterdir())) < 2:  # both have imported torch
    time.sleep(0.001)
factors = approximate(weights, r=3, steps=5, cache=sys.argv[3])
torch.save({name: (f.A, f.B) for name, f in factors.items()}, sys.argv[4])
"""


def test_two_processes_may_share_a_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    (tmp_path / "start").mkdir()
    command = [sys.executable, "-W", "error", "-c", JOB, str(tmp_path / "start")]
    processes = [
        subprocess.Popen(
            [*command, name, str(tmp_path / "shared"), str(tmp_path / f"{name}.pt")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    weights = {f"{i}.q": gaussian(40, 30, seed=i) for i in range(24)}
    expected = run(cache=False, weights=weights)
    for name in ("one", "two"):
        for layer, (A, B) in torch.load(tmp_path / f"{name}.pt").items():
            assert torch.equal(A, expected[layer].A)
            assert torch.equal(B, expected[layer].B)
    assert len(entries(tmp_path / "shared")) == 24
    hits = run(cache=tmp_path / "shared", weights=weights)
    assert all(f.info["cached"] for f in hits.values())
    assert_same(hits, expected)
