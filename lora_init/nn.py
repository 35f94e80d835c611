"""`LoRALinear`: an `nn.Linear` with LoRA for a trainer of one's own, without PEFT; several of one
input stacked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lora_init.factors import Factors, LoraInitError, shifted
from lora_init.ops.lora_linear import lora_linear


class LoRALinear(nn.Module):
    """y = x Wᵀ + s·drop(x) Aᵀ Bᵀ (+ bias) with W frozen, computed by the op `lora_linear`.

    A starts as in PEFT (Kaiming uniform) and B at 0; `initialize` gives it the factors of a method:

        layer = LoRALinear(linear, r=16, lora_alpha=32)
        found = lora_init.approximate({"q_proj": linear.weight}, r=16, scaling=layer.scaling)
        layer.initialize(found["q_proj"], residual="virtual")
        model.q_proj = layer

    `approximate` also self-tests the kernels on the weights' device; without it, or for another
    device, `lora_init.selftest.ensure({device})` does.

    The state dict has PEFT's names: `base_layer.weight` (out, in), `base_layer.bias` (out,),
    `lora_A.default.weight` (r, in), `lora_B.default.weight` (out, r); with a virtual residual also
    its start, `lora_A0` (r, in) and `lora_B0` (out, r), which loading brings along.

    Attributes:
        scaling: s = lora_alpha/r, or lora_alpha/√r with `use_rslora`.
        merged: whether the update is in `base_layer.weight` at the moment.
    """

    lora_A0: Tensor | None
    lora_B0: Tensor | None

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        *,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        dtype: torch.dtype | None = None,
    ):
        """
        Args:
            base_layer: kept, not copied; its weight (out, in) and bias are frozen.
            r: rank of A (r, in) and B (out, r).
            lora_dropout: probability that an element of x is dropped from the low-rank branch in
                training, in [0, 1).
            dtype: of A and B; that of the weight if None. fp32 beside a 16-bit weight trains more
                stably.

        Raises:
            LoraInitError: base_layer is no plain nn.Linear (a subclass with a forward of its own is
                none), its weight is not floating-point, or a value is out of range.
        """
        super().__init__()
        # Subclasses may compute something else, or keep W quantised.
        if getattr(type(base_layer), "forward", None) is not nn.Linear.forward:
            raise LoraInitError(f"base_layer must be an nn.Linear, got {type(base_layer).__name__}")
        if not base_layer.weight.is_floating_point():
            raise LoraInitError(
                f"base_layer must have a floating-point weight, got {base_layer.weight.dtype}"
            )
        if r < 1 or not 0 < lora_alpha < math.inf or not 0 <= lora_dropout < 1:
            raise LoraInitError(
                f"r must be ≥ 1, lora_alpha > 0 and lora_dropout in [0, 1), got r={r}, "
                f"lora_alpha={lora_alpha} and lora_dropout={lora_dropout}"
            )
        like: dict[str, Any] = {
            "device": base_layer.weight.device,
            "dtype": dtype or base_layer.weight.dtype,
        }
        self.base_layer = base_layer.requires_grad_(False)
        A = nn.Linear(base_layer.in_features, r, bias=False, **like)
        B = nn.Linear(r, base_layer.out_features, bias=False, **like)
        nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
        nn.init.zeros_(B.weight)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": A}), nn.ModuleDict({"default": B})
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout = lora_dropout
        self.merged = False
        self.register_buffer("lora_A0", None)
        self.register_buffer("lora_B0", None)

    @property
    def A(self) -> nn.Parameter:
        """(r, in)."""
        return cast("nn.Parameter", self.lora_A["default"].weight)

    @property
    def B(self) -> nn.Parameter:
        """(out, r)."""
        return cast("nn.Parameter", self.lora_B["default"].weight)

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """(A₀, B₀) of a virtual residual."""
        A0, B0 = self.lora_A0, self.lora_B0
        return None if A0 is None or B0 is None else (A0, B0)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) of the weight's dtype, or any under autocast. Returns (..., out)."""
        if self.merged:
            output: Tensor = self.base_layer(x)
            return output
        return lora_linear(
            x,
            self.base_layer.weight,
            self.A,
            self.B,
            self.scaling,
            self.base_layer.bias,
            self.lora_dropout if self.training else 0.0,
            start=self.start,
        )

    @torch.no_grad()
    def initialize(
        self, factors: Factors, residual: Literal["stored", "virtual"] = "stored"
    ) -> None:
        """Start from factors of W, such that the layer's output is W x still.

        Args:
            factors: A (r, in) and B (out, r) on any device; their scaling must be this layer's.
            residual: "stored": the base weight becomes R = W − s·B₀A₀, rounded once. "virtual": it
                stays, and s·B₀A₀ is subtracted in the forward pass; the start is exact.

        Raises:
            LoraInitError: the factors do not fit or go with a base of their own, or R does not fit
                its dtype, or the layer is merged or has a virtual start already; nothing was
                changed.
        """
        if residual not in ("stored", "virtual"):
            raise LoraInitError(f'residual must be "stored" or "virtual", got {residual!r}')
        if self.merged:
            raise LoraInitError("the layer is merged: call unmerge() first")
        if factors.base is not None:
            raise LoraInitError(
                "these factors go with a base of their own, from which the layer does not start at "
                "W x: copy factors.base, A and B into base_layer.weight, A and B"
            )
        weight = self.base_layer.weight
        stored = Factors(
            factors.A.to(weight.device), factors.B.to(weight.device), factors.scaling
        ).to(self.A.dtype, "layer")
        stored.check_fits(weight)
        if (stored.r, stored.scaling) != (self.A.shape[0], self.scaling):
            raise LoraInitError(
                f"the factors have r {stored.r} and scaling {stored.scaling}, the layer "
                f"{self.A.shape[0]} and {self.scaling}: solve with those"
            )
        if residual == "virtual":
            self.lora_A0, self.lora_B0 = stored.A.clone(), stored.B.clone()
        else:
            if self.lora_A0 is not None:
                raise LoraInitError('the layer has a virtual start: pass residual="virtual" again')
            weight.copy_(stored.residual(weight))
        self.A.copy_(stored.A)
        self.B.copy_(stored.B)

    def merge(self) -> None:
        """Put the update into the base weight, rounded once; from then on forward is that of the
        base layer alone. Of no effect on a merged layer.

        The state dict does not tell a merged weight from another: unmerge before saving it to load
        into a `LoRALinear` again.
        """
        if not self.merged:
            self._shift(1)

    def unmerge(self) -> None:
        """Undo `merge`, but for the rounding of the weight."""
        if self.merged:
            self._shift(-1)

    def extra_repr(self) -> str:
        start = "" if self.lora_A0 is None else ", virtual residual"
        return (
            f"r={self.A.shape[0]}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"
            f"{start}"
        )

    @torch.no_grad()
    def _shift(self, sign: int) -> None:
        weight = self.base_layer.weight
        weight.copy_(shifted(weight, self.A, self.B, sign * self.scaling, self.start))
        self.merged = sign > 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = [name for name in ("lora_A0", "lora_B0") if prefix + name in state_dict]
        if len(names) == 1 and self.start is None:
            args[-1].append(
                f"{prefix}{names[0]} is half of a virtual start: lora_A0 and lora_B0 go together"
            )
            return
        # A layer that is made anew has no start yet to load one into.
        if names and self.start is None:
            self.lora_A0, self.lora_B0 = (torch.empty_like(t.detach()) for t in (self.A, self.B))
        super()._load_from_state_dict(state_dict, prefix, *args)


class StackedLoRALinear(nn.Module):
    """Layers of one input (q/k/v, gate/up) as one: x is read once for all of their low-rank
    branches, and one product with the stacked weights takes the place of several narrow ones.

        qkv = StackedLoRALinear({"q": q_proj, "k": k_proj, "v": v_proj})
        q, k, v = qkv(x)

    The layers stay what they are, trained and saved on their own; their frozen weights become views
    of one tensor, in rows. One dropout mask serves all of them. Not for FSDP and ZeRO-3, which keep
    the weights in memory of their own.

    Attributes:
        layers: `LoRALinear`s by name; in the state dict `layers.q.base_layer.weight` and so on.
    """

    def __init__(self, layers: Mapping[str, LoRALinear]):
        """
        Raises:
            LoraInitError: fewer than two layers, or they differ in in_features, dtype, device,
                dropout or in whether they have a bias or a virtual start, or one is merged; nothing
                was changed.
        """
        super().__init__()
        if len(layers) < 2:
            raise LoraInitError(f"stacking takes two layers or more, got {len(layers)}")
        found = {name: _stackable(name, layer) for name, layer in layers.items()}
        first, *others = found
        for name in others:
            if found[name] != found[first]:
                what = next(k for k, v in found[name].items() if v != found[first][k])
                raise LoraInitError(
                    f"{name} cannot be stacked on {first}: its {what} is {found[name][what]}, not "
                    f"{found[first][what]}"
                )
        self.layers = nn.ModuleDict(layers)
        self._stack()
        # Compiled code cannot look where the weights are.
        self.register_load_state_dict_post_hook(_stacked_again)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: (..., in). Returns (..., outᵢ) of every layer, views of one tensor.

        Raises:
            LoraInitError: a layer was merged meanwhile, or only some have a virtual start.
        """
        layers = self._members()
        for name, layer in self.layers.items():
            if layer.merged:
                raise LoraInitError(f"{name} is merged: call its unmerge() first")
        starts = [layer.start for layer in layers]
        if None in starts and any(start is not None for start in starts):
            raise LoraInitError("either all of the stacked layers have a virtual start or none")
        if not torch.compiler.is_compiling() and not self._is_stacked():  # moved one by one
            self._stack()
        scaling = layers[0].scaling
        B = [
            layer.B if layer.scaling == scaling else layer.B * (layer.scaling / scaling)
            for layer in layers
        ]
        start = None
        if starts[0] is not None:
            A0, B0 = zip(*(start for start in starts if start), strict=True)
            scales = [layer.scaling / scaling for layer in layers]
            scaled = [b if s == 1 else b * s for b, s in zip(B0, scales, strict=True)]
            start = (torch.cat(A0), torch.block_diag(*scaled))
        biases = [layer.base_layer.bias for layer in layers]
        y = lora_linear(
            x,
            self._weight,
            torch.cat(tuple(layer.A for layer in layers)),
            torch.block_diag(*B),
            scaling,
            None if biases[0] is None else torch.cat(tuple(biases)),
            layers[0].lora_dropout if self.training else 0.0,
            start=start,
        )
        return y.split([layer.base_layer.out_features for layer in layers], dim=-1)

    def _members(self) -> list[LoRALinear]:
        return [cast("LoRALinear", layer) for layer in self.layers.values()]

    @torch.no_grad()
    def _stack(self) -> None:
        """Make the layers' weights views of `_weight`, (Σ outᵢ, in)."""
        weights = [layer.base_layer.weight for layer in self._members()]
        self._weight = torch.cat([weight.detach() for weight in weights])
        rows = self._weight.split([len(weight) for weight in weights])
        for weight, view in zip(weights, rows, strict=True):
            weight.data = view

    def _is_stacked(self) -> bool:
        at = self._weight.data_ptr()
        for layer in self._members():
            weight = layer.base_layer.weight
            if weight.data_ptr() != at or not weight.is_contiguous():
                return False
            at += weight.nbytes
        return True

    def _apply(self, *args: Any, **kwargs: Any) -> StackedLoRALinear:
        super()._apply(*args, **kwargs)  # to(), half(), ...: each weight by itself
        self._stack()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stack()  # copied each by itself


def _stacked_again(module: StackedLoRALinear, _: Any) -> None:
    module._stack()


def _stackable(name: str, layer: LoRALinear) -> dict[str, Any]:
    """What stacked layers must share."""
    if not isinstance(layer, LoRALinear):
        raise LoraInitError(f"{name} must be a LoRALinear, got {type(layer).__name__}")
    if layer.merged:
        raise LoraInitError(f"{name} is merged: call its unmerge() first")
    base = layer.base_layer
    return {
        "in_features": base.in_features,
        "dtype": base.weight.dtype,
        "adapter dtype": layer.A.dtype,
        "device": base.weight.device,
        "lora_dropout": layer.lora_dropout,
        "bias": base.bias is not None,
        "virtual start": layer.start is not None,
    }
