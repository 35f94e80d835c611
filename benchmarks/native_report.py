"""Every kernel in lora_init._C as it was built, held to its bounds.

    python -m benchmarks.native_report

Reads the module's own machine code, for each chip that it was built for; that needs no GPU. Exits
with 1 if a kernel spills, if one of the Hopper GEMMs does not load by TMA and multiply by wgmma,
with no product waiting for the one before it, or if one of dual_project or descend does not use
tensor cores and asynchronous copies.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from benchmarks import common as results
from lora_init import native

RESULT = results.RESULTS / "native-report.json"
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_HOPPER = ("lora_linear_kernel", "project_kernel")
_COUNTED = {
    "spills": r"\b(?:STL|LDL)\b",
    "wgmma": r"\bHGMMA\b",
    "waits": r"\bHGMMA\b[^;]*\bgsb0\b",
    "mma": r"\bHMMA\b",
    "tma": r"\bUTMA(?:LDG|STG)\b",
    "copies": r"\bLDGSTS\b",
}


@dataclass(frozen=True)
class Row:
    """A kernel, compiled for `arch` (90: sm_90a)."""

    kernel: str
    arch: int
    registers: int
    stack: int
    counts: dict[str, int]

    def broken(self) -> list[str]:
        """In words, each bound that it breaks."""
        counts, found = self.counts, []
        if counts["spills"]:
            found.append(f"{counts['spills']} spills")
        if any(name in self.kernel for name in _HOPPER):
            if not counts["wgmma"] or counts["mma"]:
                found.append(f"{counts['wgmma']} wgmma, {counts['mma']} mma.sync")
            if counts["waits"] == counts["wgmma"]:
                found.append("every wgmma waits for the one before")
            if not counts["tma"]:
                found.append("no TMA")
        if "descend" in self.kernel or "dual_project" in self.kernel:
            if self.stack:
                found.append(f"a stack of {self.stack} bytes")
            if "_sum" not in self.kernel and not (counts["mma"] and counts["copies"]):
                found.append(f"{counts['mma']} mma.sync, {counts['copies']} asynchronous copies")
        return found


def rows(module: str) -> Iterator[Row]:
    """Of every kernel that is more than a stub, from a compiled file."""
    usage = {}
    for arch, part in _by_arch(_cuobjdump("-res-usage", module)):
        for kernel, *numbers in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", part):
            usage[arch, kernel] = [int(number) for number in numbers]
    for arch, part in _by_arch(_cuobjdump("-sass", module)):
        for function in part.split("Function : ")[1:]:
            kernel, sass = function.split("\n", 1)
            # Some are empty on other chips.
            if arch == 90 or not any(name in kernel for name in (*_HOPPER, "descend_resident")):
                counts = {name: len(re.findall(what, sass)) for name, what in _COUNTED.items()}
                yield Row(_readable(kernel), arch, *usage[arch, kernel.strip()], counts)


def _by_arch(text: str) -> Iterator[tuple[int, str]]:
    for part in text.split("Fatbin elf code:")[1:]:
        match = re.search(r"arch = sm_(\d+)", part)
        assert match, part[:200]
        yield int(match[1]), part


def _cuobjdump(flag: str, path: str) -> str:
    command = [str(_CUOBJDUMP), flag, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _readable(kernel: str) -> str:
    """project_kernel<__half, true, false> of a mangled name, where binutils can tell."""
    tool = shutil.which("c++filt")
    if tool is None:
        return kernel.strip()
    done = subprocess.run([tool, kernel.strip()], capture_output=True, text=True, check=True)
    name = done.stdout.strip().removeprefix("void ").replace("(anonymous namespace)::", "")
    return name.split("(")[0].replace("lora_init::", "").replace("__nv_bfloat16", "bf16")


def main() -> int:
    module = native.module()
    if module is None:
        print("lora_init._C is not built, its kernels are not in this report")
        return 0
    print(f"{'sm':>3} {'kernel':<48} {'regs':>4} {'stack':>5} {' '.join(_COUNTED)}  bounds")
    found = list(rows(str(module.__file__)))
    for row in found:
        counts = " ".join(f"{row.counts[name]:>{len(name)}}" for name in _COUNTED)
        bounds = "; ".join(row.broken()) or "kept"
        print(
            f"{row.arch:>3} {row.kernel:<48} {row.registers:>4} {row.stack:>5} {counts}  {bounds}"
        )
    broken = sum(bool(row.broken()) for row in found)
    print(f"{len(found)} kernels, {broken} break a bound")
    machine = results.machine() | {"nvcc": module.cuda_version, "archs": module.archs}
    content = {"machine": machine, "rows": [asdict(row) for row in found]}
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {RESULT.relative_to(RESULT.parent.parent.parent)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
