"""Four kvtier-run at once, one of them killed by SIGKILL at random moments; the others' ids are those of
--local each time, budgets hold, and nothing is left.

test: timeout_s=900

KVT_KILLS=200 kills so many with the tiny shape (10), and 5 with the real model, which is left out
otherwise; KVT_SEED=n the same choices again.
"""

import json
import os
import random
import time

import pytest

from fleet import Fleet
from kvtierd import SLOWER, wait_until
from runs import TINY, ids_of, run

KILLS = int(os.environ.get("KVT_KILLS", "10"))
REAL_KILLS = 5 if "KVT_KILLS" in os.environ else 0
SEED = int(os.environ.get("KVT_SEED") or random.SystemRandom().randrange(1 << 32))
MODEL = os.environ.get("KVT_MODEL", "")
SURVIVORS = 3


def tiny_command(chance):
    return [*TINY, "--prompt-tokens", chance.choice([300, 700, 1100]), "--seed", chance.choice([1, 2]),
            "-n", chance.choice([100, 300]), "--rows", chance.choice([1, 1, 3])]


def real_command(chance):
    return ["--model", MODEL, "--prompt", "one two three four five " * chance.choice([30, 60]),
            "-n", 24, "--ignore-end"]


def how(chance):
    return ["--mode", chance.choice(["dynamic", "offloaded", "offloaded", "offloaded-static"]),
            "--piece-tokens", chance.choice([0, 256, 512]), "--steps-ahead", chance.choice([1, 8]),
            "--threads", chance.choice([1, 2])]


class Survivors:
    """Those that live: who has ended is compared, and another one takes his place."""

    def __init__(self, fleet, chance, command_of):
        self.fleet, self.chance, self.command_of = fleet, chance, command_of
        self.wanted = {}
        self.running = []
        self.compared = 0

    def fill(self):
        while len(self.running) < SURVIVORS:
            command = self.command_of(self.chance)
            worker = self.fleet.start(*command, *how(self.chance), "--json", name="kvtier-run")
            self.running.append((worker, command))

    def check(self, worker, command):
        key = tuple(map(str, command))
        if key not in self.wanted:
            self.wanted[key] = ids_of(run(*command, "--local"))
        result = self.fleet.finish(worker, timeout_s=120)
        assert "starting over" not in result["stderr"]
        assert ids_of(result) == self.wanted[key], f"KVT_SEED={SEED} {' '.join(worker.args)}"
        self.compared += 1

    def look(self, all_of_them=False):
        for entry in list(self.running):
            if all_of_them or entry[0].poll() is not None:
                self.check(*entry)
                self.running.remove(entry)


def kill_one(fleet, chance, command, moment_s):
    """At any moment: while it attaches, reads its prompt, generates."""
    victim = fleet.start(*command, "-n", 3000, *how(chance), "--json", name="kvtier-run")
    time.sleep(chance.random() * moment_s * SLOWER)
    ended = victim.poll() is not None
    victim.kill()
    out, err = victim.communicate()
    # it may have been faster than the moment, but nothing else may have ended it
    assert not ended or victim.returncode == 0, f"KVT_SEED={SEED} {' '.join(victim.args)}\n{out}{err}"
    wait_until(lambda: fleet.worker_of(victim) is None, "its session is gone", 2)
    return not ended


def kill_many(sets, kills, command_of, moment_s):
    chance = random.Random(SEED)
    print(f"KVT_SEED={SEED}")
    with Fleet(sets) as fleet:
        fleet.finish(fleet.start(*command_of(chance), "--json", name="kvtier-run"))
        fleet.expect_empty()
        fds = fleet.daemon.fds_used()
        survivors = Survivors(fleet, chance, command_of)
        in_time = 0
        for _ in range(kills):
            survivors.fill()
            in_time += kill_one(fleet, chance, command_of(chance), moment_s)
            survivors.look()
        survivors.look(all_of_them=True)
        fleet.expect_empty()
        wait_until(lambda: fleet.daemon.fds_used() <= fds, "its descriptors are back", 10)
        tiers = {tier["name"]: tier["used_bytes"] for tier in fleet.ctl("status")["tiers"]}
        assert tiers == {"cpu0": 0, "host": 0}, json.dumps(tiers)
        print(f"{kills} kills, {in_time} of them in time, {survivors.compared} survivors compared, "
              f"{fleet.watch.looks} looks at the budgets, most {fleet.watch.most}")
        assert in_time >= kills // 2
        assert survivors.compared >= SURVIVORS


def test_kills_with_the_tiny_shape():
    kill_many({"device.cpu0.budget": "2MiB", "host.budget": "64MiB"}, KILLS, tiny_command, 0.35)


@pytest.mark.skipif(REAL_KILLS == 0 or not os.path.exists(MODEL),
                    reason="5 kills with the real model: `make test-kill`, which needs `make model`")
def test_kills_with_the_real_model():
    kill_many({"device.cpu0.budget": "8MiB", "host.budget": "256MiB", "host.chunk": "1MiB",
               "device.cpu0.piece_size": "auto"}, REAL_KILLS, real_command, 6)
