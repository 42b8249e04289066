#!/usr/bin/env python3
"""House rules as failing checks: `make lint` runs this, then compiles with warnings as errors.

    tests/lint/lint.py [--root DIR]

A finding is one line, `file:line: [rule] what is wrong and what to do`, and the exit status is 1.
Warnings and SKIP lines do not fail. Where a rule is wrong for one line, that line says so with its
reason:   /* lint: allow print: this is the assertion's last word */
"""

import argparse
import os
import re
import shutil
import subprocess
import sys

# ---------------------------------------------------------------- the arrows between folders

# Which folders a file may include, by the longest prefix of its own path. An arrow reaches what
# its target reaches: a header of the engine includes headers of proto, so whoever includes the
# engine sees them, and may name them.
ARROWS = {
    "proto": [],
    "kernels": [],
    # The CUDA driver API, opened at run time: for the plug-in, the library and GPU workers.
    "cuda": [],
    "tiers/engine": ["proto"],
    "tiers/device": ["tiers/engine", "tiers/host", "kernels"],
    "tiers/device/cuda": ["tiers/device", "cuda"],
    "tiers/host": ["tiers/engine"],
    "tiers/nvme": ["tiers/engine"],
    "tiers/remote": ["tiers/engine"],
    "daemon": ["tiers/device", "tiers/host", "tiers/nvme", "tiers/remote", "kernels"],
    "daemon/front": ["proto"],
    "client/lib": ["proto", "client/kvtier.h", "cuda"],
    # kvtierctl attaches in a role that the public header does not offer.
    "client/ctl": ["client/lib", "client/shapes.h", "client/output.h"],
    "client/worker": ["proto", "client/kvtier.h", "client/shapes.h", "client/output.h", "kernels"],
    "client/worker/synthetic": ["proto", "client/kvtier.h", "client/output.h", "kernels", "cuda"],
    "client/python": ["proto", "client/kvtier.h"],
    "client": [],
    # A worked example is a user's program: it sees the public header only, as <kvtier.h>.
    "examples": ["kvtier.h"],
    # What only the bundle links.
    "mk": [],
}
ANYTHING = ["tests/"]  # tests may include everything, and nothing includes tests

# The engine is a pure state machine, so it may include these and nothing else of the system's: no
# <time.h>, <pthread.h>, <unistd.h>, <stdio.h>, no sockets.
ENGINE_SYSTEM_HEADERS = {"assert.h", "inttypes.h", "limits.h", "stdalign.h", "stdarg.h",
                         "stdbool.h", "stddef.h", "stdint.h", "stdlib.h", "string.h"}

# ---------------------------------------------------------------- calls

BANNED_CALLS = {
    "strcpy": "snprintf or memcpy with a checked length",
    "strcat": "snprintf with a checked length",
    "strncpy": "it may leave no terminator: snprintf",
    "strncat": "snprintf with a checked length",
    "sprintf": "snprintf",
    "vsprintf": "vsnprintf",
    "gets": "fgets",
    "strtok": "strchr or strsep",
    "alloca": "a bounded array, or memory of the configuration",
    "system": "posix_spawn with an argument list",
    "popen": "posix_spawn with an argument list",
    "rand": "a seeded generator that is handed in",
    "srand": "a seeded generator that is handed in",
    "random": "a seeded generator that is handed in",
    "atoi": "strtol with a check of errno, end and range",
    "atol": "strtol with a check of errno, end and range",
    "atoll": "strtoll with a check of errno, end and range",
    "atof": "strtod with a check of errno and end",
    "tmpnam": "mkstemp or memfd_create",
    "mktemp": "mkstemp or memfd_create",
    "setjmp": "one exit with labels",
    "longjmp": "one exit with labels",
    "usleep": "clock_nanosleep, or wait for the event itself",
}
# What NDEBUG could take away; ours stays on.
ASSERT_HINT = "KVT_ASSERT, which stays on in release builds (static_assert is fine)"

# Only these print or log; a library and a state machine return errors.
PRINTERS = ("daemon/", "client/ctl/", "client/worker/", "examples/", "tests/")
PRINT_CALLS = {"printf", "vprintf", "puts", "putchar", "perror", "syslog", "dprintf"}
PRINT_STREAM_CALLS = {"fprintf", "vfprintf", "fputs", "fputc", "putc"}
# Only programs end the process.
EXITERS = PRINTERS
EXIT_CALLS = {"exit", "_exit", "_Exit", "quick_exit"}

LINES_MAX = 700

# ---------------------------------------------------------------- helpers


class Lint:
    def __init__(self, root):
        self.root = root
        self.failed = False

    def fail(self, where, rule, text):
        self.failed = True
        print(f"{where}: [{rule}] {text}")

    def note(self, text):
        print(text)

    def read(self, path):
        with open(os.path.join(self.root, path), encoding="utf-8", errors="replace",
                  newline="") as stream:
            return stream.read()

    def files(self, *patterns):
        """New files count before they are added; ignored ones never do."""
        run = subprocess.run(["scripts/sources", *patterns], cwd=self.root, check=True,
                             capture_output=True, text=True)
        return run.stdout.splitlines()


def without_comments_and_strings(text, keep_strings=False):
    """The code alone, each line where it was; the insides of comments and strings are blanks."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.S)

    def blank(match):
        token = match.group(0)
        if token[0] in "\"'":
            return token if keep_strings else token[0] + " " * (len(token) - 2) + token[-1]
        return re.sub(r"[^\n]", " ", token)

    return pattern.sub(blank, text)


def allowed_by_comment(lines, number, rule):
    return f"lint: allow {rule}:" in lines[number - 1]


def home_of(path):
    """The module that a file belongs to: the longest key of ARROWS that its path begins with."""
    homes = [key for key in ARROWS if path == key or path.startswith(key + "/")]
    return max(homes, key=len) if homes else None


def reach(home):
    """Everything that a module may include, arrows followed to their ends."""
    found, todo = set(), list(ARROWS[home])
    while todo:
        target = todo.pop()
        if target not in found:
            found.add(target)
            todo += ARROWS.get(target, [])
    return found


# ---------------------------------------------------------------- rules


def check_arrows(lint, path, lines, code_lines):
    home = home_of(path)
    if home is None and not path.startswith(tuple(ANYTHING)):
        lint.fail(f"{path}:1", "arrow", "this folder has no place in ARROWS of tests/lint/lint.py")
        return
    for number, line in enumerate(code_lines, 1):
        match = re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line)
        if not match or allowed_by_comment(lines, number, "arrow"):
            continue
        quoted, target = match.group(1) == '"', match.group(2)
        where = f"{path}:{number}"
        if not quoted:
            if home == "tiers/engine" and target not in ENGINE_SYSTEM_HEADERS:
                lint.fail(where, "pure", f"the engine includes <{target}>: no I/O, clock or "
                                         "threads in it; what it needs is handed in")
            if home_of(target) and os.path.exists(os.path.join(lint.root, target)):
                lint.fail(where, "arrow", f'include ours with quotes: "{target}"')
            continue
        generated = target.endswith(".pb-c.h") and \
            os.path.exists(os.path.join(lint.root, target.removesuffix(".pb-c.h") + ".proto"))
        if not generated and not os.path.exists(os.path.join(lint.root, target)):
            lint.fail(where, "arrow", f'"{target}" is not a path from the root: include by full '
                                      'path ("tiers/engine/block.h")')
            continue
        if home is None:
            continue
        target_home = home_of(target)
        if target_home == home or target_home in reach(home) or target in reach(home):
            continue
        if target.startswith("tests/"):
            target_home = "tests"
        may = ", ".join(sorted(reach(home))) or "nothing else"
        lint.fail(where, "arrow", f"{home} -> {target_home} goes the wrong way "
                                  f"({home} may include: {may})")


def check_calls(lint, path, lines, code_lines):
    call = re.compile(r"(?<![\w.>])([A-Za-z_]\w*)\s*\(")
    stream_call = re.compile(r"(?<![\w.>])(" + "|".join(PRINT_STREAM_CALLS) +
                             r")\s*\([^;]*\b(stdout|stderr)\b")
    in_tests = path.startswith("tests/")
    for number, line in enumerate(code_lines, 1):
        where = f"{path}:{number}"
        for name in call.findall(line):
            if name in BANNED_CALLS and not allowed_by_comment(lines, number, "call"):
                lint.fail(where, "call", f"{name} is banned: {BANNED_CALLS[name]}")
            if name == "assert" and not in_tests and not allowed_by_comment(lines, number, "call"):
                lint.fail(where, "call", f"assert is banned: {ASSERT_HINT}")
            if name in PRINT_CALLS and not path.startswith(PRINTERS) and \
                    not allowed_by_comment(lines, number, "print"):
                lint.fail(where, "print", f"{name}: only daemon/ and the tools print or log")
            if name in EXIT_CALLS and not path.startswith(EXITERS) and \
                    not allowed_by_comment(lines, number, "exit"):
                lint.fail(where, "exit", f"{name}: only programs end the process; return an error")
        match = stream_call.search(line)
        if match and not path.startswith(PRINTERS) and \
                not allowed_by_comment(lines, number, "print"):
            lint.fail(where, "print", f"{match.group(1)} to {match.group(2)}: only daemon/ and the "
                                      "tools print or log")


def check_text(lint, path, text):
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if line.endswith((" ", "\t", "\r")):
            lint.fail(f"{path}:{number}", "space", "white space at the end of the line")
        if "\t" in line.rstrip() and path.endswith((".c", ".h", ".cu", ".cuh", ".py")):
            lint.fail(f"{path}:{number}", "tab", "a tab; four spaces")
    if text and not text.endswith("\n"):
        lint.fail(f"{path}:{len(lines)}", "space", "no newline at the end of the file")
    if path.endswith((".c", ".h", ".cu", ".cuh", ".py")) and len(lines) - 1 > LINES_MAX:
        lint.note(f"warning: {path}: {len(lines) - 1} lines, more than {LINES_MAX}: "
                  "does it hold two ideas?")


def check_schema(lint):
    """Every message of the schema has a comment (above it or inside), and the protocol's
    description, once there is one, names every message and every field."""
    path = "proto/kvtier.proto"
    if not os.path.exists(os.path.join(lint.root, path)):
        return
    text = lint.read(path)
    lines = text.split("\n")
    documents = [p for p in lint.files("*.md") if os.path.basename(p) == "PROTOCOL.md"]
    description = lint.read(documents[0]) if documents else None
    for number, line in enumerate(lines, 1):
        code = line.split("//")[0].strip()
        kind = re.match(r"(?:message|enum)\s+(\w+)", code)
        field = re.match(r"(?:repeated |optional )?[\w.]+\s+(\w+)\s*=\s*\d+", code)
        name = kind.group(1) if kind else field.group(1) if field else None
        if kind:
            end = next((n for n in range(number, len(lines)) if lines[n].startswith("}")), number)
            above = lines[number - 2].strip() if number > 1 else ""
            if not above.startswith("//") and "//" not in "".join(lines[number - 1:end]):
                lint.fail(f"{path}:{number}", "schema", f"{name} has no comment")
        if name and description is not None and not re.search(rf"\b{name}\b", description):
            lint.fail(f"{path}:{number}", "schema", f"{documents[0]} does not mention {name}")


def check_scripts(lint):
    scripts = [path for path in lint.files("scripts/*", "*.sh", ".ci/*")
               if re.match(r"#!.*\b(ba|da)?sh\b", lint.read(path).split("\n")[0])]
    if not scripts:
        return
    if not shutil.which("shellcheck"):
        lint.note("SKIP shellcheck: it is not installed (scripts/setup lint)")
        return
    run = subprocess.run(["shellcheck", "--format=gcc", "--severity=info", *scripts],
                         cwd=lint.root, capture_output=True, text=True, check=False)
    for line in run.stdout.splitlines():
        where, _, text = line.partition(": ")
        lint.fail(where, "shell", text)


def check_format(lint):
    run = subprocess.run(["scripts/format", "--check"], cwd=lint.root, check=False,
                         capture_output=True, text=True)
    for line in run.stdout.splitlines():
        lint.note(line)
    if run.returncode != 0:
        places = re.findall(r"^(\S+?:\d+):\d+: (?:error|warning): code should be clang-formatted",
                            run.stderr, re.M)
        first = {}  # one finding a file: its first place
        for where in places:
            first.setdefault(where.split(":")[0], where)
        for where in first.values():
            lint.fail(where, "format", "differs from .clang-format from here on; make format")
        if not places:
            lint.fail("scripts/format", "format", run.stderr.strip())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument("--root", default=os.path.dirname(os.path.dirname(here)))
    lint = Lint(parser.parse_args().root)
    for path in lint.files("*"):
        if re.search(r"\s", path):
            lint.fail(f"{path}:1", "name", "no white space in file names")
    for path in lint.files("*.c", "*.h", "*.cu", "*.cuh"):
        text = lint.read(path)
        lines = text.split("\n")
        check_arrows(lint, path, lines,
                     without_comments_and_strings(text, keep_strings=True).split("\n"))
        check_calls(lint, path, lines, without_comments_and_strings(text).split("\n"))
    for path in lint.files("*.c", "*.h", "*.cu", "*.cuh", "*.py", "*.sh", "*.mk", "*.proto",
                           "*.md", "*.in", "*.service", "Makefile", "scripts/*", ".ci/*"):
        check_text(lint, path, lint.read(path))
    check_schema(lint)
    check_scripts(lint)
    check_format(lint)
    if lint.failed:
        print("lint: failed")
    return 1 if lint.failed else 0


if __name__ == "__main__":
    sys.exit(main())
