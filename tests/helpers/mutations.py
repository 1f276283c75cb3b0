"""Ways to change the config and the weights of an adapter at random; each takes bytes and a source of numbers."""

import json
import struct

from runtime.adapter.config import CONTENT_SHA256, _content_sha256
from runtime.adapter.identity import file_sha256

# Values that no field of its kind has.
STRANGE = [
    None, True, 0, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, "", "x", "1", [], {}, [[]], [None], {"a": 1}, {"": {}},
    "../../etc/passwd", "/dev/zero", "__import__('os').system('touch bomb')", "!!python/object/apply:os.system [ls]",
    "\u202e\x00\n", "a" * 5000, list(range(2000)), {"2": 1.0, "4": 1.0}, ["2", "4"], [4, 2], [2, 2], 10**30,
]  # fmt: skip


def paths(value, path=()):
    """Where every value of a JSON object is."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*path, key))


def replaced(fields, path, value):
    """A copy in which another value stands at a path."""
    if not path:
        return value
    copy = dict(fields) if isinstance(fields, dict) else list(fields)
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


def flip(data, numbers):
    """A few bits flipped."""
    changed = bytearray(data)
    for _ in range(numbers.choice((1, 1, 2, 8))):
        changed[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
    return bytes(changed)


def cut(data, numbers):
    """The end cut off."""
    return data[: numbers.randrange(len(data))]


def splice(data, numbers):
    """A piece removed, doubled or replaced by noise."""
    start = numbers.randrange(len(data))
    piece = data[start : start + numbers.randrange(1, 40)]
    noise = numbers.choice((b"", piece * 2, numbers.randbytes(len(piece)), piece[::-1]))
    return data[:start] + noise + data[start + len(piece) :]


def strange_value(data, numbers):
    """Another value, of another type or size, anywhere in the config."""
    fields = json.loads(data)
    return json.dumps(replaced(fields, numbers.choice(list(paths(fields))[1:]), numbers.choice(STRANGE))).encode()


def swapped(data, numbers):
    """The values of two fields exchanged."""
    fields = json.loads(data)
    one, two = numbers.sample(sorted(fields), 2)
    return json.dumps(fields | {one: fields[two], two: fields[one]}).encode()


def keys(data, numbers):
    """A key twice, missing, renamed, or one that names code."""
    fields = json.loads(data)
    name = numbers.choice(sorted(fields))
    kind = numbers.randrange(4)
    if kind == 0:
        twice = json.dumps(name) + ": " + json.dumps(numbers.choice([fields[name], *STRANGE])) + ", "
        return b"{" + twice.encode() + data.strip()[1:]
    value = fields.pop(name)
    if kind == 1:
        fields[name.upper()] = value
    elif kind == 2:
        fields |= {name: value, numbers.choice(["auto_map", "model_type", "architectures", "__class__"]): "os.system"}
    return json.dumps(fields).encode()


def literals(data, numbers):
    """What JSON does not have, or has too much of."""
    fields = json.loads(data)
    name = numbers.choice(sorted(fields))
    text = json.dumps(fields | {name: "HERE"})
    deep = numbers.randrange(500, 20000)
    odd = [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        "1" * 5000,
        "[" * deep + "]" * deep,
        '{"a":' * deep + "1" + "}" * deep,
    ]
    return text.replace('"HERE"', numbers.choice([*odd, "'x'", "0x10", "1_000", "01", "/* */ 1", "\ufeff1"])).encode()


CONFIG_MUTATORS = (flip, cut, splice, strange_value, swapped, keys, literals)


def header_of(data):
    """The header of a safetensors file, and what follows it."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(text, body):
    """A safetensors file of a header and what follows it."""
    return struct.pack("<Q", len(text)) + text + body


def header_value(data, numbers):
    """Another shape, dtype, offset or name in the header of the weights."""
    header, body = header_of(data)
    spots = [path for path in paths(header) if len(path) > 1]
    strange = [*STRANGE[:14], "F32", "F64", "I64", "BOOL", "F8_E4M3", [0, 0], [16, 8], [0, 1 << 62], [8, 0], [-1, 4]]
    return with_header(json.dumps(replaced(header, numbers.choice(spots), numbers.choice(strange))).encode(), body)


def header_names(data, numbers):
    """A tensor twice, missing, renamed or added; the header's length a lie."""
    header, body = header_of(data)
    name = numbers.choice([name for name in header if name != "__metadata__"])
    kind = numbers.randrange(5)
    if kind == 0:
        twice = json.dumps(name) + ": " + json.dumps(numbers.choice(list(header.values()))) + ", "
        return with_header(b"{" + twice.encode() + json.dumps(header).encode()[1:], body)
    if kind == 1:
        return struct.pack("<Q", numbers.choice([0, 1, 2**63, 2**64 - 1, 100_000_001, len(data)])) + data[8:]
    entry = header.pop(name)
    if kind == 2:
        header["extra." + name] = entry
    elif kind == 3:
        header |= {name: entry, "extra": {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}}
    return with_header(json.dumps(header).encode(), body)


WEIGHT_MUTATORS = (flip, flip, cut, splice, header_value, header_names)


def vouched(folder, data):
    """The config as if its writer meant it: with the hashes that belong to it, where it can still be read."""
    try:
        fields = json.loads(data)
        fields["weights_sha256"] = file_sha256(folder / "model.safetensors")
        fields[CONTENT_SHA256] = _content_sha256(fields)
        return json.dumps(fields).encode()
    except (ValueError, TypeError, RecursionError):
        return data
