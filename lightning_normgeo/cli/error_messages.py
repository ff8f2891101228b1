"""One-line explanations of mistakes on the command line, with the allowed values or the nearest names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from lightning_normgeo.cli.class_problems import GIVEN, WRONG_TYPE, ClassProblem, class_problem
from lightning_normgeo.errors import nearest_names
from lightning_normgeo.terminal.shipped_configs import shipped_configs
from lightning_normgeo.utilities.one_line_parser import TYPE_WORDS

_UNKNOWN = re.compile(r"(?:unrecognized arguments: |does not accept option '|Option ')(?P<dashes>-*)(?P<name>[\w.+-]+)")
_PART = re.compile(r"NestedArg\(key='(?P<key>[^']+)', val=(?P<value>.*)\)")
"""Value of an option such as ``--optimizer.lr``, of which the parser makes a part of ``--optimizer``."""
_LINKED = re.compile(r"(?P<source>\w+)\)? --> (?P<target>[\w.]+)")
_CLASS_PATH = re.compile(r"'class_path': '([^']+)'")
_ONE_DASH = re.compile(r"-\w[\w.]+")
_NAME = re.compile(r"[\w.-]+")
"""Names of options that users can type; Lightning adds internal ones, with other characters, for linked arguments."""
_NO_DATA = re.compile(r"arguments are required: \w+\.data\b")


def explain_mistake(message: str, arguments: Sequence[str], parser: Any, command: str) -> str:
    """Return the error of a parser as one line.

    Args:
        message: Error message of the parser, usually of many lines.
        arguments: Arguments of the command.
        parser: Parser of the command, which knows its options.
        command: Name of the command, such as ``fit``.
    """
    if _NO_DATA.search(message):
        return (
            f"normgeo {command} needs data: a configuration that has some, such as --config quickstart, or --data with "
            "DigitsDataModule, CIFARDataModule, ImageFolderDataModule or your own."
        )
    one_dash = next((one for one in arguments if _ONE_DASH.fullmatch(one) and f"-{one}" in _options(parser)), None)
    if one_dash is not None:
        return f"{one_dash} has one dash and is read as other options. Write -{one_dash}."
    key, problem = WRONG_TYPE.search(message), class_problem(message)
    if key is not None and problem is not None:
        return _in_class(problem, key["key"], arguments, parser)
    unknown = _UNKNOWN.search(message)
    if unknown is not None:
        word = "unrecognized" in message and not unknown["dashes"]
        return (_not_an_option if word else _unknown)(unknown["name"], parser, command)
    linked = _LINKED.search(message)
    if linked is not None:
        return f"--{linked['target']} is set from --{linked['source']}. Give --{linked['source']} instead."
    given = GIVEN.findall(message)
    if key is not None and given:
        return _wrong_value(key["key"], given[-1], parser) or " ".join(message.split())
    return " ".join(message.split())


def _wrong_value(key: str, given: str, parser: Any) -> str:
    """Return the explanation of a value of a wrong type; empty if the allowed values are not known."""
    part = _PART.fullmatch(given)
    if part is not None:
        return f"--{key}.{part['key']} {part['value']} cannot be used: --{key} has to be given before it, or with it."
    names = {kind.__name__ for kind in _subclasses(_type_of(parser, key))}
    wrong = (path for path in _CLASS_PATH.findall(given) if path.rpartition(".")[2] not in names)
    given = next(wrong, given)  # of a list, the entry that is in the way
    expected = _expected(key, given, parser)
    return f"--{key} {given} cannot be used. {expected}" if expected else ""


def _in_class(problem: ClassProblem, key: str, arguments: Sequence[str], parser: Any) -> str:
    """Return the explanation of a mistake in a block with ``class_path``, or in an option that is part of one.

    Args:
        problem: What the parser says about the block.
        key: Option of the block, such as ``optimizer``.
        arguments: Arguments of the command.
        parser: Parser of the command.
    """
    if problem.unknown:
        option = _as_given(f"{key}.{problem.unknown}", arguments)
        kind = next((one for one in _subclasses(_type_of(parser, key)) if one.__name__ == problem.name), None)
        names = [] if kind is None else _parameters(kind)
        nearest = f" Nearest: {nearest_names(problem.unknown.rpartition('.')[2], names)}." if names else ""
        return f"{option} is no option of {problem.name}.{nearest} See --{key}.help {problem.path}."
    if problem.argument:
        option = _as_given(f"{key}.{problem.argument}", arguments)
        reason = problem.expected or " ".join(problem.detail.split())
        return f"{_with(option, problem.value)} cannot be used by {problem.name}. {reason}"
    given = _with(_as_given(key, arguments), problem.path)
    if problem.reason:
        return f"{given} cannot be used: {problem.reason}"
    return f"{given} cannot be used. {_expected(key, problem.name, parser)}"


def _as_given(option: str, arguments: Sequence[str]) -> str:
    """Return an option as it was typed, or without dashes, as it stands in a configuration."""
    typed = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    plain = (one for one in typed if one[2:].replace(".init_args", "").rstrip("+") == option)
    return next(plain, option)


def _with(option: str, value: str) -> str:
    return f"{option} {value}" if option.startswith("--") else f"{option}: {value}"


def _not_an_option(word: str, parser: Any, command: str) -> str:
    """Return the explanation of a word that is neither an option nor the value of one."""
    hint = f"See normgeo {command} --help."
    if word in shipped_configs():
        hint = f"Write --config {word}."
    elif any(f"--{word}" == name or f"--{word}".startswith(f"{name}.") for name in _options(parser)):
        hint = f"Write --{word}."
    return f"normgeo {command} takes options only, and was given {word!r}. {hint}"


def _unknown(option: str, parser: Any, command: str) -> str:
    """Return the explanation of an unknown option, with the names nearest to it."""
    names = [name for name in _options(parser) if not name.endswith(("+", ".help")) and _NAME.fullmatch(name)]
    nearest = nearest_names(f"--{option.replace('.init_args', '')}", names).replace("'", "")
    return f"--{option} is no option of normgeo {command}. Nearest: {nearest}. See normgeo {command} --help-all."


def _options(parser: Any) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings if name.startswith("--")]


def _expected(key: str, given: str, parser: Any) -> str:
    """Return a sentence about the allowed values of an option; empty if they are not known."""
    hint = _type_of(parser, key)
    choices = [choice for kind in _flat(hint) if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return f"Choose one of: {nearest_names(given, map(str, choices))}."
    names = [kind.__name__ for kind in _subclasses(hint)]
    if names:
        return f"Nearest classes: {nearest_names(given, names)}. A class of another package needs its module in front."
    if get_origin(hint) is tuple:
        return (
            f"It has to be a list of {len(get_args(hint))} values, each {TYPE_WORDS.get(get_args(hint)[0], 'a value')}."
        )
    words = [TYPE_WORDS[kind] for kind in _flat(hint) if kind in TYPE_WORDS]
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
    return [
        kind for kind in _flat(hint) if isinstance(kind, type) and kind not in TYPE_WORDS and kind not in (list, dict)
    ]


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
