"""Training with `transformers.Trainer` on real text: everything it saves is plain LoRA and
resumable.
"""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import lora_init
from benchmarks.data import split

STEPS = 20
HEAD = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
CONFIGS = {
    "plain": {"r": 8, "lora_alpha": 8},
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "use_rslora": True,
        "rank_pattern": {"layer.0.attention.self.query": 4},
        "alpha_pattern": {"value": 5},
    },
    "head": {"r": 8, "lora_alpha": 8, **HEAD},
}


class Reviews(Dataset):
    """Tokenised reviews, 32 tokens each."""

    def __init__(self, rows: list[tuple[str, int]], tokenizer: object):
        texts = [text for text, _ in rows]
        self.batch = tokenizer(
            texts, truncation=True, max_length=32, padding="max_length", return_tensors="pt"
        )
        self.labels = torch.tensor([label for _, label in rows])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: tensor[index] for key, tensor in self.batch.items()} | {
            "labels": self.labels[index]
        }


@pytest.fixture(scope="module")
def base(minilm_dir: Path) -> torch.nn.Module:
    torch.manual_seed(0)  # the classification head is new
    return AutoModelForSequenceClassification.from_pretrained(
        minilm_dir, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def reviews(minilm_dir: Path, movie_reviews: list[tuple[str, int]]) -> tuple[Reviews, Reviews]:
    train, test, *_ = split(movie_reviews, seed=0, fractions=(0.01, 0.002))
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    return Reviews(train, tokenizer), Reviews(test[:16], tokenizer)


def initialized(base: torch.nn.Module, **config: object) -> PeftModel:
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(target_modules=["query", "value"], **config)
    )
    lora_init.initialize(model, "inilora", steps=100)
    return model


def trainer(
    model: PeftModel, reviews: tuple[Reviews, Reviews], directory: Path, **arguments: object
) -> Trainer:
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return Trainer(
        model,
        TrainingArguments(str(directory), **options | arguments),
        train_dataset=reviews[0],
        eval_dataset=reviews[1],
    )


@torch.no_grad()
def logits(model: torch.nn.Module, reviews: tuple[Reviews, Reviews]) -> torch.Tensor:
    model.eval()
    return model(**reviews[1].batch).logits


def stock(base: torch.nn.Module, directory: Path) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(base), directory)


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_trained_adapter_and_checkpoint_fit_the_original_base(base, reviews, tmp_path, config):
    model = initialized(base, **config)
    # without a trained head both logits of a start are the original's
    assert_same(logits(model, reviews), logits(base, reviews))
    trainer(model, reviews, tmp_path, save_strategy="steps", save_steps=STEPS).train()
    live = logits(model, reviews)
    assert (live - logits(base, reviews)).abs().max() > 0.1 * live.abs().max()  # it learned
    lora_init.save_adapter(model, tmp_path / "adapter")
    assert_same(logits(stock(base, tmp_path / "adapter"), reviews), live)
    assert_same(logits(stock(base, tmp_path / f"checkpoint-{STEPS}"), reviews), live)


def test_best_model_is_reloaded_at_the_end(base, reviews, tmp_path):
    model = initialized(base, **CONFIGS["head"])
    run = trainer(
        model,
        reviews,
        tmp_path,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
        # the highest loss: some checkpoint other than the last
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{STEPS}"
    assert_same(logits(model, reviews), logits(stock(base, best), reviews))
    last = logits(stock(base, tmp_path / f"checkpoint-{STEPS}"), reviews)
    assert (logits(model, reviews) - last).abs().max() > 1e-3


@pytest.mark.parametrize("reinitialise", [True, False], ids=["same_script", "resume_first"])
def test_resumed_run_continues_the_loss_curve(base, reviews, tmp_path, reinitialise):
    def losses(run: Trainer) -> list[float]:
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    arguments = {"save_strategy": "steps", "save_steps": 10, "lr_scheduler_type": "constant"}
    whole = trainer(initialized(base, **CONFIGS["head"]), reviews, tmp_path / "a", **arguments)
    whole.train()

    checkpoint = tmp_path / "a" / "checkpoint-10"
    if reinitialise:
        model = initialized(base, **CONFIGS["head"])
    else:
        config = LoraConfig(target_modules=["query", "value"], **CONFIGS["head"])
        model = get_peft_model(copy.deepcopy(base), config)
        lora_init.resume(model, checkpoint)
    resumed = trainer(model, reviews, tmp_path / "b", **arguments)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)
    assert_same(logits(model, reviews), logits(whole.model, reviews))
    assert_same(
        logits(stock(base, tmp_path / "b" / f"checkpoint-{STEPS}"), reviews), logits(model, reviews)
    )
