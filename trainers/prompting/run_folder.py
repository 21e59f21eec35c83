"""One process at a time writes into a run folder, and signals end training cleanly."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Optional

from filelock import FileLock, Timeout

from . import distributed
from .errors import UserError

LOCK = ".lock"  # in the run folder; the system releases it when its process ends, however that happens
# Seconds to wait for a lock: the workers of a killed run may hold it until they notice, which takes five seconds.
PATIENCE = 8.0
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # file systems without locks

_locks: dict[tuple[int, str], FileLock] = {}  # by process (a forked one holds none) and folder


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Hold the lock of a folder, which may be nested. Raises UserError if another process holds it, or OSError.

    Of the processes of one run (:mod:`.distributed`), the one that writes there holds it.
    """
    if not distributed.is_main():
        yield
        return
    os.makedirs(folder, exist_ok=True)
    real = os.path.realpath(folder)
    lock = _locks.setdefault((os.getpid(), real), FileLock(os.path.join(real, LOCK)))
    held = True
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{folder} is in use: waiting up to {PATIENCE:g} s")
            lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise UserError(
            f"{folder}: another run is writing into this folder; wait until it ends or choose another --output-dir"
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise type(error)(error.errno, error.strerror, folder) from error
        print(f"{folder}: this file system has no locks; make sure that only one run at a time writes there")
        held = False
    try:
        yield
    finally:
        if held:
            lock.release()


class Stopped(SystemExit):
    """SIGINT or SIGTERM during training. The exit status is the usual 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.reason = f"stopped by {signal.Signals(number).name}"


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Let SIGINT and SIGTERM raise :class:`Stopped`, once: further signals do not disturb the shutdown.

    Yields a function that ignores them from then on. Forked worker processes keep their own handlers.
    """
    owner, before = os.getpid(), {}

    def ignore() -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)

    def stop(number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != owner:
            raise KeyboardInterrupt
        ignore()
        raise Stopped(number)

    if threading.current_thread() is threading.main_thread():  # only the main thread may handle signals
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # A run started with a signal ignored keeps ignoring it.
        before.update((number, known) for number, known in handlers.items() if known not in (None, signal.SIG_IGN))
    for number in before:
        signal.signal(number, stop)
    try:
        yield ignore
    finally:
        for number, known in before.items():
            signal.signal(number, known)


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Suppress the traceback of TensorBoard's writer thread; its error is raised again in the main thread."""
    known = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else known(args)
    try:
        yield
    finally:
        threading.excepthook = known


def command() -> str:
    """The command line of this run, ready for a shell."""
    if distributed.processes() > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]  # may not be on the PATH
        return shlex.join([*torchrun, "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"], *sys.argv])
    return shlex.join(getattr(sys, "orig_argv", [sys.executable, *sys.argv]))  # Python 3.9 has no orig_argv
