"""The machine a command runs on: devices, dtypes, and what a result file says of it."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from support.cli import BadInput

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEW_THREADS = 4
ROOT = Path(__file__).resolve().parent.parent


def find_device(name: str = "") -> str:
    """The device asked for, else a GPU where there is one, else the CPU.

    Raises BadInput where this machine has no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device {name}: pass cpu, cuda or cuda:1, for example") from None
    if (device.index or 0) >= there.get(device.type, 0):
        raise BadInput(f"--device {name}: there is none here; leave it out, or pass cpu")
    return name


def auto_dtype(device: torch.device | str) -> str:
    """What suits a device: bf16 on a GPU with units for it, fp16 on an older one, else fp32."""
    if torch.device(device).type != "cuda":
        return "fp32"
    ampere_or_later = torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if ampere_or_later else "fp16"


def resolve_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """The dtype of a name: fp32, bf16, fp16, or "auto" for `auto_dtype`.

    Warns once of one that this CPU has no units for, which can be 200 times slower than fp32.
    """
    name = auto_dtype(device) if name == "auto" else name
    if torch.device(device).type == "cpu" and name != "fp32":
        _warn_without_units(name)
    return DTYPES[name]


@functools.cache
def _warn_without_units(dtype: str) -> None:
    able = getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", lambda: True)
    if torch.backends.mkldnn.is_available() and not able():
        print(f"warning: this CPU has no {dtype} units: --dtype fp32 is many times faster",
              file=sys.stderr)


def use_few_threads(most: int = FEW_THREADS) -> None:
    """For small networks, and where a GPU computes: more CPU threads would wait for each other.

    OMP_NUM_THREADS, where it is set, decides instead.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), most))


def math_attention(device: torch.device | str) -> AbstractContextManager:
    """On a CPU, attention in plain matrix products: the fused kernel's backward is slow there."""
    if torch.device(device).type == "cpu":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def hardware(device: torch.device | str = "cpu") -> str:
    """What computes: the GPU's name, or the CPU threads in use and the kind of machine."""
    kind = torch.device(device).type
    if kind != "cpu":
        return torch.cuda.get_device_name(device) if kind == "cuda" else kind
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' * (threads > 1)}, {platform.machine()}"


def commit() -> str:
    """The commit of this checkout, "-dirty" where it has changes; "unknown" outside of git."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=ROOT,
                             capture_output=True, text=True)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def provenance(config, *packages: str) -> dict:
    """What every result file says of its making: settings, hardware, versions and commit."""
    installed = {(d.name or "").lower().replace("-", "_"): d.version for d in distributions()}
    wanted = ("torch", "numpy", "scipy", "pillow", "open_clip_torch", *packages)
    return {"settings": asdict(config), "hardware": hardware(config.device),
            "versions": {package: installed.get(package) for package in wanted},
            "commit": commit()}
