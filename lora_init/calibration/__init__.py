"""A user's data, for methods that start from it: batches, their losses, and what counts as a token.

What runs it through a model is `lora_init.calibration.collection`.
"""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_init.cache import CacheOption
from lora_init.factors import LoraInitError, weight_digest
from lora_init.statistics import TokenMask

_IGNORED_LABEL = -100  # what torch's cross entropy ignores


@dataclass(frozen=True, eq=False)
class Calibration:
    """A user's data, for methods that start from it: `initialize(model, "lora_ga", calibration=…)`.

    Attributes:
        dataloader: any iterable of batches: mappings of the model's keyword arguments, or whatever
            `loss_fn` takes. It is read once, and the batches are kept on the CPU: every pass, and
            every method that is given this object, sees the same ones in the same order.
        loss_fn: (model, batch on the model's device) -> scalar loss; None takes the `loss` of the
            model's own output, as transformers' models have it where a batch has labels. The loss
            is taken as the mean over the batch. What it computes with beside the model gets
            gradients, unless under `torch.no_grad()`.
        num_batches: how many batches are read at most.
        token_mask: which positions count as tokens where a method leaves that open: "attention",
            those that `attention_mask` keeps, or "labels", of these the ones that predict a label.
            All do where a batch has no such entry, or is no mapping. An encoder-decoder has two
            masks, and no layer says which is its own: its batches must have no padding.
        cache: of what was collected, on disk: True, False, a directory, or "auto" (what takes at
            most 32 MiB of a layer).
        checkpointing: compute activations again in the backward pass instead of keeping them, one
            repeated block of the model at a time. "auto" does so where a batch does not fit the
            GPU's memory without.
        block_bytes: layers whose statistics take more than this together are collected in several
            runs over the data. "auto" is half of what a GPU has free, and 4 GiB on the CPU. Changes
            no bit of the result.
        key: names a `loss_fn` in the cache, which does not know its code: without a key, what is
            collected with a `loss_fn` is not cached. The same goes for `train_step`.
        train_step: (model, batch on the model's device, parameters) for a method that needs
            training (hrp): one step on `parameters`, the factors of a temporary LoRA, by an
            optimizer of its own. Called for each batch in turn; all else is frozen.
        progress: True or False, or None for what `initialize` was told.

    Raises:
        LoraInitError: an option has a value that it cannot have.
    """

    dataloader: Iterable[Any]
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
    num_batches: int = 64
    _: KW_ONLY
    token_mask: Literal["attention", "labels"] = "attention"
    cache: CacheOption = "auto"
    checkpointing: bool | Literal["auto"] = "auto"
    block_bytes: int | Literal["auto"] = "auto"
    key: str | None = None
    train_step: Callable[[nn.Module, Any, list[nn.Parameter]], object] | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dataloader, Iterable):
            raise LoraInitError(
                f"dataloader must be an iterable of batches, got {type(self.dataloader).__name__}"
            )
        for name, arguments in (
            ("loss_fn", "(model, batch)"),
            ("train_step", "(model, batch, parameters)"),
        ):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise LoraInitError(f"{name} must be a function of {arguments}, got {function!r}")
        for name in ("num_batches", "block_bytes"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and (name, value) != ("block_bytes", "auto"):
                raise LoraInitError(f"{name} must be a whole number ≥ 1, got {value!r}")
        if self.token_mask not in ("attention", "labels"):
            raise LoraInitError(
                f'token_mask must be "attention" or "labels", got {self.token_mask!r}'
            )
        if self.checkpointing not in (True, False, "auto"):
            raise LoraInitError(
                f'checkpointing must be True, False or "auto", got {self.checkpointing!r}'
            )
        if self.unnamed and self.cache not in (False, "auto"):
            raise LoraInitError(
                f"cache={self.cache!r}, but the cache cannot know what {self.unnamed} computes: "
                "pass key= to name it, another one whenever the function changes"
            )

    @property
    def unnamed(self) -> str | None:
        """The function that keeps what is collected out of the cache, if one does."""
        functions = {"loss_fn": self.loss_fn, "train_step": self.train_step}
        given = [name for name, function in functions.items() if function is not None]
        return given[0] if given and self.key is None else None

    @cached_property
    def batches(self) -> list[Any]:
        """What was read of the dataloader, copied to the CPU."""
        cpu = torch.device("cpu")
        with torch.random.fork_rng(devices=[]):  # a loader that shuffles draws from it
            batches = [moved(batch, cpu) for batch in islice(self.dataloader, self.num_batches)]
        if not batches:
            raise LoraInitError("the calibration dataloader gave no batch")
        return batches

    @cached_property
    def examples(self) -> list[Any]:
        """The batches cut along dim 0 into batches of one."""
        return [one for i, batch in enumerate(self.batches) for one in _singles(batch, i)]

    @cached_property
    def digest(self) -> str:
        """Of the batches' content in their order.

        Raises:
            LoraInitError: of something in them it cannot be known.
        """
        digest = hashlib.sha256()
        for i, batch in enumerate(self.batches):
            try:
                digest.update(f"{_described(batch)}\n".encode())
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                raise LoraInitError(
                    f"batch {i} holds what cannot be pickled, and so not be told from another's "
                    f"({error}): leave it out, or pass cache=False"
                ) from error
        return digest.hexdigest()

    def output(self, model: nn.Module, batch: Any) -> Any:
        """What the model, or the loss function, makes of a batch.

        Raises:
            LoraInitError: the batch is for a loss function, and there is none.
        """
        if self.loss_fn is not None:
            return self.loss_fn(model, batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, Tensor):
            return model(batch)
        raise LoraInitError(
            f"a batch is a {type(batch).__name__}: pass loss_fn=(model, batch) -> loss, or batches "
            "that are mappings of the model's keyword arguments"
        )

    def loss(self, model: nn.Module, batch: Any, where: str) -> Tensor:
        """The scalar loss of a batch, which can be run backward.

        Raises:
            LoraInitError: there is none, it is not finite, or it does not depend on what is tapped.
        """
        output = self.output(model, batch)
        loss = output if self.loss_fn is not None else _loss_of(output)
        if loss is None:
            raise LoraInitError(
                f"the model's output has no loss in {where}: put labels into the batches, or pass "
                "loss_fn=(model, batch) -> loss"
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise LoraInitError(f"the loss must be a tensor of one number, got {shape} in {where}")
        value = float(loss.detach())
        if not math.isfinite(value):
            raise LoraInitError(
                f"the loss is {value} in {where}: check its labels (a batch of which all are "
                f"{_IGNORED_LABEL} has no loss), or run the model in a wider dtype"
            )
        if not loss.requires_grad:
            raise LoraInitError(
                f"the loss does not depend on any adapted layer in {where}: loss_fn must compute "
                "it with the model that it is given, and not under torch.no_grad()"
            )
        return loss


def token_mask(batch: Any, kind: TokenMask, encoder_decoder: bool, where: str) -> Tensor | None:
    """Which positions (batch, tokens) of a batch count; None if there is nothing that says so, and
    all do.

    Raises:
        LoraInitError: none does, labels are asked for that the batch does not have, or there is
            padding in one of an encoder and a decoder.
    """
    if kind == "labels" and (encoder_decoder or not isinstance(batch, Mapping)):
        two = "the model is an encoder and a decoder"
        why = two if encoder_decoder else f"{where} is no mapping"
        raise LoraInitError(f'token_mask="labels" says nothing where {why}: use "attention"')
    if not isinstance(batch, Mapping):
        return None
    if encoder_decoder:
        if kind != "all":
            _refuse_padding(batch, where)
        return None
    attention, labels = batch.get("attention_mask"), batch.get("labels")
    if attention is not None and not (isinstance(attention, Tensor) and attention.ndim == 2):
        if kind == "all":
            return None
        got = tuple(attention.shape) if isinstance(attention, Tensor) else type(attention).__name__
        raise LoraInitError(f"attention_mask must be (batch, tokens), got {got} in {where}")
    tokens = batch.get("input_ids") if attention is None else attention
    mask = None if attention is None else attention.ne(0)
    if kind in ("labels", "own_label"):
        if labels is not None and tokens is not None and labels.shape == tokens.shape:
            counts = labels.ne(_IGNORED_LABEL)
            if kind == "labels":
                counts = torch.nn.functional.pad(counts[:, 1:], (0, 1))
            mask = counts if mask is None else mask & counts
        elif kind == "labels":
            raise LoraInitError(
                f'token_mask="labels", but {where} has no labels of one for each token: use '
                '"attention"'
            )
    if mask is not None and not mask.any():
        which = "attention" if kind == "all" else kind
        raise LoraInitError(f"{where} has no token that counts ({which} mask): leave it out")
    return None if kind == "all" else mask


def _refuse_padding(batch: Mapping[str, Any], where: str) -> None:
    for key in ("attention_mask", "decoder_attention_mask", "labels"):
        value = batch.get(key)
        padding = _IGNORED_LABEL if key == "labels" else 0
        if isinstance(value, Tensor) and bool((value == padding).any()):
            raise LoraInitError(
                f"{where} has padding ({key}), and which layers of an encoder-decoder it concerns "
                "cannot be told: give batches of one length without padding, or of one example"
            )


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with copies of its tensors on a device (a model may write into its inputs); mappings
    become dicts.
    """
    return _mapped(batch, lambda tensor: tensor.detach().to(device, copy=True))


def _mapped(
    batch: Any,
    function: Callable[[Tensor], Any],
    other: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """A batch with what `function` makes of its tensors, and `other` of what holds none."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _mapped(value, function, other) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_mapped(value, function, other) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_mapped(value, function, other) for value in batch)
    return other(batch)


def _singles(batch: Any, index: int) -> Iterator[Any]:
    """Batches of one, by slicing every tensor; what is no tensor, or a scalar, goes to each."""
    sizes: set[int] = set()
    _mapped(batch, lambda tensor: sizes.add(tensor.shape[0]) if tensor.ndim else None)
    if len(sizes) != 1:
        raise LoraInitError(
            f"batch {index} cannot be cut into examples: its tensors have "
            f"{sorted(sizes) or 'no'} rows"
        )
    for i in range(*sizes):
        yield _mapped(batch, partial(_row, i))


def _row(index: int, tensor: Tensor) -> Tensor:
    return tensor[index : index + 1] if tensor.ndim else tensor


def _described(batch: Any) -> Any:
    """A batch by the digests of its tensors, and the pickles of all else: how an array prints says
    little of what it holds.
    """
    return _mapped(batch, weight_digest, pickle.dumps)


def _loss_of(output: Any) -> Any:
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
