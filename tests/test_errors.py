"""The tree of errors: stable numbers, each listed in docs/errors.md."""

import copy
import re
from pathlib import Path

import pytest

from cachegen import errors

TABLE = re.compile(r"^\| (\d{3}) \| `(\w+)` \| ([^|]+) \|", re.MULTILINE)
DOCS = Path(__file__).parent.parent / "docs" / "errors.md"


def test_docs_list_exactly_the_errors_there_are():
    listed = {(int(code), name) for code, name, _ in TABLE.findall(DOCS.read_text())}
    assert listed == {(cls.code, cls.__name__) for cls in errors.all_errors()}


def test_docs_state_the_tree():
    parents = {name: re.findall(r"`(\w+)`", text) for _, name, text in TABLE.findall(DOCS.read_text())}
    for cls in errors.all_errors():
        assert parents[cls.__name__] == [base.__name__ for base in cls.__bases__], cls


def test_codes_are_unique_and_grouped():
    codes = [cls.code for cls in errors.all_errors()]
    assert len(set(codes)) == len(codes)
    groups = {
        errors.InputError: 1,
        errors.FormatError: 2,
        errors.IdentityError: 3,
        errors.StoreError: 4,
        errors.InstallError: 5,
    }
    for cls in errors.all_errors():
        for root, hundred in groups.items():
            if issubclass(cls, root):
                assert cls.code // 100 == hundred


@pytest.mark.parametrize("cls", errors.all_errors(), ids=lambda cls: cls.__name__)
def test_every_error_shows_its_code_and_keeps_its_details(cls):
    error = cls("expected a, got b. Do c", size=3)
    assert str(error) == f"expected a, got b. Do c [CG{cls.code}]"
    assert error.details["size"] == 3


def test_builtin_bases_let_callers_catch_what_they_know():
    with pytest.raises(ValueError, match="x"):
        raise errors.ShapeError("x")
    with pytest.raises(KeyError):
        raise errors.KeyNotFound("x")
    with pytest.raises(ImportError):
        raise errors.MissingExtra("x")


def test_what_an_error_carries():
    assert errors.Truncated("x", 2).highest_complete_level == 2
    assert errors.Truncated("x").highest_complete_level is None
    assert errors.FingerprintMismatch("x", {"dtype": ("a", "b")}).fields == {"dtype": ("a", "b")}
    assert errors.FingerprintMismatch("x").fields == {}


def test_errors_survive_being_copied_as_pools_of_processes_do():
    error = copy.copy(errors.Truncated("gone", 1))
    assert isinstance(error, errors.Truncated)
    assert error.highest_complete_level == 1


def test_lists_in_messages_are_cut():
    assert errors.describe(range(3)) == "0, 1, 2"
    assert errors.describe(range(9)) == "0, 1, 2, 3, ... (9)"
