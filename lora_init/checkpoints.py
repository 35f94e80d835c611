"""Safetensors in and out, without a model object.

A `Checkpoint` is a model's files, read one tensor and written one shard at a time; nothing is
mapped, because the pages of a mapping count as the process's memory.

A `Start` is the sidecar that makes a run resumable: `lora_init/start.safetensors` beside an adapter
holds, per layer, the factors the base's residual was made with (A₀, B₀) and those of now (A, B),
and in its metadata the method, its options, the seed and each original weight's digest.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora_init.cache import write_atomically
from lora_init.factors import Factors, LoraInitError
from lora_init.methods import Layer, Method

SIDECAR = Path("lora_init", "start.safetensors")
# What a residual can be stored in.
WEIGHT_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_DTYPES = WEIGHT_DTYPES | {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_FORMAT = 1
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# The same model in other formats: not the residual, so never copied beside it.
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack"),
    *(".gguf", ".ggml", ".onnx", ".onnx_data", ".ot", ".tflite"),
)


@dataclass(frozen=True)
class LayerStart:
    """One layer's start: A0 (r, in) and B0 (out, r) as stored, s, and what its base weight was."""

    A0: Tensor
    B0: Tensor
    scaling: float
    base_dtype: str
    base_digest: str


@dataclass(frozen=True)
class Start:
    """What a residual base was made from; written beside every checkpoint of the model."""

    method: str
    options: dict[str, Any]
    seed: int
    layers: dict[str, LayerStart] = field(default_factory=dict)
    base_model: str | None = None  # where the untouched base is, if it was read from files
    virtual: bool = False  # the base stays W, and the model subtracts s·B₀A₀

    def factors(self) -> list[Factors]:
        """(A₀, B₀) of every layer, not copied."""
        return [Factors(x.A0, x.B0, x.scaling) for x in self.layers.values()]

    @classmethod
    def of(
        cls,
        method: Method,
        seed: int,
        layers: list[Layer],
        factors: list[Factors],
        virtual: bool = False,
    ) -> Start:
        """The start of a run from its layers and their factors as stored, which are copied."""
        return cls(
            method.name,
            asdict(method),
            seed,
            {
                layer.name: LayerStart(
                    stored.A.detach().cpu().clone(),
                    stored.B.detach().cpu().clone(),
                    stored.scaling,
                    str(layer.weight.dtype).removeprefix("torch."),
                    layer.digest,
                )
                for layer, stored in zip(layers, factors, strict=True)
            },
            virtual=virtual,
        )


def write_start(directory: Path, start: Start, current: dict[str, Tensor]) -> None:
    """Write the sidecar of the adapter in `directory`, atomically.

    Args:
        current: the live adapter's tensors by "<layer>.<A|B|bias>".
    """
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in current.items()}
    for name, layer in start.layers.items():
        tensors |= {f"{name}.A0": layer.A0, f"{name}.B0": layer.B0}
    meta = {
        "format": _FORMAT,
        "method": start.method,
        "options": start.options,
        "seed": start.seed,
        "base_model": start.base_model,
        "virtual": start.virtual,
        "layers": {
            name: {"scaling": x.scaling, "base_dtype": x.base_dtype, "base_digest": x.base_digest}
            for name, x in start.layers.items()
        },
    }
    write_atomically(directory / SIDECAR, save(tensors, {"lora_init": json.dumps(meta)}))


def read_start(directory: str | os.PathLike[str]) -> tuple[Start, dict[str, Tensor]]:
    """The sidecar beside the adapter in `directory`: (start, live tensors by "<layer>.<A|B|bias>").

    Raises:
        LoraInitError: there is none, or it is damaged.
    """
    path = Path(directory) / SIDECAR
    if not path.is_file():
        raise LoraInitError(
            f"{directory}: no {SIDECAR} here, so this is not a checkpoint of an initialised model; "
            f"a plain adapter belongs on the original base model, with PEFT's own load_adapter"
        )
    try:
        meta, tensors = read_safetensors(path)
        content = json.loads(meta["lora_init"])
        if content["format"] != _FORMAT:
            raise LoraInitError(
                f"{path}: format {content['format']}, this version reads {_FORMAT}: "
                f"update lora-init"
            )
        layers = {
            name: LayerStart(tensors.pop(f"{name}.A0"), tensors.pop(f"{name}.B0"), **entry)
            for name, entry in content["layers"].items()
        }
        start = Start(
            content["method"],
            content["options"],
            content["seed"],
            layers,
            content["base_model"],
            content.get("virtual", False),
        )
        return start, tensors
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise LoraInitError(f"{path}: not a lora-init sidecar ({error!r})") from error


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a file.

    Raises:
        LoraInitError: it is missing, truncated, or not safetensors (a pickle is never read).
    """
    with open_safetensors(path) as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def open_safetensors(path: Path) -> Any:
    """`safe_open` for CPU tensors, with one clear error for what is no safetensors file."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise LoraInitError(
            f"{path}: not a readable safetensors file ({error}): fetch it again, or convert it if "
            f"it is a pickle"
        ) from error


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its shard, its first byte in it, its shape, and its dtype as safetensors
    spells it ("BF16").
    """

    shard: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Target:
    """One adapted module of a checkpoint.

    Attributes:
        name: module name in the base model.
        key: of its weight in the checkpoint.
        transposed: the weight lies there as (in, out), as Conv1D has it.
        scaling: s of its adapter.
    """

    name: str
    key: str
    transposed: bool
    scaling: float


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a model in `directory`, single or sharded, never read as a whole."""

    directory: Path

    @cached_property
    def shards(self) -> list[Path]:
        """The weight files, in order.

        Raises:
            LoraInitError: there is none, one is missing, or the index is damaged.
        """
        if (self.directory / _SINGLE).exists():
            return [self.directory / _SINGLE]
        if not (self.directory / _INDEX).is_file():
            raise LoraInitError(f"{self.directory}: {self._why_no_weights()}")
        shards = [self.directory / name for name in sorted(set(self._index.values()))]
        for shard in shards:
            if not shard.is_file():
                raise LoraInitError(f"{shard} is missing, {_INDEX} names it: fetch it again")
        return shards

    @cached_property
    def stamps(self) -> dict[str, list[int]]:
        """Size, time of change and inode of every shard by its name, from when they were first
        asked for: what a shard must still have when it is read.
        """
        return {shard.name: _stamp(shard.stat()) for shard in self.shards}

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every tensor by its key.

        Raises:
            LoraInitError: a shard is damaged, or shards and index do not fit together.
        """
        self.stamps  # noqa: B018 - before the headers, so that no later change goes unnoticed
        found: dict[str, Entry] = {}
        for shard in self.shards:
            open_safetensors(shard)  # checks the header, and that the file is as long as it says
            with shard.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for key, value in header.items():
                if key in found:
                    raise LoraInitError(
                        f"{shard}: {key} is also in {found[key].shard.name}: fetch the shards again"
                    )
                offset = 8 + length + value["data_offsets"][0]
                found[key] = Entry(shard, offset, tuple(value["shape"]), value["dtype"])
        if self.shards[0].name != _SINGLE:
            for key, name in self._index.items():
                if key not in found or found[key].shard.name != name:
                    raise LoraInitError(
                        f"{self.directory}: {_INDEX} says {key} is in {name}, where it is not: "
                        f"fetch the shards again"
                    )
        return found

    @property
    def elements(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.stat().st_size for shard in self.shards)

    def tensor(self, key: str) -> Tensor:
        """One tensor, read into memory of its own.

        Raises:
            LoraInitError: its shard cannot be read, is shorter than its header says, or is not what
                it was when the header was read.
        """
        entry = self.entries[key]
        tensor = _mapped(entry.shape, _DTYPES[entry.dtype])
        rest = _bytes(tensor)
        try:
            with entry.shard.open("rb", buffering=0) as file:
                file.seek(entry.offset)
                # One call reads at most 2 GiB.
                while rest and (count := file.readinto(rest)):
                    rest = rest[count:]
                self._compare(entry.shard, os.fstat(file.fileno()))
        except OSError as error:
            raise LoraInitError(f"{entry.shard}: {key} cannot be read ({error})") from error
        if rest:
            raise LoraInitError(
                f"{entry.shard} is truncated: it ends {len(rest)} bytes before the end of {key}: "
                f"fetch it again"
            )
        return tensor

    def check_unchanged(self, shard: Path) -> None:
        """Raises `LoraInitError` if a shard is not what it was when its header was read."""
        try:
            self._compare(shard, shard.stat())
        except OSError as error:
            raise LoraInitError(f"{shard} cannot be read any more ({error})") from error

    def _compare(self, shard: Path, found: os.stat_result) -> None:
        before, now = self.stamps[shard.name], _stamp(found)
        if before != now:
            what = ("size", "time of change", "inode")
            changes = [
                f"{name} {a} -> {b}" for name, a, b in zip(what, before, now, strict=True) if a != b
            ]
            raise LoraInitError(
                f"{shard} changed during the run ({', '.join(changes)}): let nothing write to the "
                f"model, and start again"
            )

    @cached_property
    def _index(self) -> dict[str, str]:
        path = self.directory / _INDEX
        try:
            files = dict(json.loads(path.read_bytes())["weight_map"])
            if not files or any(Path(name).name != name for name in files.values()):
                raise ValueError("weight_map must give each tensor's file in this directory")
            return files
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LoraInitError(
                f"{path}: not a readable index ({error}): fetch it again"
            ) from error

    def _why_no_weights(self) -> str:
        for path in sorted(self.directory.glob("*")):
            if path.suffix in (".bin", ".pt", ".pth"):
                return (
                    f"only pickled weights ({path.name}), which are never read: convert them once "
                    f"with transformers' from_pretrained(...).save_pretrained(...)"
                )
        return f"no {_SINGLE} and no {_INDEX} here: name the directory of a transformers model"


def copy_other_files(checkpoint: Checkpoint, directory: Path) -> None:
    """Copy all of a model's files but its weights: config, tokenizer, index, licence.

    Hidden files and weights in other formats are left out.

    Args:
        directory: where to; files of the same name are replaced.
    """
    for path in sorted(checkpoint.directory.rglob("*")):
        relative = path.relative_to(checkpoint.directory)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            if path.name.endswith(".index.json"):
                wanted = relative == Path(_INDEX)
            else:
                wanted = path.suffix not in _WEIGHT_SUFFIXES
            if wanted:
                (directory / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, directory / relative)


def write_shard(
    checkpoint: Checkpoint,
    shard: Path,
    directory: Path,
    residuals: Mapping[str, Callable[[], Tensor]],
    scratch: Path,
) -> None:
    """Write one weight file with some tensors replaced; under its name it is there only whole.

    A residual has its weight's dtype and shape, so a shard keeps its header: it is copied and then
    overwritten where a residual goes. All other tensors and the metadata stay byte for byte.

    Args:
        residuals: key -> function giving R as it lies in the file; called when it is written.
        scratch: a directory of the same file system, for the file while it is written.

    Raises:
        LoraInitError: the shard changed since its header was read.
    """
    temporary = scratch / f"{secrets.token_hex(4)}-{shard.name}"
    try:
        shutil.copyfile(shard, temporary)
        with temporary.open("r+b", buffering=0) as file:
            for key, residual in residuals.items():
                file.seek(checkpoint.entries[key].offset)
                R = residual().detach().cpu().contiguous()
                rest = _bytes(R)
                while rest:  # as with reading: 2 GiB a call
                    rest = rest[file.write(rest) :]
            # A name must never stand for a file that a crash of the machine cut short: a resumed
            # run trusts it. This also brings out a full quota that writing alone did not.
            os.fsync(file.fileno())
        checkpoint.check_unchanged(shard)
        temporary.replace(directory / shard.name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new CPU tensor in pages of its own, which go back to the system with it.

    From malloc, tensors of some megabytes that one thread makes and another one frees stay with the
    process: 24 weights of 8 MB, solved one by one, left 190 MB behind.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(_pages(size), dtype=torch.uint8).view(dtype).view(shape)


def _pages(size: int) -> mmap.mmap:
    if os.name == "nt":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _bytes(tensor: Tensor) -> memoryview:
    """Those of a contiguous CPU tensor, to be read from or written to."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ino]
