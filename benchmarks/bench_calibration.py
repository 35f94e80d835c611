"""Gradients that are never formed: how near sketches come to exact ones, and what each takes.

    python -m benchmarks.run calibration

SmolLM2-135M, all linear layers, rank 8, movie reviews. Angles: 32 batches of 2 reviews cut to 32
tokens; principal angles in degrees between the spans of a sketched start's factors and of the exact
one's, G from plain autograd, its SVD in fp64; the median and the largest of a layer's angles, and
the excess: how much more of ‖G‖² than the exact start BBᵀG + GAᵀA misses of G (lora_ga, orthonormal
factors), or the best product on B's and A's spans (lora_one); each a mean over the layers of a
type. Memory: how far the resident set rose at most over that of the loaded model, in a process of
its own, on 4 batches of one review of 32 tokens; "plain" keeps W.grad of every layer and solves
nothing.
"""

import copy
import statistics
import tempfile
import time
from collections import defaultdict
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_init
from benchmarks import common, data

R = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = ("lora_ga", "lora_one")
SKETCHES = (1, 2, 3)
Batch = dict[str, Tensor]


def run() -> dict[str, Any]:
    try:
        data.smollm2(), data.movie_reviews()
    except data.Unavailable as reason:
        print(f"skipped, {reason}")
        return {"machine": common.machine(), "rows": [{"status": f"not measured: {reason}"}]}
    rows = _angles()
    rows += _memory()
    return {"machine": common.machine(), "rows": rows}


def _angles() -> list[dict[str, Any]]:
    base = _model()
    batches = _batches(32, 2, 32)
    began = time.perf_counter()
    gradients = _gradients(base, batches)
    exact = {name: torch.linalg.svd(G, full_matrices=False) for name, G in gradients}
    print(f"exact: {time.perf_counter() - began:.0f} s")
    print(
        f"{'method':<9} {'passes':>6} {'type':<10} {'A':>5} {'max':>6} {'B':>5} {'max':>6} "
        f"{'excess':>8}"
    )
    rows = []
    with tempfile.TemporaryDirectory() as cache:  # both methods take the same sketches
        for passes in SKETCHES:
            for method in METHODS:
                model = _adapted(copy.deepcopy(base))
                began = time.perf_counter()
                _initialize(model, method, batches, cache, passes=passes)
                seconds = time.perf_counter() - began
                rows += _compare(model, exact, method, passes, seconds)
    return rows


def _compare(
    model: nn.Module, exact: dict[str, Any], method: str, passes: int, seconds: float
) -> list[dict[str, Any]]:
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for name, (U, S, Vh) in exact.items():
        module: Any = model.get_submodule(f"base_model.model.{name}")
        A, B = (w.default.weight.detach().double() for w in (module.lora_A, module.lora_B))
        at = slice(R, 2 * R) if method == "lora_ga" else slice(R)
        right, left = (torch.linalg.qr(x)[0] for x in (A.T, B))
        G = (U * S) @ Vh
        # Of G, what a step of training moves along (lora_ga), or what the start is (lora_one).
        if method == "lora_ga":
            captured, best = left @ (left.T @ G) + (G @ right) @ right.T, S[2 * R :]
        else:
            captured, best = left @ (left.T @ G @ right) @ right.T, S[R:]
        missed = (G - captured).square().sum() - best.square().sum()
        angles = [_degrees(right, Vh[:R].T), _degrees(left, U[:, at])]
        excess = float(missed / S.square().sum())
        found[name.rpartition(".")[2]].append(
            (*(f(a) for a in angles for f in (statistics.median, max)), excess)
        )
    rows = []
    for kind, values in found.items():
        means = [statistics.mean(column) for column in zip(*values, strict=True)]
        keys = ("A_median", "A_largest", "B_median", "B_largest", "excess")
        rows.append(
            {"method": method, "passes": passes, "type": kind, "layers": len(values)}
            | dict(zip(keys, means, strict=True))
            | {"seconds_of_all": seconds}
        )
        print(
            f"{method:<9} {passes:>6} {kind:<10} {means[0]:>5.1f} {means[1]:>6.1f} "
            f"{means[2]:>5.1f} {means[3]:>6.1f} {means[4]:>8.1e}"
        )
    print(f"{method:<9} {passes:>6} all of it in {seconds:.0f} s")
    return rows


def _memory() -> list[dict[str, Any]]:
    print(f"{'gradients':<28} {'MB':>6} {'s':>5}")
    rows = []
    cases: list[tuple[str, dict[str, Any] | None]] = [
        ("plain", None),
        ("exact_gradient=True", {"exact_gradient": True}),
        *((f"sketch, passes={p}", {"passes": p}) for p in SKETCHES),
    ]
    for name, options in cases:
        peak, seconds = common.in_fresh_process(_peak, options)
        rows.append({"gradients": name, "peak_extra_bytes": peak, "seconds": seconds})
        print(f"{name:<28} {peak / 1e6:>6.0f} {seconds:>5.0f}")
    return rows


def _peak(options: dict[str, Any] | None) -> tuple[int | None, float]:
    """Bytes beyond the loaded model, and seconds, of lora_ga or of gradients alone."""
    model, batches = _model(), _batches(4, 1, 32)
    # The file's pages come when they are read, and the first pass starts libraries.
    for name, _ in _gradients(model, batches[:1], ["layers.0.self_attn.v_proj"]):
        assert name
    sum(float(p.sum()) for p in model.parameters())
    if options is not None:
        model = _adapted(model)

    def work() -> None:
        if options is None:
            for weight in _weights(model).values():
                weight.requires_grad_(True)
            for batch in batches:
                model(**batch).loss.backward()
        else:
            _initialize(model, "lora_ga", batches, False, **options)

    began = time.perf_counter()
    peak = common.peak_extra_bytes(work)
    return peak, time.perf_counter() - began


def _model() -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(data.smollm2()).eval()
    return model.requires_grad_(False)


def _adapted(base: nn.Module) -> Any:
    return get_peft_model(base, LoraConfig(r=R, lora_alpha=R, target_modules=TARGETS))


def _initialize(
    model: Any, method: str, batches: list[Batch], cache: str | Literal[False], **options: Any
) -> None:
    calibration = lora_init.Calibration(batches, num_batches=len(batches), cache=cache)
    lora_init.initialize(
        model, method, calibration=calibration, cache=False, progress=False, **options
    )


def _batches(count: int, size: int, length: int) -> list[Batch]:
    tokenizer = AutoTokenizer.from_pretrained(data.smollm2())
    tokenizer.pad_token = tokenizer.eos_token
    rows = data.split(data.movie_reviews())[0]
    found = []
    for i in range(0, count * size, size):
        texts = [text for text, _ in rows[i : i + size]]
        batch = dict(
            tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=length)
        )
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        found.append(batch)
    return found


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters()
        if name.split(".")[-2] in TARGETS
    }


def _gradients(
    model: nn.Module, batches: list[Batch], names: list[str] | None = None
) -> list[tuple[str, Tensor]]:
    """(name, G in fp64) by autograd; the model's weights want no gradient before and after."""
    weights = {
        name: weight
        for name, weight in _weights(model).items()
        if names is None or any(name.endswith(wanted) for wanted in names)
    }
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches:
        model(**batch).loss.backward()
    found = []
    for name, weight in weights.items():
        assert weight.grad is not None
        found.append((name, weight.grad.double() / len(batches)))
        weight.grad = None
        weight.requires_grad_(False)
    return found


def _degrees(a: Tensor, b: Tensor) -> list[float]:
    """Principal angles between the spans of orthonormal columns."""
    cosines = torch.linalg.svdvals(a.T @ b).clamp(max=1)
    degrees: list[float] = torch.rad2deg(torch.acos(cosines)).tolist()
    return degrees
