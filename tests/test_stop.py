"""Signals, without torch: what `support/stop.py` makes of them in a process."""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT, environment

BEGIN = "import os, signal, sys, time; from support import stop; "
WAIT = "time.sleep(60)"
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


def run_python(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", BEGIN + code]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def kill(number: int) -> str:
    return f"os.kill(os.getpid(), {int(number)}); "


@pytest.mark.parametrize("number", NUMBERS)
def test_before_training_a_signal_ends_the_process(number):
    """Also one that a launcher ignored."""
    ignore = "" if number == signal.SIGHUP else f"signal.signal({int(number)}, signal.SIG_IGN); "
    ended = run_python(ignore + "stop.listen(); " + kill(number) + WAIT)
    assert ended.returncode == 0
    assert ended.stdout == "stopped before training began\n"


@pytest.mark.parametrize("number", NUMBERS)
def test_in_training_a_signal_is_noted(number):
    wait = "[time.sleep(0.01) for _ in iter(stop.requested, True)]; "
    listen = "stop.listen(); stop.defer(lambda: None); "
    noted = run_python(listen + kill(number) + wait + "print('saved')")
    answer = "stopping after this step; Ctrl-C again to leave without saving\n"
    assert noted.returncode == 0
    assert noted.stdout == (answer if number == signal.SIGINT else "") + "saved\n"


def test_nohup_ignores_hup():
    ignore = f"signal.signal({int(signal.SIGHUP)}, signal.SIG_IGN); "
    unmoved = run_python(ignore + "stop.listen(); " + kill(signal.SIGHUP) + "print('trained')")
    assert unmoved.stdout == "trained\n" and unmoved.returncode == 0


def test_a_forked_worker_ends_as_usual_and_its_signal_is_not_the_run_s():
    fork = f"child = os.fork(); child or ({kill(signal.SIGTERM)[:-2]}, {WAIT}); "
    ask = "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stop.requested())"
    forked = run_python("stop.listen(); " + fork + ask)
    assert forked.stdout == f"{-signal.SIGTERM} False\n"
