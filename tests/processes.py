"""train.py in processes of its own, started quickly, alone or several as torchrun starts them."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from train_helpers import checkpoints

import train

# Imports torch once; its children are quick to start.
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["train", "torch._dynamo", "processes"])
STDERR = "stderr.txt"


def start(folder: Path, argv: list[str], env: dict[str, str] | None = None) -> BaseProcess:
    """train.py in a folder; what it says is added to stderr.txt there."""
    process = SERVER.Process(target=_train, args=(str(folder), argv, env))
    process.start()
    return process


def start_function(folder: Path, function: Callable[[], None]) -> BaseProcess:
    """A function of a module, called in a folder."""
    process = SERVER.Process(target=_call, args=(str(folder), function))
    process.start()
    return process


def start_several(folder: Path, count: int, argv: list[str]) -> list[BaseProcess]:
    """The same command in so many processes, as torchrun starts them. Checkpoints are kept."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(folder, argv, {
        "RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for i in range(count)]


def message(folder: Path) -> str:
    """What the processes of a folder have said."""
    return (folder / STDERR).read_text()


def wait_for_checkpoint(folder: Path, processes: list[BaseProcess]) -> None:
    while not checkpoints(folder):
        assert all(p.is_alive() for p in processes), message(folder)
        time.sleep(0.01)


def _train(folder: str, argv: list[str], env: dict[str, str] | None) -> None:
    os.environ.update(env or {})
    if env:
        train.Trainer.finish = lambda self: None     # the last checkpoint stays, in full precision
    _call(folder, lambda: train.main(argv))


def _call(folder: str, function: Callable[[], None]) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    with open(STDERR, "a", buffering=1) as sys.stderr:
        function()
