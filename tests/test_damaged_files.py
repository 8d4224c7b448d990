"""Damaged files of every kind, and what is no file: each ends in one sentence, and soon.

A base, a guide and a LoRA are cut, flipped and rewritten bit by bit; whatever is still read must
also still compute.
"""

# ruff: noqa: F811 (the fixtures' names)

import json
import math
import os
import random
import re
import resource
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomised
from loras import folder, kohya, lora_of  # noqa: F401 (fixtures)
from references import diffusers_unet
from safetensors.torch import save as save_bytes
from safetensors.torch import save_file
from toys import (  # noqa: F401 (fixtures)
    TEXT,
    UNET,
    VAE_CONFIG,
    here,
    refusal,
    toys,
    write_base,
    write_guide,
)

import sample
from support import checkpoint
from support.base import Base
from support.checkpoint import CheckpointError, load_text_encoder, load_unet, load_vae
from support.guides import describe_guide, load_guide, read_guide
from support.lora import merge_lora
from unet import UNet

COUNTED = Counter()


def attempt(read: Callable[[], object]) -> str:
    """The one sentence with which reading ends, or "" where it does not; quick either way."""
    start, message = time.process_time(), ""
    try:
        read()
    except CheckpointError as error:
        message = str(error)
        assert message and "\n" not in message, message
    assert time.process_time() - start < 2
    COUNTED["refused" if message else "read"] += 1
    return message


PARTS = {                                                       # each read from a base, and used
    "unet_config": lambda path: load_unet(path)(
        torch.zeros(1, 4, 8, 8), torch.tensor([9]), torch.zeros(1, 8, 32)),
    "vae_config": lambda path: load_vae(path).decode(torch.zeros(1, 4, 4, 4)),
    "text_config": lambda path: load_text_encoder(path)(torch.zeros(1, 8, dtype=torch.int64))}


@torch.inference_mode()
def whole(path: Path) -> None:
    for read in PARTS.values():
        read(path)


def plugged(path: Path) -> None:
    """Reads a guide, finds it for the base and uses it."""
    guide = load_guide(path, UNET)
    file = read_guide(path)
    describe_guide(path, file.about, Base(None, None, None, None, path))
    math.log(8 / file.steps), sample.metadata(path)
    with torch.inference_mode():
        z = torch.zeros(1, 4, 8, 8)
        guide(torch.ones(1), torch.zeros(1, 128), torch.zeros(1, 77, 32), z)


@pytest.fixture(scope="module")
def victims(tmp_path_factory, folder):
    """One good file of each kind, as bytes, and what reads it."""
    home = tmp_path_factory.mktemp("victims")
    small = replace(TEXT, vocab_size=64)
    write_base(home / "base.safetensors", UNET, VAE_CONFIG, small, torch.float16)
    write_guide(home / "guide.safetensors", UNET, "tiny", 8)
    lora = lora_of({"unet": randomised(lambda: diffusers_unet(UNET))}, "attn2.to_[qk]$")
    save_file(kohya(lora), home / "lora.safetensors", {"lora_adapter_metadata": "{}"})
    base = Base(load_unet(folder, config=UNET), None,
                     load_text_encoder(folder, config=TEXT), None, folder)
    readers = {"base": whole, "guide": plugged,
               "lora": lambda path: merge_lora(base.unet, base.text, path)}
    for kind, read in readers.items():
        read(home / f"{kind}.safetensors")                                  # good, to begin with
    good = {kind: ((home / f"{kind}.safetensors").read_bytes(), read)
            for kind, read in readers.items()}
    return good | {part: (good["base"][0], read) for part, read in PARTS.items()}


KINDS = ["base", "guide", "lora"]
each = pytest.mark.parametrize("kind", KINDS)


def header_of(data: bytes) -> tuple[dict, bytes]:
    size = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:size]), data[size:]


def with_header(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.fixture
def try_bytes(victims, tmp_path):
    """Writes bytes in place of a good file, and returns what reading them comes to."""
    def attempt_bytes(kind: str, data: bytes) -> str:
        path = tmp_path / "bad.safetensors"
        path.write_bytes(data)
        message = attempt(lambda: victims[kind][1](path))
        assert not message or "bad.safetensors" in message
        return message
    return attempt_bytes


@each
def test_truncated_anywhere(victims, try_bytes, kind):
    data, _ = victims[kind]
    size, rng = 8 + int.from_bytes(data[:8], "little"), random.Random(0)
    cuts = [*range(9), *(rng.randrange(8, size) for _ in range(20)), size - 1, size, size + 1,
            *(rng.randrange(size, len(data)) for _ in range(20)), len(data) - 1]
    for cut in cuts:
        assert "download it again" in try_bytes(kind, data[:cut]), cut
        assert try_bytes(kind, data[:cut] + bytes(len(data) - cut) if cut < size else data + b"x")


@pytest.mark.parametrize("kind", [pytest.param("base", marks=pytest.mark.full), "guide", "lora"])
def test_a_header_with_a_flipped_bit(victims, try_bytes, kind):
    """Most are refused; some say the same as before, or another number that is as good."""
    data, _ = victims[kind]
    size, rng = 8 + int.from_bytes(data[:8], "little"), random.Random(1)
    refused = 0
    for _ in range(60 if kind == "base" else 150):
        at, bit = rng.randrange(size), 1 << rng.randrange(8)
        refused += bool(try_bytes(kind, data[:at] + bytes([data[at] ^ bit]) + data[at + 1:]))
    assert refused > 30


@each
@pytest.mark.parametrize("length", [0, 1, 7, 99_999_999, 100_000_001, 2**31, 2**32, 2**63 - 1,
                                    2**63, 2**64 - 1])
def test_an_absurd_length_of_the_header(victims, try_bytes, kind, length):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert try_bytes(kind, length.to_bytes(8, "little") + victims[kind][0][8:])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024     # KiB


ENTRIES = {
    "whole numbers": lambda e: e | {"dtype": {"F16": "I16", "F32": "I32"}[e["dtype"]]},
    "no such type": lambda e: e | {"dtype": "F7"},
    "a type that is none": lambda e: e | {"dtype": 3},
    "flat": lambda e: e | {"shape": [math.prod(e["shape"])]},
    "backwards": lambda e: e | {"shape": [1, *e["shape"]]},
    "negative": lambda e: e | {"shape": [-n for n in e["shape"]]},
    "enormous": lambda e: e | {"shape": [2**40, 2**40]},
    "no numbers": lambda e: e | {"shape": ["a"]},
    "outside": lambda e: e | {"data_offsets": [0, 2**60]},
    "turned round": lambda e: e | {"data_offsets": e["data_offsets"][::-1]},
    "incomplete": lambda e: {"dtype": e["dtype"]},
    "no entry": lambda e: None,
    "a list": lambda e: [1, 2, 3],
}


@each
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_wrong_entry_of_the_header(victims, try_bytes, kind, entry):
    header, body = header_of(victims[kind][0])
    for name in [n for n in header if n.endswith("weight")][::40]:
        message = try_bytes(kind, with_header(header | {name: ENTRIES[entry](header[name])}, body))
        assert message or (kind, entry) == ("lora", "whole numbers")


@each
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite(victims, try_bytes, kind, number):
    """One in the middle of a tensor, of each of several."""
    header, body = header_of(victims[kind][0])
    names = [n for n, e in header.items() if n != "__metadata__" and e["dtype"] in ("F16", "F32")]
    for name in names[::max(1, len(names) // 8)]:
        start, end = header[name]["data_offsets"]
        width = 2 if header[name]["dtype"] == "F16" else 4
        at = start + (end - start) // width // 2 * width
        bad = struct.pack("<e" if width == 2 else "<f", number)
        message = try_bytes(kind, with_header(header, body[:at] + bad + body[at + width:]))
        assert "not finite" in message, name


ABSURD = [0, -1, 3, 10**9, 10**30, 1.5, math.nan, math.inf, "x", "", None, True, [], [1], [0, 0],
          [10**9] * 2, [1] * 100, {}, {"x": 1}]


@pytest.mark.parametrize("part", [
    pytest.param("unet_config", marks=pytest.mark.full),
    pytest.param("vae_config", marks=pytest.mark.full), "text_config"])
def test_absurd_sizes_in_a_base(victims, try_bytes, part):
    header, body = header_of(victims["base"][0])
    metadata = header["__metadata__"]
    sizes = json.loads(metadata[part])
    for name, value in ((n, v) for n in sizes for v in ABSURD if v != sizes[n]):
        message = try_bytes(part, with_header(
            header | {"__metadata__": metadata | {part: json.dumps(sizes | {name: value})}}, body))
        assert message or name == "scale_factor", (name, value)      # no shape shows it
    for stored in ("", "{", "null", "3", "[" * 5000, "9" * 5000, '{"x": 1}'):
        assert try_bytes(part, with_header(
            header | {"__metadata__": metadata | {part: stored}}, body))


@pytest.mark.parametrize("part", ["guide", "about", "unet_config"])
def test_absurd_metadata_in_a_guide(victims, try_bytes, part):
    header, body = header_of(victims["guide"][0])
    metadata = header["__metadata__"]
    values = json.loads(metadata[part])
    changed = [json.dumps(values | {n: v}) for n in values for v in ABSURD]
    for stored in [*changed, "", "{", "null", "[]", "[" * 5000, "9" * 5000]:
        try_bytes("guide", with_header(header | {"__metadata__": metadata | {part: stored}}, body))


@pytest.mark.parametrize("stored", ["", "{", "[" * 5000, *(json.dumps(value) for value in (
    {"unet.lora_alpha": "x"}, {"unet.lora_alpha": []}, {"unet.alpha_pattern": 3}, [], 3,
    {"unet.alpha_pattern": {".*to_q": None}}, {"unet.lora_alpha": math.nan}))])
def test_absurd_metadata_in_a_lora(victims, try_bytes, stored):
    header, body = header_of(victims["lora"][0])
    header = {k: v for k, v in header.items() if not k.endswith(".alpha")}
    tensors = {}
    for name, entry in header.items():                          # packed anew, without the alphas
        if name != "__metadata__":
            raw = body[slice(*entry["data_offsets"])]
            tensors[name] = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(
                entry["shape"])
    data = save_bytes(tensors, {"lora_adapter_metadata": stored})
    assert try_bytes("lora", data)


@each
def test_what_is_no_file(victims, tmp_path, monkeypatch, kind):
    read = victims[kind][1]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for name in ("pipe", "loop", "folder.safetensors", "file", "file/below", "nowhere", "x" * 300,
                 "/dev/null", "/dev/zero", "nul\0"):
        assert attempt(lambda name=name: read(tmp_path / name)), name
    (tmp_path / "mine").write_bytes(victims[kind][0])
    (tmp_path / "mine").chmod(0)

    def refuse(*args, **kwargs):                                      # root may read what it likes
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "safe_open", refuse)
    assert "Permission denied" in attempt(lambda: read(tmp_path / "mine"))


def test_a_damaged_index_of_shards(tmp_path):
    randomised(lambda: diffusers_unet(UNET)).save_pretrained(tmp_path, max_shard_size="100KB")
    index, = tmp_path.glob("*.index.json")
    good = json.loads(index.read_text())
    names = sorted({*good["weight_map"].values()})
    for bad in (b"", b"{", b"null", b"[]", b"3", b"\xff\xfe", b"[" * 5000, *(json.dumps(v).encode()
                for v in ({}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 3}},
                          {"weight_map": {"a": "../x.safetensors"}}, {"weight_map": {"a": []}},
                          {"weight_map": {"a": "/etc/passwd"}}, {"weight_map": {"a": names[0]}},
                          {"weight_map": {"a": "none.safetensors"}}))):
        index.write_bytes(bad)
        assert attempt(lambda: load_unet(tmp_path, config=UNET)), bad
    index.write_text(json.dumps(good))
    (tmp_path / names[0]).write_bytes((tmp_path / names[0]).read_bytes()[:-1])
    assert "cut short" in attempt(lambda: load_unet(tmp_path, config=UNET))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path, legacy, nested):
    """The command of the sentence makes a file that is read."""
    unet = randomised(lambda: UNet(UNET))
    tensors = {f"model.diffusion_model.{k}": v for k, v in unet.state_dict().items()}
    path = tmp_path / "old model.ckpt"
    torch.save({"state_dict": tensors, "epoch": 3} if nested else tensors, path,
               _use_new_zipfile_serialization=not legacy)
    message = attempt(lambda: load_unet(path, config=UNET))
    assert "a pickle, which can run code when opened" in message
    command = re.search('python -c "(.*)"$', message)[1]
    exec(command, {})
    back = load_unet(f"{path}.safetensors", config=UNET)
    assert all(torch.equal(v, unet.state_dict()[k]) for k, v in back.state_dict().items())


@pytest.mark.parametrize("flag, kind", [("--weights", "base"), ("--guide", "guide"),
                                        ("--lora", "lora"), ("--about", "guide")])
def test_a_damaged_file_on_the_command_line(here, victims, capsys, flag, kind):
    data = victims[kind][0]
    for k, bad in enumerate((b"", data[:7], data[:50], data[:-1], b"<html>", b"PK\x03\x04",
                             b"\x80\2", b"\xff" * 8 + data[8:])):
        Path(f"{k}.safetensors").write_bytes(bad)
        message = refusal(capsys, flag, f"{k}.safetensors", "--prompt", "x")
        assert f"{k}.safetensors" in message
    assert not [*Path().glob("out/*")]


@pytest.mark.full
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="each worker tries a part")
def test_so_many_damaged_files_were_tried(request):
    """Where all of them were asked for."""
    chosen = sum(item.path == request.path for item in request.session.items) < 110
    assert chosen or COUNTED["refused"] > 1200 and COUNTED["read"] > 50, COUNTED
