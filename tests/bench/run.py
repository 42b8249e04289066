#!/usr/bin/env python3
"""make bench: ratios against a limit or a peer, measured in the same run.

    tests/bench/run.py [NAME...] [--quick]

Without names all of them; --quick takes fewer pairs. Every figure is the median of interleaved
pairs with its 95% interval (between order statistics). A goal is missed when the interval excludes
it. Prints a table and writes build/bench.json; what is worth keeping goes to docs/benchmarks.md
with hardware, command and date.
"""

import glob
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "tests", "support"))
from kvtierd import Daemon, program  # noqa: E402

BENCH = os.path.join(ROOT, "build", "release", "tests", "bench")
PROMPT = "/usr/share/common-licenses/GPL-3"
QUICK = "--quick" in sys.argv
PAIRS = 3 if QUICK else 9
ROOMY = {"host.budget": "1GiB", "host.chunk": "16MiB", "device.cpu0.budget": "1GiB"}
rows = []


def interval(values):
    values = sorted(values)
    count = len(values)
    low = max(0, math.floor((count - 1.96 * math.sqrt(count)) / 2))
    return {"low": values[low], "median": statistics.median(values), "high": values[count - 1 - low]}


def row(what, value, unit="", goal=None, at_most=True):
    """goal: the value to hold; missed when the whole interval is on the wrong side of it."""
    verdict = ""
    if goal is not None:
        missed = value["low"] > goal if at_most else value["high"] < goal
        verdict = f"{'missed' if missed else 'held'} ({'at most' if at_most else 'at least'} {goal:g})"
    rows.append({"what": what, "unit": unit, "verdict": verdict, **value})
    print(f"{what:<58} {value['median']:>9.3g} [{value['low']:.3g}, {value['high']:.3g}] "
          f"{unit:<9} {verdict}", flush=True)


def one_line(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, **options)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


# ---- the benchmarks -------------------------------------------------------------------------------------


def bench_control():
    with Daemon(sets=ROOMY) as daemon:
        r = one_line([os.path.join(BENCH, "bench_control")],
                     env=dict(os.environ, KVTIER_RUNTIME_DIR=daemon.runtime_dir))
    row("control request, p50", r["request_p50_us"], "us")
    row("control request, p99", r["request_p99_us"], "us")
    row("control request over a bare ZeroMQ echo, p50", r["ratio_p50"], "x")
    row("control request over a bare ZeroMQ echo, p99", r["ratio_p99"], "x")
    row("fork of 131,072 tokens", r["fork_131072_tokens_us"], "us", 1000)
    row("STEP of 8 steps over 32 streamed layers, until answered", r["step_request_us"], "us")
    row("a piece through kvtierd and libkvtier, no message", r["piece_through_kvtierd_us"], "us", 10)


def bench_piece():
    r = one_line([os.path.join(BENCH, "bench_piece")])
    row("a piece's wait and post, no message", r["ours"], "us", 10)
    row("bare futex round trip", r["theirs"], "us")
    row("a piece over a bare futex round trip, both asleep", r["asleep_ratio"], "x")


def bench_copy():
    r = one_line([os.path.join(BENCH, "bench_copy")])
    row("bytes/s of the device's threads over a plain threaded memcpy", r["ratio"], "x", 0.9,
        at_most=False)


def bench_stream():
    with Daemon(sets=ROOMY) as daemon:
        r = one_line([os.path.join(BENCH, "bench_stream")],
                     env=dict(os.environ, KVTIER_RUNTIME_DIR=daemon.runtime_dir))
    row("streamed bytes/s through kvtierd over a threaded memcpy", r["ratio"], "x", 0.9,
        at_most=False)
    row("streamed bytes/s through kvtierd", r["ours"], "GB/s")
    row("bytes streamed over the bytes needed", r["bytes_over_need"], "x")


def find_model():
    """$KVT_MODEL, or what `make model` fetched."""
    path = os.environ.get("KVT_MODEL")
    found = glob.glob(os.path.join(ROOT, "build", "model", "*.gguf"))
    if not path and not found:
        raise SystemExit("there is no model; `make model` fetches it")
    return path or found[0]


def run_model(model, prompt, decode, extra):
    return one_line([program("kvtier-run"), "--model", model, "--prompt-file", PROMPT,
                     "--prompt-tokens", str(prompt), "-n", str(decode), "--ignore-end", "--json",
                     "--progress", "never", "--threads", "2"] + extra)


class Decoding:
    """A kvtier-run that decodes in windows: between two of them it is stopped."""

    def __init__(self, model, extra):
        self.bytes = 0
        self.process = subprocess.Popen(
            [program("kvtier-run"), "--model", model, "--prompt-file", PROMPT, "--prompt-tokens", "512",
             "-n", "4096", "--ignore-end", "--progress", "never", "--threads", "2"] + extra,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self.until(1)  # the prompt is over

    def until(self, mark):
        """Seconds until so many bytes of text were written. Both sides write the same text."""
        start = time.perf_counter()
        self.process.send_signal(signal.SIGCONT)
        while self.bytes < mark:
            text = os.read(self.process.stdout.fileno(), 65536)
            if not text:
                raise SystemExit(f"kvtier-run ended after {self.bytes} bytes of text")
            self.bytes += len(text)
        seconds = time.perf_counter() - start
        self.process.send_signal(signal.SIGSTOP)
        return seconds

    def end(self):
        self.process.kill()
        self.process.communicate()


def bench_resident():
    """In turns of about 16 tokens: what else the machine does then falls on both sides alike."""
    model = find_model()
    ratios = []
    with Daemon(sets=ROOMY) as daemon:
        sides = {"local": Decoding(model, ["--local"]),
                 "daemon": Decoding(model, ["--runtime-dir", daemon.runtime_dir])}
        for window in range(20 if QUICK else 150):
            order = ["local", "daemon"] if window % 2 == 0 else ["daemon", "local"]
            seconds = {side: sides[side].until(64 * (window + 1)) for side in order}
            ratios.append(seconds["local"] / seconds["daemon"])
        for side in sides.values():
            side.end()
    row("resident decode with the daemon over without", interval(ratios), "x", 0.99, at_most=False)


def bench_llama():
    model = find_model()
    python = os.path.join(ROOT, "build", "venv-llama", "bin", "python")
    if not os.path.exists(python):
        print("SKIP llama: needs build/venv-llama with llama-cpp-python (make venv-llama)")
        return
    prompt, decode = (1024, 33) if QUICK else (4096, 65)
    ours, theirs = {"prompt": [], "decode": []}, {"prompt": [], "decode": []}
    with Daemon(sets=ROOMY) as daemon:
        for pair in range(3 if QUICK else 5):
            def we():
                r = run_model(model, prompt, decode, ["--runtime-dir", daemon.runtime_dir])
                for part in ours:
                    ours[part].append(r[f"{part}_tokens_per_s"])

            def they():
                r = one_line([python, os.path.join(ROOT, "tests", "bench", "llama_peer.py"), model,
                              PROMPT, str(prompt), str(decode - 1), "2", "512"])
                for part in theirs:
                    theirs[part].append(r[f"{part}_tokens_per_s"])

            for side in ([we, they] if pair % 2 == 0 else [they, we]):
                side()
    for part in ("prompt", "decode"):
        row(f"{part} at {prompt} tokens, kvtier-run", interval(ours[part]), "tokens/s")
        row(f"{part} at {prompt} tokens, llama.cpp", interval(theirs[part]), "tokens/s")
        ratio = [a / b for a, b in zip(ours[part], theirs[part])]
        row(f"{part}, kvtier-run over llama.cpp", interval(ratio), "x", 0.5, at_most=False)


def bench_start():
    values = []
    for _ in range(PAIRS):
        daemon = Daemon(sets=ROOMY, start=False)
        try:
            began = time.monotonic()
            daemon.start()
            values.append((time.monotonic() - began) * 1e3)
        finally:
            daemon.close()
    row("start to ready", interval(values), "ms")


BENCHES = {"control": bench_control, "piece": bench_piece, "copy": bench_copy,
           "stream": bench_stream,
           "start": bench_start, "resident": bench_resident, "llama": bench_llama}


def main():
    names = [name for name in sys.argv[1:] if not name.startswith("-")] or list(BENCHES)
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        raise SystemExit(f"unknown: {' '.join(unknown)}; there are {' '.join(BENCHES)}")
    with open("/proc/cpuinfo", encoding="utf-8") as stream:
        cpu = next((line.split(":")[1].strip() for line in stream if "model name" in line), "?")
    print(f"{cpu}, {os.cpu_count()} CPUs, Linux {platform.release()}, "
          f"{time.strftime('%Y-%m-%d')}; median [95% interval]\n")
    for name in names:
        BENCHES[name]()
    with open(os.path.join(ROOT, "build", "bench.json"), "w", encoding="utf-8") as stream:
        json.dump(rows, stream, indent=1)


if __name__ == "__main__":
    main()
