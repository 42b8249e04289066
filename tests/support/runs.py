"""kvtier-run for tests: to its end, or in two halves; what it printed, and its logits as bytes."""

import json
import os
import subprocess

from kvtierd import SLOWER, program

# K and V of one token in one layer of `--random tiny`: 2 heads of 32 f16 values, twice.
TINY = ["--random", "tiny"]
TINY_TOKEN_BYTES = 2 * 2 * 32 * 2
TINY_LAYERS = 3
TINY_VOCABULARY = 512


def run(*arguments, status=0, timeout_s=60):
    """Runs it to its end with --json; returns the object, with its stderr as "stderr"."""
    command = [program("kvtier-run"), *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, timeout=timeout_s * SLOWER, check=False,
                          stdin=subprocess.DEVNULL, text=True)
    assert done.returncode == status, f"{' '.join(command)[:500]}: {done.returncode}\n{done.stderr}"
    return {**(json.loads(done.stdout) if done.stdout else {}), "stderr": done.stderr}


def run_with_logits(directory, *arguments, timeout_s=60):
    """The same, and the logits of every step as bytes."""
    path = os.path.join(str(directory), "logits")
    result = run(*arguments, "--dump-logits", path, timeout_s=timeout_s)
    with open(path, "rb") as stream:
        bits = stream.read()
    os.unlink(path)
    return result, bits


def ids_of(result):
    return [row["ids"] for row in result["rows"]]


def wait_for_text(worker, text):
    """Reads the stderr of a worker (started with --progress always) until the text is there."""
    seen = b""
    while text.encode() not in seen:
        part = os.read(worker.stderr.fileno(), 4096)
        assert part, f"'{text}' was never said: {seen.decode(errors='replace')}"
        seen += part
    return seen.decode(errors="replace")
