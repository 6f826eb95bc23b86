"""How messages name a type, and what they advise when a value is not of it."""

from typing import Any, Literal, get_args, get_origin

from torchtitan_lite.config.problem import literal, near
from torchtitan_lite.config.schema import alternatives

_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "a table"}

_REMEDIES = {
    int: "write a whole number such as 64",
    float: "write a number such as 0.1",
    bool: "write true or false",
    str: "put it in quotes",
    dict: """write a table, or on the command line JSON such as '{"key": 1}'""",
}


def description(annotation: Any) -> str:
    """What a value of this type is called: "an integer or a list of 2 integers"."""
    names = [_name(tp) for tp in alternatives(annotation) if tp is not type(None)]
    return " or ".join(dict.fromkeys(names))


def remedy(annotation: Any, value: object) -> str:
    """How to write a value of this type instead of the wrong `value`."""
    options = [tp for tp in alternatives(annotation) if tp is not type(None)]
    optional = ", or leave it out" if len(options) < len(alternatives(annotation)) else ""
    if optional and value is None:
        return "leave it out"
    choices = [choice for tp in options if get_origin(tp) is Literal for choice in get_args(tp)]
    if choices:
        return near(value, choices) + optional
    if int in options and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}{optional}"
    main = options[0]
    return _REMEDIES.get(get_origin(main) or main, f"write {description(annotation)}") + optional


def _name(tp: Any) -> str:
    origin, args = get_origin(tp) or tp, list(get_args(tp))
    if origin is Literal:
        return f"one of {', '.join(map(literal, args))}" if len(args) > 1 else literal(args[0])
    if origin is tuple and args[-1] is not ...:
        return f"a list of {len(args)} {_name(args[0]).split()[-1]}s"
    return _NAMES.get(origin, "a list")
