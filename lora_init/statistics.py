"""What calibration sums up for a layer while a user's data runs through the model; no model here.

A `Statistic` is fed one batch's (X, dL/dY) of one layer at a time. A method names those that it
needs (`Method.statistics`), and `lora_init.calibration` collects these and no others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lora_init.factors import LoraInitError
from lora_init.ops.dual_project import product_dtype
from lora_init.parallel import single_threaded

if TYPE_CHECKING:
    from lora_init.methods import Layer

State = dict[str, Tensor]

TokenMask = Literal["all", "attention", "labels", "own_label"]
"""Which positions count as tokens: all of them; those that the attention mask keeps; of these the
ones that predict a label (the *next* position's is not −100); or the ones whose own label is not
−100.
"""


@dataclass(frozen=True)
class Tokens:
    """One call of a layer.

    Attributes:
        x: its input (n, in), in the model's dtype.
        dy: the loss' gradient by its output (n, out), or None where nothing asks for gradients; in
            its dtype, or in fp32 at least where the loss was scaled, in models that run in fp16.
        valid: (n,) bool, the rows that count as tokens (padding is left out, but for "all").
    """

    x: Tensor
    dy: Tensor | None
    valid: Tensor


@dataclass(frozen=True)
class Statistic(ABC):
    """One thing that is summed over the data; its dataclass fields are its options, and with the
    name all that its cache entry is keyed by beside model and data. So nothing of it may depend on
    the layer's rank, nor, unless it is `trained`, on the run's seed.

    Class attributes:
        name: of cache entries and errors.
        keys: of `Layer.statistics` that `finish` gives.
        gradients: whether it wants `Tokens.dy`, so that the pass runs backward too.
        single: whether it wants examples one by one (the loss of each is then its own mean).
        mask: what `Tokens.valid` says; None leaves it to the user (`Calibration.token_mask`).
        shared: whether the state depends on `Tokens.x` and `Tokens.valid` alone, and not on the
            layer's name, weight or rank: layers that are fed the same tensor (q, k, v) then share
            one.
        trained: nothing is added to its state {"A": (R, in), "B": (out, R)}: those are factors of a
            temporary LoRA of all layers, y + (x Aᵀ) Bᵀ, that the user's `Calibration.train_step`
            trains, one step for each batch.
    """

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]
    gradients: ClassVar[bool] = False
    single: ClassVar[bool] = False
    mask: ClassVar[TokenMask | None] = None
    shared: ClassVar[bool] = False
    trained: ClassVar[bool] = False

    @property
    def passes(self) -> int:
        """How often the same data must go through."""
        return 1

    @abstractmethod
    def state_bytes(self, layer: Layer) -> int:
        """Memory that a layer's state takes between batches, on the device of its weight."""

    @abstractmethod
    def start(self, layer: Layer) -> State:
        """The state before the first batch, on the device of `layer.weight`; fp32, or fp64 for fp64
        weights. The weight is there for its shape, dtype and device: of a quantised layer it has no
        values.
        """

    def add(self, layer: Layer, state: State, tokens: Tokens) -> None:
        """Add one call, in place."""
        raise NotImplementedError

    def next_pass(self, layer: Layer, state: State) -> State:
        """The state to start another pass over the same data with."""
        return state

    @abstractmethod
    def finish(self, layer: Layer, state: State, losses: int) -> Mapping[str, Tensor]:
        """The values under `keys`. The state is used up: they may be made in its memory.

        Args:
            losses: how many losses (batches, or examples of a `single` one) were summed.
        """


@dataclass(frozen=True)
class Covariance(Statistic):
    """Mean (in,) and covariance (in, in) of a layer's input over its valid tokens.

    Each call's own covariance and the distance of its mean are added (Chan, Golub & LeVeque, 1979):
    the mean is never subtracted from sums of squares, which would cancel where it is large.
    """

    name: ClassVar[str] = "covariance"
    keys: ClassVar[tuple[str, ...]] = ("input_mean", "input_covariance")
    # As all else that lora_da needs: what is not takes a run over the data of its own.
    single: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    def state_bytes(self, layer: Layer) -> int:
        in_features = layer.weight.shape[1]
        return product_dtype(layer.weight).itemsize * in_features * (in_features + 1)

    def start(self, layer: Layer) -> State:
        in_features = layer.weight.shape[1]
        return {
            "mean": zeros(layer, in_features),
            "squares": zeros(layer, in_features, in_features),
            # On the host, where it is known: it scales what is added.
            "count": torch.zeros((), dtype=torch.float64, device="cpu"),
        }

    def add(self, layer: Layer, state: State, tokens: Tokens) -> None:
        x = tokens.x[tokens.valid].to(state["mean"].dtype)
        if not len(x):
            return
        mean = x.mean(0)
        x -= mean
        distance = mean.sub_(state["mean"])
        count, new = float(state["count"]), len(x)
        state["squares"].addmm_(x.T, x).addr_(distance, distance, alpha=count * new / (count + new))
        state["mean"].add_(distance, alpha=new / (count + new))
        state["count"] += new

    def finish(self, layer: Layer, state: State, losses: int) -> Mapping[str, Tensor]:
        _refuse_no_token(layer, state["count"])
        return {
            "input_mean": state["mean"],
            "input_covariance": state["squares"].div_(float(state["count"])),
        }


@dataclass(frozen=True)
class PrincipalComponents(Covariance):
    """The leading directions of a layer's inputs around their mean, from their exact covariance.

    Options:
        width: how many; as many as there are where `in` is less.
    """

    name: ClassVar[str] = "principal_components"
    # (width, in) orthonormal rows, (width,) largest first, and () of all directions together.
    keys: ClassVar[tuple[str, ...]] = ("components", "variances", "total_variance")
    single: ClassVar[bool] = False
    mask: ClassVar[TokenMask | None] = "own_label"

    width: int

    def finish(self, layer: Layer, state: State, losses: int) -> Mapping[str, Tensor]:
        covariance = super().finish(layer, state, losses)["input_covariance"]
        check_finite(layer, "the covariance of the inputs", covariance)
        with single_threaded():  # the bits of a factorisation depend on the threads
            variances, directions = torch.linalg.eigh(covariance.to(torch.float64))
        found = {
            "components": directions[:, -self.width :].flip(1).T,
            "variances": variances[-self.width :].flip(0).clamp(min=0),
            "total_variance": variances.clamp(min=0).sum(),
        }
        return {key: value.to(covariance.dtype).contiguous() for key, value in found.items()}


@dataclass(frozen=True)
class ScaledSquares(Statistic):
    """Mean over calls of X̃ᵀX̃ (in, in), X̃ the valid rows of X over |max X|, its signed maximum.

    A call is one example, as in CorDA's code: X̃ᵀX̃ is a sum over tokens, so that batches would scale
    it.
    """

    name: ClassVar[str] = "scaled_squares"
    keys: ClassVar[tuple[str, ...]] = ("scaled_squares",)
    single: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    def state_bytes(self, layer: Layer) -> int:
        return product_dtype(layer.weight).itemsize * layer.weight.shape[1] ** 2

    def start(self, layer: Layer) -> State:
        in_features = layer.weight.shape[1]
        return {
            "squares": zeros(layer, in_features, in_features),
            "calls": torch.zeros((), dtype=torch.float64, device="cpu"),
        }

    def add(self, layer: Layer, state: State, tokens: Tokens) -> None:
        x = tokens.x[tokens.valid].to(state["squares"].dtype)
        if not len(x):
            return
        largest = x.max().abs()
        if not largest:
            raise LoraInitError(
                f"{layer.name}: the largest of an example's inputs is 0, which corda divides by: "
                "leave the layer out of target_modules, or that example out of the data"
            )
        x /= largest
        state["squares"].addmm_(x.T, x)
        state["calls"] += 1

    def finish(self, layer: Layer, state: State, losses: int) -> Mapping[str, Tensor]:
        _refuse_no_token(layer, state["calls"])
        return {"scaled_squares": state["squares"].div_(float(state["calls"]))}


@dataclass(frozen=True)
class Gradient(Statistic):
    """The gradient of the loss by the weight, G (out, in): Σ dYᵀX over the mean of losses."""

    name: ClassVar[str] = "gradient"
    keys: ClassVar[tuple[str, ...]] = ("gradient",)
    gradients: ClassVar[bool] = True
    mask: ClassVar[TokenMask | None] = "all"  # the loss says what counts

    def state_bytes(self, layer: Layer) -> int:
        return product_dtype(layer.weight).itemsize * layer.weight.numel()

    def start(self, layer: Layer) -> State:
        return {"sum": zeros(layer, *layer.weight.shape)}

    def add(self, layer: Layer, state: State, tokens: Tokens) -> None:
        total = state["sum"]
        total.addmm_(dy_of(tokens).to(total.dtype).T, tokens.x.to(total.dtype))

    def finish(self, layer: Layer, state: State, losses: int) -> Mapping[str, Tensor]:
        return {"gradient": state["sum"].div_(losses)}


@dataclass(frozen=True)
class ExampleGradient(Gradient):
    """`Gradient` over the mean of the examples' losses, each its own mean over tokens."""

    name: ClassVar[str] = "example_gradient"
    single: ClassVar[bool] = True


@dataclass(frozen=True)
class OutputSquares(Statistic):
    """Mean over valid tokens of the squared gradient by each output (out,), an example at a time:
    the diagonal of the outputs' empirical Fisher information.
    """

    name: ClassVar[str] = "output_squares"
    keys: ClassVar[tuple[str, ...]] = ("output_squares",)
    gradients: ClassVar[bool] = True
    single: ClassVar[bool] = True

    def state_bytes(self, layer: Layer) -> int:
        return product_dtype(layer.weight).itemsize * layer.weight.shape[0]

    def start(self, layer: Layer) -> State:
        return {
            "sum": zeros(layer, layer.weight.shape[0]),
            "count": torch.zeros((), dtype=torch.float64, device="cpu"),
        }

    def add(self, layer: Layer, state: State, tokens: Tokens) -> None:
        dy = dy_of(tokens)[tokens.valid].to(state["sum"].dtype)
        state["sum"] += dy.square_().sum(0)
        state["count"] += len(dy)

    def finish(self, layer: Layer, state: State, losses: int) -> Mapping[str, Tensor]:
        _refuse_no_token(layer, state["count"])
        return {"output_squares": state["sum"].div_(float(state["count"]))}


def collected(layer: Layer, key: str, *shape: int) -> Tensor:
    """What was collected of a layer, in fp64 on its weight's device.

    Raises:
        LoraInitError: it has another shape, or is not finite.
    """
    value = layer.statistics[key]
    if tuple(value.shape) != shape:
        raise LoraInitError(
            f"{layer.name}: {key} must be {shape}, got {tuple(value.shape)}: it was collected of "
            "another layer, or for other options"
        )
    check_finite(layer, key, value)
    return value.to(layer.weight.device, torch.float64)


def check_finite(layer: Layer, what: str, value: Tensor) -> None:
    """Raises `LoraInitError` if a value is NaN or infinite."""
    if not bool(torch.isfinite(value).all()):
        raise LoraInitError(
            f"{layer.name}: {what} is not finite: run the model in a wider dtype, or leave out the "
            "batch that overflows"
        )


def _refuse_no_token(layer: Layer, count: Tensor) -> None:
    if not count:
        raise LoraInitError(
            f"{layer.name}: no token of the calibration data came to this layer: leave it out of "
            "target_modules, or use more data"
        )


def zeros(layer: Layer, *shape: int) -> Tensor:
    """What sums of a layer start from: fp32, or fp64 for an fp64 weight, on the weight's device."""
    weight = layer.weight
    return torch.zeros(shape, dtype=product_dtype(weight), device=weight.device)


def dy_of(tokens: Tokens) -> Tensor:
    """The gradient by the output, which is there for a statistic that says `gradients`."""
    assert tokens.dy is not None
    return tokens.dy
