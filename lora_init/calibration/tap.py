"""Watching some modules of a model while it runs, and leaving the model as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

Seen = Callable[[str, Tensor], None]
SeenBackward = Callable[[str, Tensor, Tensor], None]
_SEED = 0


@contextmanager
def as_found(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Inside, a model is in eval mode, keeps no cache of keys and values, and none of its
    parameters wants a gradient; afterwards all that is as it was, and so are its buffers, its
    configuration (transformers' classifiers note there what their labels look like) and the state
    of the random number generators of its devices.

    Yields:
        What seeds those generators, always alike: a model that draws in eval mode draws the same in
        every pass.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(module._buffers, dict(module._buffers)) for module in modules]
    tensors = [b for _, own in buffers for b in own.values() if b is not None and not b.is_meta]
    copies = [(buffer, version_of(buffer), buffer.clone()) for buffer in tensors]
    configs = {id(c): c for c in map(_config, modules) if c is not None}.values()
    settings = [dict(vars(config)) for config in configs]
    generators = _generators(model)
    states = [generator.get_state() for generator in generators]

    def seed() -> None:
        for generator in generators:
            generator.manual_seed(_SEED)

    try:
        for module in modules:
            # One of bitsandbytes' in eval mode may pack its weight for the CPU, and for good.
            module.training = hasattr(getattr(module, "weight", None), "quant_state")
        for config in configs:
            if getattr(config, "use_cache", None) is True:
                config.use_cache = False
        for parameter, wants in wanted:
            if wants:
                parameter.requires_grad_(False)
        yield seed
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
        for config, values in zip(configs, settings, strict=True):
            vars(config).clear()
            vars(config).update(values)
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)
        for live, own in buffers:
            live.clear()
            live.update(own)
        with torch.no_grad():
            for buffer, version, copy in copies:
                if version_of(buffer) != version:
                    buffer.copy_(copy)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def tapped(
    modules: Mapping[str, nn.Module], seen: Seen, seen_backward: SeenBackward | None = None
) -> Iterator[None]:
    """Inside, every call of a module says so.

    Args:
        seen: is given the name and the input x (..., in), each time that the forward runs: where an
            activation checkpoint runs it again, once more.
        seen_backward: is given name, x, and the loss' gradient by the output (..., out), once for
            each use of the module in a loss that `backward` is called on. x is dropped and computed
            again where an activation checkpoint does so, reentrant or not. No gradient of any
            parameter is needed, and none is made.
    """
    anchors = _Anchors()

    def hook(name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        x = args[0]
        seen(name, x)
        if seen_backward is None or not torch.is_grad_enabled():
            return None
        tap: Tensor = _Tap.apply(anchors[output.device], x, output, partial(seen_backward, name))
        return tap

    with _hooked(modules, hook):
        yield


@contextmanager
def watched(
    modules: Mapping[str, nn.Module],
    output_seen: Callable[[nn.Module, Tensor], None] | None = None,
    gradient_seen: Callable[[str, Tensor], None] | None = None,
) -> Iterator[None]:
    """Inside, outputs of modules that are one real tensor are shown, where gradients are enabled.

    Args:
        output_seen: is given the module and its output.
        gradient_seen: is given the module's name and the loss' gradient by its output, whether or
            not anything below the module needs one.
    """
    anchors = _Anchors()

    def hook(name: str, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        real = isinstance(output, Tensor) and output.is_floating_point()
        if not real or not torch.is_grad_enabled():
            return None
        if output_seen is not None:
            output_seen(module, output)
        if gradient_seen is None:
            return None
        anchor = anchors[output.device]
        tap: Tensor = _Tap.apply(anchor, anchor, output, lambda _, dy: gradient_seen(name, dy))
        return tap

    with _hooked(modules, hook):
        yield


@contextmanager
def with_lora(
    modules: Mapping[str, nn.Module], factors: Mapping[str, tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Inside, modules compute y + (x Aᵀ) Bᵀ for their factors A (r, in) and B (out, r), in these
    factors' dtype.
    """

    def hook(name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        A, B = factors[name]
        return output + linear(linear(args[0].to(A.dtype), A), B).to(output.dtype)

    with _hooked({name: modules[name] for name in factors}, hook):
        yield


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], hook: Callable[..., Tensor | None]) -> Iterator[None]:
    """Inside, hook(name, module, args, output) may give a module another output."""
    # First, so that the output is the module's own whatever the user's hooks make of it.
    handles = [
        module.register_forward_hook(partial(hook, name), prepend=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Anchors(dict[torch.device, Tensor]):
    """A scalar on each device that wants a gradient, and gets none."""

    def __missing__(self, device: torch.device) -> Tensor:
        self[device] = anchor = torch.zeros((), device=device, requires_grad=True)
        return anchor


class _Tap(torch.autograd.Function):
    """The identity on y, whose backward sees x and dy; the anchor has it run where nothing else
    wants a gradient.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, y: Tensor, seen: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.seen = seen
        return y.clone()  # y itself would be a view, in which autograd refuses to write in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        ctx.seen(x, dy)
        return None, None, dy, None


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Inside, a model's repeated blocks run under activation checkpoints: the elements of the
    outermost `nn.ModuleList`s.

    Not by transformers' `gradient_checkpointing_enable`, which has no effect in eval mode.
    """
    blocks = list(_blocks(model))
    own = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _config(module: nn.Module) -> Any:
    """Its transformers config, or whatever object it has by that name."""
    config = vars(module).get("config")
    return config if hasattr(config, "__dict__") else None


def _generators(model: nn.Module) -> list[torch.Generator]:
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    on_gpus = [torch.cuda.default_generators[d.index] for d in devices if d.type == "cuda"]
    return [torch.default_generator, *on_gpus]


def version_of(tensor: Tensor) -> int | None:
    """Changes with every write into it; None if that is not tracked."""
    return None if tensor.is_inference() else tensor._version
