"""Texts: the two sides share nothing, and a seed fixes what is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cachegen.evaluation import corpora

from cachegen.errors import InputError


class Words:
    """A tokenizer of words: an id for each."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.ids.setdefault(word, len(self.ids)) for word in text.split()]}


@pytest.fixture(scope="module")
def words() -> Words:
    return Words()


def test_there_are_four_kinds_on_both_sides_and_one_that_calibration_never_sees() -> None:
    for kind in corpora.KINDS:
        assert corpora.documents(kind, "calibration")
        assert corpora.documents(kind, "evaluation")
    assert corpora.documents(corpora.UNSEEN, "calibration") == ()
    assert corpora.documents(corpora.UNSEEN, "evaluation")
    with pytest.raises(InputError, match="kind of text"):
        corpora.documents("poetry", "evaluation")


def test_no_file_and_no_paragraph_is_on_both_sides() -> None:
    learnt = [d for kind in corpora.KINDS for d in corpora.documents(kind, "calibration")]
    judged = [d for kind in corpora.SOURCES for d in corpora.documents(kind, "evaluation")]
    assert not {d.name for d in learnt} & {d.name for d in judged}
    known = {corpora.fingerprint(p) for d in learnt for p in corpora.paragraphs(d.text) if len(p) >= 80}
    assert len(known) > 1000
    assert not [d.name for d in judged for p in corpora.paragraphs(d.text) if corpora.fingerprint(p) in known]


def test_a_module_and_the_chat_about_it_are_on_the_same_side() -> None:
    sources = {d.name.removeprefix("stdlib/") for d in corpora.documents("code", "calibration")}
    chats = {d.name.removeprefix("chat/") for d in corpora.documents("dialogue", "evaluation")}
    assert not sources & chats


def test_calibration_texts_are_balanced_and_come_from_calibration_only() -> None:
    texts = corpora.calibration_texts(32_768)
    assert sum(map(len, texts.values())) == pytest.approx(32_768 * 4, rel=0.1)
    known = {d.name: d for kind in corpora.KINDS for d in corpora.documents(kind, "calibration")}
    kinds = [known[name.partition("[")[0]].kind for name in texts]
    assert max(kinds.count(kind) for kind in corpora.KINDS) - min(kinds.count(kind) for kind in corpora.KINDS) <= 1
    assert all(text in known[name.partition("[")[0]].text for name, text in texts.items())


def test_contexts_take_turns_between_kinds_and_never_overlap(words: Words) -> None:
    found = corpora.contexts(words, 15, 200, 40, seed=1)
    assert [c.kind for c in found[:5]] == [*corpora.KINDS, corpora.UNSEEN]
    assert all(len(c.ids) == 200 and len(c.continuation) == 40 for c in found)
    assert len({c.ids for c in found}) == 15
    evaluated = {d.name: d for kind in corpora.SOURCES for d in corpora.documents(kind, "evaluation")}
    for context in found:
        whole = words(evaluated[context.name].text)["input_ids"]
        window = [*context.ids, *context.continuation]
        assert any(whole[i : i + 240] == window for i in range(len(whole) - 239))


def test_contexts_depend_on_the_seed_alone(words: Words) -> None:
    assert corpora.contexts(words, 6, 100, 20, seed=1) == corpora.contexts(words, 6, 100, 20, seed=1)
    assert corpora.contexts(words, 6, 100, 20, seed=1) != corpora.contexts(words, 6, 100, 20, seed=2)


def test_own_files_replace_the_texts(words: Words, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text(" ".join(f"word{i}" for i in range(1000)))
    found = corpora.contexts(words, 3, 200, 50, files=[file])
    assert {(c.kind, c.name) for c in found} == {("file", "own.txt")}
    assert corpora.describe(found)["kinds"] == {"file": 3}
    with pytest.raises(InputError, match="--text-file"):
        corpora.contexts(words, 5, 200, 50, files=[file])


def test_a_chat_is_made_of_docstrings() -> None:
    source = 'def area(r):\n    """Surface of a circle of radius r, in the square of the unit of r, as a float."""\n'
    chat: Any = corpora.chat_from_source("shapes", source)
    assert chat.startswith("User: What does area do?\n\nAssistant: Surface of a circle")
    assert corpora.chat_from_source("broken", "def (") == ""
