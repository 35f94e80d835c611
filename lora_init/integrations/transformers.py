"""What a checkpoint on disk is made of: its class, its adapted modules, and the tensor of each.

The model is built on the meta device, so nothing is loaded. Which modules a LoRA adapts is decided
by PEFT itself, and which tensor goes into which module by transformers' own rules for loading.
`plan` and `output_drift` are asked through `integrations.child`: JSON in, JSON out.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from lora_init.checkpoints import Target
from lora_init.factors import LoraInitError
from lora_init.report import first_output, relative_drift

_INSTEAD = "load the model yourself and use lora_init.initialize"
_ADAPTER = "default"


def plan(
    directory: str,
    auto_class: str | None,
    lora: dict[str, Any],
    shapes: dict[str, Sequence[int]],
) -> dict[str, Any]:
    """What a run on a checkpoint is to do.

    Args:
        auto_class: see `meta_model`.
        lora: fields of `peft.LoraConfig`.
        shapes: checkpoint key -> shape.

    Returns:
        "targets": fields of every adapted module's `Target`, in the model's order; "model_class":
        for `output_drift`; "files": name -> text of the files that PEFT saves beside an adapter's
        weights.

    Raises:
        LoraInitError: see `meta_model` and `find_targets`.
    """
    with _quietly():
        config = LoraConfig(**lora)
        model = meta_model(Path(directory), auto_class)
        targets = find_targets(model, config, {key: tuple(x) for key, x in shapes.items()})
        modules: Any = config.target_modules
        if isinstance(modules, set):  # which PEFT would save in another order each time
            config.target_modules = sorted(modules)
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            files = {path.name: path.read_text("utf-8") for path in Path(folder).iterdir()}
    kind = type(model)
    return {
        "targets": [asdict(target) for target in targets],
        "model_class": f"{kind.__module__}:{kind.__qualname__}",
        "files": files,
    }


def meta_model(directory: Path, auto_class: str | None = None) -> Any:
    """The model of a checkpoint on the meta device, with its weights tied.

    Args:
        auto_class: e.g. "AutoModelForCausalLM"; the config's own architecture if None.

    Raises:
        LoraInitError: no config, one that transformers does not know, or a quantised model.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise LoraInitError(
            f"{directory}: transformers cannot read its config.json ({_first_line(error)})"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise LoraInitError(f"{directory} is a quantised model: take the one it was made from")
    name = auto_class or next(iter(getattr(config, "architectures", None) or []), None)
    if name is None:
        raise LoraInitError(
            f"{directory}: config.json names no architecture: pass --auto-class (auto_class=), "
            f"e.g. AutoModelForCausalLM"
        )
    model_class = getattr(transformers, name, None)
    if model_class is None or not hasattr(model_class, "from_pretrained"):
        raise LoraInitError(
            f"{directory}: transformers {transformers.__version__} has no model class {name!r}, "
            f"and a model's own code is never run: {_INSTEAD}"
        )
    try:
        with torch.device("meta"):
            if auto_class:
                model = model_class.from_config(config, trust_remote_code=False)
            else:
                model = model_class(config)
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise LoraInitError(
            f"{directory}: {name} does not fit its config ({_first_line(error)})"
        ) from error
    model.tie_weights()
    return model


def find_targets(
    model: Any, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]
) -> list[Target]:
    """The modules that `config` adapts, in the model's order.

    Args:
        model: from `meta_model`; it gets the adapter.
        config: its target modules, if None, and its layout flag are filled in.
        shapes: checkpoint key -> shape.

    Raises:
        LoraInitError: nothing matches, or a match is not a linear layer with a weight of its own.
    """
    types = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    linear = f"this model's linear layers are {', '.join(sorted(types))}"
    kind = model.config.model_type
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if config.target_modules is None and kind not in known:
        raise LoraInitError(
            f"PEFT has no default target modules for model type {kind!r}: choose with "
            f"--target-modules (target_modules=); {linear}"
        )
    asked: Any = config.target_modules  # a set where PEFT's types say a list
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sources = _sources(model, shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights and Conv1D: both are settled below
        try:
            inject_adapter_in_model(config, model, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
        except ValueError as error:
            raise LoraInitError(f"{_first_line(error)} ({linear})") from error
    targets = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        _check_module(name, module, parameters, linear)
        key = _only_source(name, sources[f"{name}.weight"], type(model).__name__)
        shape = tuple(parameters[f"{name}.weight"].shape)
        if shapes[key] != shape:
            raise LoraInitError(
                f"{name}: its weight is {shape} by config.json and {shapes[key]} in the checkpoint "
                f"({key}): take the config that belongs to these weights"
            )
        transposed = isinstance(module.get_base_layer(), Conv1D)
        targets.append(Target(name, key, transposed, float(module.scaling[_ADAPTER])))
    for ending in asked if isinstance(asked, set) else ():
        if not any(f".{target.name}".endswith(f".{ending}") for target in targets):
            raise LoraInitError(f"target module {ending!r} matches nothing; {linear}")
    config.fan_in_fan_out = all(target.transposed for target in targets)
    return targets


def output_drift(
    model_class: str, original: str, base: str, adapter: str, dtype: str
) -> float | None:
    """max|Δoutput| / max|output| of `base` with `adapter` against the original, on one fixed batch.

    Both are loaded by stock transformers and PEFT, one after the other.

    Args:
        model_class: from `plan`.
        dtype: to load them in, e.g. "float32".

    Returns:
        None if the model takes no token ids.
    """
    module, _, name = model_class.partition(":")
    kind = getattr(import_module(module), name)

    def load(directory: str) -> Any:
        torch.manual_seed(0)  # a head that the checkpoint lacks is drawn anew
        return kind.from_pretrained(directory, dtype=getattr(torch, dtype), local_files_only=True)

    with _quietly(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one library about the other
        model = load(original)
        batch = _token_ids(model)
        if batch is None:
            return None
        before = first_output(model, batch)
        del model
        model = load(base)
        after = first_output(PeftModel.from_pretrained(model, adapter), batch)
    return relative_drift(after, before)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' log lines and bars; how it was set is put back."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_module(
    name: str, module: LoraLayer, parameters: Mapping[str, Tensor], linear: str
) -> None:
    """Raises `LoraInitError` unless the module is linear and its weight is its own."""
    base = module.get_base_layer()
    if not isinstance(module, Linear) or not isinstance(base, nn.Linear | Conv1D):
        raise LoraInitError(
            f"{name}: LoRA on {type(base).__name__} is not supported, only on nn.Linear and "
            f"Conv1D: leave it out of target_modules; {linear}"
        )
    weight = f"{name}.weight"
    for other, parameter in parameters.items():
        if parameter is parameters[weight] and other != weight:
            raise LoraInitError(
                f"{name}: its weight is shared with {other}, which would change too (tied "
                f"weights): leave it out of target_modules"
            )


def _sources(model: Any, keys: Collection[str]) -> Mapping[str, list[tuple[str, bool]]]:
    """Parameter name -> [(checkpoint key, whether loading does more to it than rename it)].

    The same steps as in transformers' `convert_and_load_state_dict_in_model`.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    sources: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for key in keys:
        name, converter = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, converter = rename_source_key(key, [], [], prefix, state)
        sources[name].append((key, converter is not None))
    return sources


def _only_source(name: str, found: list[tuple[str, bool]], model_class: str) -> str:
    if not found:
        raise LoraInitError(
            f"{name}: no tensor of the checkpoint is its weight in {model_class}: pass "
            f"--auto-class (auto_class=) with the class that you load it with, or {_INSTEAD}"
        )
    keys = ", ".join(key for key, _ in found)
    if len(found) > 1:
        raise LoraInitError(f"{name}: several tensors are its weight ({keys}): {_INSTEAD}")
    if found[0][1]:
        raise LoraInitError(
            f"{name}: its weight is stored in another form ({keys}) and converted on loading: "
            f"{_INSTEAD}"
        )
    return found[0][0]


def _token_ids(model: Any) -> dict[str, Tensor] | None:
    config = model.config.get_text_config()
    vocabulary = getattr(config, "vocab_size", None)
    if model.main_input_name != "input_ids" or not vocabulary:
        return None
    length = min(32, getattr(config, "max_position_embeddings", None) or 32)
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    return batch


def _first_line(error: Exception) -> str:
    """transformers' messages go on to list every model that there is."""
    return str(error).strip().partition("\n")[0]
