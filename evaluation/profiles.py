"""Profiles for the codecs that need one, calibrated on the calibration texts once and kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import cachegen
from cachegen.codec import Codec
from cachegen.codecs import codec_class
from cachegen.fingerprint import Fingerprint
from cachegen.profile import ModelProfile

from . import corpora
from .models import cache_folder
from .runner import ENGINE_DTYPE

Progress = Callable[[str, int, int], None]
LEARNING = ("calibrate.py", "profile.py", "quantize.py", "codecs", "transforms", "entropy")
"""What of the package a profile depends on: a change there makes a new one."""


@lru_cache(maxsize=4)
def source_digest(*names: str) -> str:
    """16 hex digits over the package's Python sources (all, or those of `names`)."""
    root = Path(cachegen.__file__).parent
    files: list[Path] = []
    for name in names or (".",):
        path = root / name
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def profile_path(
    fingerprint: Fingerprint, codec: str, options: Mapping[str, Any], texts: Mapping[str, str], tokens: int, seed: int
) -> Path:
    """Where the profile that all of these give is kept."""
    known = [fingerprint.digest().hex(), codec, dict(options), dict(texts), tokens, seed, source_digest(*LEARNING)]
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "profiles" / f"{codec}-{name}.safetensors"


def profile_for(
    model: Path,
    codec: str,
    options: Mapping[str, Any] | None = None,
    tokens: int = 32_768,
    seed: int = 0,
    progress: Progress | None = None,
) -> ModelProfile:
    """The profile of a model for `codec`: the kept one, or calibrated now (resumable)."""
    from cachegen.calibrate import calibrate

    options = dict(options or {})
    texts = corpora.calibration_texts(tokens)
    path = profile_path(Fingerprint.from_folder(model), codec, options, texts, tokens, seed)
    if path.exists():
        return ModelProfile.load(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return calibrate(
        model,
        texts,
        path,
        codec=codec,
        tokens=tokens,
        seed=seed,
        options=options,
        dtype=ENGINE_DTYPE,
        progress=progress,
    )


def codec_for(
    model: Path,
    name: str,
    options: Mapping[str, Any] | None = None,
    tokens: int = 32_768,
    seed: int = 0,
    progress: Progress | None = None,
) -> Codec:
    """A codec of the registry for a model folder's bf16 cache, with a profile where it needs one."""
    options = dict(options or {})
    profile = None
    if codec_class(name).needs_profile:
        profile = profile_for(model, name, options, tokens, seed, progress)
    return Codec.for_model(model, name, profile, dtype=ENGINE_DTYPE, **options)
