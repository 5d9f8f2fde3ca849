"""Files: written whole or not at all, and fetched from https alone."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from utils.errors import UsageError, first_line

_logger = logging.getLogger(__name__)

MOST_BYTES = 16 << 30  # of a download: no published checkpoint is near it


def write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in the place of `path` once it is whole on the disk.

    The temporary file is this call's own: no other process writes into it, and no link that lies there is followed.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # as a file that was simply opened
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_if_possible(path: Path, write: Callable[[IO[bytes]], None]) -> bool:
    """`write_atomically`, in a folder that is made; False, with a warning, if that fails: a run outlives a full
    disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter
        _logger.warning("%s could not be written (%s); the one before it stays.", path, first_line(error))
        return False
    return True


def _umask() -> int:
    """The mode bits that new files leave out; asking for them sets them, so they are put back."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def copy_whole(source: Path, target: Path) -> None:
    """Make `target` a file of its own that holds what `source` does, at once.

    No link: who copies another file over `target` would change `source` with it.
    """
    write_if_possible(target, lambda file: _copy(source, file))


def _copy(path: Path, target: IO[bytes]) -> None:
    """Copy by the kernel, which on some file systems shares the blocks; else by hand, from where it stopped."""
    with open(path, "rb") as source:
        try:
            while os.copy_file_range(source.fileno(), target.fileno(), 1 << 30):
                pass
        except (AttributeError, OSError):  # other systems; two file systems, or one that cannot
            shutil.copyfileobj(source, target)


def remove_temporaries(folder: Path, names: tuple[str, ...]) -> None:
    """Remove what writes that were killed left beside the files `names` of `folder`."""
    for name in names:
        for path in folder.glob(f".{name}.*.tmp"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def is_url(path: str) -> bool:
    """Whether `path` is an address rather than a file."""
    return "://" in path


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """torch.hub's own download follows a redirect to any address."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith("https://"):
            raise UsageError(f"{req.full_url} redirects to {newurl}; wanted https all the way.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str) -> Path:
    """Fetch `url` once into torch.hub's cache; returns the file.

    A file belongs to its whole address, so that equal names of other addresses keep apart. A name such as
    `vim-0123abcd.pth` carries the start of its SHA-256, which is checked on every use. Raises UsageError for anything
    but https, a wrong hash, a body that is cut short or has no end, or a failed transfer.
    """
    if not url.startswith("https://"):
        raise UsageError(f"{url} is not fetched; wanted a file or an https:// address.")
    name = url.partition("?")[0].partition("#")[0].rpartition("/")[2] or "checkpoint.pth"
    target = Path(torch.hub.get_dir(), "checkpoints", f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.{name}")
    wanted = re.search(r"-([0-9a-f]{8,64})\.", name)
    if target.is_file():
        if not wanted or _sha256(target).startswith(wanted[1]):
            return target
        _logger.warning("%s is not what its name says, and is fetched again.", target)
    digest = hashlib.sha256()

    def copy(file: IO[bytes]) -> None:
        with urllib.request.build_opener(_OnlyHttps).open(url, timeout=60) as response:
            length = getattr(response, "headers", {}).get("Content-Length")
            size = 0
            while chunk := response.read(1 << 20):
                size += len(chunk)
                if size > MOST_BYTES:
                    raise UsageError(f"{url} is larger than {MOST_BYTES >> 30} GiB; wanted a checkpoint.")
                digest.update(chunk)
                file.write(chunk)
        if length is not None and length.isdecimal() and size != int(length):
            raise UsageError(f"{url} broke off after {size} of {length} bytes; wanted the whole file.")
        if wanted and not digest.hexdigest().startswith(wanted[1]):
            raise UsageError(f"{url} has SHA-256 {digest.hexdigest()[:12]}...; wanted {wanted[1]}.")

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, copy)
    except (OSError, http.client.HTTPException) as error:
        raise UsageError(f"{url} cannot be fetched: {error}.") from error
    return target
