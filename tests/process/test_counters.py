"""What crosses the link, to the byte, and that nothing else does: no message between tokens.

test: timeout_s=180

The synthetic worker's prompt is appended in chunks; each step reads what is there and appends. Away
from the device goes what is appended, towards it what is not resident, each distinct block once.
"""

import os
import signal
import struct

import pytest

from fleet import Fleet, wait_stopped
from kvtierd import wait_until

BLOCK = 256
LAYERS = 4
TOKEN = 2 * (16 + 16) * 2  # bytes of K and V of one token in one layer
KINDS = [[], ["--dense"]]
ids = " ".join


@pytest.fixture(scope="module", name="fleet")
def module_fleet():
    with Fleet({"device.cpu0.budget": "32MiB", "host.budget": "256MiB"}) as fleet:
        yield fleet


def run(fleet, *args):
    result = fleet.finish(fleet.start(*args))
    assert result["errors"] == 0
    return result


def prompt_reads(prompt, chunk):
    return sum(range(0, prompt, chunk))


# ---- every mode, both kinds, several rows


@pytest.mark.parametrize("kind", KINDS, ids=ids)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("mode,resident", [("dynamic", -1), ("dynamic", 2), ("static", -1),
                                           ("offloaded", -1), ("offloaded", 1), ("offloaded", 3),
                                           ("offloaded-static", -1), ("offloaded-static", 2)])
def test_bytes_of_every_mode(fleet, mode, resident, rows, kind):
    prompt, tokens, append = 700, 48, 2
    r = run(fleet, "--mode", mode, "--resident", resident, "--rows", rows, "--prompt", prompt,
            "--chunk", 300, "--tokens", tokens, "--append", append, "--ahead", 5, *kind)
    streamed = r["layers"].count("S")
    expected = {"dynamic": 0 if resident < 0 else LAYERS - resident, "static": 0}
    assert streamed == expected.get(mode, LAYERS - max(resident, 0))
    reads = prompt_reads(prompt, 300) + sum(range(prompt, prompt + tokens, append))
    assert r["to_device_bytes"] == streamed * rows * reads * TOKEN
    assert r["from_device_bytes"] == streamed * rows * (prompt + tokens) * TOKEN
    assert r["need_to_device_bytes"] == streamed * rows * (prompt + tokens - append) * TOKEN
    assert r["need_from_device_bytes"] == streamed * rows * append * TOKEN
    assert r["migrated_bytes"] == r["copied_on_write_bytes"] == 0


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_ragged_rows(fleet, kind):
    r = run(fleet, "--mode", "offloaded", "--rows", 5, "--ragged", "--ahead", 3, *kind)
    assert r["from_device_bytes"] == r["bytes_written"]
    if not kind:  # a dense worker looks at everything twice
        assert r["to_device_bytes"] == r["bytes_checked"]


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_layers_that_are_read_again(fleet, kind):
    """Layers 1 to 3 read layer 0's K and V: it crosses once for a dense worker, which holds its slot;
    for a segment worker it is listed again for each."""
    r = run(fleet, "--mode", "offloaded", "--shared", "0:3", "--prompt", 500, "--chunk", 500,
            "--tokens", 20, *kind)
    reads = sum(range(500, 520))
    appended = 500 + 20
    again = 0 if kind else 3 * (reads + appended)
    assert r["to_device_bytes"] == (LAYERS * reads + again) * TOKEN
    assert r["from_device_bytes"] == LAYERS * appended * TOKEN


# ---- shared prompts


def growth(rows_most, tokens):
    """Rows of each step when they double before it."""
    rows, steps = 1, []
    for _ in range(tokens):
        rows = 2 * rows if 2 * rows <= rows_most else rows
        steps.append(rows)
    return steps


@pytest.mark.parametrize("kind", KINDS, ids=ids)
@pytest.mark.parametrize("rows_most", [2, 64])
def test_rows_of_one_prompt(fleet, rows_most, kind):
    """The prompt's full blocks cross once, however many rows read them; tails are each row's own."""
    prompt, tokens = 1000, 10
    full, tail = prompt // BLOCK * BLOCK, prompt % BLOCK
    r = run(fleet, "--mode", "offloaded", "--prompt", prompt, "--chunk", prompt, "--tokens", tokens,
            "--repeat", 100, "--rows-max", rows_most, *kind)
    steps = growth(rows_most, tokens)
    read = sum(full + rows * (tail + n) for n, rows in enumerate(steps))
    assert r["to_device_bytes"] == LAYERS * read * TOKEN
    assert r["from_device_bytes"] == LAYERS * (prompt + sum(steps)) * TOKEN
    doublings = [(n, rows) for n, rows in enumerate(steps) if n == 0 or rows != steps[n - 1]]
    # Of two rows that share a tail one gets a copy, the other one writes in place.
    copied = sum(rows // 2 * (tail + n) for n, rows in doublings)
    assert r["copied_on_write_bytes"] == LAYERS * copied * TOKEN
    assert r["need_to_device_bytes"] == LAYERS * (full + steps[-1] * (tail + tokens - 1)) * TOKEN
    blocks = r["host_bytes"] / (LAYERS * BLOCK * TOKEN)
    assert full // BLOCK + steps[-1] <= blocks <= full // BLOCK + 2 * steps[-1] + 2


def test_rows_of_one_prompt_on_the_device(fleet):
    """A segment worker's resident prompt is there once."""
    r = run(fleet, "--mode", "dynamic", "--prompt", 1000, "--chunk", 1000, "--tokens", 10,
            "--repeat", 100, "--rows-max", 64)
    assert r["layers"] == "RRRR" and r["to_device_bytes"] == 0 and r["host_bytes"] == 0
    assert r["device_bytes"] <= (3 + 2 * 64 + 2) * LAYERS * BLOCK * TOKEN


# ---- several workers


def test_the_daemon_counts_what_its_workers_count(fleet):
    """The daemon's sums grow by those of its workers, each its own."""
    before = fleet.ctl("status")["counters"]
    held = [fleet.start("--mode", "offloaded", "--hold-step", 20 + n, "--seed", n, "--rows", n + 1,
                        *KINDS[n % 2]) for n in range(3)]
    for worker in held:
        wait_stopped(worker)
    status = fleet.ctl("status")
    total = {name: 0 for name in status["counters"]}
    for n, worker in enumerate(held):
        entry = next(w for w in status["workers"] if w["pid"] == worker.pid)
        for name in total:
            total[name] += entry["counters"][name]
        # 600 tokens in three steps, then one token a step; the last one is not committed.
        assert entry["counters"]["tokens_appended"] == (n + 1) * (600 + 20 + n - 3)
        assert entry["counters"]["steps_committed"] == 20 + n
    assert {name: status["counters"][name] - before[name] for name in total} == total
    for worker in held:
        worker.send_signal(signal.SIGCONT)
        assert fleet.finish(worker)["steps"] == 3 + 64


# ---- no messages


def committed(pid):
    """The control page's counter, as the worker has it mapped: proto/control_page.h."""
    with open(f"/proc/{pid}/maps", encoding="ascii") as stream:
        line = next(line for line in stream if "kvtier-control" in line)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(int(line.split("-")[0], 16) + 128)
        return struct.unpack("<Q", memory.read(8))[0]


@pytest.mark.parametrize("kind", KINDS, ids=ids)
@pytest.mark.parametrize("mode", ["offloaded", "dynamic", "offloaded-static"])
def test_no_message_between_tokens(fleet, mode, kind):
    """With the front stopped no message comes through, and the schedule's steps all commit."""
    ahead = 32
    worker = fleet.start("--mode", mode, "--prompt", 400, "--chunk", 400, "--tokens", 2 * ahead,
                         "--ahead", ahead, "--hold-step", 3, *kind)
    wait_stopped(worker)  # in the third step of the first schedule
    front = fleet.daemon.front_pid()
    os.kill(front, signal.SIGSTOP)
    try:
        worker.send_signal(signal.SIGCONT)
        wait_until(lambda: committed(worker.pid) >= 1 + ahead, "a schedule without messages", 5)
        assert committed(worker.pid) == 1 + ahead  # the next one needs the front
        assert worker.poll() is None
    finally:
        os.kill(front, signal.SIGCONT)
    assert fleet.finish(worker)["steps"] == 1 + 2 * ahead
    assert fleet.daemon.front_pid() == front
