"""Starting and stopping kvtierd, and what it says when it cannot.

test: timeout_s=180
"""

import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time

import pytest

import kvtierd
from kvtierd import (EXIT_FAILED, EXIT_TAKEN, EXIT_USAGE, Daemon, open_folders, program, run_to_end,
                     wait_until)
from rawclient import CONTROL, Client

NOBODY = 65534


def one_line(log, *words):
    """The log has one line of an error, and it has these words."""
    lines = [line for line in log.splitlines() if "error:" in line]
    assert len(lines) == 1, log
    for word in words:
        assert word in lines[0], log


# ---- a whole life


def test_ready_serve_stop():
    with Daemon() as daemon:
        assert daemon.has_line("ready: kvtierd 0.1.0") and daemon.has_line(daemon.runtime_dir)
        with Client(daemon.runtime_dir) as client:
            client.ping(b"hello")
            assert daemon.stop() == 0
            assert client.hung_up()
        assert daemon.has_line("hung up: the daemon stops")
        assert daemon.has_line("SIGTERM: stopping") and daemon.has_line("stopped")
        assert os.listdir(daemon.runtime_dir) == ["lock"]


def test_sigint_stops_and_front_goes_with_it():
    with Daemon() as daemon:
        front = daemon.front_pid()
        assert front
        # A terminal or a service manager signals it, too; it waits for the daemon's end.
        for number in [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]:
            os.kill(front, number)
        time.sleep(0.2)
        assert daemon.front_pid() == front
        daemon.process.send_signal(signal.SIGINT)
        assert daemon._wait(check=True) == 0
        wait_until(lambda: not os.path.exists(f"/proc/{front}"), "the front has ended")


def test_sighup_is_harmless():
    with Daemon() as daemon, Client(daemon.runtime_dir) as client:
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for_line("SIGHUP")
        client.ping()


def test_modes():
    with Daemon() as daemon:
        def mode(path):
            return stat.S_IMODE(os.stat(path).st_mode)
        assert mode(daemon.runtime_dir) == 0o750
        assert mode(daemon.attach_path) == 0o660
        assert mode(daemon.front_path) == 0o660
        assert mode(os.path.join(daemon.runtime_dir, "lock")) == 0o600


def test_service_manager_is_told(tmp_path):
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(20)
        with Daemon(environment=dict(os.environ, NOTIFY_SOCKET=path)) as daemon:
            assert manager.recv(100) == b"READY=1"
            daemon.stop()
            assert manager.recv(100) == b"STOPPING=1"


# ---- the runtime directory


def test_second_daemon_leaves_the_first_unharmed():
    with Daemon() as first, Client(first.runtime_dir) as client:
        client.ping()
        status, log = run_to_end(runtime_dir=first.runtime_dir)
        assert status == EXIT_TAKEN
        one_line(log, first.runtime_dir, "another kvtierd", f"pid {first.pid}")
        client.ping()
        with Client(first.runtime_dir) as newcomer:
            newcomer.ping()


def test_killed_daemon_leaves_stale_sockets_and_restart_works():
    with Daemon() as daemon:
        with Client(daemon.runtime_dir) as client:
            epoch = client.ping().boot_epoch
            front = daemon.front_pid()
            daemon.kill()
            assert client.hung_up()
        assert os.path.exists(daemon.attach_path) and os.path.exists(daemon.front_path)
        wait_until(lambda: not os.path.exists(f"/proc/{front}"), "the front died with it")
        daemon.start()
        with Client(daemon.runtime_dir) as client:
            assert client.ping().boot_epoch != epoch


def test_session_of_a_former_life_is_gone():
    with Daemon() as daemon:
        with Client(daemon.runtime_dir) as client:
            daemon.kill()
            daemon.start()
            message = client.request(10)
            client.send(message)
            reply = client.receive(timeout_s=10)
            assert reply.code == 9 and "attach again" in reply.text


def test_socket_path_too_long(tmp_path):
    long = str(tmp_path / ("d" * 110))
    status, log = run_to_end(runtime_dir=long)
    assert status == EXIT_USAGE
    one_line(log, "runtime_dir", long, "bytes", "107", "choose a shorter directory")


def test_not_a_socket_is_not_removed(tmp_path):
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    (run / "attach.sock").write_text("precious")
    status, log = run_to_end(runtime_dir=str(run))
    assert status == EXIT_USAGE
    one_line(log, "attach.sock", "is not a socket")
    assert (run / "attach.sock").read_text() == "precious"


def test_directory_that_others_may_write(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    run.chmod(0o777)
    status, log = run_to_end(runtime_dir=str(run))
    assert status == EXIT_USAGE
    one_line(log, str(run), "others may write", "0777")


def test_directory_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    status, log = run_to_end(runtime_dir=str(tmp_path / "run"))
    assert status == EXIT_USAGE
    one_line(log, "not a directory")


def test_folder_above_is_missing(tmp_path):
    status, log = run_to_end(runtime_dir=str(tmp_path / "a" / "b"))
    assert status == EXIT_FAILED
    one_line(log, "No such file or directory", "make the folder above it first")


def test_directory_where_none_can_be():
    status, log = run_to_end(runtime_dir="/proc/foo")
    assert status == EXIT_FAILED
    one_line(log, "/proc/foo", "takes no directories", "choose another")
    assert "above" not in log


@pytest.mark.parametrize("text, status, words", [
    ("[daemon]\nlog_level = debug\n", 0, "the configuration is usable"),
    ("[daemon]\nspeed = 9\n", EXIT_USAGE, "standard input:2: [daemon] speed: unknown option")])
def test_configuration_from_standard_input(text, status, words):
    done = subprocess.run([program("kvtierd"), "--config", "-", "--check-config"], input=text,
                          capture_output=True, text=True, check=False)
    assert done.returncode == status and words in done.stdout + done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="root makes a directory that another may not write")
def test_no_permission(tmp_path, monkeypatch):
    copies = tmp_path / "bin"  # the build may lie where another user may not go
    copies.mkdir()
    for name in ("kvtierd", "kvtierd-front"):
        shutil.copy(program(name), copies)
        (copies / name).chmod(0o755)
    open_folders(str(copies))
    monkeypatch.setattr(kvtierd, "BIN", str(copies))
    status, log = run_to_end(runtime_dir=str(tmp_path / "run"), user=NOBODY)
    assert status == EXIT_FAILED
    one_line(log, str(tmp_path / "run"), "Permission denied", "runtime_dir")


# ---- configuration


@pytest.mark.parametrize("config, words", [
    ("[daemon]\nspeed = 9\n", [":2:", "[daemon] speed", "unknown option", "log_level"]),
    ("[disk]\n", [":1:", "[disk]", "unknown section"]),
    ("\n[host]\nbudget = 64 MB\n", [":3:", "[host] budget = 64 MB", "unknown unit", "64KiB to 64TiB"]),
    ("[host]\nbudget = 64\n", [":2:", "no unit"]),
    ("[device a]\ncopy_threads = 0\n", [":2:", "[device a] copy_threads = 0", "outside", "1 to 64"]),
    ("[device a]\ndriver = tpu\n", ["driver = tpu", "cpu, cuda"]),
    ("[daemon]\nadmin_group = no-such-group-anywhere\n", ["admin_group", "no such group"]),
    ("[daemon]\nsocket_group = no-such-group-anywhere\n", ["socket_group", "no such group"]),
])
def test_wrong_configuration(config, words):
    status, log = run_to_end(config=config)
    assert status == EXIT_USAGE
    one_line(log, *words)


def test_half_written_file_applies_nothing():
    whole = "[host]\nbudget = 64MiB\n[device cpu0]\nbudget = 16MiB"
    status, log = run_to_end(config=whole[:-3])
    assert status == EXIT_USAGE
    one_line(log, ":4:", "[device cpu0] budget = 16", "no unit")


def test_two_devices_of_one_identity():
    identity = "uuid = 00112233445566778899aabbccddeeff\n"
    status, log = run_to_end(config=f"[device a]\n{identity}[device b]\n{identity}")
    assert status == EXIT_USAGE
    one_line(log, "[device b]", "same uuid", "[device a]")


def machine_bytes():
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("sets, words", [
    ({"host.budget": "16TiB"}, ["[host] budget = 16TiB", "the machine has", "lower it"]),
    ({"device.cpu0.budget": "16TiB"}, ["[device cpu0] budget = 16TiB", "the machine has"]),
    ({"device.a.budget": "half", "device.b.budget": "half", "host.budget": "64MiB"},
     ["[device b]", "with the budgets before it", "the machine has"]),
])
def test_budget_larger_than_the_machine(sets, words):
    half = f"{machine_bytes() // 2 >> 12 << 12}B"
    status, log = run_to_end(config="",
                             sets={k: half if v == "half" else v for k, v in sets.items()})
    assert status == EXIT_USAGE
    one_line(log, *words)


def test_missing_file():
    run = subprocess.run([program("kvtierd"), "--config", "/nonexistent/k.conf"],
                         capture_output=True, text=True, check=False)
    assert run.returncode == EXIT_USAGE
    one_line(run.stderr, "/nonexistent/k.conf", "No such file")


def test_missing_front():
    status, log = run_to_end(sets={"daemon.front_program": "/nonexistent/front"})
    assert status == EXIT_FAILED
    one_line(log, "/nonexistent/front", "cannot be started", "front_program")


def test_front_that_always_ends():
    status, log = run_to_end(sets={"daemon.front_program": "/bin/false"})
    assert status == EXIT_FAILED
    one_line(log, "/bin/false", "before it was ready")


def test_missing_plugin():
    status, log = run_to_end(config="[device gpu0]\ndriver = cuda\n")
    assert status != 0
    one_line(log, "[device gpu0]", "cuda")


# ---- arguments


def run(*arguments):
    return subprocess.run([program("kvtierd"), *arguments], capture_output=True, text=True,
                          check=False, timeout=60)


@pytest.mark.parametrize("arguments, words", [
    (["--frobnicate"], ["unknown option --frobnicate", "--help"]),
    (["serve"], ["unknown argument serve"]),
    (["--config"], ["a value is missing behind --config"]),
    (["--set", "host.budget"], ["--set host.budget", "section.option=value"]),
    (["--set", "host.budget=many"], ["--set host.budget=many", "begin with a number"]),
    (["--log-level", "loud"], ["log_level = loud", "error, warning, info, debug"]),
])
def test_wrong_arguments(arguments, words):
    result = run(*arguments)
    assert result.returncode == EXIT_USAGE
    one_line(result.stderr, *words)
    assert result.stdout == ""


def test_help_version_print_check(tmp_path):
    assert run("--version").stdout == "kvtierd 0.1.0\n"
    result = run("--help")
    assert result.returncode == 0
    for option in ["--config", "--set", "--print-config", "--check-config", "--version"]:
        assert option in result.stdout
    printed = run("--print-config")
    assert printed.returncode == 0 and "[device cpu0]" in printed.stdout
    path = tmp_path / "k.conf"
    path.write_text(printed.stdout)
    assert run("--config", str(path), "--check-config").returncode == 0
    path.write_text(printed.stdout + "\nnonsense\n")
    assert run("--config", str(path), "--check-config").returncode == EXIT_USAGE


@pytest.mark.parametrize("sets, words", [
    (["host.budget=10TiB"], ["[host] budget = 10TiB", "the machine has"]),
    (["host.budget=64KiB", "host.chunk=64KiB", "device.a.budget=8TiB", "device.b.budget=8TiB"],
     ["[device a] budget = 8TiB", "the machine has"]),
    (["daemon.socket_group=nosuchgroup"], ["socket_group = nosuchgroup", "no such group"]),
    (["daemon.admin_group=nosuchgroup"], ["admin_group = nosuchgroup", "no such group"]),
    ([f"device.a.uuid={'1' * 32}", f"device.b.uuid={'1' * 32}"],
     ["[device b]: has the same uuid as [device a]"]),
    (["device.gpu0.driver=cuda", "daemon.plugin_dir=/nowhere"],
     ["[device gpu0]", "/nowhere/kvtier-cuda.so is not there"]),
    (["daemon.runtime_dir=/nowhere/below"], ["/nowhere/below", "make the folder above it first"]),
    (["daemon.runtime_dir=/etc/passwd"], ["/etc/passwd", "not a directory"]),
    (["daemon.front_program=/nowhere/front"], ["/nowhere/front", "front_program"]),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_check_finds_what_a_start_would(sets, words):
    """What one says the other says, and the check leaves nothing behind."""
    arguments = [word for one in sets for word in ("--set", one)]
    with tempfile.TemporaryDirectory() as folder:
        if not any("runtime_dir" in one for one in sets):
            arguments += ["--runtime-dir", folder + "/run"]
        done = run("--config", "/dev/null", *arguments, "--check-config")
        assert os.listdir(folder) == []
        started = run("--config", "/dev/null", *arguments)
    assert done.returncode == EXIT_USAGE and done.stdout == ""
    one_line(done.stderr, *words)
    assert started.returncode in (EXIT_USAGE, EXIT_FAILED)
    said = done.stderr.split(": ", 1)[1].strip()
    assert said[-60:] in started.stderr, (done.stderr, started.stderr)


def test_check_says_what_it_cannot_see(tmp_path):
    done = run("--config", "/dev/null", "--runtime-dir", str(tmp_path / "run"), "--set",
               "device.gpu0.driver=cuda", "--check-config")
    assert done.returncode == 0, done.stderr
    assert "not checked: [device gpu0]: whether its cuda driver" in done.stdout
    assert not (tmp_path / "run").exists()


def test_output_that_cannot_be_written():
    with open("/dev/full", "w", encoding="ascii") as full:
        result = subprocess.run([program("kvtierd"), "--print-config"], stdout=full,
                                stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == EXIT_FAILED
    one_line(result.stderr, "standard output cannot be written")


def test_front_is_not_for_use_by_hand():
    result = subprocess.run([program("kvtierd-front")], capture_output=True, text=True,
                            check=False, stdin=subprocess.DEVNULL)
    assert result.returncode == 2 and "started by kvtierd" in result.stderr


# ---- stopping while something goes on


def test_attach_while_stopping_is_refused_or_hung_up():
    with Daemon() as daemon:
        clients = [Client(daemon.runtime_dir, role=CONTROL) for _ in range(3)]
        started = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - started < 5
        for client in clients:
            assert client.hung_up()
            client.close()
