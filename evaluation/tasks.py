"""Retrieval tasks made on the spot: facts hidden in a long text, asked for after the compressed context.

A context holds facts of four tasks among filler from evaluation texts, and is asked every one of them:

- passkey: a 5-digit key;
- word: a secret word of a named person;
- several: house numbers of several people, alike but for the names;
- lookup: values of keys, listed together as a table.

An answer is exact if greedy decoding would give all its tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .corpora import documents

TASKS = ("passkey", "word", "several", "lookup")
SOLVED = 0.8
"""A task counts only if the untouched model answers at least this share of its cases (definitions)."""

NAMES = (
    "Anna Boris Clara David Edith Frank Greta Henry Irene Jacob Karen Louis Maria Nigel Olive Peter Rosa Simon Tanya "
    "Victor"
).split()
WORDS = (
    "anchor barrel candle dragon engine feather garden hammer island jacket kettle lantern marble needle orange "
    "pepper ribbon saddle ticket umbrella velvet walnut yellow zipper basket copper diamond falcon ginger honey"
).split()


@dataclass(frozen=True)
class Question:
    """A question on a context: token ids of the prompt that follows it, and of the exact answer."""

    task: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class TaskContext:
    """Token ids of a context with facts in it, and the questions on them."""

    name: str
    ids: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Fact:
    """A sentence that is hidden in the text, and the prompt that its answer completes."""

    task: str
    sentence: str
    prompt: str
    answer: str


def facts(rng: random.Random) -> list[Fact]:
    """The facts of one context, ten questions in all: a key, two words, four houses, three entries."""
    found = []
    key = f"{rng.randrange(10_000, 100_000)}"
    found.append(Fact("passkey", f"The pass key is {key}. Remember it. {key} is the pass key.", "The pass key is", key))
    names = rng.sample(NAMES, 6)
    words = rng.sample(WORDS, 5)
    for name, word in zip(names[:2], words[:2], strict=True):
        prompt = f"The secret word of {name} is"
        found.append(Fact("word", f"{prompt} {word}.", prompt, word))
    for name in names[2:]:
        prompt, number = f"The house number of {name} is", f"{rng.randrange(100, 1000)}"
        found.append(Fact("several", f"{prompt} {number}.", prompt, number))
    records = {word: f"{rng.randrange(10, 100)}" for word in words[2:]}
    table = "A table of values. " + " ".join(f"The value of {key} is {value}." for key, value in records.items())
    for key, value in records.items():
        found.append(Fact("lookup", table, f"The value of {key} is", value))
    return found


def filler(rng: random.Random) -> list[str]:
    """Sentences of evaluation's prose, starting anywhere."""
    pool = documents("prose", "evaluation")
    text = " ".join(rng.choice(pool).text.split())
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
    start = rng.randrange(len(sentences))
    return sentences[start:] + sentences[:start]


def task_contexts(tokenizer: Any, cases: int, tokens: int = 768, seed: int = 0) -> list[TaskContext]:
    """As many contexts of about `tokens` ids (never more) as hold at least `cases` questions."""
    found: list[TaskContext] = []
    total = 0
    while total < cases:
        rng = random.Random(f"tasks/{seed}/{len(found)}")
        context = _context(tokenizer, f"tasks-{len(found)}", tokens, rng)
        found.append(context)
        total += len(context.questions)
    return found


def _context(tokenizer: Any, name: str, tokens: int, rng: random.Random) -> TaskContext:
    hidden = facts(rng)
    sentences = list(dict.fromkeys(fact.sentence for fact in hidden))
    rng.shuffle(sentences)
    budget = tokens - sum(len(_ids(tokenizer, " " + sentence)) for sentence in sentences) - 16
    text: list[str] = []
    for sentence in filler(rng):
        size = len(_ids(tokenizer, " " + sentence))
        if size <= budget:
            budget -= size
            text.append(sentence)
        if budget < 32:
            break
    # Facts lie anywhere but at the very end, in the order of `sentences`.
    places = sorted(rng.randrange(max(1, len(text) - 2)) for _ in sentences)
    for place, sentence in reversed(list(zip(places, sentences, strict=True))):
        text.insert(place, sentence)
    ids = _ids(tokenizer, " ".join(text))[:tokens]
    questions = [
        Question(
            fact.task,
            tuple(_ids(tokenizer, "\n\n" + fact.prompt)),
            tuple(_ids(tokenizer, " " + fact.answer)),
        )
        for fact in hidden
    ]
    return TaskContext(name, tuple(ids), tuple(questions))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def solved_tasks(outcomes: Sequence[tuple[str, bool]]) -> dict[str, float]:
    """Accuracy of the untouched model by task, for the tasks that it solves often enough to count."""
    by_task: dict[str, list[bool]] = {}
    for task, right in outcomes:
        by_task.setdefault(task, []).append(right)
    shares = {task: sum(results) / len(results) for task, results in by_task.items()}
    return {task: share for task, share in shares.items() if share >= SOLVED}
