"""csrc/descend.cu: the kernels themselves on the host, one fiber a CUDA thread, and on a GPU."""

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_init import backend, backends, native
from lora_init.backends import cuda, reference
from lora_init.native import blocks
from lora_init.native.blocks import Cut, Limits, Variant
from lora_init.ops import descend as op
from lora_init.ops.descend import DescentState, Optimizer
from lora_init.testing import gaussian, misaligned, transposed

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALVES = DTYPES[:2]
# Out of how far two bf16 parts of a factor reach, as in test_triton_descend.py.
ROUNDING = {torch.float16: 1e-6, torch.bfloat16: 1e-5, torch.float32: 1e-6}
Shapes = Sequence[tuple[int, int, int]]
# One block, several in both directions, ranks and sizes that fill none.
RAGGED = [(1, 1, 1), (33, 65, 3), (300, 260, 8)]
HOST_GROUPS: dict[str, Shapes] = {
    "8 ranks": RAGGED,
    "16 ranks": [(48, 72, 9), (40, 300, 16)],
    "32 ranks": [(260, 72, 20)],
}


class Launch(ctypes.Structure):
    """DescendLaunch of csrc/descend_exchange.cuh."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("steps", ctypes.c_int),
        ("stages", ctypes.c_int),
        ("schedule", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("region_bytes", ctypes.c_int64),
        ("counters", ctypes.c_void_p),
        ("one_minus_beta1", ctypes.c_float),
        ("beta2", ctypes.c_float),
        ("one_minus_beta2", ctypes.c_float),
        ("eps", ctypes.c_float),
    )


@dataclass
class Host:
    """The kernels compiled for the host."""

    library: ctypes.CDLL

    def limits(self, variant: Variant, ctas: int) -> Limits:
        tiles = (ctypes.c_int * 2)()
        self.library.tiles_of(*variant, tiles)
        return Limits(ctas, (tiles[0], tiles[1]))

    def region_bytes(self, found: Cut) -> int:
        # A member's share of its group's tiles; on chip, of a group of one.
        members = found.blocks[::-1] if found.variant.streamed else (1, 1)
        slices = [-(-n // min(n, k)) for n, k in zip(found.tiles, members, strict=True)]
        pairs = ((ctypes.c_int * 2)(*pair) for pair in (found.tiles, slices))
        return int(self.library.region_bytes(found.variant.ranks, *pairs))

    def cuts(
        self, group: Sequence[Tensor], state: DescentState, streamed: bool, ctas: int
    ) -> list[Cut]:
        found = []
        for weight, params in zip(group, state.params, strict=True):
            variant = Variant.of(weight, params, streamed)
            cut = blocks.cut(weight.shape, variant, self.limits(variant, ctas))
            assert isinstance(cut, Cut), cut
            found.append(cut)
        return found

    def descend(
        self,
        group: Sequence[Tensor],
        state: DescentState,
        steps: int,
        ctas: int = 4,
        seed: int = 0,
        streamed: bool = False,
        stages: int = 3,
        cuts: Sequence[Cut] | None = None,
    ) -> None:
        """What `cuda.descend` does on a GPU; what the workspace held before is of no step."""
        cuts = cuts or self.cuts(group, state, streamed, ctas)
        variant = cuts[0].variant
        optimizer = state.optimizer
        table = blocks.table(group, state, cuts, self.region_bytes)
        schedule = optimizer.schedule(state.step, steps).astype(np.float32)
        workspace = np.full(table.region_bytes * ctas, 0xFE, np.uint8)
        counters = np.zeros(table.counter_bytes, np.uint8)
        beta1, beta2 = optimizer.betas
        launch = Launch(
            table.layers.ctypes.data,
            table.blocks,
            steps,
            stages if variant.streamed else 0,
            schedule.ctypes.data,
            workspace.ctypes.data,
            table.region_bytes,
            counters.ctypes.data,
            *(1 - beta1, beta2, 1 - beta2, optimizer.eps),
        )
        element = DTYPES.index(group[0].dtype)
        done = self.library.descend(
            ctypes.byref(launch),
            *(element, variant.ranks, variant.streamed, optimizer.name == "adam", ctas, seed),
        )
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


def padded(tensor: Tensor) -> Tensor:
    """Rows that start at multiples of 16 bytes, with what is no number in between."""
    columns = -(-tensor.shape[1] // 8) * 8
    return torch.nn.functional.pad(tensor, (0, columns - tensor.shape[1]), value=float("nan"))[
        :, : tensor.shape[1]
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("streamed", [False, True], ids=["on chip", "streamed"])
@pytest.mark.parametrize("name", HOST_GROUPS)
def test_ragged_group(host: Host, name: str, streamed: bool, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and name == "32 ranks" and not streamed:
        pytest.skip("is streamed")
    optimizer = Optimizer("gd", 1.0) if dtype == torch.float16 else Optimizer(step_size=2)
    weights, state = start(HOST_GROUPS[name], dtype, optimizer, padded)
    before = [w.clone() for w in weights]
    host.descend(weights, state, 3, ctas=6, streamed=streamed)
    assert_near_reference(state, HOST_GROUPS[name], dtype, 3)
    assert all(map(torch.equal, weights, before))


def test_long_descent_stays_at_the_reference(host: Host) -> None:
    shapes = [(17, 24, 3)]
    weights, state = start(shapes, optimizer=Optimizer(step_size=20, gamma=0.7))
    host.descend(weights, state, 60, ctas=1)
    assert_near_reference(state, shapes, torch.bfloat16, 60)


@pytest.mark.parametrize("streamed", [False, True], ids=["on chip", "streamed"])
@pytest.mark.parametrize("shape", [(4, 4200, 2), (2100, 4, 9)], ids=str)
def test_more_members_than_one_batch_of_loads(
    host: Host, shape: tuple[int, int, int], streamed: bool
) -> None:
    weights, state = start([shape])
    host.descend(weights, state, 1, ctas=17, streamed=streamed)
    assert_near_reference(state, [shape], torch.bfloat16, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "view",
    [transposed, lambda t: torch.stack([t, t], -1)[..., 1], lambda t: misaligned(t, 4)],
    ids=["transposed", "strided", "misaligned"],
)
def test_any_memory_on_chip(
    host: Host, view: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    shapes = [(24, 280, 3)]
    weights, state = start(shapes, dtype)
    host.descend(weights, state, 2)
    others, other = start(shapes, dtype, view=view)
    host.descend(others, other, 2)
    assert_same(state, other)


@pytest.mark.parametrize(
    ("streamed", "ctas"), [(False, 5), (True, 4), (True, 6)], ids=["on chip", "streamed", "spread"]
)
def test_bits_depend_on_neither_group_nor_calls_nor_who_comes_first(
    host: Host, streamed: bool, ctas: int
) -> None:
    weights, expected = start(RAGGED, view=padded)
    cuts = host.cuts(weights, expected, streamed, 4)
    host.descend(weights, expected, 3, cuts=cuts)
    for seed in (1, 2):
        _, state = start(RAGGED)
        host.descend(weights, state, 3, ctas, seed, cuts=cuts)
        assert_same(state, expected)
    _, state = start(RAGGED)
    for steps in (1, 2):
        host.descend(weights, state, steps, ctas, cuts=cuts)
    assert_same(state, expected)
    _, state = start(RAGGED)
    for half in ([2, 0], [1]):
        members = [weights[i] for i in half]
        host.descend(members, state.take(half), 3, ctas, cuts=[cuts[i] for i in half])
    assert_same(state, expected)


@pytest.mark.parametrize("stages", [2, 8])
def test_bits_do_not_depend_on_how_far_ahead_a_matrix_is_read(host: Host, stages: int) -> None:
    shapes = [(70, 264, 9), (5, 40, 10)]  # of five stages, and of one
    weights, expected = start(shapes)
    host.descend(weights, expected, 4, streamed=True)
    _, state = start(shapes)
    host.descend(weights, state, 4, streamed=True, stages=stages, seed=3)
    assert_same(state, expected)


@pytest.mark.parametrize("blocks_wanted", [(1, 1), (3, 1), (1, 3), (2, 3)], ids=str)
def test_streamed_blocks_of_any_size(host: Host, blocks_wanted: tuple[int, int]) -> None:
    shape = (100, 200, 5)
    weights, state = start([shape])
    tiles = [-(-size // (16 * n)) for size, n in zip(shape, blocks_wanted, strict=False)]
    cut = Cut(Variant(8, 2, True), (tiles[0], tiles[1]), blocks_wanted)
    host.descend(weights, state, 4, cuts=[cut], ctas=7)
    assert_near_reference(state, [shape], torch.bfloat16, 4)


def test_minimum_stays_where_it_is(host: Host) -> None:
    # All in powers of two, so that W = B·A exactly; A = B = 0 has no gradient either.
    A, B = torch.eye(2, 6) * 0.5, torch.eye(4, 2) * 0.25
    weight = (B @ A).bfloat16()
    state = DescentState.start([A, 0 * A], [B, 0 * B], Optimizer(eps=0.1))
    host.descend([weight, weight], state, 5, ctas=2)
    assert torch.equal(state.A[0], A)
    assert torch.equal(state.B[0], B)
    assert not state.params[1].any()


@pytest.mark.skipif(native.module() is None, reason="lora_init._C is not built")
def test_module_and_host_agree_on_blocks(host: Host) -> None:
    module = native.module()
    for ranks, element_bytes, streamed in itertools.product((8, 16, 32), (2, 4), (False, True)):
        if element_bytes == 4 and ranks == 32 and not streamed:
            continue
        variant = Variant(ranks, element_bytes, streamed)
        limits = host.limits(variant, 264)
        assert module.descend_tiles(tuple(variant)) == limits.tiles  # type: ignore[union-attr]
        found = blocks.cut((1000, 1100), variant, limits)
        assert isinstance(found, Cut)
        assert cuda._region_bytes(found) == host.region_bytes(found)


ON_CHIP, STREAMED = Limits(264, (16, 16)), Limits(132, (0, 32))


def test_cut_of_a_large_matrix() -> None:
    variant = Variant(16, 2, streamed=True)
    for shape, tiles, blocks_found in (
        ((14336, 4096), (56, 32), (16, 8)),
        ((4096, 14336), (64, 28), (4, 32)),
        ((128256, 4096), (501, 32), (16, 8)),
    ):
        found = blocks.cut(shape, variant, STREAMED)
        assert found == Cut(variant, tiles, blocks_found)


@pytest.mark.parametrize("ctas", [1, 16, 78, 108, 132, 264])
@pytest.mark.parametrize("widest", [16, 32])
def test_cuts_cover_the_matrix_and_let_all_update(ctas: int, widest: int) -> None:
    variant = Variant(8, 2, streamed=True)
    sizes = [1, 16, 17, 300, 768, 1023, 4096, 4100, 11008, 14336, 28672, 151936]
    for rows in sizes:
        for columns in sizes:
            found = blocks.cut((rows, columns), variant, Limits(ctas, (0, widest)))
            if columns > 16 * widest * ctas:
                assert "columns" in str(found)
                continue
            assert isinstance(found, Cut)
            assert found.count <= ctas
            assert found.tiles[1] <= widest
            for size, tiles, n in zip((rows, columns), found.tiles, found.blocks, strict=True):
                assert 16 * tiles * (n - 1) < size <= 16 * tiles * n
            # Or a Gram matrix is overwritten under one that only reads it (csrc/blocks.h).
            assert found.blocks[1] <= found.tiles[0] or found.blocks[0] <= found.tiles[1]


def test_on_chip_or_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def limits(variant: Variant, index: int) -> Limits | str:
        return STREAMED if variant.streamed else ON_CHIP

    monkeypatch.setattr(cuda, "_limits", limits)
    monkeypatch.setattr(cuda, "_region_bytes", lambda found: 1 << 20)

    def cut(rows: int, columns: int, view: Callable[[Tensor], Tensor] = lambda t: t) -> Cut | str:
        weight = view(torch.empty(rows, columns, dtype=torch.bfloat16, device="meta"))
        return cuda._cut(weight, torch.empty(8, rows + columns))

    small, large = cut(4096, 4096), cut(4096, 14336)
    assert isinstance(small, Cut)
    assert small.tiles == (16, 16)
    assert isinstance(large, Cut)
    assert large.variant.streamed
    reason = cut(14336, 4096, lambda t: t.T)
    assert "keeps 264 blocks of 256 × 256 on chip, (4096, 14336) has 896" in str(reason)
    assert "streamed, W needs contiguous rows" in str(reason)
    monkeypatch.setattr(cuda, "_region_bytes", lambda found: 1 << 25)
    assert "exchanges less than 4 GB" in str(cut(4096, 14336))


def test_says_what_it_does_not_take() -> None:
    def why(shape: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16) -> str | None:
        return cuda._why_not_descend(*start([shape], dtype), 1)

    assert "not float64" in (why((4, 4, 1), torch.float64) or "")
    assert "up to 32 ranks, not 33" in (why((40, 40, 33)) or "")
    assert "runs on NVIDIA GPUs" in (why((4, 4, 1)) or "")


GROUPS: dict[str, Shapes] = {
    "8 ranks": [*RAGGED, (768, 768, 8), (1024, 520, 7)],
    "16 ranks": [(48, 72, 9), (512, 130, 16), (2048, 1000, 12)],
    "32 ranks": [(40, 72, 17), (520, 136, 32), (1024, 1000, 24)],
}


@pytest.fixture(params=["on chip", "streamed"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How `cuda` takes matrices that could stay on chip."""
    if request.param == "streamed":
        ask = cuda._limits

        def limits(variant: Variant, index: int) -> Limits | str:
            return ask(variant, index) if variant.streamed else "is not asked for"

        monkeypatch.setattr(cuda, "_limits", limits)
    return str(request.param)


def run_on_gpu(weights: Sequence[Tensor], state: DescentState, *calls: int) -> None:
    with backend("cuda"):
        for steps in calls:
            op.descend(weights, state, steps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", ["adam", "gd"])
@pytest.mark.parametrize("name", GROUPS)
def test_gpu_near_the_reference(form: str, name: str, solver: str, dtype: torch.dtype) -> None:
    shapes = GROUPS[name]
    optimizer = Optimizer(solver, 5e-4 if solver == "adam" else 1.0, step_size=100, gamma=0.7)
    for steps in (1, 300):
        weights, state = start(shapes, dtype, optimizer, padded, device="cuda")
        run_on_gpu(weights, state, steps)
        assert_near_reference(state, shapes, dtype, steps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4100, 11008, 8), (14336, 4096, 16), (9000, 4096, 32)], ids=str)
def test_gpu_streams_what_does_not_fit_on_chip(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    weights, state = start([shape], dtype, device="cuda")
    found = cuda._cut(weights[0], state.params[0])
    assert isinstance(found, Cut), found
    assert found.variant.streamed
    run_on_gpu(weights, state, 3)
    assert_near_reference(state, [shape], dtype, 3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shapes", [*GROUPS.values(), [(1700, 2200, 16)]], ids=[*GROUPS, "slices of two sizes"]
)
def test_gpu_bits_depend_on_neither_group_nor_calls(form: str, shapes: Shapes) -> None:
    weights, expected = start(shapes, view=padded, device="cuda")
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
def test_gpu_takes_more_blocks_than_it_holds(form: str) -> None:
    # 480 blocks on chip; layers share what the last ones of a round leave and begin in the middle.
    shapes = [(600 + i, 1000, 8) for i in range(40)]
    weights, together = start(shapes, device="cuda")
    run_on_gpu(weights, together, 20)
    _, state = start(shapes, device="cuda")
    for i, weight in enumerate(weights):
        run_on_gpu([weight], state.take([i]), 20)
    assert_same(state, together)


@pytest.mark.gpu
def test_gpu_refuses_what_it_can_neither_keep_nor_stream() -> None:
    weights, state = start([(4096, 11008, 8)], view=transposed, device="cuda")
    reason = backends.available()["cuda"].why_unsupported("descend", weights, state, 1)
    assert "needs contiguous rows" in (reason or "")
