"""Workers die by SIGKILL at random moments while others run and are checked byte by byte.

KVT_KILLS=1000 kills so many, KVT_SEED=n the same ones; without them 60, and fresh ones.

test: timeout_s=300
"""

import json
import os
import random
import subprocess
import time

from kvtierd import SLOWER, Daemon, program, wait_until

KILLS = int(os.environ.get("KVT_KILLS", "60"))
SEED = int(os.environ.get("KVT_SEED") or random.SystemRandom().randrange(1 << 32))
MODES = ["dynamic", "static", "offloaded", "offloaded-static"]


def start(daemon, *args):
    return subprocess.Popen([program("kvtier-synth"), "--runtime-dir", daemon.runtime_dir, *args],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def status(daemon):
    return json.loads(subprocess.run(
        [program("kvtierctl"), "--runtime-dir", daemon.runtime_dir, "--json", "status"],
        capture_output=True, text=True, check=True).stdout)


def victim_options(chance):
    options = ["--seed", str(chance.randrange(1, 1 << 31)), "--seconds", "600", "--name", "victim",
               "--mode", chance.choice(MODES), "--layers", str(chance.randrange(1, 6)),
               "--rows", str(chance.randrange(1, 4)), "--prompt", str(chance.randrange(0, 900)),
               "--tokens", str(chance.randrange(1, 40)), "--ahead", str(chance.choice([1, 4]))]
    if chance.random() < 0.4:
        options.append("--dense")
    if chance.random() < 0.5 and "offloaded-static" not in options:
        options += ["--fork", "20", "--reorder", "20", "--crop", "20", "--abort", "20"]
    return options


def test_kills():
    chance = random.Random(SEED)
    print(f"KVT_SEED={SEED}")
    # A static victim with forks would take the whole device, and those beside it had KVT_EQUOTA, rightly.
    # Two such at their limit (one is dying) leave the three what they need, and are pressed all the same.
    with Daemon(sets={"device.cpu0.budget": "6MiB", "device.cpu0.worker_max": "2MiB"}) as daemon:
        # Three that live: endless rounds until they are told that it is enough, by a short time.
        seconds = str(int(KILLS * 0.1 * SLOWER) + 1)
        beside = [start(daemon, "--seed", str(n + 1), "--mode", mode, "--name", f"beside-{n}",
                        "--seconds", seconds, "--compute-us", "200", "--tokens", "40")
                  for n, mode in enumerate(["offloaded", "dynamic", "offloaded-static"])]
        for _ in range(KILLS):
            options = victim_options(chance)
            victim = start(daemon, *options)
            time.sleep(chance.random() * 0.12 * SLOWER)
            ended = victim.poll() is not None
            victim.kill()
            _, err = victim.communicate()
            # Quota is an answer: four workers share little. Anything else is not.
            assert not ended or "KVT_EQUOTA" in err, f"KVT_SEED={SEED} {' '.join(options)}\n{err}"
        for worker in beside:
            out, err = worker.communicate(timeout=120 * SLOWER)
            assert worker.returncode == 0, f"KVT_SEED={SEED} {' '.join(worker.args)}\n{out}{err}"
            assert json.loads(out)["errors"] == 0
        for tier in status(daemon)["tiers"]:
            assert tier["used_bytes"] <= tier["budget_bytes"], tier
        wait_until(lambda: not any(t["used_bytes"] for t in status(daemon)["tiers"]),
                   "every budget is back to zero")
        assert status(daemon)["workers"] == []
