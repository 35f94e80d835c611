"""Kernels against the reference on this device, before they are trusted there.

`approximate`, `initialize`, `fuse` and `lora-init run` call `ensure` when they meet a device, never
an op itself: that would fire under graph capture and tracing. The verdict is kept on disk for this
device, driver, torch, package, kernels and tests. What fails is refused there, and a warning names
it. `LORA_INIT_SELFTEST=0` skips all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from importlib.resources import files
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lora_init.backends import Backend, available, backend, distrust, may_run, reference
from lora_init.cache import default_directory, write_atomically
from lora_init.distributed import Ranks
from lora_init.ops.descend import DescentState, Optimizer, descend
from lora_init.ops.dual_project import dual_project
from lora_init.testing import DTYPES, SHAPES, gaussian

ENVIRONMENT_VARIABLE = "LORA_INIT_SELFTEST"

Verdict = dict[str, str | None]
"""Op -> what is wrong with it, or None."""

# ‖error‖/‖exact‖ that passes. Two bf16 parts of a factor leave 8e-6; TF32 in the place of fp32, or
# one part instead of two, leave 3e-4 and more.
_ERROR = 3e-5
_STEPS = 20
# Beside the awkward shapes one that kernels cut into several blocks, whose partials they add up.
_CASES = (*SHAPES.values(), (600, 1100, 16))
# (rows, out, in, r) of `lora_linear`: no multiple of a tile, and several tiles that TMA can read.
_CALLS = ((70, 150, 201, 3), (300, 264, 520, 16))
# Of the calls with a virtual start: rows, out and in from above with the rank from above, so that
# of all Triton kernels the two products alone are compiled once more, for the halves that cancel,
# and again for those of fp32 factors, which are PEFT's beside a 16-bit base.
_STARTED = (300, 264, 520, 3)
_OWN = ("selftest.py", "testing.py")  # what is run, and held against what
_verdicts: dict[tuple[str, torch.device], Verdict] = {}


def ensure(devices: Iterable[torch.device], job: Ranks | None = None) -> None:
    """Test every backend with kernels that calls on these devices can come to, unless that was done
    before, and refuse what fails from then on, with a warning. What no call comes to is not run: a
    kernel that hangs would be the first that a user hears of it.

    Args:
        job: the ranks that call this together; what fails on one is used on none.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0":
        return
    job, devices = job or Ranks(), set(devices)
    for name, one in available().items():
        if not hasattr(one, "fingerprint"):
            continue
        tested = [d for d in devices if any(may_run(one, op, d) for op in _TESTS)]
        for device in tested:
            if (name, device) not in _verdicts:
                _verdicts[name, device] = _remembered(one, device)
        own = {
            op: f"on {device_name(device)}, {reason}"
            for device in tested
            for op, reason in _verdicts[name, device].items()
            if reason
        }
        # Always gathered: what this process has seen before, another may meet for the first time.
        failures = {op: reason for each in job.gather(own) for op, reason in each.items()}
        for op, reason in failures.items():
            new = [
                distrust(name, op, device, f"failed its self-test {reason}") for device in devices
            ]
            if any(new) and job.rank == 0:
                warnings.warn(
                    f"{name}'s {op} is wrong and will not be used ({reason}); please report it",
                    stacklevel=3,
                )


def verdict(one: Backend, device: torch.device) -> Verdict:
    """Run every op of a backend on small cases on `device` and compare; ops and cases that it does
    not support count as right.
    """
    found: Verdict = {}
    for op, test in _TESTS.items():
        try:
            found[op] = test(one, device)
        except Exception as error:  # whatever a compiler or a driver raises
            found[op] = f"{type(error).__name__}: {error}".partition("\n")[0]
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _remembered(one: Backend, device: torch.device) -> Verdict:
    path = default_directory() / "selftest" / f"{_key(one, device)}.json"
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(path.read_bytes())
        if set(kept) == set(_TESTS):
            return dict(kept)
    found = verdict(one, device)
    # Where it cannot be kept, every process tests anew.
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps(found).encode())
    return found


def _key(one: Backend, device: torch.device) -> str:
    own = b"".join((files(__package__) / name).read_bytes() for name in _OWN)
    tests = hashlib.sha256(own).hexdigest()
    parts = [one.NAME, one.fingerprint(), tests, version("lora-init"), torch.__version__]
    parts.append(device_name(device))
    if device.type == "cuda":
        driver = getattr(torch._C, "_cuda_getDriverVersion", str)()
        parts += [str(torch.cuda.get_device_capability(device)), str(driver)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _cases(
    dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(W, A, B) of all test shapes as one ragged group."""
    group, A, B = [], [], []
    for seed, (out_features, in_features, r) in enumerate(_CASES):
        group.append(gaussian(out_features, in_features, dtype, seed).to(device))
        A.append(gaussian(r, in_features, seed=seed + 100).to(device))
        B.append(gaussian(out_features, r, seed=seed + 200).to(device))
    return group, A, B


def _test_dual_project(one: Backend, device: torch.device) -> str | None:
    for dtype in DTYPES:
        group, A, B = _cases(dtype, device)
        if one.why_unsupported("dual_project", group, A, B, "full") is None:
            first, again = (one.dual_project(group, A, B, "full") for _ in range(2))
            with backend("reference"):
                exact = dual_project(_wide(group), _wide(A), _wide(B))
            for side in (0, 1):
                got, twin, truth = ([pair[side] for pair in x] for x in (first, again, exact))
                if wrong := _compared(group, got, truth, twin):
                    return wrong
    return None


def _test_descend(one: Backend, device: torch.device) -> str | None:
    for dtype in DTYPES:
        for optimizer in (Optimizer(), Optimizer("gd", lr=5.0)):
            # A backend that refuses one case may take the others.
            taken = [
                case
                for case in zip(*_cases(dtype, device), strict=True)
                if one.why_unsupported("descend", *_problem([case], optimizer), _STEPS) is None
            ]
            if taken:
                (group, state), (_, twin) = (_problem(taken, optimizer) for _ in range(2))
                for each in (state, twin):
                    one.descend(group, each, _STEPS)
                exact = _problem([_wide(case) for case in taken], optimizer)
                with backend("reference"):
                    descend(*exact, _STEPS)
                if wrong := _compared(group, state.params, exact[1].params, twin.params):
                    return wrong
    return None


def _problem(
    cases: Sequence[Sequence[Tensor]], optimizer: Optimizer
) -> tuple[list[Tensor], DescentState]:
    group, A, B = (list(tensors) for tensors in zip(*cases, strict=True))
    return group, DescentState.start(A, B, optimizer)


def _test_lora_linear(one: Backend, device: torch.device) -> str | None:
    dtypes = [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32)]
    calls = [
        (_call(sizes, dtype, low), sizes[-1], p)
        for (dtype, low), sizes, p in product(dtypes, _CALLS, (0.0, 0.25))
    ]
    calls += [
        (_call(_STARTED, torch.bfloat16, low, start=True), _STARTED[-1], 0.0)
        for low in (torch.bfloat16, torch.float32)
    ]
    for drawn, trained, p in calls:
        operands = [tensor.to(device) for tensor in drawn]
        if one.why_unsupported("lora_linear", *operands[:4]) is None:
            got, twin = (_differentiated(one, operands, trained, p) for _ in range(2))
            exact = _differentiated(reference, _wide(operands), trained, p)
            if wrong := _compared([operands[0]] * len(got), got, exact, twin):
                start = " with a virtual start" if trained < len(operands[2]) else ""
                return f"{wrong}{start}"
    return None


def _call(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, low: torch.dtype, start: bool = False
) -> list[Tensor]:
    """x, R, A, B, bias, dy; with a start A is [A; A₀] and B is [B, −B₀]."""
    rows, out_features, in_features, r = sizes
    if start:
        r *= 2
    return [
        gaussian(rows, in_features, dtype, 1),
        gaussian(out_features, in_features, dtype, 2),
        gaussian(r, in_features, low, 3),
        gaussian(out_features, r, low, 4),
        gaussian(1, out_features, dtype, 5)[0],
        gaussian(rows, out_features, dtype, 6),
    ]


def _differentiated(one: Any, operands: Sequence[Tensor], trained: int, p: float) -> list[Tensor]:
    """y, dx, dA, dB and dbias by a backend's own functions."""
    x, R, A, B, bias, dy = operands
    seed = torch.tensor([2024], device=x.device) if p else None
    options = (seed, 4.0, p, trained)
    y, S = one.lora_linear_forward(x, R, A, B, bias, *options)
    return [y, *one.lora_linear_backward(dy, x, R, A, B, S, *options, [True] * 4)]


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.cpu().double() for tensor in tensors]


def _compared(
    group: Sequence[Tensor], got: Sequence[Tensor], exact: Sequence[Tensor], twin: Sequence[Tensor]
) -> str | None:
    for W, a, truth, b in zip(group, got, exact, twin, strict=True):
        case = f"{tuple(W.shape)} {str(W.dtype).removeprefix('torch.')}"
        error = float((a.cpu().double() - truth).norm() / truth.norm())
        # What is stored in 16 bits was rounded, once or twice.
        if not error <= (torch.finfo(a.dtype).eps if a.dtype.itemsize == 2 else _ERROR):
            return f"{case}: error {error:.1e} against fp64"
        if not torch.equal(a, b):
            return f"{case}: other bits the second time"
    return None


_TESTS: dict[str, Callable[[Backend, torch.device], str | None]] = {
    "dual_project": _test_dual_project,
    "descend": _test_descend,
    "lora_linear": _test_lora_linear,
}
