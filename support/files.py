"""Files are written whole or not at all: to a temporary name, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from support.cli import BadInput


def expand(path: str | Path) -> Path:
    """The path, with ~ for the home folder."""
    return Path(os.path.expanduser(path))


def check_readable(path: str | Path) -> None:
    """Raises OSError, with the reason, where a file or folder is missing or can't be read."""
    os.stat(path)                           # `exists` would say "no" where this is not permitted
    if not os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0)):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def files_in(folder: str | Path, pattern: str) -> list[Path]:
    """What matches a pattern in a folder, sorted; nothing where there is no such folder.

    Raises OSError where the folder can't be read: `glob` would find nothing.
    """
    try:
        check_readable(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(Path(folder).glob(pattern))


def hub_cache() -> Path:
    """The folder that the Hugging Face hub downloads to."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return expand(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it at the end: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text as UTF-8; bytes of a file's name that are no text are escaped."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value) -> None:
    """Writes a value as indented JSON. Raises ValueError for numbers that are not finite."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def save_tensors(path: str | Path, tensors: dict[str, Tensor],
                 metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file that others may read."""
    with atomic_write(path) as temporary:
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(tensors, temporary, metadata)
        temporary.chmod(0o644)


def sync(path: Path) -> None:
    """Returns once a file just renamed, and its name, would outlast a power cut."""
    for part in (path, path.parent):
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if part == path:
                raise
            # Some network file systems can't sync a folder; the file itself is safe by now.
            warnings.warn(f"{part} can't be synced ({error.strerror})", stacklevel=1)
        finally:
            os.close(descriptor)


def sha256(*paths: str | Path, prefix: bytes = b"") -> str:
    """SHA-256, hex, of a prefix and the bytes of files, one after the other."""
    digest = hashlib.sha256(prefix)
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def writable_folder(name: str | Path) -> Path:
    """The folder, made where it is missing; raises OSError where nothing can be written to it."""
    path = expand(name)
    path.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:                            # which names a file that nobody asked for
        raise OSError(error.errno, error.strerror, str(path)) from None
    return path


def check_writable(folder: Path) -> None:
    """Raises BadInput where the folder could not be made or written to; makes nothing."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise BadInput(f"{folder} can't be written to: {nearest} is read-only or no folder")
