"""A cache that outgrows the device keeps as many layers there as PLAN says, however small the chunks were
in which its prompt was read: what layers leave are holes between others, and these become room.

test: timeout_s=120
"""

import json
import subprocess

import pytest

from kvtierd import SLOWER, Daemon, program

SHAPE = ["--layers", "30", "--kv-heads", "3", "--head-dim", "64"]
SYNTH = ["--layers", "30", "--heads", "3", "--k-dim", "64", "--v-dim", "64", "--mode", "dynamic",
         "--prompt", "1280", "--chunk", "256", "--ahead", "16"]
TOKEN_BYTES = 30 * 3 * 64 * 2 * 2


def run(name, daemon, *arguments):
    done = subprocess.run([program(name), "--runtime-dir", daemon.runtime_dir, *arguments],
                          capture_output=True, text=True, check=False, timeout=60 * SLOWER)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("budget", [8, 20, 32] if SLOWER == 1 else [20])
def test_as_many_layers_stay_as_planned(budget):
    """K and V take 29.2 MiB; host and device together hold hardly more."""
    host = 48 - budget
    with Daemon(sets={"device.cpu0.budget": f"{budget}MiB", "host.budget": f"{host}MiB",
                      "host.chunk": "1MiB"}) as daemon:
        plan = run("kvtierctl", daemon, "--json", "plan", *SHAPE, "--tokens", "1328", "--append", "256")
        result = run("kvtier-synth", daemon, *SYNTH, "--tokens", "48")
        assert 0 < plan["resident_layers"] < 30
        assert result["layers"].count("R") == plan["resident_layers"]


def test_what_it_moves_is_counted_and_is_not_the_bus():
    """By the worker, while it lives: in a stopped one's last step. Each layer that leaves crosses once."""
    with Daemon(sets={"device.cpu0.budget": "20MiB", "host.budget": "64MiB", "host.chunk": "1MiB"}) as daemon:
        worker = subprocess.Popen(
            [program("kvtier-synth"), "--runtime-dir", daemon.runtime_dir, *SYNTH, "--tokens", "48",
             "--hold-step", "20", "--hold-ms", "3000", "--progress"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            for _ in range(6):
                worker.stderr.readline()  # five chunks of the prompt, and a schedule
            status = run("kvtierctl", daemon, "--json", "status")
            counters = status["workers"][0]["counters"]
            cache = status["caches"][0]
            streamed = cache["layers"].count("S")
            assert 0 < streamed < 30
            assert counters["compacted_bytes"] > 0
            assert 0 < counters["migrated_bytes"] <= streamed * 1280 * TOKEN_BYTES // 30
            assert cache["counters"]["compacted_bytes"] == 0
        finally:
            worker.kill()
            worker.communicate()
