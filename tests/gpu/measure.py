"""What is timed on the GPU: each row of the table beside its limit, which is measured in the same run. See
run.py."""

import time

from harness import GIB, LLAMA, MIB, SMALL, TOKEN_BYTES, ctl, expect_empty


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
                f"ratio {r.get('ratio', 0):.4f}: {r['step_us'] / 1e3:.2f} ms (p10 "
                f"{r['step_us_p10'] / 1e3:.2f}, p90 {r['step_us_p90'] / 1e3:.2f}; {r['steps_timed']} steps), "
                f"limit {r.get('limit_us_before', 0) / 1e3:.2f} and {r.get('limit_us_after', 0) / 1e3:.2f} ms, "
                f"{r.get('limit_gb_s', 0):.1f} GB/s, {r.get('limit_bytes', 0) / 1e9:.2f} GB a step")
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


def check_two(context):
    """Two and four workers at once: the sum of their bytes a second, and how even their shares are."""
    shape, tokens, seconds = (SMALL, 600, 2) if context.fake else (LLAMA, 16384, 12)
    rates = {}
    for count in (1, 2, 4):
        with context.daemon(device=2 * GIB if not context.fake else 160 * MIB,
                            host=(12 * GIB if not context.fake else 256 * MIB)) as daemon:
            workers = [context.start(daemon, *shape, "--mode", "offloaded", "--prompt", tokens, "--chunk",
                                     4096, "--tokens", 1000000, "--ahead", 16, "--seed", n + 1, "--no-check")
                       for n in range(count)]

            def bytes_of():
                return {w["pid"]: int(w["counters"]["to_device_bytes"])
                        for w in ctl(context, daemon, "status")["workers"]}
            time.sleep(1 if context.fake else 8)  # their prompts are over
            begin, start = bytes_of(), time.monotonic()
            time.sleep(seconds)
            end, took = bytes_of(), time.monotonic() - start
            shares = [(end[w.pid] - begin[w.pid]) / took for w in workers]
            for worker in workers:
                worker.kill()
                worker.communicate()
            expect_empty(context, daemon)
        rates[count] = sum(shares)
        spread = (max(shares) - min(shares)) / (sum(shares) / count) if sum(shares) else 0
        context.row(f"{count} workers at once",
                    f"{sum(shares) / 1e9:.2f} GB/s together, {sum(shares) / rates[1]:.3f} of one alone; "
                    f"shares differ by {100 * spread:.1f}%")
