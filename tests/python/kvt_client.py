"""A client of kvtierd, made from PROTOCOL.md alone: sockets, shared memory, numpy, ZeroMQ, and the
messages of kvt_messages.py. It shares no code, header or generated file with the daemon or the
library, so what it can do is what the document says. Numbers in brackets are PROTOCOL.md's sections.

One thread. The attach socket is served whenever the client waits or asks for something.
"""

import collections
import ctypes
import mmap
import os
import platform
import select
import socket
import struct
import time

import numpy
import zmq

from kvt_messages import decode, encode

# ---- [2] attach -------------------------------------------------------------------------------------

ATTACH_MAGIC = 0x4154564B
HELLO, WELCOME, REFUSE, EXTENT, RECLAIM, RECLAIMED = 1, 2, 3, 4, 5, 6
WORKER, CONTROL = 1, 2
SEGMENT, DENSE = 1, 2
HEAD = struct.Struct("<4I")
HELLO_BODY = struct.Struct("<II Q IIII 16s 64s")
WELCOME_BODY = struct.Struct("<II QQQ IIII 16s 16s 64s 64s 128s")
REFUSE_BODY = struct.Struct("<IIII 512s")
EXTENT_BODY = struct.Struct("<IIII Q 64s")
RECLAIM_BODY = struct.Struct("<II")
WELCOME_FIELDS = ("protocol_major protocol_minor features boot_epoch ring_bytes session "
                  "block_tokens control_page_bytes extent_kind token device device_name "
                  "server_version endpoint").split()


def packet(kind, body):
    return HEAD.pack(ATTACH_MAGIC, kind, HEAD.size + len(body), 0) + body


def hello(role=WORKER, worker_kind=DENSE, major=1, minor=0, features=0, extent_kind=0,
          device=bytes(16), name=b"python"):
    return packet(HELLO, HELLO_BODY.pack(major, minor, features, role, worker_kind, extent_kind, 0,
                                         device, name))


def reclaimed(session, extent):
    return packet(RECLAIMED, RECLAIM_BODY.pack(session, extent))


def text_of(raw):
    return raw.split(b"\0")[0].decode()


def read_welcome(raw):
    values = dict(zip(WELCOME_FIELDS, WELCOME_BODY.unpack(raw[HEAD.size:])))
    for name in ("device_name", "server_version", "endpoint"):
        values[name] = text_of(values[name])
    return values


class Refused(Exception):
    def __init__(self, raw):
        self.code, self.major, self.minor, _, text = REFUSE_BODY.unpack(raw[HEAD.size:])
        super().__init__(text_of(text))


class Gone(Exception):
    """[7] the session is over."""


class Failed(Exception):
    """[7] the step failed."""

    def __init__(self, step, code):
        super().__init__(f"step {step} failed with code {code}")
        self.step, self.code = step, code


class Error(Exception):
    """A reply with an error."""

    def __init__(self, reply):
        super().__init__(reply["text"])
        self.code = reply["code"]


# ---- [3] control page ---------------------------------------------------------------------------------

PAGE_MAGIC = 0x5054564B
PAGE_HEAD = struct.Struct("<4I Q I")
STEP_AT, COMMITTED_AT, FAILED_AT, READY_AT, DONE_AT, COUNTER_BYTES = 64, 128, 192, 256, 4352, 64
POISON = 1 << 62
FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]
FUTEX_WAIT, FUTEX_WAKE = 0, 1
_libc = ctypes.CDLL(None, use_errno=True)


class Timespec(ctypes.Structure):
    _fields_ = [("s", ctypes.c_long), ("ns", ctypes.c_long)]


class Counter:
    """Aligned words of shared memory: each is read and written by one instruction."""

    def __init__(self, page, offset):
        self.value_word = ctypes.c_uint64.from_buffer(page, offset)
        self.wake = ctypes.c_uint32.from_buffer(page, offset + 8)
        self.waiters = ctypes.c_uint32.from_buffer(page, offset + 12)
        self.aux = ctypes.c_uint32.from_buffer(page, offset + 16)

    @property
    def value(self):
        return self.value_word.value

    def reached(self, wanted):
        return (self.value - wanted) % 2**64 < 2**63

    def post(self, value):
        self.value_word.value = value
        self.wake.value = (self.wake.value + 1) % 2**32
        # The system call is also the barrier that plain stores lack: it is made always.
        _libc.syscall(FUTEX, ctypes.byref(self.wake), FUTEX_WAKE, 2**31 - 1, None, None, 0)

    def sleep(self, wanted, ms):
        self.waiters.value = 1
        seen = self.wake.value
        if not self.reached(wanted):
            limit = Timespec(ms // 1000, ms % 1000 * 10**6)
            _libc.syscall(FUTEX, ctypes.byref(self.wake), FUTEX_WAIT, ctypes.c_uint32(seen),
                          ctypes.byref(limit), None, 0)
        self.waiters.value = 0

    def poison(self):
        if self.value < POISON:
            self.post(self.value + POISON)


class Page:
    def __init__(self, fd, welcome):
        self.memory = mmap.mmap(fd, welcome["control_page_bytes"])
        magic, version, size, slots, epoch, session = PAGE_HEAD.unpack_from(self.memory)
        assert (magic, version, size, slots) == (PAGE_MAGIC, 1, 12288, 64)
        assert (epoch, session) == (welcome["boot_epoch"], welcome["session"])
        self.step = Counter(self.memory, STEP_AT)
        self.committed = Counter(self.memory, COMMITTED_AT)
        self.failed = Counter(self.memory, FAILED_AT)
        self.ready = [Counter(self.memory, READY_AT + COUNTER_BYTES * s) for s in range(64)]
        self.done = [Counter(self.memory, DONE_AT + COUNTER_BYTES * s) for s in range(64)]

    def poison(self):
        for counter in (self.step, self.committed, self.failed, *self.ready, *self.done):
            counter.poison()


# ---- [6] schedule ring -------------------------------------------------------------------------------

SCHEDULE_MAGIC = 0x5354564B
SCHEDULE_HEAD = struct.Struct("<IIII Q 12I")
STEP_ENTRY = struct.Struct("<QII")
MOVE_ENTRY = struct.Struct("<II QQQ")
PIECE_ENTRY = struct.Struct("<10I 6Q II")
RUN_ENTRY = struct.Struct("<6I QQ")
STREAMED, LAST, REREAD = 1, 2, 4

Header = collections.namedtuple(
    "Header", "magic version bytes cache first_step steps_count moves_count moves_leading "
    "pieces_count runs_count rows_count steps_offset moves_offset pieces_offset runs_offset "
    "rows_offset reserved")
Move = collections.namedtuple(
    "Move", "source_extent target_extent source_offset target_offset bytes")
Piece = collections.namedtuple(
    "Piece", "layer reader last_reader flags slot extent run_first run_count move_first move_count "
    "ready done k_offset v_offset k_row_bytes v_row_bytes token_capacity reserved")
Run = collections.namedtuple(
    "Run", "row_first row_count token_begin read_count append_count reserved k_offset v_offset")


class Schedule:
    """A schedule in the ring, and the reply that named it."""

    def __init__(self, ring, reply):
        self.cache, self.first_step, self.steps = reply["cache"], reply["first_step"], reply["steps"]
        self.lengths = reply["lengths"]
        self.raw = bytes(ring[reply["ring_offset"]:reply["ring_offset"] + reply["ring_bytes"]])
        self.header = h = Header(*SCHEDULE_HEAD.unpack_from(self.raw))
        assert reply["ring_offset"] % 8 == 0
        assert (h.magic, h.version, h.cache) == (SCHEDULE_MAGIC, 1, self.cache)
        assert h.bytes <= len(self.raw)
        assert (h.first_step, h.steps_count) == (self.first_step, self.steps)
        self.moves = self._entries(Move, MOVE_ENTRY, h.moves_offset, h.moves_count)
        self.pieces = self._entries(Piece, PIECE_ENTRY, h.pieces_offset, h.pieces_count)
        self.runs = self._entries(Run, RUN_ENTRY, h.runs_offset, h.runs_count)
        self.rows = struct.unpack_from(f"<{h.rows_count}I", self.raw, h.rows_offset)
        self.steps_list = []
        for at in range(h.steps_count):
            step, first, count = STEP_ENTRY.unpack_from(self.raw, h.steps_offset + 16 * at)
            assert step == self.first_step + at
            self.steps_list.append(self.pieces[first:first + count])

    def _entries(self, kind, entry, offset, count):
        assert count == 0 or SCHEDULE_HEAD.size <= offset <= len(self.raw) - count * entry.size
        return [kind(*entry.unpack_from(self.raw, offset + entry.size * at)) for at in range(count)]

    @property
    def leading(self):
        return self.moves[:self.header.moves_leading]

    def moves_of(self, piece):
        return self.moves[piece.move_first:piece.move_first + piece.move_count]

    def runs_of(self, piece):
        return self.runs[piece.run_first:piece.run_first + piece.run_count]

    @property
    def last_step(self):
        return self.first_step + self.steps - 1


# ---- the client -------------------------------------------------------------------------------------------


class Extent:
    def __init__(self, fd, size):
        self.fd, self.size, self.memory, self.bytes = fd, size, None, None

    def map(self):
        """The extent as bytes; mapped at the first use, and its descriptor closed then."""
        if self.memory is None:
            assert os.fstat(self.fd).st_size >= self.size
            self.memory = mmap.mmap(self.fd, self.size)
            self.bytes = numpy.frombuffer(self.memory, dtype=numpy.uint8)
            os.close(self.fd)
            self.fd = -1
        return self.bytes

    def unmap(self):
        self.bytes = None
        if self.memory is not None:
            self.memory.close()  # BufferError: somebody still holds a view
            self.memory = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Client:
    RESEND_S = 1.0

    def __init__(self, runtime_dir, timeout_s=30, role=WORKER, former=None, **options):
        """`former`: clients of this process before, whose extents may still be asked for."""
        self.timeout_s = timeout_s
        self.former = {c.session: c for c in former or []}
        self.sequence = 0
        self.gone = None
        self.extents = {}
        self.wanted = []  # RECLAIMs that wait for the end of the schedule
        self.reclaims = 0
        self.page = self.ring = self.schedule = None
        self.replies = {}
        self.attach = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.attach.settimeout(timeout_s)
        self.zmq_context = zmq.Context()
        self.dealer = self.zmq_context.socket(zmq.DEALER)
        self.dealer.setsockopt(zmq.LINGER, 0)
        self.dealer.setsockopt(zmq.RECONNECT_IVL, 50)
        try:
            self._handshake(runtime_dir, role, options)
        except BaseException:
            self.hang_up()
            raise

    def _handshake(self, runtime_dir, role, options):
        self.attach.connect(os.path.join(runtime_dir, "attach.sock"))
        if role == CONTROL:
            options.setdefault("worker_kind", 0)
        self.attach.send(hello(role=role, **options))
        raw, fds, _, _ = socket.recv_fds(self.attach, 1025, 2, socket.MSG_CMSG_CLOEXEC)
        if not raw:
            raise Gone("hung up before an answer")
        magic, kind, size, _ = HEAD.unpack_from(raw)
        assert (magic, size) == (ATTACH_MAGIC, len(raw))
        if kind == REFUSE:
            raise Refused(raw)
        assert kind == WELCOME
        self.welcome_bytes = raw
        self.welcome = read_welcome(raw)
        self.session = self.welcome["session"]
        if role == WORKER:
            page_fd, ring_fd = fds
            self.page = Page(page_fd, self.welcome)
            self.ring = mmap.mmap(ring_fd, self.welcome["ring_bytes"], mmap.MAP_SHARED,
                                  mmap.PROT_READ)
            os.close(page_fd)
            os.close(ring_fd)
        self.dealer.connect(self.welcome["endpoint"])

    # ---- [8] the attach socket

    def _take_packet(self, raw, fds):
        magic, kind, size, _ = HEAD.unpack_from(raw)
        assert (magic, size) == (ATTACH_MAGIC, len(raw))
        if kind == EXTENT:
            session, extent, share, _, bytes_, _ = EXTENT_BODY.unpack(raw[HEAD.size:])
            assert (session, share, len(fds)) == (self.session, 1, 1)
            assert extent != 0 and extent not in self.extents
            self.extents[extent] = Extent(fds[0], bytes_)
            return
        assert kind == RECLAIM, kind
        self.reclaims += 1
        self.wanted.append(RECLAIM_BODY.unpack(raw[HEAD.size:]))

    def _give_back(self):
        """Answers the RECLAIMs that nothing stands against. Simpler than it might be: while a
        schedule is open, none."""
        while self.wanted and self.schedule is None:
            session, number = self.wanted.pop()
            owner = self if session == self.session else self.former[session]
            if number in owner.extents:
                owner.extents.pop(number).unmap()
            self.attach.send(reclaimed(session, number))

    def serve(self, timeout_s=0.0):
        """Reads what the attach socket holds, waiting so long for the first packet."""
        while self.gone is None and select.select([self.attach], [], [], timeout_s)[0]:
            timeout_s = 0.0
            try:
                raw, fds, _, _ = socket.recv_fds(self.attach, 1025, 2, socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:
                raw, fds = b"", []
            if not raw:
                self.gone = "the attach socket was closed"
                if self.page is not None:
                    self.page.poison()
                break
            self._take_packet(raw, fds)
        if self.gone is not None:
            raise Gone(self.gone)
        self._give_back()

    def extent(self, number):
        deadline = time.monotonic() + self.timeout_s
        while number not in self.extents:
            assert time.monotonic() < deadline, f"extent {number} never came"
            self.serve(0.1)
        return self.extents[number].map()

    # ---- [4] requests

    def request_bytes(self, body, values, sequence=None):
        if sequence is None:
            self.sequence += 1
            sequence = self.sequence
        return encode("Request", {"sequence": sequence, "session": self.session,
                                  "token": self.welcome["token"], body: values})

    def send(self, body, **values):
        """Sends a request; returns its sequence, for `receive`."""
        self.dealer.send(self.request_bytes(body, values))
        return self.sequence

    def poll(self, timeout_s=0.0):
        """Takes replies and packets, waiting so long for the first one."""
        poller = zmq.Poller()
        poller.register(self.dealer, zmq.POLLIN)
        poller.register(self.attach, zmq.POLLIN)
        poller.poll(int(timeout_s * 1000))
        while self.dealer.poll(0):
            raw = self.dealer.recv()
            reply = decode("Reply", raw)
            assert reply["boot_epoch"] == self.welcome["boot_epoch"]
            reply["raw"] = raw
            if reply["working"]:  # the request was sent again and is still being carried out
                continue
            self.replies[reply["sequence"]] = reply
        self.serve()

    def receive(self, sequence, timeout_s=None):
        deadline = time.monotonic() + (timeout_s or self.timeout_s)
        while sequence not in self.replies:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no reply to {sequence}")
            self.poll(0.1)
        return self.replies.pop(sequence)

    def ask(self, body, **values):
        """A request and its reply, sent again every second; an error is raised."""
        message = self.request_bytes(body, values)
        sequence = self.sequence
        deadline = time.monotonic() + self.timeout_s
        while True:
            self.dealer.send(message)
            try:
                reply = self.receive(sequence, min(self.RESEND_S, self.timeout_s))
                break
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise
        if reply["code"] != 0:
            raise Error(reply)
        return reply

    def status(self):
        """StatusReply with everything, all parts of it together."""
        whole, offset = None, 0
        while True:
            part = self.ask("status", devices=offset == 0, workers=True, caches=True,
                            offset=offset)["status"]
            if whole is None:
                whole = part
            else:
                whole["workers"] += part["workers"]
                whole["caches"] += part["caches"]
            offset = part["next_offset"]
            if offset == 0:
                return whole

    # ---- [5] a step

    def open(self, body="step", **values):
        reply = self.ask(body, **values)["schedule"]
        return self.adopt(reply)

    def adopt(self, reply):
        self.schedule = Schedule(self.ring, reply)
        for move in self.schedule.leading:
            self.move(move)
        return self.schedule

    def move(self, m):
        source = self.extent(m.source_extent)[m.source_offset:m.source_offset + m.bytes]
        self.extent(m.target_extent)[m.target_offset:m.target_offset + m.bytes] = source

    def check(self, step):
        """[7] raises if the step has failed, or the session is over."""
        self.serve()
        failed = self.page.failed.value
        if failed != 0 and self.schedule.first_step <= failed <= step:
            raise Failed(failed, self.page.failed.aux.value)

    def wait(self, piece, step):
        self.check(step)
        if piece.flags & STREAMED:
            ready = self.page.ready[piece.slot]
            deadline = time.monotonic() + self.timeout_s
            while not ready.reached(piece.ready):
                assert time.monotonic() < deadline, f"no fill: {piece}"
                ready.sleep(piece.ready, 50)
                self.check(step)
            self.check(step)
        for move in self.schedule.moves_of(piece):
            self.move(move)

    def done(self, piece):
        if piece.flags & STREAMED:
            self.page.done[piece.slot].post(piece.done)

    def end_step(self, step):
        self.check(step)
        self.page.step.post(step)
        self.check(step)
        if step == self.schedule.last_step:
            self.close_schedule()

    def close_schedule(self):
        self.schedule = None
        self.serve()

    def give_up(self):
        """[7] behind a failure: the schedule ends."""
        self.page.step.post(self.schedule.last_step)
        self.close_schedule()

    def abort(self, first_step):
        """[7] ABORT, up to its answer."""
        sequence = self.send("abort", first_step=first_step)
        deadline = time.monotonic() + self.timeout_s
        while self.page.failed.value == 0 and sequence not in self.replies:
            assert time.monotonic() < deadline
            self.poll(0.001)
        failed = self.page.failed.value
        if failed != 0:
            assert self.page.failed.aux.value == 10  # EABORTED
            self.give_up()
        return self.receive(sequence)

    def settle(self, step):
        """Until the step is committed."""
        deadline = time.monotonic() + self.timeout_s
        while not self.page.committed.reached(step):
            assert time.monotonic() < deadline and self.page.failed.value == 0
            self.page.committed.sleep(step, 50)
            self.serve()

    # ---- the end

    def hang_up(self):
        """Closes without a word, as the end of a process does; mappings stay."""
        self.attach.close()
        self.zmq_context.destroy(0)
        self.gone = "hung up"

    def detach(self):
        """[8] gives every extent back, and closes."""
        if self.gone is None:
            self.serve()
            for number in list(self.extents):
                self.extents.pop(number).unmap()
                self.attach.send(reclaimed(self.session, number))
        self.hang_up()

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        if kind is None:
            self.detach()
        else:
            self.hang_up()
