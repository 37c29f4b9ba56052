"""Signals that ask a run to end (Ctrl-C (INT), TERM, USR1 and HUP), and the log.

`main.py` calls `listen` before it imports torch, which takes seconds. So this module does not.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # USR1: of schedulers
received: list[int] = []
asked, deferred = threading.Event(), threading.Event()  # the first: a signal came


def listen() -> None:
    """Listens from now on: a signal ends this process at once, with exit code 0.

    A thread listens, since the main thread may wait in C++ for other ranks. HUP stays ignored if
    this process was started with nohup.
    """
    if signal.getsignal(signal.SIGTERM) is _noted:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _noted)
    os.register_at_fork(after_in_child=_end_as_usual)
    threading.Thread(target=_react, args=(reader,), daemon=True).start()


def defer(barrier: Callable[[], Any]) -> None:
    """From now on the training loop asks `requested`, and saves before it ends the run.

    barrier: of all ranks. If a signal ended another rank before it deferred, this one ends too.
    (torchrun also sends a signal, after another rank's error.)
    """
    deferred.set()
    try:
        barrier()
    except RuntimeError:
        if not asked.wait(timeout=5):  # this rank's signal may come later
            raise
        _end_before_training()


def requested() -> bool:
    """Returns whether this process got a signal."""
    return bool(received)


def log(message: str) -> None:
    """Prints on rank 0 only. A log that cannot be written does not end the run."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # its reader has ended, or its disk is full
            # A file name may hold bytes that are not UTF-8.
            message = message.encode(errors="backslashreplace").decode()
            print(f"{message}\n", end="", flush=True)  # whole lines, also from two threads


def _noted(number: int, frame: object) -> None:
    """Does nothing: Python has written the signal's number to the pipe."""


def _react(reader: int) -> None:
    while True:
        for number in os.read(reader, 64):
            if number in SIGNALS:
                received.append(number)
                asked.set()
                _answer(number)


def _answer(number: int) -> None:
    if not deferred.is_set():
        _end_before_training()
    if number == signal.SIGINT:
        if received.count(number) > 1:
            log("stopped without saving")
            os._exit(128 + number)
        log("stopping after this step; Ctrl-C again to leave without saving")


def _end_before_training() -> NoReturn:
    log("stopped before training began")
    os._exit(0)


def _end_as_usual() -> None:
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _noted:
            signal.signal(number, signal.SIG_DFL)
