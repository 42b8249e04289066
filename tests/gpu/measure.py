"""What is timed on the GPU: each row of the table beside its limit, which is measured in the same run. A
goal that is missed is told and is no failure. See run.py."""

import json
import os
import re
import signal
import statistics
import subprocess
import threading
import time

from harness import (BIN, GIB, LLAMA, MIB, SMALL, TOKEN_BYTES, WIDE, WIDE_SETS, WIDE_TOKEN_BYTES,
                     Skip, ctl, expect_empty, nvidia_smi, state_of, threads_of, verdict, wait_until)


def slowest(r):
    """The worst three steps; with a star those before which a STEP was asked for."""
    steps = ", ".join(f"{s['us'] / 1e3:.2f}{'*' if s['first'] else ''}" for s in r["slow_steps"][:3])
    return f"p99 {r['step_us_p99'] / 1e3:.2f}, slowest {steps} (* behind a STEP)"


def limits(r):
    return (f"{r['limit_bytes'] / 1e9:.2f} GB a step, over the bus alone {r['limit_us_before'] / 1e3:.2f} and "
            f"{r['limit_us_after'] / 1e3:.2f} ms ({r['limit_gb_s']:.1f} GB/s); "
            f"moved {r['moved_bytes_step'] / r['limit_bytes']:.4f} x that")


# ---------------------------------------------------------------- steps, nothing resident


def ratio(context, tokens, *more, device=None, sets=None, label=""):
    shape = SMALL if context.fake else LLAMA
    token_bytes = 768 if context.fake else TOKEN_BYTES
    host = (int(tokens * token_bytes * 1.1) // (64 * MIB) + 4) * 64 * MIB
    steps = 16 if context.fake else max(24, min(200, 2_000_000 // tokens))
    chunk = 256 if context.fake else 4096
    with context.daemon(device=device or (96 * MIB if context.fake else 2 * GIB), host=host,
                        sets=sets) as daemon:
        r = context.synth(daemon, *shape, "--mode", "offloaded", "--prompt", tokens, "--chunk", chunk,
                          "--tokens", steps, "--ahead", 16, "--limit", *more, timeout_s=580)
    context.row(f"decode step, {tokens} tokens, nothing resident{label}",
                f"ratio {r['ratio']:.4f} ({verdict(r['ratio'] <= 1.03, 'at most 1.03')}): "
                f"{r['step_us'] / 1e3:.2f} ms (p10 {r['step_us_p10'] / 1e3:.2f}, p90 "
                f"{r['step_us_p90'] / 1e3:.2f}, {slowest(r)}; {r['steps_timed']} steps in {r['schedules_timed']} "
                f"schedules); {limits(r)}")
    return r


def check_ratio8k(context):
    """A decode step of 8,192 tokens, all streamed, over the same bytes on the bus."""
    ratio(context, 1024 if context.fake else 8192)


def check_ratio32k(context):
    """32,768 tokens."""
    ratio(context, 2048 if context.fake else 32768)


def check_ratio128k(context):
    """131,072 tokens: 17 GB of KV in host memory."""
    ratio(context, 2048 if context.fake else 131072)


def check_ratio400k(context):
    """400,000 tokens: 52 GB of KV in host memory. Long; only when named."""
    ratio(context, 2048 if context.fake else 400000)


def check_dense(context):
    """A decode step of 32,768 tokens as a dense worker takes it: slots of a whole layer."""
    ratio(context, 1024 if context.fake else 32768, "--dense", label=", dense")


# ---------------------------------------------------------------- steps, a part resident


def budget(context, percent):
    """Mode dynamic in a budget for a part of the KV, beside the same worker in one for all of it."""
    shape, token_bytes = (WIDE, WIDE_TOKEN_BYTES) if context.fake else (LLAMA, TOKEN_BYTES)
    tokens, chunk, steps = (1024, 512, 16) if context.fake else (32768, 4096, 64)
    kv = (tokens + steps + 1) * token_bytes
    results = []
    for device in (3 * kv // 2, kv * percent // 100):
        with context.daemon(device=device, host=kv + (16 * MIB if context.fake else GIB),
                            sets=WIDE_SETS if context.fake else None) as daemon:
            results.append(context.synth(daemon, *shape, "--mode", "dynamic", "--prompt", tokens, "--chunk",
                                         chunk, "--tokens", steps, "--ahead", 16, "--limit"))
            expect_empty(context, daemon)
    whole, r = results
    assert set(whole["layers"]) == {"R"} and set(r["layers"]) == {"R", "S"}, (whole["layers"], r["layers"])
    bus_us = (r["limit_us_before"] + r["limit_us_after"]) / 2
    over = r["step_us"] / max(whole["step_us"], bus_us)
    context.row(f"decode step, {tokens} tokens, device budget {percent}% of the KV",
                f"{over:.4f} x the larger of compute and bus ({verdict(over <= 1.05, 'at most 1.05')}): "
                f"{r['step_us'] / 1e3:.2f} ms, {slowest(r)}; all resident {whole['step_us'] / 1e3:.2f} ms; "
                f"{limits(r)}; {r['layers'].count('R')} of {len(r['layers'])} layers resident, "
                f"{r['migrated_bytes'] / 1e9:.2f} GB migrated")


def check_budget50(context):
    """A decode step of 32,768 tokens with a device budget of half the KV."""
    budget(context, 50)


def check_budget80(context):
    """The same with 80%."""
    budget(context, 80)


# ---------------------------------------------------------------- growth

# Of a part of a plane that would be added behind it instead, at addresses that are reserved: created, exported,
# imported, mapped, made accessible; on a control thread, beside the steps.
PART_US = 25 + 77 + 69 + 3 + 67


def check_growth(context):
    """What a dense dynamic cache of 32,768 tokens pays for growth, which moves its planes: beside an equal step."""
    shape, token_bytes = (WIDE, WIDE_TOKEN_BYTES) if context.fake else (LLAMA, TOKEN_BYTES)
    tokens, chunk, append, ahead, more = (1024, 512, 16, 4, 640) if context.fake else (32768, 4096, 32, 8, 9216)
    with context.daemon(device=(192 * MIB if context.fake else 16 * GIB),
                        host=16 * MIB if context.fake else 2 * GIB) as daemon:
        r = context.synth(daemon, *shape, "--dense", "--mode", "dynamic", "--prompt", tokens, "--chunk", chunk,
                          "--tokens-max", 2 * tokens, "--append", append, "--tokens", more, "--ahead", ahead)
        expect_empty(context, daemon)
    moved = r["moved_steps"]
    assert set(r["layers"]) == {"R"} and r["migrated_bytes"] == 0 and r["streamed_pieces"] == 0, r
    assert len(moved) == 3 and all(m["step"] % ahead == 0 for m in moved), moved
    assert all(m["bytes"] == (tokens + m["step"] * append) * token_bytes for m in moved), moved
    between = (moved[1]["step"] - moved[0]["step"]) * append
    period_us = between * r["step_us"]
    costs = [m["us"] - m["beside_us"] for m in moved]
    cost_us = sum(costs) / len(costs)
    asked = [m["begin_us"] - m["beside_begin_us"] for m in moved]
    parts_us = 2 * len(r["layers"]) * PART_US

    def each(values):
        return ", ".join(f"{us / 1e3:.2f}" for us in values)
    context.row(f"growth: {tokens} tokens, dense, all resident",
                f"the step that moved {each([m['bytes'] / 1e6 for m in moved])} GB took {each([m['us'] for m in moved])} "
                f"ms; the first of a schedule that moved nothing {each([m['beside_us'] for m in moved])}, the median "
                f"step {r['step_us'] / 1e3:.2f}. So growth costs {each(costs)} ms, {each(asked)} of it in the "
                f"call that begins the schedule, once in {between} tokens: on an average {100 * cost_us / period_us:.3f}% "
                f"of the time of as many steps")
    context.row("growth in place instead (not built), for comparison",
                f"2 planes x {len(r['layers'])} layers x {PART_US} us = {parts_us / 1e3:.2f} ms, "
                f"{100 * parts_us / period_us:.3f}% of that time, on a control thread beside the steps")


# ---------------------------------------------------------------- the hot path

# One small piece a layer: the bus has time to spare, and the kernels set the pace.
HOT = ["--layers", 32, "--heads", 1, "--k-dim", 128, "--v-dim", 128, "--dtype", "bf16", "--prompt", 1024,
       "--chunk", 1024, "--no-check"]


def hot(context, mode, *more, sets=None):
    """A worker whose kernels take longer than the host's work for them. The daemon's part: CPU us a layer of its
    loop and of its copy thread, and times that the loop slept a step. Its start and the prompt are in there.
    4 steps of 6 operations a layer do not fill the stream's queue, so that no call waits for room in it."""
    steps, compute_us = (16, 300) if context.fake else (1024, 50)
    with context.daemon(sets=sets) as daemon:
        before = threads_of(daemon.pid)
        r = context.synth(daemon, *HOT, "--mode", mode, "--tokens", steps, "--ahead", 4, "--compute-us",
                          compute_us, *more)
        after = threads_of(daemon.pid)
    layers = 32 * r["steps"]
    spent = {name: after[name][0] - before[name][0] for name in ("main", "kvt-copy")}
    return r, (spent["main"] / layers, spent["kvt-copy"] / layers,
               (after["main"][1] - before["main"][1]) / r["steps"])


def steps_without_front(context, mode):
    """Steps of a schedule that a worker ends while the process that passes all messages is stopped."""
    ahead = 32
    with context.daemon() as daemon:
        worker = context.start(daemon, *HOT, "--mode", mode, "--tokens", 2 * ahead, "--ahead", ahead,
                               "--hold-step", 3, "--progress")
        wait_until(lambda: state_of(worker.pid) == "T", "the worker has stopped itself in mid-schedule", 30)
        front = daemon.front_pid()
        os.kill(front, signal.SIGSTOP)
        give_up = threading.Timer(20, os.kill, (front, signal.SIGCONT))
        give_up.start()
        try:
            worker.send_signal(signal.SIGCONT)
            worker.stderr.readline()  # the prompt's
            line = worker.stderr.readline()  # behind the schedule, with the GPU's work done
            assert state_of(front) == "T", "steps within a schedule need messages"
            assert f"steps {1 + ahead}" in line, line
        finally:
            give_up.cancel()
            os.kill(front, signal.SIGCONT)
        r = context.finish(worker)
        assert r["steps"] == 1 + 2 * ahead and daemon.front_pid() == front, r
    return ahead - 2  # the first two were over


def check_hotpath(context):
    """What the service costs a layer: host time, time that the GPU is idle, CPU of the daemon; and messages."""
    resident, resident_daemon = hot(context, "dynamic", "--bare")
    streamed, streamed_daemon = hot(context, "offloaded")
    assert resident["streamed_pieces"] == 0 and streamed["streamed_pieces"] == streamed["pieces"]
    assert streamed["prefetch_discarded_bytes"] == 0, streamed
    host = [r["host_us_layer"] + r["host_us_end"] / 32 for r in (resident, streamed)]
    context.row("hot path: worker's thread in libkvtier, us a layer",
                f"resident {host[0]:.2f}, streamed {host[1]:.2f} "
                f"({verdict(max(host) < 5, 'under 5')}; medians, the step's end included; 99th percentile "
                f"{resident['host_us_layer_p99']:.2f} and {streamed['host_us_layer_p99']:.2f}); apart from that a "
                f"STEP of 4 steps {resident['host_us_begin']:.0f} and {streamed['host_us_begin']:.0f} us")
    idle = [(r["step_us"] - resident["bare_us"]) / 32 for r in (resident, streamed)]
    context.row("hot path: GPU idle, us a layer",
                f"resident {idle[0]:.2f}, streamed {idle[1]:.2f} ({verdict(max(idle) < 5, 'under 5')}): steps of "
                f"{resident['step_us']:.0f} and {streamed['step_us']:.0f} us by GPU events, the same kernels without "
                f"waits and posts {resident['bare_us_before']:.0f} and {resident['bare_us_after']:.0f}")
    context.row("hot path: daemon's CPU, us a layer",
                f"resident: loop {resident_daemon[0]:.2f}, copy thread {resident_daemon[1]:.2f}; streamed: loop "
                f"{streamed_daemon[0]:.2f}, copy thread {streamed_daemon[1]:.2f}, its polling included; the loop "
                f"slept {resident_daemon[2]:.2f} and {streamed_daemon[2]:.2f} times a step")
    steps = sum(steps_without_front(context, mode) for mode in ("dynamic", "offloaded"))
    context.row("hot path: messages a step between schedules",
                f"0 (held: 0): with kvtierd-front stopped {steps} steps of open schedules were ended, resident and "
                "streamed")


def check_hotpath_spin(context):
    """Whether the sleep of the daemon's copy thread is what a streamed layer costs: without it, in turns."""
    resident, _ = hot(context, "dynamic", "--bare")
    assert resident["streamed_pieces"] == 0, resident
    settings = {"by default": {}, "spin = 1ms": {"device.gpu0.spin": "1ms"}}
    found = {name: [] for name in settings}
    for name, sets in 2 * list(settings.items()):
        r, spent = hot(context, "offloaded", sets=sets)
        assert r["streamed_pieces"] == r["pieces"] and r["prefetch_discarded_bytes"] == 0, r
        found[name].append(((r["step_us"] - resident["bare_us"]) / 32, spent[1], r))
    for name, runs in found.items():
        idle = [run[0] for run in runs]
        context.row(f"hot path: GPU idle, us a streamed layer, {name}",
                    f"{' and '.join(f'{us:.2f}' for us in idle)} ({verdict(max(idle) < 5, 'under 5')}): steps of "
                    f"{' and '.join('{:.0f}'.format(run[2]['step_us']) for run in runs)} us by GPU events (p10 "
                    f"{' and '.join('{:.0f}'.format(run[2]['step_us_p10']) for run in runs)}), the same kernels "
                    f"without waits and posts {resident['bare_us_before']:.0f} and {resident['bare_us_after']:.0f}; copy "
                    f"thread {' and '.join(f'{run[1]:.2f}' for run in runs)} us of CPU a layer")


def check_stream_ops(context):
    """What a stream's waits and writes cost the GPU a layer, each alone and in other forms. No daemon takes part."""
    paths = [os.path.join(BIN, "bench_stream_ops"),  # the bundle's, or where it was built
             os.path.join(os.path.dirname(BIN.rstrip("/")), "tests", "bench", "bench_stream_ops")]
    few = ["--layers", "4", "--repeats", "2", "--rounds", "2"] if context.fake else []
    out = subprocess.run([next(filter(os.path.exists, paths), paths[0]), "--json", *few], env=context.environment,
                         capture_output=True, text=True, timeout=300, check=False)
    assert out.returncode == 0, f"exit {out.returncode}: {out.stdout}{out.stderr}"
    cases = {}
    for case in json.loads(out.stdout)["cases"]:
        cases.setdefault(case["case"], {})[case["kernel"]] = case
    for name, of in cases.items():
        what = "us a layer over the kernel alone" if name != "kernel alone" else "us a layer"
        found = [f"{case['over_us']:.2f} ({case['low']:.2f} to {case['high']:.2f})" if name != "kernel alone"
                 else f"{case['us']:.2f}" for case in of.values() if "us" in case]
        reason = "; ".join(sorted({case["why_not"] for case in of.values() if "why_not" in case}))
        context.row(f"stream: {name}", f"{' and '.join(found)} {what}, kernels {' and '.join(of)}" +
                    (f"; enqueued in {of['write']['host_us']:.2f} us" if "us" in of["write"] else "")
                    if found else f"not measured: {reason}")


# ---------------------------------------------------------------- several workers


def rates(context, daemon, workers, tokens, seconds):
    """Bytes a second towards the device of workers that all decode, by the clock; what the daemon knows the links
    to do; and the part of the workers' step times that the links need for what they move."""
    def status():
        return ctl(context, daemon, "status")

    def bytes_of(now):
        return {w["pid"]: int(w["counters"]["to_device_bytes"]) for w in now["workers"]}

    def decoding():
        return sum(int(c["tokens_longest"]) > tokens for c in status()["caches"]) == len(workers)

    wait_until(decoding, "every prompt is over", 120)
    begin, start = bytes_of(status()), time.monotonic()
    time.sleep(seconds)
    now = status()
    end, took = bytes_of(now), time.monotonic() - start
    links = [int(t["link_to_bytes_per_s"]) for t in now["tiers"] if t["name"].startswith("gpu")]
    parts = [w["ceiling_fraction"] for w in now["workers"]]
    assert all(links) and all(parts), "the daemon does not know the links, or what workers achieve of them"
    return [(end[w.pid] - begin[w.pid]) / took for w in workers], links, parts


def decode_for_ever(context, daemon, tokens, seed, *more, ahead=16):
    more += ("--compute-us", 1000) if context.fake else ()  # what plays the GPU leaves the CPUs to others
    return context.start(daemon, *(WIDE if context.fake else LLAMA), "--mode", "offloaded", "--prompt", tokens,
                         "--chunk", 4096, "--tokens", 1000000, "--ahead", ahead, "--seed", seed, "--no-check", *more)


def end_all(workers):
    """However a check ended: who is stopped goes on first."""
    for worker in workers:
        worker.send_signal(signal.SIGCONT)
    for worker in workers:
        worker.kill()
        worker.communicate()


def window(context, daemon, workers, count, settle_s, seconds):
    """Bytes a second towards the device of the first so many, by the clock, with the others stopped: their schedules
    stay open, and what their streams have been given already is over first."""
    def bytes_now():
        found = {w["pid"]: int(w["counters"]["to_device_bytes"]) for w in ctl(context, daemon, "status")["workers"]}
        return [found[w.pid] for w in workers], time.monotonic()

    def over():
        before = bytes_now()[0]
        time.sleep(0.1)
        return bytes_now()[0][count:] == before[count:]

    for n, worker in enumerate(workers):
        worker.send_signal(signal.SIGCONT if n < count else signal.SIGSTOP)
    time.sleep(settle_s)
    wait_until(over, f"all but {count} of the workers have come to rest", 10)
    begin, start = bytes_now()
    time.sleep(seconds)
    end, stop = bytes_now()
    rates_of = [(late - early) / (stop - start) for early, late in zip(begin, end)]
    assert all(rates_of[:count]), f"one of {count} workers does not go on: {rates_of}"
    assert not any(rates_of[count:]), f"a worker goes on that is stopped: {rates_of}"
    return rates_of[:count]


def check_two(context):
    """Two and four workers at once beside one: the sum of their bytes a second, and how even their shares are."""
    tokens, rounds, settle_s, seconds = (600, 2, 0.2, 0.3) if context.fake else (16384, 6, 0.5, 1)
    counts = (1, 2, 4)
    found = {count: [] for count in counts}
    with context.daemon(device=2 * GIB if not context.fake else 160 * MIB,
                        host=(12 * GIB if not context.fake else 256 * MIB)) as daemon:
        workers = []
        try:
            for n in range(max(counts)):
                workers.append(decode_for_ever(context, daemon, tokens, n + 1, ahead=4))
            _, links, parts = rates(context, daemon, workers, tokens, seconds)
            for _ in range(rounds):  # in turns: a machine's bus drifts by more than what is compared
                for count in counts:
                    found[count].append(window(context, daemon, workers, count, settle_s, seconds))
        finally:
            end_all(workers)
        expect_empty(context, daemon)
        assert not daemon.has_line("error"), daemon.log()
    median = {count: statistics.median(map(sum, shares)) for count, shares in found.items()}
    context.row("one worker, in turns with two and four",
                f"{median[1] / 1e9:.2f} GB/s by the clock, median of {rounds} windows of {seconds} s, over a link of "
                f"{links[0] / 1e9:.2f}: {median[1] / links[0]:.3f}; for what four move together it is needed "
                f"{sum(parts):.3f} of the time")
    for count in counts[1:]:
        over = median[count] / median[1]
        spread = [(max(shares) - min(shares)) / (sum(shares) / count) for shares in found[count]]
        context.row(f"{count} workers at once",
                    f"{median[count] / 1e9:.2f} GB/s together, {median[count] / links[0]:.3f} of the link; "
                    f"{over:.3f} of one alone ({verdict(over >= 0.95, 'at least 0.95')}); shares differ by "
                    f"{100 * statistics.median(spread):.1f}% ({verdict(statistics.median(spread) <= 0.1, 'at most 10%')}), "
                    f"at most {100 * max(spread):.1f}%")


def check_two_gpus(context):
    """A worker on each of two GPUs of one daemon: each alone, then both."""
    tokens, seconds = (600, 0.5) if context.fake else (16384, 5)
    if context.fake:
        context = context.also(FAKE_CUDA_GPUS="2")
    uuids = [f"{0xa0 + n:02x}" * 16 for n in (0, 1)] if context.fake else \
        [uuid.removeprefix("GPU-") for uuid in nvidia_smi("uuid")][:2]
    if len(uuids) < 2:
        raise Skip(f"two GPUs are needed; nvidia-smi names {len(uuids)}")
    found = []
    for chosen in ([0], [1], [0, 1]):
        with context.daemon(device=2 * GIB if not context.fake else 96 * MIB,
                            host=(8 * GIB if not context.fake else 256 * MIB), uuids=uuids) as daemon:
            workers = [decode_for_ever(context, daemon, tokens, n + 1, "--device", uuids[n]) for n in chosen]
            try:
                found.append(rates(context, daemon, workers, tokens, seconds))
                used = {w["pid"]: w["device"] for w in ctl(context, daemon, "status")["workers"]}
                assert used == {w.pid: f"gpu{n}" for w, n in zip(workers, chosen)}, used
            finally:
                end_all(workers)
            expect_empty(context, daemon)
    alone = found[0][0] + found[1][0]
    together, links, parts = found[2]
    over = sum(together) / sum(alone)

    def sums(speeds):
        return " + ".join(f"{speed / 1e9:.2f}" for speed in speeds)
    context.row("two GPUs, a worker each, one daemon",
                f"{sums(together)} GB/s together, {sums(alone)} each alone: {over:.3f} "
                f"({verdict(over >= 0.95, 'at least 0.95')}); links of {sums(links)} GB/s, needed for "
                f"{' and '.join(f'{part:.3f}' for part in parts)} of the time")


def check_prefill_beside(context):
    """A worker decodes while another reads a long prompt: its step beside half the bus."""
    shape, tokens, chunk, steps = (SMALL, 600, 256, 16) if context.fake else (LLAMA, 16384, 4096, 100)
    long_prompt, long_chunk = (200000, 64) if context.fake else (200000, 4096)
    decode = [*shape, "--mode", "offloaded", "--prompt", tokens, "--chunk", chunk, "--tokens", steps, "--ahead", 16]

    def prompt_so_far(session):
        return next((int(c["tokens_longest"]) for c in ctl(context, daemon, "status")["caches"]
                     if c["session"] == session), 0)

    with context.daemon(host=None if context.fake else 32 * GIB) as daemon:
        alone = context.synth(daemon, *decode, "--limit")
        prefill = context.start(daemon, *shape, "--mode", "offloaded", "--prompt", long_prompt, "--chunk",
                                long_chunk, "--tokens", 1, "--seed", 2)
        try:
            session = wait_until(lambda: [w["session"] for w in ctl(context, daemon, "status")["workers"]],
                                 "the other one has attached")[0]
            wait_until(lambda: prompt_so_far(session) >= tokens, "its prompt is as long as what is decoded", 60)
            begin = prompt_so_far(session)
            r = context.synth(daemon, *decode)
            end = prompt_so_far(session)
            assert prefill.poll() is None and begin < end < long_prompt, (begin, end, "its prompt went on")
        finally:
            end_all([prefill])
        expect_empty(context, daemon)
    share_us = alone["limit_us_before"] + alone["limit_us_after"]  # twice the mean of the two
    over = r["step_us"] / share_us
    context.row(f"decode of {tokens} tokens beside a long prefill",
                f"median {r['step_us'] / 1e3:.2f} ms, {over:.3f} x its fair share, which is {share_us / 1e3:.2f} ms "
                f"({verdict(over <= 1.2, 'at most 1.2')}); mean {r['step_us_mean'] / 1e3:.2f}, {slowest(r)}; alone "
                f"{alone['step_us'] / 1e3:.2f}, mean {alone['step_us_mean'] / 1e3:.2f}; the prompt grew from {begin} "
                f"to {end} tokens meanwhile")


# ---------------------------------------------------------------- the host tier

HOST_TIER = re.compile(r"host memory: ([\d.]+ \S+) preallocated in ([\d.]+) s, ([\d.]+) GiB/s; ([\d.]+) s after "
                       r"the start, ([\d.]+) GiB/s; (\d+)% in huge pages")


def host_tier(context, label=""):
    budget = 256 * MIB if context.fake else 48 * GIB
    with context.daemon(host=budget) as daemon:
        start = time.monotonic()
        context.synth(daemon, *SMALL, "--mode", "offloaded", "--prompt", 300, "--tokens", 10)
        served = time.monotonic() - start
        daemon.wait_for_line("preallocated in", 120)
        line = next(line for line in daemon.lines if "preallocated in" in line)
        size, took, rate, since_start, rate_since_start, huge = HOST_TIER.search(line).groups()
        used = {t["name"]: t["used_bytes"] for t in ctl(context, daemon, "status")["tiers"]}["host"]
        assert used == budget, f"{used} of {budget}"
        expect_empty(context, daemon)
    context.row(f"host tier: {size} from start to registered{label}",
                f"{since_start} s, {rate_since_start} GiB/s ({verdict(float(rate_since_start) >= 15, 'at least 15')}); "
                f"bringing up alone {took} s, {rate} GiB/s; {huge}% in huge pages; a worker that came at once was "
                f"served in {served:.2f} s")


def check_hosttier(context):
    """The host arena comes up, pinned, while the daemon answers: from the daemon's start to the last byte."""
    host_tier(context)


def check_hosttier_twice(context):
    """The same twice in a row: the second start finds memory that the machine has touched before."""
    for label in (", first start", ", second start, memory touched before"):
        host_tier(context, label)
