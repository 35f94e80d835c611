"""What calibration sums up for a layer while a user's data runs through the model; no model here.

A `Statistic` is fed one batch's (X, dL/dY) of one layer at a time. A method names those that it
needs (`Method.statistics`), and `lora_init.calibration` collects these and no others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

if TYPE_CHECKING:
    from lora_init.methods import Layer

State = dict[str, Tensor]

TokenMask = Literal["attention", "labels", "own_label"]
"""Which positions count as tokens: those that the attention mask keeps; of these the ones that
predict a label (the *next* position's is not −100); or the ones whose own label is not −100.
"""


@dataclass(frozen=True)
class Tokens:
    """One call of a layer.

    Attributes:
        x: its input (n, in), in the model's dtype.
        dy: the loss' gradient by its output (n, out), or None where nothing asks for gradients.
        valid: (n,) bool, the rows that count as tokens (padding is left out); `dy` of the others is
            part of a gradient all the same.
    """

    x: Tensor
    dy: Tensor | None
    valid: Tensor


@dataclass(frozen=True)
class Statistic(ABC):
    """One thing that is summed over the data; its dataclass fields are its options, and with the
    name all that its cache entry is keyed by beside model and data.

    Class attributes:
        name: of cache entries and errors.
        keys: of `Layer.statistics` that `finish` gives.
        gradients: whether it wants `Tokens.dy`, so that the pass runs backward too.
        single: whether it wants examples one by one (the loss of each is then its own mean).
        mask: what `Tokens.valid` says; None leaves it to the user (`Calibration.token_mask`).
        shared: whether the state depends on `Tokens.x` and `Tokens.valid` alone, and not on the
            layer's name, weight or rank: layers that are fed the same tensor (q, k, v) then share
            one.
    """

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]
    gradients: ClassVar[bool] = False
    single: ClassVar[bool] = False
    mask: ClassVar[TokenMask | None] = None
    shared: ClassVar[bool] = False

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

    @abstractmethod
    def add(self, layer: Layer, state: State, tokens: Tokens) -> None:
        """Add one call, in place."""

    def next_pass(self, layer: Layer, state: State) -> State:
        """The state to start another pass over the same data with."""
        return state

    @abstractmethod
    def finish(self, layer: Layer, state: State, losses: int) -> Mapping[str, Tensor]:
        """The values under `keys`.

        Args:
            losses: how many losses (batches, or examples of a `single` one) were summed.
        """
