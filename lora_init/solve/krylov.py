"""The best rank-r approximations of a ragged group of layers in about ten reads of their weights.

Randomised block Krylov iteration (Musco & Musco, arXiv 1504.05477) as block Golub–Kahan with full
re-orthogonalisation: from an orthonormal block X (in, b), W X gives the next block Y (out, b), Wᵀ Y
the next X, each orthogonalised against all earlier ones of its side. Every read of W is half a
step, and the result can be taken from either side, after any read.

The symmetric dilation [[0, W], [Wᵀ, 0]], which advances two chains with each read, was measured
against it: on the MiniLM q/v matrices, r = 8, blocks of 12 on both sides take 8.4 reads to an
excess of 1e-4 and a single chain of blocks of 24 takes 8.3, so it gains nothing for its columns,
while narrow products are the slower ones and both sides want orthogonalising at every read.

Layers of one shape and rank go through everything but the reads as one batch. The eigenproblems of
their small Gram matrices are LAPACK's on every device, one matrix at a time: the eigenvalues of 64
matrices of 48 to 96 columns take an H200 18 to 39 ms, since cuSOLVER loops, and one core of a CPU 3
to 14 ms.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_init.ops.dual_project import dual_project, product_dtype
from lora_init.parallel import Map, map_layers, map_nested

T = TypeVar("T")

# Excess is measured against the optimum, or against this part of ‖W‖² where that is more: products
# in fp32 resolve no finer, and nothing that is stored needs it.
FLOOR = 1e-6
# The extrapolation takes three gains of captured energy, or four where there are; the first is of a
# random start.
_MIN_READS = 5
_GAINS = 4
# An estimate has to be so far below the tolerance, because it can be too low. Of 2,560 stops on 32
# weights, ranks 1 to 32, tol 1e-2 to 1e-5, blocks as on the CPU and as on a GPU, 58 were above tol
# without it, 28 by more than a quarter, and 21 and 8 with it, none at 1e-4; for 0.14 reads more.
_MARGIN = 1.3
# A row this much shorter than its block was before is rounding noise, not a new direction.
_NOISE = 1e-5
# A batched product on the CPU gives the bits of its matrices one at a time where all lie at
# addresses that are multiples of 64 bytes, which fp32 rows of 16 elements do.
_BATCHED_COLUMNS = 16
# cuBLAS picks a product's kernel, and with it its bits, by the number of matrices too: on a GPU
# every call has so many, zeros where layers are missing.
_SLOTS = 32


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

    A layer is done when its estimated excess is safely at most `tol`. The estimate extrapolates the
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
            max_reads,
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
    these grow. On a GPU the layers of a shape are filled up to a multiple of 32 by empty ones,
    which take as much.
    """
    rows, itemsize = _most_rows(weight, r, max_reads), product_dtype(weight).itemsize
    return 2 * rows * sum(weight.shape) * (itemsize + 8)


def _most_rows(weight: Tensor, r: int, max_reads: int) -> int:
    """Of a side's basis."""
    return _width(weight, r) * -(-max_reads // 2)


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
        pairs = [[next(products) for _ in batch.live] for batch in batches]
        finished = map_nested(
            lambda item, spread: item[0].advance(item[1], tol, max_reads, spread),
            list(zip(batches, pairs, strict=True)),
        )
        for done in finished:
            found |= done
            for index in done:
                if advance:
                    advance(index)
        batches = [batch for batch in batches if batch.live]
    return found


class _Rows:
    """A batch of matrices that grow by rows, with room for the next ones."""

    def __init__(self, batch: int, columns: int, like: Tensor, dtype: torch.dtype, most: int):
        # What nobody has written to takes no memory on the CPU.
        room = most if like.device.type == "cpu" else 0
        self._buffer = like.new_empty(batch, room, columns, dtype=dtype)
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
        move(self.all)
        self._buffer = self._buffer[: move.count]


class _Side:
    """An orthonormal basis Q of one side of every W, and its products (W Q, or Wᵀ Q on the left).

    The products are kept in fp64: their Gram matrix says how much of ‖W‖² the basis captures, and
    differences of that are what convergence is judged by. Between blocks that are not neighbours it
    is zero but for rounding; without these entries σ = 1e4, 3e3, 1, … of r = 4 came to an excess of
    3e-3 instead of 1e-7.
    """

    def __init__(
        self, batch: int, size: int, others: int, like: Tensor, dtype: torch.dtype, most: int
    ):
        self.basis = _Rows(batch, size, like, dtype, most)
        self.products = _Rows(batch, others, like, torch.float64, most)
        self._gram = torch.empty(batch, 0, 0, dtype=torch.float64, device="cpu")
        self._pending: list[Tensor] = []

    def extend(self, rows: Tensor) -> None:
        """The next block: what the rows hold outside the basis."""
        self.block = _orthonormal(rows, self.basis.all)
        self.basis.append(self.block)

    def absorb(self, products: Tensor) -> None:
        """Take in the block's products (batch, b, others)."""
        self.products.append(products)
        new = self.products.all[:, -products.shape[1] :]
        # The new rows on the left: 1.7 times as fast in MKL as on the right.
        self._pending.append(_matmul(new, self.products.all.mT))

    def gram(self, slot: int, k: int) -> Tensor:
        """The first k products' (k, k) Gram matrix, on the host, its upper triangle only."""
        for rows in self._pending:
            batch, width, end = rows.shape
            if end > self._gram.shape[1]:
                grown = self._gram.new_empty(batch, 2 * end, 2 * end)
                grown[:, : end - width, : end - width] = self._gram[:, : end - width, : end - width]
                self._gram = grown
            self._gram[:, :end, end - width : end] = rows.cpu().mT  # waits for the device
        self._pending.clear()
        return self._gram[slot, :k, :k]

    def drop(self, move: _Move) -> None:
        self.basis.drop(move)
        self.products.drop(move)
        self._gram = move(self._gram)


class _Batch:
    """The iteration for layers of one shape and rank. Everything tall is kept transposed: its rows
    are contiguous.

    A layer has a slot, the same place in every tensor; `live` are the slots of those not done. The
    number of slots is a multiple of `step`, the rest are zeros.
    """

    def __init__(
        self,
        indices: Sequence[int],
        weights: Sequence[Tensor],
        r: int,
        generators: Sequence[torch.Generator],
        energies: Sequence[float],
        max_reads: int,
    ):
        dtype, like = product_dtype(weights[0]), weights[0]
        self.r, self.reads = r, 0
        self.step = _step(like.device)
        self.live = list(range(len(weights)))
        self.indices, self.weights, self.energies = list(indices), list(weights), list(energies)
        self.captured: list[list[float]] = [[] for _ in weights]
        slots = self._slots()
        out_features, in_features = like.shape
        most = _most_rows(like, r, max_reads)
        self.right = _Side(slots, in_features, out_features, like, dtype, most)
        self.left = _Side(slots, out_features, in_features, like, dtype, most)
        start = like.new_zeros(slots, _width(like, r), in_features, dtype=dtype)
        start[: len(weights)] = _start(generators, start.shape[1], in_features, like.device)
        self.right.extend(start)

    def _slots(self) -> int:
        """As many as the live layers need."""
        return -(-len(self.live) // self.step) * self.step

    @property
    def swapped(self) -> bool:
        """Whether the last read was of the right side's block: V is near, U far."""
        return self.reads % 2 == 1

    def operands(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What `dual_project` is to read next: W X, and nothing of Yᵀ W; or the other way round."""
        out_features, in_features = self.weights[0].shape
        blocks = (self.left if self.swapped else self.right).block
        if self.swapped:
            none, columns = blocks.new_empty(0, in_features), blocks.mT.unbind()
            yield from ((self.weights[slot], none, columns[slot]) for slot in self.live)
        else:
            none, rows = blocks.new_empty(out_features, 0), blocks.unbind()
            yield from ((self.weights[slot], rows[slot], none) for slot in self.live)

    def advance(
        self, pairs: Sequence[tuple[Tensor, Tensor]], tol: float, max_reads: int, spread: Map
    ) -> dict[int, Truncation]:
        """Take in a read, and make the next block of what is not done; what is, by index.

        Args:
            pairs: what `dual_project` returned for `operands`.
            spread: a `map` for the layers' eigenproblems.
        """
        self.reads += 1
        side, other = (self.right, self.left) if self.swapped else (self.left, self.right)
        products = [WX.T if self.swapped else YW for WX, YW in pairs]
        slots = [torch.zeros_like(products[0])] * side.block.shape[0]
        for slot, product in zip(self.live, products, strict=True):
            slots[slot] = product
        self.products = torch.stack(slots)
        side.absorb(self.products)
        done = self._finish(tol, max_reads, spread) if self.reads >= _MIN_READS else {}
        if self.live:
            other.extend(self.products)  # their part outside its basis
        return done

    def _finish(self, tol: float, max_reads: int, spread: Map) -> dict[int, Truncation]:
        """Take the layers that are done out of the batch; their results by index."""
        # What was captured is asked for from the first check on: the reads before wait for nothing.
        reads = range(2, self.reads + 1) if self.reads == _MIN_READS else [self.reads]
        grams = [self._gram(slot, read) for slot in self.live for read in reads]
        captured = iter(_each(partial(_captured, r=self.r), grams, spread))
        for slot in self.live:
            kept = self.captured[slot] + [next(captured) for _ in reads]
            self.captured[slot] = kept[-_GAINS - 1 :]
        excesses = {s: _excess(self.captured[s], self.energies[s]) for s in self.live}
        done = [s for s in self.live if _MARGIN * excesses[s] <= tol or self.reads >= max_reads]
        results = {}
        if done:
            for s, factors in zip(done, self._factors(done, spread), strict=True):
                info = {"reads": self.reads, "excess": excesses[s], "converged": excesses[s] <= tol}
                results[self.indices[s]] = Truncation(*factors, info)
            self._drop(done)
        return results

    def _gram(self, slot: int, read: int) -> Tensor:
        """Of what that read's side had then."""
        side = self.right if read % 2 == 1 else self.left
        return side.gram(slot, side.block.shape[1] * ((read + 1) // 2))

    def _drop(self, done: Sequence[int]) -> None:
        """Go on without these layers; where that leaves slots to spare, the last ones move."""
        self.live = [slot for slot in self.live if slot not in done]
        count = self._slots()
        if count in (0, self.products.shape[0]):
            return
        movers = [slot for slot in self.live if slot >= count]
        places = [slot for slot in range(count) if slot not in self.live][: len(movers)]
        columns: list[list[Any]] = [self.indices, self.weights, self.energies, self.captured]
        for column in columns:
            for place, mover in zip(places, movers, strict=True):
                column[place] = column[mover]
            del column[count:]
        self.live = sorted({*self.live, *places} - {*movers})
        move = _Move(count, places, movers)
        self.products = move(self.products)
        for side in (self.right, self.left):
            side.drop(move)

    def _factors(self, done: Sequence[int], spread: Map) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(U, S, V) by Rayleigh–Ritz on the last side: W ≈ Q P (Wᵀ Q P)ᵀ, P the eigenvectors."""
        side = self.right if self.swapped else self.left
        width = side.block.shape[1]
        grams = [self._gram(slot, self.reads) for slot in done]
        vectors = _each(partial(_leading, count=width), grams, spread)
        # With the slots that share a call with them.
        calls = {slot // self.step for slot in done}
        slots = [slot for slot in range(len(self.products)) if slot // self.step in calls]
        at = [slots.index(slot) for slot in done]
        P = torch.zeros(len(slots), *vectors[0].shape, dtype=torch.float64, device="cpu")
        P[at] = torch.stack(vectors)
        P = P.to(self.products.device)
        chosen = torch.tensor(slots, device=P.device)
        basis = side.basis.all[chosen]
        dtype = basis.dtype
        near = _matmul(P.to(dtype), basis)
        far = _matmul(P, side.products.all[chosen])
        S = _matmul(far, far.mT).diagonal(dim1=1, dim2=2).sqrt()
        # Exactly zero beyond W's rank, instead of normalised noise.
        S = torch.where(torch.finfo(dtype).eps * S.amax(1, keepdim=True) < S, S, 0)
        far = torch.where(S[:, :, None] > 0, far / S[:, :, None], 0).to(dtype)
        U, V = (
            x[:, : self.r].mT.contiguous() for x in ((far, near) if self.swapped else (near, far))
        )
        S = S[:, : self.r].to(dtype)
        return [(U[i], S[i], V[i]) for i in at]


@dataclass(frozen=True)
class _Move:
    """What is left of a batch when slots are given up: the first `count`, to some of which others
    moved. Overwrites what it is called with.
    """

    count: int
    places: list[int]
    movers: list[int]

    def __call__(self, batch: Tensor) -> Tensor:
        if self.movers:
            batch[self.places] = batch[self.movers]
        return batch[: self.count]


def _step(device: torch.device) -> int:
    """Matrices in a batched product, of which a batch has slots for a multiple."""
    return 1 if device.type == "cpu" else _SLOTS


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of batches, in calls of so many matrices that no bit depends on the batch."""
    step = _step(a.device)
    if step == 1:
        return a @ b
    parts = zip(a.split(step), b.split(step), strict=True)
    return torch.cat([torch.bmm(*part) for part in parts])


def _each(function: Callable[[Tensor], T], matrices: Sequence[Tensor], spread: Map) -> list[T]:
    """The function of every matrix, four at a time: handing one to a thread takes as long as it."""
    parts = [matrices[i : i + 4] for i in range(0, len(matrices), 4)]
    return list(chain.from_iterable(spread(lambda part: [function(m) for m in part], parts)))


def _captured(gram: Tensor, r: int) -> float:
    """Sum of the r largest eigenvalues."""
    return sum(torch.linalg.eigvalsh(gram, UPLO="U").tolist()[-r:])


def _leading(gram: Tensor, count: int) -> Tensor:
    """(count, k): the leading eigenvectors, the first one first."""
    return torch.linalg.eigh(gram, UPLO="U")[1][:, -count:].flip(1).mT


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
    # more. Without the ratio before the last two 36 of 1,918 estimates and not 26 were more than 5
    # times too high. Convergence speeds up: the median is 1.5 times.
    if before and before[0] > p < q:
        p = min(p * max(0.5, q / before[0]), 0.95)
        missing = gains[-1] * p * (1 + q) / (1 - p * q)
    else:
        missing = gains[-1] * max(p * (1 + q) / (1 - p * q), q / (1 - q))
    return missing / max(energy - captured[-1] - missing, FLOOR * energy, 1e-300)


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """The rows' parts outside the basis's rows, orthonormalised: projection and Cholesky-QR, twice.

    W X has parts in the last block of its side's basis, and but for rounding in no earlier one (the
    Golub–Kahan recurrence): the first pass takes these out, the second what rounding left anywhere.
    Rows without a direction of their own (W of low rank, a basis that is complete) become zero. The
    Gram matrix is taken in fp64 with unit diagonal: what is left of an fp32 block is then never
    singular to its shift, so no retry is needed and the host need not look at the data.

    Args:
        block: (batch, b, n).
        basis: (batch, k, n), orthonormal rows or zero ones.
    """
    unit = torch.eye(block.shape[1], dtype=torch.float64, device=block.device)
    for near in (basis[:, -block.shape[1] :], basis):
        parts = _matmul(block, near.mT)
        block = block - _matmul(parts, near)
        exact = block.to(torch.float64)
        gram = _matmul(exact, exact.mT)
        squares = gram.diagonal(dim1=1, dim2=2)
        norms = squares.sqrt()
        # Of the longest row as it was before: Pythagoras spares another pass over the block.
        before = (squares + parts.to(torch.float64).square().sum(2)).sqrt()
        noise = _NOISE * before.amax(1, keepdim=True)
        inverse = torch.where(norms > noise, 1 / norms, 0)
        gram = gram * inverse[:, :, None] * inverse[:, None]
        gram.diagonal(dim1=1, dim2=2).fill_(1 + 1e-13)
        L, _ = torch.linalg.cholesky_ex(gram)
        kept = L.diagonal(dim1=1, dim2=2) * norms > noise
        to_orthonormal = torch.linalg.solve_triangular(L, unit, upper=False) * inverse[:, None]
        block = _matmul((to_orthonormal * kept[:, :, None]).to(block.dtype), block)
    return block
