"""Limits for the lines of functions and files, and for the attributes of the trainer's classes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "torchtitan_lite"
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_FILE, MOST_ATTRIBUTES = 60, 400, 12


def test_no_function_is_longer_than_a_page() -> None:
    lengths = {f"{path.name}: {name}": n for path in FILES for name, n in functions(path.read_text())}
    assert len(lengths) > 300
    assert {name: n for name, n in lengths.items() if n > MOST_LINES_OF_A_FUNCTION} == {}


def test_no_file_is_longer_than_a_sitting() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in FILES}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES_OF_A_FILE} == {}


@pytest.mark.parametrize(
    ("file", "name"), [("trainer.py", "Trainer"), ("step.py", "Stepper"), ("state.py", "TrainState")]
)
def test_a_part_of_the_trainer_has_at_most_twelve_attributes(file: str, name: str) -> None:
    found = attributes((PACKAGE / "training" / file).read_text(), name)
    assert 5 < len(found) <= MOST_ATTRIBUTES, sorted(found)


def test_attributes_are_found_in_every_kind_of_assignment() -> None:
    source = (
        "class A:\n"
        "    field: int = 0\n"
        "    def f(self):\n"
        "        self.a, (self.b, x.c) = 1, (2, 3)\n"
        "        self.d: int = 1\n"
        "        self.e += 1\n"
        "        for self.g in self.read: pass\n"
        "        self.h.i = self.j[0] = 2\n"
        "class B:\n"
        "    def f(self): self.other = 1\n"
    )
    assert attributes(source, "A") == {"field", "a", "b", "d", "e", "g"}


def test_the_lines_of_a_function_are_counted_from_its_def_to_its_last_line() -> None:
    source = "@decorated\ndef f():\n    def g():\n        pass\n    return g\n"
    assert dict(functions(source)) == {"f": 4, "g": 2}


def functions(source: str) -> Iterator[tuple[str, int]]:
    """The name and the number of lines of each function and method."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def attributes(source: str, name: str) -> set[str]:
    """The attributes of a class: its fields, and the names that its methods set on `self`."""
    (found,) = (
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name
    )
    fields = {
        node.target.id
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    stored = {
        node.attr
        for node in ast.walk(found)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    return fields | stored
