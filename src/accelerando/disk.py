"""Files of a bundle on the disk: nothing is followed out of the folder, nothing is read past a limit, and nothing
is half written."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from accelerando.errors import BundleError
from accelerando.recipe import File

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def join(root: Path, name: str) -> Path:
    """The path of a file below a folder, which it does not leave even by a link.

    Raises:
        BundleError: `link`: it leaves the folder.
    """
    path = root / name
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError) as error:  # links in a circle; RuntimeError before Python 3.13
        raise BundleError("link", f"{path} can't be followed: {error}") from error
    if not inside:
        raise BundleError("link", f"{path} is a link that leaves the bundle; put the file itself in its place")
    return path


def read_file(root: Path, name: str, most: int, absent: str, file: File | None = None) -> bytes:
    """The content of one file.

    Args:
        most: bytes; more is refused before it is read.
        absent: the error's code where there is no such file.
        file: what the content must be, where that is known.

    Raises:
        BundleError: `link`, `not-a-file`, `too-big`, `size`, `hash`, or `absent`.
    """
    path = join(root, name)
    size = _size(path, absent)
    if size > most:
        raise BundleError("too-big", f"{path} has {size} bytes; at most {most} are read")
    with path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise BundleError("too-big", f"{path} grew beyond {most} bytes while it was read")
    if file and len(content) != file.bytes:
        raise BundleError("size", f"{path} has {len(content)} bytes, but the manifest says {file.bytes}")
    if file and hashlib.sha256(content).hexdigest() != file.sha256:
        raise BundleError("hash", f"{path} is not what was written (its hash differs); copy the bundle again")
    return content


def check_files(root: Path, folder: str, files: Sequence[File], *, hashes: bool, sync: bool = False) -> None:
    """Hold the files of a folder against their descriptions.

    Args:
        sync: see to it that they are on the disk, not only in the system's memory.

    Raises:
        BundleError: `missing-file`, `link`, `not-a-file`, `size`, `hash`, or `unlisted`.
    """
    for file in files:
        check_file(root, f"{folder}/{file.path}", file, hashes=hashes, sync=sync)
    known = {file.path for file in files}
    for place, folders, names in os.walk(root / folder):
        for name in (*folders, *names):
            path = Path(place) / name
            inner = path.relative_to(root / folder).as_posix()
            join(root, f"{folder}/{inner}")
            if inner not in known and not path.is_dir():
                raise BundleError("unlisted", f"{path} is not in the manifest, and a backend might read it; remove it")


def check_file(root: Path, name: str, file: File, *, hashes: bool, sync: bool = False, most: float = math.inf) -> None:
    """Hold one file against its description, without reading it at once.

    Args:
        most: bytes that it may have.
        sync: see to it that it is on the disk.

    Raises:
        BundleError: `missing-file`, `link`, `not-a-file`, `too-big`, `size`, or `hash`.
    """
    path = join(root, name)
    size = _size(path, "missing-file")
    if size > most:
        raise BundleError("too-big", f"{path} has {size} bytes; at most {most} are read")
    if size != file.bytes:
        raise BundleError("size", f"{path} has {size} bytes, but the manifest says {file.bytes}")
    if hashes and File.of(path, root).sha256 != file.sha256:
        raise BundleError("hash", f"{path} is not what was written (its hash differs); copy the bundle again")
    if sync:
        _sync(path)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside its place, onto the disk, then into its place.

    Raises:
        BundleError: `no-room`; what was there before is still there.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
        _sync(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        if error.errno in NO_ROOM:
            raise BundleError(
                "no-room",
                f"there is no room for {path} ({len(content)} bytes): {error.strerror}; what was there before is "
                "still there; free some space and resume",
            ) from error
        raise


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all, without reading it at once.

    Raises:
        BundleError: `no-room`.
    """
    target.parent.mkdir(exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(source, beside)
        beside.replace(target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        if error.errno in NO_ROOM:
            raise BundleError("no-room", f"there is no room for {target}: {error.strerror}; free some space") from error
        raise


def _size(path: Path, absent: str) -> int:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        wrong = f"{path.parent} is not a bundle: there is no {path.name} in it; give the folder that holds one"
        if absent != "not-a-bundle":
            wrong = f"{path} is not there, but the manifest names it; copy the bundle again"
        raise BundleError(absent, wrong) from error
    except OSError as error:
        raise BundleError("link", f"{path} can't be followed: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise BundleError("not-a-file", f"{path} must be a plain file, but is not")
    return found.st_size


def _sync(path: Path) -> None:
    """Put a file, or a folder's list of names, onto the disk; Windows can't do it for folders."""
    try:
        number = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(number)
    finally:
        os.close(number)
