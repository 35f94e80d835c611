"""`descend`: optimiser steps on mean((W − B·A)²), one problem per matrix of a ragged group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lora_init import backends
from lora_init.factors import LoraInitError
from lora_init.ops.dual_project import check_operands


@dataclass(frozen=True)
class Optimizer:
    """Adam or plain gradient descent with StepLR, as IniLoRA runs it (arXiv 2510.03731 and its
    code).

    The published loop steps the scheduler before the optimiser, so step i = 0, 1, ... uses
    lr·gamma^⌊(i+1)/step_size⌋. `eps` stands outside the square root, the second moment is
    bias-corrected.
    """

    name: Literal["adam", "gd"] = "adam"
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    step_size: int = 5000
    gamma: float = 0.9

    def schedule(self, first: int, steps: int) -> np.ndarray:
        """(steps, 2) fp64: αᵢ = lrᵢ/(1−β₁ᵗ) and 1/√(1−β₂ᵗ) for step i = first + row, t = i + 1.

        In fp64 on the host because 1−β₂ᵗ in fp32 is 1–2e-5 off for the first hundred steps. Plain
        descent has no moments: its rows are (lrᵢ, 1).
        """
        t = np.arange(first + 1, first + steps + 1, dtype=np.float64)
        lr = self.lr * self.gamma ** np.floor(t / self.step_size)
        if self.name == "gd":
            return np.stack([lr, np.ones_like(lr)], axis=1)
        beta1, beta2 = self.betas
        return np.stack([lr / (1 - beta1**t), 1 / np.sqrt(1 - beta2**t)], axis=1)


@dataclass
class DescentState:
    """What `descend` advances in place. A and Bᵀ of a matrix lie side by side in one (r, out + in)
    tensor, and so do their moments, so that an optimiser step is one pass over contiguous memory.

    Attributes:
        params: per matrix [Bᵀ | A], (rᵢ, outᵢ + inᵢ), fp32 or fp64.
        moments: per matrix (m, v) shaped like its params; empty for plain descent.
        step: steps done so far, the same for the whole group.
    """

    out_features: list[int]
    params: list[Tensor]
    moments: list[tuple[Tensor, Tensor]]
    optimizer: Optimizer
    step: int = 0

    @classmethod
    def start(cls, A: Sequence[Tensor], B: Sequence[Tensor], optimizer: Optimizer) -> DescentState:
        """A fresh state from copies of A (rᵢ, inᵢ) and B (outᵢ, rᵢ)."""
        params = [torch.cat([b.T, a], dim=1) for a, b in zip(A, B, strict=True)]
        moments = []
        if optimizer.name == "adam":
            moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
        return cls([b.shape[0] for b in B], params, moments, optimizer)

    @property
    def A(self) -> list[Tensor]:
        """Views (rᵢ, inᵢ) of the current factors."""
        return [p[:, m:] for p, m in zip(self.params, self.out_features, strict=True)]

    @property
    def B(self) -> list[Tensor]:
        """Views (outᵢ, rᵢ) of the current factors."""
        return [p[:, :m].T for p, m in zip(self.params, self.out_features, strict=True)]

    def take(self, indices: Sequence[int]) -> DescentState:
        """The state of some of the matrices, sharing their tensors (to go on with those not yet
        stopped).
        """
        return DescentState(
            [self.out_features[i] for i in indices],
            [self.params[i] for i in indices],
            [self.moments[i] for i in indices] if self.moments else [],
            self.optimizer,
            self.step,
        )


def descend(group: Sequence[Tensor], state: DescentState, steps: int) -> None:
    """Advance `state` in place by `steps` steps on mean((Wᵢ − BᵢAᵢ)²), each matrix a problem of its
    own.

    The gradients are 2/(out·in)·(B(AAᵀ) − W Aᵀ) and 2/(out·in)·((BᵀB)A − BᵀW), both from the same
    (A, B); the residual is never formed. A matrix's bits do not depend on what else is in the
    group, nor on how the steps are split into calls.

    Args:
        group: W matrices (outᵢ, inᵢ), any float dtypes and strides, never copied as a whole group.
        state: from `DescentState.start`; its step count goes up by `steps`.
        steps: how many, ≥ 0.

    Raises:
        LoraInitError: shapes, dtypes or devices do not fit, a matrix has no elements, or a count is
            negative.
    """
    if steps < 0:
        raise LoraInitError(f"steps must be ≥ 0, got {steps}")
    if len(group) != len(state.params):
        raise LoraInitError(f"descend got {len(group)} matrices for a state of {len(state.params)}")
    for i, (w, a, b) in enumerate(zip(group, state.A, state.B, strict=True)):
        check_operands(f"matrix {i}", w, a, b)
        if w.numel() == 0:
            raise LoraInitError(f"matrix {i}: W {tuple(w.shape)} has no elements: leave it out")
        if a.dtype not in (torch.float32, torch.float64):
            raise LoraInitError(
                f"matrix {i}: factors are descended in float32 or float64, got {a.dtype}"
            )
    backends.select("descend", group, state, steps).descend(group, state, steps)
    state.step += steps
