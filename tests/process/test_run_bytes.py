"""What kvtier-run's K and V cost, to the byte: each step's way in and out, and forty rows of one prompt.

test: timeout_s=120

The theory. Before a step every token that is there crosses once towards the device, for each layer
that is not resident; behind it the appended tokens cross back. A prompt that rows share is there once,
in whole blocks; what is behind the last whole block is each row's own.
"""

import signal

import pytest

from fleet import Fleet
from kvtierd import SLOWER, Daemon
from runs import TINY, TINY_LAYERS, TINY_TOKEN_BYTES, TINY_VOCABULARY, ids_of, run, run_with_logits, \
    wait_for_text

CHUNK = 256
BLOCK = 256


def tokens_before_steps(prompt, generate):
    """How many tokens are there before each step: the prompt's chunks, then one token after the other.
    The last id that is generated is not appended."""
    return list(range(0, prompt, CHUNK)) + list(range(prompt, prompt + generate - 1))


def expect_theory(got, prompt, generate, streamed):
    before = tokens_before_steps(prompt, generate)
    tokens = prompt + generate - 1
    layer_bytes = TINY_TOKEN_BYTES * streamed
    assert got["layers"].count("S") == streamed
    assert got["steps_committed"] == len(before)
    assert got["to_device_bytes"] == sum(before) * layer_bytes
    assert got["from_device_bytes"] == tokens * layer_bytes
    # the last decode step alone
    assert got["need_to_device_bytes"] == (tokens - 1) * layer_bytes
    assert got["need_from_device_bytes"] == layer_bytes
    assert got["copied_on_write_bytes"] == got["migrated_bytes"] == 0


@pytest.mark.parametrize("ahead", [1, 8])
def test_bytes_of_a_decode_step(ahead):
    """Runs that differ by a few decode steps differ by these steps' bytes."""
    prompt = 900
    with Daemon() as daemon:
        for mode, resident, streamed in (("offloaded", -1, 3), ("offloaded", 1, 2), ("dynamic", 2, 1),
                                         ("dynamic", 1, 2), ("dynamic", 0, 3), ("dynamic", -1, 0)):
            for generate in (2, 3, 130):
                got = run(*TINY, "--prompt-tokens", prompt, "-n", generate, "--chunk", CHUNK,
                          "--runtime-dir", daemon.runtime_dir, "--mode", mode, "--resident-layers",
                          resident, "--steps-ahead", ahead)
                expect_theory(got, prompt, generate, streamed)


def test_bytes_when_the_device_is_too_small():
    """Smaller than a layer, in every cut; then a dynamic cache that moves to the host as it grows: what
    it streamed in the last step is what was not resident."""
    prompt, generate = 3900, 10
    with Daemon(sets={"device.cpu0.budget": "832KiB"}) as daemon:
        for piece in (0, 256, 512, 1024):
            got = run(*TINY, "--prompt-tokens", prompt, "-n", generate, "--chunk", CHUNK, "--mode",
                      "offloaded", "--piece-tokens", piece, "--runtime-dir", daemon.runtime_dir)
            expect_theory(got, prompt, generate, 3)
    prompt, generate = 700, 500
    layers = set()
    for budget in ("704KiB", "832KiB", "1MiB"):
        with Daemon(sets={"device.cpu0.budget": budget}) as daemon:
            got = run(*TINY, "--prompt-tokens", prompt, "-n", generate, "--chunk", CHUNK,
                      "--piece-tokens", 256, "--runtime-dir", daemon.runtime_dir)
            streamed = got["layers"].count("S")
            tokens = prompt + generate - 1
            assert got["need_to_device_bytes"] == (tokens - 1) * TINY_TOKEN_BYTES * streamed
            assert got["need_from_device_bytes"] == TINY_TOKEN_BYTES * streamed
            # what really moved, by the counters before and behind it
            assert got["last_step_to_device_bytes"] == got["need_to_device_bytes"]
            assert got["last_step_from_device_bytes"] == got["need_from_device_bytes"]
            # a token of a layer leaves the device once, as it is appended or as its layer moves
            assert got["migrated_bytes"] + got["from_device_bytes"] == tokens * TINY_TOKEN_BYTES * streamed
            layers.add(got["layers"])
    assert any("S" in shown for shown in layers)


# ---- forty rows


PROMPT, GENERATE, ROWS = 4000, 25, 40
FORTY = [*TINY, "--prompt-tokens", PROMPT, "-n", GENERATE, "--chunk", CHUNK, "--rows", ROWS]
SHARED_BLOCKS = PROMPT // BLOCK
BLOCK_BYTES = BLOCK * TINY_TOKEN_BYTES * TINY_LAYERS


@pytest.mark.parametrize("mode", ["dynamic", "offloaded"])
def test_forty_rows_store_their_prompt_once(mode):
    """As kvtierctl sees it while they generate: on the host (offloaded), on the device (dynamic)."""
    with Fleet({"device.cpu0.budget": "64MiB", "host.budget": "64MiB"}) as fleet:
        worker = fleet.start(*FORTY, "--mode", mode, "--progress", "always", "--json",
                             name="kvtier-run")
        wait_for_text(worker, "generate")
        worker.send_signal(signal.SIGSTOP)
        cache = fleet.ctl("caches")["caches"][0]
        worker.send_signal(signal.SIGCONT)
        assert worker.wait(60 * SLOWER) == 0
        assert cache["rows"] == ROWS
        where = "device_bytes" if mode == "dynamic" else "host_bytes"
        least = (SHARED_BLOCKS + ROWS) * BLOCK_BYTES
        ahead = SHARED_BLOCKS // 4 + 1  # the prompt's row was given more at once when it was alone
        assert least <= cache[where] <= least + ahead * BLOCK_BYTES, cache[where] / BLOCK_BYTES
        if mode == "dynamic":
            assert cache["host_bytes"] == 0


def test_forty_rows_cross_once():
    """Each step brings the prompt's whole blocks once and each row's tail."""
    with Daemon(sets={"device.cpu0.budget": "1MiB", "host.budget": "64MiB"}) as daemon:
        got = run(*FORTY, "--mode", "offloaded", "--runtime-dir", daemon.runtime_dir)
    shared = SHARED_BLOCKS * BLOCK
    tail = PROMPT - shared
    read = sum(tokens_before_steps(PROMPT, 1)) + \
        sum(shared + ROWS * (tail + n) for n in range(GENERATE - 1))
    layer_bytes = TINY_LAYERS * TINY_TOKEN_BYTES
    assert got["to_device_bytes"] == read * layer_bytes
    assert got["from_device_bytes"] == (PROMPT + ROWS * (GENERATE - 1)) * layer_bytes
    # the last one to be given its own tail may keep the prompt's
    assert got["copied_on_write_bytes"] in ((ROWS - 1) * tail * layer_bytes, ROWS * tail * layer_bytes)


def test_forty_rows_have_the_bits_of_forty_rows(tmp_path):
    """A step of forty rows multiplies forty vectors by a matrix at once, and its sums may be rounded in
    another order than those of one vector. So the bits must be those of --local with forty rows. The
    prompt is computed before the rows part: there, and for the first id, also those of one row."""
    wanted, wanted_bits = run_with_logits(tmp_path, *FORTY, "--local")
    single, single_bits = run_with_logits(tmp_path, *[*FORTY, "--rows", 1], "--local")
    with Daemon(sets={"device.cpu0.budget": "1MiB", "host.budget": "64MiB"}) as daemon:
        for mode in ("offloaded", "dynamic"):
            got, bits = run_with_logits(tmp_path, *FORTY, "--mode", mode, "--runtime-dir",
                                        daemon.runtime_dir)
            assert bits == wanted_bits and ids_of(got) == ids_of(wanted)
    prompt_bytes = (PROMPT + CHUNK - 1) // CHUNK * TINY_VOCABULARY * 4
    assert bits[:prompt_bytes] == single_bits[:prompt_bytes]
    assert {row[0] for row in ids_of(got)} == {ids_of(single)[0][0]}
    # greedy rows of one prompt are the same row forty times: they differ in nothing
    assert all(row == ids_of(got)[0] for row in ids_of(got))
