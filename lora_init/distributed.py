"""Layers over the ranks of a torch.distributed job: who does what, and one error for all of them.

Everything that is exchanged is small and lives on the CPU, so it goes through a gloo group whatever
the job's own backend is.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lora_init.factors import LoraInitError

T = TypeVar("T")

# How long ranks wait for one another. Solving takes as long as it takes, and one that died closes
# its connection, which the others see at once.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work; alone by default.

    Methods that exchange must be called on every rank, in the same order.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def owners(self, costs: Sequence[int]) -> list[int]:
        """The rank of every item: costliest first, each to the rank with the least to do."""
        loads = [(0, rank) for rank in range(self.size)]
        owner = [0] * len(costs)
        for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
            load, rank = heapq.heappop(loads)
            owner[item] = rank
            heapq.heappush(loads, (load + costs[item], rank))
        return owner

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank.

        Raises:
            LoraInitError: another process of the job is gone.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with alive():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite a dense CPU tensor with that of rank `source`; raises as `gather` does."""
        if self.size > 1:
            with alive():
                dist.broadcast(tensor, group=self.group, group_src=source)

    def agree(self, description: Mapping[str, str], way_out: str) -> None:
        """Raises `LoraInitError` on every rank, naming the first entry that differs between ranks,
        unless all gave the same description.
        """
        first, *others = self.gather(dict(description))
        for rank, other in enumerate(others, start=1):
            for what in [*first, *(what for what in other if what not in first)]:
                one, two = first.get(what, "missing"), other.get(what, "missing")
                if one != two:
                    raise LoraInitError(
                        f"{what} is {one} on rank 0 and {two} on rank {rank}: {way_out}"
                    )

    def together(self, function: Callable[[], T]) -> T:
        """function(), after which all ranks go on or all raise.

        Raises:
            LoraInitError: it failed on another rank. The rank itself raises its own exception.
        """
        failure: Exception | None = None
        result: Any = None
        try:
            result = function()
        except Exception as error:
            failure = error
        messages = self.gather(failure and (str(failure) or repr(failure)))
        try:
            if failure:
                raise failure
        finally:
            # It holds this frame, which holds it: a cycle that would keep the group, with gloo's
            # threads, until the interpreter ends, and one of these that lets go of a tensor then
            # aborts the process.
            del failure
        for rank, message in enumerate(messages):
            if message:
                raise LoraInitError(f"rank {rank}: {message}")
        return result

    def once(self, function: Callable[[], T]) -> T:
        """What function() gives on rank 0, on every rank; raises as `together` does."""
        result = self.together(lambda: function() if self.rank == 0 else None)
        return self.gather(result)[0]  # type: ignore[return-value]  # None comes from others only


@contextmanager
def ranks(shared: bool = True) -> Iterator[Ranks]:
    """The ranks of the torch.distributed job that this process is in; this one alone if it is in
    none, or if not `shared`.
    """
    if not (shared and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield Ranks()
        return
    group = dist.group.WORLD
    own = dist.get_backend() != dist.Backend.GLOO
    if own:
        group = dist.new_group(backend=dist.Backend.GLOO, timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        if own:
            dist.destroy_process_group(group)


@contextmanager
def alive() -> Iterator[None]:
    """Around what the ranks do at once.

    Raises:
        LoraInitError: another process is gone.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too
        raise
    except RuntimeError as error:  # gloo: the connection was closed by its peer
        raise LoraInitError(
            f"another process of this job is gone or does not answer ({error}): see its own "
            f"message, and start the job again"
        ) from error
