"""Texts to calibrate and to evaluate on: prose, technical text, code, dialogue, and a kind that calibration never sees.

Sources, all offline: public-domain texts that ship with this package (`texts/`), the standard library's sources and
help topics, READMEs of installed packages, and Debian's documentation where it is installed. Each source *file* belongs
to calibration or to evaluation, for good (by name for shipped texts, by a digest of the name for the rest); what an
evaluation file shares with calibration, paragraph by paragraph, is dropped. A seed only chooses among evaluation's.
"""

from __future__ import annotations

import ast
import hashlib
import html
import importlib.util
import math
import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal

from cachegen.errors import InputError

Split = Literal["calibration", "evaluation"]
KINDS = ("prose", "technical", "code", "dialogue")
UNSEEN = "scripture"
"""A kind of text in evaluation only: the King James Version."""
TEXTS = Path(__file__).parent / "texts"
SHIPPED: dict[str, tuple[str, Split]] = {
    "alice-1.txt": ("prose", "calibration"),
    "alice-2.txt": ("prose", "evaluation"),
    "play-1.txt": ("dialogue", "calibration"),
    "play-2.txt": ("dialogue", "evaluation"),
    "kjv.txt": (UNSEEN, "evaluation"),
}
FILES_PER_KIND = 40
FILE_LIMIT = 60_000
"""Characters read of one file, so that no single file dominates its kind."""


CHARACTERS_PER_TOKEN = 4
PASSAGE = 1280 * CHARACTERS_PER_TOKEN
"""Characters of a calibration passage: about the 1280 tokens that calibration takes of a text at a time."""


@dataclass(frozen=True)
class Document:
    """A text with its kind and a portable name (no path of this machine)."""

    name: str
    kind: str
    text: str


@dataclass(frozen=True)
class Context:
    """Token ids of one evaluation context and of the true text that continues it."""

    name: str
    kind: str
    ids: tuple[int, ...]
    continuation: tuple[int, ...]


# ------------------------------------------------------------------------------------------------ where texts come from
def split_of(name: str) -> Split:
    """Which side a source file is on: a digest of its name, so it never changes."""
    return "calibration" if hashlib.sha256(name.encode()).digest()[0] % 2 else "evaluation"


def _shipped(kind: str) -> Iterator[tuple[str, Split, Callable[[], str]]]:
    for name, (its_kind, split) in SHIPPED.items():
        if its_kind == kind:
            yield f"texts/{name}", split, (TEXTS / name).read_text


def _stdlib() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    folders = [
        root,
        *(root / name for name in ("asyncio", "email", "importlib", "json", "logging", "unittest", "xml/dom")),
    ]
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    return [file for file in files if 6_000 <= file.stat().st_size <= 300_000]


def _module(file: Path) -> str:
    return file.relative_to(sysconfig.get_path("stdlib")).as_posix()


def _prose() -> Iterator[tuple[str, Split, Callable[[], str]]]:
    yield from _shipped("prose")
    for folder in ("anarchism", "debian-handbook"):
        for file in sorted(Path("/usr/share/doc", folder).rglob("*.html")):
            name = f"{folder}/{file.name}"
            yield name, split_of(name), lambda file=file: _from_html(_read(file))  # type: ignore[misc]


def _technical() -> Iterator[tuple[str, Split, Callable[[], str]]]:
    yield "pydoc_data/topics.py", "calibration", _help_topics
    for item in distributions():
        name, text = item.metadata["Name"], item.metadata.get_payload()  # type: ignore[attr-defined]
        if isinstance(text, str) and len(text) > 4_000:
            yield f"{name}/METADATA", split_of(f"{name}/METADATA"), lambda text=text: text  # type: ignore[misc]
    for folder in sorted(Path("/usr/share/doc").glob("python3*/html/_sources")):
        for file in sorted(folder.rglob("*.rst.txt")):
            name = f"python-doc/{file.relative_to(folder)}"
            yield name, split_of(name), lambda file=file: _read(file)  # type: ignore[misc]


def _code() -> Iterator[tuple[str, Split, Callable[[], str]]]:
    for file in _stdlib():
        name = f"stdlib/{_module(file)}"
        yield name, split_of(name), lambda file=file: _read(file)  # type: ignore[misc]


def _dialogue() -> Iterator[tuple[str, Split, Callable[[], str]]]:
    yield from _shipped("dialogue")
    for file in _stdlib():
        # A chat quotes its module's docstrings: it stays on the side of that module's source.
        side = split_of(f"stdlib/{_module(file)}")
        yield f"chat/{_module(file)}", side, lambda file=file: chat_from_source(file.stem, _read(file))  # type: ignore[misc]


def _scripture() -> Iterator[tuple[str, Split, Callable[[], str]]]:
    yield from _shipped(UNSEEN)


SOURCES: dict[str, Callable[[], Iterator[tuple[str, Split, Callable[[], str]]]]] = {
    "prose": _prose,
    "technical": _technical,
    "code": _code,
    "dialogue": _dialogue,
    UNSEEN: _scripture,
}


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _from_html(text: str) -> str:
    text = re.sub(r"(?is)<(script|style|head).*?</\1>", " ", text)
    text = re.sub(r"(?i)</(p|h\d|li|div|tr)>", "\n\n", text)
    lines = html.unescape(re.sub(r"<[^>]+>", "", text)).splitlines()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(" ".join(line.split()) for line in lines))


def _help_topics() -> str:
    """The interactive help's topics, one after another (`compound` repeats others and is left out)."""
    spec = importlib.util.find_spec("pydoc_data.topics")
    if spec is None or spec.loader is None:
        return ""
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    topics: dict[str, str] = module.topics
    return "\n\n".join(topics[name] for name in sorted(topics) if name not in ("compound", "specialnames"))


QUESTIONS = (
    "What does {name} do?",
    "How do I use {name}?",
    "Can you explain {name} to me?",
    "And {name}, what is that for?",
    "I came across {name} in {module}. What should I know about it?",
    "Thanks. Tell me about {name} as well, please.",
)


def chat_from_source(module: str, source: str) -> str:
    """A conversation of questions about a module's functions, answered with their docstrings."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    turns: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        answer = ast.get_docstring(node)
        if answer is None or len(answer) < 60:
            continue
        question = QUESTIONS[len(turns) % len(QUESTIONS)].format(name=node.name, module=module)
        turns.append(f"User: {question}\n\nAssistant: {answer}")
    return "\n\n".join(turns)


# --------------------------------------------------------------------------------------------------- the two sides
def paragraphs(text: str) -> list[str]:
    """Blocks between blank lines."""
    return [block for block in re.split(r"\n\s*\n", text) if block.strip()]


def fingerprint(paragraph: str) -> bytes:
    """What makes two paragraphs the same: their words."""
    return hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=12).digest()


@lru_cache(maxsize=16)
def documents(kind: str, split: Split) -> tuple[Document, ...]:
    """The documents of a kind on one side, in a fixed order that mixes sources, at most FILES_PER_KIND.

    Raises InputError if there is no such kind.
    """
    if kind not in SOURCES:
        raise InputError(f"kind of text: expected one of {', '.join(SOURCES)}; got {kind!r}")
    listed = [(name, read) for name, side, read in SOURCES[kind]() if side == split]
    shipped = [item for item in listed if item[0].startswith("texts/")]
    others = sorted(
        (item for item in listed if not item[0].startswith("texts/")),
        key=lambda item: hashlib.sha256(item[0].encode()).digest(),
    )
    taken = _calibration_paragraphs() if split == "evaluation" else frozenset()
    found: list[Document] = []
    for name, read in [*shipped, *others]:
        if len(found) == FILES_PER_KIND:
            break
        text = read()[:FILE_LIMIT]
        if taken:
            text = "\n\n".join(block for block in paragraphs(text) if fingerprint(block) not in taken)
        if len(text) >= 3_000:
            found.append(Document(name, kind, text))
    return tuple(found)


@lru_cache(maxsize=1)
def _calibration_paragraphs() -> frozenset[bytes]:
    """Every paragraph of calibration that has enough words to be more than a phrase."""
    return frozenset(
        fingerprint(block)
        for kind in KINDS
        for document in documents(kind, "calibration")
        for block in paragraphs(document.text)
        if len(block) >= 80
    )


# -------------------------------------------------------------------------------------------------------- what is used
def calibration_texts(tokens: int = 32_768, kinds: Sequence[str] = KINDS) -> dict[str, str]:
    """Texts to calibrate on, by name: passages of about PASSAGE characters, kinds and files in turn."""
    pools = [_passages(documents(kind, "calibration")) for kind in kinds]
    wanted = math.ceil(tokens * CHARACTERS_PER_TOKEN / PASSAGE)
    texts: dict[str, str] = {}
    while len(texts) < wanted:
        before = len(texts)
        for pool in pools:
            item = next(pool, None)
            if item is not None and len(texts) < wanted:
                texts[item[0]] = item[1]
        if len(texts) == before:
            break
    return texts


def _passages(pool: Sequence[Document]) -> Iterator[tuple[str, str]]:
    longest = max((len(document.text) for document in pool), default=0)
    for start in range(0, longest, PASSAGE):
        for document in pool:
            text = document.text[start : start + PASSAGE]
            if len(text) == PASSAGE or (start == 0 and text):
                yield f"{document.name}[{start}:{start + len(text)}]", text


def contexts(
    tokenizer: Any, count: int, tokens: int, continuation: int = 256, seed: int = 0, files: Sequence[Path] = ()
) -> list[Context]:
    """`count` evaluation contexts of `tokens` ids, each with the `continuation` ids that truly follow.

    Kinds take turns (the unseen kind is the fifth); within a kind, files take turns, and no two contexts of a file
    overlap. `files` (a user's own texts) replace all of them. Raises InputError if the texts are too short.
    """
    found_in: dict[str, Sequence[Document]]
    if files:
        found_in = {"file": [Document(file.name, "file", _read(file)) for file in files]}
    else:
        found_in = {kind: documents(kind, "evaluation") for kind in (*KINDS, UNSEEN)}
    pools = {
        kind: _windows(tokenizer, found_in[kind], tokens + continuation, random.Random(f"{seed}/{kind}"))
        for kind in found_in
    }
    found: list[Context] = []
    while len(found) < count:
        before = len(found)
        for pool in pools.values():
            window = next(pool, None)
            if window is not None and len(found) < count:
                document, ids = window
                found.append(Context(document.name, document.kind, ids[:tokens], ids[tokens:]))
        if len(found) == before:
            raise InputError(
                f"expected texts for {count} contexts of {tokens} + {continuation} tokens; there are {len(found)}. "
                "Ask for fewer or shorter contexts, or give longer files with --text-file"
            )
    return found


def _windows(
    tokenizer: Any, pool: Sequence[Document], length: int, rng: random.Random
) -> Iterator[tuple[Document, tuple[int, ...]]]:
    """Windows of `length` ids that don't overlap: one of every document, then the next of every document, ..."""
    order = list(pool)
    rng.shuffle(order)
    encoded: dict[str, tuple[list[int], int]] = {}
    turn = 0
    while order:
        for document in list(order):
            if document.name not in encoded:
                ids = list(tokenizer(document.text, add_special_tokens=False)["input_ids"])
                slack = len(ids) % length if len(ids) >= length else 0
                encoded[document.name] = (ids, rng.randint(0, slack))
            ids, offset = encoded[document.name]
            start = offset + turn * length
            if start + length <= len(ids):
                yield document, tuple(ids[start : start + length])
            else:
                order.remove(document)
        turn += 1


def describe(found: Sequence[Context]) -> dict[str, Any]:
    """What a result says of its texts: how many of each kind, and a digest of them all."""
    digest = hashlib.sha256()
    kinds: dict[str, int] = {}
    for context in found:
        kinds[context.kind] = kinds.get(context.kind, 0) + 1
        digest.update(",".join(map(str, (*context.ids, *context.continuation))).encode())
    return {"kinds": kinds, "digest": digest.hexdigest()[:16]}
