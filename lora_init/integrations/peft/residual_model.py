"""A PEFT model on residuals, stored in its base or virtual: saves plain adapters, loads its own
checkpoints."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor

from lora_init.adapters import ADAPTER_FILE, adapter_key, plain_config, plain_tensors
from lora_init.checkpoints import SIDECAR, Start, read_safetensors, read_start, write_start
from lora_init.factors import LoraInitError, Residual
from lora_init.integrations.peft.layers import commit, lora_layers
from lora_init.integrations.peft.mixins import Mixin, mixed, unmixed
from lora_init.integrations.peft.sharded import is_sharded, loadable
from lora_init.staging import merged_into

# Of a model whose base is neither W nor a residual: the method that replaced it.
_REPLACED = "lora_init_replaced_by"


class ResidualModel(Mixin, PeftModel):
    """Mixed into a PEFT model's class once its adapters start from residuals: saves plain adapters,
    loads its own checkpoints. Each copy of the model has its own starts.
    """

    lora_init_starts: dict[str, Start]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As PEFT's, except that initialised adapters are written as plain LoRA on the original
        base.

        `lora_init/` beside each holds what `load_adapter` and `lora_init.resume` continue from.

        Args:
            state_dict: all of this model's, on the main process, where FSDP2 or ZeRO-3 sharded it:
                what `accelerator.get_state_dict(model)` returns, as Trainer passes it.

        Raises:
            LoraInitError: pickles or PEFT's own conversion were asked for, parameters are sharded
                and no whole `state_dict` is given, or the directory cannot be written.
        """
        if not safe_serialization:
            raise LoraInitError(
                "safe_serialization=False writes pickles, which are never read back: leave it True"
            )
        if path_initial_model_for_weight_conversion is not None:
            raise LoraInitError(
                "path_initial_model_for_weight_conversion is not needed: this model's "
                "save_pretrained already writes plain LoRA for the original base"
            )
        names = list(selected_adapters or self.peft_config)
        kwargs["save_embedding_layers"] = save_embedding_layers
        state = self._whole_state(kwargs.pop("state_dict", None))
        if not is_main_process:
            if state:  # joins what PEFT gathers on all ranks; gathered before, it is on rank 0 only
                super().save_pretrained(
                    str(save_directory),
                    selected_adapters=names,
                    is_main_process=False,
                    state_dict=state,
                    **kwargs,
                )
            return
        with merged_into(Path(save_directory)) as staging:
            self._save_plain(staging, names, state, **kwargs)
            for adapter in names:
                if adapter in self.lora_init_starts:
                    folder = staging if adapter == "default" else staging / adapter
                    write_start(
                        folder, self.lora_init_starts[adapter], self._current(adapter, state)
                    )

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As PEFT's; into an initialised adapter its own checkpoints only.

        Raises:
            LoraInitError: not a checkpoint of this adapter's start.
        """
        if adapter_name not in self.lora_init_starts:
            return super().load_adapter(model_id, adapter_name, is_trainable, *args, **kwargs)
        directory = Path(model_id) / (kwargs.get("subfolder") or "")
        start, current = read_start(directory)
        others = other_tensors(directory, start, current)
        result = self._restore(adapter_name, start, current, others, directory)
        if not is_trainable:
            self.eval()
        return result

    def _whole_state(self, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The state dict to save from, which was given or is this model's own.

        Raises:
            LoraInitError: there are only parts of it here.
        """
        state = dict(self.state_dict() if given is None else given)
        own = list(self.parameters()) if given is None else []
        if any(map(is_sharded, [*state.values(), *own])):
            raise LoraInitError(
                "the parameters of this model are sharded over ranks: have all ranks call "
                "accelerator.get_state_dict(model), or torch.distributed.checkpoint.state_dict."
                "get_model_state_dict with full_state_dict=True and cpu_offload=True, and pass "
                "what it returns as state_dict="
            )
        return state

    def _save_plain(
        self, directory: Path, adapters: Sequence[str], state: dict[str, Tensor], **kwargs: Any
    ) -> None:
        """PEFT's own save with the initialised adapters' tensors and configs exchanged for their
        plain form.
        """
        configs = cast("dict[str, LoraConfig]", self.peft_config)
        live, state = dict(configs), dict(state)
        for adapter in adapters:
            if adapter in self.lora_init_starts:
                start = self.lora_init_starts[adapter]
                current = self._current(adapter, state)
                state |= {
                    adapter_key(name, part, adapter): tensor
                    for (name, part), tensor in plain_tensors(start, current).items()
                }
                configs[adapter] = plain_config(
                    live[adapter], {n: 2 * x.A0.shape[0] for n, x in start.layers.items()}
                )
        try:
            super().save_pretrained(
                str(directory), selected_adapters=list(adapters), state_dict=state, **kwargs
            )
        finally:
            configs.update(live)

    def _current(self, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        current = {}
        for name, start in self.lora_init_starts[adapter].layers.items():
            for part, shape in (("A", start.A0.shape), ("B", start.B0.shape), ("bias", None)):
                key = adapter_key(name, part, adapter)
                tensor = state.get(key)
                if shape and (tensor is None or tensor.shape != shape):
                    found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
                    raise LoraInitError(
                        f"{key} {found} in the state_dict to save, not {tuple(shape)}: pass all of "
                        f"the unwrapped model's, or none"
                    )
                if tensor is not None:
                    current[f"{name}.{part}"] = tensor
        return current

    def _restore(
        self,
        adapter: str,
        start: Start,
        current: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        source: str | os.PathLike[str],
    ) -> Any:
        mine = self.lora_init_starts[adapter]
        modules = {
            name: module for name, module in lora_layers(self).items() if adapter in module.lora_A
        }
        check_same_layers(start, modules, adapter, source)
        for name, layer in start.layers.items():
            if not (
                torch.equal(layer.A0, mine.layers[name].A0)
                and torch.equal(layer.B0, mine.layers[name].B0)
            ):
                raise LoraInitError(
                    f"{name}: {source} started from other factors ({start.method}, seed "
                    f"{start.seed}) than this model "
                    f"({mine.method}, seed {mine.seed}): initialise with those, or call "
                    "lora_init.resume on a model "
                    f"that is not initialised"
                )
        state = dict(others)
        for key, tensor in current.items():
            name, _, part = key.rpartition(".")
            state[adapter_key(name, part)] = tensor
        with loadable(self):
            return set_peft_model_state_dict(self, state, adapter_name=adapter)


class StoredResidual(ResidualModel):
    """Its base weights are R = W − s·B₀A₀."""

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any
    ) -> None:
        """As PEFT's, with a warning unless it is of an initialised adapter's own config object, as
        TRL's reference copies are: with that one's parameters in it, it computes the same.
        """
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        if not any(self.peft_config[other] is peft_config for other in self.lora_init_starts):
            known = ", ".join(self.lora_init_starts)
            warnings.warn(
                f"adapter {adapter_name!r} is added to the residual of adapter {known}, which this "
                f"model's base is, and not to the pretrained weights: activate {known} beside it, "
                'or initialise with residual="virtual", which leaves the base as it is',
                stacklevel=2,
            )

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        """As PEFT's for an initialised adapter's own checkpoints; anything else does not fit a
        residual base.

        Raises:
            LoraInitError: not a checkpoint of this adapter's start.
        """
        if adapter_name not in self.lora_init_starts:
            known = ", ".join(self.lora_init_starts)
            raise LoraInitError(
                f"adapter {adapter_name!r} cannot be added: this model's base is the residual of "
                f"adapter {known}, so another one would be added to R instead of W; load it on the "
                f"original base model"
            )
        return super().load_adapter(model_id, adapter_name, *args, **kwargs)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        warnings.warn(
            "with its adapter disabled this model computes its residual base R, not the pretrained "
            "model: use the original base model for that",
            stacklevel=3,
        )
        with super().disable_adapter():
            yield


class VirtualResidual(ResidualModel):
    """Its base weights are W; its initialised adapters are s(B A − B₀A₀) on top of them."""

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any
    ) -> None:
        """As PEFT's. An adapter made of an initialised one's own config object gets its start too.

        So a reference copy, as TRL's trainers make it (they add an adapter, then copy the
        parameters into it), computes what the adapter computes, and before that the base model.
        """
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        for other, start in self.lora_init_starts.items():
            if self.peft_config[other] is peft_config:
                layers = lora_layers(self)
                modules = [layers[name] for name in start.layers]
                commit(modules, start.factors(), adapter_name, "virtual")
                self.lora_init_starts[adapter_name] = start
                break

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if adapter_name in self.lora_init_starts:
            for layer in lora_layers(self).values():  # PEFT 0.19 leaves it there
                layer.lora_variant.pop(adapter_name, None)
            detach(self, adapter_name)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """As PEFT's, of adapters that are plain LoRA.

        Raises:
            LoraInitError: PEFT would combine B A without the start.
        """
        for adapter in adapters:
            if adapter in self.lora_init_starts:
                raise LoraInitError(
                    f"adapter {adapter!r} is s(B A − B₀A₀), of which add_weighted_adapter knows "
                    "B A only: save it with save_adapter and load it under another name, as plain "
                    "LoRA"
                )
        cast("LoraModel", self.base_model).add_weighted_adapter(adapters, *args, **kwargs)


def check_base(model: PeftModel, residual: Residual) -> None:
    """Raises `LoraInitError` if the base holds residuals, or must not, or was replaced."""
    if (method := vars(model).get(_REPLACED)) is not None:
        raise LoraInitError(
            f"{method} replaced this model's base, which is not the pretrained one any more: build "
            "it anew from the original base to initialise again"
        )
    if isinstance(model, StoredResidual):
        raise LoraInitError(
            f"this model's base already is the residual of adapter "
            f"{', '.join(model.lora_init_starts)}: build it anew from the original base to "
            f"initialise again"
        )
    if isinstance(model, VirtualResidual) and residual in ("stored", "replaced"):
        way_out = 'pass residual="virtual" here too' if residual == "stored" else "build it anew"
        raise LoraInitError(
            f"adapter {', '.join(model.lora_init_starts)} needs this model's base as it is: "
            f"{way_out}"
        )


def note_replaced(model: PeftModel, method: str) -> None:
    """Have `check_base` know that a method put other weights in the base's place."""
    vars(model)[_REPLACED] = method


def attach(model: PeftModel, adapter: str, start: Start) -> None:
    """Make an initialised model one that saves and loads by its adapters' starts."""
    if not isinstance(model, ResidualModel):
        kind = VirtualResidual if start.virtual else StoredResidual
        model.__class__ = mixed(kind, type(model))
        cast("ResidualModel", model).lora_init_starts = {}
    cast("ResidualModel", model).lora_init_starts[adapter] = start


def detach(model: PeftModel, adapter: str) -> None:
    """Forget the start of an adapter that was deleted, or initialised without one since. With the
    last one the model is PEFT's again, and can be initialised in any way.
    """
    if isinstance(model, ResidualModel):
        model.lora_init_starts.pop(adapter, None)
        own = unmixed(model, ResidualModel)
        if own is not None and not model.lora_init_starts:
            del model.lora_init_starts
            model.__class__ = own


def other_tensors(
    directory: Path, start: Start, current: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the adapter file holds beside the initialised layers' LoRA (modules_to_save, biases).

    Raises:
        LoraInitError: adapter file and sidecar are not of one save.
    """
    _, tensors = read_safetensors(directory / ADAPTER_FILE)
    for name, layer in start.layers.items():
        stored = tensors.pop(adapter_key(name, "A"), None)
        tensors.pop(adapter_key(name, "B"), None)
        tensors.pop(adapter_key(name, "bias"), None)
        if stored is None or not torch.equal(
            stored[: layer.A0.shape[0]].float(), current[f"{name}.A"].float()
        ):
            raise LoraInitError(
                f"{name}: {directory / ADAPTER_FILE} and {SIDECAR} are not of one save: take an "
                "earlier checkpoint"
            )
    return tensors


def check_same_layers(
    start: Start, modules: Mapping[str, LoraLayer], adapter: str, source: str | os.PathLike[str]
) -> None:
    missing, extra = (
        sorted(start.layers.keys() - modules),
        sorted(modules.keys() - start.layers.keys()),
    )
    if missing or extra:
        raise LoraInitError(
            f"{source} and this model adapt different layers (only there: {missing[:3]}, only "
            f"here: {extra[:3]}): use "
            f"the target_modules it was made with"
        )
    for name, layer in start.layers.items():
        here = (modules[name].r[adapter], modules[name].scaling[adapter])
        there = (layer.A0.shape[0], layer.scaling)
        if here != there:
            raise LoraInitError(
                f"{name}: r and scaling are {here} here and {there} in {source}: use the "
                "LoraConfig it was made with"
            )
