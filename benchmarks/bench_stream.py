"""`lora-init run` on checkpoints larger than what it may hold: memory, time and read bandwidth.

    python -m benchmarks.run stream

A LLaMA-shaped bf16 checkpoint of about 1, 2 and 4 GB in shards of 1 GB is written to a temporary
directory (LORA_INIT_BENCH_DIR, or the system's), run on in a process of its own, and removed. Its
memory is watched from outside. Files are dropped from the page cache before `cat` reads them and
before the run does.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import common

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 2048, 5632, 32000, 16
# 0.10 GB a layer, and 0.26 GB of embeddings.
LAYERS = {"1 GB": 8, "2 GB": 18, "4 GB": 38}
MODULES = {"q,v": "q_proj,v_proj", "q,k,v,o": "q_proj,k_proj,v_proj,o_proj"}
SHARD_BYTES = 1 << 30
OPTIONS = ("--method", "inilora", "--solver", "krylov", "-r", "8", "--no-cache", "--no-check")


def run() -> dict[str, Any]:
    print(
        f"{'model':<6} {'modules':<8} {'GB':>5} {'s':>6} {'s/GB':>6} {'peak MB':>8} {'tree MB':>8} "
        f"{'stated MB':>9} {'survey GB/s':>11} {'whole GB/s':>10} {'cat GB/s':>8}"
    )
    rows = []
    for name, layers in LAYERS.items():
        place = os.environ.get("LORA_INIT_BENCH_DIR")
        with tempfile.TemporaryDirectory(prefix="lora-init-bench-", dir=place) as folder:
            # The model, its residual, and some air.
            needed = 2.5 * 2 * layers * _layer_elements()
            free = shutil.disk_usage(folder).free
            if free < needed:
                print(f"{name}: not measured: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} free")
                continue
            model = Path(folder, "model")
            size = _write_model(model, layers)
            for modules in MODULES:
                rows.append(_measure(name, model, size, modules, Path(folder, "out")))
    return {"machine": common.machine(), "rows": rows}


def _measure(name: str, model: Path, size: int, modules: str, out: Path) -> dict[str, Any]:
    shards = sorted(model.glob("*.safetensors"))
    _drop(shards)
    began = time.perf_counter()
    subprocess.run(["cat", *shards], stdout=subprocess.DEVNULL, check=True)
    cat = time.perf_counter() - began
    _drop(shards)
    command = [sys.executable, "-m", "lora_init", "run", model, "--out", out, *OPTIONS]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*map(str, command), "--target-modules", MODULES[modules]], stdout=subprocess.DEVNULL
    )
    peak = tree = 0
    while process.poll() is None:
        peak = max(peak, _memory(process.pid, "VmHWM"))
        tree = max(tree, sum(_memory(pid, "VmRSS") for pid in _family(process.pid)))
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{name} {modules}: the run ended with status {process.returncode}")
    report = json.loads((out / "report.json").read_text())
    shutil.rmtree(out)
    stream = report["stream"]
    row = {
        "model": name,
        "modules": modules,
        "layers": len(report["layers"]),
        "checkpoint_GB": size / 1e9,
        "target_GB": stream["target_bytes"] / 1e9,
        "seconds": seconds,
        "survey_seconds": stream["survey_seconds"],
        "solve_seconds": stream["solve_seconds"],
        "peak_MB": peak / 1e6,
        "tree_peak_MB": tree / 1e6,
        "stated_peak_MB": stream["peak_bytes"] / 1e6,
        "groups": stream["groups"],
        "survey_GB_s": stream["target_bytes"] / stream["survey_seconds"] / 1e9,
        "whole_GB_s": size / seconds / 1e9,
        "cat_GB_s": size / cat / 1e9,
        "worst_start_drift": max(layer["start_drift"] for layer in report["layers"]),
        "mean_reads": sum(x["info"]["reads"] for x in report["layers"]) / len(report["layers"]),
    }
    print(
        f"{name:<6} {modules:<8} {size / 1e9:>5.2f} {seconds:>6.1f} {seconds / size * 1e9:>6.2f} "
        f"{row['peak_MB']:>8.0f} {row['tree_peak_MB']:>8.0f} {row['stated_peak_MB']:>9.0f} "
        f"{row['survey_GB_s']:>11.2f} {row['whole_GB_s']:>10.2f} {row['cat_GB_s']:>8.2f}"
    )
    return row


def _write_model(directory: Path, layers: int) -> int:
    """Write the checkpoint shard by shard; returns the bytes of its weights."""
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    files: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    size = count = 0

    def flush() -> None:
        nonlocal count
        count += 1
        name = f"model-{count:05}.safetensors"
        save_file(shard, directory / name, {"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    for key, tensor in _tensors(layers):
        shard[key] = tensor
        size += tensor.nbytes
        if sum(x.nbytes for x in shard.values()) >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def _tensors(layers: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    yield "model.embed_tokens.weight", _weight(VOCABULARY, HIDDEN, generator)
    for i in range(layers):
        prefix = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight", _weight(HIDDEN, HIDDEN, generator)
        for name in ("gate_proj", "up_proj"):
            yield f"{prefix}.mlp.{name}.weight", _weight(INTERMEDIATE, HIDDEN, generator)
        yield f"{prefix}.mlp.down_proj.weight", _weight(HIDDEN, INTERMEDIATE, generator)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
    yield "model.norm.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
    yield "lm_head.weight", _weight(VOCABULARY, HIDDEN, generator)


def _weight(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Noise of trained size with 64 directions that stand out of it by a power law."""
    noise = torch.randn(rows, columns, generator=generator).mul_(0.02)
    U = torch.randn(rows, 64, generator=generator) / rows**0.5
    V = torch.randn(64, columns, generator=generator) / columns**0.5
    edge = 0.02 * (rows**0.5 + columns**0.5)  # the largest σ of the noise
    return noise.addmm_(U * (8 * edge * torch.arange(1, 65) ** -0.5), V).to(torch.bfloat16)


def _layer_elements() -> int:
    return 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE


def _drop(files: list[Path]) -> None:
    """From the page cache: reading starts at the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _family(pid: int) -> list[int]:
    """A process and its children, which have none."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *map(int, children)]


def _memory(pid: int, field: str) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
