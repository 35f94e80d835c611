"""Initialisers by name. A new one is one new file here that registers a `Method`; it never touches
a model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lora_init.factors import Factors, LoraInitError, Residual, row_blocks, weight_digest
from lora_init.ops.dual_project import product_dtype
from lora_init.parallel import map_layers, values
from lora_init.statistics import Statistic


@dataclass(frozen=True)
class Layer:
    """One adapted layer as a method sees it.

    Attributes:
        name: module name in the base model, e.g. "model.layers.0.self_attn.q_proj".
        weight: W (out, in), any float dtype and strides; never written.
        r: rank of the factors.
        scaling: s in W ≈ s·B·A, > 0.
        seed: of the run; `generator` mixes the name in.
        statistics: what was collected of user data, by the keys of `Method.statistics`.
    """

    name: str
    weight: Tensor
    r: int
    scaling: float = 1.0
    seed: int = 0
    statistics: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def module_type(self) -> str:
        """The last part of the name ("q_proj"): what statistics per module type go by."""
        return self.name.rpartition(".")[2]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weight: part of the cache key, and how a resumed run knows its base."""
        return weight_digest(self.weight)

    @cached_property
    def energy(self) -> float:
        """‖W‖²_F; not finite if a weight is not, or if the squares overflow."""
        return float(_squared_norm(self.weight))

    @cached_property
    def moments(self) -> tuple[float, float]:
        """W's mean and sample standard deviation (0 for one element), in fp64 by row blocks."""
        weight, count = self.weight, self.weight.numel()
        first = float(weight[0, 0])  # taken off, so that a constant W has a deviation of exactly 0

        def total(power: int, centre: float) -> float:
            # Contiguous: one order of summation whatever the strides.
            blocks = (weight[rows].to(torch.float64).contiguous() for rows in row_blocks(weight))
            return math.fsum(float((block - centre).pow_(power).sum()) for block in blocks)

        mean = first + total(1, first) / count
        return mean, math.sqrt(total(2, mean) / max(1, count - 1))

    def without_weight(self) -> Layer:
        """This layer and what was measured of its weight, whose values it lets go (they are on the
        meta device): for runs that hold few weights at a time.
        """
        return self.with_weight(self.weight.to("meta"))

    def with_weight(self, weight: Tensor) -> Layer:
        """This layer and what was measured of it, with its weight's values."""
        return self.changed(weight=weight)

    def changed(self, **fields: Any) -> Layer:
        """This layer and what was measured of its weight, with other values of some fields."""
        twin = dataclasses.replace(self, **fields)
        measured = {key: value for key, value in vars(self).items() if key not in vars(twin)}
        vars(twin).update(measured)
        return twin

    def generator(self) -> torch.Generator:
        """A CPU generator seeded by (seed, name) alone, so that draws depend on nothing else in the
        run.
        """
        digest = hashlib.sha256(f"{self.seed}\0{self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def energies(layers: Sequence[Layer]) -> list[float]:
    """`energy` of every layer, found for all of them before the host waits for any."""
    new = [layer for layer in layers if "energy" not in vars(layer)]
    weights = [layer.weight for layer in new]
    if all(weight.device.type == "cpu" for weight in weights):
        squares = map_layers(_squared_norm, weights, cost=Tensor.numel)
    else:  # to hand a launch to a thread takes longer than to launch
        squares = [_squared_norm(weight) for weight in weights]
    for layer, energy in zip(new, values(squares), strict=True):
        vars(layer)["energy"] = energy
    return [layer.energy for layer in layers]


@torch.no_grad()
def _squared_norm(weight: Tensor) -> Tensor:
    """‖W‖²_F, fp64. Summed by rows: exact enough, in one fast pass."""
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=product_dtype(weight))
    return torch.linalg.vector_norm(norms, dtype=torch.float64).square()


Needs = Literal["nothing", "activations", "gradients", "training"]


@dataclass(frozen=True)
class Method(ABC):
    """An initialiser; its dataclass fields are its options.

    Class attributes:
        name: what users write. The first line of the class docstring is what `methods()` shows.
        residual: whether the base becomes R = W − s·B·A.
        replaces: whether it becomes `Factors.base` instead, which is not R.
        needs: of user data, to list and to refuse by: nothing, what layers are given
            ("activations"), a backward pass too ("gradients"), or steps of "training".
        source: where it is published, as it is listed.
        cached: whether `cache="auto"` keeps its factors (not worth it if solving is cheaper than
            hashing W).
    """

    name: ClassVar[str]
    residual: ClassVar[bool]
    replaces: ClassVar[bool] = False
    needs: ClassVar[Needs] = "nothing"
    source: ClassVar[str]
    cached: ClassVar[bool] = False

    @property
    def kind(self) -> Residual:
        """What is in the base weight's place, unless a virtual residual is asked for."""
        return "replaced" if self.replaces else "stored" if self.residual else None

    def statistics(self, layer: Layer) -> Sequence[Statistic]:
        """What must have been collected of a layer before `resolve` and `solve` see it."""
        return ()

    def resolve(self, layers: Sequence[Layer]) -> list[dict[str, Any]]:
        """Per-layer options from statistics over *all* layers (they enter the info and the cache
        key). Layers of a streamed run have no weights here, only their `moments` and `digest`.

        A method that has both this and `statistics` is given those of all layers at once: they must
        be small. An option "r" is the layer's rank from here on, in `solve` too; one of 0 loses its
        adapter.
        """
        return [{} for _ in layers]

    def peak_bytes(self, layer: Layer) -> int:
        """Memory beyond its weight that `solve` takes for a layer: what groups are formed by."""
        return 8 * layer.r * sum(layer.weight.shape)

    @abstractmethod
    def solve(
        self, layers: Sequence[Layer], resolved: Sequence[dict[str, Any]], progress: Progress
    ) -> list[Factors]:
        """Factors for some of the layers, fp32 or fp64, concurrently; `resolved` is theirs from
        `resolve`.
        """


class Progress:
    """A progress bar with loss and time left; quiet when not a terminal unless asked for."""

    def __init__(self, description: str, show: bool | None):
        self.description = description
        # tqdm's disable=None means "only on a terminal".
        self.disable = None if show is None else not show

    def bar(self, total: int, unit: str) -> tqdm[Any]:
        return tqdm(total=total, unit=unit, desc=self.description, disable=self.disable)

    def map_layers(
        self, function: Callable[[Layer], T], layers: Sequence[Layer], cost: Callable[[Layer], int]
    ) -> list[T]:
        """`parallel.map_layers` with a bar over the layers."""
        with self.bar(len(layers), "layer") as bar:

            def one(layer: Layer) -> T:
                found = function(layer)
                bar.update(1)
                return found

            return map_layers(one, layers, cost)


M = TypeVar("M", bound=type[Method])
T = TypeVar("T")
_REGISTRY: dict[str, type[Method]] = {}


def register(cls: M) -> M:
    """Class decorator: make a `Method` known by its name."""
    _REGISTRY[cls.name] = cls
    return cls


@dataclass(frozen=True)
class Description:
    """A method as it is listed; as a string, its summary.

    Attributes:
        summary: what it is in one line.
        needs: of user data, see `Method`.
        base: whether the base weight is "unchanged", becomes the "residual" W − s·B·A, or is
            "replaced" by another matrix.
        source: where it is published.
        options: their defaults by name.
    """

    summary: str
    needs: Needs
    base: Literal["unchanged", "residual", "replaced"]
    source: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return self.summary


def methods() -> dict[str, Description]:
    """Every initialiser by name, and what it is."""
    return {
        name: Description(
            (cls.__doc__ or "").strip().splitlines()[0],
            cls.needs,
            "residual" if cls.residual else "replaced" if cls.replaces else "unchanged",
            cls.source,
            {option.name: option.default for option in dataclasses.fields(cls)},
        )
        for name, cls in sorted(_all().items())
    }


def resolve_method(method: str | Method, options: dict[str, Any]) -> Method:
    """The method object for a name and its options, or the object itself (which takes no more
    options).

    Raises:
        LoraInitError: unknown name or option, or a value its method refuses.
    """
    if isinstance(method, Method):
        if options:
            raise LoraInitError(
                f"options {sorted(options)} were given beside a method object: set them on the "
                "object"
            )
        return method
    if method not in _all():
        raise LoraInitError(f"unknown method {method!r}; choose one of {', '.join(sorted(_all()))}")
    cls = _all()[method]
    known = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            raise LoraInitError(
                f"{method} has no option {option!r}; its options are {', '.join(known) or 'none'}"
            )
    return cls(**options)


def _all() -> dict[str, type[Method]]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _REGISTRY
