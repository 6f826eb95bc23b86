"""A bug that a test must notice."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """In `file`, `old` becomes `new`; one of `tests` (a path, and " -k EXPRESSION" if need be) must fail."""

    file: str
    old: str
    new: str
    tests: str
