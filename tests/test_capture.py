"""support/capture.py: what a recording is of; test_cuda.py has sampling and training with it."""

import pytest
import torch
from torch import nn

from support import capture


@pytest.fixture
def recorded(monkeypatch) -> list:
    """Replays on a CPU as a CUDA graph does: from where the inputs lay, to where the output lay."""
    recordings = []

    def record(call, warm_up):
        output, ran = call(), []
        recordings.append(ran)

        def replay():
            ran.append(1)
            output.copy_(call())
        return replay, output

    monkeypatch.setattr(capture, "record_graph", record)
    return recordings


def test_one_recording_serves_any_values_of_the_same_shapes(recorded):
    step = capture.Captured(lambda a, parts: a + parts["b"] * parts["c"][0])
    b = torch.ones(2)
    first = step(torch.tensor([1.0, 2.0]), {"b": b, "c": [torch.tensor(10.0)]})
    second = step(torch.tensor([3.0, 4.0]), {"b": b, "c": [torch.tensor(20.0)]})
    assert first.tolist() == [11, 12] and second.tolist() == [23, 24]
    assert [len(ran) for ran in recorded] == [2]
    assert step(torch.ones(3), {"b": torch.ones(3), "c": [torch.tensor(1.0)]}).tolist() == [2] * 3
    step(torch.ones(2).double(), {"b": b, "c": [torch.tensor(20.0)]})
    assert len(recorded) == 3                               # another shape, another dtype


def test_what_is_no_tensor_is_part_of_the_recording(recorded):
    step = capture.Captured(lambda a, twice: 2 * a if twice else a)
    assert [step(torch.ones(1), twice).item() for twice in (False, True, False)] == [1, 2, 1]
    assert len(recorded) == 2


def test_a_recording_goes_when_its_network_does(monkeypatch):
    def record(call, warm_up):
        output = call()
        return lambda: None, output                 # like a CUDA graph it keeps no arguments

    monkeypatch.setattr(capture, "record_graph", record)
    step = capture.Captured(lambda network, x: network(x))
    networks = [nn.Linear(2, 2) for _ in range(2)]
    for network in networks:
        for _ in range(2):
            step(network, torch.ones(1, 2))
        step(network, torch.ones(2, 2))
    assert len(step.recordings) == 4
    del networks[0], network
    assert len(step.recordings) == 2
    networks.clear()
    assert not step.recordings


def test_on_a_cpu_nothing_is_recorded():
    assert capture.captured(torch.neg, torch.device("cpu")) is torch.neg
