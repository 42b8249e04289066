"""The attach socket: who comes and goes, and what bad packets do to others (nothing).

test: timeout_s=180
"""

import fcntl
import mmap
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import time

import pytest

from kvtierd import Daemon, wait_until
from rawclient import (ATTACH_MAGIC, CLOSE, CONTROL, CREATE, DENSE, EBUSY, EGONE, EINVAL, ENOENT,
                       ENOTSUP, EPERM, EVERSION, RECLAIMED, RECLAIM_FORMAT, STATUS, Client,
                       Refused, data, fields_of, hello, number)

F_GET_SEALS = 1034
SEAL_SEAL, SEAL_SHRINK, SEAL_GROW, SEAL_FUTURE_WRITE = 1, 2, 4, 16


@pytest.fixture(scope="module", name="daemon")
def module_daemon():
    with Daemon() as daemon:
        yield daemon


def connect(daemon):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(5)
    sock.connect(daemon.attach_path)
    return sock


def workers(client):
    """{session: Worker} as STATUS lists them."""
    reply = client.ask(STATUS, number(2, 1))
    assert reply.code == 0
    listed = [fields_of(raw) for raw in reply.body[STATUS].get(4, [])]
    return {worker[1][0]: worker for worker in listed}


# ---- HELLO


def test_welcome(daemon):
    with Client(daemon.runtime_dir, kind=DENSE, name=b"dense worker") as client:
        welcome = client.welcome
        assert (welcome.major, welcome.minor) == (1, 0)
        assert welcome.version == "0.1.0" and welcome.device_name == "cpu0"
        assert welcome.block_tokens == 256 and welcome.page_bytes == 12288
        assert welcome.extent_kind == 1 and welcome.device != bytes(16)
        assert welcome.endpoint == f"ipc://{daemon.front_path}"
        assert len(welcome.fds) == 2 and welcome.token != bytes(16)
        with Client(daemon.runtime_dir, device=welcome.device) as other:
            assert other.welcome.session != welcome.session
            assert other.welcome.token != welcome.token
            assert other.welcome.boot_epoch == welcome.boot_epoch


def test_control_gets_no_memory(daemon):
    with Client(daemon.runtime_dir, role=CONTROL) as client:
        assert client.welcome.fds == [] and client.welcome.ring_bytes == 0
        client.ping()
        reply = client.ask(CLOSE, number(1, 1))
        assert reply.code == EPERM and "role control" in reply.text


@pytest.mark.parametrize("major, minor", [(2, 0), (0, 9), (4294967295, 7)])
def test_version_skew_names_both(daemon, major, minor):
    with pytest.raises(Refused) as refusal:
        Client(daemon.runtime_dir, major=major, minor=minor)
    assert refusal.value.code == EVERSION
    assert (refusal.value.major, refusal.value.minor) == (1, 0)
    assert f"speaks protocol 1.0, the client speaks {major}.{minor}" in refusal.value.text


def test_later_minor_version_is_welcome(daemon):
    with Client(daemon.runtime_dir, minor=99, features=2**64 - 1) as client:
        assert client.welcome.minor == 0 and client.welcome.features == 2  # keeps addresses


@pytest.mark.parametrize("options, code, words", [
    ({"role": 9}, EINVAL, "role is 9"),
    ({"kind": 7}, EINVAL, "worker_kind is 7"),
    ({"extent_kind": 2}, ENOTSUP, "kind 2"),
    ({"extent_kind": 5}, EINVAL, "extent_kind is 5"),
    ({"device": b"x" * 16}, ENOENT, "no device of this daemon"),
    ({"name": b"n" * 64}, EINVAL, "no closing NUL"),
])
def test_refusals(daemon, options, code, words):
    with pytest.raises(Refused) as refusal:
        Client(daemon.runtime_dir, **options)
    assert refusal.value.code == code and words in refusal.value.text


def test_two_devices_are_named_by_identity():
    with Daemon(config="[host]\nbudget=64MiB\nchunk=1MiB\n[device a]\nbudget=4MiB\n"
                       "[device b]\nbudget=4MiB\nuuid=00112233-4455-6677-8899-aabbccddeeff\n") as two:
        identity = bytes.fromhex("00112233445566778899aabbccddeeff")
        with Client(two.runtime_dir) as a, Client(two.runtime_dir, device=identity) as b:
            assert a.welcome.device_name == "a" and b.welcome.device_name == "b"
            assert b.welcome.device == identity
            assert workers(a)[b.welcome.session][6] == [b"b"]


# ---- what is shared


def seals(fd):
    return fcntl.fcntl(fd, F_GET_SEALS)


def test_page_and_ring(daemon):
    with Client(daemon.runtime_dir) as client:
        page, ring = client.welcome.fds
        for fd in page, ring:
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
            assert seals(fd) & (SEAL_SEAL | SEAL_SHRINK | SEAL_GROW) == 7
        assert os.fstat(ring).st_size == client.welcome.ring_bytes
        with mmap.mmap(page, client.welcome.page_bytes) as memory:
            assert memory[:4] == b"KVTP"
            assert struct.unpack_from("<QI", memory, 16) == (client.welcome.boot_epoch,
                                                             client.welcome.session)
        with mmap.mmap(ring, client.welcome.ring_bytes, prot=mmap.PROT_READ):
            pass
        # Neither as it is nor opened again may it be written: even for the daemon's own user.
        assert seals(ring) & SEAL_FUTURE_WRITE
        with pytest.raises(PermissionError):
            mmap.mmap(ring, client.welcome.ring_bytes)
        again = os.open(f"/proc/self/fd/{ring}", os.O_RDWR)
        try:
            with pytest.raises(PermissionError):
                mmap.mmap(again, client.welcome.ring_bytes)
            with pytest.raises(PermissionError):
                os.write(again, b"x")
        finally:
            os.close(again)


# ---- going


def test_hang_up_frees_the_session(daemon):
    with Client(daemon.runtime_dir, role=CONTROL) as control:
        with Client(daemon.runtime_dir) as client:
            session = client.welcome.session
            assert session in workers(control)
        wait_until(lambda: session not in workers(control), "the session is gone")
        control.send(control.request(10, session=session))
        assert control.receive().code == EGONE


def start_worker(daemon, then="time.sleep(1000)"):
    """A process that attaches, says its session and waits."""
    code = ("import sys, time, os\nfrom rawclient import *\n"
            f"c = Client({daemon.runtime_dir!r})\nprint(c.welcome.session, flush=True)\n{then}\n")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("number_of_signal", [signal.SIGKILL, signal.SIGTERM])
def test_death_is_noticed_within_a_second(daemon, number_of_signal):
    process, session = start_worker(daemon)
    with Client(daemon.runtime_dir, role=CONTROL) as control:
        assert session in workers(control)
        process.send_signal(number_of_signal)
        process.wait()
        process.stdout.close()
        wait_until(lambda: session not in workers(control), "its session is gone", timeout_s=1)


def test_stopped_worker_is_shown_and_others_go_on(daemon):
    process, session = start_worker(daemon)
    try:
        process.send_signal(signal.SIGSTOP)
        with Client(daemon.runtime_dir) as client:
            for _ in range(20):
                client.ping()
            assert session in workers(client)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_process_without_socket_is_no_worker(daemon):
    """The socket is closed, the process lives: the session ends, and nothing is left."""
    process, session = start_worker(daemon, "c.close()\nprint('closed', flush=True)\n"
                                            "time.sleep(1000)")
    try:
        assert process.stdout.readline() == "closed\n"
        with Client(daemon.runtime_dir, role=CONTROL) as control:
            wait_until(lambda: session not in workers(control), "its session is gone")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_attach_and_detach_leave_nothing(daemon):
    with Client(daemon.runtime_dir, role=CONTROL) as control:
        wait_until(lambda: not workers(control), "former workers are gone")
        before = daemon.fds_used()
        for _ in range(300):
            with Client(daemon.runtime_dir):
                pass
        wait_until(lambda: not workers(control), "they are all gone")
        assert daemon.fds_used() <= before + 2


# ---- garbage


def garbage_packets():
    good = hello()
    yield b"\x00"
    yield b"\xff" * 24
    yield b"\xff" * 2000
    yield good[:127]
    yield good + b"x"
    yield bytes(128)
    yield struct.pack(RECLAIM_FORMAT, ATTACH_MAGIC, RECLAIMED, 24, 0, 1, 1)
    for at in range(0, 48, 3):
        yield good[:at] + b"\xa5" + good[at + 1:]


def test_garbage_before_hello_ends_that_connection_only(daemon):
    with Client(daemon.runtime_dir) as client:
        for packet in garbage_packets():
            sock = connect(daemon)
            sock.send(packet)
            client.ping()
            while True:  # a REFUSE, or a WELCOME for what happened to be right; then the end
                sock.settimeout(0.2)
                try:
                    if not sock.recv(2048):
                        break
                except TimeoutError:
                    break
            sock.close()


def test_garbage_after_hello_ends_that_session_only(daemon):
    with Client(daemon.runtime_dir) as bystander:
        for packet in [b"x", bytes(24), hello(), b"\xff" * 1500]:
            with Client(daemon.runtime_dir) as client:
                client.socket.send(packet)
                assert client.hung_up()
                bystander.ping()
        daemon.wait_for_line("malformed")


def test_lies_about_extents_are_ignored(daemon):
    with Client(daemon.runtime_dir) as client, Client(daemon.runtime_dir) as other:
        for session in [client.welcome.session, other.welcome.session, 0, 77, 2**32 - 1]:
            for extent in [0, 1, 65536, 65537, 2**32 - 1]:
                client.socket.send(struct.pack(RECLAIM_FORMAT, ATTACH_MAGIC, RECLAIMED, 24, 0,
                                               session, extent))
        client.ping()
        other.ping()


def test_a_control_session_has_nothing_to_say(daemon):
    with Client(daemon.runtime_dir, role=CONTROL) as client:
        client.socket.send(struct.pack(RECLAIM_FORMAT, ATTACH_MAGIC, RECLAIMED, 24, 0, 1, 1))
        assert client.hung_up()


def test_descriptors_sent_to_the_daemon_are_not_kept(daemon):
    before = daemon.fds_used()
    with Client(daemon.runtime_dir) as client:
        for _ in range(20):
            sock = connect(daemon)
            socket.send_fds(sock, [b"x"], [0, 1, 2])
            sock.close()
        client.ping()
    wait_until(lambda: daemon.fds_used() <= before + 2, "no descriptor is left")


def test_silent_connections_make_room(daemon):
    silent = [connect(daemon) for _ in range(100)]
    with Client(daemon.runtime_dir) as client:
        client.ping()
    for sock in silent:
        sock.close()


def test_silence_is_ended(daemon):
    sock = connect(daemon)
    started = time.monotonic()
    assert sock.recv(100) == b""
    assert time.monotonic() - started < 4
    sock.close()


# ---- limits


def test_sessions_max():
    with Daemon(sets={"daemon.sessions_max": 2}) as daemon:
        with Client(daemon.runtime_dir) as first, Client(daemon.runtime_dir):
            with pytest.raises(Refused) as refusal:
                Client(daemon.runtime_dir)
            assert refusal.value.code == EBUSY
            assert "2 workers" in refusal.value.text and "sessions_max" in refusal.value.text
            with Client(daemon.runtime_dir, role=CONTROL) as control:  # these have their own room
                control.ping()
            first.ping()

        def may_attach():
            try:
                with Client(daemon.runtime_dir) as later:
                    later.ping()
                return True
            except Refused:  # those that left are not forgotten yet
                return False
        wait_until(may_attach, "there is room again", 5)


def test_fd_exhaustion_refuses_newcomers_and_harms_nobody():
    with Daemon(fds=128, sets={"daemon.sessions_max": 200}) as daemon:
        with Client(daemon.runtime_dir) as first:
            clients = []
            refusal = None
            try:
                for _ in range(200):
                    clients.append(Client(daemon.runtime_dir))
                    clients[-1].ping()
            except Refused as refused:
                refusal = refused
            assert refusal is not None and refusal.code == EBUSY
            assert "file descriptors" in refusal.text and "LimitNOFILE" in refusal.text
            assert len(clients) > 5
            for client in [first, *clients]:
                client.ping()
            reply = first.ask(CREATE, data(1, data(1, number(1, 1) + number(2, 1) + number(3, 64) +
                                                   number(4, 64) + number(5, 2)) + number(2, 1) +
                                           number(4, 1) + number(6, 16)))
            assert reply.code == 0, reply.text
            for client in clients:
                client.close()
            wait_until(lambda: daemon.fds_used() < 50, "their descriptors are free again")
            with Client(daemon.runtime_dir) as later:
                later.ping()
