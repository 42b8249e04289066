"""The lint is checked before it is believed: each rule sees a planted violation, and passes what
is right."""

import os
import shutil
import subprocess
import sys

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))


@pytest.fixture
def tree(tmp_path):
    """A small repository of its own; returns plant(path, text) -> (status, output of the lint)."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/sources", "scripts/format", ".clang-format"):
        shutil.copy(os.path.join(ROOT, name), tmp_path / name)
    for path, text in {
        "proto/errors.h": "int kvt_error(void);\n",
        "kernels/attend.h": "int kvt_attend(void);\n",
        "tiers/engine/engine.h": '#include "proto/errors.h"\n',
        "tiers/device/device.h": '#include "tiers/engine/engine.h"\n\n#include "kernels/attend.h"\n',
        "daemon/loop.h": '#include "tiers/device/device.h"\n',
        "daemon/front/front.h": '#include "proto/errors.h"\n',
        "client/kvtier.h": "#include <stdint.h>\n",
        "client/lib/lib.h": '#include "client/kvtier.h"\n#include "proto/errors.h"\n',
        "client/worker/lib.h": '#include "client/kvtier.h"\n',
        "tests/unit/test_all.c": '#include "daemon/loop.h"\n',
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    def plant(path=None, text=""):
        if path:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        done = subprocess.run([sys.executable, os.path.join(HERE, "lint.py"), "--root",
                               str(tmp_path)], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return plant


def test_clean_tree_passes(tree):
    assert tree()[0] == 0, tree()[1]


@pytest.mark.parametrize("path,target", [
    ("proto/a.c", "kernels/attend.h"),
    ("proto/a.c", "tiers/engine/engine.h"),
    ("kernels/a.c", "proto/errors.h"),
    ("tiers/engine/a.c", "tiers/device/device.h"),
    ("tiers/engine/a.c", "kernels/attend.h"),
    ("tiers/engine/a.c", "daemon/loop.h"),
    ("tiers/device/a.c", "daemon/loop.h"),
    ("tiers/device/cpu/a.c", "client/kvtier.h"),
    ("tiers/host/a.c", "tiers/device/device.h"),
    ("daemon/a.c", "daemon/front/front.h"),
    ("daemon/a.c", "client/kvtier.h"),
    ("daemon/front/a.c", "daemon/loop.h"),
    ("daemon/front/a.c", "tiers/engine/engine.h"),
    ("client/lib/a.c", "kernels/attend.h"),
    ("client/lib/a.c", "tiers/engine/engine.h"),
    ("client/ctl/a.c", "client/worker/lib.h"),
    ("client/worker/a.c", "tiers/engine/engine.h"),
    ("client/worker/synthetic/a.c", "client/lib/lib.h"),
    ("client/kvtier.h", "proto/errors.h"),
    ("examples/a.c", "proto/errors.h"),
    ("daemon/a.c", "tests/unit/test_all.c"),
])
def test_arrow_that_goes_back(tree, path, target):
    status, text = tree(path, f'int a;\n#include "{target}"\n')
    assert status == 1
    assert f"{path}:2: [arrow] " in text and " goes the wrong way" in text


@pytest.mark.parametrize("path,target", [
    ("tiers/device/a.c", "proto/errors.h"),  # by way of the engine
    ("tiers/device/cpu/a.c", "tiers/device/device.h"),
    ("tiers/host/a.c", "tiers/engine/engine.h"),
    ("daemon/a.c", "proto/errors.h"),
    ("daemon/a.c", "kernels/attend.h"),
    ("client/worker/a.c", "kernels/attend.h"),
    ("client/worker/a.c", "client/kvtier.h"),
    ("tests/sim/a.c", "tiers/engine/engine.h"),
])
def test_arrow_that_is_right(tree, path, target):
    status, text = tree(path, f'#include "{target}"\n')
    assert status == 0, text


def test_include_by_relative_path(tree):
    status, text = tree("tiers/engine/a.c", '#include "engine.h"\n')
    assert status == 1 and "tiers/engine/a.c:1: [arrow] " in text and "full path" in text


def test_include_of_ours_in_angle_brackets(tree):
    status, text = tree("tiers/engine/a.c", "#include <tiers/engine/engine.h>\n")
    assert status == 1 and "with quotes" in text


def test_generated_header_needs_its_schema(tree):
    assert tree("proto/a.c", '#include "proto/kvtier.pb-c.h"\n')[0] == 1
    assert tree("proto/kvtier.proto", "// Ours.\nmessage Ping {}\n")[0] == 0


def test_folder_without_a_place(tree):
    status, text = tree("misc/a.c", "int a;\n")
    assert status == 1 and "misc/a.c:1: [arrow]" in text


@pytest.mark.parametrize("header", ["time.h", "pthread.h", "unistd.h", "stdio.h", "sys/socket.h",
                                    "fcntl.h", "sys/mman.h", "threads.h", "signal.h"])
def test_engine_is_pure(tree, header):
    status, text = tree("tiers/engine/a.c", f"#include <stdint.h>\n#include <{header}>\n")
    assert status == 1 and "tiers/engine/a.c:2: [pure]" in text


@pytest.mark.parametrize("call", [
    "strcpy(a, b)", "strcat(a, b)", "sprintf(a, b)", "vsprintf(a, b, c)", "gets(a)",
    "strtok(a, b)", "alloca(4)", "system(a)", "rand()", "srand(1)", "atoi(a)", "atof(a)",
    "popen(a, b)", "mktemp(a)"])
def test_banned_call(tree, call):
    status, text = tree("daemon/a.c", f"int a = {call};\n")
    assert status == 1 and f"daemon/a.c:1: [call] {call.split('(')[0]} is banned" in text


def test_assert_is_ours(tree):
    assert "[call] assert is banned" in tree("daemon/a.c", "int f(void) { assert(1); }\n")[1]
    assert tree("daemon/a.c", 'static_assert(1, "x");\n')[0] == 0


@pytest.mark.parametrize("text", [
    "// strcpy(a, b)\n", "/* system(a)\n   rand() */\n", 'const char *a = "system(a) \\" rand()";\n',
    "int a = kvt_system(1);\n", "int a = b->system(1);\n", "int a = operand(1);\n"])
def test_not_a_banned_call(tree, text):
    status, output = tree("daemon/a.c", text)
    assert status == 0, output


@pytest.mark.parametrize("path", ["proto/a.c", "kernels/a.c", "tiers/engine/a.c",
                                  "tiers/device/a.c", "tiers/host/a.c", "client/lib/a.c"])
@pytest.mark.parametrize("call", ["printf(a)", "puts(a)", "perror(a)", "fprintf(stderr, a)",
                                  "fputs(a, stdout)"])
def test_libraries_do_not_print(tree, path, call):
    status, text = tree(path, f"int a = {call};\n")
    assert status == 1 and f"{path}:1: [print]" in text


@pytest.mark.parametrize("path", ["daemon/a.c", "client/ctl/a.c", "client/worker/a.c"])
def test_tools_print(tree, path):
    assert tree(path, "int a = printf(b);\n")[0] == 0


def test_libraries_do_not_exit(tree):
    assert "client/lib/a.c:1: [exit]" in tree("client/lib/a.c", "int a = exit(1);\n")[1]


def test_a_line_may_be_allowed_with_its_reason(tree):
    assert tree("proto/a.c", "int a = puts(b); // lint: allow print: last word\n")[0] == 0
    assert tree("proto/a.c", "int a = puts(b); // lint: allow call: other rule\n")[0] == 1


@pytest.mark.parametrize("text,rule", [("int a; \n", "space"), ("int a;\r\n", "space"),
                                       ("int a;", "space"), ("int\ta;\n", "tab")])
def test_white_space(tree, text, rule):
    status, output = tree("daemon/a.c", text)
    assert status == 1 and f"daemon/a.c:1: [{rule}]" in output


def test_long_file_is_a_warning(tree):
    status, text = tree("daemon/a.c", "// x\n" * 701)
    assert status == 0 and "warning: daemon/a.c: 701 lines" in text


def test_message_without_comment(tree):
    status, text = tree("proto/kvtier.proto", "message Ping {\n  bytes payload = 1;\n}\n")
    assert status == 1 and "proto/kvtier.proto:1: [schema] Ping has no comment" in text


def test_message_and_field_missing_in_the_description(tree):
    tree("proto/kvtier.proto", "// Ours.\nmessage Ping {\n  bytes payload = 1;\n}\n")
    status, text = tree("docs/PROTOCOL.md", "Nothing.\n")
    assert status == 1 and "does not mention Ping" in text and "does not mention payload" in text
    assert tree("docs/PROTOCOL.md", "Ping carries a payload.\n")[0] == 0


@pytest.mark.skipif(not shutil.which("clang-format-14"), reason="clang-format-14 is not installed")
def test_format(tree):
    status, text = tree("daemon/a.c", "int a;\nint   b;\n")
    assert status == 1 and "daemon/a.c:2: [format]" in text


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck(tree):
    status, text = tree("scripts/a", "#!/bin/sh\nrm $1\n")
    assert status == 1 and "scripts/a:2:" in text and "[shell]" in text


def test_file_name_with_a_space(tree):
    assert "[name]" in tree("daemon/a b.txt", "x\n")[1]
