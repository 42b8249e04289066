"""Workers that die, hang and are evicted on tiny budgets; front and daemon that go away.

test: timeout_s=300

KILLS=N in the environment: so many SIGKILLs (20; `make test-kill KILLS=200`).
"""

import os
import random
import signal
import threading
import time

import pytest

from fleet import Fleet, state_of, wait_stopped
from kvtierd import SLOWER, wait_until
from rawclient import CREATE, EQUOTA, STEP, Client, data, number

KILLS = int(os.environ.get("KILLS", "20"))
SMALL = ["--k-dim", 4, "--v-dim", 4]  # 32 bytes a token and layer
EDITS = [*SMALL, "--rows", 2, "--ragged", "--ahead", 4, "--crop", 10, "--fork", 15, "--reorder", 15,
         "--repeat", 5, "--select", 10, "--reset", 3, "--abort", 10, "--rows-max", 4,
         "--piece-tokens", 256]
STEADY = [["--mode", "offloaded"], ["--mode", "offloaded", "--dense"], ["--mode", "dynamic"]]
VICTIMS = [["--mode", "offloaded"], ["--mode", "dynamic"], ["--mode", "offloaded", "--dense"],
           ["--mode", "dynamic", "--dense"], ["--mode", "offloaded-static"]]


# ---- SIGKILL


def kill_at_random(fleet, kills, seed):
    """One victim after another; each is noticed, and gone, within a second."""
    chance = random.Random(seed)
    for n in range(kills):
        victim = fleet.start("--seed", 1000 * seed + n, "--name", f"victim-{n}", "--prompt", 300,
                             "--tokens", 40, "--rounds", 1000, *EDITS, *VICTIMS[n % len(VICTIMS)])
        time.sleep(chance.random() * 0.12)
        if victim.poll() is not None and victim.returncode > 0:
            fleet.finish(victim)  # it failed by itself: says why
        fleet.kill(victim)
        wait_until(lambda pid=victim: fleet.worker_of(pid) is None, "its session is gone", 2)


def test_kills_at_random():
    with Fleet() as fleet:
        seconds = max(2, KILLS // 5)
        steady = [fleet.start("--seed", n + 1, "--name", f"steady-{n}", "--prompt", 300, "--tokens", 60,
                              "--seconds", seconds, *EDITS, *args)
                  for n, args in enumerate(STEADY)]
        kill_at_random(fleet, KILLS, 1)
        for worker in steady:
            result = fleet.finish(worker, timeout_s=seconds + 60)
            assert result["errors"] == 0 and result["failed_steps"] == 0 and result["rounds"] >= 1
        fleet.expect_empty()
        print(f"{KILLS} kills, {fleet.watch.looks} looks at the budgets, most {fleet.watch.most}")


def test_kill_while_another_one_waits_for_its_memory():
    """Device memory of a stopped worker is charged until it dies; who waits then goes on."""
    with Fleet({"device.cpu0.budget": "512KiB", "daemon.reclaim_deadline": "20s"}) as fleet:
        held = fleet.start("--mode", "dynamic", "--prompt", 800, "--hold-step", 5)
        wait_stopped(held)
        other = fleet.start("--mode", "offloaded", "--layers", 2, "--k-dim", 64, "--v-dim", 64,
                            "--piece-tokens", 256, "--prompt", 300)
        time.sleep(0.3)
        fleet.kill(held)
        fleet.finish(other)


# ---- SIGSTOP


def test_stopped_worker_is_shown_and_evicted():
    with Fleet({"device.cpu0.budget": "2MiB"}) as fleet:
        held = fleet.start("--mode", "offloaded", "--hold-step", 6, "--name", "held")
        wait_stopped(held)
        shown = fleet.worker_of(held)
        assert shown["name"] == "held" and shown["state"] == "step"
        assert shown["device_bytes"] > 0 and shown["host_bytes"] > 0
        for worker in [fleet.start("--seed", n, *EDITS, *args) for n, args in enumerate(STEADY)]:
            assert fleet.finish(worker)["errors"] == 0
        assert fleet.worker_of(held)["device_bytes"] == shown["device_bytes"]
        assert fleet.tier("cpu0")["used_bytes"] == shown["device_bytes"]

        evicted = fleet.ctl("evict", shown["session"])
        assert evicted["pinned_bytes"] == shown["device_bytes"] or evicted["pinned_bytes"] > 0
        wait_until(lambda: fleet.tier("host")["used_bytes"] == 0, "its host memory is free", 5)
        left = fleet.worker_of(held)
        assert left["state"] == "reclaiming" and left["host_bytes"] == 0
        assert left["device_bytes"] == shown["device_bytes"]  # it still maps it
        assert fleet.tier("cpu0")["pinned_by_dead_bytes"] == shown["device_bytes"]
        assert state_of(held.pid) == "T"

        fleet.ctl("evict", shown["session"], "--kill")
        held.communicate(timeout=10)
        assert held.returncode == -signal.SIGKILL
        fleet.expect_empty()


def test_evicted_worker_that_goes_on_is_told():
    """It sees a clear error, gives its memory back by itself, and others never notice."""
    for dense in ([], ["--dense"]):
        with Fleet() as fleet:
            held = fleet.start("--mode", "offloaded", "--hold-step", 6, *dense)
            wait_stopped(held)
            fleet.ctl("evict", fleet.worker_of(held)["session"])
            held.send_signal(signal.SIGCONT)
            result = fleet.finish(held, status=3)
            assert "KVT_EEVICTED" in result["stderr"] and "evicted" in result["stderr"]
            assert "administrator" in result["stderr"]
            fleet.expect_empty()


def test_evict_while_working():
    with Fleet() as fleet:
        other = fleet.start("--mode", "offloaded", "--seconds", 1, *EDITS)
        for args in VICTIMS:
            victim = fleet.start("--seconds", 60, "--prompt", 300, "--tokens", 20, *SMALL, *args)
            shown = wait_until(lambda v=victim: fleet.worker_of(v), "it is attached", 10)
            time.sleep(0.05)
            fleet.ctl("evict", shown["session"])
            result = fleet.finish(victim, status=3)
            assert "KVT_EEVICTED" in result["stderr"], result
        fleet.finish(other)


# ---- the front, the daemon


def test_front_is_killed_in_mid_run():
    with Fleet() as fleet:
        workers = [fleet.start("--seed", n + 1, "--seconds", 2, *EDITS, *args)
                   for n, args in enumerate(STEADY)]
        for _ in range(6):
            time.sleep(0.25)
            front = wait_until(fleet.daemon.front_pid, "the front is there", 10)
            os.kill(front, signal.SIGKILL)
        for worker in workers:
            result = fleet.finish(worker)
            assert result["attached"] == 1 and result["errors"] == 0 and result["failed_steps"] == 0
        assert not fleet.daemon.ended()


def test_front_is_stopped_for_a_while():
    with Fleet() as fleet:
        worker = fleet.start("--mode", "offloaded", "--seconds", 1, "--ahead", 4)
        time.sleep(0.3)
        front = wait_until(fleet.daemon.front_pid, "the front is there", 10)
        os.kill(front, signal.SIGSTOP)
        time.sleep(0.7)
        try:
            os.kill(front, signal.SIGCONT)
        except ProcessLookupError:
            pass  # it was replaced, which is as good
        assert fleet.finish(worker)["attached"] == 1


def test_daemon_is_killed_and_comes_back():
    """A clear error for all; with --re-attach they start over."""
    with Fleet({"device.cpu0.budget": "2MiB"}) as fleet:
        plain = [fleet.start("--seconds", 60, *SMALL, *args) for args in STEADY]
        again = [fleet.start("--seed", n + 1, "--seconds", 2, "--re-attach", *EDITS, *args)
                 for n, args in enumerate(STEADY)]
        for _ in range(2):
            time.sleep(0.4)
            fleet.daemon.kill()
            for worker in plain:
                result = fleet.finish(worker, status=3, timeout_s=20)
                assert "KVT_EGONE" in result["stderr"], result
                assert "attach again" in result["stderr"]
            plain = []
            fleet.daemon.start()
        for worker in again:
            result = fleet.finish(worker)
            assert result["attached"] >= 2 and result["errors"] == 0
            assert "KVT_EGONE" in result["stderr"]


# ---- nothing leaks


def of_process(pid):
    """What can leak: descriptors, memory files among them, mappings of such, threads."""
    fds = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            fds.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            pass
    with open(f"/proc/{pid}/maps", encoding="ascii") as stream:
        maps = sum("memfd:" in line for line in stream)
    return {"fds": len(fds), "memfds": sum("memfd:" in f for f in fds), "maps": maps,
            "threads": len(os.listdir(f"/proc/{pid}/task"))}


def attach_and_leave(runtime_dir, n):
    """A worker that creates a cache, sometimes leaves in mid-step, and hangs up. Returns whether it was
    refused for want of memory: on a slow machine the real workers may hold all of it for long."""
    with Client(runtime_dir, name=b"cycle") as client:
        if n % 3 == 0:
            return False
        layers = data(1, number(1, 1) + number(2, 2) + number(3, 16) + number(4, 16) + number(5, 2) +
                      number(10, 2))
        options = layers + number(2, 3) + number(4, 1) + number(6, 256)
        reply = client.ask(CREATE, data(1, options))
        if reply.code == EQUOTA:
            return True
        assert reply.code == 0, reply.text
        if n % 3 == 2:
            cache = reply.body[CREATE][1][0]
            reply = client.ask(STEP, number(1, cache) + number(3, 10) + number(4, 1))
            assert reply.code == 0, reply.text
        client.give_back()
    return False


def settled(fleet):
    """The daemon's figures once nobody is attached. This process has left sessions whose extents it
    had not read yet: one more attaches, and is asked for them."""
    def nothing_left():
        with Client(fleet.daemon.runtime_dir, name=b"last") as client:
            client.take_extents(quiet_s=0.05)
        return fleet.is_empty()
    wait_until(nothing_left, "every extent has been given back", 20)
    fleet.expect_empty()
    time.sleep(0.3)
    return of_process(fleet.daemon.pid)


def test_nothing_leaks_over_500_attaches():
    cycles = 500 if SLOWER == 1 else 100
    with Fleet({"device.cpu0.budget": "8MiB", "device.cpu0.piece_size": "16KiB"},
               watched=False) as fleet:
        for n in range(6):
            attach_and_leave(fleet.daemon.runtime_dir, n)
        fleet.finish(fleet.start("--mode", "offloaded"))
        before = settled(fleet)
        front_before = of_process(fleet.daemon.front_pid())
        errors = []
        refused = []

        def cycle(first):
            try:
                for n in range(first, cycles, 4):
                    refused.append(attach_and_leave(fleet.daemon.runtime_dir, n))
            except Exception as error:  # pylint: disable=broad-exception-caught
                errors.append(error)

        threads = [threading.Thread(target=cycle, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for n in range(8):  # real ones among them, and some that die
            worker = fleet.start("--mode", "offloaded", "--tokens", 30, "--seed", n, *EDITS)
            if n % 2:
                time.sleep(0.03)
                fleet.kill(worker)
            else:
                fleet.finish(worker)
        for thread in threads:
            thread.join()
        assert not errors, errors[0]
        assert sum(refused) < cycles // 10
        after = settled(fleet)
        assert after == before
        front_after = of_process(fleet.daemon.front_pid())
        assert front_after["fds"] <= front_before["fds"] + 4, (front_before, front_after)
        assert front_after["threads"] == front_before["threads"]


@pytest.mark.parametrize("how", ["detach", "kill"])
def test_sessions_do_not_run_out(how):
    """More workers, one after the other, than there may be at once."""
    with Fleet({"daemon.sessions_max": "4"}, watched=False) as fleet:
        for n in range(12):
            worker = fleet.start("--mode", "offloaded", "--prompt", 100, "--tokens", 5, "--seed", n)
            if how == "kill":
                wait_until(lambda w=worker: fleet.worker_of(w) or w.poll() is not None, "attached", 10)
                fleet.kill(worker)
            else:
                fleet.finish(worker)
