"""`descend`: Adam or gradient descent on mean((W − B·A)²) for a ragged group, two launches a step.

1. `products` (see `common`) reads W once and leaves partials of W Aᵀ and Bᵀ W.
2. `update` adds them up in order, forms both gradients from the old (A, B), advances both factors,
   and leaves what the next step needs: their Gram matrices by column tile, and the factors packed
   as `products` reads them.

Bytes of a step at 4096², bf16, r = 16 (W: 33.5 MB): partials 8.9 MB (27%; `common.plan` says why
not fewer), packed factors 0.5 MB written and read, parameters and moments 3.1 MB (the floor's own).
The other split, row blocks over the whole width with B's step in the epilogue, writes no partial of
W Aᵀ, but its BᵀW costs 12.5% with 8 programs a layer, 25% with 16, and a program that descends B
holds its tile of W meanwhile.

A group of several dtypes, memory orders or rank classes takes two launches for each.

Steps are counted on the device and read their rates from a table made in fp64 on the host, so that
a CUDA graph of `GRAPH_STEPS` steps is replayed as it is. Layers run together even where groups of
them would fit the L2: with two launches a step it is their latency that small layers wait for (72
of 768² in bf16 on an H200: 94 µs a step together, 110 in three groups of the L2's size).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_init.triton_kernels import common
from lora_init.triton_kernels.common import Plan, Variant

GRAPH_STEPS = 20
"""Divides the 100 steps between two points of a trace of 4,000; 40 launches replayed as one."""
SCHEDULE_STEPS = 4096
"""Rows of the table of rates; more steps are done in several goes."""
_FP16_SCALE = tl.constexpr(16.0)

# A layer as `update` sees it; side 0 is B, side 1 is A.
_LAYER = (
    "params", "m", "v", "r", "size0", "size1",
    "product0", "count0", "product1", "count1",
    "packed0", "width0", "packed1", "width1", "gram0", "gram1", "total0", "total1",
)  # fmt: skip
_FIELDS = tl.constexpr(len(_LAYER))


@triton.jit
def _pack(p, packed, width, i, columns, inside, dtype: tl.constexpr, PARTS: tl.constexpr):
    """(R, T) as the parts that `products` reads.

    Beside an fp16 W at a fixed scale, so that bits do not depend on where a call began: entries
    are kept to 2⁻⁴⁰, and factors beyond 4,094, where a descent has long diverged, overflow.
    """
    x = p
    if dtype == tl.float16:
        x = p * _FP16_SCALE
    for part in tl.static_range(PARTS):
        rounded = x.to(dtype)
        place = packed + (i * PARTS + part).to(tl.int64)[:, None] * width + columns
        tl.store(place, rounded, mask=inside)
        x -= rounded.to(tl.float32)
        if dtype == tl.float16:
            x *= 2048.0


@triton.jit
def update(
    layers,
    programs,
    counter,
    schedule,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    dtype: tl.constexpr,
    PARTS: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKED: tl.constexpr,
    ADAM: tl.constexpr,
    FIRST: tl.constexpr,
    T: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One step for a tile of GROUPS·T columns of [Bᵀ | A]; only Gram matrices and packing if FIRST.

    Args:
        layers: int64 (layers, len(_LAYER)).
        programs: int32 (programs, 3): layer, side, tile of that side.
        counter: int32, 1 during step 0.
        schedule: fp32 (steps, 2), `Optimizer.schedule`.
        R: rows of a tile: ranks taken at a time, all of them unless CHUNKED.
        GROUPS: of columns that share a tile. A dot contracts 16 ranks or more, so 8 would leave
            half of it empty: two groups of T columns lie one below the other.
        IN_FLIGHT: partials asked for before the first is added.
        WHOLE: sizes are multiples of T and all addresses of 16 bytes: no masks along the columns,
            and 16 bytes at a time, for a third of the instructions. Adam's only.
    """
    program = programs + tl.program_id(0) * 3
    layer = layers + tl.load(program) * _FIELDS
    side = tl.load(program + 1)
    tile = tl.load(program + 2)
    r = tl.load(layer + 3).to(tl.int32)
    size0 = tl.load(layer + 4)
    size1 = tl.load(layer + 5)
    size = tl.where(side == 0, size0, size1).to(tl.int32)
    product = tl.load(layer + 6 + 2 * side).to(tl.pointer_type(tl.float32))
    count = tl.load(layer + 7 + 2 * side).to(tl.int32)
    packed = tl.load(layer + 10 + 2 * side).to(tl.pointer_type(dtype))
    width = tl.load(layer + 11 + 2 * side)
    own = tl.load(layer + 14 + side).to(tl.pointer_type(tl.float32))
    others = tl.load(layer + 17 - side).to(tl.pointer_type(tl.float32))
    step = tl.load(counter) - 1

    ranks = tl.arange(0, R) % (R // GROUPS)
    part = tl.arange(0, R) // (R // GROUPS)
    same = part[:, None] == part[None, :]
    columns = ((tile * GROUPS + part) * T)[:, None] + tl.arange(0, T)[None, :]
    within = columns < size
    if WHOLE:
        within = tl.full([R, T], True, tl.int1)
    row = size0 + size1
    mean = tl.div_rn(2.0, size0.to(tl.float32) * size1.to(tl.float32))
    p_at = tl.load(layer).to(tl.pointer_type(tl.float32))
    m_at = tl.load(layer + 1).to(tl.pointer_type(tl.float32))
    v_at = tl.load(layer + 2).to(tl.pointer_type(tl.float32))
    first = tl.where(side == 0, 0, size0)
    if WHOLE:
        p_at = tl.multiple_of(p_at, 16)
        m_at = tl.multiple_of(m_at, 16)
        v_at = tl.multiple_of(v_at, 16)
        product = tl.multiple_of(product, 16)
        packed = tl.multiple_of(packed, 16)
        size = tl.multiple_of(size, 16)
        row = tl.multiple_of(row, 16)
        width = tl.multiple_of(width, 16)
        first = tl.multiple_of(first, 16)
    offset = first + columns
    p_at += offset
    m_at += offset
    v_at += offset
    g_at = product + columns
    alpha = 0.0
    inverse_root = 1.0
    if not FIRST:
        alpha = tl.load(schedule + 2 * step)
        if ADAM:
            inverse_root = tl.load(schedule + 2 * step + 1)
    end = R
    if CHUNKED:
        end = r
    old = tl.zeros([R, T], tl.float32)
    new = old
    gradient = old
    m = old
    v = old

    # Every gradient of these columns before the first parameter changes: with more than R ranks
    # they wait where the first partial was. All that is loaded is asked for before it is needed.
    if not FIRST:
        for i0 in range(0, end, R):
            i = i0 + ranks
            inside = (i < r)[:, None] & within
            if ADAM and not CHUNKED:
                m = tl.load(m_at + i.to(tl.int64)[:, None] * row, mask=inside, other=0.0)
                v = tl.load(v_at + i.to(tl.int64)[:, None] * row, mask=inside, other=0.0)
            place = g_at + i.to(tl.int64)[:, None] * size
            projected = tl.zeros([R, T], tl.float32)
            for partial in range(0, count, IN_FLIGHT):
                for more in tl.static_range(IN_FLIGHT):
                    slot = (partial + more) * r.to(tl.int64) * size
                    present = inside & (partial + more < count)
                    projected += tl.load(place + slot, mask=present, other=0.0)
            gradient = tl.zeros([R, T], tl.float32)
            for j0 in range(0, end, R):
                j = j0 + ranks
                old = tl.load(
                    p_at + j.to(tl.int64)[:, None] * row,
                    mask=(j < r)[:, None] & within,
                    other=0.0,
                )
                gram = tl.load(
                    others + i[:, None] * r + j[None, :],
                    mask=(i < r)[:, None] & (j < r)[None, :] & same,
                    other=0.0,
                )
                gradient = tl.dot(gram, old, gradient, input_precision="ieee")
            gradient = mean * gradient - mean * projected
            if CHUNKED:
                tl.store(place, gradient, mask=inside)
        if CHUNKED:
            tl.debug_barrier()

    for i0 in range(0, end, R):
        i = i0 + ranks
        inside = (i < r)[:, None] & within
        place = i.to(tl.int64)[:, None] * row
        new = old
        if FIRST or CHUNKED:
            new = tl.load(p_at + place, mask=inside, other=0.0)
        if not FIRST:
            if CHUNKED:
                gradient = tl.load(g_at + i.to(tl.int64)[:, None] * size, mask=inside, other=0.0)
            change = gradient
            if ADAM:
                if CHUNKED:
                    m = tl.load(m_at + place, mask=inside, other=0.0)
                    v = tl.load(v_at + place, mask=inside, other=0.0)
                m += one_minus_beta1 * (gradient - m)
                v = beta2 * v + one_minus_beta2 * (gradient * gradient)
                tl.store(m_at + place, m, mask=inside)
                tl.store(v_at + place, v, mask=inside)
                change = m / (tl.sqrt(v) * inverse_root + eps)
            new = tl.where(inside, new - alpha * change, 0.0)
            tl.store(p_at + place, new, mask=inside)
        _pack(new, packed, width, i, columns, inside, dtype, PARTS)

    if CHUNKED:
        tl.debug_barrier()
    for i0 in range(0, end, R):
        i = i0 + ranks
        for j0 in range(0, end, R):
            j = j0 + ranks
            left = new
            right = new
            if CHUNKED:
                left = tl.load(
                    p_at + i.to(tl.int64)[:, None] * row,
                    mask=(i < r)[:, None] & within,
                    other=0.0,
                )
                right = tl.load(
                    p_at + j.to(tl.int64)[:, None] * row,
                    mask=(j < r)[:, None] & within,
                    other=0.0,
                )
            place = ((tile * GROUPS + part).to(tl.int64) * r * r + i * r)[:, None] + j[None, :]
            tl.store(
                own + place,
                tl.dot(left, tl.trans(right), input_precision="ieee"),
                mask=(i < r)[:, None] & (j < r)[None, :] & same,
            )


@dataclass(frozen=True)
class UpdateVariant:
    """A compiled form of `update`."""

    dtype: torch.dtype  # of the packed factors
    parts: int
    rank: int
    groups: int
    chunked: bool
    adam: bool
    first: bool
    whole: bool = False

    @property
    def columns(self) -> int:
        """Of a tile."""
        return self.groups * self.group_columns

    @property
    def group_columns(self) -> int:
        """64 of them took 146 µs at 4096², r = 8, twice as many or 8 warps 217 (H200, 64 layers):
        it is latency that `update` waits for.
        """
        return 128 if self.chunked else 64 if self.rank == 16 else 32

    def options(self) -> dict[str, int]:
        """How it is compiled and launched."""
        return {"num_warps": 8 if self.chunked else 4}

    def constants(self) -> dict[str, object]:
        """The constexpr arguments of `update`."""
        return {
            "dtype": common.TRITON_DTYPES[self.dtype],
            "PARTS": self.parts,
            "R": self.rank,
            "GROUPS": self.groups,
            "CHUNKED": self.chunked,
            "ADAM": self.adam,
            "FIRST": self.first,
            "T": self.group_columns,
            "IN_FLIGHT": 4 if self.rank == 16 else 2,
            "WHOLE": self.whole,
        }


def update_variant(dtype: torch.dtype, r: int, adam: bool, first: bool) -> UpdateVariant:
    """The form of `update` for rank r, of any sizes; beyond 32, 16 ranks are taken at a time. The
    first launch of a call is the same for Adam and plain descent.
    """
    rank, groups, chunked = (32 if 16 < r <= 32 else 16), (2 if r <= 8 else 1), r > 32
    return UpdateVariant(
        common.OPERANDS[dtype], parts_of(dtype), rank, groups, chunked, adam or first, first
    )


def parts_of(dtype: torch.dtype) -> int:
    """hi + lo beside a 16-bit W: over 4,000 steps factors drift 4e-6, rounded once 0.2 to 1.5%."""
    return 4 if dtype == torch.float32 else 2


def descend(
    group: Sequence[Tensor],
    out_features: Sequence[int],
    params: Sequence[Tensor],
    moments: Sequence[tuple[Tensor, Tensor]],
    betas: tuple[float, float],
    eps: float,
    schedule: np.ndarray,
) -> None:
    """One step for each row of the schedule, in place.

    Args:
        group: W (outᵢ, inᵢ) in fp32, bf16 or fp16, any strides.
        out_features: outᵢ.
        params, moments: [Bᵀ | A] (rᵢ, outᵢ + inᵢ) and its (m, v), fp32 and contiguous; no moments
            for plain descent.
        schedule: fp64 (steps, 2), see `Optimizer.schedule`.
    """
    if not group or not len(schedule):
        return
    sessions = _sessions_of(group, out_features, params, moments, (*betas, eps))
    for session in sessions:
        with torch.cuda.device(session.device) if session.device.type == "cuda" else nullcontext():
            for first in range(0, len(schedule), SCHEDULE_STEPS):
                session.run(schedule[first : first + SCHEDULE_STEPS])


# Of the last call only: a descent comes back with the same tensors between two points of its trace,
# and finds its graph ready. Holds no tensor of the caller's; ends with the first parameter.
_latest: dict[object, list[_Session]] = {}


@dataclass(frozen=True)
class _Problem:
    """One layer: W (out, in), params [Bᵀ | A] (r, out + in) and moments, by their addresses."""

    weight: tuple[int, int, int]  # address and strides
    dtype: torch.dtype
    sizes: tuple[int, int]  # out, in
    rank: int
    state: tuple[int, ...]  # addresses of params, m, v

    def update(self, first: bool = False) -> UpdateVariant:
        """The form of `update` for this layer."""
        adam = len(self.state) > 1
        form = update_variant(self.dtype, self.rank, adam, first)
        fits = not any(size % form.columns for size in self.sizes)
        aligned = not any(address % 16 for address in self.state)
        return replace(form, whole=fits and aligned and adam and not form.chunked)


def _sessions_of(
    group: Sequence[Tensor],
    out_features: Sequence[int],
    params: Sequence[Tensor],
    moments: Sequence[tuple[Tensor, Tensor]],
    constants: tuple[float, float, float],
) -> list[_Session]:
    problems = []
    for i, (weight, p) in enumerate(zip(group, params, strict=True)):
        sizes = (out_features[i], p.shape[1] - out_features[i])
        state = tuple(t.data_ptr() for t in (p, *(moments[i] if moments else ())))
        place = (weight.data_ptr(), *weight.stride())
        problems.append(_Problem(place, weight.dtype, sizes, p.shape[0], state))
    # Memory that a stream wrote last is only safe to free in that stream's order.
    devices = tuple((w.device, _stream(w.device)) for w in group)
    key = (tuple(problems), devices, constants)
    sessions = _latest.get(key)
    if sessions is None:
        sessions = [
            _Session(form, group[members[0]].device, [problems[i] for i in members], constants)
            for form, members in _classes(group, problems)
        ]
        _latest.clear()  # also of what another thread descends, which holds its own
        _latest[key] = sessions
        weakref.finalize(params[0], _latest.pop, key, None).atexit = False
    return sessions


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _classes(
    group: Sequence[Tensor], problems: Sequence[_Problem]
) -> Iterator[tuple[Variant, list[int]]]:
    """(variant, indices) of layers that run together."""
    classes: dict[tuple[object, ...], list[int]] = {}
    for i, (weight, problem) in enumerate(zip(group, problems, strict=True)):
        form = common.variant(weight, problem.rank, parts_of(weight.dtype))
        classes.setdefault((form, problem.update(), weight.device), []).append(i)
    for (form, _, _), members in classes.items():
        yield form, members


class _Session:
    """Tables, scratch memory and the graph of layers that run all their steps together."""

    def __init__(
        self,
        form: Variant,
        device: torch.device,
        problems: Sequence[_Problem],
        constants: tuple[float, float, float],
    ):
        self._form, self.device = form, device
        self._update, self._first = (problems[0].update(first) for first in (False, True))
        beta1, beta2, eps = constants
        self._constants = (1 - beta1, beta2, 1 - beta2, eps)
        self._replays = device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._buffers: list[Tensor] = []
        self._unscale = self._scratch(form.rank, torch.float32).fill_(1 / _FP16_SCALE.value)

        rows: dict[str, list[tuple[int, ...]]] = {"layers": [], "sums": [], "updates": []}
        plans, tiles = [], []
        capability = common.capability_of(device)
        for index, problem in enumerate(problems):
            r = problem.rank
            blocks = common.plan(problem.sizes, form, r, r, capability)
            plans += [blocks.blocks] * blocks.reads
            for side, size in enumerate(problem.sizes):
                tiles += [(index, side, tile) for tile in range(self._tiles_of(size))]
            for name, new in self._rows(problem, blocks).items():
                rows[name] += new
        spans = common.span_programs(tuple(size for _, _, size, _ in rows["sums"]))
        hidden = np.stack([-1 - spans[:, 0], spans[:, 1], 0 * spans[:, 0]], axis=1)
        # Last, where the blocks of W leave multiprocessors idle.
        programs = np.concatenate([common.block_programs(tuple(plans)), hidden]).astype(np.int32)
        tables = [np.array(table, np.int64) for table in rows.values()]
        tables += [programs, np.array(tiles, np.int32)]
        self._layers, self._sums, self._updates, self._blocks, self._tiles = common.upload(
            tables, device
        )
        self._counter = torch.zeros(1, dtype=torch.int32, device=device)
        self._schedule = torch.zeros(SCHEDULE_STEPS, 2, dtype=torch.float32, device=device)

    def _rows(self, problem: _Problem, blocks: Plan) -> dict[str, list[tuple[int, ...]]]:
        """A layer's rows of the tables of `products`, its sums and `update`, and their memory."""
        form, r, sizes = self._form, problem.rank, problem.sizes
        counts = (blocks.column_blocks, blocks.row_blocks)
        widths = tuple(common.padded(size) for size in sizes)
        packed, partials, grams, totals = [], [], [], []
        for size, count, width in zip(sizes, counts, widths, strict=True):
            # What is beyond r and size is never written again.
            elements = blocks.reads * form.rank * form.parts * width
            packed.append(self._scratch(elements, form.operand).zero_().data_ptr())
            partials.append(self._scratch(count * r * size, torch.float32).data_ptr())
            elements = self._groups_of(size) * r * r
            grams.append(self._scratch(elements, torch.float32).data_ptr())
            totals.append(self._scratch(r * r, torch.float32).data_ptr())
        m_and_v = problem.state[1:] or problem.state * 2  # plain descent touches none
        update = (problem.state[0], *m_and_v, r, *sizes)
        update += (partials[0], counts[0], partials[1], counts[1])
        update += (packed[0], widths[0], packed[1], widths[1], *grams, *totals)

        layers = []
        for first in range(0, r, form.rank):
            ranks = min(form.rank, r - first)
            b, a = (
                (start + first * form.parts * width * form.operand.itemsize, width)
                for start, width in zip(packed, widths, strict=True)
            )
            left, right = (
                (start + 4 * first * size, r * size)
                for start, size in zip(partials, sizes, strict=True)
            )
            layer = (*problem.weight, *sizes, blocks.rows, *a, *b, ranks, ranks)
            layers.append((*layer, *left, *right, *(self._unscale.data_ptr(),) * 2))
        sums = [
            (gram, self._groups_of(size), r * r, total)
            for gram, size, total in zip(grams, sizes, totals, strict=True)
        ]
        return {"layers": layers, "sums": sums, "updates": [update]}

    def _tiles_of(self, size: int) -> int:
        return -(-size // self._update.columns)

    def _groups_of(self, size: int) -> int:
        """Each leaves a Gram matrix."""
        return self._tiles_of(size) * self._update.groups

    def _scratch(self, elements: int, dtype: torch.dtype) -> Tensor:
        self._buffers.append(common.scratch(elements, dtype, self.device))
        return self._buffers[-1]

    def run(self, schedule: np.ndarray) -> None:
        """As many steps as the schedule (steps, 2) has rows."""
        (rates,) = common.upload([schedule.astype(np.float32)], self.device)
        self._schedule[: len(schedule)] = rates
        self._counter.zero_()
        self._launch_update(self._first)
        steps = len(schedule)
        if self._replays:
            if self._graph is None and steps > GRAPH_STEPS:
                self._step()  # loads the kernels, which must not happen during a capture
                steps -= 1
                self._graph = self._capture()
            if self._graph is not None:
                for _ in range(steps // GRAPH_STEPS):
                    self._graph.replay()
                steps %= GRAPH_STEPS
        for _ in range(steps):
            self._step()

    def _step(self) -> None:
        common.launch_products(self._form, self._layers, self._blocks, self._counter, self._sums)
        self._launch_update(self._update)

    def _launch_update(self, form: UpdateVariant) -> None:
        tables = (self._updates, self._tiles, self._counter, self._schedule)
        common.launch(
            update,
            len(self._tiles),
            *tables,
            *self._constants,
            **form.constants(),
            **form.options(),
        )

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()  # the default one cannot be captured
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            graph.capture_begin(capture_error_mode="thread_local")
            for _ in range(GRAPH_STEPS):
                self._step()
            graph.capture_end()
        return graph
