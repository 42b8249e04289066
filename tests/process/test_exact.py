"""kvtier-run with kvtierd: whatever mode, budget, cut and look-ahead, ids and logits have the bits of
--local.

test: timeout_s=200

The reference is the same command with --local and one thread, compared byte by byte. Equal chunks and
equal rows in a step are given; threads differ on purpose, as the bits do not depend on them.
A row's K and V take 256 bytes a token in each of the 3 layers of `--random tiny`.
"""

import os

import pytest

from kvtierd import SLOWER, Daemon
from runs import TINY, TINY_LAYERS, TINY_TOKEN_BYTES, ids_of, run, run_with_logits

MODES = ["dynamic", "static", "offloaded", "offloaded-static"]
STREAMED = ["offloaded", "offloaded-static"]
PIECES = [0, 256, 512, 1024]
if SLOWER > 4:  # ThreadSanitizer looks for races, not for bits
    PIECES = [0, 256]

PLAIN = [*TINY, "--prompt-tokens", 1500, "-n", 40, "--chunk", 200]
LONG = [*TINY, "--prompt-tokens", 3600, "-n", 20]
LONG_LAYER_BYTES = (3600 + 19) * TINY_TOKEN_BYTES
# Its K and V outgrow 832 KiB and 1 MiB in the midst of generation, behind the prompt.
GROWING = [*TINY, "--prompt-tokens", 900, "-n", 500]
ROWS = [*TINY, "--prompt-tokens", 1300, "-n", 30, "--chunk", 150, "--rows", 3, "--temp", 1, "--seed", 9]
LISTS = [",".join(str((7 * i + k) % 512) for i in range(n)) for k, n in ((1, 300), (2, 1), (3, 1100))]
SIDE_BY_SIDE = [*TINY, *[a for ids in LISTS for a in ("--ids", ids)], "-n", 30, "--chunk", 100]

MODEL = os.environ.get("KVT_MODEL", "")
REAL = [("dynamic", "12MiB", 512, 1), ("offloaded", "640KiB", 256, 8), ("offloaded-static", "4MiB", 0, 8)]
if SLOWER > 4:
    REAL = REAL[:1]


@pytest.fixture(scope="module", name="reference")
def module_reference(tmp_path_factory):
    """reference(command): what --local makes of it, once."""
    known = {}

    def reference(command):
        key = tuple(map(str, command))
        if key not in known:
            directory = tmp_path_factory.mktemp("reference")
            known[key] = run_with_logits(directory, *command, "--local", "--threads", 1)
        return known[key]
    return reference


def expect_same(reference, directory, daemon, command, *more):
    wanted, wanted_bits = reference(command)
    got, bits = run_with_logits(directory, *command, "--runtime-dir", daemon.runtime_dir, *more)
    assert ids_of(got) == ids_of(wanted), more
    assert len(bits) > 0 and bits == wanted_bits, more
    return got


def variations(modes, pieces):
    """Every mode with every piece size; look-ahead and threads take turns."""
    for m, mode in enumerate(modes):
        for p, piece in enumerate(pieces):
            ahead, threads = (1, 8)[(m + p) % 2], (2, 1)[(m + p // 2) % 2]
            yield mode, ["--mode", mode, "--piece-tokens", piece, "--steps-ahead", ahead, "--threads",
                         threads]


def test_room_for_all(reference, tmp_path):
    with Daemon(sets={"device.cpu0.budget": "32MiB"}) as daemon:
        for mode, more in variations(MODES, PIECES):
            got = expect_same(reference, tmp_path, daemon, PLAIN, *more)
            if mode not in STREAMED:
                assert got["layers"] == "R" * TINY_LAYERS and got["to_device_bytes"] == 0


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "static"])
def test_device_smaller_than_a_layer(reference, tmp_path, mode):
    """The longest context's layer does not fit, three slots of any piece size do."""
    budget = 832 * 1024
    assert budget < LONG_LAYER_BYTES
    with Daemon(sets={"device.cpu0.budget": f"{budget}B"}) as daemon:
        for _, more in variations([mode], PIECES):
            got = expect_same(reference, tmp_path, daemon, LONG, *more)
            assert got["layers"] == "S" * TINY_LAYERS
            assert got["need_to_device_bytes"] == TINY_LAYERS * (LONG_LAYER_BYTES - TINY_TOKEN_BYTES)


def test_device_of_three_smallest_pieces(reference, tmp_path):
    with Daemon(sets={"device.cpu0.budget": "192KiB"}) as daemon:
        for _, more in variations(STREAMED, [256]):
            expect_same(reference, tmp_path, daemon, PLAIN, *more)


@pytest.mark.parametrize("budget", ["832KiB", "1MiB"])
def test_dynamic_migrates_in_mid_life(reference, tmp_path, budget):
    with Daemon(sets={"device.cpu0.budget": budget}) as daemon:
        for _, more in variations(["dynamic"] * 2, PIECES):
            got = expect_same(reference, tmp_path, daemon, GROWING, *more)
            assert got["migrated_bytes"] > 0 and "S" in got["layers"]
            # something was resident until long behind the prompt
            assert got["migrated_bytes"] > 900 * TINY_TOKEN_BYTES


def test_layers_that_stay_are_counted(reference, tmp_path):
    """Some layers resident by wish, in the mode that streams by itself."""
    with Daemon() as daemon:
        for resident in range(TINY_LAYERS + 1):
            got = expect_same(reference, tmp_path, daemon, PLAIN, "--mode", "offloaded",
                              "--resident-layers", resident)
            assert got["layers"].count("R") == resident


@pytest.mark.parametrize("budget", ["640KiB", "2MiB", "32MiB"])
def test_rows_of_one_prompt(reference, tmp_path, budget):
    """Three sampled continuations: one step has three rows, which share what came before."""
    modes = MODES if budget == "32MiB" else ["dynamic", *STREAMED]
    with Daemon(sets={"device.cpu0.budget": budget}) as daemon:
        for _, more in variations(modes, [0, 256]):
            expect_same(reference, tmp_path, daemon, ROWS, *more)


@pytest.mark.parametrize("budget", ["640KiB", "32MiB"])
def test_prompts_side_by_side(reference, tmp_path, budget):
    modes = MODES if budget == "32MiB" else ["dynamic", *STREAMED]
    with Daemon(sets={"device.cpu0.budget": budget}) as daemon:
        for _, more in variations(modes, [0, 512]):
            expect_same(reference, tmp_path, daemon, SIDE_BY_SIDE, *more)


def test_static_that_does_not_fit_says_so():
    with Daemon(sets={"device.cpu0.budget": "1MiB"}) as daemon:
        got = run(*PLAIN, "--mode", "static", "--runtime-dir", daemon.runtime_dir, status=1)
        assert "device memory:" in got["stderr"] and "budget" in got["stderr"]


@pytest.mark.skipif(not os.path.exists(MODEL), reason="no model; run `make model`")
@pytest.mark.parametrize("mode,budget,piece,ahead", REAL)
def test_real_model(reference, tmp_path, mode, budget, piece, ahead):
    """About 600 tokens of prompt, 14 MB of K and V, 460 KB a layer."""
    command = ["--model", MODEL, "--prompt", "one two three four five " * 120, "-n", 8, "--ignore-end"]
    with Daemon(sets={"device.cpu0.budget": budget}) as daemon:
        got = expect_same(reference, tmp_path, daemon, command, "--mode", mode, "--piece-tokens", piece,
                          "--steps-ahead", ahead, "--threads", 2)
        assert 590 < got["prompt_tokens"] < 650
        streamed = got["layers"].count("S")
        assert 0 < streamed and (mode != "offloaded" or streamed == 30)
