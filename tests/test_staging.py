"""Outputs appear whole or not at all."""

import os
from pathlib import Path

import pytest

from lora_init import LoraInitError
from lora_init.staging import (
    PREFIX,
    CheckFailed,
    folder_beside,
    folders_beside,
    require_space,
    staged,
)


def contents(directory: Path) -> dict[str, str]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_text() for path in paths}


def test_staged_output_appears_at_the_end(tmp_path):
    with staged(tmp_path / "deep" / "out", ["a", "b"]) as stage:
        (stage / "a").write_text("new")
        assert stage.name.startswith(PREFIX)
        assert not (tmp_path / "deep" / "out").exists()
    assert contents(tmp_path / "deep") == {"out/a": "new"}


def test_staged_overwrites_its_names_only(tmp_path):
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    for name in ("a/old", "b", "mine"):
        (out / name).write_text("old")
    with pytest.raises(LoraInitError, match="is not empty"), staged(out, ["a", "b"]):
        pass
    with staged(out, ["a", "b"], overwrite=True) as stage:
        (stage / "a").mkdir()
        (stage / "a" / "new").write_text("new")
    assert contents(tmp_path) == {"out/a/new": "new", "out/mine": "old"}  # b is of the old run


def test_staged_does_not_replace_what_another_process_wrote_meanwhile(tmp_path):
    def late() -> None:
        with staged(tmp_path / "out", ["a"]) as stage:
            (stage / "a").write_text("late")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "a").write_text("first")

    with pytest.raises(LoraInitError, match="is not empty"):
        late()
    assert contents(tmp_path) == {"out/a": "first"}


def write_and_raise(out: Path, error: BaseException) -> None:
    with staged(out, ["a"], overwrite=True) as stage:
        (stage / "a").write_text("new")
        raise error


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwritten"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (LoraInitError("bad"), LoraInitError),
        (OSError(28, "full"), LoraInitError),
    ],
    ids=["interrupt", "refused", "full"],
)
def test_staged_leaves_nothing_after_an_exception(tmp_path, existing, error, raised):
    if existing:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("old")
    before = contents(tmp_path)
    with pytest.raises(raised):
        write_and_raise(tmp_path / "out", error)
    assert contents(tmp_path) == before
    assert {p.name for p in tmp_path.iterdir()} == ({"out"} if existing else set())


@pytest.mark.parametrize("failing", range(4))
def test_staged_rolls_back_when_a_move_fails(tmp_path, monkeypatch, failing):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a", "b"):
        (out / name).write_text("old")
    calls = []
    rename = Path.rename

    def flaky(self, target):
        calls.append(self)
        if len(calls) == failing + 1:
            raise KeyboardInterrupt
        return rename(self, target)

    def overwrite() -> None:
        with staged(out, ["a", "b"], overwrite=True) as stage:
            for name in ("a", "b"):
                (stage / name).write_text("new")
            monkeypatch.setattr(Path, "rename", flaky)

    with pytest.raises(KeyboardInterrupt):
        overwrite()
    assert contents(tmp_path) == {"out/a": "old", "out/b": "old"}


def test_staged_keeps_what_failed_its_check(tmp_path):
    with pytest.raises(CheckFailed):
        write_and_raise(tmp_path / "out", CheckFailed("no"))
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith(PREFIX)
    assert contents(kept) == {"a": "new"}


def test_staged_refuses_files_and_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(LoraInitError, match=str(out)), staged(out, ["a"]):
            pass


def test_folders_are_found_by_their_output_newest_first(tmp_path):
    made = [folder_beside(tmp_path / name) for name in ("a", "a-b", "a", "a*")]
    for age, folder in enumerate(reversed(made)):
        os.utime(folder, (1e9 - age, 1e9 - age))
    (tmp_path / f"{PREFIX}a-new").mkdir()
    assert folders_beside(tmp_path / "a") == [made[2], made[0]]
    assert folders_beside(tmp_path / "a*") == [made[3]]
    assert folders_beside(tmp_path / "nowhere" / "a") == []


def test_space_is_checked(tmp_path):
    require_space(tmp_path, 1)
    with pytest.raises(LoraInitError, match="free space"):
        require_space(tmp_path, 1 << 60)
