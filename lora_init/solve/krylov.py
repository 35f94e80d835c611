"""The best rank-r approximations of a ragged group of layers in about ten reads of their weights.

Randomised block Krylov iteration (Musco & Musco, arXiv 1504.05477) as block Golub–Kahan with full
re-orthogonalisation: from an orthonormal block X (in, b), W X gives the next block Y (out, b), Wᵀ Y
the next X, each orthogonalised against all earlier ones of its side. Every read of W is half a
step, and the result can be taken from either side, after any read.

The symmetric dilation [[0, W], [Wᵀ, 0]], which advances two chains with each read, was measured
against it: on the MiniLM q/v matrices, r = 8, blocks of 12 on both sides take 8.4 reads to an
excess of 1e-4 and a single chain of blocks of 24 takes 8.3, so it gains nothing for its columns,
while narrow products are the slower ones and both sides want orthogonalising at every read.

Layers of one shape and rank go through everything but the reads as one batch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lora_init.ops.dual_project import dual_project, product_dtype
from lora_init.parallel import map_layers

# Excess is measured against the optimum, or against this part of ‖W‖² where that is more: products
# in fp32 resolve no finer, and nothing that is stored needs it.
FLOOR = 1e-6
# The extrapolation takes three gains of captured energy, or four where there are; the first is of a
# random start.
_MIN_READS = 5
_GAINS = 4
# A row this much shorter than its block was before is rounding noise, not a new direction.
_NOISE = 1e-5
# A batched product on the CPU gives the bits of its matrices one at a time where all lie at
# addresses that are multiples of 64 bytes, which fp32 rows of 16 elements do.
_BATCHED_COLUMNS = 16


@dataclass(frozen=True)
class Truncation:
    """W ≈ U·diag(S)·Vᵀ of rank r, the least in ‖W − U·diag(S)·Vᵀ‖² to within `info["excess"]`.

    Attributes:
        U: (out, r) and V: (in, r), orthonormal columns, zero where W's rank is less; fp32 or fp64.
        S: (r,), largest first.
        info: `reads` of W, `excess` (estimated (loss − minimum) / max(minimum, 1e-6·‖W‖²)),
            `converged` and `seconds` (of the whole group).
    """

    U: Tensor
    S: Tensor
    V: Tensor
    info: dict[str, Any]


def truncate(
    weights: Sequence[Tensor],
    ranks: Sequence[int],
    generators: Sequence[torch.Generator],
    energies: Sequence[float],
    tol: float = 1e-4,
    max_reads: int = 30,
    advance: Callable[[int], None] | None = None,
) -> list[Truncation]:
    """The leading r singular triplets of every weight, each as exactly as `tol` asks.

    A layer is done when its estimated excess is at most `tol`. The estimate extrapolates the
    captured energy Σ S² geometrically from its last gains.

    Args:
        weights: W (outᵢ, inᵢ), any float dtypes, read in place.
        ranks: rᵢ ≤ min(outᵢ, inᵢ).
        generators: on the CPU, one per weight; decide the random starts.
        energies: ‖W‖²_F of each.
        tol: of (loss − minimum) / max(minimum, 1e-6·‖W‖²).
        max_reads: where to give up; `info["converged"]` is then False.
        advance: told of each layer that is done, by its index.
    """
    began = time.perf_counter()

    def begin(indices: Sequence[int]) -> _Batch:
        return _Batch(
            indices,
            [weights[i] for i in indices],
            ranks[indices[0]],
            [generators[i] for i in indices],
            [energies[i] for i in indices],
        )

    def run(batches: list[_Batch]) -> dict[int, Truncation]:
        return _iterate(batches, tol, max_reads, advance)

    alike = _alike(weights, ranks)
    on_cpu = all(weight.device.type == "cpu" for weight in weights)
    if on_cpu and len(alike) >= torch.get_num_threads():
        # Each on its own from start to end: no thread waits for another after every read.
        parts = map_layers(
            lambda indices: run([begin(indices)]),
            alike,
            cost=lambda indices: sum(weights[i].numel() for i in indices),
        )
    else:
        parts = [run(map_layers(begin, alike))]
    found = {i: result for part in parts for i, result in part.items()}
    seconds = time.perf_counter() - began
    for truncation in found.values():
        truncation.info["seconds"] = seconds
    return [found[i] for i in range(len(weights))]


def peak_bytes(weight: Tensor, r: int, max_reads: int = 30) -> int:
    """Memory beyond the weight that `truncate` takes for a layer at most.

    A block a read in the basis of one side, its products in fp64, and as much room again while
    these grow.
    """
    rows, itemsize = _width(weight, r) * -(-max_reads // 2), product_dtype(weight).itemsize
    return 2 * rows * sum(weight.shape) * (itemsize + 8)


def _width(weight: Tensor, r: int) -> int:
    """Columns of a block. Wide ones take fewer reads and more operations: for r = 16 on a 2048²
    Gaussian, blocks of 16, 20, 24 and 32 come to 1e-4 in 23, 20, 18 and 15 reads with 368, 400, 432
    and 480 columns of products. On the CPU narrow products are the slow ones; a kernel takes 16
    columns with one read of W, and twice as long for 17.
    """
    width = -(-max(20, 5 * r // 4) // 4) * 4 if weight.device.type == "cpu" else -(-r // 16) * 16
    return min(width, *weight.shape)


def _alike(weights: Sequence[Tensor], ranks: Sequence[int]) -> list[list[int]]:
    """Indices of layers that can be one batch; on the CPU, as many batches as there are threads."""
    classes: dict[Any, list[int]] = defaultdict(list)
    for i, (weight, r) in enumerate(zip(weights, ranks, strict=True)):
        alone = weight.device.type == "cpu" and any(n % _BATCHED_COLUMNS for n in weight.shape)
        key = tuple(weight.shape), r, product_dtype(weight), weight.device, i if alone else None
        classes[key].append(i)
    batches = []
    for (*_, device, _), indices in classes.items():
        parts = torch.get_num_threads() if device.type == "cpu" else 1
        size = -(-len(indices) // parts)
        batches += [indices[k : k + size] for k in range(0, len(indices), size)]
    return batches


def _iterate(
    batches: list[_Batch], tol: float, max_reads: int, advance: Callable[[int], None] | None
) -> dict[int, Truncation]:
    """Read all weights of the batches in step until every layer is done; results by index."""
    found: dict[int, Truncation] = {}
    while batches:
        operands = [operand for batch in batches for operand in batch.operands()]
        group, A, B = (list(column) for column in zip(*operands, strict=True))
        products = iter(dual_project(group, A, B))
        pairs = [[next(products) for _ in batch.weights] for batch in batches]
        finished = map_layers(
            lambda item: item[0].advance(item[1], tol, max_reads),
            list(zip(batches, pairs, strict=True)),
        )
        for done in finished:
            found |= done
            for index in done:
                if advance:
                    advance(index)
        batches = [batch for batch in batches if batch.indices]
    return found


class _Rows:
    """A batch of matrices that grow by rows, with room for the next ones."""

    def __init__(self, batch: int, columns: int, like: Tensor, dtype: torch.dtype):
        self._buffer = like.new_empty(batch, 0, columns, dtype=dtype)
        self._count = 0

    @property
    def all(self) -> Tensor:
        return self._buffer[:, : self._count]

    def append(self, rows: Tensor) -> None:
        end = self._count + rows.shape[1]
        if end > self._buffer.shape[1]:
            batch, _, columns = self._buffer.shape
            grown = self._buffer.new_empty(batch, end + end // 2, columns)
            grown[:, : self._count] = self.all
            self._buffer = grown
        self._buffer[:, self._count : end] = rows
        self._count = end

    def drop(self, move: _Move) -> None:
        self._buffer = move(self._buffer)


class _Side:
    """An orthonormal basis Q of one side of every W, and its products (W Q, or Wᵀ Q on the left).

    The products are kept in fp64: their Gram matrix says how much of ‖W‖² the basis captures, and
    differences of that are what convergence is judged by.
    """

    def __init__(self, batch: int, size: int, others: int, like: Tensor, dtype: torch.dtype):
        self.basis = _Rows(batch, size, like, dtype)
        self.products = _Rows(batch, others, like, torch.float64)
        self.gram = like.new_empty(batch, 0, 0, dtype=torch.float64)

    def extend(self, rows: Tensor) -> None:
        """The next block: what the rows hold outside the basis."""
        self.block = _orthonormal(rows, self.basis.all)
        self.basis.append(self.block)

    def absorb(self, products: Tensor) -> None:
        """Take in the block's products (batch, b, others)."""
        new = products.to(torch.float64)
        self.products.append(new)
        cross = self.products.all @ new.mT
        batch, k, width = self.gram.shape[0], self.gram.shape[1], new.shape[1]
        gram = self.gram.new_empty(batch, k + width, k + width)
        gram[:, :k, :k] = self.gram
        gram[:, :, k:] = cross
        gram[:, k:, :k] = cross[:, :k].mT
        self.gram = gram

    def drop(self, move: _Move) -> None:
        self.basis.drop(move)
        self.products.drop(move)
        self.gram = move(self.gram)


class _Batch:
    """The iteration for layers of one shape and rank. Everything tall is kept transposed: its rows
    are contiguous.
    """

    def __init__(
        self,
        indices: Sequence[int],
        weights: Sequence[Tensor],
        r: int,
        generators: Sequence[torch.Generator],
        energies: Sequence[float],
    ):
        self.indices, self.weights, self.r = list(indices), list(weights), r
        self.energies = list(energies)
        dtype, like, batch = product_dtype(weights[0]), weights[0], len(weights)
        out_features, in_features = like.shape
        self.reads = 0
        self.captured: list[Tensor] = []
        self.right = _Side(batch, in_features, out_features, like, dtype)
        self.left = _Side(batch, out_features, in_features, like, dtype)
        self.right.extend(_start(generators, _width(like, r), in_features, like.device).to(dtype))

    @property
    def swapped(self) -> bool:
        """Whether the last read was of the right side's block: V is near, U far."""
        return self.reads % 2 == 1

    def operands(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What `dual_project` is to read next: W X, and nothing of Yᵀ W; or the other way round."""
        side = self.left if self.swapped else self.right
        for weight, block in zip(self.weights, side.block, strict=True):
            out_features, in_features = weight.shape
            if self.swapped:
                yield weight, block.new_empty(0, in_features), block.T
            else:
                yield weight, block, block.new_empty(out_features, 0)

    def advance(
        self, pairs: Sequence[tuple[Tensor, Tensor]], tol: float, max_reads: int
    ) -> dict[int, Truncation]:
        """Take in a read, and make the next block of what is not done; what is, by index."""
        self.reads += 1
        self.products = torch.stack([WX.T if self.swapped else YW for WX, YW in pairs])
        side, other = (self.right, self.left) if self.swapped else (self.left, self.right)
        side.absorb(self.products)
        if self.reads > 1:
            self.captured.append(torch.linalg.eigvalsh(side.gram)[:, -self.r :].sum(1))
        done = self._finish(tol, max_reads)
        if self.indices:
            other.extend(self.products)  # their part outside its basis
        return done

    def _finish(self, tol: float, max_reads: int) -> dict[int, Truncation]:
        """Take the layers that are done out of the batch; their results by index."""
        if self.reads < _MIN_READS:
            return {}
        recent = torch.stack(self.captured[-_GAINS - 1 :], 1).tolist()  # where the host waits
        excesses = [_excess(*member) for member in zip(recent, self.energies, strict=True)]
        done = [m for m, x in enumerate(excesses) if x <= tol or self.reads >= max_reads]
        results = {}
        if done:
            for m, factors in zip(done, self._factors(done), strict=True):
                info = {"reads": self.reads, "excess": excesses[m], "converged": excesses[m] <= tol}
                results[self.indices[m]] = Truncation(*factors, info)
            self._drop(done)
        return results

    def _drop(self, done: Sequence[int]) -> None:
        """Go on without these members, whose places the last ones take."""
        count = len(self.indices) - len(done)
        places = [member for member in done if member < count]
        movers = sorted(set(range(count, len(self.indices))) - set(done))
        columns: list[list[Any]] = [self.indices, self.weights, self.energies]
        for column in columns:
            for place, mover in zip(places, movers, strict=True):
                column[place] = column[mover]
            del column[count:]
        if count == 0:
            return
        at = torch.tensor([places, movers], dtype=torch.int64, device=self.products.device)
        move = _Move(count, *at)
        self.products = move(self.products)
        self.captured = [move(captured) for captured in self.captured]
        for side in (self.right, self.left):
            side.drop(move)

    def _factors(self, members: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(U, S, V) by Rayleigh–Ritz on the last side: W ≈ Q P (Wᵀ Q P)ᵀ, P the eigenvectors."""
        side = self.right if self.swapped else self.left
        chosen = torch.tensor(members, device=side.gram.device)
        _, vectors = torch.linalg.eigh(side.gram[chosen])
        P = vectors[:, :, -side.block.shape[1] :].flip(2).mT.contiguous()
        basis = side.basis.all[chosen]
        dtype = basis.dtype
        near = (P.to(dtype) @ basis)[:, : self.r]
        far = (P @ side.products.all[chosen])[:, : self.r]
        S = torch.linalg.vector_norm(far, dim=2)
        # Exactly zero beyond W's rank, instead of normalised noise.
        S = torch.where(torch.finfo(dtype).eps * S.amax(1, keepdim=True) < S, S, 0)
        far = torch.where(S[:, :, None] > 0, far / S[:, :, None], 0).to(dtype)
        U, V = (x.mT.contiguous() for x in ((far, near) if self.swapped else (near, far)))
        return list(zip(U, S.to(dtype), V, strict=True))


@dataclass(frozen=True)
class _Move:
    """What is left of a batch when members leave it: the first `count` places, to some of which
    others moved. Overwrites what it is called with.
    """

    count: int
    places: Tensor
    movers: Tensor

    def __call__(self, batch: Tensor) -> Tensor:
        return batch.index_copy_(0, self.places, batch[self.movers])[: self.count]


def _start(
    generators: Sequence[torch.Generator], width: int, size: int, device: torch.device
) -> Tensor:
    """Random blocks (generators, width, size), uniform in ±2³¹, fp32, the same on every device.

    SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) of a counter that each generator starts: normal
    numbers drawn on the host and copied took longer than all reads of a GPU.
    """
    # Explicit, because users change torch's default device.
    first = [
        torch.empty(1, 1, dtype=torch.int64, device="cpu").random_(generator=g) for g in generators
    ]
    count = torch.arange(-(-width * size // 2), device=device)
    z = (torch.cat(first).to(device) + count) * -0x61C8864680B583EB
    z = (z ^ (z >> 30)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27)) * -0x6B2FB644ECCEEE15
    words = (z ^ (z >> 31)).view(torch.int32)[:, : width * size]
    return words.reshape(-1, width, size).to(torch.float32)


def _excess(captured: Sequence[float], energy: float) -> float:
    """Estimated (loss − minimum) / max(minimum, FLOOR·‖W‖²); see `truncate`."""
    gains = [max(now - last, 0.0) for last, now in pairwise(captured)]
    *before, p, q = (min(now / last if last else 0.0, 0.95) for last, now in pairwise(gains))
    # The two sides' reads can gain unevenly: the gains to come follow the last two ratios in turn.
    # Where only two ratios are known, or they do not go up and down, the last one alone may say
    # more. Of 1,918 stops on 25 weights, ranks 1 to 32, tol 1e-2 to 1e-5, 43 were above tol, 14 by
    # more than a quarter (36 and 13 without the ratio before the last two, but then 36 estimates
    # and not 26 are more than 5 times too high). Convergence speeds up: the median is 1.5 times.
    if before and before[0] > p < q:
        p = min(p * max(0.5, q / before[0]), 0.95)
        missing = gains[-1] * p * (1 + q) / (1 - p * q)
    else:
        missing = gains[-1] * max(p * (1 + q) / (1 - p * q), q / (1 - q))
    return missing / max(energy - captured[-1] - missing, FLOOR * energy, 1e-300)


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """The rows' parts outside the basis's rows, orthonormalised: projection and Cholesky-QR, twice.

    Rows without a direction of their own (W of low rank, a basis that is complete) become zero. The
    Gram matrix is taken in fp64 with unit diagonal: what is left of an fp32 block is then never
    singular to its shift, so no retry is needed and the host need not look at the data.

    Args:
        block: (batch, b, n).
        basis: (batch, k, n), orthonormal rows or zero ones.
    """
    scale = torch.linalg.vector_norm(block, dim=2, dtype=torch.float64).amax(1, keepdim=True)
    unit = torch.eye(block.shape[1], dtype=torch.float64, device=block.device)
    for _ in range(2):
        if basis.shape[1]:
            block = block - (block @ basis.mT) @ basis
        norms = torch.linalg.vector_norm(block, dim=2, dtype=torch.float64)
        kept = norms > _NOISE * scale
        inverse = torch.where(kept, 1 / norms, 0)
        exact = block.to(torch.float64)
        gram = (exact @ exact.mT) * inverse[:, :, None] * inverse[:, None]
        gram.diagonal(dim1=1, dim2=2).fill_(1 + 1e-13)
        L, _ = torch.linalg.cholesky_ex(gram)
        kept = kept & (L.diagonal(dim1=1, dim2=2) * norms > _NOISE * scale)
        to_orthonormal = torch.linalg.solve_triangular(L, unit, upper=False) * inverse[:, None]
        block = torch.where(kept[:, :, None], to_orthonormal, 0).to(block.dtype) @ block
        scale = scale.new_ones(())
    return block
