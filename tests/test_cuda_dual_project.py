"""csrc/dual_project.cu: its index maths and its kernels on the host, one fiber a CUDA thread, and
on a GPU."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_init import BackendError, backend, native
from lora_init.backends import cuda
from lora_init.native.projections import Form, Projection, projection_table
from lora_init.ops.dual_project import dual_project
from lora_init.testing import assert_accurate, gaussian, misaligned, product, transposed

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = DTYPES[1:]
Operands = tuple[Tensor, Tensor, Tensor]
Shape = tuple[int, int, int, int]
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "transposed": transposed,
    "misaligned": lambda t: misaligned(t, t.element_size()),
    "rows of a wider one": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "every second element": lambda t: torch.stack([t, t], -1)[..., 1],
    "expanded": lambda t: t[:1].expand(t.shape),
}


class Host:
    """lora_init._C's functions, compiled for the host."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.dual_project.restype = ctypes.c_bool
        self.library.check_index_maths.restype = ctypes.c_char_p
        self.seed = 0

    def dual_project_columns(self, weight: int, ranks: int, parts: int) -> int:
        return int(self.library.dual_project_columns(weight, ranks, parts))

    def dual_project(self, **call: int) -> None:
        done = self.library.dual_project(
            ctypes.c_void_p(call["table"]),
            ctypes.c_int64(call["count"]),
            not call["layers"],
            call["weight"],
            call["ranks"],
            call["parts"],
            call["factors_are_half"],
            ctypes.c_float(call["scale"]),
            call["half_targets"],
            self.seed,
        )
        assert done, "blocks are numbered wrong, or threads wait for each other for ever"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    path = tmp_path_factory.mktemp("simt") / "dual_project.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    quiet = ["-Wno-unknown-pragmas", "-Wno-clobbered"]
    source = ROOT / "tests" / "dual_project_simt.cpp"
    include = f"-I{source.parent}"
    subprocess.run([compiler, *flags, *quiet, include, source, "-o", path], check=True)
    return path


def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return made


@pytest.fixture
def host(library: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """`cuda.dual_project` on CPU tensors. What nothing wrote yet is NaN."""
    module = Host(library)
    monkeypatch.setattr(native, "module", lambda: module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda, "_uploaded", lambda array, device: torch.from_numpy(array))
    for owner, name in ((torch, "empty"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    return module


def operands(
    rows: int, columns: int, p: int, q: int, dtype: torch.dtype, view: str = "dense"
) -> Operands:
    """W (rows, columns) of `dtype`, A (p, columns) and B (rows, q) in fp32, in memory `view`."""
    items = (
        gaussian(rows, columns, dtype, rows),
        gaussian(p, columns, seed=1),
        gaussian(rows, q, seed=2),
    )
    weight, A, B = (VIEWS[view](t) if t.numel() else t for t in items)
    return weight, A, B


def run(group: Sequence[Operands], precision: str = "full") -> list[tuple[Tensor, Tensor]]:
    weights, A, B = (list(items) for items in zip(*group, strict=True))
    return cuda.dual_project(weights, A, B, precision)  # type: ignore[arg-type]


def check(pair: tuple[Tensor, Tensor], item: Operands, label: str) -> None:
    w, a, b = (t.float() for t in item)
    for name, actual, x, y in (("W Aᵀ", pair[0], w, a.T), ("Bᵀ W", pair[1], b.T, w)):
        expressions, terms = (x @ y, (y.T @ x.T).T), product(x.abs(), y.abs())
        assert_accurate(actual, product(x, y), *expressions, terms=terms, label=f"{label}: {name}")


def assert_same_bits(got: Sequence[tuple[Tensor, Tensor]], expected: object) -> None:
    for pair, other in zip(got, expected, strict=True):  # type: ignore[call-overload]
        assert all(map(torch.equal, pair, other))


# The smallest, sides of one, no multiple of a tile or of 16 bytes; ranks of every kernel, several
# more than one operand has, and none.
SHAPES: list[Shape] = [
    (1, 1, 1, 1),
    (1, 7, 1, 2),
    (9, 1, 1, 1),
    (33, 65, 3, 8),
    (17, 130, 17, 5),
    (40, 72, 9, 64),
    (65, 33, 0, 3),
    (20, 30, 2, 0),
    (0, 5, 2, 3),
    (5, 0, 2, 3),
]


def test_index_maths(library: Path) -> None:
    """Every element, word and bank of every layout; see dual_project_simt.cpp."""
    assert Host(library).library.check_index_maths() is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_group_is_as_accurate_as_torch(host: Host, dtype: torch.dtype) -> None:
    group = [operands(*shape, dtype) for shape in SHAPES]
    before = [[t.clone() for t in item] for item in group]
    for shape, item, copies, pair in zip(SHAPES, group, before, run(group), strict=True):
        check(pair, item, str(shape))
        assert all(map(torch.equal, item, copies))


@pytest.mark.parametrize("ranks", [8, 16, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_blocks_and_rings_of_stages(host: Host, dtype: torch.dtype, ranks: int) -> None:
    columns = host.dual_project_columns(cuda._WEIGHTS[dtype], ranks, 3)
    item = operands(300, columns + 24, ranks, ranks - 1, dtype)
    one = Projection.of(item[0], item[1], item[2].T, "full")
    assert one.form == Form(dtype, ranks, 3, own=False)
    # Both products of one block, then of four, the last ones not full.
    for rows in (512, 256):
        cuda._project_both(one.form, [one], blocks=1, least=rows)
        check((one.left, one.right), item, f"{ranks} ranks, {rows} rows a block")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_any_memory_is_as_accurate_as_torch(host: Host, view: str, dtype: torch.dtype) -> None:
    group = [operands(*shape, dtype, view) for shape in ((32, 64, 5, 3), (21, 35, 2, 9))]
    for item, pair in zip(group, run(group), strict=True):
        check(pair, item, view)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_rows_changes_no_bit(host: Host, dtype: torch.dtype) -> None:
    expected = run([operands(40, 72, 5, 3, dtype)])
    for view in ("misaligned", "rows of a wider one", "every second element"):
        assert_same_bits(run([operands(40, 72, 5, 3, dtype, view)]), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_group_nor_who_comes_first(host: Host, dtype: torch.dtype) -> None:
    group = [operands(*shape, dtype) for shape in SHAPES[3:7]]
    together = run(group)
    for host.seed in (1, 2):
        assert_same_bits(run(group), together)
    assert_same_bits(run(group[::-1])[::-1], together)
    assert_same_bits([run([item])[0] for item in group], together)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_factors_of_the_weight_s_dtype_are_exact_in_one_part(
    host: Host, dtype: torch.dtype
) -> None:
    W, A, B = operands(50, 90, 6, 7, dtype)
    A, B = A.to(dtype), B.to(dtype)
    assert Projection.of(W, A, B.T, "full").form == Form(dtype, 8, 1, own=True)
    (pair,) = run([(W, A, B)])
    check(pair, (W, A, B), "one part")


def test_fast_rounds_factors_beside_bf16_alone(host: Host) -> None:
    W, A, B = operands(50, 90, 6, 7, torch.bfloat16)
    (pair,) = run([(W, A, B)], "fast")
    check(pair, (W, A.bfloat16(), B.bfloat16()), "rounded")
    for dtype in (torch.float32, torch.float16):
        item = operands(50, 90, 6, 7, dtype)
        assert_same_bits(run([item], "fast"), run([item]))


def test_factors_have_the_range_of_fp32_beside_fp16(host: Host) -> None:
    W, A, B = operands(30, 40, 3, 3, torch.float16)
    scales = torch.tensor([1e-30, 1.0, 1e30])
    A, B = A * scales[:, None], B * scales
    (pair,) = run([(W, A, B)])
    for rank in range(3):
        one = (W, A[rank : rank + 1], B[:, rank : rank + 1])
        check((pair[0][:, rank : rank + 1], pair[1][rank : rank + 1]), one, str(rank))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_entries_reach_their_rows_and_columns_only(
    host: Host, dtype: torch.dtype
) -> None:
    W, A, B = operands(20, 30, 2, 2, dtype)
    W[4, 7], W[5, 8] = torch.nan, torch.inf
    ((left, right),) = run([(W, A, B)])
    assert (~torch.isfinite(left)).any(1).nonzero().flatten().tolist() == [4, 5]
    assert (~torch.isfinite(right)).any(0).nonzero().flatten().tolist() == [7, 8]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products_scaled_and_rounded_into_any_memory(host: Host, dtype: torch.dtype) -> None:
    W, A, B = (t.to(dtype) for t in operands(70, 600, 4, 3, dtype))
    left, right = torch.empty(70, 8, dtype=dtype)[:, :4], torch.empty(600, 3, dtype=dtype).T
    one = Projection(W, A, B.T, left, right)
    cuda._project_both(one.form, [one], 0.375, blocks=256, least=64)
    w, a, b = (t.double() for t in (W, A, B))
    for actual, exact in ((left, 0.375 * (w @ a.T)), (right, b.T @ w)):
        assert_accurate(actual, exact.numpy(), exact.to(dtype))


def test_blocks_are_by_the_matrix_own_shape() -> None:
    def rows(out: int, columns: int, *rule: int) -> tuple[int, int]:
        W = torch.empty(1).expand(out, columns)
        one = Projection(W, W[:8], W[:, :8].T, W[:, :8], W[:8])
        table, partials = projection_table([one], 512, *rule)
        assert table.shape == (1, 24)
        return int(table[0, 5]), partials.numel()

    # 8 blocks beside each other, 2 below; partials are 5 % of a bf16 W's bytes, written and read.
    assert rows(4096, 4096) == (2048, 8 * (8 + 2) * 4096)
    assert rows(768, 768)[0] == 256
    assert rows(1 << 20, 4096)[0] == 4096
    # The backward's dY: enough blocks for a GPU of its own.
    assert rows(8192, 4096, 256, 64)[0] == 256


def test_says_what_it_does_not_take() -> None:
    def why(p: int, q: int, dtype: torch.dtype = torch.bfloat16) -> str:
        W, A, B = operands(4, 6, p, q, dtype)
        return cuda._why_not_dual_project([W], [A], [B], "full") or ""

    assert "up to 64 ranks, not 65" in why(2, 65)
    assert "not float64" in why(2, 2, torch.float64)
    assert "runs on NVIDIA GPUs; the tensors are on cpu" in why(64, 2)
    with backend("cuda"), pytest.raises(BackendError, match=r"on cpu|not built"):
        dual_project(*([t] for t in operands(4, 6, 2, 2, torch.bfloat16)))


# On a GPU

GROUP: list[Shape] = [
    *SHAPES,
    (300, 1100, 16, 16),
    (4096, 4096, 16, 24),
    (14336, 4096, 0, 8),
    (1024, 4096, 64, 40),
    (3001, 2005, 17, 17),
]


@pytest.fixture
def _gpu() -> Iterator[None]:
    item = operands(8, 8, 1, 1, torch.bfloat16)
    call = [[t.cuda()] for t in item]
    if reason := cuda.why_unsupported("dual_project", *call, "full"):
        pytest.skip(reason)
    with backend("cuda"):
        yield


def on_gpu(items: Sequence[Operands]) -> list[Operands]:
    return [(w.cuda(), a.cuda(), b.cuda()) for w, a, b in items]


def called(group: Sequence[Operands], precision: str = "full") -> list[tuple[Tensor, Tensor]]:
    weights, A, B = (list(items) for items in zip(*group, strict=True))
    return dual_project(weights, A, B, precision)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("precision", ["full", "fast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_against_fp64(dtype: torch.dtype, precision: str) -> None:
    items = on_gpu([operands(*shape, dtype) for shape in GROUP])
    torch.full((1 << 26,), torch.nan, device="cuda")  # what results are allocated from
    rounded = precision == "fast" and dtype == torch.bfloat16
    for shape, (w, a, b), pair in zip(GROUP, items, called(items, precision), strict=True):
        a, b = (t.to(dtype) if rounded else t for t in (a, b))
        for name, actual, x, y in (("W Aᵀ", pair[0], w, a.T), ("Bᵀ W", pair[1], b.T, w)):
            exact, terms = x.double() @ y.double(), x.double().abs() @ y.double().abs()
            error = float((actual - exact).norm())
            # fp32's own rounding of every term; two bf16 parts would leave 64 times as much.
            assert error <= 2**-23 * float(terms.norm()), f"{shape} {name}: {error:.1e}"


@pytest.mark.gpu
@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_gpu_any_memory(view: str, dtype: torch.dtype) -> None:
    item = operands(1200, 1000, 9, 7, dtype)
    (w, a, b), (expected,) = on_gpu([item])[0], called(on_gpu([item]))
    if view == "expanded":
        expected = called([(VIEWS[view](w).contiguous(), a, b)])[0]
    (pair,) = called([(VIEWS[view](w), VIEWS[view](a) if view != "expanded" else a, b)])
    for got, other in zip(pair, expected, strict=True):
        # Of a transposed matrix the sums are in another order.
        if view == "transposed":
            torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(got, other)


@pytest.mark.gpu
@pytest.mark.usefixtures("_gpu")
def test_gpu_one_matrix_in_a_graph() -> None:
    ((W, A, B),) = on_gpu([operands(1200, 1000, 9, 7, torch.bfloat16)])
    dual_project([W], [A], [B])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pairs = dual_project([W], [A], [B])
    W.copy_(W.flip(0))
    graph.replay()
    assert_same_bits(pairs, dual_project([W], [A], [B]))


@pytest.mark.gpu
@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gpu_products_scaled_and_rounded(dtype: torch.dtype) -> None:
    """dS and dB of a layer's backward."""
    W, A, B = (t.to(dtype) for t in on_gpu([operands(2049, 1032, 17, 9, dtype)])[0])
    left = torch.full((2049, 24), torch.nan, dtype=dtype, device="cuda")[:, :17]
    right = torch.full((1032, 9), torch.nan, dtype=dtype, device="cuda").T
    one = Projection(W, A, B.T, left, right)
    cuda._project_both(one.form, [one], 0.375, blocks=256, least=64)
    w, a, b = (t.double() for t in (W, A, B))
    for actual, exact in ((left, 0.375 * (w @ a.T)), (right, b.T @ w)):
        assert_accurate(actual, exact.cpu().numpy(), exact.to(dtype))


@pytest.mark.gpu
@pytest.mark.usefixtures("_gpu")
def test_gpu_refuses_a_table_that_does_not_fit() -> None:
    module = native.module()
    assert module is not None
    W, A, B = on_gpu([operands(64, 72, 4, 4, torch.bfloat16)])[0]
    one = Projection.of(W, A, B.T, "full")
    good, _partials = projection_table([one], module.dual_project_columns(1, 8, 3))

    def launch(field: int, value: int) -> None:
        table = good.copy()
        table[0, field] = value
        module.dual_project(
            table=table.ctypes.data, layers=0, count=1, weight=1, ranks=8, parts=3,
            factors_are_half=False, scale=1.0, half_targets=False, device=0, stream=0,
        )  # fmt: skip

    for field, value, reason in (
        (0, gaussian(64, 72, torch.bfloat16).data_ptr(), "W is not in device memory"),
        (0, W.data_ptr() + 1, "W at .* is not aligned to 2 bytes"),
        (3, -1, "matrix 0 of -1 × 72 is out of range"),
        (5, 40, "multiple of 16, got 40"),
        (6, 1, "begins at block 1 and span 0, expected 0 and 0"),
        (11, 9, "A of matrix 0 has 9 ranks, this kernel takes up to 8"),
        (16, A.cpu().data_ptr(), "B is not in device memory"),
    ):
        with pytest.raises(ValueError, match=reason):
            launch(field, value)
    launch(5, 64)
