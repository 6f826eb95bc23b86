"""TOML files to nested tables, and configurations back to TOML."""

import dataclasses
from typing import Any

from torchtitan_lite.config.problem import Problem


def read_toml(path: str) -> tuple[dict[str, Any], list[Problem]]:
    """The tables of a TOML file; empty, with the problem, when it cannot be read."""
    import tomli

    try:
        with open(path, "rb") as file:
            # A byte order mark, which some editors write, is no part of the text.
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


def to_toml(config: Any) -> str:
    """The TOML that loads back to an equal `config`; a None is left out, for it is always the default."""
    import tomli_w

    return tomli_w.dumps(_table(config))


def _table(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _table(child) for name, child in fields.items() if not _says_nothing(child)}
    if isinstance(value, dict):
        return {name: _table(child) for name, child in value.items()}
    return [_table(child) for child in value] if isinstance(value, list | tuple) else value


def _says_nothing(value: Any) -> bool:
    """Whether a value is None, or a section without keys."""
    return value is None or (dataclasses.is_dataclass(value) and not dataclasses.fields(value))
