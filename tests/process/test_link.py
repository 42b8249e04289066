"""What the links can do: measured when the daemon starts, and then what plans and status make of it.

The second device is that of a plug-in, tests/process/plugin/gated_driver.c: it cannot measure.
"""

import json
import os
import subprocess

from kvtierd import SLOWER, Daemon, program, wait_until

PLUGINS = os.path.join(os.environ["KVT_BUILD"], "tests", "plugin", "gated")
SHAPE = ["--layers", "4", "--kv-heads", "2", "--head-dim", "16", "--tokens", "1000"]


def ctl(daemon, *args):
    done = subprocess.run([program("kvtierctl"), "--runtime-dir", daemon.runtime_dir, "--json", *args],
                          capture_output=True, text=True, check=False, timeout=30 * SLOWER)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def plan(daemon, *args):
    return ctl(daemon, "plan", *SHAPE, *args)


def measured(daemon):
    wait_until(lambda: plan(daemon)["link_bytes_per_s"] > 0, "the link is measured")


def test_a_fresh_daemon_knows_its_link():
    """Without a worker; and what it measured with is given back."""
    with Daemon() as daemon:
        measured(daemon)
        assert daemon.has_line("device cpu0: link measured: ")
        assert not any(tier["used_bytes"] for tier in ctl(daemon, "status")["tiers"])


def test_a_budget_that_is_too_small():
    """No warning: nothing failed."""
    with Daemon({"device.cpu0.budget": "512KiB"}) as daemon:
        assert plan(daemon, "--mode", "offloaded", "--piece-tokens", "256")["link_bytes_per_s"] == 0
        assert daemon.stop() == 0
        assert not daemon.has_line("link"), daemon.log()


def test_a_link_that_cannot_be_measured():
    """One line, and everything else goes on: the other device has its number."""
    sets = {"daemon.plugin_dir": PLUGINS, "host.budget": "64MiB", "host.chunk": "1MiB",
            "device.gpu0.driver": "cuda", "device.gpu0.budget": "8MiB", "device.cpu0.budget": "8MiB"}
    with Daemon(config="[device cpu0]\n[device gpu0]\n", sets=sets) as daemon:
        measured(daemon)
        daemon.wait_for_line("device gpu0: its link cannot be measured")
        assert daemon.has_line("no clock today")
        assert plan(daemon, "--device", "1")["link_bytes_per_s"] == 0
