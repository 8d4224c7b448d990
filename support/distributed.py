"""Several processes, as torchrun starts them. Without torchrun nothing here does anything."""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed

from support.cli import BadInput, require


def rank() -> int:
    """Which of torchrun's processes this is; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def processes_here() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


@contextmanager
def init_distributed(device: str, timeout: timedelta = timedelta(hours=12),
                     advice: str = "") -> Iterator[str]:
    """Meets torchrun's other processes, and yields this one's device: a GPU of its own each.

    A process that is not heard of for `timeout` in a collective ends them all, with BadInput and
    the advice.
    """
    if world_size() == 1:
        yield device
        return
    device = _own_gpu(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")   # else NCCL aborts without a message
    try:
        distributed.init_process_group(backend, timeout=timeout)
        _patient_group()
        yield device
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise BadInput("another process ended, or did not answer in time: its own message says "
                       f"why{advice} ({error})") from error
    finally:
        _patient_group.cache_clear()
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _own_gpu(device: str) -> str:
    """This process's GPU, where the device is one; torchrun counts processes from 0."""
    local = int(os.environ.get("LOCAL_RANK", -1))
    require((local < 0, "several processes are started with torchrun, which sets LOCAL_RANK"))
    if not device.startswith("cuda"):
        return device
    count = torch.cuda.device_count()
    require((max(local + 1, processes_here()) > count,
             f"{processes_here()} processes and {count} GPUs: start at most one process a GPU, "
             "or pass --device cpu"))
    torch.cuda.set_device(local)
    return f"cuda:{local}"


@functools.cache
def _patient_group() -> distributed.ProcessGroup:
    """Where processes wait for what one of them does alone: for hours, if need be."""
    return distributed.new_group(backend="gloo", timeout=timedelta(hours=12))


def barrier() -> None:
    """Returns once every process has come here."""
    if distributed.is_initialized():
        distributed.barrier(group=_patient_group())


def all_reduce(*tensors: Tensor) -> None:
    """Sums each tensor over the processes, in place."""
    if distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def broadcast(value):
    """The first process's value, in all of them, once all have come here."""
    if not distributed.is_initialized():
        return value
    values = [value]
    barrier()
    distributed.broadcast_object_list(values, group=_patient_group())
    return values[0]


def rank_zero_only(function: Callable) -> Callable:
    """Has the first process alone call the function, while the others wait."""
    @functools.wraps(function)
    def alone(*args, **options) -> None:
        if rank() == 0:
            function(*args, **options)
        barrier()
    return alone


def print_once(*lines: str, file=None) -> None:
    """Prints each line, in the first process only."""
    for line in lines if rank() == 0 else ():
        print(line, file=file)


def command_line(script: str, words: list[str]) -> str:
    """The command, as for a shell, that starts a script with these words, in as many processes."""
    # Without -- torchrun takes --run for an abbreviation of a flag of its own.
    torchrun = ["torchrun", f"--nproc_per_node={processes_here()}", "--"]
    start = torchrun if world_size() > 1 else ["python"]
    nodes = " (and torchrun's other flags as before, on every node)"
    return shlex.join([*start, script, *words]) + nodes * (processes_here() < world_size())
