"""CUDA graphs: a function's kernels recorded once, and started again with a single call.

Python takes some 10 microseconds to launch a kernel, and a UNet pass has over a thousand: at batch
1 a GPU is done with them sooner than they can be launched. A graph replays them all at once. It
computes exactly what it did when it was recorded, with the same shapes, from the same places.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


class Captured:
    """A function of tensors, recorded as a CUDA graph once for each set of shapes.

    Arguments may be nested in lists, tuples and dictionaries; what is no tensor is a constant of
    the recording. A graph reads its inputs where they lay when it was recorded, so each call copies
    new ones there; an object that was given the last time too is not copied again, so its contents
    must not have changed. Where recording fails, the function is called as it is. Recordings do not
    keep networks among the arguments alive: they go when a network does.
    """

    MOST = 16                       # recordings to keep; each holds its inputs and its output

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.recordings: dict[tuple, _Recording | None] = {}

    def __call__(self, *args) -> Tensor:
        leaves, structure = tree_flatten(args)
        # Layers, the keys of dictionaries, are not in it: they belong to a network, which is.
        key = tuple(map(self.identify, leaves))
        recording = self.recordings.get(key, self)
        if recording is self:                           # there is none yet
            if len(self.recordings) >= self.MOST:
                self.recordings.clear()
            recording = self.recordings[key] = self.record(leaves, structure)
        return self.function(*args) if recording is None else recording(leaves)

    def identify(self, x: object) -> object:
        """What tells recordings with this argument from those with another."""
        if isinstance(x, nn.Module):
            return weakref.ref(x, self.forget)
        return (x.shape, x.dtype) if isinstance(x, Tensor) else x

    def forget(self, network: weakref.ref) -> None:
        for key in [*self.recordings]:
            if any(part is network for part in key):
                del self.recordings[key]

    def record(self, leaves: list, structure) -> _Recording | None:
        try:
            return _Recording(self.function, leaves, structure)
        except RuntimeError as error:       # out of memory is one
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"no CUDA graph for {getattr(self.function, '__name__', 'a call')} ({reason}): "
                  "slower, and otherwise the same", file=sys.stderr)
            return None


class CapturedUpdate:
    """As `Captured`, for a function that changes something: its calls are never repeated.

    The first two calls run as they are, which also has libraries choose and load their kernels; the
    third is recorded, and replayed from then on. Shapes must stay the same.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.calls = 0
        self.recording: _Recording | None = None

    def __call__(self, *args):
        self.calls += 1
        if self.calls <= 2:
            return on_side_stream(lambda: self.function(*args))
        leaves, structure = tree_flatten(args)
        if self.recording is None:
            torch.cuda.empty_cache()        # a recording has memory of its own
            self.recording = _Recording(self.function, leaves, structure, warm_up=False)
        return self.recording(leaves)


class _Recording:
    """One CUDA graph: its inputs, its outputs, and how to run it once more."""

    def __init__(self, function: Callable, leaves: list, structure, warm_up: bool = True):
        inputs = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        args = tree_unflatten(inputs, structure)
        self.inputs, self.last = tensors_of(inputs), tensors_of(leaves)
        self.replay, self.outputs = record_graph(lambda: function(*args), warm_up)

    def __call__(self, leaves: list):
        copies, tensors = defaultdict(lambda: ([], [])), tensors_of(leaves)
        for place, new, last in zip(self.inputs, tensors, self.last):
            if new is not last:
                places, news = copies[new.dtype]
                places.append(place)
                news.append(new)
        for places, news in copies.values():            # of one dtype they are one launch
            torch._foreach_copy_(places, news)
        self.last = tensors
        self.replay()
        return tree_map(torch.clone, self.outputs)      # the next replay writes to the same place


def tensors_of(leaves: list) -> list[Tensor]:
    return [x for x in leaves if isinstance(x, Tensor)]


def on_side_stream(call: Callable):
    """Runs a call on a stream of its own, as PyTorch asks for before a recording."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = call()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def record_graph(call: Callable, warm_up: bool = True) -> tuple[Callable[[], None], object]:
    """Records a call as a CUDA graph; returns what runs it again, and where results will be."""
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = warm_up    # shapes are fixed: trying algorithms out pays
    try:
        for _ in range(2 * warm_up):            # kernels must be chosen and loaded beforehand
            on_side_stream(call)
        graph = torch.cuda.CUDAGraph()
        # Of this thread: another one may pin memory for the next batch meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = call()
    finally:
        torch.backends.cudnn.benchmark = benchmark
    return graph.replay, outputs


@functools.cache
def _captured(function: Callable[..., Tensor]) -> Captured:
    return Captured(function)


def captured(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """The function recorded as CUDA graphs, one for the whole process; on a CPU itself.

    Give networks as arguments, not a network's method, which would be kept alive for good.
    """
    return _captured(function) if device.type == "cuda" else function
