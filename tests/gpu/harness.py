"""What the checks of tests/gpu share: a daemon and workers on a GPU or on the fake one, and the rows
of the table that is printed at the end."""

import copy
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "tests", "support"))

from kvtierd import BIN, Daemon, program, wait_until  # noqa: E402

KINDS = ["fd", "ipc"]
MODES = ["dynamic", "static", "offloaded", "offloaded-static"]
LLAMA = ["--layers", 32, "--heads", 8, "--k-dim", 128, "--v-dim", 128, "--dtype", "bf16"]
# What the fake takes for it: a token that is large beside the 2 MiB in which memory is given. As with LLAMA and a
# prompt in chunks of 4,096 tokens, what 512 tokens take of a layer is a piece: a layer that leaves makes room for it.
WIDE = ["--layers", 16, "--heads", 4, "--k-dim", 64, "--v-dim", 64, "--dtype", "f16"]
SMALL = ["--layers", 6, "--heads", 2, "--k-dim", 16, "--v-dim", 16, "--dtype", "f16"]
TOKEN_BYTES = 32 * 2 * 8 * 128 * 2  # LLAMA's: K and V of a token in all layers
WIDE_TOKEN_BYTES = 16 * 2 * 4 * 64 * 2
WIDE_SETS = {"device.gpu0.piece_size": "512KiB"}
EDITS = ["--rows", 2, "--rows-max", 4, "--ragged", "--crop", 10, "--fork", 10, "--reorder", 20, "--repeat",
         10, "--select", 10, "--reset", 3, "--abort", 15, "--ahead", 4]

MIB = 1 << 20
GIB = 1 << 30


class Skip(Exception):
    """A check says why this machine cannot show what it is to show."""


def verdict(holds, goal):
    return f"{'held' if holds else 'missed'}: {goal}"


class Context:
    """What the checks share: real or fake, and the rows of the table."""

    def __init__(self, fake=False, fast=False):
        self.fake = fake
        self.fast = fast
        self.rows = []
        self.sets = {}  # of every daemon, before those of the check
        self.environment = dict(os.environ)
        if fake:
            folder = os.path.join(os.path.dirname(BIN.rstrip("/")), "fake_cuda")
            self.environment["LD_LIBRARY_PATH"] = folder
            self.environment.setdefault("FAKE_CUDA_MEMORY", str(2 * GIB))

    def also(self, **environment):
        """The same with more in the environment of what is started; the rows are shared."""
        other = copy.copy(self)
        other.environment = {**self.environment, **environment}
        return other

    def row(self, what, result):
        self.rows.append((what, result))
        print(f"  {what}: {result}", flush=True)

    def daemon(self, kind="fd", device=None, host=None, sets=None, uuids=("",)):
        """One device for each UUID; budgets in bytes, each device's alike."""
        device = device or (96 * MIB if self.fake else 4 * GIB)
        host = host or (256 * MIB if self.fake else 8 * GIB)
        text = ("[daemon]\nidle_after = 300ms\n"
                f"[host]\nbudget = {host // MIB}MiB\nchunk = {'1MiB' if self.fake else '64MiB'}\n")
        for n, uuid in enumerate(uuids):
            text += (f"[device gpu{n}]\ndriver = cuda\nbudget = {device // MIB}MiB\nextent_kind = {kind}\n" +
                     (f"uuid = {uuid}\n" if uuid else ""))
        return Daemon(config=text, sets={**self.sets, **(sets or {})}, environment=self.environment)

    def start(self, daemon, *args, stdin=subprocess.DEVNULL, **environment):
        return subprocess.Popen(
            [program("kvtier-synth"), "--runtime-dir", daemon.runtime_dir, "--device-kind", "cuda",
             *map(str, args)], stdin=stdin, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**self.environment, **environment})

    def finish(self, worker, status=0, timeout_s=300):
        try:
            out, err = worker.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            worker.kill()
            out, err = worker.communicate()
            raise AssertionError(f"still running: {' '.join(worker.args)}\n{out}{err}") from None
        assert worker.returncode == status, \
            f"exit {worker.returncode}: {' '.join(worker.args)}\n{out}{err}"
        result = json.loads(out) if out else {}
        result["stderr"] = err
        return result

    def synth(self, daemon, *args, timeout_s=300):
        return self.finish(self.start(daemon, *args), timeout_s=timeout_s)


def ctl(context, daemon, *args):
    out = subprocess.run([program("kvtierctl"), "--runtime-dir", daemon.runtime_dir, "--json", *args],
                         capture_output=True, text=True, check=True, env=context.environment)
    return json.loads(out.stdout)


def tiers(context, daemon):
    """What is used of each; of the host, which keeps what it was given at start, what caches hold."""
    return {tier["name"]: tier["live_bytes" if tier["name"] == "host" else "used_bytes"]
            for tier in ctl(context, daemon, "status")["tiers"]}


def expect_empty(context, daemon, timeout_s=10):
    wait_until(lambda: not any(tiers(context, daemon).values()), "every budget is back to zero",
               timeout_s)
    status = ctl(context, daemon, "status")
    assert status["workers"] == [] and status["caches"] == [], status


def state_of(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as stream:
        return stream.read().rsplit(")", 1)[1].split()[0]


def nvidia_smi(field):
    """What nvidia-smi says of each GPU, as text; none: it says nothing."""
    try:
        out = subprocess.run(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"],
                             capture_output=True, text=True, check=True).stdout
        return [line.strip() for line in out.splitlines() if line.strip()]
    except (OSError, subprocess.CalledProcessError):
        return []


def gpu_used_bytes():
    """Memory in use on the first GPU; None: that is not known."""
    answers = nvidia_smi("memory.used")
    return int(answers[0]) * MIB if answers and answers[0].isdigit() else None


def memory_left_bytes():
    """Memory that may still be taken: the machine's, or what is left of a limit of this control group."""
    with open("/proc/meminfo", encoding="ascii") as stream:
        words = next(line for line in stream if line.startswith("MemAvailable")).split()
    left = int(words[1]) << 10
    for top, used in [("memory.max", "memory.current"),
                      ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")]:
        try:
            with open(f"/sys/fs/cgroup/{top}", encoding="ascii") as limit, \
                    open(f"/sys/fs/cgroup/{used}", encoding="ascii") as now:
                left = min(left, int(limit.read()) - int(now.read()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return left


def threads_of(pid):
    """By name of the process's threads, "main" for the first: (CPU time in us, times it gave the CPU up)."""
    found = {}
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/stat", encoding="ascii") as stream:
                name, rest = stream.read().split("(", 1)[1].rsplit(")", 1)
            ticks = rest.split()
            us = (int(ticks[11]) + int(ticks[12])) * 1e6 / os.sysconf("SC_CLK_TCK")
            with open(f"/proc/{pid}/task/{task}/status", encoding="ascii") as stream:
                slept = next(int(line.split()[1]) for line in stream if line.startswith("voluntary"))
        except (OSError, StopIteration):  # it has ended meanwhile
            continue
        try:
            with open(f"/proc/{pid}/task/{task}/schedstat", encoding="ascii") as stream:
                us = int(stream.read().split()[0]) / 1000  # finer, where the kernel keeps it
        except OSError:
            pass
        name = "main" if int(task) == pid else name  # others that libcuda starts bear its name
        before = found.get(name, (0, 0))
        found[name] = (before[0] + us, before[1] + slept)
    return found
