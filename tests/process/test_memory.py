"""What kvtierd and kvtierd-front hold in memory, by the kernel's account, beside their budgets.

Whatever the daemon shares is a memory file, and its mappings bear the file's name, so each kind is
compared with what bounds it, and the sum with the sum:
  kvtier-extent    the device's budget
  kvtier-host      the host's budget
  kvtier-ring      ring_bytes of WELCOME for each worker: its ring is filled once round as it works
  kvtier-control   a control page for each worker
  anonymous        ANONYMOUS_KIB above what there was at the start
Nothing else may be there. A sanitizer has memory of its own: the anonymous part is left out then.

test: timeout_s=120
"""

import re
import time

from fleet import Fleet
from kvtierd import SLOWER, wait_until
from rawclient import Client

SANITIZED = SLOWER > 1
DEVICE_KIB, HOST_KIB, FRONT_KIB = 6 << 10, 24 << 10, 16 << 10
SETS = {"device.cpu0.budget": f"{DEVICE_KIB}KiB", "host.budget": f"{HOST_KIB}KiB"}
if not SANITIZED:
    SETS["daemon.front_memory"] = f"{FRONT_KIB}KiB"
# Tables of the engine, which are touched when they are first needed, and what malloc keeps: 600 KiB
# were seen with these workers.
ANONYMOUS_KIB = 2048
# 2 KiB a token: each would like 4.6 MiB of the host, and the dynamic ones as much of the device.
WORKERS = [["--k-dim", 64, "--v-dim", 64, "--prompt", 2200, "--mode", mode]
           for mode in ("offloaded", "dynamic", "offloaded-static", "dynamic", "offloaded")]


def resident_kib(pid):
    """KiB in memory by the name of the memory file, "anonymous", and "all" of these."""
    found = {"anonymous": 0}
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as stream:
        for line in stream:
            mapping = re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(?:/memfd:(\S+))?", line)
            if mapping:
                name = mapping.group(1)
            elif name and line.startswith("Rss:"):
                found[name] = found.get(name, 0) + int(line.split()[1])
            elif not name and line.startswith("Anonymous:"):
                found["anonymous"] += int(line.split()[1])
    if SANITIZED:
        del found["anonymous"]
    return {**found, "all": sum(found.values())}


class Account:
    """What each kind may be, and the most that was seen of it."""

    def __init__(self, daemon):
        self.daemon = daemon
        self.most = {}
        self.start = resident_kib(daemon.pid)
        with Client(daemon.runtime_dir) as client:
            ring_kib, page_kib = client.welcome.ring_bytes >> 10, client.welcome.page_bytes >> 10
        self.limits = {"kvtier-extent": DEVICE_KIB, "kvtier-host": HOST_KIB,
                       "kvtier-ring": len(WORKERS) * ring_kib, "kvtier-control": len(WORKERS) * page_kib}
        if not SANITIZED:
            self.limits["anonymous"] = self.start["anonymous"] + ANONYMOUS_KIB
        self.limits["all"] = sum(self.limits.values())

    def look(self):
        for kind, kib in resident_kib(self.daemon.pid).items():
            self.most[kind] = max(self.most.get(kind, 0), kib)
            assert kib <= self.limits.get(kind, 0), f"{kind}: {kib} KiB; the limits are {self.limits}"
        if not SANITIZED:
            front = resident_kib(self.daemon.front_pid())
            self.most["front"] = max(self.most.get("front", 0), front["all"])
            assert front["all"] <= FRONT_KIB, front

    def is_back(self):
        spare = {"anonymous": ANONYMOUS_KIB, "all": ANONYMOUS_KIB}
        return all(kib <= self.start.get(kind, 0) + spare.get(kind, 0)
                   for kind, kib in resident_kib(self.daemon.pid).items())


def test_resident_memory_and_the_budgets():
    with Fleet(SETS) as fleet:
        account = Account(fleet.daemon)
        workers = [fleet.start("--seed", n + 1, "--seconds", 2 * SLOWER, *args)
                   for n, args in enumerate(WORKERS)]
        while any(worker.poll() is None for worker in workers):
            account.look()
            time.sleep(0.02)
        for worker in workers:
            assert fleet.finish(worker)["errors"] == 0
        fleet.expect_empty()
        wait_until(account.is_back, f"its memory is given back: {account.start}", 5)
        end = resident_kib(fleet.daemon.pid)
        print(f"KiB at the start {account.start}, at most {account.most}, at the end {end}")
        # It was worth looking: both budgets were nearly full.
        assert account.most["kvtier-extent"] > 0.8 * DEVICE_KIB
        assert account.most["kvtier-host"] > 0.8 * HOST_KIB
