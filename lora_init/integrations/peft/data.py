"""A user's data for a PEFT model: whether it can run through it, and through what."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from peft import PeftModel

from lora_init.calibration import Calibration
from lora_init.calibration.collection import Data
from lora_init.calibration.passes import Source
from lora_init.factors import LoraInitError
from lora_init.integrations.peft.layers import LoraLinear, base_tensors, lora_layers, pretrained
from lora_init.integrations.peft.sharded import is_sharded
from lora_init.methods import Method


def check_calibration(method: Method, calibration: Calibration | None) -> None:
    """Refuses data that is missing, or that the method would not look at."""
    if method.needs != "nothing" and calibration is None:
        raise LoraInitError(
            f"{method.name} starts from data ({method.needs}): pass "
            "calibration=lora_init.Calibration(dataloader)"
        )
    if method.needs == "nothing" and calibration is not None:
        raise LoraInitError(
            f"{method.name} starts from the weights alone and would not look at the data: leave "
            "calibration out, or choose a method that needs it"
        )
    if calibration is None:
        return
    if method.needs == "training" and calibration.train_step is None:
        raise LoraInitError(
            f"{method.name} starts from training: pass Calibration(..., "
            "train_step=(model, batch, parameters) -> None)"
        )
    if method.needs != "training" and calibration.train_step is not None:
        raise LoraInitError(f"{method.name} does not train: leave train_step out of Calibration")


def check_runnable(model: PeftModel) -> None:
    """Refuses a model that data cannot run through as the pretrained one."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise LoraInitError(
                f"{name} was made under torch.inference_mode(), where autograd cannot follow it: "
                "make the model outside of it"
            )
        if is_sharded(parameter):
            raise LoraInitError(
                f"{name} is sharded over ranks, and data can run through whole models only: "
                "initialise before fully_shard, or before DeepSpeed ZeRO-3 partitions the model"
            )
    for name, module in lora_layers(model).items():
        if module.merged:  # PEFT would take it off in the first batch
            raise LoraInitError(
                f"{name}: adapter {', '.join(module.merged_adapters)} is merged into its base, "
                "which data runs through: call unmerge_adapter() first"
            )


def data_of(
    model: PeftModel,
    modules: Mapping[str, LoraLinear],
    calibration: Calibration | None,
    progress: bool | None,
) -> Data | None:
    """What runs the data through the pretrained model and watches these layers."""
    if calibration is None:
        return None
    base = {name: module.get_base_layer() for name, module in modules.items()}
    shown = calibration.progress if calibration.progress is not None else progress
    source = Source(model, base, partial(base_tensors, model), partial(pretrained, model))
    return Data(calibration, source, shown)
