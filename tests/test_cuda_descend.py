"""csrc/descend.cu: the kernel itself on the host, one fiber a CUDA thread, and on a GPU."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_init import backend, backends
from lora_init.backends import cuda, reference
from lora_init.ops import descend as op
from lora_init.ops.descend import DescentState, Optimizer
from lora_init.testing import gaussian, misaligned, transposed

ROOT = Path(__file__).resolve().parents[1]
HALVES = (torch.bfloat16, torch.float16)
# Out of how far two bf16 parts of a factor reach, as in test_triton_descend.py.
ROUNDING = {torch.float16: 1e-6, torch.bfloat16: 1e-5}
# One block, several in both directions, ranks and sizes that fill none.
RAGGED = [(1, 1, 1), (33, 65, 3), (300, 260, 8)]
Shapes = Sequence[tuple[int, int, int]]


class Launch(ctypes.Structure):
    """DescendLaunch of csrc/descend.cuh."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("steps", ctypes.c_int),
        ("schedule", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("one_minus_beta1", ctypes.c_float),
        ("beta2", ctypes.c_float),
        ("one_minus_beta2", ctypes.c_float),
        ("eps", ctypes.c_float),
    )


@dataclass
class Host:
    """The kernel compiled for the host."""

    library: ctypes.CDLL

    def descend(
        self,
        group: Sequence[Tensor],
        state: DescentState,
        steps: int,
        ctas: int = 4,
        seed: int = 0,
        ranks: int | None = None,
    ) -> None:
        """What `cuda.descend` does on a GPU; what the workspace held before is of no step."""
        ranks = ranks or cuda._ranks(state.params[0])
        optimizer, table = state.optimizer, cuda.descend_table(group, state)
        schedule = optimizer.schedule(state.step, steps).astype(np.float32)
        workspace = np.full(self.library.region_bytes(ranks) * ctas, 0xFE, np.uint8)
        counters = np.zeros(table.counter_bytes, np.uint8)
        arrays = (schedule, workspace, counters)
        beta1, beta2 = optimizer.betas
        launch = Launch(
            table.layers.ctypes.data,
            table.blocks,
            steps,
            *(array.ctypes.data for array in arrays),
            *(1 - beta1, beta2, 1 - beta2, optimizer.eps),
        )
        bf16, adam = group[0].dtype == torch.bfloat16, optimizer.name == "adam"
        done = self.library.descend(ctypes.byref(launch), bf16, ranks, adam, ctas, seed)
        assert done, "threads wait for each other for ever"
        state.step += steps


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    path = tmp_path_factory.mktemp("simt") / "descend.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    quiet = ["-Wno-unknown-pragmas", "-Wno-clobbered"]
    source = ROOT / "tests" / "descend_simt.cpp"
    include = f"-I{source.parent}"
    subprocess.run([compiler, *flags, *quiet, include, source, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    library.region_bytes.restype = ctypes.c_int64
    library.descend.restype = ctypes.c_bool
    return Host(library)


def start(
    shapes: Shapes,
    dtype: torch.dtype = torch.bfloat16,
    optimizer: Optimizer | None = None,
    view: Callable[[Tensor], Tensor] = lambda t: t,
    device: str = "cpu",
) -> tuple[list[Tensor], DescentState]:
    weights, A, B = [], [], []
    for m, n, r in shapes:
        seed = 1000 * m + n
        weights.append(view(gaussian(m, n, dtype, seed).to(device)))
        A.append(gaussian(r, n, seed=seed + 1).to(device))
        B.append(gaussian(m, r, seed=seed + 2).to(device))
    return weights, DescentState.start(A, B, optimizer or Optimizer())


def tensors_of(state: DescentState) -> list[Tensor]:
    return [*state.params, *(t for pair in state.moments for t in pair)]


def assert_same(state: DescentState, other: DescentState) -> None:
    for a, b in zip(tensors_of(state), tensors_of(other), strict=True):
        assert torch.equal(a, b)


def assert_near_reference(
    state: DescentState, shapes: Shapes, dtype: torch.dtype, steps: int
) -> None:
    """Against the reference in fp64."""
    weights, exact = start(shapes, dtype, state.optimizer)
    exact.params = [p.double() for p in exact.params]
    exact.moments = [(m.double(), v.double()) for m, v in exact.moments]
    reference.descend(weights, exact, steps)
    for shape, a, b in zip(shapes, state.params, exact.params, strict=True):
        distance = float((a.cpu() - b).norm() / b.norm())
        assert distance <= ROUNDING[dtype], f"{shape} {dtype}: {distance:.1e}"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("solver", ["adam", "gd"])
@pytest.mark.parametrize(
    "shapes", [RAGGED, [(48, 72, 9), (300, 130, 16)]], ids=["8 ranks", "16 ranks"]
)
def test_ragged_group(host: Host, shapes: Shapes, solver: str, dtype: torch.dtype) -> None:
    optimizer = Optimizer(solver, 5e-4 if solver == "adam" else 1.0, step_size=2)
    weights, state = start(shapes, dtype, optimizer)
    before = [w.clone() for w in weights]
    host.descend(weights, state, 3)
    assert_near_reference(state, shapes, dtype, 3)
    assert all(map(torch.equal, weights, before))


def test_long_descent_stays_at_the_reference(host: Host) -> None:
    shapes = [(17, 24, 3)]
    weights, state = start(shapes, optimizer=Optimizer(step_size=20, gamma=0.7))
    host.descend(weights, state, 60, ctas=1)
    assert_near_reference(state, shapes, torch.bfloat16, 60)


@pytest.mark.parametrize("shape", [(4, 4200, 2), (2100, 4, 9)], ids=str)
def test_more_members_than_one_batch_of_loads(host: Host, shape: tuple[int, int, int]) -> None:
    weights, state = start([shape])
    host.descend(weights, state, 1, ctas=17)
    assert_near_reference(state, [shape], torch.bfloat16, 1)


@pytest.mark.parametrize(
    "view",
    [transposed, lambda t: torch.stack([t, t], -1)[..., 1], lambda t: misaligned(t, 2)],
    ids=["transposed", "strided", "misaligned"],
)
def test_any_memory(host: Host, view: Callable[[Tensor], Tensor]) -> None:
    shapes = [(24, 280, 3)]
    weights, state = start(shapes)
    host.descend(weights, state, 2)
    others, other = start(shapes, view=view)
    host.descend(others, other, 2)
    assert_same(state, other)


@pytest.mark.parametrize("ctas", [4, 5, 6])
def test_bits_depend_on_neither_group_nor_calls_nor_who_comes_first(host: Host, ctas: int) -> None:
    weights, expected = start(RAGGED)
    host.descend(weights, expected, 3)
    for seed in (1, 2):
        _, state = start(RAGGED)
        host.descend(weights, state, 3, ctas, seed)
        assert_same(state, expected)
    _, state = start(RAGGED)
    for steps in (1, 2):
        host.descend(weights, state, steps, ctas)
    assert_same(state, expected)
    _, state = start(RAGGED)
    for half in ([2, 0], [1]):
        host.descend([weights[i] for i in half], state.take(half), 3, ctas)
    assert_same(state, expected)


def test_minimum_stays_where_it_is(host: Host) -> None:
    # All in powers of two, so that W = B·A exactly; A = B = 0 has no gradient either.
    A, B = torch.eye(2, 6) * 0.5, torch.eye(4, 2) * 0.25
    weight = (B @ A).bfloat16()
    state = DescentState.start([A, 0 * A], [B, 0 * B], Optimizer(eps=0.1))
    host.descend([weight, weight], state, 5, ctas=2)
    assert torch.equal(state.A[0], A)
    assert torch.equal(state.B[0], B)
    assert not state.params[1].any()


def test_says_what_it_does_not_take() -> None:
    def why(shape: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16) -> str | None:
        return cuda._why_not_descend(*start([shape], dtype), 1)

    assert "not float32" in (why((4, 4, 1), torch.float32) or "")
    assert "up to 16 ranks, not 17" in (why((40, 40, 17)) or "")
    assert "runs on NVIDIA GPUs" in (why((4, 4, 1)) or "")


GROUPS = {
    "8 ranks": [*RAGGED, (768, 768, 8), (1024, 520, 7)],
    "16 ranks": [(48, 72, 9), (512, 130, 16), (2048, 1000, 12)],
}


def run_on_gpu(weights: Sequence[Tensor], state: DescentState, *calls: int) -> None:
    with backend("cuda"):
        for steps in calls:
            op.descend(weights, state, steps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("solver", ["adam", "gd"])
@pytest.mark.parametrize("shapes", GROUPS.values(), ids=GROUPS)
def test_gpu_near_the_reference(shapes: Shapes, solver: str, dtype: torch.dtype) -> None:
    optimizer = Optimizer(solver, 5e-4 if solver == "adam" else 1.0, step_size=100, gamma=0.7)
    for steps in (1, 300):
        weights, state = start(shapes, dtype, optimizer, device="cuda")
        run_on_gpu(weights, state, steps)
        assert_near_reference(state, shapes, dtype, steps)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shapes", [*GROUPS.values(), [(1700, 2200, 16)]], ids=[*GROUPS, "slices of two sizes"]
)
def test_gpu_bits_depend_on_neither_group_nor_calls(shapes: Shapes) -> None:
    weights, expected = start(shapes, device="cuda")
    run_on_gpu(weights, expected, 20)
    _, state = start(shapes, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        run_on_gpu(weights, state, *[1] * 20)
    torch.cuda.synchronize()
    assert_same(state, expected)
    _, state = start(shapes, device="cuda")
    for i, weight in enumerate(weights):
        run_on_gpu([weight], state.take([i]), 20)
    assert_same(state, expected)


@pytest.mark.gpu
def test_gpu_takes_more_blocks_than_it_holds() -> None:
    # 480 blocks; layers share what the last ones of a round leave and begin in the middle of it.
    shapes = [(600 + i, 1000, 8) for i in range(40)]
    weights, together = start(shapes, device="cuda")
    run_on_gpu(weights, together, 20)
    _, state = start(shapes, device="cuda")
    for i, weight in enumerate(weights):
        run_on_gpu([weight], state.take([i]), 20)
    assert_same(state, together)


@pytest.mark.gpu
def test_gpu_refuses_what_does_not_fit_on_chip() -> None:
    weights, state = start([(4096, 11008, 8)], device="cuda")
    reason = backends.available()["cuda"].why_unsupported("descend", weights, state, 1)
    assert "(4096, 11008) has 688" in (reason or "")
