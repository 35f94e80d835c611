"""The optional compiled module `lora_init._C`: whether it is there, and what it was built for."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Any


@cache
def module() -> Any | None:
    """`lora_init._C`, or None where the installation has none, or one that does not load (it warns
    then). Needs neither a GPU nor a driver.
    """
    try:
        return import_module("lora_init._C")
    except ModuleNotFoundError:
        return None
    except ImportError as error:  # of another C++ library, say: all else still works
        warnings.warn(
            f"lora_init._C does not load and is not used ({error}): install lora-init again here",
            stacklevel=2,
        )
        return None


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
