"""What csrc/dual_project.cu is told about a group of matrices and their factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_init.ops.dual_project import Precision

RANKS = (8, 16, 32, 64)
"""That its kernels are compiled for."""
_SPAN = 1024
"""Of csrc/dual_tiles.h."""


@dataclass(frozen=True)
class Form:
    """What a kernel of csrc/dual_project.cu is compiled for; `own`: factors are of W's dtype."""

    dtype: torch.dtype
    ranks: int
    parts: int
    own: bool


@dataclass(frozen=True)
class Projection:
    """left = W Aᵀ and right = Bᵀ W of one matrix, both written, of any strides.

    Attributes:
        weight: (out, in).
        A, Bt: (p, in) and (q, out), both of W's dtype or both fp32.
        left, right: (out, p) and (q, in).
        parts: of a factor, 16 bits each.
    """

    weight: Tensor
    A: Tensor
    Bt: Tensor
    left: Tensor
    right: Tensor
    parts: int = 1

    @classmethod
    def of(cls, weight: Tensor, A: Tensor, Bt: Tensor, precision: Precision) -> Projection:
        """Into new fp32 tensors."""
        own = weight.dtype == A.dtype == Bt.dtype != torch.float32
        if not own:
            A, Bt = A.float(), Bt.float()
        # One bf16 part has the range of fp32, one of fp16 would not.
        rounded = precision == "fast" and weight.dtype == torch.bfloat16
        left = A.new_empty(weight.shape[0], A.shape[0], dtype=torch.float32)
        right = A.new_empty(Bt.shape[0], weight.shape[1], dtype=torch.float32)
        return cls(weight, A, Bt, left, right, 1 if own or rounded else 3)

    def transposed(self) -> Projection:
        """The same products, of Wᵀ."""
        return Projection(self.weight.T, self.Bt, self.A, self.right.T, self.left.T, self.parts)

    @property
    def form(self) -> Form:
        most = max(len(self.A), len(self.Bt))
        ranks = next(ranks for ranks in RANKS if ranks >= most)
        own = self.A.dtype == self.weight.dtype != torch.float32
        return Form(self.weight.dtype, ranks, self.parts, own)


def projection_table(
    members: Sequence[Projection], columns: int, blocks: int = 16, least: int = 256
) -> tuple[np.ndarray, Tensor]:
    """What csrc/dual_project.cuh is told about a group.

    A block costs a partial of each product, 4·r/columns and 4·r/rows of a 16-bit W's bytes. So it
    is as tall as leaves enough blocks for a GPU, by the matrix' own shape only.

    Args:
        columns: of a block.
        blocks, least: as many blocks as that, or fewer of `least` rows; of 4,096 rows at most.

    Returns:
        int64 (members, 24), DualProjectLayer of csrc/dual_tiles.h, and the partials' memory, fp32.
    """
    rows, block, span, floats = [], 0, 0, 0
    for one in members:
        out_features, in_features = one.weight.shape
        column_blocks = -(-in_features // columns)
        block_rows = _power_of_two(out_features * column_blocks // blocks)
        block_rows = min(max(block_rows, least), 4096)
        row_blocks = -(-out_features // block_rows)
        row = [one.weight.data_ptr(), *one.weight.stride(), *one.weight.shape]
        row += [block_rows, block, span]
        for factor, count, product, stored in (
            (one.A, column_blocks, one.left.T, one.left),
            (one.Bt, row_blocks, one.right, one.right),
        ):
            # What one block completes goes where it belongs at once.
            direct = count == 1 and stored.is_contiguous() and stored.dtype == torch.float32
            row += [factor.data_ptr(), *factor.stride(), len(factor)]
            row += [stored.data_ptr(), 0] if direct else [4 * floats, stored.data_ptr()]
            row += product.stride()
            if not direct:
                floats += count * product.numel()
                span += -(-product.numel() // _SPAN)
        rows.append(row)
        block += row_blocks * column_blocks
    partials = torch.empty(floats, dtype=torch.float32, device=members[0].weight.device)
    table = np.array(rows, np.int64)
    for at, target in ((12, 13), (20, 21)):
        table[:, at] += np.where(table[:, target] != 0, partials.data_ptr(), 0)
    return table, partials


def _power_of_two(size: int) -> int:
    return 1 << max(0, size.bit_length() - 1)
