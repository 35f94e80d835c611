"""CPU work split by item, one thread each, so that no bit depends on how many threads there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, TypeVar

import torch

T = TypeVar("T")
S = TypeVar("S")
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


def map_layers(
    function: Callable[[T], S],
    items: Sequence[T],
    cost: Callable[[T], int] | None = None,
    workers: int | None = None,
) -> list[S]:
    """[function(item) for item in items] in a pool of single-threaded workers, without autograd;
    costliest first.

    `workers` bounds the pool. One is the fastest where an item is many operations of a few
    microseconds: between two threads each of them waits for the interpreter's lock.
    """
    return map_nested(lambda item, _: function(item), items, cost, workers)


def map_nested(
    function: Callable[[T, Map], S],
    items: Sequence[T],
    cost: Callable[[T], int] | None = None,
    workers: int | None = None,
) -> list[S]:
    """Like `map_layers` for function(item, inner), where `inner` is a `map` for the item's own
    independent parts.

    `inner` runs in parallel where there are fewer items than threads, and is the builtin `map`
    otherwise.
    """

    # Both modes are per thread: the caller's do not reach the workers, and what was made in
    # inference mode can only be written in it. It sets the grad mode too, so it comes first.
    inference = torch.is_inference_mode_enabled()

    def detached(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with torch.inference_mode(inference), torch.no_grad():
                return call(*args)

        return run

    with single_threaded() as available:
        threads = min(available, workers or available)
        lanes = threads // max(1, len(items))
        order = (
            sorted(range(len(items)), key=lambda i: -cost(items[i])) if cost else range(len(items))
        )
        if threads == 1:
            results = {i: detached(function)(items[i], map) for i in order}
            return [results[i] for i in range(len(items))]
        with _pool(min(threads, len(items))) as outer, _pool(lanes * len(items)) as parts:

            def spread(call: Callable[[Any], Any], its_parts: Iterable[Any]) -> Iterable[Any]:
                return parts.map(detached(call), its_parts)

            inner: Map = spread if lanes > 1 else map
            # In a copy of the caller's context, so that `with backend(...)` reaches the workers.
            futures = {
                i: outer.submit(copy_context().run, detached(function), items[i], inner)
                for i in order
            }
            try:
                return [futures[i].result() for i in range(len(items))]
            finally:
                outer.shutdown(cancel_futures=True)


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


def _pool(workers: int) -> ThreadPoolExecutor:
    # A new native thread starts with OpenMP's own default, not with what its parent set.
    return ThreadPoolExecutor(max(1, workers), initializer=torch.set_num_threads, initargs=(1,))
