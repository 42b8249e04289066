"""What the checks of tests/gpu share: a daemon and workers on a GPU or on the fake one, and the rows
of the table that is printed at the end."""

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
SMALL = ["--layers", 6, "--heads", 2, "--k-dim", 16, "--v-dim", 16, "--dtype", "f16"]
TOKEN_BYTES = 32 * 2 * 8 * 128 * 2  # llama-3-8b: K and V of a token in all layers
EDITS = ["--rows", 2, "--rows-max", 4, "--ragged", "--crop", 10, "--fork", 10, "--reorder", 20, "--repeat",
         10, "--select", 10, "--reset", 3, "--abort", 15, "--ahead", 4]

MIB = 1 << 20
GIB = 1 << 30


class Context:
    """What the checks share: real or fake, and the rows of the table."""

    def __init__(self, fake=False, fast=False):
        self.fake = fake
        self.fast = fast
        self.rows = []
        self.environment = dict(os.environ)
        if fake:
            folder = os.path.join(os.path.dirname(BIN.rstrip("/")), "fake_cuda")
            self.environment["LD_LIBRARY_PATH"] = folder
            self.environment.setdefault("FAKE_CUDA_MEMORY", str(2 * GIB))

    def row(self, what, result):
        self.rows.append((what, result))
        print(f"  {what}: {result}", flush=True)

    def daemon(self, kind="fd", device=None, host=None, sets=None):
        device = device or (96 * MIB if self.fake else 4 * GIB)
        host = host or (256 * MIB if self.fake else 8 * GIB)
        text = ("[daemon]\nidle_after = 300ms\n"
                f"[host]\nbudget = {host // MIB}MiB\nchunk = {'1MiB' if self.fake else '64MiB'}\n"
                f"[device gpu0]\ndriver = cuda\nbudget = {device // MIB}MiB\nextent_kind = {kind}\n")
        return Daemon(config=text, sets=sets, environment=self.environment)

    def start(self, daemon, *args, **environment):
        return subprocess.Popen(
            [program("kvtier-synth"), "--runtime-dir", daemon.runtime_dir, "--device-kind", "cuda",
             *map(str, args)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
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
    return {tier["name"]: tier["used_bytes"] for tier in ctl(context, daemon, "status")["tiers"]}


def expect_empty(context, daemon, timeout_s=10):
    wait_until(lambda: not any(tiers(context, daemon).values()), "every budget is back to zero",
               timeout_s)
    status = ctl(context, daemon, "status")
    assert status["workers"] == [] and status["caches"] == [], status


def state_of(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as stream:
        return stream.read().rsplit(")", 1)[1].split()[0]


def gpu_used_bytes():
    """What nvidia-smi says is in use on the first GPU; None: it says nothing."""
    try:
        out = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits",
                              "-i", "0"], capture_output=True, text=True, check=True).stdout
        return int(out.split()[0]) * MIB
    except (OSError, ValueError, IndexError, subprocess.CalledProcessError):
        return None
