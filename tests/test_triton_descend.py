"""The Triton `descend` against the reference: its steps, its launches, its groups.

The functions called case_* run kernels, see test_triton_dual_project.py.
"""

import gc
import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lora_init import backend
from lora_init.backends import reference
from lora_init.ops import descend as op
from lora_init.ops.descend import DescentState, Optimizer
from lora_init.testing import gaussian, transposed

pytest.importorskip("triton")
from lora_init.triton_kernels import common, descend

pytestmark = pytest.mark.usefixtures("poisoned")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Out of how far the parts of a factor beside W's dtype reach, 2⁻¹⁷ for bf16, where a gradient near
# zero is then another, and Adam looks at nothing but its sign.
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-5}


@pytest.mark.parametrize("which", ["long", "not long"])
def test_kernels_under_the_interpreter(run_cases: Callable[..., None], which: str) -> None:
    run_cases("-k", which, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_long_descents_under_the_interpreter(run_cases: Callable[..., None]) -> None:
    run_cases("-m", "slow", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
def test_kernels_on_the_gpu(run_cases: Callable[..., None]) -> None:
    run_cases("-m", "slow or not slow")


@pytest.fixture(params=["H100's tiles", "A100's tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "A100's tiles":
        small_tiles(monkeypatch)


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A100's, which take half the interpreter's time."""
    if INTERPRETED:
        monkeypatch.setattr(common, "capability_of", lambda device: (8, 0))


Shapes = Sequence[tuple[int, int, int]]


def start(
    shapes: Shapes,
    dtype: torch.dtype = torch.float32,
    optimizer: Optimizer | None = None,
    view: Callable[[Tensor], Tensor] = lambda t: t,
) -> tuple[list[Tensor], DescentState]:
    device = "cpu" if INTERPRETED else "cuda"
    weights, A, B = [], [], []
    for m, n, r in shapes:
        seed = 1000 * m + n
        weights.append(view(gaussian(m, n, dtype, seed).to(device)))
        A.append(gaussian(r, n, seed=seed + 1).to(device))
        B.append(gaussian(m, r, seed=seed + 2).to(device))
    return weights, DescentState.start(A, B, optimizer or Optimizer())


def run(weights: Sequence[Tensor], state: DescentState, *calls: int) -> list[tuple[Tensor, ...]]:
    """The state after so many steps in each call."""
    optimizer = state.optimizer
    for steps in calls:
        descend.descend(
            weights,
            state.out_features,
            state.params,
            state.moments,
            optimizer.betas,
            optimizer.eps,
            optimizer.schedule(state.step, steps),
        )
        state.step += steps
    moments = state.moments or [()] * len(state.params)
    return [(p, *m) for p, m in zip(state.params, moments, strict=True)]


def assert_near_reference(
    shapes: Shapes, dtype: torch.dtype, optimizer: Optimizer, steps: int, view: object = None
) -> None:
    weights, state = start(shapes, dtype, optimizer, *([view] if view else []))
    before = [w.clone() for w in weights]
    _, expected = start(shapes, dtype, optimizer)
    run(weights, state, steps)
    reference.descend(before, expected, steps)
    for shape, actual, exact in zip(shapes, state.params, expected.params, strict=True):
        distance = float((actual - exact).norm() / exact.norm())
        assert distance <= ROUNDING[dtype], f"{shape} {dtype}: {distance:.1e}"
    assert all(map(torch.equal, weights, before))


def optimizer_for(name: str, shape: tuple[int, int, int]) -> Optimizer:
    # Plain descent on a mean needs an lr that grows with out·in.
    return Optimizer(name, 5e-4 if name == "adam" else 0.1 * shape[0] * shape[1], step_size=2)


@pytest.mark.parametrize(
    ("dtype", "steps"),
    # The interpreter takes 30 to 60 ms a step: 300 in full only where rounding is coarsest.
    [
        (torch.bfloat16, 300),
        (torch.float32, 30),
        (torch.float16, 30),
        pytest.param(torch.float32, 300, marks=pytest.mark.slow),
        pytest.param(torch.float16, 300, marks=pytest.mark.slow),
    ],
    ids=str,
)
def case_long_descent_stays_at_the_reference(
    dtype: torch.dtype, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tiles(monkeypatch)
    assert_near_reference([(17, 24, 3)], dtype, Optimizer(step_size=100, gamma=0.7), steps)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", ["adam", "gd"])
def case_ragged_group(solver: str, dtype: torch.dtype) -> None:
    shapes = [(1, 1, 1), (9, 1, 1), (33, 65, 3), (48, 72, 8), (70, 30, 17)]
    assert_near_reference(shapes, dtype, optimizer_for(solver, (1, 1, 1)), 3)
    assert_near_reference(shapes[2:4], dtype, optimizer_for(solver, (40, 70, 8)), 3)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("r", [64, 100])
def case_more_ranks_than_one_variant_takes(r: int, dtype: torch.dtype) -> None:
    for solver in ("adam", "gd"):
        assert_near_reference([(21, 140, r)], dtype, optimizer_for(solver, (21, 140, r)), 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def case_any_memory(dtype: torch.dtype) -> None:
    views = (
        transposed,
        lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        lambda t: torch.stack([t, t], -1)[..., 1],
    )
    for view in views:
        assert_near_reference([(24, 40, 3)], dtype, Optimizer(), 2, view)


def case_several_blocks_and_tiles() -> None:
    assert_near_reference([(300, 1100, 5)], torch.bfloat16, Optimizer(), 2)
    assert_near_reference([(600, 300, 17)], torch.float32, Optimizer(), 1)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def case_bits_depend_on_neither_group_nor_calls(dtype: torch.dtype) -> None:
    shapes = [(33, 65, 3), (280, 40, 8), (1, 7, 1), (20, 16, 40)]
    expected = run(*start(shapes, dtype), 3)

    def assert_same(states: list[tuple[Tensor, ...]]) -> None:
        for state, other in zip(states, expected, strict=True):
            assert all(map(torch.equal, state, other))

    assert_same(run(*start(shapes, dtype), 3))
    assert_same(run(*start(shapes, dtype), 1, 0, 2))
    assert_same(run(*start(shapes[::-1], dtype), 3)[::-1])
    assert_same([run(*start([shape], dtype), 3)[0] for shape in shapes])
    weights, state = start(shapes, dtype)
    for half in ([0, 2], [3, 1]):
        run([weights[i] for i in half], state.take(half), 3)
    assert_same(run(weights, state, 0))


def case_two_launches_a_step_for_two_hundred_layers(launches: list[str]) -> None:
    shapes = [(8 + 4 * (i % 3), 4 + 4 * (i % 5), 2) for i in range(200)]
    weights, state = start(shapes)
    run(weights, state, 1)
    assert launches == ["update", "products", "update"]
    _, expected = start(shapes)
    reference.descend(weights, expected, 1)
    for actual, exact in zip(state.params, expected.params, strict=True):
        assert float((actual - exact).norm() / exact.norm()) <= ROUNDING[torch.float32]


def case_a_table_of_rates_is_filled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(9, 12, 2)]
    expected = run(*start(shapes), 5)
    monkeypatch.setattr(descend, "SCHEDULE_STEPS", 2)
    descend._latest.clear()
    for state, other in zip(run(*start(shapes), 5), expected, strict=True):
        assert all(map(torch.equal, state, other))


def case_a_session_is_reused_and_ends_with_its_state() -> None:
    weights, state = start([(9, 12, 2)])
    with backend("triton"):
        op.descend(weights, state, 1)
        (sessions,) = descend._latest.values()
        op.descend(weights, state.take([0]), 2)
    assert next(iter(descend._latest.values())) is sessions
    other_weights, other = start([(5, 6, 2)])
    run(other_weights, other, 1)
    assert len(descend._latest) == 1
    del other
    gc.collect()
    assert not descend._latest


def case_replays_and_single_steps_add_up(
    monkeypatch: pytest.MonkeyPatch, launches: list[str]
) -> None:
    class Graph:
        """Replays by launching, as a CUDA graph does, and leaves a mark."""

        def __init__(self, session: descend._Session):
            self.session = session

        def replay(self) -> None:
            launches.append("replay")
            for _ in range(3):
                self.session._step()

    if not INTERPRETED:
        pytest.skip("a GPU has graphs of its own")
    expected = run(*start([(9, 12, 2)]), 8)
    descend._latest.clear()
    monkeypatch.setattr(descend, "GRAPH_STEPS", 3)
    monkeypatch.setattr(descend._Session, "_capture", lambda session: Graph(session))
    weights, state = start([(9, 12, 2)])
    run(weights, state, 0, 1)
    for sessions in descend._latest.values():
        sessions[0]._replays = True
    launches.clear()
    states = run(weights, state, 5, 2)
    # One step before the capture, a replay, one more; the next call is too short for the graph.
    first, step = ["update"], ["products", "update"]
    assert launches == [*first, *step, "replay", *3 * step, *step, *first, *2 * step]
    for actual, other in zip(states, expected, strict=True):
        assert all(map(torch.equal, actual, other))


def case_minimum_stays_where_it_is() -> None:
    # All in powers of two, so that W = B·A exactly; A = B = 0 has no gradient either.
    weights, state = start([(4, 6, 2), (4, 6, 2)])
    device = weights[0].device
    A, B = torch.eye(2, 6, device=device) * 0.5, torch.eye(4, 2, device=device) * 0.25
    state = DescentState.start([A, 0 * A], [B, 0 * B], Optimizer())
    weights[0] = B @ A
    run(weights, state, 5)
    assert torch.equal(state.A[0], A)
    assert torch.equal(state.B[0], B)
    assert not state.params[1].any()


@pytest.mark.skipif(INTERPRETED, reason="graphs are CUDA's")
def case_graph_replay_changes_no_bit() -> None:
    shapes = [(300, 1100, 8), (64, 72, 3)]
    expected = run(*start(shapes, torch.bfloat16), *[1] * 50)
    with torch.cuda.stream(torch.cuda.Stream()):
        states = run(*start(shapes, torch.bfloat16), 50)
    torch.cuda.synchronize()
    for state, other in zip(states, expected, strict=True):
        assert all(map(torch.equal, state, other))


def test_first_launch_is_the_same_for_both_solvers() -> None:
    forms = {descend.update_variant(torch.bfloat16, 8, adam, True) for adam in (True, False)}
    assert len(forms) == 1
