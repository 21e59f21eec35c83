"""What keeps a run folder whole: one process at a time writes into it, and a signal ends training in good order."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Optional

from filelock import FileLock, Timeout

from .errors import UserError

LOCK = ".lock"  # in the run folder; the system lets go of it when its process ends, however that happens
# Seconds to wait for a lock. With a filelock that does not mind forks, the workers of a killed run hold it until they
# notice that they are alone, which takes five.
PATIENCE = 8.0
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # file systems without them

_locks: dict[tuple[int, str], FileLock] = {}  # by process (one that was forked has none) and folder


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Keep a folder to this process, which may ask for it several times.

    Raises:
        UserError: another process has it.
        OSError: the folder cannot be made or written.
    """
    os.makedirs(folder, exist_ok=True)
    real = os.path.realpath(folder)
    lock = _locks.setdefault((os.getpid(), real), FileLock(os.path.join(real, LOCK)))
    try:
        held = _acquire(lock, folder)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, folder) from error
    try:
        yield
    finally:
        if held:
            lock.release()


def _acquire(lock: FileLock, folder: str) -> bool:
    """False where the file system has no locks."""
    try:
        with suppress(Timeout):
            lock.acquire(timeout=0)
            return True
        until = time.monotonic() + PATIENCE
        print(f"{folder} is in use: waiting {PATIENCE:g} s for it")
        lock.acquire(timeout=max(until - time.monotonic(), 0))
    except Timeout as error:
        raise UserError(
            f"{folder}: another run is writing into this folder; wait for its end or choose another --output-dir"
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        print(f"{folder}: no locks on this file system, so see to it that one run at a time writes there")
        return False
    return True


class Stopped(SystemExit):
    """SIGINT or SIGTERM in training. The exit status is the conventional one, 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM raise :class:`Stopped`, once: further ones do not disturb what is then done to end well.

    Only the process that came here stops like this; worker processes that it forks keep to what they know.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield
        return
    owner = os.getpid()
    before: dict[int, Any] = {}

    def stop(number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != owner:
            raise KeyboardInterrupt
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        known = signal.getsignal(number)
        if known not in (None, signal.SIG_IGN):  # who starts a run with a signal ignored means it
            before[number] = known
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)


@contextmanager
def quiet_threads() -> Iterator[None]:
    """No traceback of a thread that could not write: TensorBoard's raises the error again with the next number."""
    known = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else known(args)
    try:
        yield
    finally:
        threading.excepthook = known


def command() -> str:
    """The command line of this process, to be typed again."""
    words = getattr(sys, "orig_argv", [sys.executable, *sys.argv])  # Python 3.9 does not have it
    return shlex.join(words)
