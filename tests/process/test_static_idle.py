"""Static caches of idle workers leave the device for others, and come back to where they were.

test: timeout_s=180
"""

import json
import subprocess
import time

import pytest

from kvtierd import SLOWER, Daemon, program, wait_until

# 8 layers of 2,048 tokens: K and V take 16 MiB.
SHAPE = ["--layers", "8", "--heads", "4", "--k-dim", "64", "--v-dim", "64", "--tokens-max", "2048",
         "--prompt", "1500", "--chunk", "512"]
LAYER_BYTES = 1500 * 4 * 64 * 2 * 2
IDLE_MS = 100
SETS = {"device.cpu0.budget": "24MiB", "host.budget": "96MiB", "host.chunk": "1MiB",
        "daemon.idle_after": f"{IDLE_MS}ms", "daemon.reclaim_deadline": "20s"}


class Worker:
    """kvtier-synth, whose schedules behind the prompt wait for their turn."""

    def __init__(self, daemon, seed, *arguments):
        self.daemon = daemon
        self.process = subprocess.Popen(
            [program("kvtier-synth"), "--runtime-dir", daemon.runtime_dir, *SHAPE, "--seed", str(seed),
             "--progress", "--turns", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3):
            self.line()  # chunks of its prompt

    def line(self):
        line = self.process.stderr.readline()
        assert "steps" in line, line + self.process.stderr.read()

    def turn(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.line()

    def is_idle(self):
        """Whether it has committed all, and longer ago than a worker counts as active."""
        mine = [w for w in ctl(self.daemon, "status")["workers"] if w["pid"] == self.process.pid]
        return mine[0]["state"] == "idle" and int(mine[0]["idle_ms"]) > IDLE_MS

    def rest(self):
        wait_until(self.is_idle, "it is idle")

    def finish(self):
        out, errors = self.process.communicate(timeout=60 * SLOWER)
        assert self.process.returncode == 0, errors
        return json.loads(out)


def ctl(daemon, what):
    done = subprocess.run([program("kvtierctl"), "--runtime-dir", daemon.runtime_dir, "--json", what],
                          capture_output=True, text=True, check=True, timeout=30)
    return json.loads(done.stdout)


def caches_of(daemon):
    status = ctl(daemon, "status")
    pids = {w["session"]: w["pid"] for w in status["workers"]}
    return {pids[c["session"]]: c for c in status["caches"]}


def used(daemon):
    return sum(int(t["used_bytes"]) for t in ctl(daemon, "status")["tiers"])


@pytest.mark.parametrize("mode", ["static", "offloaded-static"])
@pytest.mark.parametrize("dense", [[], ["--dense"]], ids=["segment", "dense"])
def test_two_static_caches_take_turns(mode, dense):
    """Both do not fit. Who has its turn gets the memory of the one that is idle, again and again; every byte is
    compared, and no address has changed."""
    more = ["--mode", mode, *dense, "--tokens", "5"] + (["--resident", "5"] if mode == "offloaded-static" else [])
    resident = 5 if mode == "offloaded-static" else 8
    with Daemon(sets=SETS) as daemon:
        workers = []
        for seed in (1, 2):
            workers.append(Worker(daemon, seed, *more))
            workers[-1].rest()
        for _ in range(4):
            for worker in workers:
                worker.turn()
                worker.rest()
        results = [worker.finish() for worker in workers]
        wait_until(lambda: used(daemon) == 0, "all memory is back")
    for result in results:
        assert result["address_changes"] == 0
        assert result["migrated_bytes"] >= 7 * resident * LAYER_BYTES, "four times there, and back"


def test_where_it_is_meanwhile():
    """kvtierctl shows the layers of the one that gave way in host memory, and that it holds nothing of the
    device; how it is closed then makes no difference."""
    with Daemon(sets=SETS) as daemon:
        first = Worker(daemon, 1, "--mode", "static", "--tokens", "2")
        first.rest()
        second = Worker(daemon, 2, "--mode", "static", "--tokens", "2")
        caches = caches_of(daemon)
        assert caches[first.process.pid]["layers"] == "I" * 8
        assert caches[second.process.pid]["layers"] == "R" * 8
        assert int(caches[first.process.pid]["device_bytes"]) == 0
        held = {w["pid"]: int(w["device_bytes"]) for w in ctl(daemon, "status")["workers"]}
        assert held[first.process.pid] == 0 and held[second.process.pid] >= 16 << 20
        first.process.kill()
        first.process.communicate()
        wait_until(lambda: len(ctl(daemon, "status")["workers"]) == 1, "it is gone")
        assert second.finish()["address_changes"] == 0
        wait_until(lambda: used(daemon) == 0, "all memory is back")


def test_it_is_closed_while_it_is_away():
    """A cache that is closed without its memory, by a worker that goes on: its next one gets all it needs."""
    with Daemon(sets=SETS) as daemon:
        first = Worker(daemon, 1, "--mode", "static", "--tokens", "0", "--rounds", "1")
        second = None
        out = first.finish()
        assert out["address_changes"] == 0
        second = Worker(daemon, 2, "--mode", "static", "--tokens", "2")
        assert second.finish()["address_changes"] == 0
        wait_until(lambda: used(daemon) == 0, "all memory is back")


def test_an_active_one_keeps_its_memory():
    """And the other is refused, with what there is and what would help."""
    with Daemon(sets={**SETS, "daemon.idle_after": "60s"}) as daemon:
        first = Worker(daemon, 1, "--mode", "static", "--tokens", "2")
        time.sleep(0.2)
        done = subprocess.run([program("kvtier-synth"), "--runtime-dir", daemon.runtime_dir, *SHAPE, "--mode",
                               "static"], capture_output=True, text=True, check=False, timeout=60 * SLOWER)
        assert done.returncode == 3 and "EQUOTA" in done.stderr, done.stderr
        assert first.finish()["migrated_bytes"] == 0
