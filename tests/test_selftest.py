"""A kernel that is wrong on a device is caught by its self-test, refused there, and named."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lora_init
from lora_init import BackendError, backend, backends, selftest
from lora_init.backends import available, explain, reference, select, triton
from lora_init.distributed import Ranks
from lora_init.ops.descend import DescentState, Optimizer

CPU = torch.device("cpu")
EYE = torch.eye(3)
CALLS = {
    "dual_project": ([EYE], [EYE], [EYE], "full"),
    "descend": ([EYE], DescentState.start([EYE], [EYE], Optimizer()), 1),
    "lora_linear": (EYE, EYE, EYE, EYE),
}
# The reference's arithmetic under another name, so that the test decides what is broken in it.
KERNELS = """
from lora_init.backends import reference

NAME, PRIORITY, VERIFIED = "kernels", 50, ("descend",)
calls = []
broken = {}

def fingerprint():
    return "1"

def why_unsupported(op, *args):
    return None if op in ("dual_project", "descend", "lora_linear") else "has no such kernel"

def dual_project(*args):
    calls.append("dual_project")
    return broken.get("dual_project", lambda result: result)(reference.dual_project(*args))

def descend(group, state, steps):
    calls.append("descend")
    reference.descend(group, state, steps)
    broken.get("descend", lambda result: result)(state.params)

def lora_linear_forward(*args):
    calls.append("lora_linear")
    return broken.get("lora_linear_forward", lambda result: result)(
        reference.lora_linear_forward(*args)
    )

def lora_linear_backward(*args):
    return broken.get("lora_linear_backward", lambda result: result)(
        reference.lora_linear_backward(*args)
    )
"""


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    (tmp_path / "kernels.py").write_text(KERNELS)
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    for other in ("triton", "cuda"):  # only this one is tested here
        monkeypatch.delattr(f"lora_init.backends.{other}.fingerprint")
    monkeypatch.setattr(backends, "_distrusted", {})
    monkeypatch.setattr(selftest, "_verdicts", {})
    monkeypatch.setenv("LORA_INIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(selftest.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    available.cache_clear()
    yield available()["kernels"]
    available.cache_clear()
    del sys.modules["lora_init.backends.kernels"]


def ensure(job: Ranks | None = None) -> list[str]:
    """The warnings of `selftest.ensure`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        selftest.ensure([CPU], job)
    return [str(warning.message) for warning in caught]


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_distrusted", {})
    monkeypatch.setattr(selftest, "_verdicts", {})


def scaled(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(left, right * 1.0001) for left, right in pairs]


BROKEN = {
    "a little off": ("dual_project", scaled),
    "not finite": ("dual_project", lambda pairs: [(x * float("nan"), y) for x, y in pairs]),
    "random": (
        "dual_project",
        lambda pairs: [(x + 1e-6 * x.norm() * torch.rand(()) / x.numel(), y) for x, y in pairs],
    ),
    "raises": ("dual_project", lambda pairs: 1 / 0),
    "parameters": ("descend", lambda params: params[-1].mul_(1.001)),
    "a wrong y": ("lora_linear_forward", lambda result: (result[0] * 1.01, result[1])),
    "a wrong S": ("lora_linear_forward", lambda result: (result[0], result[1] * 1.01)),
    "a wrong dx": ("lora_linear_backward", lambda result: (result[0].roll(1, 0), *result[1:])),
    "a wrong dbias": ("lora_linear_backward", lambda result: (*result[:3], 1.01 * result[3])),
}


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float32], ids=str)
def test_a_kernel_that_is_wrong_with_a_virtual_start_only_is_named_and_refused(
    kernels: object, low: torch.dtype
) -> None:
    def without_the_start(*args: object) -> tuple[Tensor, Tensor]:
        x, R, A, B, bias, *options = args
        y, S = reference.lora_linear_forward(*args)
        trained = options[-1]
        if trained < len(A) and A.dtype == low:
            y = reference.lora_linear_forward(x, R, A[:trained], B[:, :trained], bias, *options)[0]
        return y, S

    kernels.lora_linear_forward = without_the_start
    (message,) = ensure()
    assert message.startswith("kernels's lora_linear is wrong and will not be used (on cpu, ")
    assert "with a virtual start" in message
    assert select("lora_linear", *CALLS["lora_linear"]).NAME != "kernels"
    assert select("descend", *CALLS["descend"]).NAME == "kernels"


def test_kernels_that_are_right_are_trusted(kernels: object) -> None:
    assert ensure() == []
    assert select("dual_project", *CALLS["dual_project"]).NAME == "kernels"


@pytest.mark.parametrize(("op", "damage"), BROKEN.values(), ids=BROKEN)
def test_a_broken_kernel_is_named_and_refused_and_the_rest_is_not(
    kernels: object, op: str, damage: object
) -> None:
    kernels.broken[op] = damage
    op = "lora_linear" if op.startswith("lora_linear") else op
    (message,) = ensure()
    assert message.startswith(f"kernels's {op} is wrong and will not be used (on cpu, ")
    other = "descend" if op == "dual_project" else "dual_project"
    assert select(op, *CALLS[op]).NAME != "kernels"
    assert select(other, *CALLS[other]).NAME == "kernels"
    assert "failed its self-test" in explain(op, *CALLS[op])
    with (
        backend("kernels"),
        pytest.raises(BackendError, match="failed its self-test"),
    ):
        select(op, *CALLS[op])
    assert ensure() == []  # said once


def test_results_are_right_in_spite_of_a_broken_kernel(kernels: object) -> None:
    kernels.broken["dual_project"] = scaled
    weights = {"layer": torch.randn(40, 50, generator=torch.Generator().manual_seed(0))}
    with pytest.warns(UserWarning, match="kernels's dual_project is wrong"):
        found = lora_init.approximate(weights, r=4, method="pissa")["layer"]
    with backend("reference"):
        expected = lora_init.approximate(weights, r=4, method="pissa")["layer"]
    assert torch.equal(found.A, expected.A)
    assert torch.equal(found.B, expected.B)


def test_the_verdict_is_kept_on_disk_for_these_kernels(
    kernels: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernels.broken["descend"] = BROKEN["parameters"][1]
    ensure()
    (path,) = (tmp_path / "cache" / "selftest").iterdir()
    assert json.loads(path.read_bytes())["dual_project"] is None
    kernels.calls.clear()
    new_process(monkeypatch)
    assert len(ensure()) == 1  # each process says it
    assert kernels.calls == []
    new_process(monkeypatch)
    monkeypatch.setattr(kernels, "fingerprint", lambda: "2")
    kernels.broken.clear()
    assert ensure() == []
    assert kernels.calls
    new_process(monkeypatch)
    path.write_text("{")  # damaged: as if it were not there
    assert ensure() == []


def test_a_home_that_cannot_be_written_is_no_hindrance(
    kernels: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_INIT_CACHE_DIR", str(tmp_path / "file"))
    assert ensure() == []


def test_it_can_be_skipped(kernels: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(selftest.ENVIRONMENT_VARIABLE, "0")
    kernels.broken["dual_project"] = scaled
    assert ensure() == []
    assert kernels.calls == []


def test_kernels_that_no_call_comes_to_are_not_run(kernels: object) -> None:
    kernels.why_not_auto = lambda op, *args: "not measured"
    assert ensure() == []
    with backend("reference"):
        assert ensure() == []
    assert kernels.calls == []
    with backend("kernels"):
        assert ensure() == []
    assert kernels.calls != []


def test_what_fails_on_another_rank_is_not_used_here(kernels: object) -> None:
    class Job(Ranks):
        def gather(self, value: object) -> list[object]:
            return [value, {"dual_project": "on another device, wrong"}]

    (message,) = ensure(Job(rank=0, size=2))
    assert "another device" in message
    assert select("dual_project", *CALLS["dual_project"]).NAME != "kernels"
    assert select("descend", *CALLS["descend"]).NAME == "kernels"


BROKEN_KERNEL = """
import torch, triton
import triton.language as tl
import lora_init
from lora_init import selftest
from lora_init.triton_kernels import common

@triton.jit
def sum_span(task, first, SPAN: tl.constexpr):
    # As the real one, but the last partial is forgotten.
    at = first + tl.arange(0, SPAN)
    source = tl.load(task).to(tl.pointer_type(tl.float32))
    count = tl.load(task + 1).to(tl.int32)
    size = tl.load(task + 2)
    total = tl.zeros([SPAN], tl.float32)
    for partial in range(0, count - 1):
        total += tl.load(source + partial * size + at, mask=at < size, other=0.0)
    tl.store(tl.load(task + 3).to(tl.pointer_type(tl.float32)) + at, total, mask=at < size)

if BROKEN:
    common.sum_span = sum_span
# All of it takes minutes under the interpreter.
selftest._CASES, selftest._STEPS, selftest.DTYPES = ((600, 1100, 4),), 1, (torch.float32,)
selftest._CALLS, selftest._STARTED = ((20, 30, 40, 3),), (20, 30, 40, 3)
torch.set_num_threads(1)
selftest.ensure([torch.device("cpu")])
W = torch.eye(3)
print(lora_init.explain("dual_project", [W], [W], [W], "full"))
"""


@pytest.mark.parametrize("broken", [False, True])
def test_a_broken_triton_kernel_is_caught_under_the_interpreter(
    broken: bool, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "script.py"  # a kernel's source must be in a file
    script.write_text(f"BROKEN = {broken}\n{BROKEN_KERNEL}")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "LORA_INIT_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-W", "always", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    warned = "triton's dual_project is wrong and will not be used (on cpu, (600, 1100)"
    assert (warned in done.stderr) == broken
    if broken:
        assert "triton: failed its self-test on cpu, (600, 1100)" in done.stdout
        assert "reference: runs dual_project" in done.stdout
    else:
        assert "triton: runs dual_project (measured in benchmarks/results)" in done.stdout


def test_explain_says_which_path_and_why(kernels: object) -> None:
    assert explain("descend", *CALLS["descend"]).splitlines()[:2] == [
        "descend: the first that can is taken",
        "kernels: runs descend (measured in benchmarks/results)",
    ]
    assert "unverified: in no committed result" in explain("dual_project", *CALLS["dual_project"])
    assert "kernels: has no such kernel" in explain("another", torch.eye(3))
    assert "reference: could, but comes later" in explain("lora_linear", *CALLS["lora_linear"])
    with backend("reference"):
        assert explain("descend", *CALLS["descend"]) == (
            "descend: 'reference' was asked for\nreference: runs descend"
        )


@pytest.mark.parametrize("name", ["selftest.py", "testing.py"])
def test_a_verdict_of_other_tests_is_not_remembered(name, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    key = selftest._key(triton, CPU)
    for own in ("selftest.py", "testing.py"):
        content = (Path(selftest.__file__).parent / own).read_bytes()
        (tmp_path / own).write_bytes(content + b"# stricter\n" * (own == name))
    monkeypatch.setattr(selftest, "files", lambda _: tmp_path)
    assert selftest._key(triton, CPU) != key
