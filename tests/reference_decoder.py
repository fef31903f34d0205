"""A decoder of .kvc objects in plain Python, written from docs/format.md and the pages it links to.

It is here to be read beside them and to prove that they suffice; it uses nothing of the package, and is slow. It checks
what a decoder has to check, with one error for all: `Refused`.

    tensors = decode(Path("x.kvc").read_bytes(), profile=None)      # {(layer, name): array [tokens, heads, dim]}

Arrays hold the bits of the cache's dtype: uint16 for bfloat16 and float16, uint32 for float32, uint8 for fp8.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
import zstandard

MAGIC = bytes.fromhex("894B56430D0A1A0A")


class Refused(Exception):
    """The bytes aren't an object of version 1."""


def need(condition, what):
    if not condition:
        raise Refused(what)


def round_up(value, unit):
    return (value + unit - 1) // unit * unit


# --------------------------------------------------------------------------- CRC32C
def _crc_table():
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


CRC_TABLE = _crc_table()


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


# --------------------------------------------------------------------------- the object
@dataclass
class Group:
    layers: tuple  # first, last
    heads: tuple
    names: tuple
    tokens: tuple
    codec: int


@dataclass
class Object:
    header: dict
    layers: list  # one dict a layer
    groups: list
    token_ids: list | None
    positions: list
    segments: list  # [group][level] -> bytes


def read_object(data):
    """Everything of an object but its tensors (format.md from *Prelude* to *Payload*)."""
    need(data[:8] == MAGIC, "magic")
    need(len(data) >= 64, "truncated prelude")
    need(crc32c(data[:60]) == struct.unpack_from("<I", data, 60)[0], "prelude CRC")
    version, must, _may, levels, shift = struct.unpack_from("<HHHBB", data, 8)
    header_size, tokens_size, index_size, num_groups = struct.unpack_from("<IIII", data, 16)
    (total,) = struct.unpack_from("<Q", data, 32)
    header_crc, tokens_crc, index_crc, reserved = struct.unpack_from("<IIIQ", data, 40)
    need(version == 1 and must == 0, "version or flags")
    need(reserved == 0, "reserved bytes")
    need(1 <= levels <= 16 and 0 <= shift <= 4 and 1 <= num_groups <= 65536, "levels, alignment or groups")
    need(2 <= header_size <= 1 << 20, "header length")
    need(index_size == 8 * levels * num_groups, "index length")
    end = 64 + header_size + tokens_size + index_size
    head_size = round_up(end, 16)
    need(head_size <= 1 << 24, "head size")
    need(total <= 1 << 44 and len(data) == total, "truncated, or too long")

    header_raw = data[64 : 64 + header_size]
    tokens_raw = data[64 + header_size : 64 + header_size + tokens_size]
    index_raw = data[end - index_size : end]
    need(crc32c(header_raw) == header_crc, "header CRC")
    need(crc32c(tokens_raw) == tokens_crc, "token block CRC")
    need(crc32c(index_raw) == index_crc, "index CRC")
    need(not any(data[end:head_size]), "padding of the head")

    header = read_json(header_raw)
    known = {"codecs", "digest", "fingerprint", "groups", "heads", "levels", "lineage", "must", "positions"}
    known |= {"previous", "profile", "spec", "tokens"}
    need(set(header.get("must", [])) <= known, "a field that must be understood")
    layers = [run for run in header["spec"]["layers"] for _ in range(run["count"])]
    need(1 <= len(layers) <= 1024, "layers")
    count = header["tokens"]
    need(1 <= count <= 1 << 20, "tokens")
    positions = [start + i for start, length in header["positions"] for i in range(length)]
    need(len(positions) == count, "positions")
    need(len(header["levels"]) == levels, "levels")
    groups = unfold_groups(header, count)
    need(len(groups) == num_groups, "groups")
    check_cover(header, layers, groups)

    segments = [[b""] * levels for _ in groups]
    at = head_size
    for i, (length, crc) in enumerate(struct.iter_unpack("<II", index_raw)):
        segment = data[at : at + length]
        stop = round_up(at + length, 1 << shift)
        need(len(segment) == length and crc32c(segment) == crc, f"segment {i}")
        need(stop <= total and not any(data[at + length : stop]), f"padding of segment {i}")
        segments[i % num_groups][i // num_groups] = segment
        at = stop
    need(at == total, "object size")
    ids = read_token_ids(tokens_raw, count, header.get("digest")) if tokens_size else None
    return Object(header, layers, groups, ids, positions, segments)


def read_json(raw):
    def pairs(items):
        need(len(dict(items)) == len(items), "a key twice")
        return dict(items)

    def constant(name):
        raise Refused(f"the number {name}")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except ValueError as error:
        raise Refused(f"header: {error}") from error


def read_token_ids(block, count, digest):
    need(len(block) >= 4 and 1 <= block[0] <= 4 and block[1] <= 1 and block[2] == block[3] == 0, "token block")
    width, planes = block[0], block[4:]
    if block[1] == 1:
        need(zstandard.get_frame_parameters(planes).content_size == width * count, "token block's stated size")
        planes = zstandard.ZstdDecompressor().decompress(planes)
    need(len(planes) == width * count, "token block's size")
    ids = [sum(planes[j * count + i] << (8 * j) for j in range(width)) for i in range(count)]
    named = hashlib.sha256(b"cachegen.tokens\0" + struct.pack(f"<{count}q", *ids)).hexdigest()
    need(named == digest, "token digest")
    return ids


def unfold_groups(header, count):
    groups = []
    for run in header["groups"]:
        first, last, step = run["layers"]
        need(step >= 1 and (last - first) % step == 0, "group layers")
        for layer in range(first, last, step):
            for part in run["parts"]:
                tokens = tuple(run.get("tokens", (0, count)))
                need(0 <= tokens[0] <= tokens[1] <= count, "group tokens")
                need(0 <= run["codec"] < len(header["codecs"]), "group codec")
                heads, names = tuple(part["heads"]), tuple(part["names"])
                groups.append(Group((layer, layer + step), heads, names, tokens, run["codec"]))
    return groups


TENSORS = {"attention": ("k", "v"), "sliding": ("k", "v"), "mla": ("latent", "rope"), "state": ()}


def held_heads(header, layer):
    if layer["kind"] in ("mla", "state"):
        return 0, max(1, layer["heads"])
    return tuple(min(edge, layer["heads"]) for edge in header["heads"])


def check_cover(header, layers, groups):
    """Every head of every tensor is in exactly one group, with the same tokens in a layer."""
    owners = {}
    for group in groups:
        for layer in range(*group.layers):
            need(layer < len(layers), "group layers")
            low, high = held_heads(header, layers[layer])
            need(low <= group.heads[0] <= group.heads[1] <= high, "group heads")
            names = TENSORS[layers[layer]["kind"]]
            need(set(group.names) <= set(names) and bool(group.names) == bool(names), "group names")
            for name in group.names or ("state",):
                heads = range(*group.heads) or [None]
                for cell in [(layer, name, head) for head in heads]:
                    need(cell not in owners, "a tensor in two groups")
                    owners[cell] = group.tokens
    for i, layer in enumerate(layers):
        low, high = held_heads(header, layer)
        cells = [
            (i, name, head) for name in TENSORS[layer["kind"]] or ("state",) for head in range(low, high) or [None]
        ]
        need(all(cell in owners for cell in cells), "a tensor in no group")
        need(len({owners[cell] for cell in cells}) == 1, "tokens of a layer")


# --------------------------------------------------------------------------- numbers
def f32_to_bf16(values):
    """Bits of bfloat16, round to nearest, ties to even (finite values)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_to_f32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_dtype(values, dtype):
    """fp32 values as bits of the cache's dtype."""
    if dtype == "bfloat16":
        return f32_to_bf16(values)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    need(dtype == "float32", f"dtype {dtype}")
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def from_bits(data, dtype):
    """fp32 values of little-endian elements."""
    if dtype == "bfloat16":
        return bf16_to_f32(np.frombuffer(data, "<u2"))
    return np.frombuffer(data, "<f2" if dtype == "float16" else "<f4").astype(np.float32)


def rotate(keys, positions, rope):
    """Un-rotated keys, fp32 [tokens, heads, dim], turned to positions (format.md, *RoPE*)."""
    if rope is None:
        return keys
    dim = rope["dim"]
    near = np.frombuffer(base64.b64decode(rope["inv_freq"]), dtype="<f4")
    far = np.frombuffer(base64.b64decode(rope.get("long_inv_freq", rope["inv_freq"])), dtype="<f4")
    where = np.asarray(positions, dtype=np.int64)
    beyond = where >= rope.get("switch_at", 1 << 62)
    freqs = np.where(beyond[:, None], far, near)
    angles = where[:, None].astype(np.float32) * freqs
    cos = (np.cos(angles.astype(np.float64)) * rope["scaling"]).astype(np.float32)[:, None]
    sin = (np.sin(angles.astype(np.float64)) * rope["scaling"]).astype(np.float32)[:, None]
    first, second = slice(0, dim // 2), slice(dim // 2, dim)
    if rope.get("interleaved", False):
        first, second = slice(0, dim, 2), slice(1, dim, 2)
    turned = keys.copy()
    turned[..., first] = keys[..., first] * cos - keys[..., second] * sin
    turned[..., second] = keys[..., second] * cos + keys[..., first] * sin
    return turned


# --------------------------------------------------------------------------- entropy coder (format-entropy.md)
@dataclass
class Bank:
    freqs: np.ndarray  # [tables, alphabet]
    offset: int
    low_bits: list
    escape: bool
    points: np.ndarray  # fp32 [tables, alphabet]
    escape_bias: np.float32


def read_bank(data):
    """A bank as bytes."""
    magic, log_alphabet, escape, offset, tables, bias = struct.unpack_from("<4sBBHIf", data)
    need(magic == b"CGTB" and log_alphabet in (4, 5, 6, 8) and escape <= 1 and tables >= 1, "bank")
    size = 1 << log_alphabet
    need(len(data) == 16 + tables * (6 * size + 1), "bank's size")
    freqs = np.frombuffer(data, "<u2", tables * size, 16).reshape(tables, size).astype(int)
    low_bits = list(data[16 + 2 * tables * size :][:tables])
    points = np.frombuffer(data, "<f4", tables * size, 16 + 2 * tables * size + tables).reshape(tables, size)
    return Bank(freqs, offset, low_bits, bool(escape), points, np.float32(bias))


BUILTIN_DIGESTS = {
    "laplace": "ba24ca52de1d445a815253a1010e721719c26edd7828e23cfe4ae5a9906fbbc5",
    "general": "7abb59814c065e05353f8a648a4b528ef1308dbc7146c8195b81e445690287f3",
    "gaussian": "ec0e85f9c599bd1d97b1685f7d1abfbfa82c97553298e7333db65948fc221223",
}


@cache
def builtin_bank():
    """The three built-in banks as one: table = shape x 68 + scale index."""
    from cachegen.entropy.builtin_data import BANKS  # data

    banks = []
    for shape, digest in BUILTIN_DIGESTS.items():
        raw = zlib.decompress(base64.b85decode("".join(BANKS[shape])))
        need(hashlib.sha256(raw).hexdigest() == digest, "a built-in bank")
        banks.append(read_bank(raw))
    return Bank(
        np.concatenate([bank.freqs for bank in banks]),
        banks[0].offset,
        [bits for bank in banks for bits in bank.low_bits],
        banks[0].escape,
        np.concatenate([bank.points for bank in banks]),
        banks[0].escape_bias,
    )


def slots_of(freqs):
    """[(symbol, rank)] of the 4096 slots of a table: the alias construction."""
    freqs = [int(f) for f in freqs]
    size, width = len(freqs), 4096 // len(freqs)
    need(sum(freqs) == 4096 and max(freqs) < 4096 and min(freqs) >= 0, "frequencies")
    rest, own, alias = list(freqs), [width] * size, list(range(size))
    small = [s for s in range(size) if freqs[s] < width]
    large = [s for s in range(size) if freqs[s] >= width]
    while small:
        poor, rich = small.pop(), large[-1]
        own[poor], alias[poor] = rest[poor], rich
        rest[rich] -= width - rest[poor]
        if rest[rich] < width:
            small.append(large.pop())
    slots, given = [], list(own)
    for bucket in range(size):
        slots += [(bucket, rank) for rank in range(own[bucket])]
        for _ in range(width - own[bucket]):
            slots.append((alias[bucket], given[alias[bucket]]))
            given[alias[bucket]] += 1
    return slots


def decode_matrix(data, shape, bank, tables):
    """(values, symbols) [tokens, components] of a matrix; tables [components] or [blocks, components]."""
    tokens, components = shape
    blocks = -(-tokens // 32)
    tables = np.broadcast_to(np.asarray(tables, int), (blocks, components))
    need(tables.max() < len(bank.freqs), "table id")
    slots = {table: slots_of(bank.freqs[table]) for table in set(tables.ravel().tolist())}
    values, symbols = np.zeros(shape, np.int64), np.zeros(shape, int)
    width = max(32, 65536 // (32 * blocks) // 32 * 32)  # components of a stream
    firsts = range(0, components, width)
    at = 4 * (len(firsts) - 1)
    sizes = [*struct.unpack_from(f"<{len(firsts) - 1}I", data)]
    sizes.append(len(data) - at - sum(sizes))
    for first, size in zip(firsts, sizes, strict=True):
        need(size >= 0, "stream's size")
        stream = data[at : at + size]
        at += size
        lanes = min(32, tokens)
        need(len(stream) == size and size >= 4 * lanes and size % 2 == 0, "stream's size")
        states = list(struct.unpack_from(f"<{lanes}I", stream))
        need(min(states) >= 1 << 16, "a state")
        words = list(struct.unpack(f"<{(size - 4 * lanes) // 2}H", stream[4 * lanes :]))[::-1]
        for block in range(blocks):
            rows = range(32 * block, min(32 * block + 32, tokens))
            for c in range(first, min(first + width, components)):
                table = int(tables[block, c])
                for lane, row in enumerate(rows):
                    symbol, rank = slots[table][states[lane] & 4095]
                    states[lane] = int(bank.freqs[table][symbol]) * (states[lane] >> 12) + rank
                    symbols[row, c] = symbol
                    if states[lane] < 1 << 16:
                        need(words, "words missing")
                        states[lane] = states[lane] << 16 | words.pop()
                low_bits = int(bank.low_bits[table])
                low = [0] * len(rows)
                for bit in range(low_bits):
                    need(len(words) >= 2, "words missing") if len(rows) > 16 else need(words, "words missing")
                    plane = words.pop() | (words.pop() << 16 if len(rows) > 16 else 0)
                    for lane in range(len(rows)):
                        low[lane] |= (plane >> lane & 1) << bit
                for lane, row in enumerate(rows):
                    high = int(symbols[row, c]) - bank.offset
                    if bank.escape and symbols[row, c] == bank.freqs.shape[1] - 1:
                        need(words, "words missing")
                        high = words.pop()
                        high -= 65536 if high >= 32768 else 0
                    values[row, c] = (high << low_bits) + low[lane]
        need(not words and all(state == 1 << 16 for state in states), "the end of a stream")
    return values, symbols


def decode_points(data, shape, bank, tables):
    """Reconstruction points, fp32 [tokens, components], of a matrix."""
    values, symbols = decode_matrix(data, shape, bank, tables)
    table = np.repeat(np.broadcast_to(np.asarray(tables, int), (-(-shape[0] // 32), shape[1])), 32, axis=0)[: shape[0]]
    points = bank.points[table, symbols]
    raw = np.asarray(bank.low_bits)[table] > 0
    if bank.escape:
        raw |= symbols == bank.freqs.shape[1] - 1
    far = values.astype(np.float32) + (np.sign(values).astype(np.float32) * bank.escape_bias)
    return np.where(raw, far, points).astype(np.float32)


# --------------------------------------------------------------------------- cachegen (format-cachegen.md)
def read_profile(data):
    """(description, arrays) of a profile."""
    (size,) = struct.unpack_from("<Q", data)
    entries = read_json(data[8 : 8 + size])
    metadata = entries.pop("__metadata__")
    types = {
        "U8": "<u1",
        "I8": "<i1",
        "U16": "<u2",
        "I16": "<i2",
        "U32": "<u4",
        "I32": "<i4",
        "F16": "<f2",
        "F32": "<f4",
    }
    described = metadata["cachegen.profile"].encode()
    content = hashlib.sha256(b"cachegen profile\n" + struct.pack("<Q", len(described)) + described)
    arrays, at = {}, 8 + size
    for name in sorted(entries):
        entry = entries[name]
        first, last = (8 + size + edge for edge in entry["data_offsets"])
        need(first == at and last <= len(data), "profile: gaps or overlaps")
        label = " ".join([name, entry["dtype"], *map(str, entry["shape"])]).encode() + b"\n"
        content.update(struct.pack("<Q", len(label)) + label + data[first:last])
        arrays[name] = np.frombuffer(data[first:last], dtype=types[entry["dtype"]]).reshape(entry["shape"])
        at = last
    need(at == len(data), "profile: bytes after the last array")
    need(content.hexdigest() == metadata["cachegen.hash"], "profile: content hash")
    return read_json(described), arrays, content.hexdigest()


def layer_of(group, layers):
    need(group.layers[1] == group.layers[0] + 1 and group.names == ("k", "v"), "a group of one layer's k and v")
    return layers[group.layers[0]]


def split_heads(rows, group, layer):
    """[tokens, components] -> {name: [tokens, heads, dim]}: k's channels, then v's."""
    heads = group.heads[1] - group.heads[0]
    at = heads * layer["k_dim"]
    return {
        "k": rows[:, :at].reshape(len(rows), heads, layer["k_dim"]),
        "v": rows[:, at:].reshape(len(rows), heads, layer["v_dim"]),
    }


def decode_cachegen(obj, config, profile, group, segments):
    description, arrays, _ = profile
    parameters = description["parameters"]
    options = parameters["options"] | {k: v for k, v in config.items() if k != "coder"}
    need(options == parameters["options"], "options that the profile isn't for")
    need(config.get("coder", "rans") == "rans", "this decoder has no torchac")
    layer = layer_of(group, obj.layers)
    data = segments[0]
    level, zero, zeros, anchor_bytes = struct.unpack_from("<BBHI", data)
    need(zero == zeros == 0 and level < len(parameters["levels"]), "a segment's head")

    start = 0  # of the layer's channels in the model's
    for other in obj.layers[: group.layers[0]]:
        if other["kind"] in ("attention", "sliding"):
            start += other["heads"] * (other["k_dim"] + other["v_dim"])
    channels = []
    for name, base in (("k_dim", start), ("v_dim", start + layer["heads"] * layer["k_dim"])):
        channels += range(base + group.heads[0] * layer[name], base + group.heads[1] * layer[name])

    constants = parameters["levels"][level]
    bins = parameters["bins"]
    layer_bin = np.float32(bins[group.layers[0] * len(bins) // len(obj.layers)])
    anchor_step = arrays["deviation"][channels] * np.float32(constants["anchor_range"] / 127)
    delta_step = arrays["unit"][channels] * (layer_bin * np.float32(constants["scale"]))
    mean = arrays["mean"][channels]

    n = group.tokens[1] - group.tokens[0]
    length = options["group_length"]
    is_anchor = np.arange(n) % length == 0 if options["delta"] else np.zeros(n, bool)
    m = int((~is_anchor).sum())
    at = 8
    scales = None
    if options["normalisation"] == "token":
        scales = np.frombuffer(data[at : at + 2 * m], "<f2").astype(np.float32)[:, None]
        need(np.isfinite(scales).all(), "token scales")
        at += 2 * m
    values = np.empty((n, len(channels)), np.float32)
    if is_anchor.any():
        points = decode_points(
            data[at : at + anchor_bytes],
            (n - m, len(channels)),
            read_bank(arrays[f"anchor_bank.{level}"].tobytes()),
            arrays["anchor_tables"][level][channels],
        )
        values[is_anchor] = points * anchor_step + mean
    at += anchor_bytes
    if m:
        bank = read_bank(arrays[f"delta_bank.{level}"].tobytes())
        points = decode_points(data[at:], (m, len(channels)), bank, arrays["delta_tables"][level][channels])
        points = points * delta_step if scales is None else (points * delta_step) * scales
        if options["delta"]:
            values[~is_anchor] = points + values[np.arange(n) // length * length][~is_anchor]
        else:
            values[~is_anchor] = points + mean
    else:
        need(at == len(data), "bytes left over")
    return split_heads(values, group, layer)


def decode_cachegen_public(obj, config, profile, group, segments):
    layer = layer_of(group, obj.layers)
    need(set(config) <= {"levels"}, "config")
    data, at, n = segments[0], 0, group.tokens[1] - group.tokens[0]
    heads = group.heads[1] - group.heads[0]
    kind = obj.header["spec"]["dtype"]
    found = {}
    for name, dim in (("k", layer["k_dim"]), ("v", layer["v_dim"])):
        bins, entries, size = struct.unpack_from("<HHI", data, at)
        need(4 <= bins <= 256 and bins % 2 == 0 and bins + 1 <= entries <= 257, "bins or entries")
        at += 8
        width = DTYPE_BYTES[kind]
        largest = from_bits(data[at : at + width * n], kind)
        need(np.isfinite(largest).all() and (largest >= 0).all(), "magnitudes")
        at += width * n
        channels = heads * dim
        table = np.frombuffer(data[at : at + 2 * channels * entries], "<u2").reshape(channels, entries).astype(int)
        at += 2 * channels * entries
        alphabet = next(a for a in (16, 32, 64, 256) if a >= bins - 1)
        freqs = np.zeros((channels, alphabet), int)
        freqs[:, : bins - 1] = np.diff(table[:, :bins])
        steps = bins // 2 - 1
        points = np.tile(np.arange(alphabet, dtype=np.float32) - steps, (channels, 1))
        bank = Bank(freqs, steps, [0] * channels, False, points, np.float32(0))
        rows = decode_points(data[at : at + size], (n, channels), bank, range(channels))
        at += size
        found[name] = (rows * (largest / np.float32(steps))[:, None]).reshape(n, heads, dim)
    need(at == len(data), "bytes left over")
    return found


class Cursor:
    """Reads bytes front to back."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size):
        need(size <= len(self.data) - self.at, "bytes missing")
        self.at += size
        return self.data[self.at - size : self.at]

    def unpack(self, layout):
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def number(self, layout):
        return self.unpack(layout)[0]

    def end(self):
        need(self.at == len(self.data), "bytes left over")


# --------------------------------------------------------------------------- channel (format-channel.md)
def decode_channel(obj, config, profile, group, segments):
    need(config == {} and group.names == ("k", "v"), "channel's config or names")
    cursor = Cursor(segments[0])
    first, last = group.tokens
    heads = group.heads[1] - group.heads[0]
    found = {}
    for number in range(*group.layers):
        layer = obj.layers[number]
        parts = {"k": [], "v": []}
        tokens = last - first
        width = heads * layer["k_dim"]
        most = max(32, min(480, (1 << 19) // width // 32 * 32))
        size = 32 * -(-tokens // (32 * -(-tokens // most)))
        for start in range(0, tokens, size):
            rows = min(size, tokens - start)
            keys, values = read_band(cursor, rows, heads, layer, obj.header["spec"]["dtype"])
            positions = obj.positions[first + start : first + start + rows]
            parts["k"].append(rotate(keys.reshape(rows, heads, -1), positions, layer.get("rope")))
            parts["v"].append(values.reshape(rows, heads, -1))
        found |= {(name, number): np.concatenate(bands) for name, bands in parts.items()}
    cursor.end()
    return found


def read_band(cursor, tokens, heads, layer, dtype):
    """Keys before RoPE, and values: fp32 [tokens, heads x dim]."""
    widths = [heads * layer["k_dim"], heads * layer["v_dim"]]
    mode = cursor.number("B")
    need(mode <= 3, "mode")
    if mode == 3:
        return [from_bits(cursor.take(tokens * w * DTYPE_BYTES[dtype]), dtype).reshape(tokens, w) for w in widths]
    outliers, ordered = cursor.unpack("BB")
    steps = cursor.unpack("ff")
    need(outliers <= min(32, tokens - 1) and ordered <= 1 and (ordered or not outliers), "outliers")
    need(all(2.0**-126 <= step < 2.0**100 for step in steps), "steps")
    blocks = -(-(tokens - outliers) // 32)
    weights = [0] * blocks
    order = list(range(tokens))
    rows = np.empty((tokens, sum(widths)), np.float32)
    if ordered:
        weights = list(cursor.unpack(f"{blocks}b"))
        need(all(-4 <= w <= 4 for w in weights), "weights")
        packed = cursor.take(-(-tokens // 2))
        classes = [packed[t // 2] >> 4 * (t % 2) & 15 for t in range(tokens)]
        need(tokens % 2 == 0 or packed[-1] >> 4 == 0, "the unused half byte")
        sizes = [outliers] + [min(32, tokens - outliers - 32 * b) for b in range(blocks)]
        need([classes.count(c) for c in range(16)] == sizes + [0] * (15 - blocks), "classes")
        order = sorted(order, key=lambda t: classes[t])
        for token in order[:outliers]:
            rows[token] = from_bits(cursor.take(sum(widths) * DTYPE_BYTES[dtype]), dtype)
    order = order[outliers:]
    sides = read_sides(cursor, mode, widths, (heads, heads))
    index, shape, step, bias = [], [], [], []  # of the channels of k, then of v
    for width, base, (indices, shapes, means) in zip(widths, steps, sides, strict=True):
        index += indices
        shape += shapes
        step += [base] * width
        bias += [np.float32(m * (base / 8)) for m in means or []]
    tables = [[s * 68 + min(67, max(0, i + 2 * w)) for i, s in zip(index, shape, strict=True)] for w in weights]
    points = decode_points(cursor.take(cursor.number("I")), (len(order), sum(widths)), builtin_bank(), tables)
    scale = np.array([[np.float32(s * 2.0 ** (-w / 2)) for s in step] for w in weights])
    points = points * np.repeat(scale, 32, axis=0)[: len(order)]
    rows[order] = points + np.array(bias) if mode == 0 else points
    return rows[:, : widths[0]], rows[:, widths[0] :]


def read_sides(cursor, mode, widths, heads):
    """(scale indices, shapes, mean numbers) of the channels of k and of v."""
    if mode == 2:
        sides = []
        for width, n in zip(widths, heads, strict=True):
            tables = [table for table in cursor.take(n) for _ in range(width // n)]
            need(max(tables) < 3 * 68, "a head's table")
            sides.append(([t % 68 for t in tables], [t // 68 for t in tables], None))
        return sides
    kinds = 3 if mode == 0 else 2
    head = [[cursor.unpack("BB") for _ in range(kinds)] for _ in widths]
    need(all(index < 68 for side in head for _, index in side), "a scale index of sides")
    size = cursor.number("I")
    tables = [68 + index for width, side in zip(widths, head, strict=True) for _, index in side for _ in range(width)]
    numbers = decode_matrix(cursor.take(size), (1, len(tables)), builtin_bank(), tables)[0][0].tolist()
    sides = []
    for width, side in zip(widths, head, strict=True):
        kind = [[numbers.pop(0) + centre for _ in range(width)] for centre, _ in side]
        need(all(0 <= i < 68 for i in kind[0]) and all(0 <= s < 3 for s in kind[1]), "a table of sides")
        sides.append((kind[0], kind[1], kind[2] if mode == 0 else None))
    return sides


# --------------------------------------------------------------------------- lossless (format-lossless.md)
@dataclass
class FloatType:
    size: int
    exponent_bits: int
    sign_in_symbol: bool
    planes: tuple  # bits of each
    mantissa_bits: int


FLOAT_TYPES = [
    FloatType(2, 8, False, (8,), 7),  # bf16
    FloatType(2, 5, True, (8, 2), 10),  # fp16
    FloatType(4, 8, False, (8, 8, 8), 23),  # fp32
    FloatType(1, 4, False, (4,), 3),  # fp8 e4m3fn
    FloatType(1, 5, True, (2,), 2),  # fp8 e5m2
]
TYPE_OF = {"bfloat16": 0, "float16": 1, "float32": 2, "float8_e4m3fn": 3, "float8_e5m2": 4}


def decode_lossless(obj, config, profile, group, segments):
    need(set(config) <= {"coder", "level"}, "config")
    cursor = Cursor(segments[0])
    tokens, heads = group.tokens[1] - group.tokens[0], group.heads[1] - group.heads[0]
    found = {}
    for number in range(*group.layers):
        layer = obj.layers[number]
        if not group.names:
            for _ in range(cursor.number("H")):
                name = cursor.take(cursor.number("B")).decode("utf-8")
                need(name and (name, number) not in found, "a state's name")
                found[name, number] = read_array(cursor)
            continue
        dims = [layer["k_dim"] if name in ("k", "latent") else layer["v_dim"] for name in group.names]
        widths = [dim for dim in dims for _ in range(heads)]
        matrix = read_record(cursor, tokens, widths, FLOAT_TYPES[TYPE_OF[obj.header["spec"]["dtype"]]])
        edges = np.cumsum([0, *(heads * dim for dim in dims)])
        for name, dim, first, last in zip(group.names, dims, edges, edges[1:], strict=False):
            found[name, number] = matrix[:, first:last].reshape(tokens, heads, dim)
        for _ in range(cursor.number("B")):
            name = group.names[cursor.number("B")]
            found[name + ".scale", number] = read_array(cursor)
    cursor.end()
    return found


def read_array(cursor):
    kind, dims = cursor.unpack("BB")
    need(kind < len(FLOAT_TYPES) and dims <= 8, "an array's type or dimensions")
    shape = cursor.unpack(f"{dims}I")
    columns = (shape[-1] if shape else 0) or 1
    while columns > 4096 and columns % 2 == 0:
        columns //= 2
    count = 1
    for size in shape:
        count *= size
    need(count * FLOAT_TYPES[kind].size <= 1 << 30, "an array's size")
    return read_record(cursor, count // columns, [columns], FLOAT_TYPES[kind]).reshape(shape)


def read_record(cursor, rows, widths, kind):
    """A matrix of the bits of floats, [rows, columns]; `widths` are the columns of each head."""
    columns = sum(widths)
    word = np.dtype(f"<u{kind.size}")
    mode = cursor.number("B")
    if mode == 0:
        return np.frombuffer(cursor.take(rows * columns * kind.size), word).reshape(rows, columns)
    need(mode in (1, 2) and rows * columns > 0, "mode")
    body = Cursor(cursor.take(cursor.number("I")))
    size = max(32, (1 << 19) // columns // 32 * 32)
    blocks = [(start, min(start + size, rows)) for start in range(0, rows, size)]
    out = np.zeros((rows, columns), word)
    if mode == 2:
        sizes = body.unpack(f"{len(blocks) * kind.size}I")
        for i, size in enumerate(sizes):
            (first, last), byte = blocks[i // kind.size], i % kind.size
            frame = body.take(size)
            need(zstandard.get_frame_parameters(frame).content_size == (last - first) * columns, "a frame's size")
            part = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)
            out[first:last] |= part.reshape(last - first, columns).astype(word) << word.type(8 * byte)
    else:
        read_planes(body, out, widths, kind, blocks)
    body.end()
    return out


def read_planes(body, out, widths, kind, blocks):
    rows, columns = out.shape
    flags, log_alphabet, tables, low = body.unpack("BBBB")
    tables += 1
    omitted = [False, bool(flags & 4), bool(flags & 8)][: len(kind.planes)]
    need(flags < (16 if kind.size == 4 else 4) and tables <= 16, "flags or tables")
    need(log_alphabet in (4, 5, 6, 8) and log_alphabet <= kind.exponent_bits + kind.sign_in_symbol, "alphabet")
    freqs = np.zeros((tables, 1 << log_alphabet), int)
    for table in range(tables):
        count = body.number("B") + 1
        need(count <= 1 << log_alphabet, "frequencies")
        freqs[table, :count] = body.unpack(f"{count}H")
    bank = Bank(freqs, 0, [0] * tables, False, np.zeros(freqs.shape, np.float32), np.float32(0))

    sides = len(widths) if flags & 1 else columns
    if flags & 2:
        bases = [low + b for b in body.take(sides)]
        side = body.take(sides)
        table_of, flip = [b & 127 for b in side], [b >> 7 for b in side]
    else:
        side = body.take(sides)
        table_of, flip = [b & 15 for b in side], [b >> 7 for b in side]
        bases = [low + (b >> 4 & (7 if kind.sign_in_symbol else 15)) for b in side]
    repeat = widths if flags & 1 else [1] * columns
    base = np.repeat(bases, repeat) % 256
    flip = np.repeat(flip, repeat)
    table_of = np.repeat(table_of, repeat)
    need(table_of.max() < tables, "a side's table")

    sizes = [body.unpack("II") for _ in blocks]
    exceptions = [body.take(count) for _, count in sizes]
    planes = []
    for bits, gone in zip(kind.planes, omitted, strict=False):
        if gone:
            planes.append(np.zeros((rows, columns), np.uint64))
            continue
        width = -(-columns // (8 // bits))
        raw = np.frombuffer(body.take(rows * width), np.uint8).reshape(rows, width)
        c = np.arange(columns)
        planes.append((raw[:, c % width] >> (bits * (c // width)) & ((1 << bits) - 1)).astype(np.uint64))

    escape = (1 << log_alphabet >> kind.sign_in_symbol) - 1
    for (first, last), (size, _), escaped in zip(blocks, sizes, exceptions, strict=True):
        symbols = decode_matrix(body.take(size), (last - first, columns), bank, table_of)[1]
        distance = symbols >> 1 if kind.sign_in_symbol else symbols
        sign = (symbols & 1) ^ flip
        if escape + 1 < 1 << kind.exponent_bits:
            need((distance == escape).sum() == len(escaped), "exceptions")
            need(all(d < 1 << kind.exponent_bits for d in escaped), "an exception")
            distance[distance == escape] = list(escaped)
        else:
            need(not escaped, "exceptions")
        exponent = ((base - distance) % (1 << kind.exponent_bits)).astype(np.uint64)
        part = [plane[first:last] for plane in planes]
        m = kind.mantissa_bits
        if kind.sign_in_symbol:
            mantissa = part[0] | (part[1] << np.uint64(8) if len(part) > 1 else np.uint64(0))
            sign = sign.astype(np.uint64)
        else:
            top = kind.planes[0] - 1  # bits of the mantissa beside the sign
            sign = part[0] >> np.uint64(top)
            mantissa = (part[0] & np.uint64((1 << top) - 1)) << np.uint64(m - top)
            for i, plane in enumerate(part[1:], 1):
                mantissa |= plane << np.uint64(m - top - 8 * i)
        word = sign << np.uint64(kind.exponent_bits + m) | exponent << np.uint64(m) | mantissa
        out[first:last] = word.astype(out.dtype)


# --------------------------------------------------------------------------- all of it
CODECS = {
    "cachegen": decode_cachegen,
    "cachegen_public": decode_cachegen_public,
    "channel": decode_channel,
    "lossless": decode_lossless,
}


def decode(data, profile=None):
    """Tensors of an object, as the bits of their dtype: {(layer, name): array [tokens, heads, dim]}."""
    obj = read_object(data)
    if profile is not None:
        profile = read_profile(profile)
        need(profile[2] == obj.header.get("profile"), "another profile than the object's")
    found = {}
    for group, segments in zip(obj.groups, obj.segments, strict=True):
        entry = obj.header["codecs"][group.codec]
        parts = CODECS[entry["id"]](obj, entry["config"], profile, group, segments)
        for key, part in parts.items():
            name, layer = key if isinstance(key, tuple) else (key, group.layers[0])
            if part.dtype == np.float32:
                part = to_dtype(part, obj.header["spec"]["dtype"])
            found.setdefault((layer, name), []).append((group.heads[0], part))
    return {
        key: parts[0][1]
        if len(parts) == 1
        else np.concatenate([part for _, part in sorted(parts, key=lambda p: p[0])], axis=-2)
        for key, parts in found.items()
    }
