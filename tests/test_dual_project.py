"""`dual_project` of every backend against fp64, and what its bits may not depend on."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_init import LoraInitError, backend, backends
from lora_init.backends import reference
from lora_init.ops.dual_project import dual_project
from lora_init.testing import (
    DTYPES,
    SHAPES,
    assert_accurate,
    gaussian,
    misaligned,
    product,
    transposed,
)

# A matrix that the reference splits into row blocks, the last one shorter.
LARGE = (3 * 1024 + 5, 1024)


@pytest.fixture(params=backends.available())
def backend_name(request: pytest.FixtureRequest) -> Iterator[str]:
    with backend(request.param):
        yield request.param


@contextlib.contextmanager
def skipping_what_it_lacks(name: str) -> Iterator[None]:
    try:
        yield
    except backends.BackendError as reason:
        if name == "reference":
            raise
        pytest.skip(str(reason))


def operands(
    rows: int, columns: int, p: int, q: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """W (rows, columns) of `dtype`, A (p, columns) and B (rows, q) in fp32."""
    weight = gaussian(rows, columns, dtype, seed)
    return weight, gaussian(p, columns, seed=seed + 1), gaussian(rows, q, seed=seed + 2)


def check(pair: tuple[Tensor, Tensor], weight: Tensor, A: Tensor, B: Tensor, label: str) -> None:
    wide = torch.float64 if torch.float64 in (weight.dtype, A.dtype, B.dtype) else torch.float32
    w, a, b = (t.to(wide) for t in (weight, A, B))
    left, right = pair
    for name, actual, x, y in (("W Aᵀ", left, w, a.T), ("Bᵀ W", right, b.T, w)):
        expressions, terms = (x @ y, (y.T @ x.T).T), product(x.abs(), y.abs())
        assert_accurate(actual, product(x, y), *expressions, terms=terms, label=f"{label}: {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_group_is_as_accurate_as_torch(backend_name: str, dtype: torch.dtype) -> None:
    shapes = [(m, n, r, r % 5 + 1) for m, n, r in SHAPES.values()] + [(*LARGE, 8, 3)]
    group = [operands(*shape, dtype, seed=i) for i, shape in enumerate(shapes)]
    copies = [tuple(t.clone() for t in item) for item in group]
    with skipping_what_it_lacks(backend_name):
        pairs = dual_project(*zip(*group, strict=True))
    for shape, item, pair, before in zip(shapes, group, pairs, copies, strict=True):
        check(pair, *item, label=str(shape))
        assert all(map(torch.equal, item, before))


@pytest.mark.parametrize("factor_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes_are_accumulated_in_the_wider(
    backend_name: str, dtype: torch.dtype, factor_dtype: torch.dtype
) -> None:
    weight, A, B = operands(33, 65, 3, 5, dtype)
    A, B = A.to(factor_dtype), B.to(factor_dtype)
    with skipping_what_it_lacks(backend_name):
        (pair,) = dual_project([weight], [A], [B])
    check(pair, weight, A, B, "mixed")


def test_one_fp64_operand_makes_everything_fp64(backend_name: str) -> None:
    weight, A, B = operands(33, 65, 3, 5, torch.bfloat16)
    with skipping_what_it_lacks(backend_name):
        (pair,) = dual_project([weight], [A], [B.double()])
    check(pair, weight, A, B.double(), "B in fp64")


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(*[st.integers(1, 70)] * 2, *[st.integers(1, 20)] * 2), min_size=1, max_size=4
    ),
    dtype=st.sampled_from(DTYPES),
    memory=st.sampled_from(["dense", "misaligned", "transposed", "strided", "expanded"]),
)
def test_any_strides_are_as_accurate_as_torch(
    shapes: list[tuple[int, int, int, int]], dtype: torch.dtype, memory: str
) -> None:
    views = {
        "dense": lambda t: t,
        "misaligned": misaligned,
        "transposed": transposed,
        "strided": lambda t: torch.stack([t, t], -1)[..., 1],
        "expanded": lambda t: t[:1].expand(t.shape),
    }
    view = views[memory]
    group = [operands(*shape, dtype, seed=i) for i, shape in enumerate(shapes)]
    group = [(view(w), view(a), view(b)) for w, a, b in group]
    for item, pair in zip(group, dual_project(*zip(*group, strict=True)), strict=True):
        check(pair, *item, label=memory)


def test_empty_group_gives_nothing() -> None:
    assert dual_project([], [], []) == []


def test_non_finite_entries_reach_their_rows_and_columns_only(backend_name: str) -> None:
    weight, A, B = operands(20, 30, 2, 2, torch.float32)
    weight[4, 7] = float("nan")
    weight[5, 8] = float("inf")
    with skipping_what_it_lacks(backend_name):
        ((left, right),) = dual_project([weight], [A], [B])
    assert (~torch.isfinite(left)).any(1).nonzero().flatten().tolist() == [4, 5]
    assert (~torch.isfinite(right)).any(0).nonzero().flatten().tolist() == [7, 8]


GROUP_SHAPES = [(33, 65, 3, 5), (*LARGE, 8, 3), (1, 7, 1, 1), (257, 96, 17, 2)]


def group_of(dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [operands(*shape, dtype, seed=i) for i, shape in enumerate(GROUP_SHAPES)]


def assert_same_bits(
    pairs: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]
) -> None:
    for (left, right), (left0, right0) in zip(pairs, expected, strict=True):
        assert torch.equal(left, left0)
        assert torch.equal(right, right0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_group_nor_order(backend_name: str, dtype: torch.dtype) -> None:
    group = group_of(dtype)
    with skipping_what_it_lacks(backend_name):
        together = dual_project(*zip(*group, strict=True))
    alone = [dual_project([w], [a], [b])[0] for w, a, b in group]
    backwards = dual_project(*zip(*group[::-1], strict=True))[::-1]
    assert_same_bits(alone, together)
    assert_same_bits(backwards, together)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    group = group_of(dtype)
    torch.set_num_threads(1)
    expected = dual_project(*zip(*group, strict=True))
    for count in (2, 4):
        torch.set_num_threads(count)
        assert_same_bits(dual_project(*zip(*group, strict=True)), expected)
        # Alone, the large one has its row blocks spread over the threads.
        assert_same_bits([dual_project(*([t] for t in group[1]))[0]], [expected[1]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_memory(backend_name: str, dtype: torch.dtype) -> None:
    group = group_of(dtype)
    with skipping_what_it_lacks(backend_name):
        expected = dual_project(*zip(*group, strict=True))
    for view in (misaligned, transposed, lambda t: torch.stack([t, t], -1)[..., 1]):
        viewed = [tuple(view(t) for t in item) for item in group]
        assert viewed[1][0].data_ptr() % 64 == 8 or not viewed[1][0].is_contiguous()
        assert_same_bits(dual_project(*zip(*viewed, strict=True)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bits_are_those_of_the_exact_fp32_copy(dtype: torch.dtype) -> None:
    group = group_of(dtype)
    copies = [(w.float(), a, b) for w, a, b in group]
    expected = dual_project(*zip(*group, strict=True))
    assert_same_bits(dual_project(*zip(*copies, strict=True)), expected)


def test_the_large_case_is_split_and_the_others_are_not() -> None:
    blocks = [len(reference._row_blocks(w)) for w, _, _ in group_of(torch.float32)]
    assert blocks[1] > 2
    assert blocks[0] == blocks[2] == blocks[3] == 1


def test_parameters_leave_no_graph() -> None:
    weight, A, B = (torch.nn.Parameter(t) for t in operands(5, 6, 2, 2, torch.float32))
    ((left, right),) = dual_project([weight], [A], [B])
    assert not left.requires_grad
    assert not right.requires_grad


W, A, B = operands(5, 6, 2, 3, torch.float32)
REFUSED = {
    "too few A": (([W, W], [A], [B, B]), r"2 matrices, 1 A, 2 B"),
    "A transposed": (([W], [A.T], [B]), r"A must be \(r, 6\), got \(6, 2\): transpose it"),
    "B transposed": (([W], [A], [B.T]), r"B must be \(5, r\), got \(3, 5\): transpose it"),
    "A of another layer": (([W], [A[:, :4]], [B]), r"A must be \(r, 6\), got \(2, 4\)$"),
    "B of another layer": (([W, W], [A, A], [B, B[:4]]), r"matrix 1: B must be .*got \(4, 3\)$"),
    "vector": (([W], [A[0]], [B]), r"A must be a floating-point matrix, got \(6,\)"),
    "integers": (([W.long()], [A], [B]), r"W must be a floating-point matrix.*int64"),
    "complex": (([W], [A], [B.cfloat()]), r"B must be a floating-point matrix.*complex64"),
    "meta": (([W.to("meta")], [A.to("meta")], [B.to("meta")]), r"meta device.*load it first"),
    "two devices": (([W], [A.to("meta")], [B]), r"A is on meta, W on cpu: move one"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_operands_are_refused(arguments: tuple[list[Tensor], ...], message: str) -> None:
    with pytest.raises(LoraInitError, match=message):
        dual_project(*arguments)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(LoraInitError, match=r"'full' or 'fast', got 'tf32'"):
        dual_project([W], [A], [B], precision="tf32")
