"""Tokens per second of LoRA training, end to end: `fuse` against stock PEFT on a 1B LLaMA shape.

    python -m benchmarks.run fuse
    python -m benchmarks.bench_fuse --quick

Random weights in the shape of Llama-3.2-1B in bf16, LoRA of rank 16 on all linear layers, AdamW on
the adapter; a step is forward, backward and update, timed whole with the GPU synchronised around
each batch of steps. A way to train gets a speed only if its loss curve is stock PEFT's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lora_init
from benchmarks import common

Row = dict[str, Any]

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,  # not 128,256: the head and the loss are not what is compared
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
CHECKED = 5
"""Steps of which the losses are compared."""
TOLERANCE = 5e-3
"""Of a bf16 model's loss, relative."""


@dataclass(frozen=True)
class Case:
    """Sequences a step of so many tokens; adapters in bf16, or in fp32 under autocast as Trainer
    has it.
    """

    batch: int = 4
    length: int = 2048
    dropout: float = 0.0
    autocast: bool = False


CASES = (Case(), Case(autocast=True), Case(dropout=0.1))


def ways(quick: bool = False) -> Iterator[tuple[str, Callable[[PeftModel], Any]]]:
    """What is compared, by name: from a PEFT model to what is called in its place.

    Args:
        quick: without torch.compile, which takes a minute each.
    """

    def fused(model: PeftModel) -> PeftModel:
        lora_init.fuse(model)
        return model

    def virtual(model: PeftModel) -> PeftModel:
        # 0 steps: the start is not what is timed.
        lora_init.initialize(model, steps=0, cache=False, progress=False, residual="virtual")
        return fused(model)

    def compiled(model: PeftModel) -> Any:
        for layer in model.base_model.model.model.layers:
            layer.compile(dynamic=False)
        return model

    yield "stock PEFT", lambda model: model
    yield "fused", fused
    yield "fused, virtual residual", virtual
    if not quick:
        yield "stock PEFT, torch.compile", compiled
        yield "fused, torch.compile", lambda model: compiled(fused(model))


def adapted(shape: dict[str, int], case: Case, device: torch.device) -> PeftModel:
    """The same model at every call, without gradient checkpointing."""
    torch.manual_seed(0)
    with device:
        base = LlamaForCausalLM(LlamaConfig(**shape, use_cache=False)).to(torch.bfloat16)
    config = LoraConfig(target_modules="all-linear", r=16, lora_dropout=case.dropout)
    return get_peft_model(base, config, autocast_adapter_dtype=case.autocast).train()


def stepper(model: Any, case: Case, device: torch.device) -> Callable[[Tensor], Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")

    def step(tokens: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=case.autocast):
            loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure(
    shape: dict[str, int],
    case: Case,
    device: torch.device,
    steps: int,
    repeats: int,
    quick: bool = False,
) -> list[Row]:
    """A row for each way to train."""
    generator = torch.Generator(device).manual_seed(1)
    size = (case.batch, case.length)
    tokens = torch.randint(shape["vocab_size"], size, generator=generator, device=device)
    rows: list[Row] = []
    expected: list[float] = []
    for name, prepare in ways(quick):
        row: Row = {"case": vars(case) | {"shape": shape["hidden_size"]}, "method": name}
        rows.append(row)
        torch.compiler.reset()
        step = stepper(prepare(adapted(shape, case, device)), case, device)
        torch.manual_seed(2)
        losses = [float(step(tokens)) for _ in range(CHECKED)]
        expected = expected or losses
        off = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
        row["loss_off"] = off
        # Masks and, for the virtual start, factors are others, so that curves differ by design.
        comparable = not case.dropout and "virtual" not in name
        if not off <= (TOLERANCE if comparable else 10 * TOLERANCE):
            row["status"] = f"refused: its loss is off by {off:.1e}"
            print(name, row["status"], flush=True)
            continue
        row |= timed(lambda step=step: step(tokens), device, steps, repeats)
        row["tokens_s"] = case.batch * case.length / row["step_ms"] * 1e3
        row["x_stock"] = row["tokens_s"] / rows[0]["tokens_s"]
        row["status"] = "measured"
        print(line(row), flush=True)
    return rows


def timed(call: Callable[[], object], device: torch.device, steps: int, repeats: int) -> Row:
    """Median ms of a step and the peak of allocated memory."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            call()
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / steps * 1e3)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    return {"step_ms": sorted(times)[len(times) // 2], "peak_GB": peak}


def line(row: Row) -> str:
    case = Case(**{key: value for key, value in row["case"].items() if key != "shape"})
    memory = "" if row["peak_GB"] is None else f", peak {row['peak_GB']:.1f} GB"
    return (
        f"{case.batch} x {case.length}, dropout {case.dropout:g}"
        f"{', autocast' if case.autocast else ''}: {row['method']:<26} "
        f"{row['tokens_s']:>8.0f} tokens/s, {row['x_stock']:.3f} x stock{memory}, "
        f"loss within {row['loss_off']:.1e}"
    )


def run(quick: bool = False) -> dict[str, Any]:
    """Every case, or why none was measured."""
    content: dict[str, Any] = {"machine": common.machine(), "rows": []}
    if not torch.cuda.is_available():
        content["rows"].append({"status": "not measured: no CUDA device"})
        print(content["rows"][0]["status"])
        return content
    device = torch.device("cuda", torch.cuda.current_device())
    for case in CASES:
        content["rows"] += measure(LLAMA_1B, case, device, 3, 3, quick)
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without torch.compile")
    run(parser.parse_args().quick)


if __name__ == "__main__":
    main()
