"""The wire format, byte by byte: PROTOCOL.md's tables, the schema, the daemon and fixed bytes have to
agree, so that no accident changes it. And what garbage and other versions are answered.
"""

import mmap
import os
import re
import socket
import struct
import sys

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
sys.path.insert(0, os.path.join(ROOT, "tests", "support"))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import kvt_client as k  # noqa: E402
import kvt_messages as messages  # noqa: E402
from kvtierd import SLOWER, Daemon, wait_until  # noqa: E402

EINVAL, EBUSY, ENOENT, EPROTO, EVERSION, EPERM, EGONE, ENOTSUP = 1, 3, 5, 6, 7, 8, 9, 15


@pytest.fixture(name="daemon", scope="module")
def make_daemon():
    with Daemon(sets={"daemon.sessions_max": "2", "daemon.ring_size": "128KiB",
                      "daemon.block_tokens": "512"}) as daemon:
        yield daemon


# ---- fixed bytes: the attach socket -----------------------------------------------------------------

GOLDEN_HELLO = bytes.fromhex(
    "4b565441" "01000000" "80000000" "00000000"  # head: KVTA, HELLO, 128 bytes
    "01000000" "00000000" "0000000000000000"  # version 1.0, no features
    "01000000" "02000000" "01000000" "00000000"  # worker, dense, extents as descriptors
    "000102030405060708090a0b0c0d0e0f"  # device
    "707974686f6e" + "00" * 58)  # "python"
GOLDEN_WELCOME = bytes.fromhex(
    "4b565441" "02000000" "60010000" "00000000"
    "01000000" "00000000" "0000000000000000"
    "8877665544332211" "0000800000000000"  # boot_epoch, ring_bytes 8 MiB
    "03000000" "00010000" "00300000" "01000000"  # session 3, 256 tokens, page 12,288, descriptors
    "101112131415161718191a1b1c1d1e1f" "202122232425262728292a2b2c2d2e2f"  # token, device
    "63707530" + "00" * 60 + "302e312e30" + "00" * 59  # "cpu0", "0.1.0"
    + "6970633a2f2f2f72756e2f6b7674696572642f66726f6e742e736f636b" + "00" * 99)
GOLDEN_REFUSE = bytes.fromhex(
    "4b565441" "03000000" "20020000" "00000000" "07000000" "01000000" "00000000" "00000000"
    "6e6f" + "00" * 510)
GOLDEN_EXTENT = bytes.fromhex(
    "4b565441" "04000000" "68000000" "00000000" "03000000" "01000100" "01000000" "00000000"
    "0000080000000000" + "00" * 64)
GOLDEN_RECLAIM = bytes.fromhex(
    "4b565441" "05000000" "18000000" "00000000" "03000000" "01000100")
GOLDEN_RECLAIMED = bytes.fromhex(
    "4b565441" "06000000" "18000000" "00000000" "03000000" "01000100")


def test_golden_packets():
    assert k.hello(extent_kind=1, device=bytes(range(16))) == GOLDEN_HELLO
    assert [len(g) for g in (GOLDEN_HELLO, GOLDEN_WELCOME, GOLDEN_REFUSE, GOLDEN_EXTENT,
                             GOLDEN_RECLAIM, GOLDEN_RECLAIMED)] == [128, 352, 544, 104, 24, 24]
    welcome = k.read_welcome(GOLDEN_WELCOME)
    assert welcome == {
        "protocol_major": 1, "protocol_minor": 0, "features": 0,
        "boot_epoch": 0x1122334455667788, "ring_bytes": 8 << 20, "session": 3,
        "block_tokens": 256, "control_page_bytes": 12288, "extent_kind": 1,
        "token": bytes(range(16, 32)), "device": bytes(range(32, 48)), "device_name": "cpu0",
        "server_version": "0.1.0", "endpoint": "ipc:///run/kvtierd/front.sock"}
    refused = k.Refused(GOLDEN_REFUSE)
    assert (refused.code, refused.major, refused.minor, str(refused)) == (EVERSION, 1, 0, "no")
    assert k.packet(k.EXTENT, k.EXTENT_BODY.pack(3, 65537, 1, 0, 512 << 10, b"")) == GOLDEN_EXTENT
    assert k.packet(k.RECLAIM, k.RECLAIM_BODY.pack(3, 65537)) == GOLDEN_RECLAIM
    assert k.reclaimed(3, 65537) == GOLDEN_RECLAIMED


def test_the_daemons_welcome_is_at_these_offsets(daemon):
    """Read with nothing but offsets: every byte of it is accounted for."""
    with k.Client(daemon.runtime_dir) as client:
        raw = client.welcome_bytes
        endpoint = f"ipc://{daemon.runtime_dir}/front.sock".encode()
        version = client.status()["version"].encode()
        u32 = struct.Struct("<I").unpack_from
        u64 = struct.Struct("<Q").unpack_from
        assert raw[:32] == bytes.fromhex("4b565441" "02000000" "60010000" "00000000"
                                         "01000000" "00000000" "0000000000000000")
        boot = client.ask("ping")["boot_epoch"]
        assert (u64(raw, 32)[0], u64(raw, 40)[0]) == (boot, 128 << 10)
        worker = client.status()["workers"][0]
        assert [u32(raw, at)[0] for at in (48, 52, 56, 60)] == [worker["session"], 512, 12288, 1]
        assert raw[64:80] != bytes(16) and raw[80:96] != bytes(16)
        assert raw[96:160] == b"cpu0".ljust(64, b"\0")
        assert raw[160:224] == version.ljust(64, b"\0")
        assert raw[224:352] == endpoint.ljust(128, b"\0")
        page = bytes(client.page.memory)
        assert page[:28] == bytes.fromhex("4b565450" "01000000" "00300000" "40000000") + \
            raw[32:40] + raw[48:52]
        assert page[28:] == bytes(12288 - 28)


def test_what_a_worker_gets_is_sealed(daemon):
    """The page cannot be resized, the ring not written, by whatever way its file is opened again."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.connect(daemon.attach_path)
        s.send(SANE)
        _, fds, _, _ = socket.recv_fds(s, 1025, 2, socket.MSG_CMSG_CLOEXEC)
        try:
            sizes = [os.fstat(fd).st_size for fd in fds]
            assert sizes == [12288, 128 << 10]
            for fd in fds:
                again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
                with pytest.raises(PermissionError):
                    os.ftruncate(again, 4096)
                with pytest.raises(PermissionError):
                    os.ftruncate(again, 1 << 20)
                os.close(again)
            again = os.open(f"/proc/self/fd/{fds[1]}", os.O_RDWR)
            with pytest.raises(PermissionError):
                mmap.mmap(again, 4096)
            os.close(again)
        finally:
            for fd in fds:
                os.close(fd)


# ---- fixed bytes: messages ------------------------------------------------------------------------------
# One of each kind, with every field set, made once from proto/kvtier.proto.

EVERYTHING = {
    "uint": [1, 300, 70000, 1 << 31, 5, 6, 7, 8, 9, 10, 11, 12, 13], "bool": [True],
    "double": [1.5, -2.0], "bytes": [b"\x00\xffab"], "string": ["name"]}


def example(message, depth=0):
    """A message with every field set, each to a value of its own."""
    values = {}
    for at, (name, (_, kind)) in enumerate(messages.SCHEMA[message].items()):
        one = kind[0] if isinstance(kind, list) else kind
        if one in EVERYTHING:
            choices = EVERYTHING[one]
            value = choices[(at + depth) % len(choices)]
            values[name] = [value, 0, 127, 128] if isinstance(kind, list) else value
        else:
            value = example(one, depth + 1)
            values[name] = [value, {}] if isinstance(kind, list) else value
    return values


def requests():
    for name in list(messages.SCHEMA["Request"])[3:]:
        kind = messages.SCHEMA["Request"][name][1]
        yield "Request", name, {"sequence": 300, "session": 7, "token": bytes(range(16)),
                                name: example(kind)}
    for name in list(messages.SCHEMA["Reply"])[5:]:
        kind = messages.SCHEMA["Reply"][name][1]
        yield "Reply", name, {"sequence": 300, "boot_epoch": (1 << 64) - 1, "code": 4,
                              "text": "why", name: example(kind)}


GOLDEN_MESSAGES = {
    "Request.ping":
        "08ac0210071a10000102030405060708090a0b0c0d0e0f52060a0400ff6162",
    "Request.create":
        "08ac0210071a10000102030405060708090a0b0c0d0e0f5a400a3e0a1a08f0a20410808080800818"
        "052006280730083809400a480b500c0a0010f0a204188080808008200528063007380840094a0400"
        "ff616252046e616d65",
    "Request.close":
        "08ac0210071a10000102030405060708090a0b0c0d0e0f62020801",
    "Request.step":
        "08ac0210071a10000102030405060708090a0b0c0d0e0f6a170801120708ac0210f0a204120018f0"
        "a204208080808008",
    "Request.abort":
        "08ac0210071a10000102030405060708090a0b0c0d0e0f72020801",
    "Request.acquire":
        "08ac0210071a10000102030405060708090a0b0c0d0e0f7a09080110ac0218f0a204",
    "Request.fork":
        "08ac0210071a10000102030405060708090a0b0c0d0e0f82010a08011206ac02007f8001",
    "Request.reorder":
        "08ac0210071a10000102030405060708090a0b0c0d0e0f8a010a08011206ac02007f8001",
    "Request.repeat":
        "08ac0210071a10000102030405060708090a0b0c0d0e0f920105080110ac02",
    "Request.select":
        "08ac0210071a10000102030405060708090a0b0c0d0e0f9a010a08011206ac02007f8001",
    "Request.crop":
        "08ac0210071a10000102030405060708090a0b0c0d0e0fa2010a08011206ac02007f8001",
    "Request.reset":
        "08ac0210071a10000102030405060708090a0b0c0d0e0faa01020801",
    "Request.status":
        "08ac0210071a10000102030405060708090a0b0c0d0e0ff2010c080110011801208080808008",
    "Request.plan":
        "08ac0210071a10000102030405060708090a0b0c0d0e0ffa01510a3e0a1a08f0a204108080808008"
        "18052006280730083809400a480b500c0a0010f0a204188080808008200528063007380840094a04"
        "00ff616252046e616d6510ac0218f0a20420808080800828053006",
    "Request.evict":
        "08ac0210071a10000102030405060708090a0b0c0d0e0f82020408011001",
    "Reply.shortage":
        "08ac0210ffffffffffffffffff01180422037768792a150a046e616d6510ac0218f0a20420808080"
        "80082805",
    "Reply.ping":
        "08ac0210ffffffffffffffffff011804220377687952060a0400ff6162",
    "Reply.created":
        "08ac0210ffffffffffffffffff01180422037768795a0f080110ac0218f0a204208080808008",
    "Reply.schedule":
        "08ac0210ffffffffffffffffff01180422037768796a18080110ac0218f0a2042080808080082805"
        "320506007f8001",
    "Reply.cache":
        "08ac0210ffffffffffffffffff011804220377687982010e08011206ac02007f800118f0a204",
    "Reply.status":
        "08ac0210ffffffffffffffffff0118042203776879f201d9010a046e616d6510ac021a1e0a046e61"
        "6d6510f0a2041880808080082005280630073808420400ff61621a00224c08ac0212046e616d6518"
        "80808080082005280632046e616d653a046e616d654009480a500b5a1808f0a20410808080800818"
        "052006280730083809400a480b600d680171000000000000f83f22002a3d08ac0210f0a2041a046e"
        "616d6520052806300738084009480a520400ff61625a1808f0a20410808080800818052006280730"
        "083809400a480b600d68012a0030063a1908ac0210f0a20418808080800820052806300738084009"
        "480a",
    "Reply.plan":
        "08ac0210ffffffffffffffffff0118042203776879fa014a080110ac0218f0a20420808080800828"
        "0530063807400849000000000000f83f5100000000000000c05a0400ff6162600c680d7001790000"
        "00000000f83f8001f0a20488018080808008",
    "Reply.evicted":
        "08ac0210ffffffffffffffffff011804220377687982020f080110ac0218f0a204208080808008",
}


def parse_schema():
    """{message: {field: (number, type, repeated, oneof)}} of proto/kvtier.proto."""
    with open(os.path.join(ROOT, "proto", "kvtier.proto"), encoding="utf-8") as stream:
        text = re.sub(r"//.*", "", stream.read())
    messages = {}
    for name, body in re.findall(r"message (\w+) \{((?:[^{}]|\{[^{}]*\})*)\}", text):
        fields = {}
        inner = "".join(re.findall(r"oneof \w+ \{([^{}]*)\}", body))
        for repeated, kind, field, number in re.findall(
                r"(repeated )?(\w+) (\w+) = (\d+)(?: \[packed = true\])?;", body):
            in_oneof = re.search(rf"\b{field} = {number};", inner) is not None
            fields[field] = (int(number), kind, bool(repeated), in_oneof)
        messages[name] = fields
    return messages


def test_the_schema_is_the_documents():
    """Names, numbers and types of the schema are those of the client, which are PROTOCOL.md's."""
    parsed = parse_schema()
    assert set(parsed) == set(messages.SCHEMA)
    for message, fields in parsed.items():
        plain = {}
        for name, (number, kind, repeated, _) in fields.items():
            one = {"uint32": "uint", "uint64": "uint"}.get(kind, kind)
            plain[name] = (number, [one] if repeated else one)
        assert plain == messages.SCHEMA[message], message


def build_classes():
    """The schema's messages by Google's implementation."""
    types = {"uint32": 13, "uint64": 4, "bool": 8, "double": 1, "bytes": 12, "string": 9}
    file = descriptor_pb2.FileDescriptorProto(name="kvtier.proto", package="kvt", syntax="proto3")
    for name, fields in parse_schema().items():
        message = file.message_type.add(name=name)
        if any(in_oneof for *_, in_oneof in fields.values()):
            message.oneof_decl.add(name="body")
        for field, (number, kind, repeated, in_oneof) in fields.items():
            f = message.field.add(name=field, number=number, label=3 if repeated else 1)
            if kind in types:
                f.type = types[kind]
            else:
                f.type, f.type_name = 11, f".kvt.{kind}"
            if in_oneof:
                f.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"kvt.{name}"))
            for name in messages.SCHEMA}


@pytest.mark.parametrize("kind, name, values",
                         [pytest.param(*r, id=f"{r[0]}-{r[1]}") for r in requests()])
def test_golden_messages(kind, name, values):
    golden = bytes.fromhex(GOLDEN_MESSAGES[f"{kind}.{name}"])
    assert messages.encode(kind, values) == golden
    assert messages.encode(kind, messages.decode(kind, golden)) == golden
    assert build_classes()[kind](**values).SerializeToString(deterministic=True) == golden


def test_golden_conversation(daemon):
    """The daemon's own bytes, whole: PING, an error, CREATE, STEP."""
    with k.Client(daemon.runtime_dir) as client:
        boot = messages.varint(client.welcome["boot_epoch"])

        def raw(body, values):
            client.dealer.send(client.request_bytes(body, values))
            return client.receive(client.sequence)["raw"]

        assert raw("ping", {"payload": b"hello"}) == \
            b"\x08\x01\x10" + boot + b"\x52\x07\x0a\x05hello"
        text = b"cache 9: the session has none of this number"
        assert raw("close", {"cache": 9}) == \
            b"\x08\x02\x10" + boot + b"\x18\x05\x22" + bytes([len(text)]) + text
        created = raw("create", {"options": {
            "layers": [{"kind": 1, "kv_heads": 1, "k_head_dim": 8, "v_head_dim": 8, "dtype": 2,
                        "repeat": 4}], "mode": 3, "rows": 1, "append_max": 4}})
        reply = messages.decode("Reply", created)["created"]
        assert (reply["slots"], reply["slot_bytes"], reply["resident_layers"]) == \
            (3, 512 * 32, 0)
        cache = messages.varint(reply["cache"])
        assert created == b"\x08\x03\x10" + boot + b"\x5a" + bytes([len(cache) + 7]) + \
            b"\x08" + cache + b"\x10\x03\x18\x80\x80\x01"
        step = raw("step", {"cache": reply["cache"], "tokens": 1, "steps": 1})
        schedule = messages.decode("Reply", step)["schedule"]
        assert (schedule["first_step"], schedule["steps"], schedule["ring_offset"]) == (1, 1, 0)
        ring = messages.varint(schedule["ring_bytes"])
        inner = b"\x08" + cache + b"\x10\x01\x18\x01\x28" + ring + b"\x32\x01\x00"
        assert step == b"\x08\x04\x10" + boot + b"\x6a" + bytes([len(inner)]) + inner
        check_ring(bytes(client.ring[:schedule["ring_bytes"]]), reply["cache"])
        client.adopt(schedule)
        client.abort(0)


def check_ring(raw, cache):
    """A schedule of one step of four streamed layers, by offsets alone."""
    u32 = struct.Struct("<I").unpack_from
    u64 = struct.Struct("<Q").unpack_from
    pieces, runs, rows = 72 + 16, 72 + 16 + 4 * 96, 72 + 16 + 4 * (96 + 40)
    assert raw[:4] == b"KVTS"
    assert [u32(raw, at)[0] for at in range(4, 16, 4)] == [1, len(raw), cache]
    assert u64(raw, 16)[0] == 1
    assert [u32(raw, at)[0] for at in range(24, 72, 4)] == [
        1, 0, 0, 4, 4, 4, 72, pieces, pieces, runs, rows, 0]
    assert (u64(raw, 72)[0], u32(raw, 80)[0], u32(raw, 84)[0]) == (1, 0, 4)
    for layer in range(4):
        at = pieces + 96 * layer
        extent = u32(raw, at + 20)[0]
        generation = 1 if layer < 3 else 2
        assert extent != 0
        assert [u32(raw, at + n)[0] for n in (0, 4, 8, 12, 16, 24, 28, 32, 36, 88, 92)] == [
            layer, layer, layer, 3, layer % 3, layer, 1, 0, 0, 512, 0]
        assert [u64(raw, at + n)[0] for n in (40, 48, 72, 80)] == [
            generation, generation, 512 * 16, 512 * 16]
        k_offset, v_offset = u64(raw, at + 56)[0], u64(raw, at + 64)[0]
        assert v_offset - k_offset == 512 * 16
        run = runs + 40 * layer
        assert [u32(raw, run + n)[0] for n in range(0, 24, 4)] == [layer, 1, 0, 0, 1, 0]
        assert [u64(raw, run + n)[0] for n in (24, 32)] == [k_offset, v_offset]
        assert u32(raw, rows + 4 * layer)[0] == 0
    assert len(raw) == rows + 16


# ---- other versions, and garbage -----------------------------------------------------------------------------


def first_packet(daemon, raw):
    """What the daemon answers to it: (code, major, minor, text)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.settimeout(5 * SLOWER)
        s.connect(daemon.attach_path)
        s.send(raw)
        answer = s.recv(1025)
        assert k.HEAD.unpack_from(answer)[1] == k.REFUSE, answer[:16]
        refused = k.Refused(answer)
        assert s.recv(1025) == b"", "it closes behind REFUSE"
        return refused.code, refused.major, refused.minor, str(refused)


def changed(at, value, raw=GOLDEN_HELLO):
    return raw[:at] + struct.pack("<I", value) + raw[at + 4:]


SANE = changed(40, 0, GOLDEN_HELLO[:48] + bytes(16) + GOLDEN_HELLO[64:])
FIRST_PACKETS = [
    ("short", b"x", EPROTO, "no HELLO"),
    ("no versions", SANE[:23], EPROTO, "no HELLO"),
    ("magic", b"HTTP" + SANE[4:], EPROTO, "no HELLO"),
    ("type", changed(4, 2, SANE), EPROTO, "no HELLO"),
    ("newer", changed(16, 2, SANE), EVERSION, "1.0, the client speaks 2.0"),
    ("older", changed(16, 0, SANE), EVERSION, "1.0, the client speaks 0.0"),
    ("newer, and longer", changed(16, 3, SANE) + bytes(64), EVERSION, "3.0"),
    ("newer, and shorter", changed(16, 3, SANE)[:24], EVERSION, "3.0"),
    ("size", SANE + b"\0", EPROTO, "129 bytes"),
    ("said size", changed(8, 127, SANE), EPROTO, "says 127"),
    ("role", changed(32, 3, SANE), EINVAL, "role is 3"),
    ("worker kind", changed(36, 3, SANE), EINVAL, "worker_kind is 3"),
    ("control with a kind", changed(32, 2, SANE), EINVAL, "worker_kind is 2"),
    ("extent kind", changed(40, 3, SANE), EINVAL, "extent_kind is 3"),
    ("ipc on cpu", changed(40, 2, SANE), ENOTSUP, "kind 2"),
    ("name", SANE[:64] + b"x" * 64, EINVAL, "NUL"),
    ("device", changed(48, 77, SANE), ENOENT, "no device"),
]


@pytest.mark.parametrize("raw, code, word", [pytest.param(*p[1:], id=p[0]) for p in FIRST_PACKETS])
def test_first_packets_that_are_refused(daemon, raw, code, word):
    answer = first_packet(daemon, raw)
    assert answer[:3] == (code, 1, 0) and word in answer[3], answer


def test_a_newer_minor_version_and_unknown_features_are_welcome(daemon):
    with k.Client(daemon.runtime_dir, minor=9, features=1 << 63) as client:
        assert (client.welcome["protocol_minor"], client.welcome["features"]) == (0, 0)


def test_as_many_sessions_as_are_accepted(daemon):
    with k.Client(daemon.runtime_dir), k.Client(daemon.runtime_dir):
        code, _, _, text = first_packet(daemon, SANE)
        assert code == EBUSY and "sessions_max" in text
        with k.Client(daemon.runtime_dir, role=k.CONTROL) as control:
            assert (control.welcome["ring_bytes"], control.welcome["control_page_bytes"],
                    control.welcome["extent_kind"], control.welcome["device"]) == (0, 0, 0, bytes(16))


@pytest.mark.parametrize("raw", [b"x", GOLDEN_HELLO, k.reclaimed(1, 1) + b"\0",
                                 changed(8, 25, k.reclaimed(1, 1)), bytes(1025)])
def test_garbage_behind_welcome_ends_that_session(daemon, raw):
    with k.Client(daemon.runtime_dir) as other:
        client = k.Client(daemon.runtime_dir)
        client.attach.send(raw)
        with pytest.raises(k.Gone):
            wait_until(lambda: client.serve(0.1), "the hang-up")
        client.hang_up()
        other.ask("ping")
        wait_until(lambda: len(other.status()["workers"]) == 1, "its session is over")


def test_a_lie_about_an_extent_harms_nobody(daemon):
    with k.Client(daemon.runtime_dir) as client:
        for session in (client.session, client.session + 1, 0):
            client.attach.send(k.reclaimed(session, 65537))
        client.ask("ping")


def test_control_sends_nothing_on_its_socket(daemon):
    client = k.Client(daemon.runtime_dir, role=k.CONTROL)
    client.attach.send(k.reclaimed(client.session, 1))
    with pytest.raises(k.Gone):
        wait_until(lambda: client.serve(0.1), "the hang-up")
    client.hang_up()


def test_requests_that_are_refused_by_their_form(daemon):
    with k.Client(daemon.runtime_dir) as client:
        def answer(raw, sequence):
            client.dealer.send(raw)
            reply = client.receive(sequence)
            return reply["code"], reply["text"]

        good = client.request_bytes("ping", {"payload": b"x"}, 50)
        assert answer(b"\xff" * 10, 0) == (EPROTO, "the message is no request")
        # 60 KiB of empty layers unpack to more than a request may
        assert answer(messages.encode("Request", {"sequence": 51, "create": {
            "options": {"layers": [{}] * 30000}}}), 0)[0] == 14
        assert answer(good[:2] + messages.encode("Request", {"session": 77}) + good[4:], 50)[0] == EGONE
        token = client.welcome["token"]
        assert answer(good.replace(token, bytes(16)), 50)[0] == EPERM
        assert answer(messages.encode("Request", {"sequence": 52, "session": client.session,
                                           "token": token[:15], "ping": {}}), 52)[0] == EPERM
        head = {"sequence": 53, "session": client.session, "token": token}
        code, text = answer(messages.encode("Request", head), 53)
        assert code == ENOTSUP and "no body" in text
        assert answer(messages.encode("Request", head) + b"\xda\x07\x00", 53)[0] == ENOTSUP  # field 123
        # unknown fields are passed over, numbers may come unpacked
        assert answer(good + b"\xda\x07\x01x", 50)[0] == 0
        unpacked = messages.encode("Request", head) + b"\xa2\x01\x06" + b"\x08\x09" + b"\x10\x01\x10\x02"
        assert answer(unpacked, 53) == (ENOENT, "cache 9: the session has none of this number")


def test_control_owns_no_caches(daemon):
    with k.Client(daemon.runtime_dir, role=k.CONTROL) as client:
        with pytest.raises(k.Error) as refused:
            client.ask("fork", cache=1)
        assert refused.value.code == EPERM
        client.ask("status", devices=True)


def test_messages_that_are_dropped(daemon):
    """Several frames: nothing more is read from that connection. An empty one: as if never sent."""
    with k.Client(daemon.runtime_dir) as client:
        ping = client.request_bytes("ping", {}, 9)
        for frames in ([b"", ping], [ping, b""], [b""]):
            one = client.zmq_context.socket(5)  # DEALER
            one.connect(client.welcome["endpoint"])
            one.send_multipart(frames)
            assert not one.poll(200)
            one.send(ping)
            answered = one.poll(500 * SLOWER if frames == [b""] else 200)
            assert bool(answered) == (frames == [b""])
            one.close(0)
        client.ask("ping", payload=b"x" * 60000)


def test_an_unanswered_session_number(daemon):
    """Sessions are never numbered twice; a request of one that is over says so."""
    with k.Client(daemon.runtime_dir) as first:
        number = first.session
        message = first.request_bytes("ping", {})
    with k.Client(daemon.runtime_dir) as second:
        assert second.session != number
        second.dealer.send(message)
        assert second.receive(first.sequence)["code"] == EGONE
