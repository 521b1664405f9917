"""Files that are there whole or not at all.

What lives here: names, temporary files, syncing and the one step in which a file gets its name; all of it blocking, for
worker threads. What must never live here: HTTP.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import IO

from ._errors import InvalidRequestError
from ._images import FORMATS
from ._models import Image

# Bytes read at a time.
_BLOCK = 512 * 1024


class TakenError(Exception):
    """A file with other bytes has the name. Never leaves `_downloads`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path


def file_stem(image: Image) -> str:
    """Return an image's file name without its extension, if nobody gave one: the task's id and the image's index."""
    # An id that the server gave may hold anything; a name may not.
    task = re.sub(r"[^A-Za-z0-9_-]", "_", image.task_id or "image")[:128]
    if image.index is not None:
        return f"{task}-{image.index}"
    return f"{task}-{hashlib.sha256(image.url.encode(errors='replace')).hexdigest()[:12]}"


def check_folder(to: str | os.PathLike[str]) -> Path:
    """Return the folder to save in.

    Raises:
        InvalidRequestError: It looks like a file's name: images are named after their task.
    """
    folder = Path(to)
    if folder.suffix.lower() in {".jpeg", *(kind.extension for kind in FORMATS)} and not folder.is_dir():
        raise InvalidRequestError(
            f"{str(to)!r} looks like a file, and save takes a folder: the files in it are named after the task, with "
            "the extension that their bytes ask for. The returned path can be renamed."
        )
    return folder


def find_saved(folder: Path, stem: str, sha256: str | None) -> Path | None:
    """Make the folder, or return the file of an earlier save that already has the announced bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    if sha256 is not None:
        for kind in FORMATS:
            path = folder / f"{stem}{kind.extension}"
            if path.is_file() and _digest(path) == sha256:
                return path
    return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def create(path: Path) -> IO[bytes]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    # The umask decides who may read it, as for any file the caller makes: a web server may be meant to.
    return open(os.open(path, flags, 0o666), "wb")  # noqa: PTH123 - by its descriptor; the caller closes it


def rewind(file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()


def sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def publish(partial: Path, path: Path, sha256: str, overwrite: bool) -> Path:
    """Give a whole, synced file its name in one step.

    Raises:
        TakenError: The name is taken by other bytes.
    """
    if overwrite:
        partial.replace(path)
    else:
        try:
            # A hard link is the one way to name a file that fails if the name is taken.
            os.link(partial, path)
        except FileExistsError:
            if path.is_symlink() or not path.is_file() or _digest(path) != sha256:
                raise TakenError(path) from None
        except OSError:
            # A file system without links: the look and the renaming are two steps there.
            if path.exists():
                if _digest(path) != sha256:
                    raise TakenError(path) from None
            else:
                partial.replace(path)
    if hasattr(os, "O_DIRECTORY"):
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    return path
