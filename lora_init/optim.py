"""Parameter groups for an optimizer: LoRA+."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_init.factors import LoraInitError
from lora_init.options import check_positive, is_number, require


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    ratio: float,
    weight_decay: float = 0.0,
    *,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """A model's trainable parameters in LoRA+ groups: B learns at `ratio` times the rate of A.

        torch.optim.AdamW(lora_init.lora_plus_groups(model, lr=1e-4, ratio=16))

    Hayou et al., arXiv 2402.12354, with the groups of PEFT's `create_loraplus_optimizer`, for PEFT
    models, `lora_init.nn.LoRALinear` and whatever else names its parameters so: B and every
    parameter of one dimension get lr·ratio, LoRA on embeddings `embedding_lr`, all others lr.

    Args:
        weight_decay: PEFT's `loraplus_weight_decay`, of all groups but biases and the parameters of
            `nn.LayerNorm`. Leave it 0 for layers whose base became a residual: decay pulls B·A to 0
            instead of to the B₀A₀ that was taken from the base.

    Returns:
        Up to four groups with `params`, `lr` and `weight_decay`; every trainable parameter is in
        one of them.

    Raises:
        LoraInitError: a number is out of range, or no parameter requires a gradient.
    """
    for name, value in (("lr", lr), ("ratio", ratio), ("embedding_lr", embedding_lr)):
        check_positive("lora_plus_groups", name, value)
    nonnegative = is_number(weight_decay) and weight_decay >= 0
    require("lora_plus_groups", "weight_decay", weight_decay, nonnegative, "a number ≥ 0")
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": rate, "weight_decay": decay}
        for rate, decay in (
            (lr, weight_decay),
            (embedding_lr, weight_decay),
            (lr * ratio, weight_decay),
            (lr * ratio, 0.0),
        )
    ]
    A, embedding, B, without_decay = groups
    modules = dict(model.named_modules())
    of_norms = {
        f"{path}.{name}"
        for path, module in modules.items()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if _adapts_embedding(modules.get(".".join(name.split(".")[:-2]))):
            group = embedding
        elif "lora_B" not in name and parameter.ndim != 1:
            group = A
        else:
            group = without_decay if "bias" in name or name in of_norms else B
        group["params"].append(parameter)
    found = [group for group in groups if group["params"]]
    if not found:
        raise LoraInitError(
            "lora_plus_groups: no parameter of the model requires a gradient: add an adapter, or "
            "make its parameters trainable"
        )
    return found


def _adapts_embedding(module: nn.Module | None) -> bool:
    """Whether it is PEFT's LoRA layer of an embedding."""
    base = getattr(module, "base_layer", None)
    return isinstance(base, nn.Embedding) and hasattr(module, "lora_embedding_A")
