"""Layers of a checkpoint, surveyed and solved with few of their weights in memory at a time.

Two passes over the weights: one measures them all (finite values, moments, digests), so that what
cannot be solved is found before an hour of solving and statistics over layers are known; the next
solves them group by group in the order of the files. In both a thread reads on meanwhile, and in
the second another one writes the residual's weight files as soon as their layers are solved.

What is finished is in a `Journal`, from which a later run goes on. Over the ranks of a job each
takes a part of the layers. No bit of a result depends on groups, ranks or interruptions.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lora_init.cache import Cache
from lora_init.checkpoints import WEIGHT_DTYPES, Checkpoint, Target, write_shard
from lora_init.engine import GroupBytes, check_layers, group_limit, pack, solve_group
from lora_init.factors import Factors, LoraInitError
from lora_init.journal import Journal
from lora_init.methods import Layer, Method, Progress
from lora_init.parallel import map_layers
from lora_init.report import LayerReport, bounds_affordable, eckart_young, judge, measure

# A process with torch takes 0.25 GB before it reads a tensor; with this group, what is read ahead
# and the threads' scratch it stays well below 1.5 GB. Larger groups gain nothing on the CPU.
_CPU_GROUP_BYTES = 512 << 20
# Of weights, so that reading never waits for solving to end, or the other way round.
_AHEAD_BYTES = 128 << 20
# Of a thread that measures a layer or writes its residual: row blocks in fp64, and what malloc
# keeps of them.
_SCRATCH_BYTES = 32 << 20


class Stream:
    """The layers of a run on a checkpoint, in the model's order; weights come and go.

    Attributes:
        layers: without their weights; after `survey` they know what was measured.
        ranks: see `Journal`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        targets: Sequence[Target],
        method: Method,
        journal: Journal,
        *,
        r: int,
        seed: int = 0,
        device: torch.device | None = None,
        group_bytes: GroupBytes = "auto",
    ):
        """
        Args:
            group_bytes: layers are solved in groups whose weights and working memory take at most
                so much; "auto" is half of what a GPU has free, and 512 MiB on the CPU. One layer is
                always taken.

        Raises:
            LoraInitError: a weight is stored in a dtype that cannot hold a residual.
        """
        self.checkpoint, self.targets, self.method = checkpoint, targets, method
        self.journal, self.ranks = journal, journal.ranks
        self.device = device or torch.device("cpu")
        self.layers = [_meta_layer(checkpoint, target, r, seed) for target in targets]
        self.limit = group_limit(self.device, group_bytes, _CPU_GROUP_BYTES)
        self.bounds = method.residual and bounds_affordable([x.weight for x in self.layers])
        self._sizes = [x.weight.numel() * x.weight.element_size() for x in self.layers]

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(self._sizes)

    def shares(self, indices: Sequence[int]) -> list[list[int]]:
        """Each rank's part of some layers, about equal in out·in.

        Consecutive in the files: a rank then reads on where it was, and all but a few weight files
        are one rank's alone, which writes them as soon as it has solved them.
        """
        entries = self.checkpoint.entries
        places = [(entries[x.key].shard.name, entries[x.key].offset) for x in self.targets]
        order = sorted(indices, key=lambda i: places[i])
        ends = list(accumulate(self.layers[i].weight.numel() for i in order))
        parts: list[list[int]] = [[] for _ in range(self.ranks.size)]
        for i, end in zip(order, ends, strict=True):
            middle = end - self.layers[i].weight.numel() / 2
            parts[int(self.ranks.size * middle / ends[-1])].append(i)
        return parts

    def groups(self, indices: Sequence[int]) -> list[list[int]]:
        """Consecutive ones of some layers that are solved at once."""
        packed = pack([self._solving_bytes(i) for i in indices], self.limit)
        return [[indices[i] for i in group] for group in packed]

    def peak_bytes(self, groups: Sequence[Sequence[int]]) -> int:
        """Memory that solving these groups takes at most, on top of what the process has: weights
        and work of the largest, what is read ahead, and one layer whose residual is written.
        """
        largest = max((self._sizes[i] for group in groups for i in group), default=0)
        solving = max((sum(map(self._solving_bytes, group)) for group in groups), default=0)
        ahead = max(_AHEAD_BYTES, 2 * largest)
        return solving + ahead + largest + _SCRATCH_BYTES * (torch.get_num_threads() + 1)

    def survey(self) -> None:
        """Measure every layer, unless a run that this one resumes has.

        Raises:
            LoraInitError: see `engine.check_layers`; a shard cannot be read or changed.
        """
        measured = self.journal.once(self.journal.survey)
        if measured is None:
            mine = self.shares(range(len(self.layers)))[self.ranks.rank]
            part = self.journal.together(lambda: self._measure(mine))
            found = {i: x for other in self.ranks.gather(part) for i, x in other.items()}
            measured = [found[i] for i in range(len(self.layers))]
            self.journal.once(lambda: self.journal.save_survey(measured))
        for layer, values in zip(self.layers, measured, strict=True):
            vars(layer).update(values)  # where `Layer` keeps what it has measured

    def solve(
        self,
        groups: Sequence[Sequence[int]],
        resolved: Sequence[dict[str, Any]],
        store: Cache | None,
        progress: bool | None,
        finished: Callable[[int], None],
    ) -> None:
        """Solve this rank's groups of layers into the journal.

        Args:
            resolved: every layer's of `method.resolve`.
            finished: told of every layer that is in the journal, by its index.

        Raises:
            LoraInitError: see `engine.solve_group` and `report.self_check`; a shard cannot be read
                or changed.
        """
        weights = self._read(groups)
        for number, group in enumerate(groups, 1):
            self.journal.stop_if_failed()
            name = self.method.name + (f" {number}/{len(groups)}" if len(groups) > 1 else "")
            self._solve(
                group,
                list(islice(weights, len(group))),
                [resolved[i] for i in group],
                store,
                Progress(name, progress if self.ranks.rank == 0 else False),
            )
            _trim()
            for i in group:
                finished(i)

    def finished(self, index: int) -> tuple[Factors, LayerReport]:
        """Factors as stored and report of a layer that was solved.

        Raises:
            LoraInitError: they are no longer in the journal.
        """
        found = self.journal.layer(index, self.layers[index].name)
        if found is None:
            raise LoraInitError(
                f"{self.layers[index].name}: its factors are gone from {self.journal.directory}: "
                f"let nothing write there, and start again"
            )
        return found

    def residual(self, index: int) -> Tensor:
        """R as it lies in the file, from the finished layer and its weight read once more."""
        target = self.targets[index]
        factors, _ = self.finished(index)
        W = self._on_device(target, self.checkpoint.tensor(target.key))
        A, B = factors.A.to(self.device), factors.B.to(self.device)
        R = Factors(A, B, factors.scaling).residual(W, target.name, out=W)
        return R.T if target.transposed else R

    def _measure(self, indices: Sequence[int]) -> dict[int, dict[str, Any]]:
        # A method that resolves nothing asks for no moments.
        resolves = type(self.method).resolve is not Method.resolve

        def one(layer: Layer) -> dict[str, Any]:
            values: dict[str, Any] = {"digest": layer.digest}
            return values | {"moments": layer.moments} if resolves else values

        def some(group: Sequence[int], layers: list[Layer]) -> list[dict[str, Any]]:
            check_layers(layers, self.method)
            return map_layers(one, layers, cost=lambda layer: layer.weight.numel())

        measured: dict[int, dict[str, Any]] = {}
        packed = pack([self._sizes[i] for i in indices], min(self.limit, _AHEAD_BYTES))
        groups = [[indices[i] for i in group] for group in packed]
        weights = self._read(groups)
        for group in groups:
            self.journal.stop_if_failed()
            values = some(group, list(islice(weights, len(group))))
            measured |= dict(zip(group, values, strict=True))
            _trim()
        return measured

    def _solve(
        self,
        group: Sequence[int],
        layers: list[Layer],
        resolved: Sequence[dict[str, Any]],
        store: Cache | None,
        progress: Progress,
    ) -> None:
        solved = solve_group(layers, self.method, resolved, store, progress)
        stored = [x.to(torch.float32, layer.name) for x, layer in zip(solved, layers, strict=True)]
        reports = measure(layers, stored, self.method.kind)
        judge(reports, layers, self.method.kind, warn=False)
        if self.bounds:
            bounds = eckart_young([x.weight for x in layers], [x.r for x in layers]) or []
            reports = [
                dataclasses.replace(x, bound=b) for x, b in zip(reports, bounds, strict=True)
            ]
        for i, factors, report in zip(group, stored, reports, strict=True):
            self.journal.save_layer(i, factors, report)

    def _read(self, groups: Sequence[Sequence[int]]) -> Iterator[Layer]:
        """The groups' layers with their weights, the next ones read while these are used."""
        indices = [i for group in groups for i in group]
        tensors = _ahead(
            lambda i: self.checkpoint.tensor(self.targets[i].key),
            indices,
            [self._sizes[i] for i in indices],
        )
        for i, tensor in zip(indices, tensors, strict=True):
            yield self.layers[i].with_weight(self._on_device(self.targets[i], tensor))
            del tensor  # or it would stay until the next one is asked for

    def _on_device(self, target: Target, tensor: Tensor) -> Tensor:
        weight = tensor.to(self.device)
        return weight.T if target.transposed else weight

    def _solving_bytes(self, index: int) -> int:
        """Of a layer's weight, and what solving or checking it takes besides."""
        layer = self.layers[index]
        # The bound takes W and LAPACK's copy of it in fp64.
        bound = 2 * 8 * layer.weight.numel() if self.bounds else 0
        return self._sizes[index] + max(self.method.peak_bytes(layer), bound)


class ShardWriter:
    """Weight files of the residual model, written in the background once their layers are finished.

    A file whose unfinished layers are all one rank's is written by that rank, as it finishes them;
    one that waits for none, by some rank at once; the others after `Stream.solve` is through on all
    ranks, in `write_shared`. A context manager: leaving it ends the background thread.
    """

    def __init__(
        self,
        stream: Stream,
        directory: Path,
        shards: Collection[Path],
        shares: Sequence[Sequence[int]],
    ):
        """
        Args:
            shards: the files that are to be written.
            shares: each rank's unfinished layers.
        """
        self.stream, self.directory = stream, directory
        self._members: dict[Path, list[int]] = defaultdict(list)
        for i, target in enumerate(stream.targets):
            self._members[stream.checkpoint.entries[target.key].shard].append(i)
        owner = {i: rank for rank, part in enumerate(shares) for i in part}
        owners = {shard: {owner[i] for i in self._members[shard] if i in owner} for shard in shards}
        self._free = [shard for shard in shards if not owners[shard]]
        self._shared = [shard for shard in shards if len(owners[shard]) > 1]
        self._waiting = {
            shard: {i for i in self._members[shard] if i in owner}
            for shard in shards
            if owners[shard] == {stream.ranks.rank}
        }
        # One thread a product, as everywhere: no bit depends on how many there are.
        self._pool = ThreadPoolExecutor(1, "writer", torch.set_num_threads, (1,))
        self._written: list[Future[None]] = []

    def __enter__(self) -> ShardWriter:
        self._submit(self._mine(self._free))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def finished(self, index: int) -> None:
        """Layer `index` of this rank is in the journal; raises what failed in the background."""
        self._raise()
        shard = self.stream.checkpoint.entries[self.stream.targets[index].key].shard
        waiting = self._waiting.get(shard, set())
        waiting.discard(index)
        if shard in self._waiting and not waiting:
            del self._waiting[shard]
            self._submit([shard])

    def write_shared(self) -> None:
        """Write this rank's part of the files that several ranks had layers of; wait for all."""
        self._submit(self._mine(self._shared))
        for future in self._written:
            future.result()

    def _mine(self, shards: Sequence[Path]) -> list[Path]:
        owners = self.stream.ranks.owners([shard.stat().st_size for shard in shards])
        return [
            s for s, owner in zip(shards, owners, strict=True) if owner == self.stream.ranks.rank
        ]

    def _submit(self, shards: Sequence[Path]) -> None:
        self._written += [self._pool.submit(self._write, shard) for shard in shards]

    def _write(self, shard: Path) -> None:
        stream = self.stream
        residuals = {
            stream.targets[i].key: partial(stream.residual, i) for i in self._members[shard]
        }
        write_shard(stream.checkpoint, shard, self.directory, residuals, stream.journal.scratch)

    def _raise(self) -> None:
        for future in self._written:
            if future.done():
                future.result()


def _meta_layer(checkpoint: Checkpoint, target: Target, r: int, seed: int) -> Layer:
    entry = checkpoint.entries[target.key]
    if entry.dtype not in WEIGHT_DTYPES:
        raise LoraInitError(
            f"{target.name}: its weight is stored as {entry.dtype}, which cannot hold a residual: "
            f"convert the model to bfloat16 or wider"
        )
    weight = torch.empty(entry.shape, dtype=WEIGHT_DTYPES[entry.dtype], device="meta")
    return Layer(target.name, weight.T if target.transposed else weight, r, target.scaling, seed)


def _trim() -> None:
    """Have malloc give back what it keeps of freed memory: with two threads that was 80 MB more
    than a run of 24 layers had in use at any time. Only glibc keeps it, and has this.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _ahead(
    read: Callable[[int], Tensor], items: Sequence[int], sizes: Sequence[int]
) -> Iterator[Tensor]:
    """read(item) for every item, in a thread that has read up to `_AHEAD_BYTES` of what comes next,
    and at least the very next, while the caller works.
    """
    waiting: deque[Future[Tensor]] = deque()
    asked = held = 0
    with ThreadPoolExecutor(1, "reader") as pool:
        try:
            for size in sizes:
                while asked < len(items) and (
                    len(waiting) < 2 or held + sizes[asked] <= _AHEAD_BYTES
                ):
                    waiting.append(pool.submit(read, items[asked]))
                    held += sizes[asked]
                    asked += 1
                held -= size
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
