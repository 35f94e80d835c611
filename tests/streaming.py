"""What the tests of streamed runs share, and the process that they start:

    python tests/streaming.py SETTINGS ARGUMENT...

is `lora-init` with its plan given and mishaps arranged. SETTINGS is JSON: "plan", a file with the
plan, so that no child process is needed for it; "mishaps", a list of [rank, point, n, action]: on
that rank, the action at the n-th time that the point is passed. The rest are arguments of
`lora-init`.
"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import lora_init.integrations.checkpoint as job
from lora_init.checkpoints import Checkpoint
from lora_init.cli import main
from lora_init.journal import Journal
from lora_init.staging import PREFIX

# Before what is named here.
POINTS: dict[str, tuple[type, str]] = {
    "survey": (Journal, "save_survey"),
    "layer": (Journal, "save_layer"),
    "shard": (Checkpoint, "check_unchanged"),
    "place": (Journal, "place"),
}


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ACTIONS: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "full": full,
    "wait": lambda: time.sleep(2),
}


def arrange(point: str, n: int, action: str) -> None:
    owner, name = POINTS[point]
    original, calls = getattr(owner, name), []

    def patched(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == n:
            ACTIONS[action]()
        return original(*args)

    setattr(owner, name, patched)


Mishap = tuple[int, str, int, str]
Files = dict[str, bytes]

# The same run, in Python and on the command line.
OPTIONS = {"method": "pissa", "r": 4, "check": False, "cache": False, "progress": False}
ARGUMENTS = ("--method", "pissa", "-r", "4", "--no-check", "--no-cache")


def save_model(directory: Path) -> Path:
    """A LLaMA with q and v of four layers to adapt, over several shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="150KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def worker_command(
    model: Path, out: Path, plan_file: Path, mishaps: Sequence[Mishap], more: Sequence[str]
) -> list[str]:
    """To start this file as a process; the plan is made here and written to `plan_file`."""
    from lora_init.integrations.transformers import plan

    lora = {"r": 4, "lora_alpha": 4, "use_rslora": False, "target_modules": None}
    base = {"base_model_name_or_path": str(out / "residual")}
    shapes = {key: x.shape for key, x in Checkpoint(model).entries.items()}
    plan_file.write_text(json.dumps(plan(str(model), None, lora | base, shapes)))
    settings = json.dumps({"plan": str(plan_file), "mishaps": mishaps})
    parts = [__file__, settings, "run", model, "--out", out, *ARGUMENTS, *more]
    return [str(part) for part in parts]


def files(out: Path) -> Files:
    """The outputs that must be the same byte for byte."""
    found = [p for name in ("adapter", "residual") for p in (out / name).rglob("*") if p.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(found)}


def leftovers(out: Path) -> list[Path]:
    return list(out.parent.glob(f"{PREFIX}*"))


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    plan = json.loads(Path(settings["plan"]).read_text())
    job.call = lambda *_, **__: plan
    for rank, point, n, action in settings["mishaps"]:
        if rank == int(os.environ.get("RANK", 0)):
            arrange(point, n, action)
    status = main(sys.argv[2:])
    print("imported:", sorted({"peft", "transformers"} & sys.modules.keys()), file=sys.stderr)
    sys.exit(status)
