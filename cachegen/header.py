"""What an object says about itself: `ObjectHeader`, and its JSON (docs/format.md, *Header*).

`parse_header` takes hostile bytes: whatever it returns is consistent (every range lies inside what it is a range of,
groups cover each tensor exactly once), so later stages need not check again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from . import strict_json
from .codecs.base import Group, LevelLoss
from .errors import FormatError, LimitExceeded, VersionError, describe
from .keys import token_digest
from .kv import DTYPES, MAX_HEADS, KVSpec, LayerKind, LayerSpec, Lineage

MAX_HEADER = 1 << 20
MAX_TOKENS = 1 << 20
MAX_LEVELS = 16
MAX_GROUPS = 1 << 16
MAX_CODECS = 16
MAX_POSITION = 1 << 40
MAX_TOKEN_ID = (1 << 32) - 1
MAX_DECODED = 1 << 38
"""Bytes of K and V that an object may decode to."""

_CODEC_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_REQUIRED = frozenset({"codecs", "fingerprint", "groups", "heads", "levels", "positions", "spec", "tokens"})
_OPTIONAL = frozenset({"digest", "lineage", "must", "previous", "profile"})


@dataclass(frozen=True)
class CodecEntry:
    """A codec used in an object: its id and config."""

    codec_id: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class ObjectHeader:
    """All that an object says about itself.

    Attributes:
        codecs: the codecs used; `Group.codec` indexes them. The first is the object's own.
        fingerprint: 32-byte digest of the model's fingerprint.
        profile: content hash (64 hex digits) of the profile needed to decode, or None.
        spec: the model's cache.
        num_tokens: tokens in the chunk.
        positions: runs (start, count) of consecutive positions, summing to num_tokens.
        head_range: the model's KV heads held.
        groups: every group, in order.
        losses: stated loss by level. Embedded objects have one entry per level; others one, for the level written.
        token_digest: 32-byte digest of the token ids (keys.token_digest), or None where the writer had none.
        token_ids: the ids themselves, or None.
        previous_ids: up to two ids before the chunk.
        lineage: what the chunk was computed on, if lossy.
    """

    codecs: tuple[CodecEntry, ...]
    fingerprint: bytes
    profile: str | None
    spec: KVSpec
    num_tokens: int
    positions: tuple[tuple[int, int], ...]
    head_range: tuple[int, int]
    groups: tuple[Group, ...]
    losses: tuple[LevelLoss, ...]
    token_digest: bytes | None = None
    token_ids: tuple[int, ...] | None = None
    previous_ids: tuple[int, ...] = ()
    lineage: Lineage | None = None

    def group_elements(self, group: int) -> int:
        """Numbers of K and V (or latent) in a group; 0 for a state's, whose shapes only its segment knows."""
        g = self.groups[group]
        start, stop = g.tokens or (0, self.num_tokens)
        dims = sum(self.spec.layers[i].dim(name) for i in range(*g.layers) for name in g.names)
        return (stop - start) * (g.heads[1] - g.heads[0]) * dims


# --------------------------------------------------------------------------- writing
def header_json(header: ObjectHeader) -> bytes:
    """The header's canonical JSON, without token ids. Raises InputError if a codec's config isn't JSON-able."""
    data: dict[str, Any] = {
        "codecs": [{"id": c.codec_id, "config": dict(c.config)} for c in header.codecs],
        "fingerprint": header.fingerprint.hex(),
        "groups": list(_group_runs(header.groups)),
        "heads": list(header.head_range),
        "levels": [
            {"level": x.level} | ({} if x.predicted_kl is None else {"kl": x.predicted_kl}) for x in header.losses
        ],
        "positions": [list(run) for run in header.positions],
        "spec": header.spec.to_json(),
        "tokens": header.num_tokens,
    }
    if header.profile is not None:
        data["profile"] = header.profile
    if header.token_digest is not None:
        data["digest"] = header.token_digest.hex()
    if header.previous_ids:
        data["previous"] = list(header.previous_ids)
    if header.lineage is not None:
        data["lineage"] = {k: v for k, v in header.lineage.to_json().items() if v is not None}
    return strict_json.dumps(data, "header")


def _group_runs(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """Groups written as runs: the same parts, layer range after layer range."""
    run: dict[str, Any] | None = None
    for (layers, tokens, codec), members in groupby(groups, key=lambda g: (g.layers, g.tokens, g.codec)):
        parts = [{"names": list(g.names), "heads": list(g.heads)} for g in members]
        entry: dict[str, Any] = {"layers": [*layers, layers[1] - layers[0]], "parts": parts, "codec": codec}
        if tokens is not None:
            entry["tokens"] = list(tokens)
        if run is not None and run["layers"][1:] == [layers[0], layers[1] - layers[0]] and _rest(run) == _rest(entry):
            run["layers"][1] = layers[1]
            continue
        if run is not None:
            yield run
        run = entry
    if run is not None:
        yield run


def _rest(run: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key != "layers"}


# --------------------------------------------------------------------------- reading
def parse_header(raw: bytes | memoryview, levels: int, groups: int) -> ObjectHeader:
    """The header of verified bytes, checked against the prelude's counts. Token ids are added by the container.

    Raises FormatError, LimitExceeded, or VersionError for a key that must be understood and isn't.
    """
    data = strict_json.loads(raw, "header")
    if unknown := sorted(set(_texts(data.get("must", []), "must")) - _REQUIRED - _OPTIONAL):
        raise VersionError(f"the object needs a reader that understands {describe(unknown)}: update cachegen")
    if missing := sorted(_REQUIRED - set(data)):
        raise FormatError(f"header: expected fields {describe(sorted(_REQUIRED), 9)}; missing {describe(missing)}")
    spec = _spec(data["spec"])
    num_tokens = _integer(data["tokens"], "tokens", 1, MAX_TOKENS)
    if spec.elements_per_token() * num_tokens * DTYPES[spec.dtype].itemsize > MAX_DECODED:
        raise LimitExceeded(f"header: expected a chunk of at most {MAX_DECODED} bytes; spec x tokens is more")
    codecs = tuple(_codec(item) for item in _items(data["codecs"], "codecs", 1, MAX_CODECS))
    header = ObjectHeader(
        codecs=codecs,
        fingerprint=_digest(data["fingerprint"], "fingerprint"),
        profile=_digest(data["profile"], "profile").hex() if "profile" in data else None,
        spec=spec,
        num_tokens=num_tokens,
        positions=_positions(data["positions"], num_tokens),
        head_range=_range(data["heads"], "heads", spec.kv_heads, empty=False),
        groups=_groups(data["groups"], groups, spec.num_layers, num_tokens, len(codecs)),
        losses=_losses(data["levels"], levels),
        token_digest=_digest(data["digest"], "digest") if "digest" in data else None,
        previous_ids=tuple(
            _integer(item, "previous", 0, MAX_TOKEN_ID) for item in _items(data.get("previous", []), "previous", 0, 2)
        ),
        lineage=_lineage(data["lineage"]) if "lineage" in data else None,
    )
    _check_cover(header)
    return header


def with_token_ids(header: ObjectHeader, ids: tuple[int, ...]) -> ObjectHeader:
    """The header with its token ids, if they are those of its digest. Raises FormatError."""
    if header.token_digest is None or token_digest(ids) != header.token_digest:
        raise FormatError("token ids: expected those of the header's digest; got others")
    return replace(header, token_ids=ids)


def _spec(data: Any) -> KVSpec:
    spec = KVSpec.from_json(data)
    if not _equal(spec.to_json(), data):
        raise FormatError("header: spec: expected the form that docs/format.md describes; got other or further fields")
    return spec


def _equal(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal; unlike Python's ==, true isn't 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _codec(data: Any) -> CodecEntry:
    fields = _object(data, "codecs", {"id", "config"})
    codec_id = _text(fields["id"], "codec id", _CODEC_ID)
    if not isinstance(fields["config"], dict):
        raise FormatError(f"header: config of codec {codec_id}: expected an object; got {_show(fields['config'])}")
    return CodecEntry(codec_id, fields["config"])


def _positions(data: Any, num_tokens: int) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for item in _items(data, "positions", 1, num_tokens):
        start, count = _items(item, "positions", 2, 2)
        start = _integer(start, "positions", 0, MAX_POSITION)
        runs.append((start, _integer(count, "positions", 1, num_tokens)))
    total = sum(count for _, count in runs)
    if total != num_tokens:
        raise FormatError(f"header: positions: expected runs of {num_tokens} tokens in all; got {total}")
    return tuple(runs)


def _losses(data: Any, levels: int) -> tuple[LevelLoss, ...]:
    losses = []
    for i, item in enumerate(_items(data, "levels", levels, levels)):
        fields = _object(item, "levels", {"level"}, {"kl"})
        lowest, highest = (i, i) if levels > 1 else (0, 255)
        level = _integer(fields["level"], "level", lowest, highest)
        losses.append(LevelLoss(level, _loss(fields["kl"], "kl") if "kl" in fields else None))
    return tuple(losses)


def _lineage(data: Any) -> Lineage:
    fields = _object(data, "lineage", {"codec", "level"}, {"predicted_kl"})
    return Lineage(
        codec=_text(fields["codec"], "lineage codec", _CODEC_ID),
        level=_integer(fields["level"], "lineage level", 0, 255),
        predicted_kl=_loss(fields["predicted_kl"], "lineage predicted_kl") if "predicted_kl" in fields else None,
    )


def _groups(data: Any, count: int, layers: int, tokens: int, codecs: int) -> tuple[Group, ...]:
    """Groups from their runs; never more than the prelude's count."""
    groups: list[Group] = []
    for item in _items(data, "groups", 1, count):
        fields = _object(item, "groups", {"layers", "parts", "codec"}, {"tokens"})
        first, last, step = (_integer(x, "group layers", 0, layers) for x in _items(fields["layers"], "layers", 3, 3))
        if first >= last or step < 1 or (last - first) % step:
            raise FormatError(
                f"header: group layers: expected [first, last, step] of whole steps; got {first, last, step}"
            )
        codec = _integer(fields["codec"], "group codec", 0, codecs - 1)
        held = _range(fields["tokens"], "group tokens", tokens) if "tokens" in fields else None
        parts: list[tuple[tuple[int, int], tuple[str, ...]]] = []
        for part in _items(fields["parts"], "parts", 1, count):
            entry = _object(part, "parts", {"names", "heads"})
            parts.append((_range(entry["heads"], "group heads", MAX_HEADS), _texts(entry["names"], "group names")))
        if len(parts) * ((last - first) // step) > count - len(groups):
            raise FormatError(f"header: groups: expected {count}, the prelude's count; got more")
        for layer in range(first, last, step):
            groups += [Group((layer, layer + step), heads, names, held, codec) for heads, names in parts]
    if len(groups) != count:
        raise FormatError(f"header: groups: expected {count}, the prelude's count; got {len(groups)}")
    return tuple(groups)


def held_heads(layer: LayerSpec, head_range: tuple[int, int]) -> tuple[int, int]:
    """The heads of a layer in an object that holds `head_range`: latents and states are never split."""
    if layer.kind in (LayerKind.MLA, LayerKind.STATE):
        return (0, max(1, layer.kv_heads))
    return (min(head_range[0], layer.kv_heads), min(head_range[1], layer.kv_heads))


def _check_cover(header: ObjectHeader) -> None:
    """Every (layer, head, name) that the object holds is in exactly one group, with the same tokens in a layer.

    The work is bounded: each step takes at least one cell of layers x heads x names that no step before it took,
    but for empty head ranges, of which a layer and name may have one.
    """
    spec = header.spec
    held: dict[tuple[int, str], int] = {}
    tokens: dict[int, tuple[int, int]] = {}
    for i, group in enumerate(header.groups):
        bits = (1 << group.heads[1]) - (1 << group.heads[0])
        for layer in range(*group.layers):
            names = spec.layers[layer].names
            low, high = held_heads(spec.layers[layer], header.head_range)
            if not low <= group.heads[0] <= group.heads[1] <= high:
                raise FormatError(f"header: group {i}: layer {layer} holds heads {low}..{high}; got {group.heads}")
            if bool(names) != bool(group.names) or any(name not in names for name in group.names):
                raise FormatError(f"header: group {i}: layer {layer} holds tensors {names}; got {group.names}")
            span = group.tokens or (0, header.num_tokens)
            if tokens.setdefault(layer, span) != span:
                raise FormatError(f"header: group {i}: layer {layer} holds tokens {tokens[layer]}; got {span}")
            for name in group.names or ("",):
                before = held.get((layer, name))
                if before is not None and (before & bits or not bits or not before):
                    raise FormatError(f"header: group {i}: layer {layer} {name}: heads {group.heads} are in two groups")
                held[layer, name] = (before or 0) | bits
    for layer, want in enumerate(spec.layers):
        low, high = held_heads(want, header.head_range)
        for name in want.names or ("",):
            if held.get((layer, name)) != (1 << high) - (1 << low):
                raise FormatError(
                    f"header: groups: layer {layer} {name}: expected heads {low}..{high} in groups; got some"
                )


# --------------------------------------------------------------------------- typed fields of hostile JSON
def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _object(
    value: Any, where: str, required: set[str], optional: frozenset[str] | set[str] = frozenset()
) -> dict[str, Any]:
    if not isinstance(value, dict) or not required <= set(value) <= required | optional:
        raise FormatError(f"header: {where}: expected an object of {describe(sorted(required))}; got {_show(value)}")
    return value


def _items(value: Any, where: str, least: int, most: int) -> list[Any]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        got = f"{len(value)}" if isinstance(value, list) else _show(value)
        raise FormatError(f"header: {where}: expected a list of {least}..{most} items; got {got}")
    return value


def _integer(value: Any, where: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise FormatError(f"header: {where}: expected an integer within {low}..{high}; got {_show(value)}")
    return value


def _range(value: Any, where: str, most: int, empty: bool = True) -> tuple[int, int]:
    first, last = (_integer(item, where, 0, most) for item in _items(value, where, 2, 2))
    if first > last or (first == last and not empty):
        raise FormatError(f"header: {where}: expected a range within 0..{most}; got {first}..{last}")
    return first, last


def _text(value: Any, where: str, form: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not form.fullmatch(value):
        raise FormatError(f"header: {where}: expected text of the form {form.pattern}; got {_show(value)}")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    texts = tuple(_items(value, where, 0, 16))
    if not all(isinstance(text, str) for text in texts) or len(set(texts)) != len(texts):
        raise FormatError(f"header: {where}: expected a list of different names; got {_show(value)}")
    return texts


def _digest(value: Any, where: str) -> bytes:
    return bytes.fromhex(_text(value, where, _DIGEST))


def _loss(value: Any, where: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1e6:
        raise FormatError(f"header: {where}: expected a number of nats >= 0; got {_show(value)}")
    return float(value)
