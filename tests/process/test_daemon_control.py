"""STATUS, PLAN, EVICT: what they say, and to whom.

test: timeout_s=180
"""

import grp
import os
import signal
import socket
import subprocess
import sys

import pytest

from kvtierd import Daemon, wait_until
from rawclient import (CONTROL, CREATE, EEVICTED, ENOENT, EQUOTA, EVICT, PING, PLAN,
                       STATUS, STEP, Client, data, fields_of, number)

OTHER_USER = 65534


@pytest.fixture(scope="module", name="daemon")
def module_daemon():
    with Daemon() as daemon:
        yield daemon


def layers(count, heads=1, dim=64):
    return data(1, number(1, 1) + number(2, heads) + number(3, dim) + number(4, dim) +
                number(5, 2) + number(10, count))


def create(client, count=2, name=b"cache", rows=1):
    reply = client.ask(CREATE, data(1, layers(count) + number(2, 1) + number(4, rows) +
                                    number(6, 512) + data(10, name)))
    assert reply.code == 0, reply.text
    return reply.body[CREATE][1][0]


def step(client, cache, tokens):
    reply = client.ask(STEP, number(1, cache) + number(3, tokens) + number(4, 1))
    assert reply.code == 0, reply.text
    return reply.body[STEP]


def status(client, devices=0, workers=0, caches=0, offset=0):
    reply = client.ask(STATUS, number(1, devices) + number(2, workers) + number(3, caches) +
                       number(4, offset))
    assert reply.code == 0, reply.text
    assert len(reply.bytes) <= 65536
    return reply.body[STATUS]


def listed(body, field):
    return [fields_of(raw) for raw in body.get(field, [])]


# ---- STATUS


def test_tiers(daemon):
    with Client(daemon.runtime_dir, role=CONTROL) as control:
        tiers = listed(status(control, devices=1), 3)
        assert [tier[1][0] for tier in tiers] == [b"cpu0", b"host"]
        assert [tier[2][0] for tier in tiers] == [16 << 20, 64 << 20]


def test_workers_and_caches(daemon):
    with Client(daemon.runtime_dir, name=b"alpha") as worker, \
            Client(daemon.runtime_dir, role=CONTROL) as control:
        cache = create(worker, 3, b"chat")
        step(worker, cache, 10)
        body = status(control, workers=1, caches=1)
        mine = [w for w in listed(body, 4) if w[1][0] == worker.welcome.session][0]
        assert mine[2] == [b"alpha"] and mine[4] == [os.getpid()] and mine[6] == [b"cpu0"]
        assert mine[7] == [b"step"] and mine[10] == [1] and mine[8][0] > 0
        seen = [c for c in listed(body, 5) if c[1][0] == cache][0]
        assert seen[3] == [b"chat"] and seen[10] == [b"RRR"]
        assert 4 not in status(control, caches=1) and 5 not in status(control, workers=1)


def test_long_lists_come_in_parts(daemon):
    with Client(daemon.runtime_dir) as worker, Client(daemon.runtime_dir, role=CONTROL) as control:
        made = {create(worker, 1000, b"n%04d" % i + b"x" * 50) for i in range(150)}
        found, offset, parts = [], 0, 0
        while True:
            body = status(control, workers=1, caches=1, offset=offset)
            found += [c[1][0] for c in listed(body, 5) if c[2][0] == worker.welcome.session]
            parts += 1
            offset = body.get(6, [0])[0]
            if not offset:
                break
        assert parts > 2
        assert len(found) == len(set(found)) == 150 and set(found) == made
        past = status(control, workers=1, caches=1, offset=100000)
        assert 4 not in past and 5 not in past and 6 not in past


# ---- PLAN


def test_plan(daemon):
    with Client(daemon.runtime_dir, role=CONTROL) as control:
        options = layers(8, heads=8) + number(2, 1) + number(4, 1) + number(6, 1)
        small = control.ask(PLAN, data(1, options) + number(2, 256) + number(3, 1))
        assert small.code == 0, small.text
        assert small.body[PLAN][11] == [b"RRRRRRRR"]
        large = control.ask(PLAN, data(1, options) + number(2, 2048) + number(3, 1))
        assert large.code == 0, large.text
        assert b"S" in large.body[PLAN][11][0] and large.body[PLAN][6][0] > 0
        vast = control.ask(PLAN, data(1, options) + number(2, 1 << 20) + number(3, 1))
        assert vast.code == EQUOTA and "budget" in vast.text and not vast.body
        # 2 KiB a token in each of 8 layers on the host, in numbers as in words
        assert vast.shortage == {1: [b"host"], 2: [16 << 30], 3: [64 << 20], 4: [64 << 20]}
        assert small.shortage is None and control.ask(PLAN, number(2, 1)).shortage is None
        assert control.ask(PLAN, number(2, 1)).code == 1
        nowhere = control.ask(PLAN, data(1, options) + number(4, 7))
        assert nowhere.code == 1 and nowhere.text == "plan: device is 7; the daemon has 1, from 0 on"
        nothing = control.ask(PLAN, data(1, options))
        assert nothing.code == 1 and nothing.text == "plan: tokens are 0; accepted is 1 to 2147483392"
        assert control.ask(PLAN, number(6, 4242)).code == ENOENT


def test_plan_lacks_what_a_worker_may_not_have():
    with Daemon(sets={"device.cpu0.worker_max": "8MiB"}) as limited, \
            Client(limited.runtime_dir, role=CONTROL) as control:
        options = layers(8, heads=8) + number(2, 2) + number(4, 1) + number(5, 2048) + number(6, 1)
        reply = control.ask(PLAN, data(1, options) + number(2, 2048) + number(3, 1))
        assert reply.code == EQUOTA and "[device cpu0] worker_max" in reply.text
        need = reply.shortage.pop(2)[0]
        assert need >= 8 * 2048 * 2048 and f"{need} bytes" in reply.text
        assert reply.shortage == {1: [b"cpu0"], 3: [8 << 20], 4: [16 << 20], 5: [8 << 20]}
        # a size that was asked for is nobody's limit
        asked = control.ask(PLAN, data(1, options) + number(2, 2048) + number(3, 1) + number(5, 8 << 20))
        assert asked.shortage[3] == [8 << 20] and 5 not in asked.shortage


def test_plan_of_a_running_cache(daemon):
    with Client(daemon.runtime_dir) as worker:
        cache = create(worker, 3)
        reply = worker.ask(PLAN, number(6, cache))
        assert reply.code == 0 and reply.body[PLAN][11] == [b"RRR"], reply.text


# ---- EVICT


def test_evict_asks_for_the_memory_and_gets_it(daemon):
    with Client(daemon.runtime_dir) as worker, Client(daemon.runtime_dir, role=CONTROL) as control:
        cache = create(worker)
        first_step = step(worker, cache, 100)[2][0]

        def pinned():
            mine = [w for w in listed(status(control, workers=1), 4)
                    if w[1][0] == worker.welcome.session]
            return mine[0].get(8, [0])[0]

        session = worker.welcome.session
        sent, asked = worker.take_extents()
        mapped = sent - asked
        assert mapped and {owner for owner, _ in mapped} == {session}
        reply = control.ask(EVICT, number(1, session))
        assert reply.code == 0, reply.text
        assert worker.ask(STEP, number(1, cache) + number(3, 1) + number(4, 1)).code == EEVICTED
        worker.post_step(first_step)
        _, asked = worker.take_extents(answer=False)
        assert asked == mapped
        assert pinned() > 0
        for _, extent in asked:
            worker.reclaimed(extent)
        wait_until(lambda: pinned() == 0, "its device memory is free")


def test_who_attaches_again_is_asked_for_what_it_still_maps(daemon):
    """The socket is closed without a word, the process lives: its memory stays charged until it
    says, over the socket of a later session, that it does not map it any more."""
    with Client(daemon.runtime_dir, role=CONTROL) as control:
        first = Client(daemon.runtime_dir)
        step(first, create(first), 100)
        session = first.welcome.session
        sent, asked = first.take_extents()
        mapped = sent - asked
        first.close(give_back=False)

        def orphan():
            return [w for w in listed(status(control, workers=1), 4) if w[1][0] == session]
        wait_until(lambda: orphan() and orphan()[0][7] == [b"reclaiming"], "it is an orphan")
        assert orphan()[0][8][0] > 0
        process, _ = attached_process(daemon)  # somebody else's word does not count
        end(process)
        with Client(daemon.runtime_dir) as second:
            _, asked = second.take_extents(answer=False)
            assert mapped and asked == mapped
            for _, extent in mapped:
                assert orphan()
                second.reclaimed(extent, session)
            wait_until(lambda: not orphan(), "the former session is gone")


def test_who_gives_back_unasked_is_not_asked():
    """RECLAIMED while the extents are in use frees nothing yet, and is not lost: when they are not needed
    any more they are free, though the process has no more to say about them."""
    with Daemon() as daemon, Client(daemon.runtime_dir) as worker, \
            Client(daemon.runtime_dir, role=CONTROL) as control:
        def used():
            return listed(status(control, devices=1), 3)[0].get(3, [0])[0]
        cache = create(worker)
        step(worker, cache, 100)
        sent, asked = worker.take_extents()
        assert sent - asked
        for _ in range(2):  # the second time it has none
            for session, extent in sent - asked:
                worker.reclaimed(extent, session)
        worker.ping()
        assert used() > 0
        assert control.ask(EVICT, number(1, worker.welcome.session)).code == 0
        worker.post_step(1)
        wait_until(lambda: used() == 0, "its memory is free")
        assert worker.take_extents()[1] == set()


def attached_process(daemon, user=None):
    code = ("import sys, time\nfrom rawclient import *\n"
            f"c = Client({daemon.runtime_dir!r})\n"
            "layer = number(1, 1) + number(2, 1) + number(3, 64) + number(4, 64) + number(5, 2)\n"
            "r = c.ask(CREATE, data(1, data(1, layer) + number(2, 1) + number(4, 1) +\n"
            "                       number(6, 512)))\n"
            "assert r.code == 0, r.text\n"
            "r = c.ask(STEP, number(1, r.body[CREATE][1][0]) + number(3, 9) + number(4, 1))\n"
            "print(c.welcome.session, flush=True)\ntime.sleep(1000)\n")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                               user=user, extra_groups=None if user is None else [])
    return process, int(process.stdout.readline())


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()


def test_evict_a_stopped_worker_and_kill_it(daemon):
    process, session = attached_process(daemon)
    try:
        process.send_signal(signal.SIGSTOP)
        with Client(daemon.runtime_dir, role=CONTROL) as control:
            reply = control.ask(EVICT, number(1, session))
            assert reply.code == 0 and reply.body[EVICT][3][0] > 0  # it still pins this
            tier = listed(status(control, devices=1), 3)[0]
            assert tier[4][0] > 0
            assert process.poll() is None
            reply = control.ask(EVICT, number(1, session) + number(2, 1))
            assert reply.code == 0, reply.text
            assert process.wait(timeout=5) == -signal.SIGKILL
            wait_until(lambda: 4 not in listed(status(control, devices=1), 3)[0],
                       "nothing is pinned any more")
            assert control.ask(EVICT, number(1, session)).code == ENOENT
    finally:
        end(process)


def test_evict_of_nobody(daemon):
    with Client(daemon.runtime_dir, role=CONTROL) as control:
        for session in [0, 4242, control.welcome.session]:
            reply = control.ask(EVICT, number(1, session))
            assert reply.code == ENOENT and f"session {session}" in reply.text


def test_a_worker_may_evict_itself(daemon):
    with Client(daemon.runtime_dir) as worker:
        create(worker)
        assert worker.ask(EVICT, number(1, worker.welcome.session)).code == 0


# ---- who may


def as_other_user(groups, function):
    """What the function returns (text) in a child process of another user."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        text = "nothing"
        try:
            os.setgroups(groups)
            os.setgid(groups[0])
            os.setuid(OTHER_USER)
            text = str(function())
        except BaseException as failure:  # told by the parent
            text = repr(failure)
        finally:
            os.write(writer, text.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return text


def look_around(daemon, session, cache):
    with Client(daemon.runtime_dir, role=CONTROL) as control:
        body = status(control, devices=1, workers=1, caches=1)
        evicted = control.ask(EVICT, number(1, session) + number(2, 1))
        planned = control.ask(PLAN, number(6, cache))
        return len(body.get(4, [])), len(body.get(5, [])), planned.code, evicted.code


@pytest.mark.skipif(os.geteuid() != 0, reason="root may be somebody else")
@pytest.mark.parametrize("groups, admin", [([65534], False), ([65534, 100], True),
                                           ([100, 65534], True)])
def test_others_see_and_evict_their_own_only(groups, admin):
    sets = {"daemon.socket_group": grp.getgrgid(65534).gr_name,
            "daemon.admin_group": grp.getgrgid(100).gr_name}
    with Daemon(sets=sets) as daemon:
        daemon.open_to_others()
        with Client(daemon.runtime_dir) as worker:
            cache = create(worker)
            process, session = attached_process(daemon)
            try:
                said = as_other_user(groups, lambda: look_around(daemon, session, cache))
                assert said == ("(2, 2, 0, 0)" if admin else f"(0, 0, {ENOENT}, {ENOENT})")
                if not admin:
                    assert process.poll() is None
            finally:
                end(process)
            worker.ping()


@pytest.mark.skipif(os.geteuid() != 0, reason="root may be somebody else")
def test_another_user_gets_nothing():
    with Daemon() as daemon:
        daemon.open_to_others()
        for path, kind in [(daemon.attach_path, socket.SOCK_SEQPACKET),
                           (daemon.front_path, socket.SOCK_STREAM)]:
            def connect(path=path, kind=kind):
                with socket.socket(socket.AF_UNIX, kind) as sock:
                    sock.connect(path)
            assert "PermissionError" in as_other_user([65534], connect)
            os.chmod(daemon.runtime_dir, 0o755)  # the socket's own mode holds, too
            assert "PermissionError" in as_other_user([65534], connect)
            os.chmod(daemon.runtime_dir, 0o750)


@pytest.mark.skipif(os.geteuid() != 0, reason="root may be somebody else")
def test_a_user_sees_its_own():
    with Daemon(sets={"daemon.socket_group": grp.getgrgid(65534).gr_name}) as daemon:
        daemon.open_to_others()

        def attach_and_look():
            with Client(daemon.runtime_dir) as worker:
                cache = create(worker)
                return look_around(daemon, worker.welcome.session, cache)
        with Client(daemon.runtime_dir) as worker:
            create(worker)
            # It evicts and kills itself at the end: what it would have said is lost with it.
            assert as_other_user([65534], attach_and_look) == ""
            worker.ping()
            wait_until(lambda: len(listed(status(worker, workers=1), 4)) == 1, "it is gone")


# ---- a worker that does not read its attach socket


def test_who_does_not_read_its_attach_socket_is_hung_up():
    """Extents fill the socket's buffer, and everything behind them waits in the daemon: 1,024 packets,
    then that worker is hung up and nobody else notices."""
    with Daemon(sets={"device.cpu0.budget": "128MiB", "device.cpu0.extent_size": "64KiB",
                      "device.cpu0.piece_size": "64KiB"}) as daemon:
        with Client(daemon.runtime_dir) as deaf, Client(daemon.runtime_dir) as other:
            cache = create(deaf, count=500)
            deaf.send(deaf.request(STEP, number(1, cache) + number(3, 512) + number(4, 1)))
            sent = 0
            while not daemon.has_line("does not read its attach socket") and sent < 5000:
                deaf.send(deaf.request(PING, data(1, b"x")))
                sent += 1
                if sent % 50 == 0:
                    other.ping()
            daemon.wait_for_line("does not read its attach socket")
            assert deaf.hung_up()
            assert step(other, create(other), 1)
