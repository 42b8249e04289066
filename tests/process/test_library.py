"""libkvtier as others see it: header, symbols, man pages, the worked example."""

import os
import re
import subprocess

import pytest

from kvtierd import BIN, ROOT, Daemon

LIB = os.environ.get("KVT_LIB") or os.path.join(ROOT, "build", "release", "lib")
BUILD = os.path.dirname(BIN)
VARIANT = os.environ.get("KVT_VARIANT", "release")


def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as stream:
        return stream.read()


def declared():
    text = re.sub(r"/\*.*?\*/", "", read("client", "kvtier.h"), flags=re.S)
    return sorted(re.findall(r"^KVTIER_API[^;(]*?\b(kvt_\w+)\(", text, re.M))


def symbols(path, *options):
    out = subprocess.run(["nm", "--defined-only", *options, path], capture_output=True, text=True,
                         check=True).stdout
    names = [line.split()[-1].split("@")[0] for line in out.splitlines() if len(line.split()) == 3]
    return sorted(name for name in names if not name.startswith("KVTIER_"))


def test_header_declares_what_the_map_exports():
    exported = re.findall(r"^\s+(kvt_\w+);", read("client", "lib", "libkvtier.map"), re.M)
    assert sorted(exported) == declared() and len(exported) > 20


@pytest.mark.skipif(VARIANT != "release", reason="sanitizers add symbols of their own")
def test_libraries_offer_nothing_else():
    assert symbols(os.path.join(LIB, "libkvtier.so"), "-D") == declared()
    assert symbols(os.path.join(LIB, "libkvtier.a"), "-g") == declared()


@pytest.mark.parametrize("name", declared())
def test_man_page(name):
    page = read("man", f"{name}.3")
    if page.startswith(".so "):
        page = read("man", page.split()[1].removeprefix("man3/"))
    heading = page.split(".SH SYNOPSIS")[0]
    assert re.search(rf"\b{name}\b", heading), f"{name} is not in its page's NAME"
    assert f"{name}(" in page.split(".SH SYNOPSIS")[1].split(".SH DESCRIPTION")[0]


def test_man_pages_name_every_option():
    page = read("man", "kvtierctl.1").replace("\\-", "-")
    text = read("client", "ctl", "main.c") + read("client", "ctl", "plan.c")
    for option in set(re.findall(r"\"(--[a-z-]+)\"", text)) - {"--version"}:
        assert option in page, option


@pytest.mark.parametrize("compiler", [["gcc", "-std=c99", "-xc"], ["g++", "-std=c++11", "-xc++"],
                                      ["clang", "-std=c99", "-xc"]], ids=lambda c: c[0])
def test_header_stands_alone(compiler, tmp_path):
    """C99 and C++, pedantic, and twice."""
    (tmp_path / "kvtier.h").write_text(read("client", "kvtier.h"), encoding="utf-8")
    source = '#include "kvtier.h"\n#include "kvtier.h"\nint code(void);\nint code(void) { return KVT_EGONE; }\n'
    try:
        done = subprocess.run([*compiler, "-Wall", "-Wextra", "-pedantic", "-Werror", "-I", tmp_path,
                               "-c", "-o", tmp_path / "a.o", "-"], input=source, text=True,
                              capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"no {compiler[0]} here")
    assert done.returncode == 0, done.stderr


def test_example():
    with Daemon() as daemon:
        done = subprocess.run([os.path.join(BUILD, "examples", "attach")], capture_output=True,
                              text=True, check=False, timeout=60,
                              env=dict(os.environ, KVTIER_RUNTIME_DIR=daemon.runtime_dir))
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 10
        assert lines[0] == "step 0: each layer attended to 100 tokens"
        assert lines[9] == "step 9: each layer attended to 109 tokens"


def test_example_without_daemon(tmp_path):
    done = subprocess.run([os.path.join(BUILD, "examples", "attach")], capture_output=True, text=True,
                          check=False, timeout=60,
                          env=dict(os.environ, KVTIER_RUNTIME_DIR=str(tmp_path)))
    assert done.returncode == 1 and "is kvtierd running" in done.stderr
