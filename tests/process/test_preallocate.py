"""Host memory that is there from the start: it comes while the daemon answers, and stays.

test: timeout_s=120
"""

import os
import re
import signal

from fleet import Fleet
from kvtierd import wait_until

SETS = {"host.budget": "96MiB", "host.chunk": "2MiB", "host.preallocate": "64MiB"}
KEPT = 64 << 20


def arena_kib(pid, key):
    """A number of the arena's mapping, or its flags: it is the anonymous one of the budget's size."""
    inside = False
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as stream:
        for line in stream:
            mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ 0 ", line)
            if mapping:
                inside = int(mapping.group(2), 16) - int(mapping.group(1), 16) == 96 << 20
            elif inside and line.startswith(key):
                return line.split()[1:] if key == "VmFlags:" else int(line.split()[1])
    return None


def test_it_comes_without_a_worker_and_stays():
    with Fleet(SETS, kept_bytes=KEPT) as fleet:
        daemon = fleet.daemon
        daemon.wait_for_line("host memory: 64.0 MiB preallocated in")
        assert fleet.tier("host")["used_bytes"] == KEPT
        assert fleet.tier("host")["live_bytes"] == 0
        assert arena_kib(daemon.pid, "Rss:") == KEPT >> 10
        worker = fleet.start("--mode", "offloaded", "--prompt", 2000, "--tokens", 20)
        fleet.finish(worker)
        wait_until(lambda: fleet.tier("host")["live_bytes"] == 0, "its caches are gone")
        assert fleet.tier("host")["used_bytes"] == KEPT
        assert arena_kib(daemon.pid, "Rss:") == KEPT >> 10
        assert sum("preallocated" in line for line in daemon.lines) == 1


def test_the_front_does_not_get_it():
    """The process that is started beside it, at first and again, maps none of the arena. (Nobody
    watches the budgets: there may be no time for a look.)"""
    with Fleet(SETS, kept_bytes=KEPT, watched=False) as fleet:
        daemon = fleet.daemon
        daemon.wait_for_line("preallocated in")
        assert "dc" in arena_kib(daemon.pid, "VmFlags:")  # not copied by a fork
        first = daemon.front_pid()
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: daemon.front_pid() not in (0, first), "another front")
        assert arena_kib(daemon.front_pid(), "Rss:") is None
        assert fleet.tier("host")["used_bytes"] == KEPT


def test_caches_use_more_than_is_kept():
    with Fleet({**SETS, "host.preallocate": "4MiB"}, kept_bytes=4 << 20) as fleet:
        fleet.daemon.wait_for_line("preallocated in")
        worker = fleet.start("--mode", "offloaded", "--k-dim", 64, "--v-dim", 64, "--prompt", 6000, "--tokens",
                             100000)
        wait_until(lambda: fleet.tier("host")["used_bytes"] > 4 << 20, "more than is kept")
        fleet.kill(worker)
        wait_until(lambda: fleet.tier("host")["used_bytes"] == 4 << 20, "what is kept, and no more")


def test_by_default_a_device_that_pins_nothing_gets_nothing():
    with Fleet({"host.budget": "96MiB"}, watched=False) as fleet:
        assert fleet.tier("host")["used_bytes"] == 0
        assert not fleet.daemon.has_line("preallocated")
