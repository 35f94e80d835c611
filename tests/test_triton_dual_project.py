"""The Triton `dual_project`: its blocks as arithmetic, its kernels against fp64.

The functions called case_* run kernels. pytest does not collect them by that name here: one test
runs them in a process of its own under the interpreter (a process that interprets can compile
nothing), another one on a GPU.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lora_init import BackendError, backend, backends
from lora_init.ops import dual_project as op
from lora_init.ops.descend import DescentState, Optimizer, descend
from lora_init.testing import SHAPES, assert_accurate, gaussian, misaligned, product, transposed

pytest.importorskip("triton")
from lora_init.triton_kernels import common, dual_project

pytestmark = pytest.mark.usefixtures("poisoned")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_kernels_under_the_interpreter(run_cases: Callable[..., None]) -> None:
    run_cases(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
def test_kernels_on_the_gpu(run_cases: Callable[..., None]) -> None:
    run_cases()


Operands = tuple[Tensor, Tensor, Tensor]
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "transposed": transposed,
    "misaligned": misaligned,
    "rows of a wider one": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "every second element": lambda t: torch.stack([t, t], -1)[..., 1],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.fixture(params=[None, (8, 0)], ids=["H100's tiles", "A100's tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not INTERPRETED:
        pytest.skip("a GPU has its own")
    if request.param:
        monkeypatch.setattr(common, "capability_of", lambda device: request.param)


def operands(
    rows: int, columns: int, p: int, q: int, dtype: torch.dtype, view: str = "dense"
) -> Operands:
    """W (rows, columns) of `dtype`, A (p, columns), B (rows, q) in fp32, all in memory `view`."""
    device = "cpu" if INTERPRETED else "cuda"
    factors = gaussian(p, columns, seed=1), gaussian(rows, q, seed=2)
    items = (gaussian(rows, columns, dtype), *factors)
    weight, A, B = (VIEWS[view](t.to(device)) for t in items)
    return weight, A, B


def run(group: list[Operands], precision: str = "full") -> list[tuple[Tensor, Tensor]]:
    weights, A, B = (list(items) for items in zip(*group, strict=True))
    return dual_project.dual_project(weights, A, B, precision)


def check(pair: tuple[Tensor, Tensor], item: Operands, label: str) -> None:
    weight, A, B = item
    w = weight.float()
    assert_accurate(pair[0], product(weight, A.T), w @ A.T, (A @ w.T).T, label=f"{label}: W Aᵀ")
    assert_accurate(pair[1], product(B.T, weight), B.T @ w, (w.T @ B).T, label=f"{label}: Bᵀ W")


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def case_ragged_group_is_as_accurate_as_torch(dtype: torch.dtype) -> None:
    shapes = [(m, n, r, r % 5 + 1) for m, n, r in SHAPES.values()]
    shapes += [(40, 72, 64, 64), (30, 20, 100, 7), (65, 33, 0, 3)]
    group = [operands(*shape, dtype) for shape in shapes]
    before = [w.clone() for w, _, _ in group]
    for shape, item, copy, pair in zip(shapes, group, before, run(group), strict=True):
        check(pair, item, str(shape))
        assert torch.equal(item[0], copy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def case_any_memory_is_as_accurate_as_torch(view: str, dtype: torch.dtype) -> None:
    for shape in ((32, 64, 5, 3), (21, 35, 2, 9)):
        item = operands(*shape, dtype, view)
        check(run([item])[0], item, f"{view} {shape}")


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def case_several_blocks_and_slabs(dtype: torch.dtype, launches: list[str]) -> None:
    # More than one block each way, the last ones not full, and in fp32 many slabs a block.
    item = (
        operands(300, 1100, 16, 16, dtype)
        if dtype.itemsize == 2
        else operands(700, 300, 3, 3, dtype)
    )
    check(run([item])[0], item, "blocks")
    assert launches == ["pack", "products", "sum_partials"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def case_memory_order_changes_no_bit(dtype: torch.dtype) -> None:
    items = [operands(80, 160, 8, 8, dtype, view) for view in ("dense", "transposed")]
    assert [
        common.variant(w, 8, 4 if dtype == torch.float32 else 2).memory for w, _, _ in items
    ] == [
        "rows",
        "columns",
    ]
    (left, right), (left0, right0) = (run([item])[0] for item in items)
    assert torch.equal(left, left0)
    assert torch.equal(right, right0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def case_bits_depend_on_neither_group_nor_order(dtype: torch.dtype, launches: list[str]) -> None:
    shapes = [(33, 65, 3, 5), (130, 40, 8, 8), (1, 7, 1, 1), (40, 72, 17, 2)]
    group = [operands(*shape, dtype) for shape in shapes]
    together = run(group)
    repeated, backwards = run(group), run(group[::-1])[::-1]
    alone = [run([item])[0] for item in group]
    for pairs in (repeated, backwards, alone):
        for pair, expected in zip(pairs, together, strict=True):
            assert all(map(torch.equal, pair, expected))


def case_two_hundred_layers_in_two_launches(launches: list[str]) -> None:
    group = [operands(3 + i % 7, 5 + i % 11, 2, 2, torch.float32) for i in range(200)]
    for i, (item, pair) in enumerate(zip(group, run(group), strict=True)):
        check(pair, item, str(i))
    # Every product is complete in one block: nothing to sum. Two classes by alignment.
    assert sorted(set(launches)) == ["pack", "products"]
    assert len(launches) == 2 * len({common.variant(w, 2, 4) for w, _, _ in group})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def case_fast_keeps_two_parts(dtype: torch.dtype) -> None:
    weight, A, B = operands(33, 65, 3, 5, dtype)
    ((left, right),) = run([(weight, A, B)], "fast")
    bits = {torch.bfloat16: 16, torch.float16: 22}[dtype]
    for result, exact in ((left, product(weight, A.T)), (right, product(B.T, weight))):
        error = torch.from_numpy(result.cpu().double().numpy() - exact).norm()
        assert error <= 2.0**-bits * torch.from_numpy(exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def case_factors_of_w_s_dtype_are_exact_in_two_parts(dtype: torch.dtype) -> None:
    weight, A, B = operands(33, 64, 3, 5, dtype)
    item = weight, A.to(dtype), B.to(dtype)
    check(run([item])[0], (weight, item[1].float(), item[2].float()), "16-bit factors")


@pytest.mark.parametrize("scale", [1e-12, 1e9])
def case_fp16_has_no_range_of_its_own(scale: float) -> None:
    weight, A, B = operands(33, 64, 3, 5, torch.float16)
    A[1], B[:, 2] = A[1] * 1e-3, 0
    item = weight, A * scale, B * scale
    check(run([item])[0], item, f"times {scale}")


def case_non_finite_entries_reach_their_rows_and_columns_only() -> None:
    for dtype in DTYPES:
        weight, A, B = operands(20, 32, 2, 2, dtype)
        weight[4, 7], weight[5, 8] = float("nan"), float("inf")
        ((left, right),) = run([(weight, A, B)])
        assert (~torch.isfinite(left)).any(1).nonzero().flatten().tolist() == [4, 5]
        assert (~torch.isfinite(right)).any(0).nonzero().flatten().tolist() == [7, 8]


@pytest.mark.skipif(not INTERPRETED, reason="touches 200 pages of 6.7 GB: on a GPU that is memory")
def case_offsets_beyond_32_bits() -> None:
    weight, A, B = operands(200, 8, 2, 2, torch.bfloat16)
    far = torch.empty(200 << 24, dtype=torch.bfloat16).as_strided((200, 8), (1 << 24, 1))
    far.copy_(weight)
    assert common.variant(far, 2, 2).memory == "rows"
    check(run([(far, A, B)])[0], (weight, A, B), "far rows")
    if INTERPRETED:
        wide = torch.empty(8 << 28, dtype=torch.bfloat16).as_strided((8, 8), (1 << 28, 1))
        wide.copy_(weight[:8])
        assert common.variant(wide, 2, 2).memory == "any"
        check(run([(wide, A, B[:8])])[0], (weight[:8], A, B[:8]), "farther rows")


def form_of(shape: tuple[int, int], dtype: torch.dtype, r: int, parts: int = 2) -> common.Variant:
    weight = torch.empty(shape, dtype=dtype, device="meta")
    return common.variant(weight, r, 4 if dtype == torch.float32 else parts)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (576, 192), (4096, 4096), (1024, 4096), (128_256, 8192), (70_000, 65_536)],
    ids=str,
)
def test_blocks_cover_a_weight_once(shape: tuple[int, int], capability: tuple[int, int]) -> None:
    for dtype in DTYPES:
        form = form_of(shape, dtype, 16)
        plan = common.plan(shape, form, 16, 16, capability)
        tile = form.tile(capability)
        assert plan.reads == 1
        assert plan.rows % tile.rows == plan.columns % tile.columns == 0
        table = common.block_programs((plan.blocks, plan.blocks))
        assert len(table) == 2 * plan.programs
        for layer in (0, 1):
            blocks = table[table[:, 0] == layer, 1:].astype(object)  # exact: Python's integers
            rows = [min(shape[0], (i + 1) * plan.rows) - i * plan.rows for i in blocks[:, 0]]
            columns = [
                min(shape[1], (j + 1) * plan.columns) - j * plan.columns for j in blocks[:, 1]
            ]
            assert min(rows) > 0
            assert min(columns) > 0
            assert len({tuple(block) for block in blocks}) == len(blocks)
            assert sum(m * n for m, n in zip(rows, columns, strict=True)) == shape[0] * shape[1]
        assert plan.partial_bytes == 8 * 16 * (
            shape[0] * plan.column_blocks + shape[1] * plan.row_blocks
        )


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize(("r", "share"), [(1, 0.02), (8, 0.15), (16, 0.3), (32, 0.6)])
def test_partials_of_large_weights_stay_below_a_share_of_their_bytes(
    r: int, share: float, capability: tuple[int, int]
) -> None:
    # More than the 15% that were planned at r = 16: fewer partials were slower (`common.plan`).
    shape = (4096, 4096)
    plan = common.plan(shape, form_of(shape, torch.bfloat16, r), r, r, capability)
    narrow = 2 if capability == (10, 0) and r == 16 else 1  # a tile of 256 columns spills there
    assert plan.partial_bytes <= narrow * share * 2 * 4096**2
    # 64 such layers fill the 132 SMs of an H100 almost 4 times and more.
    assert 64 * plan.programs >= 3.8 * 132


def test_a_group_of_small_layers_fills_the_gpu() -> None:
    for shape, count in (((768, 768), 24), ((2048, 2048), 12), ((576, 576), 40)):
        plan = common.plan(shape, form_of(shape, torch.bfloat16, 8), 8, 8)
        assert count * plan.programs >= 0.7 * 132


def test_ranks_beyond_a_variant_are_read_in_several_goes() -> None:
    shape = (4096, 4096)
    for r, reads in ((1, 1), (32, 1), (33, 2), (64, 2), (100, 4)):
        assert common.plan(shape, form_of(shape, torch.bfloat16, r), r, r).reads == reads


def test_memory_is_told_from_strides_and_addresses() -> None:
    base = torch.empty(64, 64, dtype=torch.bfloat16)
    expected = {
        "rows": [base, base[:, 8:24], base[3:5], base[:1].expand(9, 64)],
        "columns": [base.T, base.T[:8], base[:, 8:24].T],
        "any": [base[:, 1:], base[:, :12], base[:, ::2], base[::2, ::2], base[:, :1]],
    }
    for memory, weights in expected.items():
        for weight in weights:
            assert common.variant(weight, 4, 2).memory == memory


def test_tables_arrive_as_they_left_at_multiples_of_16_bytes() -> None:
    tables = [common.span_programs((1, 1024, 1025), 1024), *(common.np.arange(n) for n in (1, 3))]
    arrived = common.upload(tables, torch.device("cpu"))
    for table, tensor in zip(tables, arrived, strict=True):
        assert (tensor.numpy() == table).all()
    assert all((b.data_ptr() - a.data_ptr()) % 16 == 0 for a, b in pairwise(arrived))
    assert tables[0].tolist() == [[0, 0], [1, 0], [2, 0], [2, 1024]]


def case_op_runs_on_the_backend_and_so_does_descend() -> None:
    group = [operands(*shape, torch.bfloat16) for shape in ((33, 64, 3, 5), (20, 16, 2, 2))]
    weights, A, B = (list(items) for items in zip(*group, strict=True))
    state = DescentState.start(A[1:], [B[1]], Optimizer())
    with backend("triton"):
        for item, pair in zip(group, op.dual_project(weights, A, B), strict=True):
            check(pair, item, "op")
        descend([torch.nn.Parameter(weights[1])], state, 2)
        assert op.dual_project([], [], []) == []
    assert state.step == 2
    assert not torch.equal(state.A[0], A[1])
    assert not state.params[0].requires_grad


W, A, B = torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)


def why(op_name: str, *args: object) -> str | None:
    return backends.available()["triton"].why_unsupported(op_name, *args)


def test_backend_says_why_not() -> None:
    call = ("dual_project", [W], [A], [B], "full")
    assert why(*call) == "runs on NVIDIA GPUs; the tensors are on the CPU"
    assert why("another") == "has no op 'another'"
    assert why("dual_project", [W], [A.double()], [B], "full") == (
        "computes in float32, bfloat16 and float16, not float64"
    )
    state = DescentState.start([A], [B], Optimizer())
    state.params[0] = torch.ones(6, 1).T.expand(1, 6)[:, ::2]
    assert why("descend", [W], state, 1) == "descends contiguous float32 factors and moments"
    with backend("triton"), pytest.raises(BackendError, match="triton: runs on NVIDIA GPUs"):
        op.dual_project([W], [A], [B])


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        (None, "triton is not installed"),
        ("3.2.0", "needs triton 3.3 or newer, found 3.2.0"),
        ("3.3.0", None),
        ("3.10.0+git", None),
    ],
)
def test_backend_needs_triton_of_some_age(
    installed: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    module = backends.available()["triton"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(module, "version", version)
    module._triton_missing.cache_clear()
    try:
        found = why("dual_project", [W], [A], [B], "full")
    finally:
        module._triton_missing.cache_clear()
    assert found is None if reason is None else found.startswith(reason)


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, lora_init; lora_init.backends.available(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
