"""A device that is lost: workers are told, the log says which and where, and kvtierd ends with status 4.

The device is that of a plug-in, tests/process/plugin/lossy_driver.c: the cpu driver until it is told by
a file in which call to be lost.

test: timeout_s=120
"""

import os
import subprocess
import time

import pytest

from kvtierd import EXIT_DEVICE, SLOWER, Daemon, program, wait_until

PLUGINS = os.path.join(os.environ["KVT_BUILD"], "tests", "plugin", "lossy")
GPU0, CPU0 = "11" * 16, "22" * 16
SETS = {"daemon.plugin_dir": PLUGINS, "host.budget": "64MiB", "host.chunk": "1MiB",
        "device.gpu0.driver": "cuda", "device.gpu0.budget": "8MiB", "device.gpu0.uuid": GPU0,
        "device.cpu0.budget": "8MiB", "device.cpu0.uuid": CPU0}


class Lossy:
    """kvtierd with one device on the plug-in and one on the cpu driver."""

    def __init__(self, tmp_path):
        self.order = tmp_path / "lose"
        self.workers = []
        self.daemon = Daemon(config="[device gpu0]\n[device cpu0]\n", sets=SETS,
                             environment=dict(os.environ, KVT_LOSE_DEVICE=str(self.order)))

    def start(self, *args):
        """A worker that says of each schedule that it is through; into a file, which never fills."""
        said = self.order.with_name(f"said.{len(self.workers)}")
        with open(said, "wb") as stream:
            worker = subprocess.Popen(
                [program("kvtier-synth"), "--runtime-dir", self.daemon.runtime_dir, "--mode",
                 "offloaded", "--progress", "--seconds", "600", *args],
                stdout=subprocess.DEVNULL, stderr=stream)
        worker.said = said.read_text
        self.workers.append(worker)
        return worker

    def lose(self, call):
        new = self.order.with_suffix(".new")
        new.write_text(call)
        new.rename(self.order)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        self.daemon.close(check=False)


def working(worker):
    """Waits until it has made some steps."""
    wait_until(lambda: worker.said().count(" steps ") > 5, "the worker works", 20)


def is_told(line):
    """Gone, or for who looks before the hang-up: the step failed, or the device did."""
    return ("KVT_EGONE" in line and "attach again" in line or "KVT_EDEVICE" in line or
            "KVT_EFAILED" in line and "input/output error" in line)


@pytest.mark.parametrize("call, words", [("copy", "submitting a copy"), ("post", "posting"),
                                         ("poll", "copying")])
def test_lost(tmp_path, call, words):
    with Lossy(tmp_path) as lossy:
        daemon = lossy.daemon
        workers = [lossy.start("--device", GPU0), lossy.start("--device", GPU0, "--dense"),
                   lossy.start("--device", CPU0)]
        for worker in workers:
            working(worker)
        assert not daemon.has_line("error")
        started = time.monotonic()
        lossy.lose(call)
        wait_until(daemon.ended, "kvtierd has ended by itself", 10)
        # it waits for nothing that the device would have to do: far from its stop_timeout of 5 s
        assert time.monotonic() - started < 3 * SLOWER
        assert daemon.stop(check=False) == EXIT_DEVICE, daemon.log()
        errors = [line for line in daemon.lines if ": error: " in line]
        assert errors == [f"kvtierd: error: device gpu0 is lost: {words} failed: the device reported an "
                          "error; the daemon stops and has to be started again"], daemon.log()
        assert daemon.lines[-1] == "kvtierd: info: stopped"
        # All of them, also on the device that works: their caches are gone with the daemon.
        for worker in workers:
            assert worker.wait(timeout=20 * SLOWER) == 3, worker.said()
            last = worker.said().strip().splitlines()[-1]
            assert is_told(last), last


def test_started_again_it_serves(tmp_path):
    """Nothing of the life before is in the way: workers that attach again go on."""
    with Lossy(tmp_path) as lossy:
        worker = lossy.start("--device", GPU0, "--re-attach", "--seconds", "1")
        working(worker)
        lossy.lose("copy")
        wait_until(lossy.daemon.ended, "kvtierd has ended by itself", 10)
        assert lossy.daemon.stop(check=False) == EXIT_DEVICE
        lossy.order.unlink()
        lossy.daemon.start()
        assert worker.wait(timeout=60 * SLOWER) == 0, worker.said()
        assert any(is_told(line) for line in worker.said().splitlines()), worker.said()
        assert lossy.daemon.stop() == 0
