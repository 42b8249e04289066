"""A dense worker that was made from PROTOCOL.md alone: every mode, rows, forks, aborts, memory that
is asked back. Each byte is compared with a model, each counter with the theoretical minimum.

test: timeout_s=240
"""

import os
import sys

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "support"))
sys.path.insert(0, os.path.dirname(__file__))

import kvt_client  # noqa: E402
from kvt_messages import decode  # noqa: E402
from dense_worker import DenseWorker, layer, layer_bytes  # noqa: E402
from kvtierd import SLOWER, Daemon, wait_until  # noqa: E402

DYNAMIC, STATIC, OFFLOADED, OFFLOADED_STATIC = 1, 2, 3, 4
EINVAL, EBUSY, EQUOTA, ENOENT, EPROTO, ENOTSUP, ESTATE, EEVICTED = 1, 3, 4, 5, 6, 15, 16, 18
MIB = 1 << 20

# Twelve layers: layer 2 is read again up to layer 8, layer 7 has no V, layer 9 another shape.
LAYOUT = [layer() for _ in range(12)]
LAYOUT[2] = layer(last_reader=8)
LAYOUT[7] = layer(k_head_dim=96, v_head_dim=0)
LAYOUT[9] = layer(kv_heads=1, dtype=1)
SMALL = [layer() for _ in range(4)]


@pytest.fixture(name="attach")
def make_attach(daemon):
    """Attaches; whatever a test leaves attached is hung up."""
    clients = []

    def attach(**options):
        clients.append(kvt_client.Client(daemon.runtime_dir, timeout_s=10 * SLOWER, **options))
        return clients[-1]
    yield attach
    for client in clients:
        client.hang_up()


@pytest.fixture(name="daemon")
def make_daemon(request):
    sets = {"device.cpu0.budget": "8MiB", "host.budget": "96MiB", "daemon.idle_after": "50ms"}
    sets.update(getattr(request, "param", {}))
    with Daemon(sets=sets) as daemon:
        yield daemon


def used(client):
    return {tier["name"]: tier["used_bytes"] for tier in client.status()["tiers"]}


def nothing_left(client):
    """Behind the last CLOSE: extents are asked back, and every budget is at zero."""
    wait_until(lambda: client.serve() or not any(used(client).values()), "budgets are back at zero")
    assert not client.extents


def modes():
    """(mode, options of CREATE, configuration): none but static fits on its device."""
    return [
        pytest.param(DYNAMIC, {}, {}, id="dynamic"),
        pytest.param(STATIC, {"tokens_max": 2048}, {"device.cpu0.budget": "48MiB"}, id="static"),
        pytest.param(OFFLOADED, {}, {}, id="offloaded"),
        pytest.param(OFFLOADED, {"resident_layers_max_plus_1": 4}, {"device.cpu0.budget": "12MiB"},
                     id="offloaded-3-resident"),
        pytest.param(OFFLOADED_STATIC, {"tokens_max": 2048}, {}, id="offloaded-static"),
    ]


@pytest.mark.parametrize("mode, options, daemon", modes(), indirect=["daemon"])
def test_every_mode(mode, options, attach):
    with attach() as client:
        worker = DenseWorker(client)
        cache = worker.create(LAYOUT, mode, rows=2, name="dense", **options)
        # prefill, rows of different lengths
        worker.step(cache, [512, 300])
        worker.step(cache, [512, 512])
        worker.step(cache, [0, 188])
        # decode: one step, several steps, one row standing still
        for _ in range(3):
            worker.step(cache)
        assert worker.step(cache, 1, steps=8) == 8
        worker.step(cache, [3, 0], steps=2)
        worker.step(cache, 0)  # reads only
        # rows exchanged, then both become one
        worker.reorder(cache, [1, 0])
        worker.step(cache)
        worker.reorder(cache, [1, 1])
        worker.step(cache)
        worker.step(cache, 2, steps=3)
        # below what is written: inside a block that both share, that is alone and not full, that
        # is alone and was full (768 is the end of a block)
        worker.crop(cache, [700, 515])
        worker.step(cache, 5)
        worker.crop(cache, [600])
        worker.step(cache, 1, steps=2)
        worker.step(cache, [200, 300])
        worker.crop(cache, [610])
        worker.step(cache, 1, steps=2)
        streams = worker.streamed_pieces > 0
        assert streams == (mode != STATIC), "the test does not test what it says"
        listed = worker.counters(cache)
        assert (listed["layers"].count(b"R") == 12) == (mode == STATIC)
        worker.reset(cache)
        worker.step(cache, 300)
        worker.close(cache)
        nothing_left(client)


@pytest.mark.parametrize("mode, options, daemon", modes(), indirect=["daemon"])
def test_forks(mode, options, attach):
    with attach() as client:
        worker = DenseWorker(client)
        if "tokens_max" in options:
            options = dict(options, tokens_max=768)
        cache = worker.create(LAYOUT, mode, rows=2, **options)
        worker.step(cache, [500, 256])
        fork = worker.fork(cache)
        twice = worker.fork(cache, [0, 0])
        worker.step(fork, [30, 1])
        worker.step(twice, [7, 9])
        worker.step(cache, 20, steps=2)
        worker.step(twice, 1, steps=4)
        worker.close(cache)  # its forks live on
        worker.step(fork)
        if mode in (STATIC, OFFLOADED_STATIC):  # it has addresses for two rows
            with pytest.raises(kvt_client.Error) as refused:
                client.ask("repeat", cache=twice.number, times=2)
            assert refused.value.code == ESTATE
            worker.select(twice, [1, 0])
        else:
            worker.repeat(twice, 2)
            worker.step(twice)
            worker.select(twice, [3, 0])
        worker.step(twice, [1, 2])
        worker.step(fork, 2, steps=2)
        worker.close(twice)
        worker.step(fork, 2, steps=2)
        worker.close(fork)
        nothing_left(client)


@pytest.mark.parametrize("mode, options, daemon", modes(), indirect=["daemon"])
def test_an_abort_leaves_the_cache_at_its_last_committed_length(mode, options, attach):
    with attach() as client:
        worker = DenseWorker(client)
        cache = worker.create(LAYOUT, mode, rows=2, **options)
        worker.step(cache, 400)
        lengths = cache.lengths
        for at in (0, 4, 11):  # at a layer
            assert worker.step(cache, 50, abort_at=(0, at)) == 0
            assert cache.lengths == lengths
            worker.step(cache)
            lengths = cache.lengths
        # in the third of five steps: two are committed
        assert worker.step(cache, 2, steps=5, abort_at=(2, 3)) == 2
        assert cache.lengths == [n + 4 for n in lengths]
        worker.step(cache, 1, steps=2)
        # behind a reorder and behind growth: moves stand
        worker.reorder(cache, [1, 1])
        assert worker.step(cache, 400, abort_at=(0, 0)) == 0
        worker.step(cache, 3)
        listed = worker.counters(cache)
        assert listed["counters"]["steps_failed"] == 3 + 3 + 1
        worker.close(cache)
        nothing_left(client)


def test_abort_without_effect(attach):
    with attach() as client:
        worker = DenseWorker(client)
        none = client.ask("abort", first_step=0)["cache"]
        assert (none["cache"], none["lengths"]) == (0, [])
        cache = worker.create(SMALL, OFFLOADED)
        schedule = client.open(cache=cache.number, tokens=1, steps=1)
        behind = client.ask("abort", first_step=schedule.last_step + 1)["cache"]
        assert behind["cache"] == cache.number and client.page.failed.value == 0
        first = client.send("abort", first_step=schedule.first_step)
        second = client.send("abort", first_step=schedule.first_step)
        assert client.receive(second)["code"] == ESTATE
        client.give_up()
        reply = client.receive(first)
        assert (reply["code"], reply["cache"]["lengths"]) == (0, [0])
        assert (client.page.failed.value, client.page.failed.aux.value) == (1, 10)
        worker.step(cache, 5)
        assert client.page.failed.value == 0, "the next schedule clears it"


def test_acquire(attach):
    with attach() as client:
        worker = DenseWorker(client)
        cache = worker.create(LAYOUT, OFFLOADED, rows=2)
        worker.step(cache, 300, body="acquire")
        worker.step(cache, 1, body="acquire")
        # behind a step that was ended and is perhaps not committed, layer 0 opens the next one
        steps = []
        for _ in range(50):
            schedule = client.open("acquire", cache=cache.number, tokens=1)
            steps.append(schedule.first_step)
            for piece in schedule.pieces:
                client.wait(piece, schedule.first_step)
                client.done(piece)
            client.end_step(schedule.first_step)
        assert steps == list(range(steps[0], steps[0] + 50))
        client.settle(steps[-1])
        with pytest.raises(kvt_client.Error) as refused:
            client.ask("acquire", cache=cache.number, layer=1, tokens=1)
        assert refused.value.code == ESTATE
        worker.crop(cache, [300])
        # while a step is open, every later layer is answered with it
        first = client.ask("acquire", cache=cache.number, tokens=1)["schedule"]
        again = client.ask("acquire", cache=cache.number, layer=5, tokens=1)["schedule"]
        assert first == again
        client.adopt(first)
        client.abort(first["first_step"])
        worker.step(cache, 1, body="acquire")


def test_order_of_requests(attach):
    """[4] CREATE, STEP and requests on the schedule's cache wait; others go on; ABORT overtakes."""
    with attach() as client:
        worker = DenseWorker(client)
        cache = worker.create(SMALL, OFFLOADED)
        other = worker.create(SMALL, OFFLOADED)
        third = worker.create(SMALL, OFFLOADED)
        worker.step(cache, 10)
        worker.step(third, 10)
        client.open(cache=cache.number, tokens=1, steps=1)
        waiting = [client.send("create", options={"layers": LAYOUT[:1], "mode": OFFLOADED,
                                                  "rows": 1, "append_max": 1}),
                   client.send("step", cache=other.number, tokens=1, steps=1),
                   client.send("crop", cache=cache.number, lengths=[3])]
        client.send("fork", cache=third.number)
        fork = client.receive(client.sequence)
        assert fork["cache"]["lengths"] == [10]
        client.ask("ping", payload=b"x")
        assert not set(waiting) & set(client.replies)
        client.abort(0)
        created, step, crop = (client.receive(sequence) for sequence in waiting)
        assert [r["code"] for r in (created, step, crop)] == [0, 0, 0]
        assert crop["cache"]["lengths"] == [3]
        client.adopt(step["schedule"])
        client.abort(0)


def test_sending_again(attach):
    """[4] the same sequence is carried out once and answered alike, as long as it is kept."""
    with attach() as client:
        worker = DenseWorker(client)
        cache = worker.create(SMALL, OFFLOADED)
        message = client.request_bytes("fork", {"cache": cache.number})
        answers = []
        for _ in range(3):
            client.dealer.send(message)
            answers.append(client.receive(client.sequence)["raw"])
        assert answers[0] == answers[1] == answers[2]
        assert len(client.status()["caches"]) == 2, "it was carried out once"
        # one that waits is carried out once, and answered where it came from last
        schedule = client.open(cache=cache.number, tokens=1, steps=1)
        waiting = client.request_bytes("fork", {"cache": cache.number})
        sequence = client.sequence
        client.dealer.send(waiting)
        client.dealer.send(waiting)
        client.ask("ping")
        client.abort(schedule.first_step)
        client.receive(sequence)
        with pytest.raises(TimeoutError):
            client.receive(sequence, 0.3)
        for _ in range(8):
            client.ask("fork", cache=cache.number)
        client.dealer.send(message)
        old = client.receive(decode_sequence(message))
        assert old["code"] == EPROTO and "not kept" in old["text"]
        # a request that was refused by its form has not used up its sequence
        client.sequence += 1
        for values, code in (({"cache": cache.number}, EINVAL),
                             ({"cache": cache.number, "times": 2}, 0)):
            client.dealer.send(client.request_bytes("repeat", values, client.sequence))
            assert client.receive(client.sequence)["code"] == code


def decode_sequence(message):
    return decode("Request", message)["sequence"]


def create_values(**changes):
    options = {"layers": LAYOUT[:1], "mode": OFFLOADED, "rows": 1, "append_max": 1}
    options.update(changes)
    return {"options": options}


def with_layer(**changes):
    return create_values(layers=[dict(LAYOUT[0], **changes)])


REFUSED = [
    ("create", {}, EINVAL, "missing"),
    ("create", create_values(layers=[]), EINVAL, "1 to 1024"),
    ("create", create_values(layers=[dict(LAYOUT[0], repeat=1025)]), EINVAL, "1024"),
    ("create", create_values(mode=0), EINVAL, "mode"),
    ("create", create_values(mode=5), EINVAL, "mode"),
    ("create", create_values(codec=1), EINVAL, "codec"),
    ("create", create_values(rows=0), EINVAL, "rows"),
    ("create", create_values(rows=1025), EINVAL, "rows"),
    ("create", create_values(append_max=0), EINVAL, "append_max"),
    ("create", create_values(append_max=1048577), EINVAL, "append_max"),
    ("create", create_values(tokens_max=2147483393), EINVAL, "tokens_max"),
    ("create", create_values(mode=STATIC), EINVAL, "tokens_max"),
    ("create", create_values(piece_tokens=100), EINVAL, "multiple of 256"),
    ("create", create_values(resident_layers_max_plus_1=1026), EINVAL, "resident"),
    ("create", create_values(fingerprint=b"x" * 31), EINVAL, "fingerprint"),
    ("create", create_values(name="x" * 64), EINVAL, "name"),
    ("create", with_layer(kind=0), EINVAL, "kind"),
    ("create", with_layer(kind=2), EINVAL, "window"),
    ("create", with_layer(kind=2, window=1), ENOTSUP, "kind 2"),
    ("create", with_layer(kind=5, state_bytes=1), ENOTSUP, "kind 5"),
    ("create", with_layer(kv_heads=0), EINVAL, "kv_heads"),
    ("create", with_layer(k_head_dim=0), EINVAL, "k_head_dim"),
    ("create", with_layer(dtype=6), EINVAL, "dtype"),
    ("create", with_layer(last_reader_plus_1=2), EINVAL, "last_reader"),
    ("create", create_values(mode=STATIC, tokens_max=1 << 20, rows=64), EQUOTA, "budget"),
    ("step", {"cache": 1, "tokens": 1, "steps": 1}, ENOENT, "cache 1"),
    ("step", {"cache": "C", "tokens": 1}, EINVAL, "steps"),
    ("step", {"cache": "C", "tokens": 1, "steps": 65}, EINVAL, "steps"),
    ("step", {"cache": "C", "tokens": 9, "steps": 1}, EINVAL, "at most 8"),
    ("step", {"cache": "C", "rows": [{"row": 0}], "steps": 1}, EINVAL, "all 2 rows"),
    ("step", {"cache": "C", "rows": [{"row": 1}, {"row": 0}], "steps": 1}, EINVAL, "in order"),
    ("step", {"cache": "C", "rows": [{"row": 0}, {"row": 0}], "steps": 1}, EINVAL, "once"),
    ("step", {"cache": "C", "rows": [{"row": 0}, {"row": 2}], "steps": 1}, EINVAL, "below 2"),
    ("step", {"cache": "C", "rows": [{"row": 2000}], "steps": 1}, EINVAL, "row"),
    ("acquire", {"cache": "C", "layer": 1024}, EINVAL, "layer"),
    ("reorder", {"cache": "C", "rows": [0]}, EINVAL, "2"),
    ("reorder", {"cache": "C", "rows": [0, 2]}, EINVAL, "2 rows"),
    ("select", {"cache": "C"}, EINVAL, "1 row or more"),
    ("repeat", {"cache": "C", "times": 0}, EINVAL, "times"),
    ("repeat", {"cache": "C", "times": 1000}, EINVAL, "1024 rows"),
    ("crop", {"cache": "C"}, EINVAL, "lengths"),
    ("crop", {"cache": "C", "lengths": [1, 2, 3]}, EINVAL, "lengths"),
    ("fork", {"cache": 12345}, ENOENT, "12345"),
    ("close", {"cache": 0}, ENOENT, "cache 0"),
    ("plan", {"cache": 77}, ENOENT, "cache 77"),
    ("plan", {"options": create_values()["options"], "worker_kind": 3}, EINVAL, "worker_kind"),
    ("plan", {"options": create_values()["options"], "device": 1}, EINVAL, "device"),
    ("evict", {"session": 4096}, ENOENT, "4096"),
]


def seen(client):
    """What STATUS says of the caches, but for a prefetch that was given up in vain."""
    caches = client.status()["caches"]
    for cache in caches:
        del cache["counters"]["prefetch_discarded_bytes"]
    return caches


def test_refusals(attach):
    """[9] each names what it refuses, and changes nothing."""
    with attach() as client:
        worker = DenseWorker(client)
        cache = worker.create(SMALL, OFFLOADED, rows=2, append_max=8, tokens_max=20)
        worker.step(cache, 8)
        before = seen(client)
        for body, values, code, word in REFUSED:
            values = {k: cache.number if v == "C" else v for k, v in values.items()}
            with pytest.raises(kvt_client.Error) as refused:
                client.ask(body, **values)
            assert (refused.value.code, word in str(refused.value)) == (code, True), \
                f"{body} {values}: {refused.value.code}: {refused.value}"
        assert seen(client) == before
        # capacity: as many steps as there is room for, then none
        assert worker.step(cache, 4, steps=9) == 3
        with pytest.raises(kvt_client.Error) as full:
            client.ask("step", cache=cache.number, tokens=1, steps=1)
        assert full.value.code == EQUOTA and "capacity is 20" in str(full.value)


def test_memory_is_asked_back(attach):
    """[8] an idle worker's caches leave the device for another's, and come back with every byte."""
    with attach() as first, attach() as second:
        one, two = DenseWorker(first), DenseWorker(second)
        mine = one.create(LAYOUT, DYNAMIC, rows=2)
        one.step(mine, 500)
        assert one.counters(mine)["layers"] == b"R" * 12
        wait_until(lambda: first.status()["workers"][0]["idle_ms"] >= 60, "the first is idle")
        # What the second needs the first has: it has to answer RECLAIM meanwhile.
        sequence = second.send("create", options={"layers": LAYOUT, "mode": OFFLOADED_STATIC,
                                                  "rows": 2, "tokens_max": 1536,
                                                  "append_max": 512})
        wait_until(lambda: serve_both(first, second) or sequence in second.replies, "it is created")
        created = second.receive(sequence)
        assert created["code"] == 0, created["text"]
        theirs = two.adopt(created["created"]["cache"], LAYOUT, 2)
        assert first.reclaims > 0 and b"I" in one.counters(mine)["layers"]
        for _ in range(3):
            two.step(theirs, 512)
        two.close(theirs)
        second.serve(0.1)
        one.step(mine)
        assert one.step(mine, 1, steps=4) == 4
        assert one.counters(mine)["counters"]["migrated_bytes"] > 0
        one.close(mine)
        nothing_left(first)


def serve_both(*clients):
    for client in clients:
        client.poll(0.01)


def test_a_process_that_attached_again_is_asked_for_what_it_still_maps(attach):
    control = attach(role=kvt_client.CONTROL)
    old = attach()
    worker = DenseWorker(old)
    worker.step(worker.create(LAYOUT, OFFLOADED), 100)
    assert old.extents
    old.hang_up()
    wait_until(lambda: control.status()["workers"][0]["state"] == "reclaiming", "it is an orphan")
    tier = control.status()["tiers"][0]
    assert tier["used_bytes"] == tier["pinned_by_dead_bytes"] > 0
    with attach(former=[old]) as new:
        wait_until(lambda: new.serve() or not any(used(control).values()), "all is given back")
        assert not old.extents
    wait_until(lambda: not control.status()["workers"], "both are gone")


def test_eviction(attach):
    control = attach(role=kvt_client.CONTROL)
    with attach() as client:
        worker = DenseWorker(client)
        cache = worker.create(LAYOUT, OFFLOADED, rows=2)
        worker.step(cache, 300)
        schedule = client.open(cache=cache.number, tokens=1, steps=1)
        client.wait(schedule.pieces[0], schedule.first_step)
        evicted = control.ask("evict", session=client.session)["evicted"]
        assert evicted["pinned_bytes"] > 0
        wait_until(lambda: client.page.failed.value != 0, "the worker is told")
        with pytest.raises(kvt_client.Failed) as failed:
            client.wait(schedule.pieces[-1], schedule.first_step)
        assert failed.value.code == EEVICTED
        with pytest.raises(kvt_client.Error) as refused:
            client.ask("close", cache=cache.number)
        assert refused.value.code == EEVICTED
        client.close_schedule()
        wait_until(lambda: client.serve() or not any(used(control).values()), "all is given back")
    wait_until(lambda: not control.status()["workers"], "it is gone")


def test_the_daemons_death(attach, daemon):
    client = attach()
    worker = DenseWorker(client)
    cache = worker.create(LAYOUT, OFFLOADED)
    worker.step(cache, 100)
    schedule = client.open(cache=cache.number, tokens=1, steps=1)
    daemon.kill()
    with pytest.raises(kvt_client.Gone):
        for piece in schedule.pieces:
            client.wait(piece, schedule.first_step)
            client.done(piece)
        wait_until(lambda: client.serve(), "the hang-up is seen")
    assert client.page.ready[0].value >= kvt_client.POISON
    assert client.page.step.reached(schedule.last_step)
    assert len(client.extent(schedule.pieces[0].extent)) > 0, "extents stay readable"
    client.hang_up()
    daemon.start()
    with attach() as again:
        assert again.welcome["boot_epoch"] != client.welcome["boot_epoch"]
        worker = DenseWorker(again)
        worker.step(worker.create(LAYOUT, OFFLOADED), 10)


def test_plan_tells_what_a_step_moves(attach):
    with attach() as client:
        worker = DenseWorker(client)
        options = {"layers": LAYOUT, "mode": OFFLOADED, "rows": 2, "append_max": 512}
        plan = client.ask("plan", options=options, tokens=512, worker_kind=kvt_client.DENSE)["plan"]
        cache = worker.create(LAYOUT, OFFLOADED, rows=2)
        worker.step(cache, 512)
        worker.step(cache)
        listed = worker.counters(cache)
        bytes_ = sum(layer_bytes(l) for l in LAYOUT)
        assert plan["to_device_bytes_per_step"] == listed["need_to_device_bytes"] == 1024 * bytes_
        assert plan["from_device_bytes_per_step"] == listed["need_from_device_bytes"] == 2 * bytes_
        assert plan["layers"] == listed["layers"] == b"S" * 12
        running = client.ask("plan", cache=cache.number)["plan"]
        assert running["to_device_bytes_per_step"] == listed["need_to_device_bytes"]
