"""The only dispatch policy: which backend runs an op, and why.

A backend is a module in this package with

- `NAME`, `PRIORITY` (higher is tried first by `auto`),
- `why_unsupported(op, *args) -> str | None`: the reason it cannot run this call, or None,
- one function per op it has, named like the op (`dual_project`, `descend`, ...).

An explicitly asked-for backend (`LORA_INIT_BACKEND`, `with backend(name)`) runs or raises with the
reason; only `auto` falls through to the next one, and logs why at DEBUG.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Protocol, cast

from lora_init.factors import LoraInitError

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "LORA_INIT_BACKEND"
_forced: ContextVar[str | None] = ContextVar("lora_init_backend", default=None)


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
    asked = _forced.get()
    if asked is None:
        asked = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        _check_name(asked, ENVIRONMENT_VARIABLE)
    backends = available()
    candidates = backends.values() if asked == "auto" else [backends[asked]]
    reasons = []
    for candidate in candidates:
        reason = candidate.why_unsupported(op, *args)
        if reason is None:
            return candidate
        reasons.append(f"{candidate.NAME}: {reason}")
        logger.debug("%s does not run on %s", op, reasons[-1])
    raise BackendError(f"no backend can run {op}: " + "; ".join(reasons))


def _check_name(name: str, source: str) -> None:
    names = ["auto", *available()]
    if name not in names:
        raise BackendError(f"{source}: unknown backend {name!r}; choose one of {', '.join(names)}")
