"""The text of `--help`: tyro draws it from the dataclasses, their docstrings and the values read so far."""

import dataclasses
import inspect
import json
from typing import Annotated, Any, Literal, cast, get_origin

from torchtitan_lite.config.messages import limits
from torchtitan_lite.config.schema import classes, field_types, is_fixed, members_by_tag, note, tag, unwrapped
from torchtitan_lite.registry import Names


def print_help(config: Any, prog: str) -> None:
    """Print every option, with its value in `config` as the default. A choice shows the chosen member."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()
    registry.struct_rule(_Options(type(config), _choices(type(config))))
    try:
        tyro.cli(
            type(config),
            prog=prog,
            description=(inspect.getdoc(type(config)) or "").replace("\n\n", "\n"),
            args=["--help"],
            default=config,
            config=(tyro.conf.AvoidSubcommands,),
            registry=registry,
        )
    except SystemExit:
        return


class _Options:
    """A rule for tyro: how the options of a dataclass are shown."""

    def __init__(self, root: type, choices: dict[type, tuple[str, dict[str, type]]]) -> None:
        self.root, self.choices = root, choices
        self.asking_tyro = False

    def __call__(self, info: Any) -> Any:
        from tyro.constructors import ConstructorRegistry

        if self.asking_tyro or not dataclasses.is_dataclass(info.type):
            return None
        self.asking_tyro = True
        try:
            spec = cast(Any, ConstructorRegistry.get_struct_spec(info))
        finally:
            self.asking_tyro = False
        fields = [self.shown(cast(type, info.type), field) for field in spec.fields if not _is_empty(field)]
        return dataclasses.replace(spec, fields=(*(_command() if info.type is self.root else ()), *fields))

    def shown(self, owner: type, field: Any) -> Any:
        """A field as the command line has it."""
        import tyro

        if get_origin(unwrapped(field.type)[0]) is dict:
            field = dataclasses.replace(field, type=Annotated[dict, _json()])
        if dataclasses.is_dataclass(field.default):
            # The annotation allows any member of the door; the options to show are those of the default.
            field = dataclasses.replace(field, type=type(field.default))
        by, members = self.choices.get(owner, ("", {}))
        if field.name == by:
            choice: Any = Literal[tuple(members)]  # type: ignore
            selector = Annotated[choice, tyro.conf.arg(name="")] if by == "kind" else choice
            text = f"{_described(members)}Each has options of its own; those shown here are the chosen one's."
            return dataclasses.replace(field, type=selector, helptext=text)
        text = cast(str | None, field.helptext() if callable(field.helptext) else field.helptext)
        words = (text or "").split()
        annotation = field_types(owner)[field.name]
        if is_fixed(annotation) and not words:
            words = ["The name of this section; nothing else may stand here."]
        if range_ := limits(annotation):
            words.append(f"{range_[0].upper()}{range_[1:]}.")
        if names := note(annotation, Names):
            words.append(f"Names: {', '.join(names.door.members)}.")
        return dataclasses.replace(field, helptext=" ".join(words) or None)


def _is_empty(field: Any) -> bool:
    """True for a section without options."""
    return dataclasses.is_dataclass(field.default) and not dataclasses.fields(field.default)


def _described(members: dict[str, type]) -> str:
    """The first paragraph of each member's docstring."""
    lines = {name: (inspect.getdoc(member) or "").partition("\n\n")[0] for name, member in members.items()}
    # dataclass() gives a class without a docstring its signature instead.
    said = {
        name: line
        for name, line in lines.items()
        if line and not line.startswith(f"{members[name].__name__}(")
    }
    return "".join(f"{name}: {' '.join(line.split())} " for name, line in said.items())


def _choices(cls: type) -> dict[type, tuple[str, dict[str, type]]]:
    """For each member of a choice below `cls`: the choice's tag, and all members."""
    found: dict[type, tuple[str, dict[str, type]]] = {}
    for annotation in field_types(cls).values():
        members = members_by_tag(annotation)
        found |= {member: (tag(annotation), members) for member in members.values()}
        for section in classes(annotation):
            found |= _choices(section)
    return found


def _command() -> tuple[Any, ...]:
    """The options of the command itself, which are no keys of the configuration."""
    import tyro
    from tyro.constructors import PrimitiveConstructorSpec, StructFieldSpec

    file = PrimitiveConstructorSpec(
        nargs="*",
        metavar="FILE.toml",
        instance_from_str=list,
        is_instance=lambda value: isinstance(value, list),
        str_from_instance=list,
    )
    no_default = tyro.conf.arg(help_behavior_hint="")
    files: Any = Annotated[list, file, no_default]
    switch: Any = Annotated[bool, tyro.conf.FlagCreatePairsOff, no_default]
    config = "Read this file. Several --config merge from left to right; the options below come last."
    number: Any = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
    dry_run = "Check everything, print the resolved configuration as TOML, and exit."
    world_size = "With --dry-run: check for this many ranks, without torchrun."
    return (
        StructFieldSpec(name="config", type=files, default=[], helptext=config),
        StructFieldSpec(name="dry_run", type=switch, default=False, helptext=dry_run),
        StructFieldSpec(name="world_size", type=number, default=None, helptext=world_size),
    )


def _json() -> Any:
    from tyro.constructors import PrimitiveConstructorSpec

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda words: json.loads(words[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    )
