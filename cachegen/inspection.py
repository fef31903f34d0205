"""What is in an object, as data: the rows of `cachegen inspect`."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from .container import VERSION, ObjectReader


def describe(reader: ObjectReader) -> dict[str, Any]:
    """All that an object's head tells, JSON-able: sizes in bytes, elements as docs/format.md counts them.

    Needs the head only. Token ids are counted, not shown: they are the prompt.
    """
    header, spec = reader.header, reader.header.spec
    groups = range(len(header.groups))
    elements = sum(header.group_elements(g) for g in groups)
    raw = elements * spec.torch_dtype.itemsize
    lengths = reader.index["length"].reshape(reader.num_levels, len(header.groups))
    levels = []
    for q, loss in enumerate(header.losses):
        size = reader.level_size(q)
        levels.append(
            {
                "level": loss.level,
                "predicted_kl": loss.predicted_kl,
                "segment_bytes": int(lengths[q].sum()),
                "bytes_to_read": size,
                "bits_per_element": _per(8 * size, elements),
                "ratio": _per(raw, size),
            }
        )
    return {
        "version": VERSION,
        "codec": header.codecs[0].codec_id,
        "codecs": [{"id": codec.codec_id, "config": dict(codec.config)} for codec in header.codecs],
        "model_type": spec.model_type,
        "dtype": spec.dtype,
        "layers": spec.num_layers,
        "layer_kinds": [
            {"kind": kind.value, "layers": len(list(run))} for kind, run in groupby(x.kind for x in spec.layers)
        ],
        "kv_heads": spec.kv_heads,
        "head_range": list(header.head_range),
        "tokens": header.num_tokens,
        "positions": [[start, start + count] for start, count in header.positions],
        "fingerprint": header.fingerprint.hex(),
        "profile": header.profile,
        "token_digest": None if header.token_digest is None else header.token_digest.hex(),
        "token_ids": 0 if header.token_ids is None else len(header.token_ids),
        "previous_ids": len(header.previous_ids),
        "lineage": None if header.lineage is None else header.lineage.to_json(),
        "elements": elements,
        "raw_bytes": raw,
        "bytes": reader.total_size,
        "head_bytes": reader.head_size,
        "parts": {
            **reader.parts,
            "segments": int(lengths.sum()),
            "padding": sum(padding.stop - padding.start for padding in reader.paddings()),
        },
        "levels": levels,
        "groups": [
            {
                "layers": list(group.layers),
                "heads": list(group.heads),
                "names": list(group.names),
                "tokens": None if group.tokens is None else list(group.tokens),
                "codec": header.codecs[group.codec].codec_id,
                "elements": header.group_elements(g),
                "bytes": [int(length) for length in lengths[:, g]],
                "bits_per_element": _per(8 * int(lengths[:, g].sum()), header.group_elements(g)),
            }
            for g, group in enumerate(header.groups)
        ],
    }


def _per(amount: int, units: int) -> float | None:
    return amount / units if units else None
