"""The optional compiled module `lora_init._C`: whether it is there, and what it was built for."""

from __future__ import annotations

import hashlib
import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

_INTERFACE = Path(__file__).resolve().parents[2] / "csrc" / "bindings.cpp"
"""There in a checkout, where sources can be newer than what was built of them."""


@cache
def module() -> Any | None:
    """`lora_init._C`, or None where the installation has none, or one that does not load or is of
    other sources (it warns then). Needs neither a GPU nor a driver.
    """
    try:
        found = import_module("lora_init._C")
    except ModuleNotFoundError:
        return None
    except ImportError as error:  # of another C++ library, say: all else still works
        warnings.warn(
            f"lora_init._C does not load and is not used ({error}): install lora-init again here",
            stacklevel=2,
        )
        return None
    if stale(found, _INTERFACE):
        warnings.warn(
            f"{found.__file__} was built of another csrc/bindings.cpp and is not used: build it "
            "again, LORA_INIT_CUDA=1 pip install --no-deps -e .",
            stacklevel=2,
        )
        return None
    return found


def stale(built: Any, interface: Path) -> bool:
    """Whether a module was built of another interface than the source has, where there is one."""
    if not interface.exists():
        return False
    digest = hashlib.sha256(interface.read_bytes()).hexdigest()
    return bool(getattr(built, "interface", None) != digest)


def build_info() -> dict[str, str | None]:
    """What this installation consists of.

    Returns:
        "version" of the package; "cuda", the version of the compiler that built the CUDA kernels,
        and "archs", what they were built for ("80-real 89 90a-real", as CMake names them), both
        None where they were not: `LORA_INIT_CUDA=1 pip install ...` then says why.
    """
    native = module()
    return {
        "version": version("lora-init"),
        "cuda": native.cuda_version if native else None,
        "archs": native.archs if native else None,
    }
