#!/usr/bin/env python3
"""Everything about the cuda device that needs a GPU, in one go, with a table at the end.

    make bundle, then on the GPU's machine:
    KVT_BIN=build/bundle/bin tests/gpu/run.py [--fast] [--list] [--set NAME=VALUE]... [CHECK]...

Without CHECK all are run but those that only run when named; --fast leaves out the long ones. Exit 0: all
right (a goal of the table may be missed), 1: something failed, 77: there is no GPU. Nothing but Python and
what the bundle holds is needed.

--fake runs the same against tests/fake_cuda (no GPU, tiny shapes): that is how tests/process/test_cuda.py
keeps this script right. Each check is a function check_<name>, here or, where something is timed, in measure.py;
its text says what it shows.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import measure  # noqa: E402
from harness import (EDITS, GIB, KINDS, LLAMA, MIB, MODES, SMALL, TOKEN_BYTES, WIDE,  # noqa: E402
                     WIDE_SETS, WIDE_TOKEN_BYTES, Context, Skip, ctl, expect_empty, gpu_used_bytes, memory_left_bytes,
                     nvidia_smi, program, state_of, tiers, verdict, wait_until)

# ---------------------------------------------------------------- the checks


def check_share(context):
    """Two processes share device memory, by file descriptor and by IPC handle; both worker kinds."""
    for kind in KINDS:
        checked = 0
        with context.daemon(kind) as daemon:
            workers = [context.start(daemon, *SMALL, "--mode", mode, "--prompt", 1500, "--tokens", 60,
                                     "--ahead", 8, "--seed", n + 1, *dense)
                       for n, (mode, dense) in enumerate(
                           [("dynamic", []), ("offloaded", []), ("static", ["--dense"]),
                            ("offloaded", ["--dense"])])]
            for worker in workers:
                checked += context.finish(worker)["bytes_checked"]
            expect_empty(context, daemon)
        context.row(f"sharing by {kind}, 4 workers", f"{checked / 1e6:.0f} MB checked, all right")


def check_edits(context):
    """Forks, crops, reorders, aborts at random: every byte, every mode, both kinds."""
    for kind in KINDS:
        with context.daemon(kind, device=48 * MIB) as daemon:
            workers = [context.start(daemon, *SMALL, "--mode", mode, "--prompt", 900, "--tokens", 60,
                                     "--rounds", 1 if context.fake else 5, "--seed", n + 10, *EDITS, *dense)
                       for n, (mode, dense) in enumerate(
                           [("dynamic", []), ("offloaded", []), ("dynamic", ["--dense"]),
                            ("offloaded", ["--dense"])])]
            results = [context.finish(worker) for worker in workers]
            expect_empty(context, daemon)
        context.row(f"edits and aborts at random, {kind}",
                    f"{sum(r['edits'] for r in results)} edits, "
                    f"{sum(r['aborts'] for r in results)} aborts, all right")


def check_exact(context):
    """8,192 tokens of llama-3-8b in all four modes, both worker kinds: every byte on the GPU."""
    shape, prompt, chunk = (SMALL, 1000, 256) if context.fake else (LLAMA, 8192, 2048)
    for mode in MODES:
        for dense in [[], ["--dense"]]:
            with context.daemon() as daemon:
                r = context.synth(daemon, *shape, "--mode", mode, "--prompt", prompt, "--chunk", chunk,
                                  "--tokens", 48, "--ahead", 16, *dense)
                expect_empty(context, daemon)
            context.row(f"exact: {prompt} tokens, {mode}, {r['worker']}",
                        f"{r['bytes_checked'] / 1e9:.2f} GB checked, all right; "
                        f"{r['step_us'] / 1e3:.2f} ms a step")


def kill_workers(context, kind, kills, at_once, limit_s):
    """Kills so many in mid-step, a few at a time, beside one whose bytes are compared all the while. Returns
    how many within the limit, the seconds, and the bytes compared."""
    steady, checked, killed, start = None, 0, 0, time.monotonic()
    with context.daemon(kind) as daemon:
        while killed < kills and time.monotonic() - start < limit_s:
            if steady is None or steady.poll() is not None:
                checked += context.finish(steady)["bytes_checked"] if steady else 0
                steady = context.start(daemon, *SMALL, "--mode", "offloaded", "--prompt", 900, "--tokens",
                                       200, "--ahead", 4, "--seconds", 1 if context.fake else 5, "--seed", 1)
            victims = [context.start(daemon, *SMALL, "--mode", ["offloaded", "dynamic"][n % 2],
                                     "--prompt", 900, "--tokens", 100000, "--ahead", 16,
                                     "--seed", n + 2, "--compute-us", 200, "--progress")
                       for n in range(killed, min(killed + at_once, kills))]
            for n, victim in enumerate(victims):
                for _ in range(6 + (killed + n) % 4):
                    victim.stderr.readline()  # it is in the middle of its prompt or beyond
            for victim in victims:
                victim.kill()
                victim.communicate()
                assert victim.returncode == -signal.SIGKILL, "it had ended before it was killed"
            killed += len(victims)
        took = time.monotonic() - start
        checked += context.finish(steady)["bytes_checked"]
        expect_empty(context, daemon)
        assert not daemon.has_line("error"), daemon.log()
    return killed, took, checked


def kill(context, kills, at_once, limit_s):
    before = gpu_used_bytes()
    for kind in KINDS:
        killed, took, checked = kill_workers(context, kind, kills, at_once, limit_s)
        context.row(f"worker SIGKILL in mid-step, {kind}",
                    f"{killed} kills in {took:.0f} s ({verdict(killed == kills, f'{kills} kills')}), the other one "
                    f"checked {checked / 1e6:.0f} MB, all right; budgets back to zero")
    after = gpu_used_bytes()
    if before is not None and after is not None and not context.fake:
        context.row("GPU memory in use before and after the kills",
                    f"{before // MIB} and {after // MIB} MiB")
        assert after <= before + 64 * MIB, "GPU memory has leaked"


def check_kill(context):
    """SIGKILL of a worker in mid-step, again and again; another's bytes stay right, nothing leaks."""
    kill(context, 5 if context.fake else 20, at_once=1, limit_s=60)


def check_kills100(context):
    """The same, 100 times in all, four at a time; at most a minute."""
    kill(context, 8 if context.fake else 50, at_once=4, limit_s=28)


def check_stop(context):
    """A worker is stopped in mid-step; others attach, create, generate, close and free all the same."""
    for kind in KINDS:
        with context.daemon(kind, device=160 * MIB) as daemon:
            stopped = context.start(daemon, *SMALL, "--mode", "offloaded", "--prompt", 900, "--tokens", 60,
                                    "--hold-step", 20, "--seed", 1)
            wait_until(lambda pid=stopped.pid: state_of(pid) == "T", "the worker has stopped itself", 30)
            times = []
            for n in range(3 if context.fake else 10):
                start = time.monotonic()
                context.synth(daemon, *SMALL, "--mode", MODES[n % 4], "--prompt", 600, "--tokens", 20,
                              "--ahead", 4, "--seed", n + 2, timeout_s=60)
                times.append(time.monotonic() - start)
            held = tiers(context, daemon)["gpu0"]
            assert held > 0, "the stopped worker's memory stays charged to it"
            stopped.send_signal(signal.SIGCONT)
            context.finish(stopped)
            expect_empty(context, daemon)
        context.row(f"a worker stopped in mid-step, {kind}",
                    f"{len(times)} others came and went beside it, the slowest in {max(times):.2f} s; "
                    "it went on and all was right")


def check_reclaim(context):
    """Workers whose resident caches do not fit together: memory is taken back and forth."""
    for kind in KINDS:
        with context.daemon(kind, device=24 * MIB) as daemon:
            workers = [context.start(daemon, *SMALL, "--mode", "dynamic", "--prompt", 4000, "--tokens", 40,
                                     "--rows", 4, "--rounds", 2, "--ahead", 4, "--seed", n + 1)
                       for n in range(3)]
            results = [context.finish(worker) for worker in workers]
            expect_empty(context, daemon)
        context.row(f"three caches in a budget for less, {kind}",
                    f"{sum(r['migrated_bytes'] for r in results) / 1e6:.0f} MB migrated, "
                    f"{sum(r['streamed_pieces'] for r in results)} pieces streamed, all right")


def turns(context, daemon, arguments, count):
    """Two workers step in turn, each when the other has been idle for long enough to give way. Returns what they
    say, and the longest turn: a STEP that brought a cache back."""
    def idle(worker):
        mine = [w for w in ctl(context, daemon, "status")["workers"] if w["pid"] == worker.pid]
        return mine[0]["state"] == "idle" and int(mine[0]["idle_ms"]) > 400

    def line_of(worker):
        line = worker.stderr.readline()
        assert "steps" in line, line + worker.stderr.read()

    workers, longest = [], 0
    for seed in (1, 2):
        worker = context.start(daemon, *arguments, "--tokens", count + 1, "--turns", "--progress", "--seed", seed,
                               stdin=subprocess.PIPE)
        workers.append(worker)
        line_of(worker)  # the prompt is one chunk
        wait_until(lambda one=worker: idle(one), "it is idle", 30)
    for worker in workers * count:
        start = time.monotonic()
        worker.stdin.write("\n")
        worker.stdin.flush()
        line_of(worker)
        longest = max(longest, time.monotonic() - start)
        wait_until(lambda one=worker: idle(one), "it is idle", 30)
    return [context.finish(worker) for worker in workers], longest


def check_static_idle(context):
    """Static caches that do not fit together: an idle one's memory goes to the other, and its addresses stay."""
    shape, token_bytes, tokens = (WIDE, WIDE_TOKEN_BYTES, 1024) if context.fake else (LLAMA, TOKEN_BYTES, 8192)
    kv, count = tokens * token_bytes, 3
    for dense in [[], ["--dense"]]:
        with context.daemon(device=kv * 3 // 2, host=4 * kv, sets=WIDE_SETS if context.fake else None) as daemon:
            results, longest = turns(context, daemon, [*shape, "--mode", "static", "--tokens-max", tokens,
                                                       "--prompt", tokens - 8, "--chunk", tokens, *dense], count)
            expect_empty(context, daemon)
        assert all(r["address_changes"] == 0 for r in results), results
        assert all(r["migrated_bytes"] > 2 * count * kv * 0.9 for r in results), results
        context.row(f"two static caches of {kv / 1e9:.2f} GB in {kv * 1.5 / 1e9:.2f} GB take turns, "
                    f"{results[0]['worker']}",
                    f"{2 * count} turns, {sum(r['migrated_bytes'] for r in results) / 1e9:.2f} GB there and back, "
                    f"the longest turn {longest:.2f} s; no address has changed, "
                    f"{sum(r['bytes_checked'] for r in results) / 1e9:.2f} GB compared, all right")


def orphans(context, kind):
    """A stopped worker still maps the memory of a daemon that was killed: the next one works beside it."""
    daemon = context.daemon(kind)
    try:
        orphan = context.start(daemon, *SMALL, "--mode", "dynamic", "--prompt", 900, "--tokens", 60,
                               "--hold-step", 6)
        wait_until(lambda: state_of(orphan.pid) == "T", "the worker has stopped itself", 30)
        daemon.kill()
        daemon.start()
        context.synth(daemon, *SMALL, "--mode", "dynamic", "--prompt", 900, "--tokens", 20)
        orphan.send_signal(signal.SIGCONT)
        assert "KVT_EGONE" in context.finish(orphan, status=3, timeout_s=30)["result"]
        expect_empty(context, daemon)
    finally:
        daemon.close()


def check_daemon_kill(context):
    """The daemon is killed in mid-step: no worker waits for ever; the next one works beside orphans."""
    for kind in KINDS:
        daemon = context.daemon(kind)
        try:
            worker = context.start(daemon, *SMALL, "--mode", "offloaded", "--prompt", 900, "--tokens", 1000000,
                                   "--ahead", 16, "--progress")
            for _ in range(8):
                worker.stderr.readline()
            daemon.kill()
            start = time.monotonic()
            r = context.finish(worker, status=3, timeout_s=20)
            took = time.monotonic() - start
            assert "KVT_EGONE" in r["result"], r
            daemon.start()
            context.synth(daemon, *SMALL, "--mode", "offloaded", "--prompt", 300, "--tokens", 10)
        finally:
            daemon.close()
        orphans(context, kind)
        context.row(f"daemon SIGKILL in mid-step, {kind}",
                    f"the worker was told within {took:.2f} s; a new daemon served another")


def check_exceed(context):
    """One sequence that neither the card nor the device's budget nor the host's holds alone. Long."""
    if context.fake:
        card = 80 * MIB
        context = context.also(FAKE_CUDA_MEMORY=str(card))
    else:
        answers = nvidia_smi("memory.total")
        if not answers:
            raise Skip("nvidia-smi does not say how large the card is")
        card = int(answers[0]) * MIB
    shape, token_bytes = (WIDE, WIDE_TOKEN_BYTES) if context.fake else (LLAMA, TOKEN_BYTES)
    chunk, steps = (512, 8) if context.fake else (16384, 24)
    tokens = int(card * 1.08 / token_bytes) // 256 * 256
    kv = tokens * token_bytes
    device = card * 3 // 4
    host = int((kv - device) * 1.2) + (16 * MIB if context.fake else 2 * GIB)
    if not context.fake and memory_left_bytes() < host + 8 * GIB:
        raise Skip(f"{host // GIB} GiB of host memory and 8 to spare are needed for {tokens} tokens; "
                   f"{memory_left_bytes() // GIB} are free")
    with context.daemon(device=device, host=host, sets=WIDE_SETS if context.fake else None) as daemon:
        r = context.synth(daemon, *shape, "--mode", "dynamic", "--prompt", tokens, "--chunk", chunk,
                          "--tokens", steps, "--ahead", 8, "--limit", timeout_s=240)
        expect_empty(context, daemon)
    resident, streamed = r["layers"].count("R"), r["layers"].count("S")
    assert resident > 0 and streamed > 0 and kv > card and kv > host, r
    assert r["device_bytes"] <= device and r["host_bytes"] <= host, r
    assert kv <= r["device_bytes"] + r["host_bytes"] < 1.05 * kv, r  # each layer in one place
    assert r["bytes_checked"] >= steps * kv, r
    context.row(f"{kv / 1e9:.2f} GB of KV ({tokens} tokens) on a card of {card / 1e9:.2f} GB",
                f"{resident} layers on the device ({r['device_bytes'] / 1e9:.2f} of {device / 1e9:.2f} GB), "
                f"{streamed} in the host ({r['host_bytes'] / 1e9:.2f} of {host / 1e9:.2f} GB), none in both; "
                f"{r['steps_timed']} decode steps in {r['schedules_timed']} schedules, "
                f"{r['step_us'] / 1e3:.1f} ms each, {r['ratio']:.4f} x the bus, every byte compared in each: "
                f"{r['bytes_checked'] / 1e9:.1f} GB in all, all right; "
                f"{r['elapsed_s']:.0f} s with the prompt")


CHECKS = {name[len("check_"):]: f for name, f in [*globals().items(), *vars(measure).items()]
          if name.startswith("check_")}
LONG = ["ratio128k", "two", "two_gpus", "prefill_beside"]
NAMED_ONLY = ["ratio400k", "kills100", "exceed", "stream_ops", "hotpath_spin", "hosttier_twice"]


def why_no_gpu(context):
    """'' if there is a GPU to use, or the reason why not."""
    worker = subprocess.run([program("kvtier-synth"), "--device-kind", "cuda", "--runtime-dir", "/nonexistent"],
                            capture_output=True, text=True, env=context.environment, check=False)
    return "" if "attach" in worker.stderr else worker.stderr.strip()


def run(context, names):
    """Runs the checks; returns the names of those that failed, and of those that this machine cannot make."""
    failed, skipped = [], []
    for name in names:
        print(f"{name}: {CHECKS[name].__doc__}", flush=True)
        start = time.monotonic()
        try:
            CHECKS[name](context)
        except Skip as reason:
            skipped.append(name)
            context.row(f"{name} SKIPPED", str(reason))
        except (AssertionError, OSError, KeyError, ValueError, subprocess.SubprocessError) as error:
            failed.append(name)
            context.row(f"{name} FAILED", str(error)[:3000])
            if not isinstance(error, AssertionError):
                traceback.print_exc()
        print(f"  ({time.monotonic() - start:.1f} s)", flush=True)
    return failed, skipped


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--fake", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="an option of every daemon, as device.gpu0.piece_size=32MiB")
    options = parser.parse_args()
    if options.list:
        for name, check in CHECKS.items():
            print(f"{name:14} {check.__doc__}")
        return 0
    unknown = [name for name in options.checks if name not in CHECKS]
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}; --list names the checks")
    context = Context(options.fake, options.fast)
    context.sets = dict(one.split("=", 1) for one in options.set)
    reason = why_no_gpu(context)
    if reason:
        print(f"SKIP gpu: {reason}")
        return 77
    left_out = NAMED_ONLY + (LONG if options.fast else [])
    names = options.checks or [name for name in CHECKS if name not in left_out]
    failed, skipped = run(context, names)
    print("\nSUMMARY", "(fake GPU)" if options.fake else "")
    for what, result in context.rows:
        print(f"| {what} | {result} |")
    print(f"{len(names) - len(failed) - len(skipped)} of {len(names)} checks passed" +
          (f"; skipped: {' '.join(skipped)}" if skipped else "") + (f"; FAILED: {' '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
