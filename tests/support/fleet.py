"""Several workers of one private kvtierd, watched while they work.

    with Fleet(sets={...}) as fleet:
        worker = fleet.start("--mode", "offloaded")  # kvtier-synth, unless name= says another
        fleet.finish(worker)

A thread asks the daemon for its tiers all the time: a budget that is exceeded fails the test. At the
end every budget must be back to zero (or what the host keeps). Workers that are left are killed by their pid.
"""

import json
import signal
import subprocess
import threading
import time

from kvtierd import SLOWER, Daemon, program, wait_until
from rawclient import CONTROL, STATUS, Client, fields_of, number

DEFAULTS = {"device.cpu0.budget": "768KiB", "host.budget": "24MiB", "host.chunk": "256KiB",
            "device.cpu0.piece_size": "16KiB", "daemon.idle_after": "300ms"}


def parse_tier(raw):
    fields = fields_of(raw)
    return {"name": fields[1][0].decode(), "budget": fields[2][0], "used": fields.get(3, [0])[0],
            "dead": fields.get(4, [0])[0]}


class Watch(threading.Thread):
    """Looks at the tiers every few milliseconds; goes on when front or daemon are replaced."""

    def __init__(self, daemon):
        super().__init__()
        self.daemon_under_test = daemon
        self.stopping = threading.Event()
        self.looks = 0
        self.most = {}
        self.over = []
        self.start()

    def look(self, client):
        reply = client.ask(STATUS, number(1, 1), timeout_s=1)
        for tier in map(parse_tier, reply.body[STATUS][3]):
            self.most[tier["name"]] = max(self.most.get(tier["name"], 0), tier["used"])
            if tier["used"] > tier["budget"]:
                self.over.append(tier)
        self.looks += 1

    def run(self):
        while not self.stopping.is_set():
            client = None
            try:
                client = Client(self.daemon_under_test.runtime_dir, role=CONTROL, timeout_s=1)
                while not self.stopping.wait(0.01):
                    self.look(client)
            except (OSError, TimeoutError, KeyError):
                self.stopping.wait(0.02)
            finally:
                if client is not None:
                    client.close()

    def stop(self):
        self.stopping.set()
        self.join()


class Fleet:
    def __init__(self, sets=None, watched=True, kept_bytes=0):
        self.kept = {"host": kept_bytes}  # host.preallocate: stays when all is over
        self.daemon = Daemon(sets={**DEFAULTS, **(sets or {})})
        self.workers = []
        self.watch = Watch(self.daemon) if watched else None

    def start(self, *args, name="kvtier-synth"):
        worker = subprocess.Popen(
            [program(name), "--runtime-dir", self.daemon.runtime_dir, *map(str, args)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.workers.append(worker)
        return worker

    def finish(self, worker, status=0, timeout_s=60):
        """Waits for its end; returns what it reported, with its stderr."""
        try:
            out, err = worker.communicate(timeout=timeout_s * SLOWER)
        except subprocess.TimeoutExpired:
            worker.kill()
            out, err = worker.communicate()
            raise AssertionError(f"still running: {' '.join(worker.args)}\n{out}{err}\n"
                                 f"{self.daemon.log()[-3000:]}") from None
        assert worker.returncode == status, (f"{' '.join(worker.args)}: {worker.returncode}\n{out}"
                                             f"{err}\n{self.daemon.log()[-3000:]}")
        result = json.loads(out) if out else {}
        result["stderr"] = err
        return result

    def kill(self, worker):
        worker.send_signal(signal.SIGKILL)
        worker.communicate()

    def ctl(self, *args):
        out = subprocess.run([program("kvtierctl"), "--runtime-dir", self.daemon.runtime_dir,
                              "--json", *map(str, args)], capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stderr
        return json.loads(out.stdout)

    def worker_of(self, worker):
        """What kvtierctl says about it; None: it is not there."""
        for entry in self.ctl("workers")["workers"]:
            if entry["pid"] == worker.pid:
                return entry
        return None

    def tier(self, name):
        return next(t for t in self.ctl("status")["tiers"] if t["name"] == name)

    def is_empty(self):
        status = self.ctl("status")
        return not status["workers"] and not status["caches"] and \
            not any(t["used_bytes"] != self.kept.get(t["name"], 0) or t["pinned_by_dead_bytes"]
                    for t in status["tiers"])

    def expect_empty(self, timeout_s=10):
        try:
            wait_until(self.is_empty, "every budget is zero", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.ctl('status')}\n{self.daemon.log()[-3000:]}") from None

    def close(self, check=True):
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
            worker.communicate()
        try:
            if check:
                self.expect_empty()
        finally:
            if self.watch is not None:
                self.watch.stop()
            self.daemon.close(check)
        if check and self.watch is not None:
            assert not self.watch.over, f"a budget was exceeded: {self.watch.over[:5]}"
            assert self.watch.looks > 0

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        self.close(check=kind is None)


def state_of(pid):
    """The letter in /proc/PID/stat: T is stopped."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stream:
        return stream.read().rsplit(")", 1)[1].split()[0]


def wait_stopped(worker):
    wait_until(lambda: state_of(worker.pid) == "T", "the worker has stopped itself", 20)


def seconds_since(start):
    return time.monotonic() - start
