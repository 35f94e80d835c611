"""csrc/lora_linear.cu and csrc/project.cu: their index maths on the host, their machine code, and
on a GPU their results. csrc/dual_project.cu, which the backward uses, has tests of its own."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_init import BackendError, backend, backends, native
from lora_init.backends import cuda, reference
from lora_init.native.projections import Projection
from lora_init.ops.lora_linear import lora_linear
from lora_init.testing import assert_accurate

ROOT = Path(__file__).resolve().parents[1]
HALVES = (torch.bfloat16, torch.float16)

# (M, in, out, r) of the smallest, no multiple of a tile or a step, more than one chunk of ranks,
# and LLaMA's k/v and q.
SHAPES = {
    "1x8x8_r1": (1, 8, 8, 1),
    "1x4096x1024_r16": (1, 4096, 1024, 16),
    "127x72x136_r8": (127, 72, 136, 8),
    "129x1000x264_r17": (129, 1000, 264, 17),
    "300x64x72_r100": (300, 64, 72, 100),
    "513x520x1024_r64": (513, 520, 1024, 64),
    "2049x4096x1024_r16": (2049, 4096, 1024, 16),
    "3000x4096x4096_r16": (3000, 4096, 4096, 16),
}


def test_every_element_is_where_the_hardware_looks_for_it(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path / "gemm_tiles_test"
    source = ROOT / "tests" / "gemm_tiles_test.cpp"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def compiled(name: str, folder: Path) -> tuple[str, str]:
    """What ptxas says of a source's kernels, and their SASS."""
    triton = pytest.importorskip("triton")  # brings a disassembler
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    cubin = folder / f"{name}.cubin"
    flags = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-cubin"]
    source = ROOT / "csrc" / f"{name}.cu"
    command = ["nvcc", *flags, "-Werror=all-warnings", "-o", cubin, source]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return built.stderr, sass


@pytest.mark.parametrize(
    ("source", "kernels"),
    [
        ("lora_linear", 16),  # dtypes, tile widths, cluster sizes, directions
        ("project", 6),  # dtypes, which operands are transposed
    ],
)
def test_kernels_use_registers_tensor_cores_and_the_copy_engine(
    source: str, kernels: int, tmp_path: Path
) -> None:
    said, sass = compiled(source, tmp_path)
    assert sass.count("Function :") == kernels
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == kernels
    assert "serialized" not in said
    gemm = source == "lora_linear"
    for kernel in sass.split("Function :")[1:]:
        name = kernel.split("\n", 1)[0]
        for instruction in (
            "HGMMA",
            "UTMALDG",
            *(("UTMASTG", "STSM", "USETMAXREG") if gemm else ()),
        ):
            assert instruction in kernel, name
        assert not re.search(r"\b(STL|LDL|HMMA)\b", kernel), name
        # Products wait for those of the chunk before, not for each other.
        assert len(re.findall(r"HGMMA\b[^;]*gsb0", kernel)) <= kernel.count("HGMMA") / 2, name
        # Two CTAs share what they both read.
        assert ("MULTICAST" in kernel) == (gemm and "Li2E" in name), name
        # S is waited for where it is needed, and may be overtaken while it is made.
        assert ("ACQBULK" if gemm else "PREEXIT") in kernel, name


def test_reasons_are_given_on_the_cpu() -> None:
    x = torch.zeros(4, 8, dtype=torch.bfloat16)
    R, A, B = x.new_zeros(16, 8), x.new_zeros(2, 8), x.new_zeros(16, 2)
    expected = "on the CPU|on cpu|not built"
    with backend("cuda"), pytest.raises(BackendError, match=expected):
        lora_linear(x, R, A, B)


def test_without_the_module_the_reason_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "module", lambda: None)
    reason = cuda.why_unsupported("lora_linear")
    assert reason is not None
    assert "LORA_INIT_CUDA=1" in reason


class OnTheHost:
    """lora_init._C's functions for operands in the host's memory, in fp16: what a kernel would find
    at the addresses that it is given. Refuses what TMA cannot address.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []

    @property
    def last(self) -> str:
        return self.calls[-1] if self.calls else ""

    def dual_project_columns(self, weight: int, ranks: int, parts: int) -> int:
        assert (weight, parts) == (2, 1)
        return 16

    def dual_project(self, **call: Any) -> None:
        assert call["count"] == 1
        assert not call["layers"]
        assert call["factors_are_half"]
        assert call["half_targets"]
        table = (ctypes.c_int64 * 24).from_address(call["table"])
        W, *strides, out, in_ = table[:5]
        weight = at(W, (out, in_), tuple(strides)).astype(np.float64)
        for side, other in ((table[8:16], weight.T), (table[16:24], weight)):
            factor, *strides, ranks, _, target, rank, stride = side
            assert ranks <= call["ranks"]
            product = at(factor, (ranks, len(other)), tuple(strides)).astype(np.float64) @ other
            scale = call["scale"] if other is not weight else 1
            at(target, product.shape, (rank, stride))[:] = scale * product
        self.calls.append("dual_project")

    def lora_linear(self, **call: Any) -> None:
        (m, n, k, r), strides = call["sizes"], call["strides"]
        assert not call["overlaps"] or self.last in ("project", "dual_project")
        flip = (lambda rows, columns: (columns, rows)) if call["transposed"] else lambda *size: size
        x = self.matrix(call["x"], (m, k), strides[0])
        R = self.matrix(call["R"], flip(n, k), strides[1])
        y = x @ (R if call["transposed"] else R.T)
        if r:
            S = self.matrix(call["S"], (m, r), strides[2])
            B = self.matrix(call["B"], flip(n, r), strides[3])
            y += S @ (B if call["transposed"] else B.T)
        if call["bias"]:
            y += self.matrix(call["bias"], (1, n), -(-n // 8) * 8)
        at(call["y"], (m, n), (strides[4], 1))[:] = y
        self.calls.append("lora_linear")

    def project(self, **call: Any) -> None:
        (m, k, r), strides = call["sizes"], call["strides"]
        assert not call["overlaps"] or self.last in ("lora_linear", "project")
        assert call["transposed_f"] or not call["transposed_x"]
        x = self.matrix(call["x"], (k, m) if call["transposed_x"] else (m, k), strides[0])
        f = self.matrix(call["f"], (k, r) if call["transposed_f"] else (r, k), strides[1])
        x, f = x.T if call["transposed_x"] else x, f if call["transposed_f"] else f.T
        at(call["c"], (m, r), strides[2:])[:] = call["scale"] * (x @ f)
        self.calls.append("project")

    @staticmethod
    def matrix(address: int, shape: tuple[int, int], pitch: int) -> np.ndarray:
        assert address % 16 == pitch % 8 == 0
        return at(address, shape, (pitch, 1)).astype(np.float64)


def at(address: int, shape: tuple[int, int], strides: tuple[int, int]) -> np.ndarray:
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    buffer = (ctypes.c_int16 * count).from_address(address)
    elements = np.frombuffer(buffer, np.float16)
    return np.lib.stride_tricks.as_strided(elements, shape, [2 * stride for stride in strides])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("r", "trained"), [(16, 16), (16, 8), (5, 5), (17, 3), (70, 65)])
@pytest.mark.parametrize("rows_first", [True, False])
def test_the_kernels_are_told_the_right_addresses_sizes_and_strides(
    monkeypatch: pytest.MonkeyPatch, r: int, trained: int, dropout_p: float, rows_first: bool
) -> None:
    module = OnTheHost()
    monkeypatch.setattr(native, "module", lambda: module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    generator = torch.Generator().manual_seed(r)

    def draw(*size: int) -> Tensor:
        stored = torch.randn(*size, generator=generator).half()
        return stored if rows_first else stored.T.contiguous().T

    x, dy, A, B = draw(33, 24), draw(33, 40), draw(r, 24), draw(40, r)
    R, bias = draw(40, 24).contiguous(), draw(2, 40)[0]
    seed = torch.tensor([7]) if dropout_p else None
    options = (seed, 1.5, dropout_p, trained)
    got, exact = [], []
    for backend_, kind, results in ((cuda, torch.half, got), (reference, torch.double, exact)):
        tensors = [t.to(kind) for t in (x, R, A, B, bias)]
        y, S = backend_.lora_linear_forward(*tensors, *options)
        x_, R_, A_, B_, _ = tensors
        gradients = backend_.lora_linear_backward(
            dy.to(kind), x_, R_, A_, B_, S, *options, (True, True, True, True)
        )
        results += [y, S, *gradients]
    for actual, truth in zip(got, exact, strict=True):
        assert actual.dtype == torch.half
        torch.testing.assert_close(actual.double(), truth, rtol=5e-3, atol=5e-2)
    # dY is read once beside its product with R, where the kernel takes the ranks.
    both = ["dual_project", "lora_linear", "project"]
    apart = ["project", "lora_linear", "project", "project"]
    assert module.calls[2:] == (both if r <= 64 else apart)


def test_backward_launches_no_more_than_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    module = OnTheHost()
    monkeypatch.setattr(native, "module", lambda: module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    x, R, A, B = (torch.zeros(*size).half() for size in ((8, 16), (24, 16), (4, 16), (24, 4)))
    dy, S = torch.zeros(8, 24).half(), torch.zeros(8, 4).half()
    for mask, calls in (
        ((True, False, False, False), ["project", "lora_linear"]),
        ((False, True, False, False), ["project", "project"]),
        ((False, False, True, False), ["project"]),
        ((False, True, True, False), ["dual_project", "project"]),
        ((False, False, False, True), []),
    ):
        module.calls.clear()
        found = cuda.lora_linear_backward(dy, x, R, A, B, S, None, 1.0, 0.0, 4, mask)
        assert module.calls == calls
        assert [t is not None for t in found] == list(mask)


# On a GPU


def operands(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, R, A, B and bias of an adapted layer; y is of size 1."""
    M, in_features, out_features, r = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to("cuda", dtype)

    return (
        draw(M, in_features),
        draw(out_features, in_features, scale=in_features**-0.5),
        draw(r, in_features, scale=in_features**-0.5),
        draw(out_features, r, scale=r**-0.5),
        draw(out_features),
    )


@pytest.fixture
def _cuda() -> Iterator[None]:
    x, R, A, B, _ = operands((8, 8, 8, 8), torch.bfloat16)
    if reason := cuda.why_unsupported("lora_linear", x, R, A, B):
        pytest.skip(reason)
    with backend("cuda"):
        yield


def poison() -> None:
    """Fill the memory that the next outputs will get with NaN."""
    torch.full((1 << 26,), torch.nan, device="cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tile", [(256, 2), (256, 1), (128, 2), (128, 1)], ids=str)
def test_the_product_with_every_tile(
    shape: tuple[int, int, int, int], dtype: torch.dtype, tile: tuple[int, int]
) -> None:
    x, R, _, B, bias = operands(shape, dtype)
    M, in_features, out_features, r = shape
    generator = torch.Generator("cuda").manual_seed(1)
    S = torch.randn(M, r, device="cuda", generator=generator).to(dtype)
    dS = torch.randn(M, r, device="cuda", generator=generator).to(dtype)
    dy = torch.randn(M, out_features, device="cuda", generator=generator).to(dtype)
    A = torch.randn(r, in_features, device="cuda", generator=generator).to(dtype)
    options = {"tile_n": tile[0], "cluster": tile[1]}
    poison()
    y = cuda._matmul(x, R, S, B, bias, **options)
    exact = x.double() @ R.double().T + S.double() @ B.double().T + bias.double()
    assert_accurate(y, exact.cpu().numpy(), exact.to(dtype), label="y")
    poison()
    dx = cuda._matmul(dy, R, dS, A, transposed=True, **options)
    exact = dy.double() @ R.double() + dS.double() @ A.double()
    assert_accurate(dx, exact.cpu().numpy(), exact.to(dtype), label="dx")


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("splits", [0, 1, 8])
def test_the_skinny_products_in_any_number_of_parts(
    shape: tuple[int, int, int, int], dtype: torch.dtype, splits: int
) -> None:
    x, _, A, B, _ = operands(shape, dtype)
    M, _, out_features, r = shape
    dy = torch.randn(M, out_features, device="cuda").to(dtype)
    S = cuda._padded_empty(x, r).normal_()
    A, B = cuda._aligned(A), cuda._aligned(B)
    both = {"transposed_x": True, "transposed_f": True}
    for label, big, f, transposed in (
        ("S", x, A, {}),
        ("dS", dy, B, {"transposed_f": True}),
        ("dB", dy, S, both),
        ("dA", x, S, both),
    ):
        exact = 0.5 * (
            (big.double().T if "transposed_x" in transposed else big.double())
            @ (f.double() if transposed else f.double().T)
        )
        # dA is (r, in).
        c = x.new_full(exact.shape[::-1] if label == "dA" else exact.shape, torch.nan)
        c = c.T if label == "dA" else c
        cuda._project(big, f, c, 0.5, splits=splits, **transposed)
        assert_accurate(c, exact.cpu().numpy(), exact.to(dtype), label=label)


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
def test_the_product_waits_for_the_low_rank_operand_that_it_overtakes() -> None:
    x, R, A, B, bias = operands((2048, 4096, 4096, 16), torch.bfloat16)
    for _ in range(20):
        S = torch.full_like(x[:, :16], torch.nan)
        cuda._project(x, A, S, 2.0)
        y = cuda._matmul(x, R, S, B, bias, overlaps=True)
        assert torch.equal(y, cuda._matmul(x, R, S, B, bias))
        x = x.roll(1, 0)


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
def test_launches_that_overlap_have_the_bits_of_launches_that_wait() -> None:
    x, R, A, B, _ = operands((2048, 4096, 4096, 16), torch.bfloat16)
    dy = torch.randn_like(x)
    both = {"transposed_x": True, "transposed_f": True}
    for _ in range(10):
        _, S = cuda.lora_linear_forward(x, R, A, B, None, None, 2.0, 0.0, 16)
        poison()
        got = cuda.lora_linear_backward(dy, x, R, A, B, S, None, 2.0, 0.0, 16, [True] * 4)
        dS, dB, dA = (torch.full_like(t, torch.nan) for t in (S, B, A))
        one = Projection(dy, B.T, S.T, dS, dB.T)
        cuda._project_both(one.form, [one], 2.0, blocks=256, least=64)
        dx = cuda._matmul(dy, R, dS, A, transposed=True)
        cuda._project(x, dS, dA.T, **both)
        for one, other in zip(got, (dx, dA, dB), strict=False):
            assert torch.equal(one, other)
        x, dy = x.roll(1, 0), dy.roll(1, 0)


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_gradients_against_fp64(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    inputs = operands(shape, dtype)
    upstream = torch.randn(shape[0], shape[2], device="cuda").to(dtype)

    def run(name: str, *tensors: Tensor) -> list[Tensor]:
        x, R, A, B, bias = tensors
        leaves = [t.detach().requires_grad_() for t in (x, A, B, bias)]
        with backend(name):
            y = lora_linear(leaves[0], R, leaves[1], leaves[2], 1.5, leaves[3])
            return [y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]

    poison()
    actual = run("cuda", *inputs)
    torch_own = run("reference", *inputs)
    exact = run("reference", *(t.double() for t in inputs))
    for label, got, own, truth in zip(
        ("y", "dx", "dA", "dB", "dbias"), actual, torch_own, exact, strict=True
    ):
        assert_accurate(got, truth.detach().cpu().numpy(), own, label=label)


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
def test_rows_apart_no_rows_and_another_stream() -> None:
    x, R, A, B, bias = operands((200, 136, 264, 17), torch.bfloat16)
    expected = lora_linear(x, R, A, B, bias=bias)
    apart = torch.cat([x, x], 1)[:, :136]
    every_second = torch.stack([x, x], -1)[..., 1]
    wide_R = torch.cat([R, R], 1)[:, :136]
    for view in (apart, every_second):
        assert torch.equal(lora_linear(view, wide_R, A, B, bias=bias), expected)
    odd_bias = torch.cat([bias[:1], bias])[1:]
    assert torch.equal(lora_linear(x, R, A, B, bias=odd_bias), expected)
    assert lora_linear(x[:0], R, A, B, bias=bias).shape == (0, 264)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        later = lora_linear(x, R, A, B, bias=bias)
    stream.synchronize()
    assert torch.equal(later, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
def test_in_a_graph() -> None:
    x, R, A, B, bias = operands((200, 136, 264, 16), torch.bfloat16)
    lora_linear(x, R, A, B, bias=bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lora_linear(x, R, A, B, bias=bias)
    x.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(y, lora_linear(x, R, A, B, bias=bias))


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
def test_what_tma_cannot_address_is_refused_with_a_reason() -> None:
    x, R, A, B, _ = operands((20, 136, 264, 16), torch.bfloat16)
    for refused, reason in (
        ((x[:, :130], R[:, :130], A[:, :130], B), "multiples of 8"),
        ((x, R.T.contiguous().T, A, B), "contiguous rows"),
        ((x.float(), R.float(), A.float(), B.float()), "float32"),
        ((x, R, A.float(), B.float()), "bfloat16, float32"),
    ):
        with pytest.raises(BackendError, match=reason):
            backends.select("lora_linear", *refused)
    with pytest.raises(ValueError, match="is not in device memory"):
        native.module().lora_linear(  # type: ignore[union-attr]
            x=x.cpu().data_ptr(),
            R=R.data_ptr(),
            S=0,
            B=0,
            bias=0,
            y=x.new_empty(20, 264).data_ptr(),
            sizes=(20, 264, 136, 0),
            strides=(136, 136, 0, 0, 264),
            bf16=True,
            transposed=False,
            device=0,
            stream=0,
        )
