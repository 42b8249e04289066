"""What `make install` puts down is complete: a program outside this tree builds against it with
pkg-config, shared and static, and runs; the libraries offer the public names only."""

import os
import re
import subprocess

import pytest

ROOT = os.environ["KVT_SOURCE"]
PREFIX = "/opt/kvtier"
PROGRAM = """
#include <kvtier.h>
#include <stdio.h>

int main(void) {
    puts(kvt_version());
    return 0;
}
"""

pytestmark = [
    pytest.mark.skipif(os.environ["KVT_VARIANT"] != "release", reason="what is shipped is release"),
    pytest.mark.skipif(not os.path.exists(os.environ["KVT_LIB"] + "/libkvtier.so"),
                       reason="client/lib is not built"),
]


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module", name="root")
def installed(tmp_path_factory):
    """An installation under a DESTDIR of its own."""
    destination = tmp_path_factory.mktemp("root")
    env = {key: value for key, value in os.environ.items()
           if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")}
    run(["make", "--no-print-directory", "install", f"DESTDIR={destination}", f"PREFIX={PREFIX}"],
        cwd=ROOT, env=env)
    return destination


def flags(root, *arguments):
    """pkg-config's words, with our own folders (and only those) moved under DESTDIR."""
    env = dict(os.environ, PKG_CONFIG_PATH=f"{root}{PREFIX}/lib/pkgconfig")
    text = run(["pkg-config", *arguments, "kvtier"], env=env)
    return [word.replace(PREFIX, f"{root}{PREFIX}") for word in text.split()]


def test_files(root):
    for path in ("sbin/kvtierd", "sbin/kvtierd-front", "bin/kvtierctl", "bin/kvtier-run",
                 "include/kvtier.h", "lib/libkvtier.a", "lib/libkvtier.so", "lib/pkgconfig/kvtier.pc",
                 "lib/systemd/system/kvtierd.service", "lib/sysusers.d/kvtierd.conf",
                 "lib/tmpfiles.d/kvtierd.conf"):
        assert os.path.exists(f"{root}{PREFIX}/{path}"), path
    with open(f"{root}/etc/kvtierd/kvtierd.conf", encoding="utf-8") as config:
        assert "[host]" in config.read()


def test_unit_has_its_paths(root):
    with open(f"{root}{PREFIX}/lib/systemd/system/kvtierd.service", encoding="utf-8") as unit:
        text = unit.read()
    assert f"ExecStart={PREFIX}/sbin/kvtierd\n" in text
    assert not re.search(r"@[A-Z]+@", text)


def test_shared(root, tmp_path):
    (tmp_path / "p.c").write_text(PROGRAM)
    run(["gcc", "-o", "p", "p.c", *flags(root, "--cflags", "--libs")], cwd=tmp_path)
    said = run(["./p"], cwd=tmp_path, env=dict(os.environ, LD_LIBRARY_PATH=f"{root}{PREFIX}/lib"))
    assert [said.strip()] == flags(root, "--modversion")
    assert "libkvtier.so." in run(["readelf", "-d", "p"], cwd=tmp_path)


def test_static(root, tmp_path):
    """Only our own library is linked statically; the others come as the system has them."""
    (tmp_path / "p.c").write_text(PROGRAM)
    words = ["-l:libkvtier.a" if word == "-lkvtier" else word
             for word in flags(root, "--cflags", "--libs")]
    others = run(["pkg-config", "--libs", "libzmq", "libprotobuf-c", "libxxhash"]).split()
    run(["gcc", "-o", "p", "p.c", *words, *others, "-pthread"], cwd=tmp_path)
    run(["./p"], cwd=tmp_path)
    assert "libkvtier.so." not in run(["readelf", "-d", "p"], cwd=tmp_path)


@pytest.mark.parametrize("library,option", [("libkvtier.so", "-D"), ("libkvtier.a", "-g")])
def test_only_public_names(root, library, option):
    with open(f"{ROOT}/client/kvtier.h", encoding="utf-8") as header:
        public = header.read()
    symbols = run(["nm", option, "--defined-only", f"{root}{PREFIX}/lib/{library}"])
    names = {line.split()[2].split("@")[0] for line in symbols.splitlines()
             if len(line.split()) == 3 and line.split()[1] != "A"}
    declared = set(re.findall(r"^KVTIER_API[^;]*?\b(kvt_\w+)\(", public, re.M))
    assert names == declared
