"""Outputs of a directory that appear whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_init.factors import LoraInitError

# What a killed process leaves behind has this name: only `journal` ever reads one again.
PREFIX = ".lora-init-"


class CheckFailed(RuntimeError):
    """What was written is not right; it was kept aside and replaced nothing."""


@contextmanager
def staged(out: Path, names: Sequence[str], overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `out` whose entries `names` become those of `out` when the block ends well.

    An entry that was not written is removed from `out`, because it belongs to an earlier run; all
    else in `out` stays. On any exception, Ctrl-C included, `out` is as it was and the folder is
    removed, except after `CheckFailed`.

    Raises:
        LoraInitError: `out` is no directory, not empty (without `overwrite`), or cannot be written.
    """
    out = out.resolve()
    stage = folder_beside(out, overwrite)
    keep = False
    try:
        with writing(out):
            yield stage
            place(stage, out, names, overwrite)
    except CheckFailed:
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(stage, ignore_errors=True)


def folder_beside(out: Path, overwrite: bool = False) -> Path:
    """A new folder that can be moved to `out` by a rename.

    Raises:
        LoraInitError: `out` is no directory, not empty (without `overwrite`), or cannot be written.
    """
    try:
        check_free(out, overwrite)
        parent = _parent(out)
        parent.mkdir(parents=True, exist_ok=True)
        folder = parent / f"{PREFIX}{out.name}-{secrets.token_hex(4)}"
        folder.mkdir()  # not mkdtemp: this becomes `out`, with the user's own permissions
    except OSError as error:
        raise LoraInitError(f"cannot write to {out} ({error}): choose another directory") from error
    return folder


def folders_beside(out: Path) -> list[Path]:
    """What `folder_beside` made for `out` and is still there, newest first."""
    name = re.compile(re.escape(f"{PREFIX}{out.name}-") + "[0-9a-f]{8}")
    siblings = _parent(out).glob("*")  # of nothing, if there is no such directory
    found = [path for path in siblings if name.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def place(stage: Path, out: Path, names: Sequence[str], overwrite: bool = False) -> None:
    """Make the entries `names` of `stage` those of `out`, all or none; see `staged`."""
    check_free(out, overwrite)  # another process may have been faster
    _move(stage, out, names)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """An OSError inside becomes the one clear error for what happens to the output."""
    try:
        yield
    except OSError as error:
        raise LoraInitError(
            f"could not write {out} ({error}): free space or choose another directory; it is as it "
            f"was before"
        ) from error


@contextmanager
def merged_into(directory: Path) -> Iterator[Path]:
    """A folder inside `directory` whose files are moved up when the block ends well.

    Each replaces what has its name; all else in `directory` stays. After an exception it is as
    it was.

    Raises:
        LoraInitError: the directory cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=directory, prefix=PREFIX))
    except OSError as error:
        raise LoraInitError(
            f"cannot write to {directory} ({error}): free space or choose another directory"
        ) from error
    try:
        yield staging
        move_into(staging, directory)
    except OSError as error:
        raise LoraInitError(
            f"cannot write to {directory} ({error}): free space or choose another directory"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def move_into(source: Path, target: Path) -> None:
    """Move every file of a tree to the same place under `target`, replacing what is there."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        destination = target / path.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, destination)


def require_space(path: Path, size: int) -> None:
    """Raises `LoraInitError` if fewer than `size` bytes are free where `path` is."""
    free = shutil.disk_usage(path).free
    if free < size:
        raise LoraInitError(
            f"the output needs {size / 1e9:.2f} GB and {path.parent} has {free / 1e9:.2f} GB free: "
            f"free space or choose another directory"
        )


def check_free(out: Path, overwrite: bool) -> None:
    """Raises `LoraInitError` if `out` is no directory, or not empty (without `overwrite`)."""
    if not out.exists():
        return
    if not out.is_dir():
        raise LoraInitError(f"{out} is a file: choose a directory for the output")
    found = sorted(path.name for path in out.iterdir() if not path.name.startswith(PREFIX))
    if found and not overwrite:
        raise LoraInitError(
            f"{out} is not empty (it holds {found[0]}): choose another directory, or empty it "
            f"(lora-init run --overwrite replaces an earlier run)"
        )


def _parent(out: Path) -> Path:
    """What is beside a mount point is another disk, and no rename goes there."""
    return out if os.path.ismount(out) else out.parent


def _move(stage: Path, out: Path, names: Sequence[str]) -> None:
    if not out.exists():
        stage.rename(out)
        return
    replaced = stage / "replaced"
    replaced.mkdir()
    moves: list[tuple[Path, Path]] = []
    try:
        for name in names:
            for source, target in ((out / name, replaced / name), (stage / name, out / name)):
                if os.path.lexists(source):
                    moves.append((source, target))
                    source.rename(target)
    except BaseException:
        for source, target in reversed(moves):
            if not os.path.lexists(source):  # the last move may not have happened
                target.rename(source)
        raise
