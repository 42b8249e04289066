"""kvtier-run when it is stopped or interrupted, and when front or daemon go away: the ids of --local.

test: timeout_s=200
"""

import json
import os
import select
import signal
import subprocess
import time

import pytest

from fleet import Fleet, wait_stopped
from kvtierd import SLOWER, wait_until
from runs import TINY, ids_of, run, wait_for_text

MODES = ["dynamic", "offloaded", "offloaded-static"]
if SLOWER > 4:  # a model is slow under ThreadSanitizer, and races do not depend on the mode
    MODES = MODES[:2]
BUSY = [*TINY, "--prompt-tokens", 600, "-n", 1500]
SETS = {"device.cpu0.budget": "2MiB", "host.budget": "64MiB"}


@pytest.fixture(scope="module", name="busy_ids")
def module_busy_ids():
    return ids_of(run(*BUSY, "--local"))


def start(fleet, *args):
    """In the midst of its generation, where it stays: nobody reads its progress, a line a token, so the
    pipe is full long before 1,500 tokens; rest_of() reads on."""
    worker = fleet.start(*args, "--json", "--progress", "always", name="kvtier-run")
    wait_for_text(worker, "generate")
    return worker


def rest_of(worker, status=0):
    """Its end: the ids, and what it said on the way."""
    try:
        out, err = worker.communicate(timeout=90 * SLOWER)
    except subprocess.TimeoutExpired:
        worker.kill()
        raise AssertionError(f"still running: {worker.args}\n{worker.communicate()[1][-2000:]}") from None
    assert worker.returncode == status, err[-2000:]
    return ids_of(json.loads(out)) if out else [], err


# ---- SIGSTOP


def stop_in_a_step(fleet, worker):
    """Stops it while it holds a schedule's pieces; what kvtierctl says about it then."""
    for _ in range(100):
        worker.send_signal(signal.SIGSTOP)
        wait_stopped(worker)
        shown = fleet.worker_of(worker)
        if shown is not None and shown["state"] == "step":
            return shown
        worker.send_signal(signal.SIGCONT)
        os.read(worker.stderr.fileno(), 4096)
    raise AssertionError(f"never met in a step: {shown}")


@pytest.mark.parametrize("mode", MODES)
def test_stopped_in_mid_step(busy_ids, mode):
    with Fleet(SETS) as fleet:
        held = start(fleet, *BUSY, "--mode", mode, "--name", "held")
        shown = stop_in_a_step(fleet, held)
        assert shown["name"] == "held" and shown["device_bytes"] > 0
        others = [["--prompt-tokens", 500, "--seed", 2, "--mode", "offloaded"],
                  ["--prompt-tokens", 900, "--seed", 3, "--mode", "dynamic"],
                  ["--prompt-tokens", 300, "--seed", 4, "--mode", "offloaded-static", "--rows", 2]]
        for other in others:
            command = [*TINY, *other, "-n", 100]
            assert ids_of(run(*command, "--runtime-dir", fleet.daemon.runtime_dir)) == \
                ids_of(run(*command, "--local"))
        again = fleet.worker_of(held)
        assert again["state"] == "step" and again["device_bytes"] == shown["device_bytes"]
        assert fleet.tier("cpu0")["used_bytes"] == shown["device_bytes"]
        held.send_signal(signal.SIGCONT)
        assert rest_of(held)[0] == busy_ids


# ---- the front, the daemon


def test_front_killed_in_mid_generation(busy_ids):
    """It is not noticed."""
    with Fleet(SETS) as fleet:
        workers = [start(fleet, *BUSY, "--mode", mode) for mode in MODES]
        for _ in range(2):
            front = wait_until(fleet.daemon.front_pid, "the front is there", 10)
            os.kill(front, signal.SIGKILL)
            wait_until(lambda f=front: fleet.daemon.front_pid() not in (0, f), "another front", 10)
        for worker in workers:
            ids, said = rest_of(worker)
            assert ids == busy_ids and "starting over" not in said
        assert ids_of(run(*BUSY, "--runtime-dir", fleet.daemon.runtime_dir)) == busy_ids


def test_daemon_killed_and_started_again(busy_ids):
    """Who was generating starts over by himself, says so, and ends with the same ids."""
    with Fleet(SETS) as fleet:
        workers = [start(fleet, *BUSY, "--mode", mode) for mode in MODES]
        fleet.daemon.kill()
        fleet.daemon.start()
        for worker in workers:
            ids, said = rest_of(worker)
            assert ids == busy_ids
            assert "the daemon ended the session or died" in said
            assert "attaching again and starting over" in said
        assert ids_of(run(*BUSY, "--runtime-dir", fleet.daemon.runtime_dir)) == busy_ids


def test_daemon_killed_for_good(busy_ids):
    """A clear error within seconds, also for who comes then; a new daemon gives the ids."""
    with Fleet(SETS, watched=False) as fleet:
        worker = start(fleet, *BUSY, "--mode", "offloaded")
        fleet.daemon.kill()
        late = fleet.start(*BUSY, name="kvtier-run")
        said = rest_of(worker, status=1)[1]
        assert "attaching again and starting over" in said
        assert "is kvtierd running with this directory?" in said
        assert "is kvtierd running with this directory?" in rest_of(late, status=1)[1]
        fleet.daemon.start()
        assert ids_of(run(*BUSY, "--runtime-dir", fleet.daemon.runtime_dir)) == busy_ids


def test_shown_text_is_not_shown_again(busy_ids):
    """One row's text streams to stdout: after a death of the daemon it goes on where it was."""
    with Fleet(SETS) as fleet:
        worker = fleet.start(*BUSY, "--mode", "offloaded", name="kvtier-run")
        shown = os.read(worker.stdout.fileno(), 50).decode()
        fleet.daemon.kill()
        fleet.daemon.start()
        out, err = worker.communicate(timeout=90 * SLOWER)
        assert worker.returncode == 0 and "starting over" in err
        assert [int(word) for word in (shown + out).split()] == busy_ids[0]


# ---- Ctrl-C


@pytest.mark.parametrize("more", [[], ["--rows", 2]], ids=["one row", "rows"])
def test_interrupt_while_the_daemon_is_stopped(busy_ids, more):
    """Nobody answers, and nobody is gone: it ends within seconds, and says what it has generated."""
    with Fleet(SETS, watched=False) as fleet:
        worker = start(fleet, *BUSY, *more, "--mode", "offloaded")
        os.kill(fleet.daemon.pid, signal.SIGSTOP)
        while select.select([worker.stderr], [], [], 0.5 * SLOWER)[0]:
            assert os.read(worker.stderr.fileno(), 65536)  # until it waits for the daemon
        began = time.monotonic()
        worker.send_signal(signal.SIGINT)
        ids, said = rest_of(worker, status=130)
        assert time.monotonic() - began < 4 * SLOWER
        assert "interrupted; the daemon did not answer any more" in said
        assert len(ids) == (2 if more else 1)
        assert all(0 < len(row) < 1500 and row == busy_ids[0][:len(row)] for row in ids)
        os.kill(fleet.daemon.pid, signal.SIGCONT)
        wait_until(lambda: fleet.worker_of(worker) is None, "its session has ended", 5)


@pytest.mark.parametrize("mode", MODES)
def test_interrupt_in_mid_generation(busy_ids, mode):
    """What was committed is shown, and is where an uninterrupted generation passes by; the daemon has
    everything back, others go on. (tests/process/test_run_abort.c goes on with the same cache.)"""
    with Fleet(SETS) as fleet:
        other = start(fleet, *BUSY, "--mode", "offloaded")
        worker = start(fleet, *BUSY, "--mode", mode)
        worker.send_signal(signal.SIGINT)
        ids, said = rest_of(worker, status=130)
        assert "interrupted" in said
        assert 0 < len(ids[0]) < 1500 and ids[0] == busy_ids[0][:len(ids[0])]
        wait_until(lambda: fleet.worker_of(worker) is None, "its session has ended", 5)
        assert rest_of(other)[0] == busy_ids
