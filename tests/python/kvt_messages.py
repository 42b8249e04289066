"""The control messages of PROTOCOL.md, section 9, and a protobuf codec that suffices for them. It
knows nothing of proto/kvtier.proto, so that the two can be compared.
"""

import struct

# name: (field number, type). Types: uint (uint32, uint64), bool, double, bytes, string, or the name
# of a message; a list of one type is a repeated field, of numbers packed.

SCHEMA = {
    "Ping": {"payload": (1, "bytes")},
    "Layer": {"kind": (1, "uint"), "kv_heads": (2, "uint"), "k_head_dim": (3, "uint"),
              "v_head_dim": (4, "uint"), "dtype": (5, "uint"), "last_reader_plus_1": (6, "uint"),
              "window": (7, "uint"), "sinks": (8, "uint"), "state_bytes": (9, "uint"),
              "repeat": (10, "uint")},
    "CacheOptions": {"layers": (1, ["Layer"]), "mode": (2, "uint"), "codec": (3, "uint"),
                     "rows": (4, "uint"), "tokens_max": (5, "uint"), "append_max": (6, "uint"),
                     "piece_tokens": (7, "uint"), "resident_layers_max_plus_1": (8, "uint"),
                     "fingerprint": (9, "bytes"), "name": (10, "string")},
    "Create": {"options": (1, "CacheOptions")},
    "Created": {"cache": (1, "uint"), "slots": (2, "uint"), "slot_bytes": (3, "uint"),
                "resident_layers": (4, "uint")},
    "Close": {"cache": (1, "uint")},
    "CacheRef": {"cache": (1, "uint")},
    "StepRow": {"row": (1, "uint"), "tokens": (2, "uint")},
    "Step": {"cache": (1, "uint"), "rows": (2, ["StepRow"]), "tokens": (3, "uint"),
             "steps": (4, "uint")},
    "Schedule": {"cache": (1, "uint"), "first_step": (2, "uint"), "steps": (3, "uint"),
                 "ring_offset": (4, "uint"), "ring_bytes": (5, "uint"), "lengths": (6, ["uint"])},
    "Abort": {"first_step": (1, "uint")},
    "Acquire": {"cache": (1, "uint"), "layer": (2, "uint"), "tokens": (3, "uint")},
    "Fork": {"cache": (1, "uint"), "rows": (2, ["uint"])},
    "Rows": {"cache": (1, "uint"), "rows": (2, ["uint"])},
    "Repeat": {"cache": (1, "uint"), "times": (2, "uint")},
    "Crop": {"cache": (1, "uint"), "lengths": (2, ["uint"])},
    "CacheInfo": {"cache": (1, "uint"), "lengths": (2, ["uint"]), "committed_step": (3, "uint")},
    "Status": {"devices": (1, "bool"), "workers": (2, "bool"), "caches": (3, "bool"),
               "offset": (4, "uint")},
    "Tier": {"name": (1, "string"), "budget_bytes": (2, "uint"), "used_bytes": (3, "uint"),
             "pinned_by_dead_bytes": (4, "uint"), "link_to_bytes_per_s": (5, "uint"),
             "link_from_bytes_per_s": (6, "uint"), "live_bytes": (7, "uint"), "uuid": (8, "bytes")},
    "Counters": {"to_device_bytes": (1, "uint"), "from_device_bytes": (2, "uint"),
                 "prefetch_discarded_bytes": (3, "uint"), "migrated_bytes": (4, "uint"),
                 "copied_on_write_bytes": (5, "uint"), "steps_committed": (6, "uint"),
                 "steps_failed": (7, "uint"), "tokens_appended": (8, "uint"),
                 "compacted_bytes": (9, "uint")},
    "Worker": {"session": (1, "uint"), "name": (2, "string"), "uid": (3, "uint"),
               "pid": (4, "uint"), "kind": (5, "uint"), "device": (6, "string"),
               "state": (7, "string"), "device_bytes": (8, "uint"), "host_bytes": (9, "uint"),
               "caches": (10, "uint"), "counters": (11, "Counters"), "idle_ms": (12, "uint"),
               "step_ns": (13, "uint"), "ceiling_fraction": (14, "double")},
    "Cache": {"cache": (1, "uint"), "session": (2, "uint"), "name": (3, "string"),
              "mode": (4, "uint"), "rows": (5, "uint"), "tokens_longest": (6, "uint"),
              "tokens_total": (7, "uint"), "device_bytes": (8, "uint"), "host_bytes": (9, "uint"),
              "layers": (10, "bytes"), "counters": (11, "Counters"),
              "need_to_device_bytes": (12, "uint"), "need_from_device_bytes": (13, "uint")},
    "StatusReply": {"version": (1, "string"), "uptime_ms": (2, "uint"), "tiers": (3, ["Tier"]),
                    "workers": (4, ["Worker"]), "caches": (5, ["Cache"]),
                    "next_offset": (6, "uint"), "counters": (7, "Counters")},
    "Plan": {"options": (1, "CacheOptions"), "tokens": (2, "uint"), "worker_kind": (3, "uint"),
             "device": (4, "uint"), "device_budget_bytes": (5, "uint"), "cache": (6, "uint")},
    "PlanReply": {"resident_layers": (1, "uint"), "slots": (2, "uint"), "slot_bytes": (3, "uint"),
                  "device_bytes": (4, "uint"), "host_bytes": (5, "uint"),
                  "to_device_bytes_per_step": (6, "uint"),
                  "from_device_bytes_per_step": (7, "uint"), "link_bytes_per_s": (8, "uint"),
                  "steps_per_s_max": (9, "double"), "ceiling_fraction": (10, "double"),
                  "layers": (11, "bytes"), "link_from_bytes_per_s": (12, "uint"),
                  "to_device_ns_per_step": (13, "uint"), "from_device_ns_per_step": (14, "uint"),
                  "tokens_per_s_max": (15, "double"), "step_ns": (16, "uint"),
                  "link_workers": (17, "uint")},
    "Shortage": {"tier": (1, "string"), "need_bytes": (2, "uint"), "available_bytes": (3, "uint"),
                 "budget_bytes": (4, "uint"), "worker_max_bytes": (5, "uint")},
    "Evict": {"session": (1, "uint"), "kill": (2, "bool")},
    "Evicted": {"host_bytes": (1, "uint"), "device_bytes": (2, "uint"), "pinned_bytes": (3, "uint"),
                "draining_bytes": (4, "uint")},
    "Request": {"sequence": (1, "uint"), "session": (2, "uint"), "token": (3, "bytes"),
                "ping": (10, "Ping"), "create": (11, "Create"), "close": (12, "Close"),
                "step": (13, "Step"), "abort": (14, "Abort"), "acquire": (15, "Acquire"),
                "fork": (16, "Fork"), "reorder": (17, "Rows"), "repeat": (18, "Repeat"),
                "select": (19, "Rows"), "crop": (20, "Crop"), "reset": (21, "CacheRef"),
                "status": (30, "Status"), "plan": (31, "Plan"), "evict": (32, "Evict")},
    "Reply": {"sequence": (1, "uint"), "boot_epoch": (2, "uint"), "code": (3, "uint"),
              "text": (4, "string"), "working": (6, "bool"), "shortage": (5, "Shortage"),
              "ping": (10, "Ping"), "created": (11, "Created"), "schedule": (13, "Schedule"),
              "cache": (16, "CacheInfo"), "status": (30, "StatusReply"),
              "plan": (31, "PlanReply"), "evicted": (32, "Evicted")},
}
DEFAULTS = {"uint": 0, "bool": False, "double": 0.0, "bytes": b"", "string": ""}


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def _encode_value(kind, value):
    """(wire type, bytes) of one value."""
    if kind in ("uint", "bool"):
        return 0, varint(int(value))
    if kind == "double":
        return 1, struct.pack("<d", value)
    if kind == "string":
        value = value.encode()
    elif kind != "bytes":
        value = encode(kind, value)
    return 2, varint(len(value)) + value


def encode(message, values):
    """The bytes of a message from {field: value}; fields at their default are left out."""
    out = b""
    for name, (field, kind) in SCHEMA[message].items():
        if name not in values:
            continue
        value = values[name]
        if not isinstance(kind, list) and value == DEFAULTS.get(kind):
            continue
        if kind == ["uint"]:
            if value:
                packed = b"".join(varint(int(v)) for v in value)
                out += varint(field << 3 | 2) + varint(len(packed)) + packed
            continue
        for one in value if isinstance(kind, list) else [value]:
            wire, raw = _encode_value(kind[0] if isinstance(kind, list) else kind, one)
            out += varint(field << 3 | wire) + raw
    unknown = set(values) - set(SCHEMA[message])
    assert not unknown, f"{message} has no {unknown}"
    return out


class Reader:
    def __init__(self, raw):
        self.raw, self.at = raw, 0

    def varint(self):
        value = shift = 0
        while True:
            byte = self.raw[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def take(self, count):
        if self.at + count > len(self.raw):
            raise ValueError("truncated")
        self.at += count
        return self.raw[self.at - count:self.at]

    def field(self):
        key = self.varint()
        wire = key & 7
        if wire == 0:
            return key >> 3, self.varint()
        if wire == 1:
            return key >> 3, self.take(8)
        if wire == 2:
            return key >> 3, self.take(self.varint())
        if wire == 5:
            return key >> 3, self.take(4)
        raise ValueError(f"wire type {wire}")


def _decode_value(kind, value):
    if kind == "bool":
        return value != 0
    if kind == "double":
        return struct.unpack("<d", value)[0]
    if kind == "string":
        return value.decode()
    return value if kind in ("uint", "bytes") else decode(kind, value)


def decode(message, raw):
    """{field: value} with every field, those that are absent at their default (messages: None)."""
    fields = {field: (name, kind) for name, (field, kind) in SCHEMA[message].items()}
    out = {name: [] if isinstance(kind, list) else DEFAULTS.get(kind)
           for name, (_, kind) in SCHEMA[message].items()}
    reader = Reader(raw)
    while reader.at < len(raw):
        field, value = reader.field()
        if field not in fields:
            continue
        name, kind = fields[field]
        if kind == ["uint"]:
            packed = Reader(value) if isinstance(value, bytes) else None
            while packed is not None and packed.at < len(value):
                out[name].append(packed.varint())
            if packed is None:
                out[name].append(value)
        elif isinstance(kind, list):
            out[name].append(_decode_value(kind[0], value))
        else:
            out[name] = _decode_value(kind, value)
    return out
