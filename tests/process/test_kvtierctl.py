"""kvtierctl: commands, tables, JSON, exit codes.

test: timeout_s=180
"""

import json
import os
import re
import shutil
import signal
import subprocess

import pytest

from kvtierd import SLOWER, Daemon, open_folders, program, wait_until


def ctl(*args, daemon=None, locale="C.UTF-8"):
    where = ["--runtime-dir", daemon.runtime_dir] if daemon else []
    return subprocess.run([program("kvtierctl"), *where, *args], capture_output=True, text=True,
                          check=False, timeout=30 * SLOWER, env=dict(os.environ, LC_ALL=locale))


def stopped(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stream:
        return stream.read().rsplit(")", 1)[1].split()[0] == "T"


class Held:
    """A worker that has stopped itself in the middle of a step."""

    def __init__(self, daemon, *args):
        self.process = subprocess.Popen(
            [program("kvtier-synth"), "--runtime-dir", daemon.runtime_dir, "--hold-step", "4", *args],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: stopped(self.process.pid), "the worker has stopped itself")

    def __enter__(self):
        return self.process

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module", name="daemon")
def module_daemon():
    with Daemon() as daemon:
        yield daemon


# ---- what it shows


def test_status_of_nothing(daemon):
    done = ctl("status", daemon=daemon)
    assert done.returncode == 0 and done.stderr == ""
    assert re.search(r"^kvtierd \d+\.\d+\.\d+, up ", done.stdout)
    assert re.search(r"^cpu0 +0 B +0 B +16\.0 MiB ", done.stdout, re.M)
    assert re.search(r"^host +0 B +0 B +64\.0 MiB ", done.stdout, re.M)
    assert not re.search(r" $", done.stdout, re.M)


def test_devices_are_named(daemon):
    """What status, the log and --json say of a device is what --device takes."""
    assert "uuid" not in ctl("status", daemon=daemon).stdout  # one device: there is no choice
    with Daemon(sets={"device.cpu1.budget": "8MiB"}) as two:
        tiers = json.loads(ctl("status", "--json", daemon=two).stdout)["tiers"]
        uuids = {tier["name"]: tier.get("uuid") for tier in tiers}
        assert set(uuids) == {"cpu0", "cpu1", "host"} and uuids["host"] is None
        text = ctl("status", daemon=two).stdout
        for name in ("cpu0", "cpu1"):
            assert f"uuid of {name}: {uuids[name]}\n" in text
            assert f"uuid {uuids[name]}" in "\n".join(l for l in two.lines if f"device {name}: cpu" in l)
        with Held(two, "--device", uuids["cpu1"].upper()):
            (worker,) = json.loads(ctl("workers", "--json", daemon=two).stdout)["workers"]
            assert worker["device"] == "cpu1"
        run = [program("kvtier-run"), "--runtime-dir", two.runtime_dir, "--random", "tiny",
               "--prompt-tokens", "8", "-n", "2", "--device"]
        done = subprocess.run([*run, uuids["cpu1"]], capture_output=True, text=True, check=False,
                              timeout=60 * SLOWER)
        assert done.returncode == 0, done.stderr
        assert ctl("status", "--json", daemon=two).returncode == 0
        done = subprocess.run([*run, "0" * 31 + "1"], capture_output=True, text=True, check=False,
                              timeout=60 * SLOWER)
        assert done.returncode == 1 and "no device of this daemon has that identity" in done.stderr
        assert done.stderr.count("attach: ") == 1, done.stderr


def test_tables(daemon):
    with Held(daemon, "--mode", "offloaded", "--resident", "1", "--name", "a\033[31mb", "--rows", "2") as worker:
        status = ctl("status", daemon=daemon).stdout
        assert "\033" not in status and "a?[31mb" in status
        workers = ctl("workers", daemon=daemon).stdout
        assert re.search(rf"a\?\[31mb +{worker.pid} +\d+ +segment +cpu0 +step +1 ", workers)
        caches = ctl("caches", daemon=daemon).stdout
        assert re.search(r"offloaded +2 +\d+ .*[█░]{4}$", caches, re.M)
        assert caches.count("█") == 1 + 1 and "█ resident" in caches  # one layer, and the legend
        plain = ctl("caches", daemon=daemon, locale="C").stdout
        assert re.search(r"[#-]{4}$", plain, re.M) and plain.isascii()


def test_json(daemon):
    with Held(daemon, "--mode", "offloaded", "--name", "held \"one\"") as worker:
        status = json.loads(ctl("--json", "status", daemon=daemon).stdout)
        assert [t["name"] for t in status["tiers"]] == ["cpu0", "host"]
        assert status["tiers"][0]["budget_bytes"] == 16 << 20
        assert all(0 < t["used_bytes"] <= t["budget_bytes"] for t in status["tiers"])
        assert all(0 < t["live_bytes"] <= t["used_bytes"] for t in status["tiers"])
        (one,) = status["workers"]
        assert one["pid"] == worker.pid and one["name"] == "held \"one\"" and one["kind"] == "segment"
        (cache,) = status["caches"]
        assert cache["session"] == one["session"] and cache["layers"] == "SSSS"
        assert cache["counters"]["steps_committed"] > 0
        assert json.loads(ctl("caches", "--json", daemon=daemon).stdout)["caches"][0]["mode"] == "offloaded"
        assert list(json.loads(ctl("workers", "--json", daemon=daemon).stdout)) == ["workers"]


def test_watch(daemon):
    process = subprocess.Popen([program("kvtierctl"), "--runtime-dir", daemon.runtime_dir, "status",
                                "--json", "--watch=1"], stdout=subprocess.PIPE, text=True)
    try:
        looks = [json.loads(process.stdout.readline()) for _ in range(2)]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(10)
        process.stdout.close()
    assert looks[1]["uptime_ms"] > looks[0]["uptime_ms"]


def test_version(daemon):
    done = ctl("version", daemon=daemon)
    assert done.returncode == 0
    assert re.fullmatch(r"kvtierctl \S+, protocol 1\.0\nkvtierd \S+, protocol 1\.0\n", done.stdout)
    assert json.loads(ctl("version", "--json", daemon=daemon).stdout)["protocol"] == "1.0"


# ---- plan

SHAPES = "tiny, smollm2-135m, smollm2-1.7b, llama-3.2-1b, qwen2.5-7b, llama-3-8b, llama-3-70b"


def test_shapes_are_one_list(daemon):
    """Of kvtierctl and of kvtier-run, and each is known to both."""
    def words(program_name):
        done = subprocess.run([program(program_name), "--help"], capture_output=True, text=True,
                              check=True)
        return " ".join(done.stdout.split())
    assert SHAPES in words("kvtier-run") and SHAPES in words("kvtierctl")
    for shape in SHAPES.split(", "):
        done = ctl("plan", "--shape", shape, "--tokens", "16", daemon=daemon)
        assert done.returncode == 0 or "does not fit" in done.stderr, done.stderr


def test_plan(daemon):
    shape = ["--layers", "4", "--kv-heads", "2", "--head-dim", "16", "--tokens", "1000"]
    done = ctl("plan", *shape, daemon=daemon)
    assert done.returncode == 0, done.stderr
    assert "4, of which 4 stay on the device  ████" in done.stdout
    plan = json.loads(ctl("plan", *shape, "--mode", "offloaded", "--rows", "3", "--json",
                          daemon=daemon).stdout)
    assert plan["layers"] == "SSSS" and plan["resident_layers"] == 0
    assert plan["to_device_bytes_per_step"] == 4 * 3 * 1000 * 2 * 32 * 2
    assert plan["from_device_bytes_per_step"] == 4 * 3 * 2 * 32 * 2
    some = json.loads(ctl("plan", *shape, "--budget", "300KiB", "--piece-tokens", "256", "--json",
                          daemon=daemon).stdout)
    assert 0 < some["resident_layers"] < 4 and some["device_bytes"] <= 300 << 10


def test_plan_that_cannot_fit(daemon):
    done = ctl("plan", "--shape", "llama-3-70b", "--tokens", "1000000", daemon=daemon)
    assert done.returncode == 1
    assert re.search(r"does not fit into (cpu0|host): \d+ bytes \(", done.stderr)
    assert re.search(r"K and V take 305\.2 GiB: 320\.0 KiB a token in all 80 layers", done.stderr)
    assert done.stdout == ""
    host = ctl("plan", "--shape", "tiny", "--tokens", "131072", "--mode", "offloaded", daemon=daemon)
    assert host.returncode == 1
    assert re.search(r"does not fit into host: \d+ bytes \(96\.\d MiB\) needed, 67108864 \(64\.0 MiB\) to plan "
                     r"with, the budget is 67108864 \(64\.0 MiB\); raise \[host\] budget, shorten the context",
                     host.stderr), host.stderr
    device = ctl("plan", "--shape", "tiny", "--tokens", "9000", "--mode", "static", "--budget", "1MiB",
                 daemon=daemon)
    assert re.search(r"does not fit into cpu0: \d+ bytes \(\d\.\d MiB\) needed, 1048576 \(1\.0 MiB\) to plan "
                     r"with, the budget is 16777216 \(16\.0 MiB\); raise \[device cpu0\] budget",
                     device.stderr), device.stderr


def test_plan_says_what_helps(daemon):
    tiny = ctl("plan", "--shape", "tiny", "--tokens", "5", "--budget", "12", daemon=daemon)
    assert "196608 bytes (192.0 KiB) needed, 12 " in tiny.stderr, tiny.stderr
    pieces = ["plan", "--shape", "llama-3-8b", "--tokens", "5000", "--mode", "offloaded", "--piece-tokens", "2560"]
    large = ctl(*pieces, "--budget", "1MiB", daemon=daemon)
    assert "(30.0 MiB) needed" in large.stderr and "shorten" not in large.stderr
    assert "raise [device cpu0] budget and take smaller pieces: with those of 256 tokens 3145728 bytes " \
        "(3.0 MiB) would suffice" in large.stderr, large.stderr
    large = ctl(*pieces, "--budget", "3MiB", daemon=daemon)
    assert "budget, or take smaller pieces: with those of 256 tokens 3145728 bytes (3.0 MiB) suffice" in \
        large.stderr, large.stderr
    assert "does not fit into host" in ctl(*pieces, "--piece-tokens", "256", "--budget", "3MiB",
                                           daemon=daemon).stderr
    wrong = ctl("plan", "--shape", "tiny", "--tokens", "5", "--device", "1", daemon=daemon)
    assert wrong.returncode == 1 and "plan: device is 1; the daemon has 1, from 0 on" in wrong.stderr
    wrong = ctl("plan", "--shape", "tiny", "--tokens", "2147483393", daemon=daemon)
    assert "2147483393" in wrong.stderr and "1 to 2147483392" in wrong.stderr, wrong.stderr


def test_plan_that_cannot_fit_in_json(daemon):
    """It says of which tier how much is missing, in the words of the plan that fits."""
    shape = ["plan", "--shape", "tiny", "--json", "--tokens"]
    host = ctl(*shape, "131072", "--mode", "offloaded", daemon=daemon)
    assert host.returncode == 1
    said = json.loads(host.stdout)
    assert said.pop("error") in host.stderr
    need = said.pop("need_bytes")
    assert said == {"fits": False, "tier": "host", "available_bytes": 64 << 20, "budget_bytes": 64 << 20}
    assert need > 64 << 20
    # what fits takes as much a token
    half = json.loads(ctl(*shape, "65536", "--mode", "offloaded", daemon=daemon).stdout)
    assert half["fits"] is True and need == 2 * half["host_bytes"]
    device = ctl(*shape, "9000", "--mode", "static", "--budget", "1MiB", daemon=daemon)
    assert device.returncode == 1
    said = json.loads(device.stdout)
    assert said["fits"] is False and said["tier"] == "cpu0" and said["need_bytes"] > 1 << 20
    assert said["available_bytes"] == 1 << 20 and said["budget_bytes"] == 16 << 20
    # any other error has no object: it is no answer to the question
    other = ctl("plan", "--cache", "4711", "--json", daemon=daemon)
    assert other.returncode == 1 and other.stdout == ""


def test_plan_beyond_a_workers_limit():
    with Daemon(sets={"host.worker_max": "32MiB", "device.cpu0.worker_max": "8MiB"}) as limited:
        shape = ["plan", "--shape", "tiny", "--json", "--tokens"]
        host = ctl(*shape, "65536", "--mode", "offloaded", daemon=limited)
        said = json.loads(host.stdout)
        assert said["available_bytes"] == 32 << 20 and said["budget_bytes"] == 64 << 20
        assert "raise [host] worker_max, " in host.stderr
        device = ctl(*shape, "20000", "--mode", "static", daemon=limited)
        said = json.loads(device.stdout)
        assert said["available_bytes"] == 8 << 20 and said["budget_bytes"] == 16 << 20
        assert "raise [device cpu0] worker_max, " in device.stderr


def test_plan_of_running_cache(daemon):
    with Held(daemon, "--mode", "offloaded"):
        (cache,) = json.loads(ctl("caches", "--json", daemon=daemon).stdout)["caches"]
        plan = json.loads(ctl("plan", "--cache", str(cache["cache"]), "--json", daemon=daemon).stdout)
        assert plan["layers"] == "SSSS"


# ---- evict


def test_evict_and_kill(daemon):
    with Held(daemon, "--mode", "offloaded") as worker:
        (one,) = json.loads(ctl("workers", "--json", daemon=daemon).stdout)["workers"]
        host = f"{one['host_bytes'] / 1024:.1f} KiB" if one["host_bytes"] < 1 << 20 else \
            f"{one['host_bytes'] / 2**20:.1f} MiB"
        assert one["host_bytes"] > 0
        done = ctl("evict", str(one["session"]), daemon=daemon)
        assert done.returncode == 0 and f"session {one['session']} evicted" in done.stdout
        assert "still mapped by the worker" in done.stdout
        assert f"host {host}, device" in done.stdout
        assert worker.poll() is None
        done = ctl("evict", str(one["session"]), "--kill", "--json", daemon=daemon)
        assert done.returncode == 0, done.stderr
        assert worker.wait(10 * SLOWER) == -signal.SIGKILL
    wait_until(lambda: not any(t["used_bytes"] for t in json.loads(
        ctl("status", "--json", daemon=daemon).stdout)["tiers"]), "every budget is back to zero")


def test_evict_nobody(daemon):
    done = ctl("evict", "4711", daemon=daemon)
    assert done.returncode == 1 and "no worker with session 4711" in done.stderr


# ---- usage and exit codes


def test_help():
    done = ctl("--help")
    assert done.returncode == 0
    for word in ("status", "workers", "caches", "plan", "evict", "version", "--runtime-dir", "--json",
                 "--watch", "--timeout", "--kill", "exit status"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize("args,text", [
    ([], "a command is needed"),
    (["stats"], "command 'stats' is unknown"),
    (["--bogus"], "option '--bogus' is unknown"),
    (["--bogus", "status"], "option '--bogus' is unknown"),
    (["status", "--fast"], "'--fast' is unknown here"),
    (["status", "--watch", "0"], "--watch: '0' is not a number from 1 to 86400"),
    (["workers", "x"], "'x' is unknown here"),
    (["version", "x"], "'x' is unknown here"),
    (["evict"], "the worker's SESSION is needed"),
    (["evict", "none"], "'none' is not a number"),
    (["plan"], "--shape, or --layers, --kv-heads and --head-dim, or --cache"),
    (["plan", "--shape", "llama-3-8b"], "--tokens is needed"),
    (["plan", "--shape", "gpt-9"], f"--shape: 'gpt-9' is unknown; accepted: {SHAPES}"),
    (["plan", "--mode", "fast"], "--mode: 'fast' is unknown; accepted: dynamic, static, offloaded"),
    (["plan", "--dtype", "f64"], "--dtype: 'f64' is unknown; accepted: f32, f16, bf16"),
    (["plan", "--budget", "1GB"], "--budget: '1GB' is not a size"),
    (["plan", "--tokens"], "--tokens needs a value"),
    (["plan", "--rows", "-1"], "--rows: '-1' is not a number"),
    (["plan", "--cache", "1", "--tokens", "5"], "no other option goes with it"),
    (["--runtime-dir"], "--runtime-dir needs a value"),
    (["--timeout", "x", "status"], "--timeout: 'x' is not a number"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_usage(args, text):
    done = ctl(*args)
    assert done.returncode == 2 and text in done.stderr and done.stdout == "", done


@pytest.mark.parametrize("command", ["status", "workers", "caches", "version"])
def test_no_daemon(command, tmp_path):
    done = ctl("--runtime-dir", str(tmp_path), command)
    assert done.returncode == 3
    assert "attach.sock: No such file or directory; is kvtierd running" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="root may be somebody else")
def test_no_permission(daemon, tmp_path):
    """Somebody is there, who may not be asked: neither "no daemon" nor all right."""
    copy = shutil.copy(program("kvtierctl"), tmp_path)
    open_folders(str(tmp_path))
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    os.symlink(daemon.attach_path, closed / "attach.sock")
    done = subprocess.run([copy, "--runtime-dir", closed, "status"], capture_output=True, text=True,
                          check=False, timeout=30 * SLOWER, user=65534, extra_groups=[])
    assert done.returncode == 1 and "permission denied for uid 65534" in done.stderr
    assert "no permission" in ctl("--help").stdout


@pytest.mark.parametrize("args", [["status"], ["--json", "status"], ["workers"], ["caches"], ["version"],
                                  ["plan", "--shape", "tiny", "--tokens", "100"], ["--help"],
                                  ["status", "--watch", "1"]], ids=" ".join)
def test_full_disk(daemon, args):
    """What cannot be written is no success; --watch does not go on."""
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run([program("kvtierctl"), "--runtime-dir", daemon.runtime_dir, *args],
                              stdout=full, stderr=subprocess.PIPE, text=True, check=False,
                              timeout=30 * SLOWER)
    assert done.returncode == 1
    assert done.stderr == "kvtierctl: the output cannot be written: No space left on device\n"


def test_long_runtime_dir():
    done = ctl("--runtime-dir", "/" + "d" * 200, "status")
    assert done.returncode == 2 and "at most 107 are possible" in done.stderr
