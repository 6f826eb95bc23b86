"""Read TOML files into nested tables, and find the values that a TOML file cannot hold."""

import math
from typing import Any

from torchtitan_lite.config.problem import MISSING, Problem, dotted

_DEEPEST = 32
"""The most levels of nested tables and lists."""


def read_toml(path: str) -> tuple[dict[str, Any], list[Problem]]:
    """Return the tables of a TOML file. If the file cannot be read, return an empty table and the problem."""
    import tomli

    try:
        with open(path, "rb") as file:
            # Some editors write a byte order mark, which is not part of the text.
            return tomli.loads(file.read().decode("utf-8-sig")), []
    except OSError as error:
        rule, remedy = f"cannot be read ({error.strerror})", "name a TOML file that exists and is readable"
    except UnicodeDecodeError as error:
        rule, remedy = f"is not UTF-8 text (byte {error.start})", "name a TOML file"
    except tomli.TOMLDecodeError as error:
        rule, remedy = f"is not TOML ({error})", "correct the file there"
    except (ValueError, RecursionError) as error:
        rule, remedy = f"is not TOML that can be read ({error})", "name another file, or correct this one"
    return {}, [Problem("--config", path, rule, remedy)]


def storable(table: dict[str, Any], key: str = "") -> tuple[dict[str, Any], list[Problem]]:
    """Return `table` without the values that TOML or 64 bits cannot hold, and a problem for each such value.

    A null in a table stays, because a null removes its key from the layers below.
    """
    problems: list[Problem] = []
    return _storable(table, key, 0, problems), problems


def _storable(value: Any, key: str, depth: int, problems: list[Problem]) -> Any:
    """Return `value` without the parts that cannot be stored, or MISSING if nothing is left of `value`."""
    if fault := _fault(value, depth):
        problems.append(Problem(key, *fault))
        return MISSING
    if isinstance(value, dict):
        children = {
            name: _storable(child, dotted(key, name), depth + 1, problems)
            for name, child in value.items()
            if _storable(name, key, depth, problems) is not MISSING
        }
        return {name: child for name, child in children.items() if child is not MISSING}
    if isinstance(value, list | tuple):
        elements = [_storable(child, key, depth + 1, problems) for child in value]
        return MISSING if MISSING in elements else elements
    return value


def _fault(value: object, depth: int) -> tuple[object, str, str] | None:
    """Return the faulty value, the rule and the remedy if `value` cannot be stored, otherwise None."""
    if depth > _DEEPEST:
        return MISSING, f"is nested more than {_DEEPEST} levels deep", "write a flatter table"
    if isinstance(value, float) and not math.isfinite(value):
        return value, "is not a finite number", "write a finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return value, "does not fit in 64 bits", "write a smaller number"
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        return value, "holds a character that a text file cannot", "take the character out"
    if isinstance(value, list | tuple) and None in value:
        return None, "cannot be written in a TOML file", "leave the key out"
    if not isinstance(value, bool | int | float | str | list | tuple | dict | None):
        return value, "is a date or a time, which no key takes", "put it in quotes"
    return None
