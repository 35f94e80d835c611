"""lora-init: LoRA starts that approximate the weight, and the kernels to compute and train them.

See README.md; the names below are the public API.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_init.backends import BackendError, backend, explain
from lora_init.calibration import Calibration
from lora_init.engine import approximate
from lora_init.factors import Factors, LoraInitError
from lora_init.methods import methods
from lora_init.optim import lora_plus_groups

if TYPE_CHECKING:
    from lora_init import nn
    from lora_init.adapters import export_adapter
    from lora_init.integrations.checkpoint import initialize_checkpoint
    from lora_init.integrations.peft import fuse, initialize, resume, save_adapter, unfuse
    from lora_init.native import build_info
    from lora_init.ops.lora_linear import lora_linear

__all__ = [
    "BackendError",
    "Calibration",
    "Factors",
    "LoraInitError",
    "approximate",
    "backend",
    "build_info",
    "explain",
    "export_adapter",
    "fuse",
    "initialize",
    "initialize_checkpoint",
    "lora_linear",
    "lora_plus_groups",
    "methods",
    "nn",
    "resume",
    "save_adapter",
    "unfuse",
]

# Imported at first use: PEFT and transformers are an extra and take seconds to import.
_LAZY = {
    "build_info": "lora_init.native",
    "export_adapter": "lora_init.adapters",
    "fuse": "lora_init.integrations.peft",
    "initialize": "lora_init.integrations.peft",
    "initialize_checkpoint": "lora_init.integrations.checkpoint",
    "resume": "lora_init.integrations.peft",
    "save_adapter": "lora_init.integrations.peft",
    "lora_linear": "lora_init.ops.lora_linear",
    "unfuse": "lora_init.integrations.peft",
}


def __getattr__(name: str) -> Any:
    if name == "nn":
        return import_module("lora_init.nn")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
