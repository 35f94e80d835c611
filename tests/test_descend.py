"""`descend` of every backend against torch.optim and autograd in fp64; its bits and its memory."""

import functools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_init import LoraInitError, backend, backends
from lora_init.backends import reference
from lora_init.ops.descend import DescentState, Optimizer, descend
from lora_init.parallel import single_threaded
from lora_init.testing import DTYPES, SHAPES, gaussian, misaligned, transposed

STEPS = 500
LARGE = (3 * 1024 + 5, 1024, 8)  # several row blocks in the reference


@pytest.fixture(params=backends.available())
def backend_name(request: pytest.FixtureRequest) -> Iterator[str]:
    with backend(request.param):
        group, state = start([(2, 3, 1)])
        if reason := backends.available()[request.param].why_unsupported(
            "descend", group, state, 1
        ):
            pytest.skip(reason)
        yield request.param


def operands(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """W of `dtype`, and a start A, B in fp32."""
    m, n, r = shape
    seed = 1000 * m + n
    weight = (gaussian(m, n, seed=seed) * size).to(dtype)
    return weight, gaussian(r, n, seed=seed + 1) * size, gaussian(m, r, seed=seed + 2) * size


def start(
    shapes: list[tuple[int, int, int]],
    optimizer: Optimizer | None = None,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    size: float = 1.0,
) -> tuple[list[Tensor], DescentState]:
    items = [operands(shape, weight_dtype, size) for shape in shapes]
    A, B = [a.to(dtype) for _, a, _ in items], [b.to(dtype) for _, _, b in items]
    return [w for w, _, _ in items], DescentState.start(A, B, optimizer or Optimizer())


def optimizer_for(solver: str, shape: tuple[int, int, int]) -> Optimizer:
    # Decays three times in 500 steps. Plain descent on a mean needs an lr that grows with out·in.
    lr = 5e-4 if solver == "adam" else 0.1 * shape[0] * shape[1]
    return Optimizer(solver, lr, step_size=150, gamma=0.7)


@functools.cache
@single_threaded()  # on busy cores, threads that wait for each other made this 100 times slower
def published_loop(
    shape: tuple[int, int, int],
    optimizer: Optimizer,
    weight_dtype: torch.dtype = torch.float32,
    size: float = 1.0,
) -> tuple[Tensor, Tensor, list[float]]:
    """A, B and the loss after each number of steps: autograd and torch.optim in fp64."""
    W, A, B = (t.double() for t in operands(shape, weight_dtype, size))
    A.requires_grad_(), B.requires_grad_()
    if optimizer.name == "adam":
        torch_optimizer = torch.optim.Adam(
            [A, B], lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps
        )
    else:
        torch_optimizer = torch.optim.SGD([A, B], lr=optimizer.lr)
    scheduler = torch.optim.lr_scheduler.StepLR(
        torch_optimizer, optimizer.step_size, optimizer.gamma
    )
    losses = []
    for _ in range(STEPS):
        loss = torch.nn.functional.mse_loss(B @ A, W)
        losses.append(loss.item())
        torch_optimizer.zero_grad()
        loss.backward()
        scheduler.step()  # as published: before the optimiser
        torch_optimizer.step()
    return A.detach(), B.detach(), losses


def rounding_walk(dtype: torch.dtype) -> float:
    """Four deviations of a random walk of one rounding a step: 5.3e-6 in fp32, 1e-14 in fp64."""
    return 4 * math.sqrt(STEPS) * torch.finfo(dtype).eps / 2


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("solver", ["adam", "gd"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_torch_optim_in_fp64(
    backend_name: str, shape: tuple[int, int, int], solver: str, dtype: torch.dtype
) -> None:
    optimizer = optimizer_for(solver, shape)
    (weight,), state = start([shape], optimizer, dtype)
    A, B, losses = published_loop(shape, optimizer)
    descend([weight], state, 200)
    loss = float((weight.double() - state.B[0].double() @ state.A[0].double()).square().mean())
    # A loss far below ‖W‖² magnifies what rounding did to the factors: from 5e-8 to 1.3e-6 here.
    assert loss == pytest.approx(losses[200], rel=1e-5 if dtype == torch.float32 else 1e-12)
    descend([weight], state, STEPS - 200)
    assert state.step == STEPS
    assert state.A[0].dtype == dtype
    assert distance(state.A[0], A) <= rounding_walk(dtype)
    assert distance(state.B[0], B) <= rounding_walk(dtype)
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_equals_torch_optim_for_every_weight_dtype(
    backend_name: str, weight_dtype: torch.dtype
) -> None:
    shape = SHAPES["48x192_r8"]
    optimizer = optimizer_for("adam", shape)
    group, state = start([shape], optimizer, weight_dtype=weight_dtype)
    descend(group, state, STEPS)
    A, B, _ = published_loop(shape, optimizer, weight_dtype)
    assert distance(state.A[0], A) <= rounding_walk(torch.float32)
    assert distance(state.B[0], B) <= rounding_walk(torch.float32)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_below_eps_are_damped_by_it(backend_name: str, dtype: torch.dtype) -> None:
    # Gradients of ~1e-9, at 3072² of the published runs 7e-9: a step is then lr·g/eps, not lr.
    shape, size = SHAPES["48x192_r8"], 0.02
    optimizer = optimizer_for("adam", shape)
    group, state = start([shape], optimizer, dtype, size=size)
    descend(group, state, STEPS)
    A, B, _ = published_loop(shape, optimizer, size=size)
    _, A0, _ = operands(shape, size=size)
    assert float((A - A0).abs().max()) < 0.2 * STEPS * optimizer.lr
    assert distance(state.A[0], A) <= rounding_walk(dtype)
    assert distance(state.B[0], B) <= rounding_walk(dtype)


def test_schedule_is_that_of_step_lr_stepped_first() -> None:
    optimizer = Optimizer()
    table = optimizer.schedule(0, 10_001)
    beta1, beta2 = map(Fraction, optimizer.betas)
    for i, decays in ((0, 0), (99, 0), (4998, 0), (4999, 1), (9998, 1), (9999, 2), (10_000, 2)):
        lr = Fraction(optimizer.lr) * Fraction(optimizer.gamma) ** decays
        alpha = lr / (1 - beta1 ** (i + 1))
        inverse_square = 1 / (1 - beta2 ** (i + 1))
        # 1 − 0.999 leaves 43 of fp64's 53 bits at the first step.
        assert table[i, 0] == pytest.approx(float(alpha), rel=1e-13)
        assert table[i, 1] ** 2 == pytest.approx(float(inverse_square), rel=1e-12)
    assert (optimizer.schedule(7000, 50) == table[7000:7050]).all()
    plain = Optimizer("gd", lr=3.0, step_size=10, gamma=0.5).schedule(0, 10)
    assert plain.tolist() == [[3.0, 1.0]] * 9 + [[1.5, 1.0]]


def test_start_copies_and_zero_steps_change_nothing() -> None:
    weight, A, B = operands((5, 4, 2))
    state = DescentState.start([A], [B], Optimizer())
    assert torch.equal(state.A[0], A)
    assert torch.equal(state.B[0], B)
    descend([weight], state, 0)
    assert (state.step, state.A[0].equal(A), state.B[0].equal(B)) == (0, True, True)
    state.params[0].zero_()
    assert A.abs().min() > 0
    descend([], DescentState.start([], [], Optimizer()), 3)


def test_minimum_and_saddle_stay_where_they_are(backend_name: str) -> None:
    # All in powers of two, so that W = B·A exactly; A = B = 0 has no gradient either.
    A, B = torch.eye(2, 6) * 0.5, torch.eye(4, 2) * 0.25
    weights = [B @ A, gaussian(4, 6)]
    state = DescentState.start([A, torch.zeros(2, 6)], [B, torch.zeros(4, 2)], Optimizer())
    descend(weights, state, 20)
    assert torch.equal(state.A[0], A)
    assert torch.equal(state.B[0], B)
    assert not state.params[1].any()


GROUP = [(33, 65, 3), LARGE, (1, 7, 1), (64, 64, 8)]


def run(
    group: list[Tensor], state: DescentState, calls: tuple[int, ...] = (12,)
) -> list[tuple[Tensor, ...]]:
    for steps in calls:
        descend(group, state, steps)
    return [(p, *m) for p, m in zip(state.params, state.moments, strict=True)]


def assert_same_bits(states: list[tuple[Tensor, ...]], expected: list[tuple[Tensor, ...]]) -> None:
    for state, other in zip(states, expected, strict=True):
        assert all(map(torch.equal, state, other))


def test_bits_depend_on_neither_group_order_nor_split_calls(backend_name: str) -> None:
    expected = run(*start(GROUP))
    assert_same_bits(run(*start(GROUP)), expected)
    assert_same_bits(run(*start(GROUP[::-1]))[::-1], expected)
    assert_same_bits([run(*start([shape]))[0] for shape in GROUP], expected)
    assert_same_bits(run(*start(GROUP), calls=(1, 0, 7, 4)), expected)
    group, state = start(GROUP)
    halves = [state.take([0, 2]), state.take([3, 1])]
    run([group[0], group[2]], halves[0])
    run([group[3], group[1]], halves[1])
    assert_same_bits(run(group, state, calls=()), expected)


def test_bits_do_not_depend_on_threads() -> None:
    assert len(reference._row_blocks(start([LARGE])[0][0])) > 2
    torch.set_num_threads(1)
    expected = run(*start(GROUP))
    for count in (2, 4):
        torch.set_num_threads(count)
        assert_same_bits(run(*start(GROUP)), expected)
        # Alone, its row blocks are spread over the threads.
        assert_same_bits(run(*start([LARGE])), [expected[1]])
        assert torch.get_num_threads() == count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_weights_memory(backend_name: str, dtype: torch.dtype) -> None:
    group, state = start(GROUP, weight_dtype=dtype)
    before = [w.clone() for w in group]
    expected = run(group, state)
    assert all(map(torch.equal, group, before))
    for view in (misaligned, transposed, lambda t: torch.stack([t, t], -1)[..., 1]):
        assert_same_bits(run([view(w) for w in group], start(GROUP)[1]), expected)
    if dtype.itemsize == 2:
        assert_same_bits(run([w.float() for w in group], start(GROUP)[1]), expected)


def test_parameters_leave_no_graph(backend_name: str) -> None:
    group, state = start(GROUP[:1])
    descend([torch.nn.Parameter(group[0])], state, 2)
    assert not state.params[0].requires_grad
    assert_same_bits([(state.params[0],)], [(run(*start(GROUP[:1]), calls=(2,))[0][0],)])


def test_bad_calls_are_refused() -> None:
    group, state = start([(5, 4, 2)])
    with pytest.raises(LoraInitError, match="steps must be ≥ 0, got -1"):
        descend(group, state, -1)
    with pytest.raises(LoraInitError, match="2 matrices for a state of 1"):
        descend(group * 2, state, 1)
    with pytest.raises(LoraInitError, match=r"matrix 0: A must be \(r, 5\), got \(2, 4\)"):
        descend([group[0].T], state, 1)
    half = start([(5, 4, 2)], dtype=torch.bfloat16)[1]
    with pytest.raises(LoraInitError, match=r"float32 or float64, got torch\.bfloat16"):
        descend(group, half, 1)
    with pytest.raises(LoraInitError, match=r"matrix 0: W \(5, 0\) has no elements"):
        descend([group[0][:, :0]], DescentState.start([state.A[0][:, :0]], state.B, Optimizer()), 1)
    assert (state.step, half.step) == (0, 0)


# Live memory, not what malloc keeps: a large block goes back to the system when it is freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
MEASURE = """
import json, sys, torch, lora_init
THREADS = 2

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def extra(dtype, size, r):
    "Peak bytes of a run above what was there before it."
    weights = {f"{i}.q": torch.randn(size, size).mul_(0.02).to(dtype) for i in range(4)}
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = memory("VmRSS")
    lora_init.approximate(weights, r=r, steps=3, cache=False)
    return memory("VmHWM") - before

torch.set_num_threads(THREADS)
extra(torch.float32, 512, 8)  # what is loaded and set up once
print(json.dumps([extra(torch.float32, 2048, 64), extra(torch.bfloat16, 2048, 64)]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures Linux's peak RSS")
def test_memory_is_that_of_the_factors() -> None:
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), **MALLOC}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    fp32, bf16 = json.loads(done.stdout)
    params = 4 * 64 * (2048 + 2048) * 4  # 4 MB for the four layers
    weight = 2048 * 2048 * 4
    # Factors, two moments and a gradient; for each of the two threads 8 MB of stack, packing
    # buffers and row blocks. A copy of a single weight (16 MB) would not fit.
    allowed = 1.2 * 4 * params + 2 * 8 * 2**20
    assert params < fp32 <= allowed < fp32 + weight
    # A 16-bit weight is widened while its layer runs: two of the four at a time.
    assert bf16 < allowed + 2 * weight
