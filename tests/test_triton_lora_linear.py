"""The Triton `lora_linear`: its kernels against fp64, their masks against `ops.philox`.

The functions called case_* run kernels. pytest does not collect them by that name here: one test
runs them in a process of its own under the interpreter (a process that interprets can compile
nothing), another one on a GPU.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import bench_lora_linear
from lora_init import backend, explain
from lora_init.backends import triton
from lora_init.factors import Factors
from lora_init.nn import LoRALinear, StackedLoRALinear
from lora_init.ops.philox import keep_mask, keep_rate
from lora_init.testing import assert_accurate, gaussian

pytest.importorskip("triton")
from lora_init.triton_kernels import common, lora_linear

pytestmark = pytest.mark.usefixtures("poisoned")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Of x and of A: PEFT keeps adapters in fp32 beside a base of 16 bits.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
SCALING = 1.5
LABELS = ("y", "dx", "dA", "dB", "dbias")


def test_kernels_under_the_interpreter(run_cases: Callable[..., None]) -> None:
    run_cases(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
def test_kernels_on_the_gpu(run_cases: Callable[..., None]) -> None:
    run_cases()


def test_sizes_near_each_other_share_a_bucket() -> None:
    assert triton.bucket(4000, 14336, 5120) == triton.bucket(4096, 16384, 4096)
    assert triton.bucket(100_000, 1, 3) == (8192, 1, 4)
    assert triton.bucket(0, 4096, 4096)[0] == 1
    assert triton.bucket(1, 4096, 4096) != triton.bucket(2048, 4096, 4096)


def test_the_table_of_schedules_is_that_of_the_committed_results() -> None:
    assert bench_lora_linear.committed_table() == triton.SPLIT


def test_a_bucket_is_split_where_that_won_in_all_of_its_cases() -> None:
    def row(side: str, M: int, split_ms: float, **more: object) -> dict[str, object]:
        sizes = {"M": M, "out": 4096, "in": 4096, "capability": [9, 0], "schedule": side}
        return sizes | {"fused_ms": 1.0, "split_ms": split_ms, "right": True} | more

    rows = [
        row("forward", 2048, 0.9),
        row("forward", 2048, 1.1, **{"in": 5120}),  # in the bucket of the first
        row("forward", 8192, 0.99),  # not by more than noise
        row("backward", 2048, 0.9),
        row("backward", 4096, 0.9, right=False),
        row("backward", 8192, 0.8),
    ]
    sizes = frozenset({(2048, 4096, 4096), (8192, 4096, 4096)})
    assert bench_lora_linear.table(rows) == {((9, 0), "backward"): sizes}


class Call:
    """Operands of sizes M, out, in and r, and what the kernels and torch make of them."""

    def __init__(
        self,
        sizes: tuple[int, int, int, int],
        dtypes: tuple[torch.dtype, torch.dtype],
        p: float = 0.0,
        bias: bool = False,
        start: bool = False,
        split: bool = False,
    ) -> None:
        (M, out, columns, r), (dtype, low) = sizes, dtypes

        def draw(rows: int, columns: int, std: float, seed: int, dtype: torch.dtype) -> Tensor:
            return (gaussian(rows, columns, seed=seed) * (std / 0.05)).to(DEVICE, dtype)

        self.x, self.dy = draw(M, columns, 1, 1, dtype), draw(M, out, 1, 2, dtype)
        self.R = draw(out, columns, columns**-0.5, 3, dtype)
        self.A, self.B = draw(r, columns, columns**-0.5, 4, low), draw(out, r, 0.5, 5, low)
        self.bias = draw(1, out, 1, 6, dtype)[0] if bias else None
        self.p, self.trained, self.split = p, r, split
        self.seed = torch.tensor([(7 << 40) + 9], device=DEVICE) if p else None
        if start:
            self.A = torch.cat([self.A, draw(r, columns, columns**-0.5, 7, low)])
            self.B = torch.cat([self.B, draw(out, r, 0.5, 8, low)], dim=1)

    def forward(self) -> tuple[Tensor, Tensor]:
        options = (self.seed, SCALING, self.p, self.trained)
        return lora_linear.forward(self.x, self.R, self.A, self.B, self.bias, *options, self.split)

    def backward(self, S: Tensor | None, mask: list[bool] | None = None) -> list[Tensor | None]:
        asked = mask or [True, True, True, self.bias is not None]
        options = (self.seed, SCALING, self.p, self.trained, asked, self.split and not self.p)
        return list(lora_linear.backward(self.dy, self.x, self.R, self.A, self.B, S, *options))

    def run(self) -> list[Tensor]:
        """y, dx, dA, dB and, if there is a bias, dbias."""
        y, S = self.forward()
        return [y, *(g for g in self.backward(S) if g is not None)]

    def expression(self, wide: torch.dtype | None = None) -> list[Tensor]:
        """The same by torch, in the operands' dtypes or in a wide one."""
        base, low = wide or self.x.dtype, wide or self.A.dtype
        x, R, dy = (t.to(base) for t in (self.x, self.R, self.dy))
        A, B = self.A.to(low), self.B.to(low)
        dropped, scale = x.to(low), SCALING / keep_rate(self.p)
        keep = torch.ones_like(x, dtype=torch.bool)
        if self.seed is not None:
            keep = keep_mask(self.seed, *x.shape, self.p)
            dropped = dropped.masked_fill(~keep, 0)
        S, dS = dropped @ A.T * scale, dy.to(low) @ B * scale
        y, dx = x @ R.T + (S @ B.T), dy @ R + (dS @ A).masked_fill(~keep, 0)
        gradients = [dx.to(base), (dS.T @ dropped)[: self.trained]]
        gradients.append((dy.to(low).T @ S)[:, : self.trained])
        if self.bias is not None:
            y, gradients = y + self.bias.to(base), [*gradients, dy.sum(0)]
        return [y.to(base), *gradients]

    def check(self, label: str = "") -> None:
        found, same, exact = self.run(), self.expression(), self.expression(torch.float64)
        for name, *each in zip(LABELS, found, same, exact, strict=False):
            got, expression, truth = each
            assert got.dtype == expression.dtype
            assert_accurate(got, truth.cpu().numpy(), expression, label=f"{label} {name}")


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"p": 0.3, "bias": True}, {"start": True}, {"p": 0.1, "start": True, "bias": True}],
    ids=["plain", "dropout, bias", "start", "dropout, start, bias"],
)
def case_as_accurate_as_torch(dtypes: tuple[torch.dtype, torch.dtype], options: dict) -> None:
    # No multiple of a tile, and one of which TMA can read all.
    for sizes in ((70, 150, 201, 3), (40, 64, 272, 16)):
        Call(sizes, dtypes, **options).check(str(sizes))


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (5, 1, 7, 1), (3, 40, 300, 33), (40, 70, 90, 70)], ids=str
)
@pytest.mark.parametrize("p", [0.0, 0.5])
def case_odd_sizes(sizes: tuple[int, int, int, int], p: float) -> None:
    Call(sizes, DTYPES[0], p, bias=True).check()
    Call(sizes, DTYPES[2], p, bias=True, start=True).check()


@pytest.mark.parametrize("dtypes", DTYPES[:4], ids=str)
def case_tiles_of_other_gpus(
    dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not INTERPRETED:
        pytest.skip("a GPU has its own")
    monkeypatch.setattr(common, "capability_of", lambda device: (8, 0))
    for options in ({}, {"p": 0.2, "bias": True, "start": True}):
        Call((70, 96, 201, 5), dtypes, **options).check()


def case_factors_up_to_fp32_s_largest() -> None:
    """bf16 has no number that close to it."""
    one = Call((33, 64, 272, 8), DTYPES[3])
    largest = torch.finfo(torch.float32).max
    one.A[0, :2], one.B[:2, 1] = torch.tensor([largest, -largest], device=DEVICE), largest
    one.x, one.dy = one.x * 2.0**-70, one.dy * 2.0**-70
    one.check()


@pytest.mark.parametrize("rows", [6200, 3100])
def case_tiles_of_many_rows(rows: int) -> None:
    if INTERPRETED:
        rows = 300
        tall = lora_linear._ROWS[-1]
        magnitude, lora_linear.magnitude = lora_linear.magnitude, lambda rows: tall
    try:
        for p in (0.0, 0.3):
            Call((rows, 40, 300, 4), DTYPES[2], p).check()
    finally:
        if INTERPRETED:
            lora_linear.magnitude = magnitude


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def case_one_mask_in_forward_dx_and_da(dtype: torch.dtype) -> None:
    n, p = 136, 0.4  # beyond one period of the mask's counters
    one = Call((n, n, n, n), (dtype, dtype), p)
    eye = torch.eye(n, dtype=dtype, device=DEVICE)
    one.R, one.A, one.B = torch.zeros_like(eye), eye, eye
    one.x, one.dy = torch.ones_like(eye), torch.ones_like(eye)
    keep = keep_mask(one.seed, n, n, p)
    y, S = one.forward()
    assert torch.equal(y != 0, keep)
    dx = one.backward(S)[0]
    assert torch.equal(dx != 0, keep)
    one.dy = eye
    dA = one.backward(S)[1]
    assert torch.equal(dA != 0, keep)


@pytest.mark.parametrize("start", [False, True], ids=["", "start"])
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def case_layers_stacked_on_one_input(
    dtypes: tuple[torch.dtype, torch.dtype], start: bool, launches: list[str]
) -> None:
    calls = {
        name: Call((33, out, 72, r), dtypes, bias=True)
        for name, (out, r) in {"q": (70, 3), "k": (24, 5), "v": (24, 17)}.items()
    }
    layers = {}
    for name, one in calls.items():
        base = torch.nn.Linear(72, len(one.R), dtype=dtypes[0], device=DEVICE)
        alpha = SCALING * one.trained  # of each its own rank, of all the same scaling
        layers[name] = LoRALinear(base, one.trained, alpha, dtype=dtypes[1])
        if start:
            layers[name].initialize(Factors(one.A * 0.5, one.B, SCALING), "virtual")
        with torch.no_grad():
            layers[name].A.copy_(one.A)
            layers[name].B.copy_(one.B)
            base.weight.copy_(one.R)
            base.bias.copy_(one.bias)
    x = calls["q"].x.clone().requires_grad_()
    with backend("triton"):
        outputs = StackedLoRALinear(layers)(x)
        torch.autograd.backward(outputs, [one.dy for one in calls.values()])
    assert [name for name in launches if "project" in name] == [
        *("project", "project_both", "project_columns")
    ]

    def expression(wide: torch.dtype) -> list[Tensor]:
        leaf = x.detach().to(wide).requires_grad_()
        found, sums = [], []
        for one in calls.values():
            A, B = (t.to(wide).requires_grad_() for t in (one.A, one.B))
            low = leaf @ A.T @ B.T
            if start:
                low = low - leaf @ (one.A * 0.5).to(wide).T @ one.B.to(wide).T
            y = torch.nn.functional.linear(leaf, one.R.to(wide), one.bias.to(wide)) + SCALING * low
            found += [y, *torch.autograd.grad(y, (A, B), one.dy.to(wide), retain_graph=True)]
            sums.append(torch.autograd.grad(y, leaf, one.dy.to(wide))[0])
        return [sum(sums[1:], sums[0]), *found]

    found = [x.grad]
    for y, layer in zip(outputs, layers.values(), strict=True):
        found += [y, layer.A.grad, layer.B.grad]
    for got, same, exact in zip(
        found, expression(dtypes[0]), expression(torch.float64), strict=True
    ):
        assert_accurate(got, exact.detach().cpu().numpy(), same)


@pytest.mark.parametrize("p", [0.0, 0.3])
def case_few_launches(p: float, launches: list[str]) -> None:
    one = Call((40, 70, 90, 4), DTYPES[0], p, bias=True)
    _, S = one.forward()
    assert launches == ["project", "adapted_matmul"]
    launches.clear()
    one.backward(S)
    assert launches == ["project_both", "project_columns", "adapted_matmul", "sum_gradients"]


@pytest.mark.parametrize("options", [{}, {"p": 0.3, "bias": True}, {"start": True}], ids=str)
@pytest.mark.parametrize("r", [1, 16])
def case_few_passes(options: dict, r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the products' own, x is read once forward, and dy and x once backward."""
    one = Call((1100, 600, 800, r), DTYPES[2], **options)
    sizes = {one.x.data_ptr(): (1100, 800), one.dy.data_ptr(): (1100, 600)}
    passes: list[tuple[int, int]] = []

    def counted(kernel: object, programs: int, *args: object, **options: object) -> None:
        """What is launched, without running it."""
        tensors = [arg.data_ptr() for arg in args if isinstance(arg, Tensor)]
        for size in (sizes[at] for at in tensors if at in sizes):
            tile = (options["TM"], options.get("TK") or options["TN"])
            row_tiles, column_tiles = (-(-n // t) for n, t in zip(size, tile, strict=True))
            # All ranks in one go, and no more programs than there are tiles to share.
            assert options["R"] >= (one.trained if kernel is lora_linear.project_columns else r)
            assert programs <= row_tiles * column_tiles
            passes.append(size)

    monkeypatch.setattr(lora_linear, "_matmul", lambda *args: None)
    monkeypatch.setattr(common, "launch", counted)
    _, S = one.forward()
    assert passes == [(1100, 800)]
    one.backward(S)
    assert passes[1:] == [(1100, 600), (1100, 800)]


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def case_split_into_torch_s_products(
    dtypes: tuple[torch.dtype, torch.dtype], p: float, launches: list[str]
) -> None:
    # The second has partials of dS.
    for sizes in ((70, 150, 201, 3), (33, 700, 64, 20), (0, 30, 40, 3)):
        Call(sizes, dtypes, p, bias=sizes[0] != 33, split=True).check(str(sizes))
    assert launches.count("adapted_matmul") == (2 if p else 0)  # dX, where there is a mask
    launches.clear()
    one = Call((20, 30, 40, 3), dtypes, split=True)
    _, S = one.forward()
    assert launches == ["project"]
    assert torch.equal(S, Call((20, 30, 40, 3), dtypes).forward()[1])
    launches.clear()
    (dx,) = (g for g in one.backward(None, [True, False, False, False]) if g is not None)
    assert launches == ["project_both"]
    assert torch.equal(dx, one.backward(S)[0])
    one.dy, one.x = one.dy[:1].expand(20, 30), torch.cat([one.x, one.x], 1)[:, :40]
    one.check()


@pytest.mark.parametrize("side", ["forward", "backward"])
def case_the_table_picks_the_schedule(
    side: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capability = common.capability_of(torch.device(DEVICE))
    one = Call((33, 40, 64, 4), DTYPES[2])
    arguments = (one.x, one.R, one.A, one.B)

    def launched(trained: int = 4, seed: Tensor | None = None) -> list[bool]:
        """Whether the product is torch's, forward and backward."""
        found = []
        options = (seed, SCALING, 0.3 if seed is not None else 0.0, trained)
        launches.clear()
        _, S = triton.lora_linear_forward(*arguments, None, *options)
        found.append("adapted_matmul" not in launches)
        launches.clear()
        triton.lora_linear_backward(one.dy, *arguments, S, *options, [True] * 4)
        return [*found, "adapted_matmul" not in launches]

    def explained() -> str:
        with backend("triton"):
            return explain("lora_linear", *arguments)

    assert launched() == [False, False]
    why = "forward and backward fused: no committed result shows matmul and addmm_ faster on this"
    assert why in explained()
    sizes = frozenset({triton.bucket(33, 40, 64)})
    monkeypatch.setattr(triton, "SPLIT", {(capability, side): sizes})
    assert launched() == [side == "forward", side == "backward"]
    assert f"{side} split into matmul and addmm_: measured faster at these sizes" in explained()
    seed = torch.tensor([5], device=DEVICE)
    assert launched(seed=seed) == [side == "forward", False]
    assert launched(trained=2) == [False, False]  # the halves have to cancel
    monkeypatch.setattr(triton, "SPLIT", {(capability, side): frozenset({(4096, 64, 64)})})
    assert launched() == [False, False]
    assert "faster at these sizes on this GPU" in explained()


@pytest.mark.parametrize("asked", [1, 2, 4, 5, 8, 10, 14])
def case_only_what_is_asked_for(asked: int, launches: list[str]) -> None:
    one = Call((20, 30, 40, 3), DTYPES[0], bias=True)
    _, S = one.forward()
    whole = one.backward(S)
    mask = [bool(asked >> i & 1) for i in range(4)]
    launches.clear()
    some = one.backward(S if mask[2] else None, mask)
    for wanted, got, expected in zip(mask, some, whole, strict=True):
        assert (got is not None) == wanted
        assert got is None or torch.equal(got, expected)
    assert ("adapted_matmul" in launches) == mask[0]
    assert ("project_columns" in launches) == mask[1]


@pytest.mark.parametrize("p", [0.0, 0.3])
def case_same_bits_again(p: float) -> None:
    one = Call((150, 64, 272, 4), DTYPES[2], p, bias=True)
    for first, second in zip(one.run(), one.run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def case_a_start_adds_nothing(dtypes: tuple[torch.dtype, torch.dtype], p: float) -> None:
    one = Call((33, 64, 272, 8), dtypes, p, start=True)
    one.A = torch.cat([one.A[:8], one.A[:8]])
    one.B = torch.cat([one.B[:, :8], -one.B[:, :8]], dim=1)
    y, S = one.forward()
    dx = one.backward(S)[0]
    one.B = torch.zeros_like(one.B)
    frozen, S = one.forward()
    for got, expected in ((y, frozen), (dx, one.backward(S)[0])):
        if INTERPRETED and torch.float32 in dtypes:
            # numpy's product of equal fp32 rows need not be equal: it depends on where they are.
            torch.testing.assert_close(got, expected)
        else:
            assert torch.equal(got, expected)


def case_no_rows() -> None:
    one = Call((0, 30, 40, 3), DTYPES[0], bias=True)
    y, *gradients = one.run()
    assert y.shape == (0, 30)
    assert gradients[0].shape == (0, 40)
    assert all(bool((g == 0).all()) for g in gradients[1:])


def case_any_strides() -> None:
    one = Call((33, 40, 64, 3), DTYPES[2], 0.3, bias=True)
    expected = one.run()
    one.x = torch.cat([one.x, one.x], 1)[:, :64]
    one.dy = one.dy.T.contiguous().T
    one.R = torch.stack([one.R, one.R], -1)[..., 1]
    assert one.bias is not None
    one.bias = torch.stack([one.bias, one.bias], -1)[..., 1]
    one.A, one.B = one.A.T.contiguous().T, one.B.T.contiguous().T
    for got, wanted in zip(one.run(), expected, strict=True):
        assert_accurate(got, wanted.double().cpu().numpy(), wanted)
    one.dy = one.dy[:1].expand(33, 40)
    one.check()
