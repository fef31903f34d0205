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
from dataclasses import dataclass

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


def rotate(keys, positions, rope):
    """Un-rotated keys, fp32 [tokens, heads, dim], turned to positions (format.md, *Spec*)."""
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
