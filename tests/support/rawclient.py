"""A client of kvtierd that is made of bytes: packets of the attach socket (proto/attach.h) and
control messages (proto/kvtier.proto), right or wrong as a test wants them. No library of ours is
used, so that what is tested is the daemon.
"""

import mmap
import os
import socket
import struct
import time

import zmq

ATTACH_MAGIC = 0x4154564B
HELLO, WELCOME, REFUSE, EXTENT, RECLAIM, RECLAIMED = 1, 2, 3, 4, 5, 6
WORKER, CONTROL = 1, 2
SEGMENT, DENSE = 1, 2
MAJOR, MINOR = 1, 0
EINVAL, EBUSY, EQUOTA, ENOENT, EPROTO, EVERSION, EPERM, EGONE = 1, 3, 4, 5, 6, 7, 8, 9
ETOOBIG, ENOTSUP, ESTATE, EEVICTED = 14, 15, 16, 18

HELLO_FORMAT = "<4I 2I Q 4I 16s 64s"
WELCOME_FORMAT = "<4I 2I Q Q Q 4I 16s 16s 64s 64s 128s"
REFUSE_FORMAT = "<4I 4I 512s"
EXTENT_FORMAT = "<4I 4I Q 64s"
RECLAIM_FORMAT = "<4I 2I"


def text_of(raw):
    return raw.split(b"\0")[0].decode()


def hello(role=WORKER, kind=None, major=MAJOR, minor=MINOR, name=b"test", device=bytes(16),
          extent_kind=0, features=0):
    if kind is None:
        kind = SEGMENT if role == WORKER else 0
    size = struct.calcsize(HELLO_FORMAT)
    return struct.pack(HELLO_FORMAT, ATTACH_MAGIC, HELLO, size, 0, major, minor, features, role,
                       kind, extent_kind, 0, device, name)


class Refused(Exception):
    def __init__(self, code, major, minor, text):
        super().__init__(text)
        self.code, self.major, self.minor, self.text = code, major, minor, text


class Welcome:
    def __init__(self, packet, fds):
        values = struct.unpack(WELCOME_FORMAT, packet)
        (_, _, _, _, self.major, self.minor, self.features, self.boot_epoch, self.ring_bytes,
         self.session, self.block_tokens, self.page_bytes, self.extent_kind, self.token,
         self.device, device_name, version, endpoint) = values
        self.device_name, self.version = text_of(device_name), text_of(version)
        self.endpoint = text_of(endpoint)
        self.fds = fds


# ---- protobuf, as far as it is needed


def varint(value):
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field, value):
    return varint(field << 3) + varint(value) if value else b""


def data(field, value):
    return varint(field << 3 | 2) + varint(len(value)) + value


def packed(field, values):
    return data(field, b"".join(varint(v) for v in values)) if values else b""


def fields_of(message):
    """{field: [value, ...]}: numbers as they are, everything else as bytes."""
    fields, at = {}, 0

    def read():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = read()
        if key & 7 == 0:
            value = read()
        elif key & 7 == 1:
            value, at = message[at:at + 8], at + 8
        elif key & 7 == 2:
            size = read()
            value, at = message[at:at + size], at + size
        else:
            raise ValueError(f"wire type {key & 7}")
        fields.setdefault(key >> 3, []).append(value)
    return fields


class Reply:
    def __init__(self, message):
        fields = fields_of(message)
        self.bytes = message
        self.sequence = fields.get(1, [0])[0]
        self.boot_epoch = fields.get(2, [0])[0]
        self.code = fields.get(3, [0])[0]
        self.text = fields.get(4, [b""])[0].decode()
        self.working = bool(fields.get(6, [0])[0])
        self.shortage = fields_of(fields[5][0]) if 5 in fields else None
        self.body = {field: fields_of(values[0]) for field, values in fields.items() if field >= 10}


# ---- ZMTP 3.0, as far as it is needed: a peer that libzmq would not be

ZMTP_GREETING = (b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL" + bytes(16) + b"\x00" +
                 bytes(31))
ZMTP_READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
ZMTP_MORE, ZMTP_LONG = 1, 2


def zmtp_connect(path):
    """A stream that has shaken hands with the ROUTER as a DEALER."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(5)
    sock.connect(path)
    sock.sendall(ZMTP_GREETING + ZMTP_READY)
    received = b""
    while b"READY" not in received:
        part = sock.recv(4096)
        if not part:
            raise ConnectionError("the ROUTER does not shake hands")
        received += part
    return sock


def zmtp_frame(payload, more=False):
    return struct.pack(">BQ", ZMTP_LONG | (ZMTP_MORE if more else 0), len(payload)) + payload


PING, CREATE, CLOSE, STEP, ABORT, ACQUIRE, FORK, CROP = 10, 11, 12, 13, 14, 15, 16, 20
STATUS, PLAN, EVICT = 30, 31, 32


class Client:
    """Attached, with a DEALER of its own."""

    def __init__(self, runtime_dir, role=WORKER, timeout_s=5, **options):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(timeout_s)
        self.timeout_s = timeout_s
        self.sequence = 0
        self.zmq_context = self.dealer = self.welcome = None
        try:
            self.socket.connect(os.path.join(runtime_dir, "attach.sock"))
            self.socket.send(hello(role=role, **options))
            self.welcome = self.receive_welcome()
            self.connect()
        except BaseException:
            self.close()
            raise

    def receive_welcome(self):
        packet, fds, _, _ = socket.recv_fds(self.socket, 2048, 8)
        if not packet:
            raise ConnectionError("hung up without a word")
        if struct.unpack_from("<4I", packet)[1] == REFUSE:
            values = struct.unpack(REFUSE_FORMAT, packet)
            raise Refused(values[4], values[5], values[6], text_of(values[8]))
        return Welcome(packet, fds)

    def connect(self):
        """A new DEALER: as after a reconnect, with a new identity."""
        if self.dealer is not None:
            self.dealer.close(0)
        self.zmq_context = self.zmq_context or zmq.Context()
        self.dealer = self.zmq_context.socket(zmq.DEALER)
        self.dealer.setsockopt(zmq.LINGER, 0)
        self.dealer.setsockopt(zmq.RECONNECT_IVL, 20)
        self.dealer.connect(self.welcome.endpoint)

    def request(self, field, body=b"", sequence=None, session=None, token=None):
        """The bytes of a request; without `sequence` the next one is used."""
        if sequence is None:
            self.sequence += 1
            sequence = self.sequence
        return (number(1, sequence) + number(2, self.welcome.session if session is None else session)
                + data(3, self.welcome.token if token is None else token) + data(field, body))

    def send(self, message):
        self.dealer.send(message)

    def receive(self, timeout_s=None):
        if not self.dealer.poll(int(1000 * (timeout_s or self.timeout_s))):
            raise TimeoutError("no reply")
        return Reply(self.dealer.recv())

    def ask(self, field, body=b"", timeout_s=None, **options):
        """Sends, and waits for the reply with that sequence; repeats of others are skipped."""
        message = self.request(field, body, **options)
        sequence = fields_of(message).get(1, [0])[0]
        self.send(message)
        while True:
            reply = self.receive(timeout_s)
            if reply.sequence == sequence:
                return reply

    def ask_patiently(self, field, body=b"", timeout_s=10, every_s=0.2):
        """As the library does: the same message again and again until it is answered."""
        message = self.request(field, body)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.send(message)
            if self.dealer.poll(int(1000 * every_s)):
                reply = Reply(self.dealer.recv())
                if reply.sequence == self.sequence and not reply.working:
                    return reply
        raise TimeoutError("no reply")

    def ping(self, payload=b"x", timeout_s=None):
        reply = self.ask(PING, data(1, payload), timeout_s)
        assert reply.code == 0, reply.text
        assert reply.body[PING][1] == [payload]
        return reply

    def hung_up(self, timeout_s=5):
        """Whether the daemon closes the attach socket in time; packets before that are skipped."""
        self.socket.settimeout(timeout_s)
        try:
            while self.socket.recv(2048):
                pass
            return True
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False
        finally:
            self.socket.settimeout(self.timeout_s)

    def post_step(self, step):
        """Posts `step` on the control page, as one who has ended that step."""
        with mmap.mmap(self.welcome.fds[0], self.welcome.page_bytes) as page:
            page[64:72] = struct.pack("<Q", step)
            wake, = struct.unpack_from("<I", page, 72)
            page[72:76] = struct.pack("<I", wake + 1 & 0xFFFFFFFF)

    def give_back(self):
        """Says RECLAIMED for every extent that was sent or asked back and not yet read here."""
        self.socket.setblocking(False)
        try:
            while True:
                packet, fds, _, _ = socket.recv_fds(self.socket, 2048, 8)
                for fd in fds:
                    os.close(fd)
                if not packet:
                    break
                kind, = struct.unpack_from("<4xI", packet)
                if kind in (EXTENT, RECLAIM):
                    session, extent = struct.unpack_from("<16xII", packet)
                    self.reclaimed(extent, session)
        except OSError:
            pass
        self.socket.settimeout(self.timeout_s)

    def reclaimed(self, extent, session=None):
        session = self.welcome.session if session is None else session
        self.socket.send(struct.pack(RECLAIM_FORMAT, ATTACH_MAGIC, RECLAIMED, 24, 0, session,
                                     extent))

    def take_extents(self, answer=True, quiet_s=0.3):
        """Reads until it is quiet. Returns what was sent and what was asked back, two sets of
        (session, extent); with `answer` each is given back when it is asked for."""
        sent, asked = set(), set()
        self.socket.settimeout(quiet_s)
        try:
            while True:
                packet, fds, _, _ = socket.recv_fds(self.socket, 2048, 8)
                for fd in fds:
                    os.close(fd)
                if not packet:
                    raise ConnectionError("hung up")
                kind, = struct.unpack_from("<4xI", packet)
                session, extent = struct.unpack_from("<16xII", packet)
                (sent if kind == EXTENT else asked).add((session, extent))
                if kind == RECLAIM and answer:
                    self.reclaimed(extent, session)
        except TimeoutError:
            return sent, asked
        finally:
            self.socket.settimeout(self.timeout_s)

    def close(self, give_back=True):
        """give_back False: as one who closes the socket and goes on mapping its extents."""
        if give_back and self.welcome is not None:
            self.give_back()
        for fd in self.welcome.fds if self.welcome else []:
            os.close(fd)
        if self.welcome:
            self.welcome.fds = []
        if self.dealer is not None:
            self.dealer.close(0)
        if self.zmq_context is not None:
            self.zmq_context.destroy(0)
        self.dealer = self.zmq_context = None
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        self.close()
