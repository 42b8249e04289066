"""kvtier-run with kvtierd: whatever the mode, the budget and the cut, the bits of --local.

test: timeout_s=240

A random model of three layers; its K and V take 1.2 MB for the tokens used here, so the small device
budgets hold a layer or less. The reference is the same command with --local.
"""
import json
import os
import signal
import subprocess
import time

import pytest

from kvtierd import BIN, Daemon

RUN = os.path.join(BIN, "kvtier-run")
BASE = ["--random", "tiny", "--prompt-tokens", "1500", "-n", "40", "--chunk", "200", "--json"]
# K or V of one layer for one token, for both: 2 heads of 32 f16 values, twice.
TOKEN_BYTES = 2 * 2 * 32 * 2
LAYERS = 3


def run(*arguments):
    done = subprocess.run([RUN, *arguments], capture_output=True, timeout=100, check=False,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def with_logits(tmp_path, *arguments):
    path = str(tmp_path / "logits")
    result = run(*arguments, "--dump-logits", path)
    with open(path, "rb") as stream:
        return result, stream.read()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return with_logits(tmp_path_factory.mktemp("reference"), *BASE, "--local")


@pytest.mark.parametrize("mode", ["dynamic", "static", "offloaded", "offloaded-static"])
@pytest.mark.parametrize("budget", ["384KiB", "1MiB", "32MiB"])
def test_same_bits(reference, tmp_path, mode, budget):
    sets = {"device.cpu0.budget": budget, "host.budget": "64MiB"}
    with Daemon(sets=sets) as daemon:
        for piece_tokens in ("0", "256") if mode == "dynamic" else ("0", "256", "512"):
            arguments = [*BASE, "--runtime-dir", daemon.runtime_dir, "--mode", mode,
                         "--piece-tokens", piece_tokens]
            if mode == "static" and budget != "32MiB":
                done = subprocess.run([RUN, *arguments], capture_output=True, timeout=100, check=False)
                assert done.returncode == 1
                assert b"device memory:" in done.stderr and b"budget" in done.stderr
                return
            result, bits = with_logits(tmp_path, *arguments)
            assert bits == reference[1]
            assert result["rows"] == reference[0]["rows"]
            if mode.startswith("offloaded"):
                check_bytes(result, everything=budget != "32MiB")


@pytest.mark.xfail(reason="the engine does not find room for the slots of larger pieces when a dynamic "
                          "cache outgrows the device, though offloaded fits (kvtier-run says which)")
def test_dynamic_with_larger_pieces(reference, tmp_path):
    with Daemon(sets={"device.cpu0.budget": "1MiB", "host.budget": "64MiB"}) as daemon:
        _, bits = with_logits(tmp_path, *BASE, "--runtime-dir", daemon.runtime_dir, "--piece-tokens", "512")
    assert bits == reference[1]


def check_bytes(result, everything):
    """The last step moved what it had to: all tokens before it in, one token out."""
    tokens = 1500 + 39
    assert result["steps_committed"] == 8 + 39
    if everything:
        assert set(result["layers"]) == {"S"}
        assert result["need_to_device_bytes"] == (tokens - 1) * TOKEN_BYTES * LAYERS
        assert result["need_from_device_bytes"] == TOKEN_BYTES * LAYERS
        assert result["from_device_bytes"] == tokens * TOKEN_BYTES * LAYERS


def test_rows_share_their_prompt(tmp_path):
    arguments = [*BASE, "--rows", "3", "--temp", "1", "--seed", "9"]
    wanted, bits = with_logits(tmp_path, *arguments, "--local")
    with Daemon(sets={"device.cpu0.budget": "512KiB"}) as daemon:
        got, other = with_logits(tmp_path, *arguments, "--mode", "offloaded", "--runtime-dir",
                                 daemon.runtime_dir)
    assert other == bits and got["rows"] == wanted["rows"]


def test_prompts_side_by_side(tmp_path):
    prompts = [a for n in (300, 1, 700) for a in ("--ids", ",".join(str(i % 512) for i in range(n)))]
    arguments = ["--random", "tiny", *prompts, "-n", "20", "--chunk", "100", "--json"]
    wanted, bits = with_logits(tmp_path, *arguments, "--local")
    with Daemon(sets={"device.cpu0.budget": "512KiB"}) as daemon:
        got, other = with_logits(tmp_path, *arguments, "--mode", "offloaded", "--runtime-dir",
                                 daemon.runtime_dir)
    assert other == bits and got["rows"] == wanted["rows"]


def test_daemon_killed_and_started_again():
    arguments = ["--random", "tiny", "--prompt-tokens", "600", "-n", "2000", "--json"]
    wanted = run(*arguments, "--local")
    with Daemon() as daemon:
        child = subprocess.Popen([RUN, *arguments, "--mode", "offloaded", "--runtime-dir",
                                  daemon.runtime_dir, "--progress", "always"],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            seen = b""
            while b"generate" not in seen:
                seen += os.read(child.stderr.fileno(), 4096)
            daemon.kill()
            daemon.start()
            out, err = child.communicate(timeout=100)
        finally:
            child.kill()
            child.wait()
        assert child.returncode == 0, err.decode()
        assert b"attaching again and starting over" in err
        assert json.loads(out)["rows"] == wanted["rows"]


def test_interrupt_in_mid_generation():
    """Ctrl-C: what was committed is shown, the daemon has everything back, others go on."""
    with Daemon() as daemon:
        child = subprocess.Popen([RUN, "--random", "tiny", "--prompt-tokens", "600", "-n", "100000",
                                  "--json", "--mode", "offloaded", "--runtime-dir", daemon.runtime_dir],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(1)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
        assert child.returncode == 130 and b"interrupted" in err
        shown = json.loads(out)["rows"][0]["ids"]
        assert len(shown) > 0
        again = run("--random", "tiny", "--prompt-tokens", "600", "-n", str(len(shown)), "--json",
                    "--mode", "offloaded", "--runtime-dir", daemon.runtime_dir)
        assert again["rows"][0]["ids"] == shown


def test_no_daemon(tmp_path):
    done = subprocess.run([RUN, *BASE, "--runtime-dir", str(tmp_path)], capture_output=True,
                          timeout=60, check=False)
    assert done.returncode == 1 and b"is kvtierd running" in done.stderr
