"""CPU work split by item, one thread each, so that no bit depends on how many threads there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
S = TypeVar("S")
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


def map_layers(
    function: Callable[[T], S],
    items: Sequence[T],
    cost: Callable[[T], int] | None = None,
) -> list[S]:
    """[function(item) for item in items] in a pool of single-threaded workers, without autograd;
    costliest first.
    """
    return map_nested(lambda item, _: function(item), items, cost)


def map_nested(
    function: Callable[[T, Map], S],
    items: Sequence[T],
    cost: Callable[[T], int] | None = None,
) -> list[S]:
    """Like `map_layers` for function(item, inner), where `inner` is a `map` for the item's own
    independent parts.

    `inner` runs in parallel where there are fewer items than threads, and is the builtin `map`
    otherwise.
    """

    # Both modes are per thread: the caller's do not reach the workers, and what was made in
    # inference mode can only be written in it. It sets the grad mode too, so it comes first.
    inference = torch.is_inference_mode_enabled()
    # So is the stream that work on a GPU goes to.
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def detached(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with torch.inference_mode(inference), torch.no_grad(), torch.cuda.stream(stream):
                return call(*args)

        return run

    with single_threaded() as threads:
        lanes = threads // max(1, len(items))
        order = (
            sorted(range(len(items)), key=lambda i: -cost(items[i])) if cost else range(len(items))
        )
        if threads == 1 or not items:
            results = {i: detached(function)(items[i], map) for i in order}
            return [results[i] for i in range(len(items))]
        parts = _pool("parts", lanes * len(items)) if lanes > 1 else None

        def spread(call: Callable[[Any], Any], its_parts: Iterable[Any]) -> Iterable[Any]:
            assert parts is not None
            return parts.map(detached(call), its_parts)

        inner: Map = spread if parts else map
        outer = _pool("items", threads)
        # In a copy of the caller's context, so that `with backend(...)` reaches the workers.
        futures = {
            i: outer.submit(copy_context().run, detached(function), items[i], inner) for i in order
        }
        try:
            return [futures[i].result() for i in range(len(items))]
        finally:
            for future in futures.values():
                future.cancel()
            wait(futures.values())


def values(scalars: Sequence[Tensor]) -> list[float]:
    """The numbers in 0-d tensors. The host waits once for each device, not for each tensor."""
    found = [0.0] * len(scalars)
    for device in {scalar.device for scalar in scalars}:
        at = [i for i, scalar in enumerate(scalars) if scalar.device == device]
        for i, number in zip(at, torch.stack([scalars[i] for i in at]).tolist(), strict=True):
            found[i] = number
    return found


@contextmanager
def single_threaded() -> Iterator[int]:
    """One thread for each torch op inside, whatever the caller set; yields the caller's number of
    threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(role: str, workers: int) -> ThreadPoolExecutor:
    """Threads that stay: the first product in a new one costs 1.4 ms. Items and their parts have
    pools of their own, so that an item never waits for a thread that another one holds.
    """
    # A new native thread starts with OpenMP's own default, not with what its parent set.
    return ThreadPoolExecutor(workers, role, initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):  # threads do not outlive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)
