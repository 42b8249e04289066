"""scripts/demo: whatever ends it, no process and no directory stay; what it cannot do it says.

test: timeout_s=180
"""

import importlib.machinery
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from kvtierd import BIN, ROOT, SLOWER, wait_until

MODELS = os.path.join(ROOT, "build", "model")
needs_model = pytest.mark.skipif(
    not os.path.isdir(MODELS) or not any(name.endswith(".gguf") for name in os.listdir(MODELS)),
    reason="no model; run `make model`")


def processes_of(scratch):
    """Who has this TMPDIR in its environment: the demo and whatever it has started."""
    mark = b"TMPDIR=" + os.fsencode(scratch)
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as stream:
                if mark in stream.read().split(b"\0"):
                    with open(f"/proc/{pid}/comm", encoding="ascii") as comm:
                        found[int(pid)] = comm.read().strip()
        except OSError:
            continue
    return found


class Demo:
    def __init__(self, **environment):
        self.scratch = tempfile.mkdtemp(prefix="kvdemo.")
        self.process = subprocess.Popen(
            [sys.executable, os.path.join(ROOT, "scripts", "demo")], text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": self.scratch, "KVT_BIN": BIN, **environment})

    def wait_for_workers(self):
        wait_until(lambda: list(processes_of(self.scratch).values()).count("kvtier-run") == 2,
                   "both workers run", 30)

    def end(self):
        out, err = self.process.communicate(timeout=60 * SLOWER)
        return self.process.returncode, out, err

    def left(self):
        return list(processes_of(self.scratch).values()) + os.listdir(self.scratch)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        for pid in processes_of(self.scratch):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.scratch, ignore_errors=True)


@needs_model
@pytest.mark.parametrize("numbers", [
    [signal.SIGINT], [signal.SIGINT] * 5, [signal.SIGHUP], [signal.SIGTERM, signal.SIGHUP],
], ids=lambda numbers: "+".join(n.name for n in numbers))
@pytest.mark.parametrize("pause_s", [0, 0.02])
def test_signals_leave_nothing(numbers, pause_s):
    with Demo() as demo:
        demo.wait_for_workers()
        for number in numbers:
            demo.process.send_signal(number)
            time.sleep(pause_s)
        status, out, err = demo.end()
        # A later one may arrive while Python takes itself down and has the system's handlers again:
        # everything has been put away then, and to a shell it is the same status.
        assert status in {128 + n for n in numbers} | {-n for n in numbers[1:]}, err
        assert "interrupted" in out and err == ""
        assert demo.left() == []


@needs_model
def test_its_own_death_takes_the_processes_along():
    with Demo() as demo:
        demo.wait_for_workers()
        demo.process.kill()
        wait_until(lambda: not processes_of(demo.scratch), "no process is left")


def option_of(pid, name):
    with open(f"/proc/{pid}/cmdline", "rb") as stream:
        words = stream.read().decode().split("\0")
    return words[words.index(name) + 1]


@needs_model
@pytest.mark.parametrize("long_text,tokens", [("", ["1280", "1536"]), ("1", ["8128", "8128"])])
def test_long_takes_as_much_text_as_the_context_holds(long_text, tokens):
    with Demo(LONG=long_text) as demo:
        demo.wait_for_workers()
        workers = [pid for pid, name in processes_of(demo.scratch).items() if name == "kvtier-run"]
        assert sorted(option_of(pid, "--prompt-tokens") for pid in workers) == tokens
        demo.process.send_signal(signal.SIGINT)
        status, out, err = demo.end()
        assert status == 128 + signal.SIGINT and err == ""
        assert ("LONG=1 takes the whole texts" in out) == (not long_text)


@needs_model
def test_reader_goes_away_and_it_is_interrupted():
    """A closed terminal: SIGHUP, and nobody reads any more."""
    with Demo() as demo:
        demo.wait_for_workers()
        demo.process.stdout.close()
        demo.process.send_signal(signal.SIGHUP)
        assert demo.process.wait(60 * SLOWER) == 128 + signal.SIGHUP
        assert demo.process.stderr.read() == ""
        demo.process.stdout = None
        assert demo.left() == []


@needs_model
@pytest.mark.parametrize("budget,words", [
    ("64KiB", ["BUDGET=64KiB", "device memory"]), ("lots", ["budget = lots", "accepted"])])
def test_budget_that_is_not_usable(budget, words):
    with Demo(BUDGET=budget) as demo:
        status, _, err = demo.end()
        assert status == 1 and err.startswith("demo: ") and "Traceback" not in err
        assert all(word in err for word in words), err
        assert demo.left() == []


@pytest.mark.parametrize("command", [["scripts/demo"], ["make", "-s", "demo"]], ids=" ".join)
def test_model_that_is_not_there(command):
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, timeout=60,
                          env={**os.environ, "MODEL": "/no/such.gguf", "MAKEFLAGS": "", "KVT_BIN": BIN})
    assert done.returncode != 0 and "MODEL=/no/such.gguf" in done.stderr
    assert "leave MODEL out" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("command", [["scripts/demo"], ["make", "-s", "demo"]], ids=" ".join)
def test_model_that_is_a_directory(command):
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, timeout=60,
                          env={**os.environ, "MODEL": "/usr", "MAKEFLAGS": "", "KVT_BIN": BIN})
    assert done.returncode != 0 and "MODEL=/usr: that is a directory" in done.stderr


def test_small_sizes_are_told_apart():
    loader = importlib.machinery.SourceFileLoader("demo", os.path.join(ROOT, "scripts", "demo"))
    demo = importlib.util.module_from_spec(importlib.util.spec_from_loader("demo", loader))
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    loader.exec_module(demo)
    sys.dont_write_bytecode = before
    assert [demo.size(n) for n in (0, 64 << 10, 16 << 20)] == ["0.0 MiB", "64.0 KiB", "16.0 MiB"]
