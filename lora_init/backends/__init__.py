"""The only dispatch policy: which backend runs an op, and why.

A backend is a module in this package with

- `NAME`, `PRIORITY` (higher is tried first by `auto`),
- `why_unsupported(op, *args) -> str | None`: the reason it cannot run this call, or None,
- one function per op it has, named like the op (`dual_project`, `descend`, ...);
- of one with kernels, `fingerprint()`, which changes when they do and has it self-tested, and
  `VERIFIED`, the ops that a committed result shows running on a GPU,
- if it likes, `why_not_auto(op, *args)`: why `auto` leaves calls of an op on a device to the next
  one that this one could run; and `how(op, *args)`: by which of its ways it runs a call.

An explicitly asked-for backend (`LORA_INIT_BACKEND`, `with backend(name)`) runs or raises with the
reason; only `auto` falls through to the next one, and logs why at DEBUG. What failed its self-test
on a device (`lora_init.selftest`) is refused there, asked for or not.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Protocol, cast

import torch

from lora_init.factors import LoraInitError

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "LORA_INIT_BACKEND"
_forced: ContextVar[str | None] = ContextVar("lora_init_backend", default=None)
# (backend, op, device) -> what its self-test found.
_distrusted: dict[tuple[str, str, torch.device], str] = {}


class Backend(Protocol):
    NAME: str
    PRIORITY: int

    def why_unsupported(self, op: str, *args: Any) -> str | None: ...

    def __getattr__(self, op: str) -> Any: ...


class BackendError(LoraInitError):
    """The backend that was asked for does not exist or cannot run this call."""


@cache
def available() -> dict[str, Backend]:
    """All backends by name, the first choice of `auto` first."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = [cast("Backend", importlib.import_module(f"{__name__}.{name}")) for name in names]
    return {b.NAME: b for b in sorted(modules, key=lambda b: -b.PRIORITY)}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use backend `name` ("auto", "reference", ...) inside the block, whatever the environment
    says.

    Raises:
        BackendError: no backend has that name.
    """
    _check_name(name, "backend()")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def select(op: str, *args: Any) -> Backend:
    """The backend that runs `op` on these arguments.

    Raises:
        BackendError: the one asked for is unknown or cannot run the call, or none can.
    """
    reasons, asked = [], _asked()
    for candidate in _candidates(asked):
        reason = _why_not(candidate, op, args, asked)
        if reason is None:
            return candidate
        reasons.append(f"{candidate.NAME}: {reason}")
        logger.debug("%s does not run on %s", op, reasons[-1])
    raise BackendError(f"no backend can run {op}: " + "; ".join(reasons))


def explain(op: str, *args: Any) -> str:
    """Which backend runs a call of `op`, and why the others do not: one line each, first choice
    first.

    Args:
        op: "dual_project", "descend" or "lora_linear".
        args: as backends get them: (group, A, B, precision) for "dual_project", (group, state,
            steps) for "descend", (x, R, A, B) for "lora_linear".

    Raises:
        BackendError: the backend that was asked for is unknown.
    """
    asked = _asked()
    lines, chosen = [], False
    for candidate in _candidates(asked):
        reason = _why_not(candidate, op, args, asked)
        if reason is None and not chosen:
            chosen, notes = True, []
            if candidate.PRIORITY:
                notes.append(_standing(candidate, op))
            if hasattr(candidate, "how") and (how := candidate.how(op, *args)):
                notes.append(how)
            reason = f"runs {op}" + (f" ({'; '.join(notes)})" if notes else "")
        lines.append(f"{candidate.NAME}: {reason or 'could, but comes later'}")
    how = "the first that can is taken" if asked == "auto" else f"{asked!r} was asked for"
    return "\n".join([f"{op}: {how}", *lines])


def may_run(one: Backend, op: str, device: torch.device) -> bool:
    """Whether calls of `op` on a device can come to a backend: it was asked for, or `auto` does not
    leave them to the next.
    """
    asked = _asked()
    if asked != "auto":
        return asked == one.NAME
    probe = torch.empty(0, device=device)
    return not hasattr(one, "why_not_auto") or one.why_not_auto(op, probe) is None


def distrust(name: str, op: str, device: torch.device, reason: str) -> bool:
    """Have backend `name` refused for `op` on a device, for this process' life; whether it was not
    yet.
    """
    known = (name, op, device) in _distrusted
    _distrusted[name, op, device] = reason
    return not known


def device_of(args: Sequence[Any]) -> torch.device | None:
    """Where a call's tensors are: the device of the first that is found."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device
        if isinstance(arg, list | tuple) and (found := device_of(arg)) is not None:
            return found
    return None


def _standing(candidate: Backend, op: str) -> str:
    verified = op in getattr(candidate, "VERIFIED", ())
    return "measured in benchmarks/results" if verified else "unverified: in no committed result"


def _why_not(candidate: Backend, op: str, args: Sequence[Any], asked: str) -> str | None:
    reason = candidate.why_unsupported(op, *args)
    if reason is None and _distrusted:
        device = device_of(args)
        if device is not None:
            reason = _distrusted.get((candidate.NAME, op, device))
    if reason is None and asked == "auto" and hasattr(candidate, "why_not_auto"):
        reason = candidate.why_not_auto(op, *args)
    return reason


def _asked() -> str:
    asked = _forced.get()
    if asked is None:
        asked = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        _check_name(asked, ENVIRONMENT_VARIABLE)
    return asked


def _candidates(asked: str) -> list[Backend]:
    backends = available()
    return list(backends.values()) if asked == "auto" else [backends[asked]]


def _check_name(name: str, source: str) -> None:
    names = ["auto", *available()]
    if name not in names:
        raise BackendError(f"{source}: unknown backend {name!r}; choose one of {', '.join(names)}")
