"""Retrieval tasks: made anew the same way, answerable from their text."""

from __future__ import annotations

import random

import pytest
from cachegen.evaluation import tasks


class Letters:
    """A tokenizer of characters."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    @staticmethod
    def text(ids: tuple[int, ...]) -> str:
        return "".join(map(chr, ids))


@pytest.fixture(scope="module")
def found() -> list[tasks.TaskContext]:
    return tasks.task_contexts(Letters(), 30, tokens=3000, seed=5)


def test_there_are_enough_cases_of_every_task(found: list[tasks.TaskContext]) -> None:
    questions = [q for context in found for q in context.questions]
    assert len(questions) >= 30
    assert {q.task for q in questions} == set(tasks.TASKS)
    assert all(len(context.ids) <= 3000 for context in found)
    assert min(len(context.ids) for context in found) > 2400


def test_every_answer_stands_in_the_context_once_asked_for(found: list[tasks.TaskContext]) -> None:
    for context in found:
        text = Letters.text(context.ids)
        for question in context.questions:
            asked = Letters.text(question.prompt).strip() + Letters.text(question.answer)
            assert text.count(asked + ".") == 1, asked


def test_a_seed_fixes_them(found: list[tasks.TaskContext]) -> None:
    assert tasks.task_contexts(Letters(), 30, tokens=3000, seed=5) == found
    assert tasks.task_contexts(Letters(), 30, tokens=3000, seed=6) != found


def test_facts_differ_within_a_context() -> None:
    for seed in range(20):
        prompts = [fact.prompt for fact in tasks.facts(random.Random(seed))]
        assert len(set(prompts)) == len(prompts)


def test_only_tasks_solved_often_enough_count() -> None:
    outcomes = [("a", True)] * 8 + [("a", False)] * 2 + [("b", True)] * 7 + [("b", False)] * 3
    assert tasks.solved_tasks(outcomes) == {"a": 0.8}
