"""The synthetic worker against a real daemon: every byte checked, every counter to the byte.

test: timeout_s=300
"""

import json
import os
import signal
import subprocess
import time

import pytest

from kvtierd import SLOWER, Daemon, program, wait_until

MODES = ["dynamic", "static", "offloaded", "offloaded-static"]
KINDS = [[], ["--dense"]]
ids = " ".join


def start(daemon, *args):
    return subprocess.Popen([program("kvtier-synth"), "--runtime-dir", daemon.runtime_dir, *args],
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def finish(process, status=0, timeout_s=60):
    try:
        out, err = process.communicate(timeout=timeout_s * SLOWER)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running: {' '.join(process.args)}\n{out}{err}") from None
    assert process.returncode == status, f"{' '.join(process.args)}\n{out}{err}"
    result = json.loads(out) if out else {}
    result["stderr"] = err
    return result


def synth(daemon, *args, status=0):
    return finish(start(daemon, *args), status)


def ctl(daemon, *args):
    out = subprocess.run([program("kvtierctl"), "--runtime-dir", daemon.runtime_dir, "--json", *args],
                         capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


def used(daemon):
    return {tier["name"]: tier["used_bytes"] for tier in ctl(daemon, "status")["tiers"]}


def expect_empty(daemon):
    wait_until(lambda: not any(used(daemon).values()), "every budget is back to zero")
    status = ctl(daemon, "status")
    assert status["workers"] == [] and status["caches"] == [], status


@pytest.fixture(scope="module", name="daemon")
def module_daemon():
    with Daemon() as daemon:
        yield daemon
        expect_empty(daemon)


# ---- every mode, and what it moves


@pytest.mark.parametrize("kind", KINDS, ids=ids)
@pytest.mark.parametrize("mode", MODES)
def test_modes(daemon, mode, kind):
    r = synth(daemon, "--mode", mode, "--rows", "3", "--ahead", "4", *kind)
    assert r["errors"] == 0 and r["tokens"] == 3 * (600 + 64)
    assert r["steps"] == r["steps_committed"] == 3 + 64
    token_bytes = 4 * 2 * (16 + 16) * 2
    assert r["bytes_written"] == r["tokens"] * token_bytes
    if mode.startswith("offloaded"):
        # Towards the device what a step reads, once; away from it what it appends.
        read = sum(3 * n * token_bytes for n in [0, 256, 512, *range(600, 664)])
        assert r["to_device_bytes"] == read
        assert r["from_device_bytes"] == r["bytes_written"]
        assert r["need_to_device_bytes"] == 3 * 663 * token_bytes
        assert r["need_from_device_bytes"] == 3 * token_bytes
        assert r["layers"] == "SSSS" and r["streamed_pieces"] == r["pieces"]
    else:
        assert r["to_device_bytes"] == r["from_device_bytes"] == 0
        assert r["layers"] == "RRRR" and r["streamed_pieces"] == 0


@pytest.mark.parametrize("piece_tokens", ["256", "512", "1024", "0"])
@pytest.mark.parametrize("mode", ["offloaded", "offloaded-static"])
def test_piece_sizes(daemon, mode, piece_tokens):
    r = synth(daemon, "--mode", mode, "--prompt", "2000", "--piece-tokens", piece_tokens)
    assert r["to_device_bytes"] == r["bytes_checked"]
    assert r["from_device_bytes"] == r["bytes_written"]


@pytest.mark.parametrize("resident", ["0", "1", "2", "3"])
@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_some_layers_resident(daemon, resident, kind):
    r = synth(daemon, "--mode", "offloaded", "--layers", "4", "--resident", resident, *kind)
    streamed = r["layers"].count("S")
    assert r["layers"].count("R") <= int(resident) or streamed == 0
    token_bytes = streamed * 2 * (16 + 16) * 2
    assert r["to_device_bytes"] == token_bytes * sum([0, 256, 512, *range(600, 664)])
    assert r["from_device_bytes"] == token_bytes * 664


@pytest.mark.parametrize("args", [
    ["--v-dim", "0"],
    ["--dtype", "f32", "--heads", "3", "--k-dim", "5", "--v-dim", "7"],
    ["--dtype", "bf16", "--k-dim", "128", "--v-dim", "64"],
    ["--layers", "1"],
    ["--layers", "40", "--k-dim", "4", "--v-dim", "4"],
    ["--shared", "0:3"],
    ["--layers", "7", "--shared", "1:3", "--shared", "2:6"],
], ids=ids)
@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_layouts(daemon, args, kind):
    synth(daemon, "--mode", "offloaded", *args, *kind)


def test_no_prompt(daemon):
    assert synth(daemon, "--mode", "offloaded", "--prompt", "0")["tokens"] == 64


# ---- device memory smaller than a layer


@pytest.mark.parametrize("mode", ["dynamic", "offloaded", "offloaded-static"])
def test_layer_larger_than_device(mode):
    # A layer's K and V at the end: 3,064 tokens of 512 bytes, 1.5 MiB.
    with Daemon(sets={"device.cpu0.budget": "1MiB"}) as daemon:
        r = synth(daemon, "--mode", mode, "--layers", "6", "--heads", "4", "--k-dim", "32",
                  "--v-dim", "32", "--prompt", "3000", "--piece-tokens", "256")
        assert r["streamed_pieces"] > r["steps"] * 6
        if mode != "dynamic":
            assert r["to_device_bytes"] == r["bytes_checked"]
        expect_empty(daemon)


def test_dynamic_migrates():
    with Daemon(sets={"device.cpu0.budget": "2MiB"}) as daemon:
        r = synth(daemon, "--layers", "6", "--heads", "4", "--k-dim", "32", "--v-dim", "32",
                  "--prompt", "3000", "--piece-tokens", "256")
        assert r["migrated_bytes"] > 0 and "S" in r["layers"]
        expect_empty(daemon)


def test_quota_names_budget_and_need():
    with Daemon(sets={"device.cpu0.budget": "1MiB"}) as daemon:
        r = synth(daemon, "--mode", "static", "--layers", "8", "--heads", "8", "--prompt", "3000",
                  status=3)
        assert "KVT_EQUOTA" in r["stderr"] and "budget of 1048576" in r["stderr"]
        expect_empty(daemon)


# ---- edits and aborts at random

EDITS = ["--rows", "4", "--ragged", "--ahead", "5", "--tokens", "250", "--crop", "15", "--fork", "15",
         "--reorder", "20", "--repeat", "10", "--select", "10", "--reset", "4", "--abort", "15"]


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("kind", KINDS, ids=ids)
@pytest.mark.parametrize("mode", ["dynamic", "offloaded"])
def test_edits(daemon, mode, kind, seed):
    r = synth(daemon, "--mode", mode, "--seed", str(seed), "--piece-tokens", "256", *EDITS, *kind)
    assert r["errors"] == 0 and r["edits"] > 0 and r["forks"] > 0 and r["aborts"] > 0
    if mode == "offloaded" and not kind:
        # What was not used is in a counter of its own; aborted steps used what they used.
        assert r["to_device_bytes"] >= r["bytes_checked"] or r["aborts"]


@pytest.mark.parametrize("kind", KINDS, ids=ids)
@pytest.mark.parametrize("mode", MODES)
def test_abort_and_go_on(daemon, mode, kind):
    r = synth(daemon, "--mode", mode, "--abort", "40", "--ahead", "3", "--crop", "10", *kind)
    assert r["aborts"] > 3 and r["steps_committed"] == r["steps"]


def test_many_rounds(daemon):
    r = synth(daemon, "--mode", "offloaded", "--rounds", "20", "--prompt", "100", "--tokens", "5")
    assert r["rounds"] == r["caches"] == 20


# ---- several workers


def seeds(count, *args):
    return [["--seed", str(n + 1), "--name", f"worker-{n}", *args] for n in range(count)]


@pytest.mark.parametrize("count", [2, 4])
def test_workers_at_once(count):
    with Daemon(sets={"device.cpu0.budget": "4MiB"}) as daemon:
        kinds = [["--mode", "offloaded"], ["--mode", "dynamic"], ["--mode", "offloaded", "--dense"],
                 ["--mode", "offloaded-static"]]
        workers = [start(daemon, *args, *kinds[n], "--prompt", "1500", "--tokens", "150")
                   for n, args in enumerate(seeds(count))]
        for worker in workers:
            finish(worker)
        expect_empty(daemon)


def test_one_is_killed():
    with Daemon(sets={"device.cpu0.budget": "4MiB"}) as daemon:
        workers = [start(daemon, *args, "--mode", "offloaded", "--tokens", "200", "--compute-us", "500")
                   for args in seeds(3)]
        for n in range(8):
            victim = start(daemon, "--seed", str(100 + n), "--mode", "offloaded", "--seconds", "60",
                           "--prompt", "200", "--tokens", "20", "--fork", "30", "--abort", "20")
            time.sleep(0.05 + 0.02 * n)
            victim.kill()
            victim.communicate()
        for worker in workers:
            finish(worker)
        expect_empty(daemon)


def test_one_is_stopped():
    """It holds what it was given; the others go on; evict --kill frees what it pins."""
    with Daemon() as daemon:
        held = start(daemon, "--mode", "offloaded", "--hold-step", "5", "--name", "held")
        wait_until(lambda: stopped(held.pid), "the worker has stopped itself")
        for worker in [start(daemon, *args, "--mode", "offloaded") for args in seeds(2)]:
            finish(worker)
        wait_until(lambda: [w["name"] for w in ctl(daemon, "workers")["workers"]] == ["held"], "the others are gone")
        workers = ctl(daemon, "workers")["workers"]
        assert workers[0]["state"] == "step"
        assert workers[0]["device_bytes"] > 0
        ctl(daemon, "evict", str(workers[0]["session"]), "--kill")
        held.communicate(timeout=10 * SLOWER)
        assert held.returncode == -signal.SIGKILL
        expect_empty(daemon)


def test_stopped_and_continued(daemon):
    held = start(daemon, "--mode", "offloaded", "--hold-step", "10", "--abort", "10")
    wait_until(lambda: stopped(held.pid), "the worker has stopped itself")
    time.sleep(0.3)
    held.send_signal(signal.SIGCONT)
    finish(held)


def stopped(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stream:
        return stream.read().rsplit(")", 1)[1].split()[0] == "T"


# ---- the daemon goes away


def test_daemon_is_killed():
    with Daemon() as daemon:
        plain = start(daemon, "--mode", "offloaded", "--seconds", "60", "--compute-us", "300")
        again = start(daemon, "--mode", "offloaded", "--seed", "2", "--re-attach", "--rounds", "6",
                      "--compute-us", "300")
        time.sleep(0.3)
        daemon.kill()
        r = finish(plain, status=3)
        assert "KVT_EGONE" in r["stderr"] and "detach, attach again, start over" in r["stderr"]
        daemon.start()
        r = finish(again)
        assert r["attached"] == 2 and r["errors"] == 0
        expect_empty(daemon)


def test_front_is_killed():
    """The worker notices nothing but a pause."""
    with Daemon() as daemon:
        worker = start(daemon, "--mode", "offloaded", "--compute-us", "200", "--rounds", "4")
        for _ in range(3):
            time.sleep(0.2)
            front = wait_until(daemon.front_pid, "the front is there")
            os.kill(front, signal.SIGKILL)
        r = finish(worker)
        assert r["attached"] == 1 and r["errors"] == 0
        expect_empty(daemon)


# ---- it can say no


def extents(pid):
    """Address ranges of the device memory that the process maps."""
    with open(f"/proc/{pid}/maps", encoding="ascii") as stream:
        lines = [line.split() for line in stream if "kvtier-extent" in line]
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_a_wrong_byte_is_found(daemon, kind):
    worker = start(daemon, "--mode", "dynamic", "--hold-step", "5", *kind)
    wait_until(lambda: stopped(worker.pid), "the worker has stopped itself")
    # Every byte of device memory is turned over: the next that is read is wrong.
    with open(f"/proc/{worker.pid}/mem", "r+b", buffering=0) as memory:
        for first, end in extents(worker.pid):
            memory.seek(first)
            old = memory.read(end - first)
            memory.seek(first)
            memory.write(bytes(byte ^ 0xff for byte in old))
    worker.send_signal(signal.SIGCONT)
    r = finish(worker, status=1)
    assert r["errors"] == 1
    assert "wrong: cache" in r["stderr"] and "expected 0x" in r["stderr"]
    assert "row 0 token" in r["stderr"] and "K offset" in r["stderr"]


@pytest.mark.parametrize("args,text", [
    (["--rows", "0"], "--rows: '0' is not accepted; a number from 1 to 1024 is"),
    (["--rows"], "--rows needs a value"),
    (["--mode", "fast"], "--mode: 'fast' is not accepted"),
    (["--dense=1"], "--dense: '1' is not accepted; it takes no value"),
    (["--shared", "3:1"], "--shared: '3:1' is not accepted"),
    (["--shared", "1:9"], "there are 4 layers"),
    (["--nonsense"], "'--nonsense' is unknown"),
    (["--device", "0011"], "--device: '0011' is not accepted; 32 hexadecimal digits"),
    (["--device", "g" * 32], "32 hexadecimal digits are"),
    (["--device", "0" * 33], "32 hexadecimal digits are"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_usage(args, text):
    done = subprocess.run([program("kvtier-synth"), *args], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and text in done.stderr


# ---- several devices


def test_each_worker_on_its_device():
    """Two devices, a worker on each, named by UUID and held in a step: checked bytes, charged where they
    are."""
    first, second = "00112233445566778899aabbccddee01", "00112233-4455-6677-8899-AABBCCDDEE02"
    config = "[host]\nbudget=64MiB\nchunk=1MiB\n" + "".join(
        f"[device {name}]\nbudget=16MiB\nuuid={uuid}\n" for name, uuid in (("a", first), ("b", second)))
    with Daemon(config=config) as daemon:
        assert used(daemon) == {"a": 0, "b": 0, "host": 0}
        workers = {}
        for name, uuid, rows in (("b", second, 1), ("a", first, 3)):
            workers[name] = start(daemon, "--device", uuid, "--name", f"on-{name}", "--mode", "static",
                                  "--rows", str(rows), "--hold-step", "10", "--hold-ms", "3000")
            wait_until(lambda name=name: used(daemon)[name] > 0, f"memory of {name} is in use")
            if name == "b":
                assert used(daemon)["a"] == 0
        status = ctl(daemon, "status")
        charged = {w["device"]: w["device_bytes"] for w in status["workers"]}
        assert {w["name"]: w["device"] for w in status["workers"]} == {"on-a": "a", "on-b": "b"}
        assert {name: used(daemon)[name] for name in charged} == charged
        # three rows of what one row is on the other
        token_bytes = 4 * 2 * (16 + 16) * 2
        assert charged["a"] >= 3 * 664 * token_bytes and charged["b"] >= 664 * token_bytes
        assert charged["a"] > charged["b"]
        for name, rows in (("a", 3), ("b", 1)):
            r = finish(workers[name])
            assert r["errors"] == 0 and r["tokens"] == rows * 664 and r["bytes_checked"] > 0
        expect_empty(daemon)


@pytest.mark.parametrize("args", [["--rounds", "1", "--tokens", "4"], ["--help"], ["--version"]], ids=ids)
def test_full_disk(daemon, args):
    """A report that nobody can read is no success."""
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run([program("kvtier-synth"), "--runtime-dir", daemon.runtime_dir, *args],
                              stdout=full, stderr=subprocess.PIPE, text=True, check=False,
                              timeout=60 * SLOWER)
    assert done.returncode == 3
    assert done.stderr == "kvtier-synth: the output cannot be written: No space left on device\n"


def test_interrupt_while_the_daemon_is_stopped():
    """Nobody answers, and nobody is gone: Ctrl-C ends it all the same."""
    with Daemon() as daemon:
        process = start(daemon, "--mode", "offloaded", "--seconds", "60")
        wait_until(lambda: any(used(daemon).values()), "it is at work")
        os.kill(daemon.pid, signal.SIGSTOP)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=3 * SLOWER) == -signal.SIGINT
        process.communicate()
        os.kill(daemon.pid, signal.SIGCONT)
        expect_empty(daemon)


def test_device_that_is_not_there(daemon):
    done = finish(start(daemon, "--device", "f" * 32), status=3)
    assert "device" in done["stderr"]
