"""How the benchmark measures: calls take turns, and on a GPU they are replayed from recordings.

Launching a kernel costs the host some 20 microseconds. What a GPU takes for a call shows only where
the call is recorded beforehand.
"""

from __future__ import annotations

import functools
import gc
import math
import re
import time
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from support import capture


def is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def recorded(call: Callable, device: str) -> Callable:
    """The call, recorded as a CUDA graph when first made, and replayed from then on; on a CPU the
    call itself. Raises RuntimeError where recording fails."""
    record = functools.cache(lambda: capture.record_graph(call)[0])
    return (lambda: record()()) if is_gpu(device) else call


def recorded_update(call: Callable, device: str) -> Callable:
    """A training update recorded as train.py does; on a CPU the update itself. It must return
    tensors."""
    if not is_gpu(device):
        return call
    update = capture.CapturedUpdate(call)

    def run():
        while update.calls < 2:         # these are not recorded yet
            update()
        return update()

    return run


def steps_per_run(device: str) -> int:
    """Steps of the run whose time, divided by them, is that of a step."""
    return 8 if is_gpu(device) else 2


def benchmark(calls: dict[str, Callable], device: str, rounds: int, warm_up: int = 1,
              deadline: float = math.inf) -> tuple[dict[str, dict], dict[str, Exception]]:
    """Milliseconds of calls that take turns, after `warm_up` unmeasured calls of each.

    They take turns so that a slow minute of the machine is shared. A turn is so many calls as fit
    into a second, at most ten; on a GPU into a tenth of one. No round begins after the deadline, a
    time of `time.monotonic`, but the first. Returns timings by name, on a GPU with the peak of
    allocated memory, and the errors of calls that can't be made at all.
    """
    timings: dict[str, dict] = {}
    failures: dict[str, Exception] = {}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        try:
            timings[name], repeats[name] = _warm_up(name, call, device, warm_up)
        except Exception as error:      # one failure must not cost the rest of a long run
            failures[name] = error
    begin = time.monotonic()
    for k in tqdm(range(rounds), desc=f"{next(iter(calls))} …", leave=False):
        now = time.monotonic()
        slow = is_gpu(device) and now > begin + 2 * k
        if k and now > deadline or k >= 3 and slow:     # a GPU's times hardly differ
            break
        for name in timings:
            seconds = _seconds(calls[name], device, repeats[name])
            repeats[name] = _repeats(seconds, device)
            steps = steps_per_run(device) if re.search(r" step\b", name) else 1
            timings[name]["rounds"].append(round(1000 * seconds / steps, 4))
    for timing in timings.values():
        low, timing["ms"], high = np.percentile(timing["rounds"], (25, 50, 75)).round(4).tolist()
        timing["quartiles"] = [low, high]
    return timings, failures


def _warm_up(name: str, call: Callable, device: str, times: int) -> tuple[dict, int]:
    """The beginning of a call's timing, and how often to make it in its first turn."""
    timing: dict = {"rounds": []}
    if is_gpu(device):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [_seconds(call, device) for _ in range(times)]
    if is_gpu(device):
        # Replaying allocates nothing: the peak is that of the calls which were recorded.
        timing["GiB"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    if seconds and name.endswith(", compiled"):
        timing["first call, s"] = round(seconds[0], 2)
    return timing, _repeats(seconds[-1], device) if seconds else 1


def _seconds(call: Callable, device: str, repeats: int = 1) -> float:
    """Seconds that a call takes, the mean of so many."""
    if is_gpu(device):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if is_gpu(device):
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def _repeats(seconds: float, device: str) -> int:
    turn, most = (0.1, 1000) if is_gpu(device) else (1, 10)
    return max(1, min(most, int(turn / max(seconds, 1e-6))))


def free_memory(device: str) -> None:
    """Gives what earlier recordings held back to the GPU, so that the next ones find room."""
    if is_gpu(device):
        gc.collect()
        torch.cuda.empty_cache()


def matrix_rate(device: str, dtype: torch.dtype, n: int, rounds: int) -> float:
    """TFLOP/s of products of square matrices of side n: the fastest of a few rounds."""
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    timings, failures = benchmark({"matrix": lambda: a @ b}, device, rounds, 3)
    for error in failures.values():
        raise error
    return round(2 * n**3 / (min(timings["matrix"]["rounds"]) / 1000) / 1e12, 4)
