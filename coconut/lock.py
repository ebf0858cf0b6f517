"""One writer a directory: a file that is locked while a run is at work in it, and says by whom.

The lock ends with its process, however that ends: what a killed one left locks nobody out. Only a
disk without locks (`flock` refused) goes by what the file says.
"""

import errno
import fcntl
import os
import re
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


def _owner(file: int) -> tuple[str, int, int] | None:
    """Host, process and second that a lock file names; None while its owner has written nothing."""
    text = os.pread(file, 200, 0).decode("utf-8", "replace")
    found = re.fullmatch(r"(\S+) (\d{1,10}) (\d{1,11})\n", text, re.ASCII)
    return (found[1], int(found[2]), int(found[3])) if found else None


def _is_left_over(file: int) -> bool:
    """Whether, on a disk without locks, the owner was on this machine and runs no more."""
    host, pid, _ = _owner(file) or ("", 0, 0)
    return host == HOST and (pid == os.getpid() or not is_running(pid))


def _refusal(path: Path, file: int, has_locks: bool) -> UserError:
    for _ in range(20):
        if owner := _owner(file):
            break
        time.sleep(0.05)
    who = "another process"
    if owner:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(owner[2]))
        who = f"process {owner[1]} on {owner[0]} since {when}"
    remedy = "wait for it, or choose another name for this run"
    if not has_locks:
        remedy += f"; this disk has no locks: if that process has ended, delete {path}"
    return UserError(str(path.parent), f"is written by {who}; {remedy}")
