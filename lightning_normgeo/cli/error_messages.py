"""One-line explanations of mistakes on the command line, with the allowed values or the nearest names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from lightning_normgeo.errors import nearest_names

_UNKNOWN = re.compile(r"(?:unrecognized arguments: -*|does not accept option '|Option ')([\w.+-]+)")
_VALUE = re.compile(r"""Parser key "(?P<key>[^"]+)":""")
_GIVEN = re.compile(r"(?:Given value|Got value): (.*)")
_NAME = re.compile(r"[\w.-]+")
"""Names of options that users can type; Lightning adds internal ones, with other characters, for linked arguments."""
_NO_DATA = re.compile(r"arguments are required: \w+\.data\b")
_NO_YAML = "Problems parsing config"
_SHORT = {type(None): "null", int: "an integer", float: "a number", bool: "true or false", str: "text"}


def explain_mistake(message: str, arguments: Sequence[str], parser: Any, command: str) -> str:
    """Return the error of a parser as one line.

    Args:
        message: Error message of the parser, usually of many lines.
        arguments: Arguments of the command.
        parser: Parser of the command, which knows its options.
        command: Name of the command, such as ``fit``.
    """
    if _NO_YAML in message:
        return _not_yaml(arguments) or " ".join(message.split())
    if _NO_DATA.search(message):
        return (
            f"normgeo {command} needs data: a configuration that has some, such as --config quickstart, or --data with "
            "DigitsDataModule, CIFARDataModule, ImageFolderDataModule or your own."
        )
    unknown = _UNKNOWN.search(message)
    if unknown is not None:
        return _unknown(_in_full(unknown[1], arguments), parser, command)
    value = _VALUE.search(message)
    given = _GIVEN.findall(message)
    if value is not None and given:
        expected = _expected(value["key"], given[-1], parser)
        if expected:
            return f"--{value['key']} {given[-1]} cannot be used. {expected}"
    return " ".join(message.split())


def _unknown(option: str, parser: Any, command: str) -> str:
    """Return the explanation of an unknown option, with the names nearest to it."""
    known = [name[2:] for action in parser._actions for name in action.option_strings if name.startswith("--")]
    holder = next((key for key in _prefixes(option) if _classes(_type_of(parser, key))), None)
    if holder is not None:
        known = [f"{holder}.{name}" for kind in _subclasses(_type_of(parser, holder)) for name in _parameters(kind)]
    if not _looks_like_an_option(option, known):
        return f"normgeo {command} takes options only, and was given {option!r}. Put -- in front of their names."
    names = [f"--{name}" for name in known if not name.endswith(("+", ".help")) and _NAME.fullmatch(name)]
    nearest = nearest_names(f"--{option.replace('.init_args', '')}", names).replace("'", "")
    return f"--{option} is no option of normgeo {command}. Nearest: {nearest}. See normgeo {command} --help-all."


def _looks_like_an_option(option: str, known: Sequence[str]) -> bool:
    return "." in option or any(name.startswith(option[:3]) for name in known)


def _expected(key: str, given: str, parser: Any) -> str:
    """Return a sentence about the allowed values of an option; empty if they are not known."""
    hint = _type_of(parser, key)
    choices = [choice for kind in _flat(hint) if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return f"Choose one of: {nearest_names(given, map(str, choices))}."
    names = [kind.__name__ for kind in _subclasses(hint)]
    if names:
        return f"Nearest classes: {nearest_names(given, names)}. A class of another package needs its module in front."
    words = [_SHORT[kind] for kind in _flat(hint) if kind in _SHORT]
    return f"It has to be {' or '.join(dict.fromkeys(words))}." if words else ""


def _type_of(parser: Any, key: str) -> Any:
    actions = {action.dest: action for action in parser._actions}
    return getattr(actions.get(key), "_typehint", None)


def _flat(hint: Any) -> Iterator[Any]:
    """Yield the types inside a union or a container."""
    if get_origin(hint) is Literal or not get_args(hint):
        yield hint
    else:
        for part in get_args(hint):
            yield from _flat(part)


def _classes(hint: Any) -> list[type]:
    """Return the base classes in a type hint whose subclasses an option accepts."""
    return [kind for kind in _flat(hint) if isinstance(kind, type) and kind not in _SHORT and kind not in (list, dict)]


def _subclasses(hint: Any) -> list[type]:
    """Return all loaded subclasses of the classes in a type hint, without private ones."""
    found: dict[type, None] = {}
    waiting = _classes(hint)
    while waiting:
        kind = waiting.pop()
        if kind not in found:
            found[kind] = None
            waiting += type.__subclasses__(kind)
    bases = _classes(hint)
    return [kind for kind in found if kind not in bases and not kind.__name__.startswith("_")]


def _parameters(kind: type) -> list[str]:
    try:
        return [name for name in inspect.signature(kind).parameters if name not in ("self", "args", "kwargs", "params")]
    except (TypeError, ValueError):
        return []


def _prefixes(option: str) -> Iterator[str]:
    """Yield the parents of a dotted option, the longest first, without ``init_args``."""
    parts = option.split(".")
    for length in range(len(parts) - 1, 0, -1):
        yield ".".join(part for part in parts[:length] if part != "init_args")


def _in_full(option: str, arguments: Sequence[str]) -> str:
    """Return an option as the user typed it: the parser's message has only its last part."""
    given = (argument.lstrip("-").partition("=")[0] for argument in arguments if argument.startswith("--"))
    return next((one for one in given if one == option or one.endswith(f".{option}")), option)


def _not_yaml(arguments: Sequence[str]) -> str:
    """Return the name of the configuration that is not YAML and the place of the error; empty if there is none."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, _, value = argument.partition("=")
        if before in ("-c", "--config"):
            file = Path(argument)
        elif option in ("-c", "--config"):
            file = Path(value)
        else:
            continue
        if not file.is_file():
            continue
        try:
            yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            return f"{file} is not YAML: {' '.join(str(error).split())}"
    return ""
