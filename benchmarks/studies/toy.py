"""The toy study of "Beyond Zero Initialization" (Li et al., ICML 2025, sections 3.4 and D.1).

f(x) = W_out ReLU((W₀ + BA) ReLU(W_in x)) with (784, 4096, 32) is pretrained on MNIST, then only A
and B are trained on Fashion-MNIST for 100 steps, for every (σ, lr) of their grid and from three
starts: init_a (A ~ N(0, σ²), B = 0), init_ab_plus (A, B ~ N(0, σ²): what they ran) and init_ab (the
same with W₀ − B₀A₀ in W₀'s place). In their figure, non-zero B is better, most at small lr.

All runs of a seed share the pretrained network, the batches and the directions of A and B. As W_in
and W₀ are frozen, ReLU(W_in x) and W₀ times it are the same for all of them and computed once; that
makes the whole grid affordable. Ours, as the text is silent: pixels in [0, 1], layers drawn as
nn.Linear does, no biases.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data import Images
from benchmarks.studies.table import Row, Table, run_missing

INITS = ("init_a", "init_ab", "init_ab_plus")
SIGMAS = (2e-5, 5e-5, 8e-5, 1e-4, 4e-4, 7e-4, 1e-3, 3e-3, 6e-3, 9e-3, 2e-2, 5e-2)
LRS = (3e-4, 4e-4, 5e-4, 6e-4, 7e-4, 8e-4, 9e-4, 1e-3, 2e-3, 3e-3)
_CLASSES = 10
_ROWS = 256  # tested at once: two products of (rows, width) stay in the cache


@dataclass(frozen=True)
class Toy:
    """The published sizes."""

    width: int = 4096
    r: int = 32
    batch: int = 64
    pretrain_steps: int = 2000
    pretrain_lr: float = 1e-3
    steps: int = 100


class Backbone(NamedTuple):
    """Frozen weights: w_in (width, 784), w (width, width), w_out (10, width); fp32."""

    w_in: Tensor
    w: Tensor
    w_out: Tensor


class Features(NamedTuple):
    """What the adapted layer sees of some images, fp32: its input h (n, width), h W₀ᵀ, and
    h (N_B N_A)ᵀ for the directions N of A and B; labels (n,).
    """

    h: Tensor
    base: Tensor
    start: Tensor
    labels: Tensor


class Directions(NamedTuple):
    """Standard normal draws, which σ scales to A₀ (r, width) and B₀ (width, r)."""

    A: Tensor
    B: Tensor


def table(path: Path) -> Table:
    return Table(path, ("seed", "init", "sigma", "lr"), ("loss", "accuracy"))


def run(
    results: Table,
    toy: Toy,
    mnist: Images,
    fashion: Images,
    seeds: Iterable[int],
    sigmas: Iterable[float] = SIGMAS,
    lrs: Iterable[float] = LRS,
) -> None:
    """Complete `results`: one row a run, with test loss and accuracy on Fashion-MNIST, and two for
    each seed without fine-tuning: "mnist" on MNIST's own test images, "none" on Fashion-MNIST's.
    """
    grid = [(init, sigma, lr) for init in INITS for sigma in sigmas for lr in lrs]
    for seed in seeds:
        cells = [("mnist", 0, 0), ("none", 0, 0), *grid]
        wanted = [{"seed": seed, "init": i, "sigma": s, "lr": lr} for i, s, lr in cells]
        run_missing(results, wanted, lambda runs: _train(toy, mnist, fashion, runs))


def _train(toy: Toy, mnist: Images, fashion: Images, runs: list[Row]) -> Iterator[list[Row]]:
    seed = runs[0]["seed"]
    backbone = pretrain(toy, mnist, seed)
    directions = draw(toy, seed)
    batches = _batches(len(fashion.train_x), toy.batch, toy.steps, seed)
    train = features(backbone, directions, *_tensors(fashion.train_x, fashion.train_y), batches)
    test = features(backbone, directions, *_tensors(fashion.test_x, fashion.test_y))
    references = {"mnist": _tensors(mnist.test_x, mnist.test_y), "none": None}
    done: list[Row] = []
    for cell in runs:
        if cell["init"] in references:
            images = references[cell["init"]]
            seen = test if images is None else features(backbone, directions, *images)
            A, B = torch.zeros_like(directions.A), torch.zeros_like(directions.B)
            loss, accuracy = evaluate(backbone.w_out, seen, A, B, 0.0)
        else:
            A, B, taken = fine_tune(toy, backbone.w_out, train, directions, cell)
            loss, accuracy = evaluate(backbone.w_out, test, A, B, taken)
        done.append(cell | {"loss": loss, "accuracy": accuracy})
        if len(done) == 10 or cell is runs[-1]:
            print("seed {seed} {init} σ {sigma:g} lr {lr:g}: {accuracy:.4f}".format(**done[-1]))
            yield done
            done = []


def pretrain(toy: Toy, images: Images, seed: int) -> Backbone:
    """The network after `pretrain_steps` of AdamW on MNIST, without weight decay."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = [(images.train_x.shape[1], toy.width), (toy.width, toy.width)]
        sizes.append((toy.width, _CLASSES))
        weights = Backbone(*(nn.Linear(*size, bias=False).weight for size in sizes))
    x, y = _tensors(images.train_x, images.train_y)
    optimizer = torch.optim.AdamW(weights, lr=toy.pretrain_lr, weight_decay=0, fused=True)
    for batch in _batches(len(x), toy.batch, toy.pretrain_steps, seed).split(toy.batch):
        hidden = F.relu(F.linear(F.relu(F.linear(_pixels(x[batch]), weights.w_in)), weights.w))
        loss = F.cross_entropy(F.linear(hidden, weights.w_out), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Backbone(*(weight.detach() for weight in weights))


def draw(toy: Toy, seed: int) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(toy.r, toy.width, generator=generator)
    return Directions(A, torch.randn(toy.width, toy.r, generator=generator))


@torch.no_grad()
def features(
    backbone: Backbone, directions: Directions, x: Tensor, y: Tensor, rows: Tensor | None = None
) -> Features:
    """Of the images x (n, 784) uint8, or of these rows of them in their order."""
    x, y = (x, y) if rows is None else (x[rows], y[rows])
    h = F.relu(F.linear(_pixels(x), backbone.w_in))
    start = F.linear(F.linear(h, directions.A), directions.B)
    return Features(h, F.linear(h, backbone.w), start, y)


def fine_tune(
    toy: Toy, w_out: Tensor, seen: Features, directions: Directions, cell: Row
) -> tuple[Tensor, Tensor, float]:
    """Trained A and B, and how much of `Features.start` is taken off W₀ h."""
    sigma = cell["sigma"]
    A = (sigma * directions.A).requires_grad_()
    B = torch.zeros_like(directions.B) if cell["init"] == "init_a" else sigma * directions.B
    B.requires_grad_()
    taken = sigma**2 if cell["init"] == "init_ab" else 0.0
    optimizer = torch.optim.AdamW([A, B], lr=cell["lr"], weight_decay=0, fused=True)
    for step in range(toy.steps):
        part = Features(*(tensor[step * toy.batch :][: toy.batch] for tensor in seen))
        loss = F.cross_entropy(_logits(w_out, part, A, B, taken), part.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return A.detach(), B.detach(), taken


@torch.no_grad()
def evaluate(
    w_out: Tensor, seen: Features, A: Tensor, B: Tensor, taken: float
) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers."""
    loss = right = 0.0
    for part in map(Features._make, zip(*(tensor.split(_ROWS) for tensor in seen), strict=True)):
        logits = _logits(w_out, part, A, B, taken)
        loss += float(F.cross_entropy(logits, part.labels, reduction="sum"))
        right += int((logits.argmax(1) == part.labels).sum())
    return loss / len(seen.labels), right / len(seen.labels)


def _logits(w_out: Tensor, seen: Features, A: Tensor, B: Tensor, taken: float) -> Tensor:
    base = torch.sub(seen.base, seen.start, alpha=taken) if taken else seen.base
    return F.linear(F.relu(torch.addmm(base, F.linear(seen.h, A), B.T)), w_out)


def _batches(count: int, size: int, steps: int, seed: int) -> Tensor:
    """(size · steps,) rows: one shuffle of all images after another."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-size * steps // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return order[: size * steps]


def _tensors(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(x), torch.from_numpy(y).long()


def _pixels(x: Tensor) -> Tensor:
    return x.float() / 255
