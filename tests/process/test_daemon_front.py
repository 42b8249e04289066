"""The ZeroMQ side: garbage, floods, exhaustion and death of kvtierd-front cost others a delay at most.

test: timeout_s=240
"""

import os
import signal
import socket
import threading
import time

import pytest
import zmq

from kvtierd import SLOWER, Daemon, wait_until
from rawclient import (CLOSE, CREATE, EGONE, ENOENT, ENOTSUP, EPERM, EPROTO, ETOOBIG, PING, STATUS,
                       STEP, ZMTP_GREETING, ZMTP_READY, Client, data, number, zmtp_connect,
                       zmtp_frame)


@pytest.fixture(scope="module", name="daemon")
def module_daemon():
    with Daemon() as daemon:
        yield daemon


@pytest.fixture(name="client")
def attached(daemon):
    with Client(daemon.runtime_dir) as client:
        yield client


def options(layers=2, name=b"c"):
    layer = number(1, 1) + number(2, 1) + number(3, 64) + number(4, 64) + number(5, 2)
    return data(1, data(1, layer + number(10, layers)) + number(2, 1) + number(4, 1) +
                number(6, 16) + data(10, name))


def raw(daemon):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(5)
    sock.connect(daemon.front_path)
    return sock


class Pinger:
    """A client whose pings go on while something else happens; the longest one is known."""

    def __init__(self, daemon):
        self.client = Client(daemon.runtime_dir)
        self.longest_s = 0.0
        self.count = 0
        self.failure = None
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        try:
            while not self.stop.is_set():
                started = time.monotonic()
                self.client.ask_patiently(PING, data(1, b"p"), timeout_s=10 * SLOWER)
                self.longest_s = max(self.longest_s, time.monotonic() - started)
                self.count += 1
        except Exception as failure:  # told by the test's own thread
            self.failure = failure

    def __enter__(self):
        wait_until(lambda: self.count > 3 or self.failure, "the first pings")
        return self

    def __exit__(self, kind, value, traceback):
        self.stop.set()
        self.thread.join()
        self.client.close()
        if kind is None and self.failure:
            raise self.failure


# ---- who asks


def test_token_and_session(client):
    assert client.ask(PING, token=bytes(16)).code == EPERM
    assert client.ask(PING, token=b"").code == EPERM
    assert client.ask(PING, token=client.welcome.token[:15]).code == EPERM
    assert client.ask(PING, token=client.welcome.token + b"x").code == EPERM
    wrong = bytearray(client.welcome.token)
    wrong[15] ^= 1
    assert client.ask(PING, token=bytes(wrong)).code == EPERM
    for session in [0, client.welcome.session + 1000, 2**32 - 1]:
        assert client.ask(PING, session=session).code == EGONE
    client.ping()


def test_token_of_another_session(daemon, client):
    with Client(daemon.runtime_dir) as other:
        assert client.ask(PING, token=other.welcome.token).code == EPERM
        assert client.ask(PING, session=other.welcome.session).code == EPERM


def test_every_reply_carries_the_boot_epoch(client):
    for reply in [client.ping(), client.ask(CLOSE, number(1, 7)), client.ask(PING, session=999999),
                  client.ask(STATUS, number(1, 1))]:
        assert reply.boot_epoch == client.welcome.boot_epoch


# ---- messages that are none


@pytest.mark.parametrize("message", [b"\x00", b"\xff" * 10, b"\x08", os.urandom(1000), b"\x52\x7f"])
def test_no_message(client, message):
    client.send(message)
    reply = client.receive()
    assert reply.code in (EPROTO, EGONE)
    client.ping()


def test_unknown_body(client):
    reply = client.ask(99)
    assert reply.code == ENOTSUP and "no body" in reply.text


def test_a_bomb_is_bounded(client):
    client.send(client.request(CREATE, data(1, b"\x0a\x00" * 32000)))
    reply = client.receive()
    assert reply.code == ETOOBIG and "1 MiB" in reply.text
    client.ping()


def test_empty_message_is_dropped(client):
    client.send(b"")
    client.ping()


def test_largest_message(client):
    room = 65536 - len(client.request(PING, data(1, b"x" * 65000))) + 65000
    payload = os.urandom(room)
    message = client.request(PING, data(1, payload))
    assert len(message) == 65536
    client.send(message)
    reply = client.receive()
    # It comes back with what a reply has to have, which is less than what a request has.
    assert reply.code == 0 and reply.body[PING][1] == [payload]


def test_too_large_a_message_ends_the_connection(daemon, client):
    with Client(daemon.runtime_dir) as other:
        other.send(bytes(65537))
        assert not other.dealer.poll(300)
        client.ping()
        other.connect()
        other.ping()


def test_multipart_is_dropped_and_the_peer_not_read_any_more(daemon, client):
    with Client(daemon.runtime_dir) as other:
        other.ping()
        other.dealer.send_multipart([other.request(PING), b"more"])
        other.dealer.send(other.request(PING))
        assert not other.dealer.poll(300)
        client.ping()
        other.connect()  # a new connection is a new peer
        other.ping()
    daemon.wait_for_line("messages dropped")


def test_a_req_socket_is_told_nothing(daemon, client):
    context = zmq.Context()
    req = context.socket(zmq.REQ)
    req.setsockopt(zmq.LINGER, 0)
    req.connect(client.welcome.endpoint)
    req.send(client.request(PING))  # an empty frame comes first: not one frame
    assert not req.poll(300)
    context.destroy(0)
    client.ping()


def test_chosen_identity_is_not_served(daemon, client):
    """A peer cannot take another's name: only identities that the ROUTER gave are known."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.ROUTING_ID, b"somebody")
    dealer.connect(client.welcome.endpoint)
    dealer.send(client.request(CREATE, options()))
    assert not dealer.poll(300)
    context.destroy(0)
    client.ping()
    assert 5 not in client.ask(STATUS, number(3, 1)).body[STATUS]  # nor was it carried out


# ---- nothing is done twice


def test_a_repeat_gets_the_stored_reply(client):
    message = client.request(CREATE, options())
    client.send(message)
    first = client.receive()
    assert first.code == 0, first.text
    client.send(message)
    assert client.receive().bytes == first.bytes
    client.connect()  # as after a death of the front: another identity
    client.send(message)
    assert client.receive().bytes == first.bytes
    listed = client.ask(STATUS, number(3, 1)).body[STATUS].get(5, [])
    assert len(listed) == 1
    assert client.ask(CREATE, options(), sequence=client.sequence + 1).code == 0
    client.sequence += 1


def test_old_sequences_are_refused(client):
    first = client.sequence + 1
    for _ in range(20):
        assert client.ask(CLOSE, number(1, 7)).code == ENOENT
    reply = client.ask(CLOSE, number(1, 7), sequence=first)
    assert reply.code == EPROTO and "sequence" in reply.text


def test_wrong_requests_say_what_is_accepted(client):
    reply = client.ask(STEP, number(1, 1) + number(4, 1000))
    assert reply.code == 1 and "steps is 1000; accepted is 1 to 64" in reply.text


# ---- garbage on the socket itself


def test_garbage_on_the_front_socket_while_others_ping(daemon):
    front = daemon.front_pid()
    with Pinger(daemon) as pinger:
        for seed in range(200):
            sock = raw(daemon)
            try:
                sock.sendall(os.urandom(1 + seed * 7))
            except OSError:
                pass
            sock.close()
        for tail in [ZMTP_READY, b"\xff" * 100, b"\x02" + b"\xff" * 8 + b"x" * 1000,
                     b"\x03" + b"\x7f" * 8, ZMTP_READY + b"\x02" + b"\xff" * 8 + b"x" * 1000,
                     ZMTP_READY + zmtp_frame(bytes(65536), more=True) * 3]:
            sock = raw(daemon)
            try:
                sock.sendall(ZMTP_GREETING + tail)
                time.sleep(0.02)
            except OSError:
                pass
            sock.close()
    assert pinger.count > 10
    assert daemon.front_pid() == front, daemon.log()


# ---- death and exhaustion


def test_front_killed_and_pings_go_on_within_two_seconds():
    with Daemon() as daemon, Pinger(daemon) as pinger:
        for _ in range(3):
            front = daemon.front_pid()
            os.kill(front, signal.SIGKILL)
            count = pinger.count
            wait_until(lambda c=count: pinger.count > c + 2, "pings go on", timeout_s=2)
            assert daemon.front_pid() != front
        assert pinger.longest_s < 2 * SLOWER


def test_front_killed_with_a_request_under_way():
    with Daemon() as daemon, Client(daemon.runtime_dir) as client:
        assert client.ask(CREATE, options(name=b"first")).code == 0
        for i in range(5):
            os.kill(daemon.front_pid(), signal.SIGKILL)
            reply = client.ask_patiently(CREATE, options(name=b"again%d" % i))
            assert reply.code == 0, reply.text
        listed = client.ask(STATUS, number(3, 1)).body[STATUS][5]
        assert len(listed) == 6


def test_front_stopped_does_not_stop_the_daemon():
    with Daemon() as daemon, Client(daemon.runtime_dir) as client:
        front = daemon.front_pid()
        os.kill(front, signal.SIGSTOP)
        with Client(daemon.runtime_dir) as other:  # attaching needs no front
            assert other.welcome.session
        os.kill(front, signal.SIGCONT)
        client.ping()


def test_endless_multipart_message_costs_a_restart_only():
    with Daemon(sets={"daemon.front_memory": "64MiB"}) as daemon, Pinger(daemon) as pinger:
        flood = zmtp_connect(daemon.front_path)
        frame = zmtp_frame(bytes(60000), more=True)
        try:
            for _ in range(100000):
                flood.sendall(frame)
        except OSError:
            pass  # the front has ended
        flood.close()
        daemon.wait_for_line("of memory in use")
        count = pinger.count
        wait_until(lambda: pinger.count > count + 2, "pings go on", timeout_s=3)


def test_connections_without_end_do_not_harm_the_daemon():
    """More connections than the front has descriptors for. It stops accepting in time, or is
    started again; either way those who behave go on."""
    with Daemon(fds=128) as daemon, Pinger(daemon) as pinger:
        silent = []
        for _ in range(150):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(1)
            try:
                sock.connect(daemon.front_path)
                silent.append(sock)
            except OSError:
                sock.close()
        count = pinger.count
        time.sleep(0.5)
        for sock in silent:
            sock.close()
        wait_until(lambda: pinger.count > count + 5, "pings go on", timeout_s=8)
        assert not daemon.ended()
        with Client(daemon.runtime_dir) as client:
            client.ask_patiently(PING, timeout_s=8)


def test_front_stops_accepting_before_descriptors_run_out():
    with Daemon(fds=1024) as daemon, Pinger(daemon) as pinger:
        front = daemon.front_pid()
        idle = []  # they have shaken hands: a silent one would be closed after a while
        for _ in range(600):
            if daemon.has_line("new connections wait"):
                break
            try:
                idle.append(zmtp_connect(daemon.front_path))
            except OSError:
                break  # not accepted any more, or no answer in time
        daemon.wait_for_line("new connections wait")
        count = pinger.count
        wait_until(lambda: pinger.count > count + 2, "those who are connected go on")
        for sock in idle:
            sock.close()
        daemon.wait_for_line("accepting again")
        with Client(daemon.runtime_dir) as client:
            client.ping()
        assert daemon.front_pid() == front
