"""Parameters of which a process may hold a part only: FSDP2's DTensors and DeepSpeed's ZeRO-3.

Whole, sharded or partitioned, they are read and written in one way: inside `gathered`. What gathers
is a collective: every rank that shares a parameter must do the same, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from lora_init.factors import LoraInitError

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(parameter: Tensor) -> bool:
    """Whether reading the parameter takes all ranks."""
    return _is_dtensor(parameter) or is_partitioned(parameter)


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of all of it; ZeRO-3 leaves an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def here(parameter: Any) -> Tensor:
    """What lies in this process' memory of it, possibly nothing; itself where plain."""
    local: Tensor = parameter.detach().to_local() if _is_dtensor(parameter) else parameter
    return local


@contextmanager
def gathered(*parameters: Tensor, write: bool = False) -> Iterator[list[Tensor]]:
    """The parameters' whole values, to read inside the block; with `write`, what is written into
    them there stays. Every rank must write the same.

    A plain parameter is yielded itself.

    Raises:
        LoraInitError: ZeRO-3 partitioned a parameter and transformers does not know of it.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    with _zero3(partitioned, write):
        values = [_values(parameter) for parameter in parameters]
        yield values
        if write:
            for parameter, value in zip(parameters, values, strict=True):
                if _is_dtensor(parameter):
                    _own_part(parameter, value)


def whole(parameter: Tensor) -> Tensor:
    """A parameter's values: itself where plain, a copy where sharded."""
    with gathered(parameter) as (values,):
        # ZeRO-3 frees what it gathered.
        return values.clone() if is_partitioned(parameter) else values


@contextmanager
def loadable(model: nn.Module) -> Iterator[None]:
    """Inside, PEFT can load whole tensors into what is trained; DTensors' parts it cuts itself."""
    reshard(model)
    trained = [p for p in model.parameters() if p.requires_grad and is_partitioned(p)]
    with _zero3(trained, write=True):
        yield


def reshard(model: nn.Module) -> None:
    """Have FSDP2 put the sharded parameters back that a forward pass left gathered: what is written
    into gathered ones is lost.
    """
    if dist.is_available() and dist.is_initialized():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _is_dtensor(parameter: Tensor) -> bool:
    return dist.is_available() and isinstance(parameter, DTensor)


def is_partitioned(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def _zero3(partitioned: list[Any], write: bool) -> Any:
    if not partitioned:
        return nullcontext()
    return gather_params_ctx(partitioned, modifier_rank=0 if write else None)


def _values(parameter: Any) -> Tensor:
    if _is_dtensor(parameter):
        # What is offloaded is gathered where its mesh is: NCCL has no CPU tensors.
        values: Tensor = parameter.detach().to(parameter.device_mesh.device_type).full_tensor()
        return values
    if tuple(parameter.shape) != whole_shape(parameter):
        raise LoraInitError(
            f"a parameter of shape {whole_shape(parameter)} is partitioned by DeepSpeed ZeRO-3, "
            f"and PEFT does not gather it: keep a transformers.integrations.HfDeepSpeedConfig of "
            f"your DeepSpeed config alive, as Trainer and accelerate do"
        )
    return parameter.detach()


def _own_part(parameter: Any, value: Tensor) -> None:
    """Write this rank's part of `value`, which all ranks have: no communication."""
    mesh, placements = parameter.device_mesh, parameter.placements
    part = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()
    with torch.no_grad():
        here(parameter).copy_(part)
