"""Solved factors on disk: content-addressed, atomic, safe with several processes at once."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
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
    """Factors by key in `directory`, one safetensors file each, named by the key."""

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
        try:
            write_entry(self._path(key), key, factors)
        except OSError as error:
            warnings.warn(
                f"could not write to the cache {self.directory} ({error}): not cached", stacklevel=2
            )

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
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            text, digest = file.metadata()["lora_init"], file.metadata()["digest"]
            A, B = file.get_tensor("A"), file.get_tensor("B")
        meta = json.loads(text)
        if meta["key"] != key or digest != _digest(text, A, B):
            raise ValueError("its content is not what was stored")
        return Factors(A, B, meta["scaling"], meta["info"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is unusable and will be recomputed ({error})", stacklevel=3)
        return None


def write_entry(path: Path, key: str, factors: Factors) -> None:
    """Store factors in a file of their own, atomically, with a digest of all that it holds."""
    A, B = factors.A.contiguous().cpu(), factors.B.contiguous().cpu()
    text = json.dumps({"key": key, "scaling": factors.scaling, "info": factors.info})
    meta = {"lora_init": text, "digest": _digest(text, A, B)}
    write_atomically(path, save({"A": A, "B": B}, meta))


def open_cache(option: CacheOption, method: Method) -> Cache | None:
    """The cache that `cache=option` means for this method.

    Raises:
        LoraInitError: a directory that was named cannot be created or written.
    """
    if option is False or (option == "auto" and not method.cached):
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
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _digest(text: str, *tensors: Tensor) -> str:
    """Of all that an entry holds: a damaged scaling is as wrong as a damaged factor."""
    return hashlib.sha256(f"{text}\n{weight_digest(*tensors)}".encode()).hexdigest()


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
