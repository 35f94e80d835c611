"""Functions of `integrations.transformers`, called in a process of their own.

PEFT and transformers take seconds to import and some 200 MB that a streamed run would keep to its
end, on every rank. What needs them is a short question with a short answer, so it is asked of a
child: JSON in on stdin, JSON out on stdout, nothing pickled, and no `multiprocessing`, which would
import the caller's main module once more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from importlib import import_module
from typing import Any

from lora_init.factors import LoraInitError

_MODULE = "lora_init.integrations.transformers"


def call(function: str, **arguments: Any) -> Any:
    """What `integrations.transformers.<function>(**arguments)` returns.

    Where this process has imported transformers already, it is simply called.

    Args:
        arguments: JSON-able, as is the result.

    Raises:
        LoraInitError: raised there, or the child ended without an answer.
    """
    if "transformers" in sys.modules:
        return getattr(import_module(_MODULE), function)(**arguments)
    child = subprocess.run(
        # -P: a file in the working directory must not pass for a library.
        [sys.executable, "-P", "-m", __name__, function],
        input=json.dumps(arguments),
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise LoraInitError(
            f"the process that was asked for {function!r} ended with status {child.returncode}: "
            f"{last}"
        )
    answer = json.loads(child.stdout)
    for message in answer["warnings"]:
        warnings.warn(message, stacklevel=2)
    if "error" in answer:
        raise LoraInitError(answer["error"])
    return answer["result"]


def _main() -> None:
    arguments = json.loads(sys.stdin.read())
    stdout, sys.stdout = sys.stdout, sys.stderr  # which is for the answer alone
    answer: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        try:
            answer["result"] = getattr(import_module(_MODULE), sys.argv[1])(**arguments)
        except LoraInitError as error:
            answer["error"] = str(error)
    answer["warnings"] = [str(warning.message) for warning in caught]
    json.dump(answer, stdout)


if __name__ == "__main__":
    try:
        _main()
    except KeyboardInterrupt:  # sent to the whole foreground group: the parent reports it
        sys.exit(130)
