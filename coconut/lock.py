"""One writer a directory: a file that is locked while a run is at work in it, and says by whom.

The lock ends with its process, however that ends: what a killed one left locks nobody out. Only a
disk without locks (`flock` refused) goes by what the file says.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coconut.errors import UserError
from coconut.files import HOST, is_running

LOCK = ".lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
_held: set[Path] = set()


def is_held(directory: Path) -> bool:
    """Whether this process is the one that works in a directory."""
    return Path(directory).absolute() in _held


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Work in a directory alone; it is made, and what is empty of it afterwards is removed.

    Raises UserError naming who works in it already, or what the disk refuses; nothing is touched.
    """
    directory = Path(directory).absolute()
    path, file = directory / LOCK, None
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        try:
            while file is None:
                directory.mkdir(parents=True, exist_ok=True)
                file = _taken(path)
            os.ftruncate(file, 0)
            os.write(file, f"{HOST} {os.getpid()} {time.time():.0f}\n".encode())
        except OSError as error:
            raise UserError(str(directory), f"cannot be written: {error.strerror}") from error
        _held.add(directory)
        yield
    finally:
        _held.discard(directory)
        if file is not None:
            with suppress(OSError):
                # While it is locked: who opened it meanwhile sees that it is gone, and opens anew.
                path.unlink()
            os.close(file)
        with suppress(OSError):  # the first that is not empty
            for folder in made:
                folder.rmdir()


def _taken(path: Path) -> int | None:
    """The open lock file, if it is ours now; None if it went away meanwhile."""
    try:
        file, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        try:
            file, is_new = os.open(path, os.O_RDWR), False
        except FileNotFoundError:
            return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = True
    except OSError as error:
        has_locks = error.errno not in _NO_LOCKS
        is_ours = not has_locks and (is_new or _is_left_over(file))
        if not is_ours:
            refusal = _refusal(path, file, has_locks)
            os.close(file)
            raise refusal from None
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file), os.stat(path)):
            return file
    os.close(file)
    return None


def _written(file: int) -> list[str]:
    """Host, process number and second of a lock; [] while its owner has written nothing."""
    words = os.pread(file, 200, 0).decode("utf-8", "replace").split()
    return words if len(words) == 3 and words[1].isdigit() and words[2].isdigit() else []


def _is_left_over(file: int) -> bool:
    """Whether, on a disk without locks, the owner was on this machine and runs no more."""
    host, pid, _ = _written(file) or ("", "0", "0")
    return host == HOST and (int(pid) == os.getpid() or not is_running(int(pid)))


def _refusal(path: Path, file: int, has_locks: bool) -> UserError:
    for _ in range(20):
        if words := _written(file):
            break
        time.sleep(0.05)
    host, pid, since = words or ("?", "?", "0")
    when = time.strftime(" since %Y-%m-%d %H:%M", time.localtime(int(since))) if words else ""
    remedy = "wait for it, or choose another name for this run"
    if not has_locks:
        remedy += f"; this disk has no locks: if that process has ended, delete {path}"
    who = f"is written by process {pid} on {host}{when}"
    return UserError(str(path.parent), f"{who}; {remedy}")
