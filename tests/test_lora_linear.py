"""`lora_linear` against fp64 autograd, PEFT and finite differences, and the mask against Philox."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lora_init import LoraInitError, backend, backends
from lora_init.backends import reference
from lora_init.ops.lora_linear import lora_linear
from lora_init.ops.philox import keep_mask, keep_rate, philox4x32, threshold

fp64, fp32, fp16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SCALING = 0.75


def make(
    shape: tuple[int, ...] = (6, 12),
    out: int = 10,
    r: int = 4,
    dtype: torch.dtype = fp32,
    adapter_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, R, A, B, bias with entries that keep y near 1; all but R require gradients."""
    g = torch.Generator().manual_seed(0)

    def normal(*size: int, std: float) -> Tensor:
        return torch.randn(*size, generator=g, dtype=fp64) * std

    columns = shape[-1]
    low = adapter_dtype or dtype
    x, R = normal(*shape, std=1).to(dtype), normal(out, columns, std=columns**-0.5).to(dtype)
    A, B = normal(r, columns, std=columns**-0.5).to(low), normal(out, r, std=r**-0.5).to(low)
    bias = normal(out, std=1).to(dtype)
    for tensor in (x, A, B, bias):
        tensor.requires_grad_()
    return x, R, A, B, bias


def plain(
    x: Tensor, R: Tensor, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    """What PEFT does, in the tensors' own dtypes."""
    y = linear(x, R, bias)
    return (y + linear(linear(x.to(A.dtype), A), B) * scaling).to(y.dtype)


def run(f: Callable[..., Tensor], *tensors: Tensor | None) -> list[Tensor]:
    """y and the gradients of x, A, B, bias under one fixed upstream gradient, as fp64."""
    x, R, A, B, bias = tensors
    leaves = [t for t in (x, A, B, bias) if t is not None and t.requires_grad]
    y = f(x, R, A, B, SCALING, bias)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=fp64)
    gradients = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves]
    return [t.detach().to(fp64) for t in (y, *gradients)]


def in_fp64(*tensors: Tensor | None) -> list[Tensor | None]:
    return [
        None if t is None else t.detach().to(fp64).requires_grad_(t.requires_grad) for t in tensors
    ]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "out", "r"),
    [
        pytest.param((12,), 10, 4, id="1d"),
        pytest.param((6, 12), 10, 4, id="2d"),
        pytest.param((2, 1, 5, 12), 10, 4, id="4d"),
        pytest.param((0, 12), 10, 4, id="no rows"),
        pytest.param((3, 0, 12), 10, 4, id="no rows 3d"),
        pytest.param((1, 1), 1, 1, id="all ones"),
        pytest.param((5, 13), 7, 1, id="r 1, odd"),
        pytest.param((5, 33), 65, 3, id="r 3, odd"),
        pytest.param((129, 64), 32, 8, id="r 8"),
        pytest.param((31, 127), 63, 17, id="r 17, odd"),
        pytest.param((9, 40), 24, 100, id="r above in and out"),
    ],
)
def test_shapes(shape: tuple[int, ...], out: int, r: int) -> None:
    tensors = make(shape, out, r)
    assert lora_linear(*tensors[:4]).shape == (*shape[:-1], out)
    assert_close(run(lora_linear, *tensors), run(plain, *in_fp64(*tensors)))


@pytest.mark.parametrize("strided", ["x", "x 3d", "R", "A", "B"])
def test_strides(strided: str) -> None:
    x, R, A, B, bias = make((3, 4, 12) if strided == "x 3d" else (6, 12))
    leaf = {"x": x, "x 3d": x, "R": R, "A": A, "B": B}[strided].detach()
    view = leaf.clone().transpose(-2, -1).contiguous().transpose(-2, -1)
    if strided == "x 3d":
        view = torch.stack([leaf, leaf], dim=-1)[..., 0]
    assert not view.is_contiguous()
    assert torch.equal(view, leaf)
    view.requires_grad_(strided != "R")
    replaced = {"x": (view, R, A, B), "x 3d": (view, R, A, B), "R": (x, view, A, B)}
    replaced |= {"A": (x, R, view, B), "B": (x, R, A, view)}
    want = run(plain, *in_fp64(x, R, A, B, bias))
    assert_close(run(lora_linear, *replaced[strided], bias), want)


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(fp32, fp32), (fp16, fp16), (bf16, bf16), (bf16, fp32), (fp16, fp32)],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_error_is_at_most_twice_that_of_the_plain_expression(
    dtype: torch.dtype, adapter_dtype: torch.dtype, bias: bool
) -> None:
    tensors: list[Tensor | None] = [*make((40, 300), 200, 8, dtype, adapter_dtype)]
    if not bias:
        tensors[-1] = None
    exact = run(plain, *in_fp64(*tensors))
    for got, same, truth in zip(
        run(lora_linear, *tensors), run(plain, *tensors), exact, strict=True
    ):
        assert (got - truth).norm() <= 2 * (same - truth).norm()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(bias: bool, dropout_p: float) -> None:
    x, R, A, B, b = make((3, 5), 4, 2, fp64)

    def seeded(*leaves: Tensor) -> Tensor:
        torch.manual_seed(0)
        return lora_linear(leaves[0], R, *leaves[1:3], SCALING, *leaves[3:], dropout_p=dropout_p)

    assert torch.autograd.gradcheck(seeded, (x, A, B, b) if bias else (x, A, B))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(fp32, fp32), (bf16, bf16), (bf16, fp32)], ids=str
)
def test_peft_layer(dtype: torch.dtype, adapter_dtype: torch.dtype, autocast: bool) -> None:
    peft = pytest.importorskip("peft")
    x, R, A, B, bias = make((2, 7, 24), 20, 4, dtype, adapter_dtype)
    model = torch.nn.Sequential(torch.nn.Linear(24, 20, dtype=dtype))
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["0"])  # scaling 3/4
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    a.weight, b.weight = torch.nn.Parameter(A.detach()), torch.nn.Parameter(B.detach())
    with torch.no_grad():
        layer.base_layer.weight.copy_(R)
        layer.base_layer.bias.copy_(bias)

    def peft_forward(x: Tensor, *_: object) -> Tensor:
        return layer(x)

    with torch.autocast("cpu", dtype=bf16, enabled=autocast):
        assert lora_linear(x, R, A, B, SCALING, bias).dtype == layer(x).dtype
        got = run(lora_linear, x, R, A, B, bias.detach())
        want = run(peft_forward, x, R, a.weight, b.weight, None)
    tolerance = 1e-6 if (dtype, autocast) == (fp32, False) else 1e-2
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_autocast_leaves_fp64_alone() -> None:
    tensors = make(dtype=fp64)
    with torch.autocast("cpu", dtype=bf16):
        got = run(lora_linear, *tensors)
    assert_close(got, run(plain, *tensors), 1e-12)


def test_backward_inside_autocast_keeps_its_precision() -> None:
    tensors = make()
    y = lora_linear(*tensors[:4], SCALING)
    with torch.autocast("cpu", dtype=bf16):
        (got,) = torch.autograd.grad(y.sum(), tensors[2])
    (want,) = torch.autograd.grad(plain(*tensors[:4], SCALING, None).sum(), tensors[2])
    torch.testing.assert_close(got, want)


def test_every_backend_names_the_op() -> None:
    assert backends.select("lora_linear", *make()[:4]).NAME in backends.available()


# What is computed, and when


class Recorder:
    """A backend that notes what it is asked for and passes everything on to the reference."""

    NAME = "recorder"
    lora_linear_forward = staticmethod(reference.lora_linear_forward)

    def __init__(self) -> None:
        self.calls: list[tuple[bool, ...]] = []

    def why_unsupported(self, op: str, *args: object) -> str | None:
        return None

    def lora_linear_backward(self, *args: object) -> object:
        _, x, _, _, _, S, *_, mask = args
        self.calls.append((*mask, x is not None, S is not None))
        return reference.lora_linear_backward(*args)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    known = {recorder.NAME: recorder, **backends.available()}  # the first choice first
    monkeypatch.setattr(backends, "available", lambda: known)
    return recorder


def test_backward_uses_the_backend_of_the_forward(recorder: Recorder) -> None:
    with backend("recorder"):
        y = lora_linear(*make()[:4])
    with backend("reference"):
        y.sum().backward()
    assert len(recorder.calls) == 1


def test_no_grad_records_nothing() -> None:
    tensors = make()[:4]
    with torch.no_grad():
        y = lora_linear(*tensors)
    assert not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(lora_linear(*tensors), y)


def test_retained_graph_gives_the_same_gradients_twice() -> None:
    x, R, A, B, bias = make()
    y = lora_linear(x, R, A, B, SCALING, bias, dropout_p=0.2)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, (x, A, B, bias), dy, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, (x, A, B, bias), dy)))


def test_layer_used_twice_in_one_graph() -> None:
    tensors = make((6, 12), out=12)

    def twice(x: Tensor, *rest: Tensor) -> Tensor:
        return lora_linear(torch.tanh(lora_linear(x, *rest)), *rest)

    def plain_twice(x: Tensor, *rest: Tensor) -> Tensor:
        return plain(torch.tanh(plain(x, *rest)), *rest)

    assert_close(run(twice, *tensors), run(plain_twice, *in_fp64(*tensors)))


def test_output_may_be_changed_in_place_and_input_may_not() -> None:
    x, R, A, B, _ = make()
    y = lora_linear(x[None], R, A, B)
    y.mul_(2)
    y.sum().backward()
    early = x.detach().clone()
    y = lora_linear(early, R, A, B)
    early.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpoint_replays_the_mask(reentrant: bool) -> None:
    tensors = make()

    def dropped(*arguments: Tensor) -> Tensor:
        return lora_linear(*arguments, dropout_p=0.5)

    def checkpointed(*arguments: Tensor) -> Tensor:
        return checkpoint(dropped, *arguments, use_reentrant=reentrant)

    results = []
    for f in (dropped, checkpointed):
        torch.manual_seed(3)
        x, R, A, B, bias = tensors
        y = f(x, R, A, B, SCALING, bias)
        torch.rand(5)  # the generator moves on between forward and replay
        for leaf in (x, A, B, bias):
            leaf.grad = None
        y.square().sum().backward()  # torch.autograd.grad does not work with reentrant
        results.append([y.detach(), *(leaf.grad for leaf in (x, A, B, bias))])
    assert all(map(torch.equal, *results))


def test_second_derivatives_are_refused() -> None:
    x, R, A, B, _ = make()
    y = lora_linear(x, R, A, B)
    with pytest.raises(LoraInitError, match=r"differentiated once only: .* create_graph=True"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


# torch.library and torch.compile


@pytest.mark.parametrize("shape", [(6, 12), (2, 3, 12), (12,), (0, 12)], ids=str)
@pytest.mark.parametrize(("dtype", "low"), [(fp32, fp32), (bf16, fp32)], ids=str)
@pytest.mark.parametrize("seed", [None, torch.tensor([7])], ids=["", "dropout"])
def test_opcheck(
    shape: tuple[int, ...], dtype: torch.dtype, low: torch.dtype, seed: Tensor | None
) -> None:
    ops = torch.ops.lora_init
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if shape == (2, 3, 12):
        checks.append("test_aot_dispatch_dynamic")
    x, R, A, B, bias = (t.detach() for t in make(shape, dtype=dtype, adapter_dtype=low))
    options = (seed, SCALING, 0.0 if seed is None else 0.4, A.shape[0])
    torch.library.opcheck(
        ops.lora_linear_forward, (x, R, A, B, bias, *options), {"backend": ""}, test_utils=checks
    )
    y, S = ops.lora_linear_forward(x, R, A, B, bias, *options, backend="")
    for mask, kept in (([True] * 4, (x, S)), ([True, False, False, False], (None, None))):
        torch.library.opcheck(
            ops.lora_linear_backward,
            (y, kept[0], R, A, B, kept[1], *options),
            {"output_mask": mask, "backend": "reference"},
            test_utils=checks,
        )


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_compile(dropout_p: float) -> None:
    tensors = make((2, 3, 12))

    def f(*arguments: Tensor) -> Tensor:
        return torch.relu(lora_linear(*arguments, dropout_p=dropout_p)) * 2

    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(5)
        results.append(run(g, *tensors))
    assert_close(*results, tolerance=1e-6)


def test_compile_with_dynamic_rows_does_not_recompile() -> None:
    graphs = []

    def count(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(module)
        return module.forward

    f = torch.compile(lora_linear, fullgraph=True, dynamic=True, backend=count)
    for rows in (5, 8, 13):
        tensors = make((2, rows, 12))[:4]
        assert_close([f(*tensors)], [lora_linear(*tensors)])
    assert len(graphs) == 1
    for scaling in (1.5, 0.5):  # a number that changes becomes symbolic
        assert_close([f(*tensors, scaling)], [lora_linear(*tensors, scaling)])


def test_compile_under_autocast_no_grad_and_frozen_x() -> None:
    x, R, A, B, bias = make()
    f = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=bf16):
        assert_close(
            run(f, x.detach(), R, A, B, bias), run(lora_linear, x.detach(), R, A, B, bias), 1e-6
        )
    with torch.no_grad():
        assert_close([f(x, R, A, B)], [lora_linear(x, R, A, B)])


def test_compiled_code_asks_the_policy_when_it_runs(recorder: Recorder) -> None:
    tensors = make()[:4]
    f = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    f(*tensors).sum().backward()
    assert len(recorder.calls) == 1
    with backend("reference"):
        f(*tensors).sum().backward()
    assert len(recorder.calls) == 1


def test_compile_with_checkpoint_replays_the_mask() -> None:
    tensors = make()

    def f(*arguments: Tensor) -> Tensor:
        return checkpoint(lora_linear, *arguments, 0.4, use_reentrant=False)

    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(5)
        results.append(run(g, *tensors))
    assert_close(*results, tolerance=1e-6)


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    tensors = make((2, 3, 12))
    f = torch.compile(lora_linear, fullgraph=True)
    assert_close(run(f, *tensors), run(lora_linear, *tensors))
    x, R, A, B, _ = tensors
    y = f(x, R, A, B, SCALING, None, 0.5)
    dy = torch.randn_like(y)
    dx, dB = torch.autograd.grad(y, (x, B), dy)
    # Inductor draws other seeds than eager, so find this one's mask from y: it must be that of dx.
    S = torch.linalg.lstsq(B, (y - linear(x, R)).reshape(-1, 10).T).solution.T
    torch.testing.assert_close(dB, dy.reshape(-1, 10).T @ S, rtol=1e-3, atol=1e-3)
    dropped = (dx - dy @ R).abs().reshape(-1, 12) < 1e-6
    masked = x.reshape(-1, 12).masked_fill(dropped, 0) * 2
    torch.testing.assert_close(masked @ A.T * SCALING, S, rtol=1e-3, atol=1e-3)


# A virtual start


def a_start(A: Tensor, B: Tensor, r: int | None = None) -> tuple[Tensor, Tensor]:
    """Another pair of factors with A's and B's dtypes and sizes, of rank r."""
    r = r or A.shape[0]
    wave = torch.arange(r * (A.shape[1] + B.shape[0]), dtype=fp64).cos()
    A0, B0 = wave[: r * A.shape[1]].view(r, -1), wave[r * A.shape[1] :].view(-1, r)
    return (A0 * A.shape[1] ** -0.5).to(A.dtype), (B0 * r**-0.5).to(B.dtype)


def started(
    x: Tensor,
    R: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float = SCALING,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    return lora_linear(x, R, A, B, scaling, bias, dropout_p, start=a_start(A, B))


def plain_started(
    x: Tensor, R: Tensor, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    A0, B0 = a_start(A, B)
    y, low = linear(x, R, bias), x.to(A.dtype)
    return (y + (linear(linear(low, A), B) - linear(linear(low, A0), B0)) * scaling).to(y.dtype)


@pytest.mark.parametrize(
    "shape", [(12,), (6, 12), (2, 1, 5, 12), (0, 12), (1, 1), (9, 33)], ids=str
)
@pytest.mark.parametrize("r", [1, 3, 16])
def test_start_shapes(shape: tuple[int, ...], r: int) -> None:
    tensors = make(shape, r=r)
    assert_close(run(started, *tensors), run(plain_started, *in_fp64(*tensors)))


def test_start_of_another_rank() -> None:
    x, R, A, B, bias = make(dtype=fp64)
    A0, B0 = a_start(A, B, 7)
    y = lora_linear(x, R, A, B, SCALING, bias, start=(A0, B0))
    torch.testing.assert_close(y, plain(x, R, A, B, SCALING, bias) - x @ A0.T @ B0.T * SCALING)


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(fp32, fp32), (fp16, fp16), (bf16, bf16), (bf16, fp32), (fp64, fp64)],
    ids=str,
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("r", [1, 5, 16])
def test_start_is_the_frozen_layer_bit_for_bit(
    dtype: torch.dtype, adapter_dtype: torch.dtype, dropout_p: float, r: int
) -> None:
    x, R, A, B, bias = make((37, 130), 70, r, dtype, adapter_dtype)
    for b in (None, bias):
        y = lora_linear(x, R, A, B, 2.0, b, dropout_p, start=(A.detach(), B.detach()))
        assert torch.equal(y, linear(x, R, b))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx, torch.ones_like(y) @ R)


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(fp32, fp32), (fp16, fp16), (bf16, bf16), (bf16, fp32)], ids=str
)
def test_start_error_is_at_most_twice_that_of_the_plain_expression(
    dtype: torch.dtype, adapter_dtype: torch.dtype
) -> None:
    tensors = make((40, 300), 200, 8, dtype, adapter_dtype)
    start = a_start(*tensors[2:4])

    def exactly(x: Tensor, R: Tensor, A: Tensor, B: Tensor, s: float, bias: Tensor) -> Tensor:
        A0, B0 = (t.to(fp64) for t in start)  # rounded as they are, unlike a_start of fp64 factors
        return plain(x, R, A, B, s, bias) - linear(linear(x, A0), B0) * s

    exact = run(exactly, *in_fp64(*tensors))
    for got, same, truth in zip(
        run(started, *tensors), run(plain_started, *tensors), exact, strict=True
    ):
        assert (got - truth).norm() <= 2 * (same - truth).norm()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_start_gradcheck(dropout_p: float) -> None:
    x, R, A, B, bias = make((3, 5), 4, 2, fp64)
    start = a_start(A, B, 3)

    def seeded(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(0)
        return lora_linear(x, R, A, B, SCALING, bias, dropout_p, start=start)

    assert torch.autograd.gradcheck(seeded, (x, A, B, bias))


@pytest.mark.parametrize(
    ("op", "expression"), [(lora_linear, plain), (started, plain_started)], ids=["", "start"]
)
@pytest.mark.parametrize(
    ("needed", "call"),
    [
        # dx, dA, dB, dbias, and whether x and S were kept for them
        pytest.param("xABb", (True, True, True, True, True, True), id="all"),
        pytest.param("AB", (False, True, True, False, True, True), id="frozen x"),
        pytest.param("xB", (True, False, True, False, False, True), id="frozen A"),
        pytest.param("xA", (True, True, False, False, True, False), id="frozen B"),
        pytest.param("x", (True, False, False, False, False, False), id="x only"),
        pytest.param("b", (False, False, False, True, False, False), id="bias only"),
    ],
)
def test_only_what_is_needed_is_computed(
    op: Callable[..., Tensor],
    expression: Callable[..., Tensor],
    needed: str,
    call: tuple[bool, ...],
    recorder: Recorder,
) -> None:
    x, R, A, B, bias = make()
    for name, tensor in {"x": x, "A": A, "B": B, "b": bias}.items():
        tensor.requires_grad_(name in needed)
    with backend("recorder"):
        got = run(op, x, R, A, B, bias)
    assert recorder.calls == [call]
    assert_close(got, run(expression, x, R, A, B, bias))


def test_start_under_autocast_and_no_grad() -> None:
    tensors = make()
    with torch.autocast("cpu", dtype=bf16):
        got = run(started, *tensors)
    for a, b in zip(got, run(plain_started, *tensors), strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()
    with torch.no_grad():
        assert not started(*tensors[:4]).requires_grad


def test_start_twice_in_one_graph_and_a_retained_graph() -> None:
    tensors = make((6, 12), out=12)

    def twice(x: Tensor, *rest: Tensor) -> Tensor:
        return started(torch.tanh(started(x, *rest)), *rest)

    def plain_twice(x: Tensor, *rest: Tensor) -> Tensor:
        return plain_started(torch.tanh(plain_started(x, *rest)), *rest)

    assert_close(run(twice, *tensors), run(plain_twice, *in_fp64(*tensors)))
    x, _, A, B, bias = tensors
    y = twice(*tensors[:4], SCALING, bias)
    first = torch.autograd.grad(y.sum(), (x, A, B, bias), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y.sum(), (x, A, B, bias))))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_start_compiled_and_checkpointed(dropout_p: float) -> None:
    tensors = make((2, 3, 12))

    def f(*arguments: Tensor) -> Tensor:
        return torch.tanh(started(*arguments, dropout_p=dropout_p)) * 2

    def checkpointed(*arguments: Tensor) -> Tensor:
        return checkpoint(f, *arguments, use_reentrant=False)

    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager"), checkpointed):
        torch.manual_seed(5)
        results.append(run(g, *tensors))
    assert_close(results[1], results[0], tolerance=1e-6)
    assert all(map(torch.equal, results[2], results[0]))


@pytest.mark.parametrize("shape", [(6, 12), (2, 3, 12), (0, 12)], ids=str)
@pytest.mark.parametrize(("dtype", "low"), [(fp32, fp32), (bf16, fp32)], ids=str)
@pytest.mark.parametrize("seed", [None, torch.tensor([7])], ids=["", "dropout"])
def test_start_opcheck(
    shape: tuple[int, ...], dtype: torch.dtype, low: torch.dtype, seed: Tensor | None
) -> None:
    ops = torch.ops.lora_init
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    x, R, A, B, bias = (t.detach() for t in make(shape, dtype=dtype, adapter_dtype=low))
    options = (seed, SCALING, 0.0 if seed is None else 0.4, 3)
    y, S = ops.lora_linear_forward(x, R, A, B, bias, *options, backend="")
    assert S.shape == (x[..., 0].numel(), 4)
    torch.library.opcheck(
        ops.lora_linear_forward, (x, R, A, B, bias, *options), {"backend": ""}, test_utils=checks
    )
    torch.library.opcheck(
        ops.lora_linear_backward,
        (y, x, R, A, B, S, *options),
        {"output_mask": [True] * 4, "backend": "reference"},
        test_utils=checks,
    )
    _, dA, dB, _ = ops.lora_linear_backward(
        y, x, R, A, B, S, *options, output_mask=[True] * 4, backend=""
    )
    assert (dA.shape, dB.shape) == ((3, 12), (10, 3))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            (torch.zeros(12, 4), torch.zeros(10, 4)),
            r"A0 \(r0, 12\) and B0 \(10, r0\), got \(12, 4\)",
        ),
        ((torch.zeros(4, 12), torch.zeros(10, 5)), r"got \(4, 12\) and \(10, 5\)"),
        ((torch.zeros(12), torch.zeros(10)), r"got \(12,\) and \(10,\)"),
        ((torch.zeros(4, 12).half(), torch.zeros(10, 4)), "A's dtype and device, .*32 on cpu, got"),
        ((torch.zeros(4, 12, device="meta"), torch.zeros(10, 4)), "on meta and .* on cpu: cast or"),
        ((torch.nn.Parameter(torch.zeros(4, 12)), torch.zeros(10, 4)), "freeze it with A0"),
    ],
    ids=["transposed", "ranks", "vectors", "dtype", "device", "trained"],
)
def test_start_errors(start: tuple[Tensor, Tensor], message: str) -> None:
    with pytest.raises(LoraInitError, match=message):
        lora_linear(*make()[:4], start=start)


# Dropout


def words(text: str) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        pytest.param(
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
            id="zeros",
        ),
        pytest.param(
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
            id="ones",
        ),
        pytest.param(
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
            id="pi",
        ),
    ],
)
def test_philox_known_answers(counter: str, key: str, output: str) -> None:
    """The vectors published with Random123 (kat_vectors, philox4x32 10)."""
    assert philox4x32(words(counter), words(key)) == words(output)


def sixteen_bits(seed: int, row: int, column: int) -> int:
    """What decides on an element, as `ops.philox` words it, in Python integers."""
    c = [column // 128 * 32 + column % 32, row // 16 * 8 + row % 8, 0, 0]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[column // 32 % 4] >> 16 * (row // 8 % 2) & 0xFFFF


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 2])
def test_mask_is_that_of_its_definition(seed: int) -> None:
    rows, columns = (0, 1, 7, 8, 15, 16, 99), (0, 1, 31, 32, 127, 128, 399)
    mask = keep_mask(torch.tensor([seed]), 100, 400, 0.3)
    for row, column in itertools.product(rows, columns):
        assert mask[row, column] == (sixteen_bits(seed, row, column) >= threshold(0.3))


def test_mask_depends_on_seed_and_place_alone() -> None:
    seed = torch.tensor([11])
    mask = keep_mask(seed, 70, 1000, 0.7)
    assert torch.equal(mask[:33, :100], keep_mask(seed, 33, 100, 0.7))
    assert torch.equal(mask[0], keep_mask(seed, 1, 1000, 0.7)[0])
    assert not torch.equal(mask, keep_mask(seed + 1, 70, 1000, 0.7))
    assert keep_mask(seed, 0, 5, 0.5).shape == (0, 5)


def test_mask_at_the_ends_of_p() -> None:
    seed = torch.tensor([5])
    assert keep_mask(seed, 300, 300, 1e-9).all()
    assert keep_rate(1e-9) == keep_rate(0) == 1
    assert keep_rate(0.1) == pytest.approx(0.9, abs=1e-5)
    assert keep_rate(1 - 1e-9) == 2**-16  # nothing is divided by 0


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_mask_rate_and_independence(p: float) -> None:
    mask = keep_mask(torch.tensor([2024]), 400, 500, p).to(fp64)
    deviation = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 4 * deviation / mask.numel() ** 0.5
    z = (mask - (1 - p)) / deviation
    # Neighbouring rows and columns, and those that share a call of Philox.
    pairs = [z[n:] * z[:-n] for n in (1, 8)] + [z[:, n:] * z[:, :-n] for n in (1, 32, 64, 96)]
    for shifted in pairs:
        assert abs(shifted.mean()) < 4 / shifted.numel() ** 0.5
    rows, columns = z.sum(1) / 500**0.5, z.sum(0) / 400**0.5  # standard normal if independent
    assert abs(rows.var() - 1) < 0.4
    assert abs(columns.var() - 1) < 0.4


def test_one_mask_in_forward_dx_and_dA() -> None:
    """With A, B = 1 and R = 0 each of the three shows the mask it used."""
    rows, columns, p = 6, 9, 0.4
    torch.manual_seed(8)
    x = (2.0 ** torch.arange(columns)).repeat(rows, 1).to(fp64).requires_grad_()
    R, A = torch.zeros(1, columns, dtype=fp64), torch.ones(1, columns, dtype=fp64)
    A.requires_grad_()
    y = lora_linear(x, R, A, torch.ones(1, 1, dtype=fp64), keep_rate(p), dropout_p=p)  # cancels
    forward = (y.detach().round().long() >> torch.arange(columns)) & 1  # x holds powers of two
    weights = 2.0 ** torch.arange(rows, dtype=fp64)  # and so does dy
    dx, dA = torch.autograd.grad(y, (x, A), weights[:, None])
    in_dx = (dx / weights[:, None]).round().long()
    in_dA = ((dA[0] / x[0].detach()).round().long()[None] >> torch.arange(rows)[:, None]) & 1
    torch.manual_seed(8)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
    mask = keep_mask(seed, rows, columns, p).long()
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(forward, mask)
    assert torch.equal(in_dx, mask)
    assert torch.equal(in_dA, mask)


def test_dropout_matches_the_masked_expression() -> None:
    tensors, p = make((2, 3, 12)), 0.4
    torch.manual_seed(8)
    got = run(lambda *t: lora_linear(*t, dropout_p=p), *tensors)
    torch.manual_seed(8)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
    mask = keep_mask(seed, 6, 12, p).view(2, 3, 12) / keep_rate(p)

    def masked(x: Tensor, R: Tensor, A: Tensor, B: Tensor, s: float, bias: Tensor) -> Tensor:
        return linear(x, R, bias) + s * linear(linear(x * mask, A), B)

    assert_close(got, run(masked, *in_fp64(*tensors)))


def test_dropout_mean_over_seeds_is_the_result_without() -> None:
    tensors = [t.detach() for t in make((4, 12), dtype=fp64)]
    torch.manual_seed(0)
    draws = torch.stack([lora_linear(*tensors[:4], dropout_p=0.3) for _ in range(400)])
    error = draws.mean(0) - lora_linear(*tensors[:4])
    assert (error.abs() < 5 * draws.std(0) / 400**0.5).all()


def test_no_dropout_leaves_the_generator_alone() -> None:
    tensors = make()[:4]
    before = torch.get_rng_state()
    lora_linear(*tensors)
    assert torch.equal(torch.get_rng_state(), before)
    lora_linear(*tensors, dropout_p=0.1)
    assert not torch.equal(torch.get_rng_state(), before)


# Errors

ZERO = torch.zeros(10, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"R": torch.nn.Parameter(ZERO)}, r"freeze it with R\.requires_grad_\(False\)"),
        ({"R": torch.zeros(10)}, r"R must be \(out, in\), neither 0, got \(10,\)"),
        ({"R": torch.zeros(0, 12)}, r"neither 0, got \(0, 12\)"),
        ({"x": torch.zeros(6, 10)}, r"x must be \(\.\.\., 12\).*got \(6, 10\): transpose R"),
        ({"x": torch.zeros(())}, r"x must be \(\.\.\., 12\).*got \(\)"),
        ({"A": torch.zeros(12, 4)}, r"A must be \(r, 12\).*got \(12, 4\): transpose it"),
        ({"A": torch.zeros(0, 12)}, r"A must be \(r, 12\) with r ≥ 1, got \(0, 12\)"),
        ({"B": torch.zeros(4, 10)}, r"B must be .* \(10, 4\), got \(4, 10\): transpose it"),
        ({"B": torch.zeros(10, 5)}, r"B must be \(out, r\) = \(10, 4\), got \(10, 5\)"),
        ({"bias": torch.zeros(10, 1)}, r"bias must be .* \(10,\), got \(10, 1\)"),
        ({"B": torch.zeros(10, 4, dtype=bf16)}, "A and B .*32 and .*bfloat16: cast one"),
        ({"x": torch.zeros(6, 12, dtype=bf16)}, "x and R .*bfloat16 and .*32: cast one"),
        ({"bias": torch.zeros(10, dtype=bf16)}, "x and bias .*32 and .*bfloat16"),
        ({"x": torch.zeros(6, 12).int(), "R": ZERO.int()}, "x and R .*int32"),
        ({"A": torch.zeros(4, 12, device="meta")}, "A is on meta, x on cpu: move one"),
        ({"scaling": float("nan")}, "scaling must be a finite number, .* nan"),
        ({"scaling": torch.ones(10)}, r"finite number, got tensor\(\["),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1\.0"),
        ({"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\), got -0\.1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors(change: dict[str, object], message: str) -> None:
    x, R, A, B, bias = make()
    with pytest.raises(LoraInitError, match=message):
        lora_linear(**{"x": x, "R": R, "A": A, "B": B, "bias": bias, **change})


def test_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_INIT_BACKEND", "abacus")
    with pytest.raises(LoraInitError, match="unknown backend 'abacus'"):
        lora_linear(*make()[:4])


def test_meta_tensors_give_shapes() -> None:
    x, R, A, B, bias = (t.detach().to("meta") for t in make((2, 3, 12)))
    y = lora_linear(x, R, A, B, bias=bias, dropout_p=0.5)
    assert (y.shape, y.device.type) == ((2, 3, 10), "meta")
