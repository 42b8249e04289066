"""What the links can do: measured when the daemon starts, and then what plans and status make of it.

The second device is that of a plug-in, tests/process/plugin/gated_driver.c: it cannot measure.
"""

import json
import os
import subprocess

import pytest

from kvtierd import SLOWER, Daemon, program, wait_until

PLUGINS = os.path.join(os.environ["KVT_BUILD"], "tests", "plugin", "gated")
SHAPE = ["--layers", "4", "--kv-heads", "2", "--head-dim", "16", "--tokens", "1000"]


def ctl(daemon, *args):
    done = subprocess.run([program("kvtierctl"), "--runtime-dir", daemon.runtime_dir, "--json", *args],
                          capture_output=True, text=True, check=False, timeout=30 * SLOWER)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def plan(daemon, *args):
    return ctl(daemon, "plan", *([] if "--cache" in args else SHAPE), *args)


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


# ---- what plans make of it


def text(daemon, *args):
    done = subprocess.run([program("kvtierctl"), "--runtime-dir", daemon.runtime_dir, *args],
                          capture_output=True, text=True, check=True, timeout=30 * SLOWER)
    return done.stdout


@pytest.mark.parametrize("rows", [1, 3])
def test_a_plan_is_bytes_over_speed(rows):
    with Daemon() as daemon:
        measured(daemon)
        p = plan(daemon, "--mode", "offloaded", "--rows", str(rows))
        assert p["to_device_bytes_per_step"] == 4 * rows * 1000 * 2 * 32 * 2
        for way, speed in (("to", p["link_bytes_per_s"]), ("from", p["link_from_bytes_per_s"])):
            wanted = p[f"{way}_device_bytes_per_step"] * 1e9 / speed
            assert abs(p[f"{way}_device_ns_per_step"] - wanted) <= 1, way
        slower = max(p["to_device_ns_per_step"], p["from_device_ns_per_step"])
        assert p["steps_per_s_max"] == pytest.approx(1e9 / slower, rel=1e-3)
        assert p["tokens_per_s_max"] == pytest.approx(rows * p["steps_per_s_max"], rel=1e-3)
        assert p["ceiling_fraction"] == 0 and "step_ns" not in p
        said = text(daemon, "plan", *SHAPE, "--mode", "offloaded")
        assert "by the link alone: computing may take longer" in said and "achieved" not in said
        resident = plan(daemon)
        assert resident["steps_per_s_max"] == resident["tokens_per_s_max"] == 0
        assert "the link sets none: nothing is streamed" in text(daemon, "plan", *SHAPE)
        tier, host = ctl(daemon, "status")["tiers"]
        assert tier["link_to_bytes_per_s"] == p["link_bytes_per_s"]
        assert tier["link_from_bytes_per_s"] == p["link_from_bytes_per_s"]
        assert host["link_to_bytes_per_s"] == 0


class Worker:
    """Decodes for as long as it is let."""

    def __init__(self, daemon, name, *args):
        self.process = subprocess.Popen(
            [program("kvtier-synth"), "--runtime-dir", daemon.runtime_dir, "--name", name,
             "--prompt", "2000", "--tokens", "1000000", *args],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def workers_of(daemon):
    return {worker["name"]: worker for worker in ctl(daemon, "workers")["workers"]}


def test_what_a_running_worker_achieves():
    """The part of its steps' time that the link needs for their bytes; and who shares the link."""
    with Daemon({"host.budget": "256MiB"}) as daemon:
        measured(daemon)
        with Worker(daemon, "resident", "--mode", "dynamic", "--tokens", "20000"), \
                Worker(daemon, "streamed", "--mode", "offloaded"):
            def known():
                both = workers_of(daemon)
                return all(both.get(name, {}).get("step_ns", 0) > 0 for name in ("resident", "streamed"))
            wait_until(known, "both have stepped")
            session = workers_of(daemon)["streamed"]["session"]
            (cache,) = [c["cache"] for c in ctl(daemon, "caches")["caches"] if c["session"] == session]

            def steady():
                """Behind the prompt: what the link needs for the last step is what it needs for most."""
                p = plan(daemon, "--cache", str(cache))
                needed = p["ceiling_fraction"] * p["step_ns"]
                return p if needed == pytest.approx(p["to_device_ns_per_step"], rel=0.25) else None
            p = wait_until(steady, "the fraction is that of the steps", 20)
            assert 0 < p["ceiling_fraction"] < 1.5
            assert p["link_workers"] == 1  # the other one moves nothing
            both = workers_of(daemon)
            assert 0 < both["streamed"]["ceiling_fraction"] < 1.5
            assert both["resident"]["ceiling_fraction"] == 0
            assert "% of the ceiling\n" in text(daemon, "plan", "--cache", str(cache))
            with Worker(daemon, "another", "--mode", "offloaded"):
                wait_until(lambda: plan(daemon, "--cache", str(cache))["link_workers"] == 2,
                           "the link is shared")
                assert "2 workers share the link, a fair share is 50 %" in \
                    text(daemon, "plan", "--cache", str(cache))
