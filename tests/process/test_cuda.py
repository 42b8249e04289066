"""The cuda device, whole and in real processes, on a GPU that is played (tests/fake_cuda): the checks
of tests/gpu/run.py, which on a real one are the GPU's tests, and what the fake can be told to do.

test: timeout_s=600
"""

import os
import subprocess
import sys

import pytest

from kvtierd import BIN, ROOT, Daemon, program, run_to_end

sys.path.insert(0, os.path.join(ROOT, "tests", "gpu"))
import harness  # noqa: E402  (tests/gpu)
import measure  # noqa: E402
import run  # noqa: E402

FAKE = os.path.join(os.path.dirname(BIN.rstrip("/")), "fake_cuda", "libcuda.so.1")
pytestmark = pytest.mark.skipif(not os.path.exists(FAKE), reason="built without CUDA: no nvcc here")

# Timings mean nothing here; longer prompts show nothing more.
NAMES = [name for name in run.CHECKS if name not in ("ratio32k", "ratio128k", "ratio400k")]


@pytest.mark.parametrize("name", NAMES)
def test_check(name):
    context = harness.Context(fake=True)
    run.CHECKS[name](context)
    assert context.rows


def table(*args):
    out = subprocess.run([os.path.join(ROOT, "tests", "gpu", "run.py"), "--fake", *args], text=True,
                         capture_output=True, check=False)
    return out.returncode, out.stdout.partition("SUMMARY")[2]


def test_the_table():
    status, text = table("--set", "daemon.log_level=debug", "ratio8k")
    assert status == 0 and "| decode step, 1024 tokens, nothing resident | ratio" in text, text
    status, text = table("--set", "daemon.log_level=nonsense", "ratio8k")
    assert status == 1 and "FAILED: ratio8k" in text, text


def test_a_machine_that_cannot_show_something(monkeypatch):
    def check_nothing(context):
        """Nothing."""
        raise harness.Skip("it has too little of everything")
    context = harness.Context(fake=True)
    monkeypatch.setitem(run.CHECKS, "nothing", check_nothing)
    assert run.run(context, ["nothing"]) == ([], ["nothing"])
    assert context.rows == [("nothing SKIPPED", "it has too little of everything")]


def test_limit_is_measured():
    result = measure.ratio(harness.Context(fake=True), 600)
    assert result["limit_bytes"] > 0
    assert result["ratio"] > 0 and result["steps_timed"] == 16
    assert abs(result["moved_bytes_step"] / result["limit_bytes"] - 1) < 0.01, result


def test_slow_steps_are_told():
    """Which they were, and whether a STEP was asked for before them."""
    context = harness.Context(fake=True)
    with context.daemon() as daemon:
        r = context.synth(daemon, *harness.SMALL, "--mode", "offloaded", "--tokens", 24, "--ahead", 8)
    slow = r["slow_steps"]
    assert r["steps_timed"] == 24 and r["schedules_timed"] == 3 and len(slow) == 5
    assert [s["us"] for s in slow] == sorted((s["us"] for s in slow), reverse=True)
    assert slow[0]["us"] == r["step_us_max"] >= r["step_us_p99"] >= r["step_us_p90"] >= r["step_us"] > 0
    for s in slow:
        assert s["first"] == (s["step"] % 8 == 0), slow


@pytest.mark.parametrize("mode", ["dynamic", "offloaded"])
def test_a_step_without_the_library(mode):
    """Only where nothing is streamed: a slot is not the worker's any more when its piece is done."""
    context = harness.Context(fake=True)
    with context.daemon() as daemon:
        r = context.synth(daemon, *harness.SMALL, "--mode", mode, "--tokens", 24, "--ahead", 8, "--bare",
                          "--compute-us", 100)
    assert r["steps"] == 3 + 1 + 24 + 1 and r["steps_timed"] == 24
    assert 0 < r["host_us_layer"] <= r["host_us_layer_p99"] and r["host_us_begin"] > r["host_us_layer"]
    assert ("bare_us" in r) == (mode == "dynamic")
    assert mode != "dynamic" or r["bare_us_before"] > 600 and r["bare_us_after"] > 600  # 6 layers


CONFIG = "[host]\nbudget = 64MiB\n[device gpu0]\ndriver = cuda\nbudget = 64MiB\n"


def fake(**more):
    return {**os.environ, "LD_LIBRARY_PATH": os.path.dirname(FAKE), **more}


def test_without_a_driver():
    """Daemon and worker say what is missing. (There is no libcuda on the machines that run this.)"""
    probe = subprocess.run([program("kvtier-synth"), "--device-kind", "cuda"], capture_output=True,
                           text=True, check=False)
    if "libcuda.so.1" not in probe.stderr:
        pytest.skip("this machine has a driver")
    assert probe.returncode == 3 and "install the NVIDIA driver" in probe.stderr
    status, log = run_to_end(config=CONFIG)
    assert status == 1 and "install the NVIDIA driver" in log, log


def test_a_driver_that_is_too_old():
    status, log = run_to_end(config=CONFIG, environment=fake(FAKE_CUDA_NO_VALUES="1"))
    assert status == 1 and "64-bit stream memory operations" in log, log


def test_the_daemons_gpu_is_lost():
    context = harness.Context(fake=True)
    context.environment["FAKE_CUDA_FAIL_AFTER"] = "300"
    daemon = context.daemon()
    del context.environment["FAKE_CUDA_FAIL_AFTER"]  # the worker's is well
    try:
        worker = context.start(daemon, *harness.SMALL, "--mode", "offloaded", "--prompt", 2000, "--tokens", 100000)
        result = context.finish(worker, status=3, timeout_s=60)
        assert result["result"] in ("KVT_EGONE", "KVT_EDEVICE"), result
        assert daemon.stop(check=False) == 4
        assert "CUDA_ERROR_ILLEGAL_ADDRESS 700" in daemon.log(), daemon.log()
    finally:
        daemon.close(check=False)


def test_the_workers_gpu_is_lost():
    context = harness.Context(fake=True)
    with context.daemon() as daemon:
        worker = context.start(daemon, *harness.SMALL, "--mode", "offloaded", "--prompt", 2000, "--tokens", 100000,
                               FAKE_CUDA_FAIL_AFTER="30")
        result = context.finish(worker, status=3, timeout_s=60)
        assert result["result"] == "KVT_EDEVICE", result
        context.synth(daemon, *harness.SMALL, "--mode", "offloaded", "--prompt", 300, "--tokens", 10)
        harness.expect_empty(context, daemon)


def test_two_gpus():
    """Each worker computes on the one that it names, and the daemon knows them by their UUIDs."""
    context = harness.Context(fake=True)
    context.environment["FAKE_CUDA_GPUS"] = "2"
    config = "[host]\nbudget = 128MiB\n" + "".join(
        f"[device gpu{n}]\ndriver = cuda\nbudget = 64MiB\nuuid = {(0xa0 + n):02x}" +
        f"{(0xa0 + n):02x}" * 15 + "\n" for n in (1, 0))
    with Daemon(config=config, environment=context.environment) as daemon:
        workers = [context.start(daemon, *harness.SMALL, "--mode", "offloaded", "--prompt", 900, "--tokens", 400,
                                 "--device", f"{0xa0 + n:02x}" * 16, "--seed", n + 1) for n in (0, 1)]
        harness.wait_until(lambda: {w["device"] for w in harness.ctl(context, daemon, "status")["workers"]} ==
                       {"gpu0", "gpu1"}, "one worker on each GPU")
        for worker in workers:
            context.finish(worker)
        harness.expect_empty(context, daemon)


def test_a_worker_without_a_gpu():
    """It is told at once, and not when it maps the first extent."""
    with Daemon(config=CONFIG, environment=fake()) as daemon:
        worker = subprocess.run([program("kvtier-synth"), "--runtime-dir", daemon.runtime_dir], text=True,
                                capture_output=True, check=False)
        assert worker.returncode == 3
        assert "device gpu0 is a cuda device" in worker.stderr, worker.stderr


def test_a_gpu_that_the_daemon_does_not_have():
    context = harness.Context(fake=True)
    context.environment["FAKE_CUDA_GPUS"] = "2"
    with Daemon(config=CONFIG, environment=context.environment) as daemon:
        worker = context.start(daemon, "--device", "a1" * 16)
        assert "no device of this daemon has that identity" in context.finish(worker, status=3)["stderr"]


def test_not_all_can_be_pinned():
    """It comes up as far as it goes, says so once, and serves with what there is."""
    context = harness.Context(fake=True)
    context.environment["FAKE_CUDA_PINNED"] = str(100 << 20)
    with context.daemon(host=256 << 20) as daemon:
        daemon.wait_for_line("and no more")
        used = {t["name"]: t["used_bytes"] for t in harness.ctl(context, daemon, "status")["tiers"]}["host"]
        assert 0 < used < 100 << 20 and used % (1 << 20) == 0
        context.synth(daemon, *harness.SMALL, "--mode", "offloaded", "--prompt", 1500, "--tokens", 20)
        harness.expect_empty(context, daemon)
        warnings = [line for line in daemon.lines if "warning:" in line]
        assert len(warnings) == 1, warnings
        for part in (f"{used >> 20}.0 MiB", "256.0 MiB", "preallocate", "cuMemHostRegister", "LimitMEMLOCK"):
            assert part in warnings[0].replace(f"{used >> 20} MiB", f"{used >> 20}.0 MiB") \
                .replace("256 MiB", "256.0 MiB"), (part, warnings[0])


def test_nothing_is_pinned_before_it_is_needed():
    context = harness.Context(fake=True)
    with context.daemon(sets={"host.preallocate": "none"}) as daemon:
        def used():
            return {t["name"]: t["used_bytes"] for t in harness.ctl(context, daemon, "status")["tiers"]}["host"]
        assert used() == 0
        context.synth(daemon, *harness.SMALL, "--mode", "offloaded", "--prompt", 300, "--tokens", 10)
        harness.wait_until(lambda: used() == 0, "what was needed is given back")
        assert not daemon.has_line("preallocated")


def test_the_gpu_has_less_than_the_budget():
    """As beside workers of a daemon before, which pin what they had: it is said, and caches get what is there."""
    context = harness.Context(fake=True).also(FAKE_CUDA_MEMORY=str(80 << 20), FAKE_CUDA_TAKEN=str(56 << 20))
    with context.daemon(device=64 << 20) as daemon:
        assert "device gpu0: 24.0 MiB of its memory are free, less than its budget" in daemon.log()
        result = context.synth(daemon, *harness.WIDE, "--mode", "dynamic", "--prompt", 2500, "--chunk", 500,
                               "--tokens", 20)
        assert {"R", "S"} == set(result["layers"]) and result["bytes_checked"] > 0
