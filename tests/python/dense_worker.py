"""A dense worker on kvt_client, and a model of every correct byte.

It steps as frameworks do: `done` of a layer comes when the next layer is begun, that of a layer that
is read again behind its last reader's successor, the last ones at the end of the step. Each plane
that a piece shows is compared with the model before the new tokens are written, and a layer that is
read again is compared with them in it at each later reader. The model also knows which blocks rows
share, so it can say what a step moves at the least.
"""

import itertools

import numpy

import kvt_client

ELEMENT = {1: numpy.uint32, 2: numpy.uint16, 3: numpy.uint16, 4: numpy.uint8, 5: numpy.uint8}
_serial = itertools.count(1)


def layer(kv_heads=2, k_head_dim=64, v_head_dim=32, dtype=2, last_reader=None):
    return {"kind": 1, "kv_heads": kv_heads, "k_head_dim": k_head_dim, "v_head_dim": v_head_dim,
            "dtype": dtype, "last_reader_plus_1": 0 if last_reader is None else last_reader + 1}


def token_bytes(l, plane):
    dim = l["k_head_dim"] if plane == 0 else l["v_head_dim"]
    return l["kv_heads"] * dim * numpy.dtype(ELEMENT[l["dtype"]]).itemsize


def layer_bytes(l):
    return token_bytes(l, 0) + token_bytes(l, 1)


def pattern(serial, index, plane, shape, element):
    """Recognisable bytes: no two writes, layers, planes or elements have the same."""
    at = numpy.arange(int(numpy.prod(shape)), dtype=numpy.uint32)
    mixed = (at + numpy.uint32((serial * 1_000_003 + index * 7919 + plane * 104_729) % 2**32)) * \
        numpy.uint32(2_654_435_761)
    return (mixed ^ mixed >> numpy.uint32(15)).astype(element).reshape(shape)


class Block:
    """Tokens that rows may share."""

    def __init__(self):
        self.full = False  # ever


class Row:
    def __init__(self, layout):
        self.layout = layout
        self.length = 0
        self.blocks = []
        self.planes = []  # [layer][plane]: [token][kv_head][head_dim]
        for l in layout:
            self.planes.append([numpy.zeros((0, l["kv_heads"], dim), ELEMENT[l["dtype"]])
                                for dim in (l["k_head_dim"], l["v_head_dim"])])

    def copy(self):
        row = Row(self.layout)
        row.length, row.blocks = self.length, list(self.blocks)
        row.planes = [list(planes) for planes in self.planes]
        return row

    def crop(self, length, block_tokens):
        if length < self.length:
            self.length = length
            self.blocks = self.blocks[:-(-length // block_tokens)]
            self.planes = [[p[:length] for p in planes] for planes in self.planes]


class Cache:
    def __init__(self, worker, number, layout, rows):
        self.worker, self.number, self.layout, self.rows = worker, number, layout, rows
        self.at_start = {}

    @property
    def lengths(self):
        return [row.length for row in self.rows]


class Aborted(Exception):
    pass


class DenseWorker:
    def __init__(self, client):
        self.client = client
        self.block_tokens = client.welcome["block_tokens"]
        self.caches = []
        self.streamed_pieces = self.resident_pieces = self.moves = 0

    # ---- caches

    def create(self, layout, mode, rows=1, tokens_max=0, append_max=512, **options):
        reply = self.client.ask("create", options={
            "layers": layout, "mode": mode, "rows": rows, "tokens_max": tokens_max,
            "append_max": append_max, **options})
        return self.adopt(reply["created"]["cache"], layout, rows)

    def adopt(self, number, layout, rows):
        cache = Cache(self, number, layout, [Row(layout) for _ in range(rows)])
        self.caches.append(cache)
        return cache

    def close(self, cache):
        self.client.ask("close", cache=cache.number)
        self.caches.remove(cache)

    def edit(self, cache, body, outcome, **values):
        """An edit whose outcome is that the cache has these rows (of the model)."""
        info = self.client.ask(body, cache=cache.number, **values)["cache"]
        assert info["cache"] == cache.number
        cache.rows = outcome
        assert info["lengths"] == cache.lengths

    def reorder(self, cache, order):
        self.edit(cache, "reorder", [cache.rows[i].copy() for i in order], rows=order)

    def select(self, cache, order):
        self.edit(cache, "select", [cache.rows[i].copy() for i in order], rows=order)

    def repeat(self, cache, times):
        rows = [row.copy() for row in cache.rows for _ in range(times)]
        self.edit(cache, "repeat", rows, times=times)

    def crop(self, cache, lengths):
        for row, length in zip(cache.rows, lengths * len(cache.rows) if len(lengths) == 1
                               else lengths):
            row.crop(length, self.block_tokens)
        self.edit(cache, "crop", cache.rows, lengths=lengths)

    def reset(self, cache):
        self.edit(cache, "reset", [Row(cache.layout) for _ in cache.rows])

    def fork(self, cache, order=None):
        info = self.client.ask("fork", cache=cache.number, rows=order or [])["cache"]
        rows = [cache.rows[i].copy() for i in (order or range(len(cache.rows)))]
        forked = Cache(self, info["cache"], cache.layout, rows)
        assert info["lengths"] == forked.lengths
        self.caches.append(forked)
        return forked

    # ---- the minimum

    def _references(self, block):
        return sum(b is block for c in self.caches for row in c.rows for b in row.blocks)

    def _copy_tails(self, cache, tokens):
        """What STEP does first: who would write a shared or once full block gets a copy of it.
        Returns the tokens that are copied, and what an abort may undo."""
        copied, changes, leaving = 0, [], {}  # changes: (row, old tail)
        for row, n in zip(cache.rows, tokens):
            inside = row.length % self.block_tokens
            if n > 0 and inside > 0:
                tail = row.blocks[-1]
                others = self._references(tail) - 1 - leaving.get(id(tail), 0)
                if tail.full or others > 0:  # the last one keeps it
                    leaving[id(tail)] = leaving.get(id(tail), 0) + 1
                    changes.append((row, tail))
                    copied += inside
        for row, _ in changes:
            row.blocks[-1] = Block()
        return copied, changes

    def _read_tokens(self, cache):
        """Tokens that cross towards the device in a streamed layer: each distinct block once."""
        most = {}
        for row in cache.rows:
            for i, block in enumerate(row.blocks):
                here = min(self.block_tokens, row.length - i * self.block_tokens)
                most[id(block)] = max(most.get(id(block), 0), here)
        return sum(most.values())

    def _append(self, cache, tokens, new):
        for row, n, planes in zip(cache.rows, tokens, new):
            before = row.length // self.block_tokens
            row.length += n
            while len(row.blocks) * self.block_tokens < row.length:
                row.blocks.append(Block())
            for block in row.blocks[before:row.length // self.block_tokens]:
                block.full = True
            for index, pair in planes.items():
                row.planes[index] = [numpy.concatenate((old, more))
                                     for old, more in zip(row.planes[index], pair)]

    def counters(self, cache):
        listed = next(c for c in self.client.status()["caches"] if c["cache"] == cache.number)
        return listed

    # ---- a step

    def step(self, cache, tokens=1, steps=1, body="step", abort_at=None):
        """`tokens`: of each row, or one number for all. Checks the counters to the byte. abort_at:
        (step of the schedule, layer) at which the worker gives up. Returns the steps granted."""
        every = not isinstance(tokens, list)
        per_row = [tokens] * len(cache.rows) if every else tokens
        before = self.counters(cache)
        values = {"cache": cache.number}
        if every:
            values["tokens"] = tokens
        else:
            values["rows"] = [{"row": i, "tokens": n} for i, n in enumerate(tokens)]
        if body == "step":
            values["steps"] = steps
        schedule = self.client.open(body, **values)
        assert schedule.lengths == cache.lengths
        assert 1 <= schedule.steps <= steps
        copied, changes = self._copy_tails(cache, per_row)
        streamed = sum(layer_bytes(cache.layout[p.layer]) for p in schedule.steps_list[0]
                       if p.flags & kvt_client.STREAMED)
        expected = {"to": 0, "from": 0, "cow": copied * streamed, "last": None}
        for at, pieces in enumerate(schedule.steps_list):
            try:
                self._one(cache, schedule, at, pieces, per_row, expected,
                          abort_at[1] if abort_at and abort_at[0] == at else None)
            except Aborted:
                self.client.abort(schedule.first_step + at)
                if at == 0 and self._grown(cache, before)["copied_on_write_bytes"] < expected["cow"]:
                    for row, tail in changes:  # the copies were not all made: they are undone
                        row.blocks[-1] = tail
                return at
        self.client.settle(schedule.last_step)
        self._check_counters(cache, before, expected, schedule.steps, sum(per_row))
        return schedule.steps

    def _one(self, cache, schedule, at, pieces, tokens, expected, abort_layer):
        step = schedule.first_step + at
        assert [p.layer for p in pieces] == list(range(len(cache.layout)))
        new = [{} for _ in cache.rows]
        serial = next(_serial)
        held, due, to_bytes, from_bytes = {}, [], 0, 0
        read_tokens = self._read_tokens(cache)
        for piece in pieces:
            for late in due:  # one layer late: the next one is begun
                self.client.done(late)
            due = []
            self.client.wait(piece, step)
            if piece.layer == abort_layer:
                raise Aborted
            planes = self._planes(cache, schedule, piece, tokens)
            for i, row in enumerate(cache.rows):
                self._compare(cache, piece, i, planes, row.length, {})
                new[i][piece.layer] = self._write(cache, piece, i, planes, tokens[i], serial)
            held[piece.layer] = (piece, planes)
            for number in list(held):
                again, shown = held[number]
                if number != piece.layer:  # read again by this layer, the new tokens included
                    for i, row in enumerate(cache.rows):
                        self._compare(cache, again, i, shown, row.length + tokens[i], new[i])
                if again.last_reader <= piece.layer:
                    due.append(again)
                    del held[number]
            if piece.flags & kvt_client.STREAMED:
                bytes_ = layer_bytes(cache.layout[piece.layer])
                to_bytes += read_tokens * bytes_
                from_bytes += sum(tokens) * bytes_
                self.streamed_pieces += 1
            else:
                self.resident_pieces += 1
            self.moves += piece.move_count
        assert not held
        for late in due:
            self.client.done(late)
        self.client.end_step(step)
        self._append(cache, tokens, new)
        expected["to"] += to_bytes
        expected["from"] += from_bytes
        expected["last"] = (to_bytes, from_bytes)

    def _planes(self, cache, schedule, piece, tokens):
        """The piece's K and V as [row][token][kv_head][head_dim], views of the extent. Its runs say
        the same as the planes and the reply."""
        l = cache.layout[piece.layer]
        extent = self.client.extent(piece.extent)
        rows, capacity = len(cache.rows), piece.token_capacity
        element = ELEMENT[l["dtype"]]
        planes = []
        for plane, (offset, stride, dim) in enumerate((
                (piece.k_offset, piece.k_row_bytes, l["k_head_dim"]),
                (piece.v_offset, piece.v_row_bytes, l["v_head_dim"]))):
            bytes_ = token_bytes(l, plane)
            if dim == 0:
                planes.append(numpy.zeros((rows, capacity, l["kv_heads"], 0), element))
                continue
            assert stride >= capacity * bytes_ and offset % 256 == 0
            whole = extent[offset:offset + (rows - 1) * stride + capacity * bytes_].view(element)
            size = element().itemsize
            planes.append(numpy.lib.stride_tricks.as_strided(
                whole, (rows, capacity, l["kv_heads"], dim),
                (stride, bytes_, dim * size, size)))
        runs = schedule.runs_of(piece)
        assert len(runs) == rows and piece.flags & kvt_client.LAST and piece.reader == piece.layer
        for i, (run, row) in enumerate(zip(runs, cache.rows)):
            assert schedule.rows[run.row_first:run.row_first + run.row_count] == (i,)
            assert (run.token_begin, run.read_count, run.append_count) == (0, row.length, tokens[i])
            assert run.k_offset == piece.k_offset + i * piece.k_row_bytes
            assert row.length + tokens[i] <= capacity
        return planes

    @staticmethod
    def _compare(cache, piece, i, planes, length, new):
        for plane in range(2):
            right = cache.rows[i].planes[piece.layer][plane]
            if new:
                right = numpy.concatenate((right, new[piece.layer][plane]))
            assert len(right) == length
            if not numpy.array_equal(planes[plane][i, :length], right):
                wrong = numpy.nonzero((planes[plane][i, :length] != right).any(axis=(1, 2)))[0]
                raise AssertionError(
                    f"cache {cache.number:#x}: layer {piece.layer}, row {i}, {'KV'[plane]}: "
                    f"{len(wrong)} wrong tokens of {length}, first {wrong[0]}, last {wrong[-1]}; "
                    f"{piece}")

    @staticmethod
    def _write(cache, piece, i, planes, tokens, serial):
        length = cache.rows[i].length
        written = []
        for plane in range(2):
            target = planes[plane][i, length:length + tokens]
            value = pattern(serial * 1024 + i, piece.layer, plane, target.shape, target.dtype.type)
            target[...] = value
            written.append(value)
        return written

    def _grown(self, cache, before):
        after = self.counters(cache)["counters"]
        return {name: after[name] - before["counters"][name] for name in after}

    def _check_counters(self, cache, before, expected, steps, tokens):
        after = self.counters(cache)
        grown = self._grown(cache, before)
        want = {"to_device_bytes": expected["to"], "from_device_bytes": expected["from"],
                "copied_on_write_bytes": expected["cow"], "steps_committed": steps,
                "steps_failed": 0, "tokens_appended": steps * tokens}
        moved = {name: grown[name] for name in want}
        assert moved == want, f"moved {moved}, at least {want}"
        assert (after["need_to_device_bytes"], after["need_from_device_bytes"]) == expected["last"]
        assert after["tokens_total"] == sum(cache.lengths)
        assert after["tokens_longest"] == max(cache.lengths)
