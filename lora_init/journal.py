"""The work directory of a run on a checkpoint: what is finished, so that a killed run can go on.

It lies beside `out`, under a name of `staging`:

    lock          held as long as the run lives
    run.json      all that the run's bits depend on
    survey.json   what was measured of every weight
    layers/       one file per solved layer: its factors as stored and its row of the report
    scratch/      files that are being written
    outputs/      what becomes `out`; a weight file that is there is whole

Of a job's ranks, the first makes, locks, moves and removes it; all of them write to it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from lora_init.cache import read_entry, write_atomically, write_entry
from lora_init.distributed import Ranks
from lora_init.factors import Factors, LoraInitError
from lora_init.report import LayerReport
from lora_init.staging import (
    CheckFailed,
    check_free,
    folder_beside,
    folders_beside,
    place,
    writing,
)

T = TypeVar("T")

_LOCK, _RUN, _SURVEY, _LAYERS = "lock", "run.json", "survey.json", "layers"
_SCRATCH, _OUTPUTS, _FAILED = "scratch", "outputs", "failed"


class _Stopped(Exception):
    """Another rank failed, and will say why."""


@dataclass(frozen=True)
class Journal:
    """What a run has finished so far, in `directory`, on the way to `out`."""

    directory: Path
    out: Path
    ranks: Ranks

    @property
    def outputs(self) -> Path:
        return self.directory / _OUTPUTS

    @property
    def scratch(self) -> Path:
        return self.directory / _SCRATCH

    def together(self, function: Callable[[], T]) -> T:
        """`Ranks.together`, with an OSError made clear, and with word to the others at once that
        this rank failed: they look at `stop_if_failed` where they have much left to do.
        """
        return self.ranks.together(lambda: self._guarded(function))

    def once(self, function: Callable[[], T]) -> T:
        """`Ranks.once`, likewise."""
        return self.ranks.once(lambda: self._guarded(function))

    def stop_if_failed(self) -> None:
        """Ends what `together` runs if another rank has failed in it."""
        if self.ranks.size > 1 and (self.directory / _FAILED).exists():
            raise _Stopped

    def survey(self) -> list[dict[str, Any]] | None:
        """What `save_survey` was given, if it was."""
        path = self.directory / _SURVEY
        return json.loads(path.read_bytes()) if path.is_file() else None

    def save_survey(self, measured: Sequence[dict[str, Any]]) -> None:
        write_atomically(self.directory / _SURVEY, json.dumps(measured).encode())

    def layer(self, index: int, name: str) -> tuple[Factors, LayerReport] | None:
        """A finished layer's factors as stored and its report; None if it is not finished. A
        damaged file warns and counts as not finished.
        """
        entry = read_entry(self._layer(index), name)
        if entry is None:
            return None
        report = LayerReport(**entry.info | {"shape": tuple(entry.info["shape"])})
        return Factors(entry.A, entry.B, entry.scaling, report.info), report

    def save_layer(self, index: int, stored: Factors, report: LayerReport) -> None:
        entry = Factors(stored.A, stored.B, stored.scaling, asdict(report))
        write_entry(self._layer(index), report.name, entry)

    def finished(self) -> int:
        """Number of finished layers."""
        return len(list((self.directory / _LAYERS).glob("*.safetensors")))

    def place(self, names: Sequence[str], overwrite: bool) -> None:
        """Make the outputs those of `out`, all or none."""
        place(self.outputs, self.out, names, overwrite)

    def check_shared(self) -> None:
        """Raises `LoraInitError` if this rank does not see the directory that the first made."""
        if not (self.directory / _RUN).is_file():
            raise LoraInitError(
                f"{self.directory}, which rank 0 made, is not there for this process: all "
                f"processes of a job must share the file system of the output"
            )

    def _guarded(self, function: Callable[[], T]) -> T:
        try:
            with writing(self.out):
                return function()
        except _Stopped:
            return None  # type: ignore[return-value]  # the other rank's failure is raised
        except Exception:
            with suppress(OSError):  # else they hear of it when they are done
                (self.directory / _FAILED).touch()
            raise

    def _layer(self, index: int) -> Path:
        return self.directory / _LAYERS / f"{index:05}.safetensors"


@contextmanager
def opened(
    out: Path,
    run: Mapping[str, Any],
    ranks: Ranks,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[Journal]:
    """The journal of a run to `out`: a new one, or with `resume` what a dead run left of it.

    It is gone after the block; after an exception only if no layer was finished, and else the
    exception gets a note that says so. After `CheckFailed` only the outputs stay.

    Args:
        run: JSON-able, all that the run's bits depend on, by the names that users know.

    Raises:
        LoraInitError: `out` is not free or cannot be written; with `resume`, such a run is still
            alive, or was another one.
    """

    held: list[FileLock] = []  # on rank 0

    def take() -> Path:
        folder, lock = _leftover(out, run, resume, overwrite) or _fresh(out, run, overwrite)
        held.append(lock)
        return folder

    journal = Journal(ranks.once(take), out, ranks)
    try:
        ranks.together(journal.check_shared)
        yield journal
    except CheckFailed:
        if held:
            for path in journal.directory.iterdir():
                if path != journal.outputs:
                    _remove(path)
        raise
    except BaseException as error:
        finished = journal.finished()
        if finished:
            error.add_note(
                f"{finished} finished layers are kept in {journal.directory}: run again with "
                f"--resume (resume=True)"
            )
        elif held:
            _remove(journal.directory)
        raise
    else:
        if held:
            _remove(journal.directory)
    finally:
        for lock in held:
            lock.release()


def _fresh(out: Path, run: Mapping[str, Any], overwrite: bool) -> tuple[Path, FileLock]:
    folder = folder_beside(out, overwrite)
    try:
        with writing(out):
            lock = FileLock(folder / _LOCK)
            lock.acquire()
            for name in (_LAYERS, _SCRATCH, _OUTPUTS):
                (folder / name).mkdir()
            write_atomically(folder / _RUN, json.dumps(run, indent=1).encode())
    except BaseException:
        _remove(folder)
        raise
    return folder, lock


def _leftover(
    out: Path, run: Mapping[str, Any], resume: bool, overwrite: bool
) -> tuple[Path, FileLock] | None:
    """The newest leftover of this very run, locked. Without `resume`, dead ones are removed."""
    with writing(out):
        check_free(out, overwrite)
        # One without a run is only just being made, or holds what failed its check.
        folders = [path for path in folders_beside(out) if (path / _RUN).is_file()]
    refusal = None
    for folder in folders:
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            if resume:
                raise LoraInitError(
                    f"the run to {out} that works in {folder} is still alive: wait for it, or end "
                    f"it first"
                ) from error
            continue
        if not resume:
            _discard(folder)
        elif difference := _difference(folder, run):
            refusal = refusal or (
                f"{folder} is left of a run to {out} that was another one: {difference}; resume it "
                f"with what it was given, or leave out --resume (resume=False), which removes it"
            )
        else:
            _tidy(folder)
            return folder, lock
        lock.release()
    if refusal:
        raise LoraInitError(refusal)
    return None


def _difference(folder: Path, run: Mapping[str, Any]) -> str | None:
    try:
        before = json.loads((folder / _RUN).read_bytes())
    except ValueError as error:
        return f"its {_RUN} is damaged ({error})"
    now = json.loads(json.dumps(run))
    for key in before | now:
        if before.get(key) != now.get(key):
            return f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
    return None


def _tidy(folder: Path) -> None:
    """Remove what the dead run was in the middle of. Only whole weight files are worth keeping."""
    _remove(folder / _FAILED)
    for path in [*(folder / _SCRATCH).iterdir(), *(folder / _OUTPUTS).rglob("*")]:
        if path.parent.name == _SCRATCH or (path.is_file() and path.suffix != ".safetensors"):
            _remove(path)
    _remove(folder / _OUTPUTS / "adapter")


def _discard(folder: Path) -> None:
    finished = len(list((folder / _LAYERS).glob("*.safetensors")))
    if finished:
        warnings.warn(
            f"removed {finished} layers that an earlier run to the same place had finished; "
            f"--resume (resume=True) would have gone on from them",
            stacklevel=2,
        )
    _remove(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
