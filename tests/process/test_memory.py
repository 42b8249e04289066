"""What kvtierd and kvtierd-front hold in memory, by the kernel's account, beside their budgets.

Whatever the daemon shares is a memory file, and its mappings bear the file's name; the host arena is
private, and known by its size. So each kind is compared with what bounds it, and the sum with the sum:
  kvtier-extent    the device's budget
  kvtier-host      the host's budget
  kvtier-ring      ring_bytes of WELCOME for each worker: its ring is filled once round as it works
  kvtier-control   a control page for each worker
  anonymous        ANONYMOUS_KIB above what there was at the start
A worker that says that it has unmapped an extent, and lies, has none of the budget's pages either.
Nothing else may be there. A sanitizer has memory of its own: the anonymous part is left out then.

test: timeout_s=120
"""

import mmap
import os
import re
import socket
import struct
import time

from fleet import Fleet
from kvtierd import SLOWER, Daemon, wait_until
from rawclient import (CLOSE, CONTROL, CREATE, EXTENT, STATUS, Client, data, fields_of, number)

SANITIZED = SLOWER > 1
DEVICE_KIB, HOST_KIB, FRONT_KIB = 6 << 10, 24 << 10, 16 << 10
SETS = {"device.cpu0.budget": f"{DEVICE_KIB}KiB", "host.budget": f"{HOST_KIB}KiB"}
if not SANITIZED:
    SETS["daemon.front_memory"] = f"{FRONT_KIB}KiB"
# Tables of the engine, which are touched when they are first needed, and what malloc keeps: 600 KiB
# were seen with these workers.
ANONYMOUS_KIB = 2048
# 2 KiB a token: each would like 4.2 MiB of the host, and the dynamic ones as much of the device. All
# together that leaves the host 3 MiB for the gaps between them.
WORKERS = [["--k-dim", 64, "--v-dim", 64, "--prompt", 2000, "--mode", mode]
           for mode in ("offloaded", "dynamic", "offloaded-static", "dynamic", "offloaded")]


def resident_kib(pid):
    """KiB in memory by the name of the memory file or arena, "anonymous", and "all" of these."""
    found = {"anonymous": 0}
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as stream:
        for line in stream:
            mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+) *(?:/memfd:(\S+))?", line)
            if mapping:
                size = int(mapping.group(2), 16) - int(mapping.group(1), 16)
                arena = size == HOST_KIB << 10 and mapping.group(3) == "0"
                name = "kvtier-host" if arena else mapping.group(4)
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
        """The kernel tells one mapping after the other, so of an extent that goes and one that comes
        meanwhile both may be counted: what is too much is so each time that one looks."""
        for _ in range(4):
            found = resident_kib(self.daemon.pid)
            beyond = {kind: kib for kind, kib in found.items() if kib > self.limits.get(kind, 0)}
            if not beyond:
                break
        assert not beyond, f"{beyond} KiB; the limits are {self.limits}"
        for kind, kib in found.items():
            self.most[kind] = max(self.most.get(kind, 0), kib)
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
        # It was worth looking: both budgets were used well.
        assert account.most["kvtier-extent"] > 0.8 * DEVICE_KIB
        assert account.most["kvtier-host"] > 0.6 * HOST_KIB


class Liar(Client):
    """Maps what it is sent, and never unmaps it."""

    def __init__(self, runtime_dir):
        super().__init__(runtime_dir)
        self.files, self.maps = [], []

    def serve(self, quiet_s=0.2):
        """Maps each extent, writes to it, and says of those asked for that they are unmapped."""
        self.socket.settimeout(quiet_s * SLOWER)
        try:
            while True:
                packet, fds, _, _ = socket.recv_fds(self.socket, 2048, 8)
                kind, session, extent = struct.unpack_from("<4xI8xII", packet)
                if kind == EXTENT:
                    self.files += fds
                    self.maps.append(mmap.mmap(fds[0], struct.unpack_from("<32xQ", packet)[0]))
                    self.maps[-1].write(b"\xa5" * len(self.maps[-1]))
                else:
                    self.reclaimed(extent, session)
        except TimeoutError:
            self.socket.settimeout(self.timeout_s)

    def held_bytes(self):
        return sum(512 * os.fstat(file).st_blocks for file in self.files)

    def close(self, give_back=True):
        super().close(give_back)
        for mapping in self.maps:
            mapping.close()
        for file in self.files:
            os.close(file)


def test_who_stays_mapped_holds_no_memory():
    """It gets the whole device again and again, and keeps every file mapped that it had."""
    budget = DEVICE_KIB << 10
    layer = data(1, number(1, 1) + number(2, 1) + number(3, 256) + number(4, 256) + number(5, 2))
    options = layer + number(2, 2) + number(4, 1) + number(5, 4096) + number(6, 1)  # static: 4 MiB
    with Daemon(sets=SETS) as daemon, Client(daemon.runtime_dir, role=CONTROL) as control:
        def used():
            tier = fields_of(fields_of(control.ask(STATUS, number(1, 1)).bytes)[30][0])[3][0]
            return fields_of(tier).get(3, [0])[0]
        liar = Liar(daemon.runtime_dir)
        try:
            for _ in range(4):
                created = liar.ask(CREATE, data(1, options))
                assert created.code == 0, created.text
                liar.serve()
                assert 4 << 20 <= liar.held_bytes() <= budget
                assert liar.ask(CLOSE, number(1, created.body[11][1][0])).code == 0
                liar.serve()
                wait_until(lambda: used() == 0, "its device memory counts as free")
                assert liar.held_bytes() == 0
            assert sum(len(mapping) for mapping in liar.maps) > 2 * budget
            assert not any(any(mapping[:4096]) for mapping in liar.maps)
        finally:
            liar.close()
