"""Solved factors and what was collected of data, on disk: content-addressed, atomic, safe with
several processes at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora_init.factors import Factors, LoraInitError, weight_digest
from lora_init.methods import Layer, Method

# Part of every key: raise it when the same inputs would give other factors or the file changes
# shape.
_FORMAT = 2
_ENVIRONMENT_VARIABLE = "LORA_INIT_CACHE_DIR"

CacheOption = bool | str | os.PathLike[str]
"""False: none; True: the user's cache directory; "auto": that where worth it; or a directory."""


@dataclass(frozen=True)
class Cache:
    """Entries by key in `directory`, one safetensors file each, named by the key."""

    directory: Path

    def get(self, key: str) -> Factors | None:
        """The stored factors, or None if absent; a damaged or foreign file warns and counts as
        absent.
        """
        return read_entry(self._path(key), key)

    def put(self, key: str, factors: Factors) -> None:
        """Store factors; a full or read-only disk warns, because the factors themselves are not
        lost.
        """
        with self._warned():
            write_entry(self._path(key), key, factors)

    def get_tensors(self, key: str, names: Sequence[str]) -> dict[str, Tensor] | None:
        """As `get`, for any tensors by these names."""
        found = _read(self._path(key), key, names)
        return found and found[0]

    def put_tensors(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """As `put`, for any tensors by name."""
        with self._warned():
            _write(self._path(key), key, tensors, {})

    def files(self) -> list[Path]:
        return sorted(self.directory.glob("*/*.safetensors"))

    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.files())

    def clear(self) -> int:
        """Remove every entry; returns how many there were."""
        files = self.files()
        for path in files:
            path.unlink(missing_ok=True)
        return len(files)

    @contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            warnings.warn(
                f"could not write to the cache {self.directory} ({error}): not cached", stacklevel=4
            )

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.safetensors"


def default_directory() -> Path:
    """`LORA_INIT_CACHE_DIR`, or the user's cache directory of this platform."""
    if named := os.environ.get(_ENVIRONMENT_VARIABLE):
        return Path(named)
    import platformdirs  # not everywhere: a machine without a registry may lack it

    return Path(platformdirs.user_cache_dir("lora-init"))


def read_entry(path: Path, key: str) -> Factors | None:
    """The factors that `write_entry` stored under this key, or None if there are none; a damaged or
    foreign file warns and counts as absent.
    """
    found = _read(path, key, ("A", "B"))
    if found is None:
        return None
    tensors, content = found
    return Factors(tensors["A"], tensors["B"], content["scaling"], content["info"])


def write_entry(path: Path, key: str, factors: Factors) -> None:
    """Store factors in a file of their own, atomically, with a digest of all that it holds."""
    content = {"scaling": factors.scaling, "info": factors.info}
    _write(path, key, {"A": factors.A, "B": factors.B}, content)


def _read(
    path: Path, key: str, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            text, digest = file.metadata()["lora_init"], file.metadata()["digest"]
            tensors = {name: file.get_tensor(name) for name in names}
        content = json.loads(text)
        if content["key"] != key or digest != _digest(text, tensors):
            raise ValueError("its content is not what was stored")
        return tensors, content
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is unusable and will be recomputed ({error})", stacklevel=4)
        return None


def _write(path: Path, key: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    text = json.dumps({"key": key, **content})
    meta = {"lora_init": text, "digest": _digest(text, tensors)}
    write_atomically(path, save(tensors, meta))


def open_cache(option: CacheOption, method: Method | None = None) -> Cache | None:
    """The cache that `cache=option` means for this method's factors, or for what "auto" is on for.

    Raises:
        LoraInitError: a directory that was named cannot be created or written.
    """
    if option is False or (option == "auto" and method is not None and not method.cached):
        return None
    if method is not None and method.replaces:  # an entry has room for factors only
        return None
    named = option is not True and option != "auto"
    directory = Path(option) if named else default_directory()  # type: ignore[arg-type]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        message = f"cannot write to the cache directory {directory} ({error})"
        if named:
            raise LoraInitError(f"{message}: name another one, or pass cache=False") from error
        warnings.warn(f"{message}: nothing is cached", stacklevel=3)
        return None
    return Cache(directory)


def key(layer: Layer, method: Method, resolved: dict[str, Any]) -> str:
    """What a layer's factors depend on: weight content, method, options, rank, scaling, seed and
    name, and what was collected of data.
    """
    identity = {
        "format": _FORMAT,
        "weight": layer.digest,
        "method": method.name,
        "options": asdict(method) | resolved,
        "r": layer.r,
        "scaling": float(layer.scaling),
        "seed": layer.seed,
        "name": layer.name,
    }
    if layer.statistics:
        identity["statistics"] = {
            key: weight_digest(value) for key, value in sorted(layer.statistics.items())
        }
    return digest_of(identity)


def digest_of(identity: Mapping[str, Any]) -> str:
    """SHA-256 of what JSON, or `str`, says of it."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Of all that an entry holds: a damaged scaling is as wrong as a damaged factor."""
    inner = weight_digest(*(tensors[name] for name in sorted(tensors)))
    return hashlib.sha256(f"{text}\n{inner}".encode()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
