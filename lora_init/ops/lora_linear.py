"""`lora_linear`: the adapted linear layer, y = x Rᵀ + s·drop(x) Aᵀ Bᵀ (+ bias), R frozen.

A backend has two functions, named and called like the two ops below but for this: `backend` is
left out; x, y, dy and dx are matrices (M, ·), M = 0 included; x and dy may have any strides (0 in
the dy of `y.sum()`); and a gradient that is not asked for is returned as None.

With a start (A₀, B₀), y = W x + s(B A − B₀ A₀) drop(x), which is the same op at a higher rank: A
arrives as [A; A₀], (r + r₀, in), and B as [B, −B₀]. `trained` is r then, else all rows of A: only
the first `trained` ranks get gradients, dA (trained, in) and dB (out, trained).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lora_init import backends
from lora_init.factors import LoraInitError

# S = s/(1−p)·drop(x) Aᵀ, (M, rows of A), is what dB needs besides dy. It is kept in A's dtype: that
# is the operand that S Bᵀ multiplies, so dB is the gradient of what was computed, and fp32 would
# only be rounded later, on its way into a tensor core. It is r/in of x's size.
#
# `backend` names the one to run. The backward cannot just ask the policy again: autograd runs it
# in threads that `with backend(...)` does not reach, perhaps after that block has ended. So the
# forward passes on the name it used. "" lets the op ask at run time, which is what compiled code
# does: a name resolved while tracing would stay in the graph whatever is asked for later. There
# the backward asks for itself, which is right too: all backends agree on S and on the mask.
_library = torch.library.Library("lora_init", "FRAGMENT")
_library.define(
    "lora_linear_forward(Tensor x, Tensor R, Tensor A, Tensor B, Tensor? bias, Tensor? seed, "
    "float scaling, float dropout_p, int trained, *, str backend) -> (Tensor y, Tensor S)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor R, Tensor A, Tensor B, Tensor? S, "
    "Tensor? seed, float scaling, float dropout_p, int trained, *, bool[4] output_mask, "
    "str backend) -> (Tensor dx, Tensor dA, Tensor dB, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def lora_linear(
    x: Tensor,
    R: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float = 2.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    start: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y = x Rᵀ + scaling·drop(x) Aᵀ Bᵀ (+ bias): LoRA (arXiv 2106.09685) on a frozen residual.

    Or, on an untouched weight R = W, y = x Wᵀ + scaling·drop(x) (B A − B₀ A₀)ᵀ (+ bias): a virtual
    residual. One mask serves both products, so that nothing is added while A = A₀ and B = B₀ (not
    one bit by the reference backend).

    Differentiable once, in x, A, B and bias; gradients have their input's dtype. Dtypes are PEFT's:
    the low-rank branch runs in A's dtype, the rest and y in x's; under `torch.autocast` all of it
    runs in autocast's dtype, as in `torch.nn.Linear`. Works under torch.compile(fullgraph=True) and
    activation checkpointing.

    Args:
        x: (..., in), fp64, fp32, fp16 or bf16, any number of leading dimensions and any strides.
        R: (out, in), frozen, x's dtype.
        A: (r, in).
        B: (out, r), A's dtype.
        scaling: s, PEFT's lora_alpha / r.
        bias: (out,), x's dtype.
        dropout_p: probability that an element of x is dropped from the low-rank branch, in [0, 1).
            The mask is `ops.philox.keep_mask` of a seed drawn from the generator of x's device: it
            repeats under `torch.manual_seed` but is not nn.Dropout's. 0 leaves the generator alone.
        start: (A₀, B₀), (r₀, in) and (out, r₀), frozen, A's dtype.

    Returns:
        (..., out).

    Raises:
        LoraInitError: shapes, dtypes or devices do not fit, R or a start requires a gradient,
            scaling is not finite or dropout_p is out of range.
        BackendError: no backend can run the call.
    """
    A0, B0 = start or (None, None)
    for label, frozen in (("R", R), ("A0", A0), ("B0", B0)):
        if frozen is not None and frozen.requires_grad:
            raise LoraInitError(
                f"{label} {tuple(frozen.shape)} requires a gradient, but lora_linear never gives "
                f"it one: freeze it with {label}.requires_grad_(False)"
            )
    dtype = _autocast_dtype(x.device)
    if dtype is not None:
        x, R, A, B = (_autocast(t, dtype) for t in (x, R, A, B))
        bias, A0, B0 = (None if t is None else _autocast(t, dtype) for t in (bias, A0, B0))
    _check(x, R, A, B, bias)
    if A0 is not None and B0 is not None:
        _check_start(R, A, A0, B0)
    # Compared, because math.isfinite does not trace where a compiler makes the number dynamic.
    if not isinstance(scaling, (int, float)) or not -math.inf < scaling < math.inf:
        raise LoraInitError(f"scaling must be a finite number, got {scaling!r}")
    if not 0 <= dropout_p < 1:
        raise LoraInitError(f"dropout_p must be in [0, 1), got {dropout_p}")
    seed = None
    if dropout_p > 0:
        # A tensor, and not Tensor.random_: works under fullgraph, with no synchronisation.
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    y: Tensor = _LoraLinear.apply(x, R, A, B, A0, B0, bias, seed, scaling, dropout_p)
    return y


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    # Meta tensors know no autocast; torch.amp.is_autocast_available would break torch 2.7's graphs.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast makes of an argument of nn.functional.linear: it leaves fp64 alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _check(x: Tensor, R: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
    if R.ndim != 2 or 0 in R.shape:
        raise LoraInitError(f"R must be (out, in), neither 0, got {tuple(R.shape)}")
    out_features, in_features = R.shape
    if x.ndim == 0 or x.shape[-1] != in_features:
        hint = ": transpose R" if x.ndim and x.shape[-1] == out_features else ""
        raise LoraInitError(
            f"x must be (..., {in_features}) for R {tuple(R.shape)}, got {tuple(x.shape)}{hint}"
        )
    if A.ndim != 2 or A.shape[1] != in_features or A.shape[0] == 0:
        hint = ": transpose it" if A.ndim == 2 and A.shape[0] == in_features else ""
        raise LoraInitError(f"A must be (r, {in_features}) with r ≥ 1, got {tuple(A.shape)}{hint}")
    fitting = (out_features, A.shape[0])
    if B.shape != fitting:
        hint = ": transpose it" if B.shape == fitting[::-1] else ""
        raise LoraInitError(f"B must be (out, r) = {fitting}, got {tuple(B.shape)}{hint}")
    if bias is not None and bias.shape != R.shape[:1]:
        raise LoraInitError(f"bias must be (out,) = ({out_features},), got {tuple(bias.shape)}")
    if not A.is_floating_point() or A.dtype != B.dtype:
        raise LoraInitError(
            f"A and B must share a floating-point dtype, got {A.dtype} and {B.dtype}: cast one"
        )
    for label, tensor in (("R", R), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or not x.is_floating_point()):
            raise LoraInitError(
                f"x and {label} must share a floating-point dtype, got {x.dtype} and "
                f"{tensor.dtype}: cast one, or run under torch.autocast"
            )
    for label, tensor in (("R", R), ("A", A), ("B", B), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise LoraInitError(f"{label} is on {tensor.device}, x on {x.device}: move one")


def _check_start(R: Tensor, A: Tensor, A0: Tensor, B0: Tensor) -> None:
    shapes, fitting = (tuple(A0.shape), tuple(B0.shape)), (R.shape[1], R.shape[0])
    if A0.ndim != 2 or B0.ndim != 2 or (*A0.shape[1:], *B0.shape) != (*fitting, *A0.shape[:1]):
        raise LoraInitError(
            f"start must be A0 (r0, {fitting[0]}) and B0 ({fitting[1]}, r0), got {shapes[0]} and "
            f"{shapes[1]}"
        )
    if (A0.dtype, B0.dtype) != (A.dtype, A.dtype) or {A0.device, B0.device} != {A.device}:
        raise LoraInitError(
            f"start must have A's dtype and device, {A.dtype} on {A.device}, got {A0.dtype} on "
            f"{A0.device} and {B0.dtype} on {B0.device}: cast or move it"
        )


def _implementation(backend: str, x_or_dy: Tensor, R: Tensor, A: Tensor, B: Tensor) -> Any:
    """The backend of that name, or else the policy's choice."""
    if backend:
        return backends.available()[backend]
    return backends.select("lora_linear", x_or_dy, R, A, B)


def _rows(tensor: Tensor) -> Tensor:
    """(..., n) as (M, n)."""
    return tensor.reshape(-1, tensor.shape[-1])


def _unflatten(rows: Tensor, like: Tensor) -> Tensor:
    """(M, n) with the leading dimensions of `like`, and no view to autograd: a view that a Function
    returns cannot be changed in place (`y += residual`)."""
    tensor: Tensor = torch.ops.aten._unsafe_view(rows, (*like.shape[:-1], rows.shape[-1]))
    return tensor


def _forward(
    x: Tensor, R: Tensor, A: Tensor, B: Tensor, *options: Any, backend: str
) -> tuple[Tensor, Tensor]:
    chosen = _implementation(backend, x, R, A, B)
    y, S = chosen.lora_linear_forward(_rows(x), R, A, B, *options)
    return _unflatten(y, x), S


def _forward_fake(
    x: Tensor, R: Tensor, A: Tensor, B: Tensor, *options: Any, backend: str
) -> tuple[Tensor, Tensor]:
    leading = x.shape[:-1]
    return x.new_empty(*leading, R.shape[0]), A.new_empty(math.prod(leading), A.shape[0])


def _backward(
    dy: Tensor,
    x: Tensor | None,
    R: Tensor,
    A: Tensor,
    B: Tensor,
    *options: Any,
    output_mask: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    chosen = _implementation(backend, dy, R, A, B)
    # backward() may be called inside an autocast block, which must not change its precision.
    autocast = _autocast_dtype(dy.device) is not None
    with torch.autocast(dy.device.type, enabled=False) if autocast else nullcontext():
        dx, *others = chosen.lora_linear_backward(
            _rows(dy), None if x is None else _rows(x), R, A, B, *options, output_mask
        )
    gradients = (None if dx is None else _unflatten(dx, dy), *others)
    return tuple(dy.new_empty(0) if g is None else g for g in gradients)


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    R: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    trained: int,
    *,
    output_mask: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    out_features, in_features = R.shape
    shapes = (
        (*dy.shape[:-1], in_features),
        (trained, in_features),
        (out_features, trained),
        (out_features,),
    )
    return tuple(
        like.new_empty(shape) if needed else dy.new_empty(0)
        for like, shape, needed in zip((dy, A, B, dy), shapes, output_mask, strict=True)
    )


for _name, _run, _fake in (
    ("lora_linear_forward", _forward, _forward_fake),
    ("lora_linear_backward", _backward, _backward_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_init::{_name}", _fake, lib=_library)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        R: Tensor,
        A: Tensor,
        B: Tensor,
        A0: Tensor | None,
        B0: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
    ) -> Tensor:
        ctx.options = (scaling, dropout_p, A.shape[0])
        if A0 is not None and B0 is not None:
            A, B = torch.cat([A, A0]), torch.cat([B, -B0], dim=1)
        ctx.backend = ""
        if not torch.compiler.is_compiling():
            ctx.backend = backends.select("lora_linear", x, R, A, B).NAME
        y: Tensor
        y, S = torch.ops.lora_init.lora_linear_forward(
            x, R, A, B, bias, seed, *ctx.options, backend=ctx.backend
        )
        _, _, need_A, need_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_A else None, R, A, B, S if need_B else None, seed)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Grad mode is on here under create_graph=True only. once_differentiable would not do: it
        # objects where dy needs a gradient, else it drops second-order terms without a word.
        # AOTAutograd refuses a second backward of compiled code by itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise LoraInitError(
                "lora_linear can be differentiated once only: leave out create_graph=True, or use "
                "x @ R.T + scaling * (x @ A.T) @ B.T where second derivatives are needed"
            )
        need_x, _, need_A, need_B, _, _, need_bias, *_ = ctx.needs_input_grad
        needs = [need_x, need_A, need_B, need_bias]
        gradients = torch.ops.lora_init.lora_linear_backward(
            dy, *ctx.saved_tensors, *ctx.options, output_mask=needs, backend=ctx.backend
        )
        dx, dA, dB, dbias = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return dx, None, dA, dB, None, None, dbias, None, None, None
