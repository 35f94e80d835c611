"""`lora_plus_groups` against PEFT's `create_loraplus_optimizer`, parameter for parameter."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import lora_init
from lora_init import LoraInitError, lora_plus_groups

LR, RATIO, DECAY = 1e-3, 7.0, 0.1


class Model(nn.Module):
    """Embedding, norms of two kinds, biases, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.rms_norm = nn.RMSNorm(8)
        self.q = nn.Linear(8, 6)
        self.conv = nn.Conv1d(6, 4, 3)
        self.bias_table = nn.Parameter(torch.zeros(3, 4))
        self.head = nn.Linear(4, 2)


def peft_model(**options: object) -> nn.Module:
    return get_peft_model(Model(), LoraConfig(r=2, **options))


def rates(groups: list[dict[str, object]], model: nn.Module) -> dict[str, tuple[float, float]]:
    """name -> (learning rate, weight decay); each parameter must be in one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


MODELS = {
    "linear": {"target_modules": ["q"]},
    "embedding": {"target_modules": ["q", "embed"]},
    "biases": {"target_modules": ["q"], "bias": "all", "lora_bias": True},
    "dora": {"target_modules": ["q"], "use_dora": True},
    "norms and head": {
        "target_modules": ["q", "conv"],
        "modules_to_save": ["norm", "rms_norm", "head"],
    },
}


@pytest.mark.parametrize("everything", [False, True], ids=["adapter", "all trainable"])
@pytest.mark.parametrize("case", MODELS)
def test_groups_are_pefts(case: str, everything: bool) -> None:
    model = peft_model(**MODELS[case])
    if everything:
        model.requires_grad_(True)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY
    )
    ours = torch.optim.AdamW(lora_plus_groups(model, LR, RATIO, DECAY), lr=LR)
    expected = rates(theirs.param_groups, model)
    assert rates(ours.param_groups, model) == expected
    assert set(expected) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_embedding_rate_and_no_decay_by_default() -> None:
    model = peft_model(**MODELS["embedding"])
    theirs = create_loraplus_optimizer(
        model, torch.optim.SGD, lr=LR, loraplus_lr_ratio=RATIO, loraplus_lr_embedding=0.5
    )
    groups = lora_plus_groups(model, LR, RATIO, embedding_lr=0.5)
    assert rates(groups, model) == rates(theirs.param_groups, model)
    assert {group["weight_decay"] for group in groups} == {0.0}


def test_own_layers_are_grouped_like_pefts() -> None:
    model = nn.Sequential(lora_init.nn.LoRALinear(nn.Linear(8, 6), r=2), nn.Linear(6, 3))
    model[1].weight.requires_grad_(False)
    assert rates(lora_plus_groups(model, LR, RATIO, DECAY), model) == {
        "0.lora_A.default.weight": (LR, DECAY),
        "0.lora_B.default.weight": (LR * RATIO, DECAY),
        "1.bias": (LR * RATIO, 0.0),
    }


def test_a_step_moves_b_by_the_ratio() -> None:
    layer = lora_init.nn.LoRALinear(nn.Linear(8, 6), r=2)
    layer.B.data.normal_()
    before = layer.A.detach().clone(), layer.B.detach().clone()
    optimizer = torch.optim.SGD(lora_plus_groups(layer, LR, RATIO))
    layer(torch.ones(3, 8)).sum().backward()
    optimizer.step()
    for start, now, rate in zip(before, (layer.A, layer.B), (LR, LR * RATIO), strict=True):
        torch.testing.assert_close(now.detach(), start - rate * now.grad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0}, "lr must be a number > 0, got 0"),
        ({"ratio": -1.0}, r"ratio must be a number > 0, got -1\.0"),
        ({"weight_decay": -0.1}, r"weight_decay must be a number ≥ 0, got -0\.1"),
        ({"embedding_lr": float("nan")}, "embedding_lr must be a number > 0, got nan"),
    ],
)
def test_bad_numbers_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(LoraInitError, match=f"lora_plus_groups: {message}"):
        lora_plus_groups(nn.Linear(2, 2), **{"lr": LR, "ratio": RATIO} | arguments)


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(LoraInitError, match="no parameter of the model requires a gradient"):
        lora_plus_groups(nn.Linear(2, 2).requires_grad_(False), LR, RATIO)
