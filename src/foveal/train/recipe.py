"""Recipes: TOML files read into frozen dataclasses, checked before anything starts.

A schema is a dataclass whose fields are made with `key`. Types: bool, int, float, str, Path, Literal, `X | None` (None
where the key is absent), tuple[X, ...], other schemas, and tuples of them (TOML's lists of tables).
"""

import difflib
import math
import os
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", Path: "a path"}


@dataclass(frozen=True)
class _Range:
    """What a number may be."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def allows(self, value: float) -> bool:
        # Written so that nan is never allowed.
        return self.at_least <= value <= self.at_most and (
            (self.above < value or self.above == -math.inf) and (value < self.below or self.below == math.inf)
        )

    def __str__(self) -> str:
        limits = {">=": self.at_least, ">": self.above, "<=": self.at_most, "<": self.below}
        return ", ".join(f"{sign} {limit:g}" for sign, limit in limits.items() if not math.isinf(limit))


def key(doc: str, default: Any = MISSING, **limits: float) -> Any:
    """A field of a schema: what it means, its default (none: the key must be given) and the range of a number, or of
    each number of a tuple: `at_least`, `above`, `at_most`, `below`."""
    metadata = {"doc": doc, "range": _Range(**limits)}
    if isinstance(default, type) and is_dataclass(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def read_recipe(path: str | Path, schema: type[T], overrides: Sequence[str] = ()) -> T:
    """The recipe in a TOML file, as a `schema`.

    `overrides` are `a.b=value` and come after the file; value is TOML, or a string where it is none; lists of tables
    are counted from 0 (`data.text.0.weight=2`). Paths may hold `~` and `$NAME`; relative ones start from the recipe's
    folder, or from the working directory in an override.
    Raises ValueError, one line that names the file, the key and the value, for whatever is wrong; OSError where the
    file cannot be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            tree = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        for override in overrides:
            _override(tree, schema, override)
        built: T = _Reader(path.resolve().parent).table(schema, tree, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return built


def explain(schema: type[Any]) -> str:
    """Every key of a schema with its meaning, type, range and default, in the form of a recipe. Keys that have no
    default and may be left out stand in comments."""
    return "\n".join(_explain(schema, "", many=False)).strip() + "\n"


@dataclass(frozen=True)
class _Reader:
    folder: Path
    """Where relative paths start."""

    def table(self, schema: type[Any], tree: Any, name: str) -> Any:
        """A schema from one table; `name` is its dotted key."""
        if not isinstance(tree, Mapping):
            raise ValueError(f"{name} = {tree!r}: expected a table")
        known = {entry.name: entry for entry in fields(schema)}
        for given in tree:
            if given not in known:
                raise ValueError(f"unknown key {_join(name, given)} = {tree[given]!r}{_meant(given, known)}")
        types = get_type_hints(schema)
        values = {}
        for entry in known.values():
            dotted = _join(name, entry.name)
            if entry.name in tree:
                values[entry.name] = self.value(types[entry.name], tree[entry.name], dotted, _range(entry))
            elif _required(entry):
                raise ValueError(f"{dotted} is missing ({_type_name(types[entry.name])}: {entry.metadata['doc']})")
        try:
            return schema(**values)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from None

    def value(self, kind: Any, value: Any, name: str, limits: _Range) -> Any:
        """One value of the type `kind`."""
        kind = _without_none(kind)
        if is_dataclass(kind) and isinstance(kind, type):
            return self.table(kind, value, name)
        wrong = ValueError(f"{name} = {value!r}: expected {_type_name(kind)}")
        if get_origin(kind) is tuple:
            if not isinstance(value, list):
                raise wrong
            return tuple(self.value(get_args(kind)[0], item, f"{name}.{i}", limits) for i, item in enumerate(value))
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise ValueError(f"{wrong}{_meant(str(value), get_args(kind))}")
            return value
        if kind is Path and isinstance(value, str):
            try:
                return _path(self.folder, value)
            except ValueError as error:
                raise ValueError(f"{name} = {value!r}: {error}") from None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise wrong
        if kind in (int, float) and not limits.allows(value):
            raise ValueError(f"{name} = {value!r}: expected {limits or 'a number'}")
        return value


def _override(tree: dict[str, Any], schema: type[Any], override: str) -> None:
    """Set one `a.b=value` in the tree."""
    dotted, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r}: expected key=value")
    *tables, last = dotted.strip().split(".")
    place: Any = tree
    for step in tables:
        place = _enter(place, step, dotted)
    try:
        value = _from_here(_parse(text.strip()), _type_of(schema, dotted.strip()))
    except ValueError as error:
        raise ValueError(f"override {override!r}: {error}") from None
    if isinstance(place, list):
        place[_index(place, last, dotted)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ValueError(f"override {override!r}: {'.'.join(tables)} is no table")


def _enter(place: Any, step: str, dotted: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, step, dotted)]
    if not isinstance(place, dict):
        raise ValueError(f"override of {dotted}: nothing lies below a value")
    return place.setdefault(step, {})


def _index(place: list[Any], step: str, dotted: str) -> int:
    if not step.isdecimal() or int(step) >= len(place):
        raise ValueError(f"override of {dotted}: {step!r} is not one of {len(place)} entries (counted from 0)")
    return int(step)


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _from_here(value: Any, kind: Any) -> Any:
    """A value with its paths taken from the working directory."""
    if isinstance(value, list) and get_origin(kind) is tuple:
        return [_from_here(item, get_args(kind)[0]) for item in value]
    return str(_path(Path.cwd(), value)) if kind is Path and isinstance(value, str) else value


def _path(folder: Path, text: str) -> Path:
    expanded = os.path.expandvars(Path(text).expanduser())
    if unset := re.search(r"\$(\w+|{\w+})", expanded):
        raise ValueError(f"the environment has no {unset[0]}")
    return folder / expanded


def _type_of(schema: Any, dotted: str) -> Any:
    """The type that a dotted key has in the schema; None where there is no such key (which the reader then says)."""
    kind: Any = schema
    for step in dotted.split("."):
        if step.isdecimal() and get_origin(kind) is tuple:
            kind = get_args(kind)[0]
        else:
            kind = get_type_hints(kind).get(step) if is_dataclass(kind) else None
        kind = _without_none(kind)
    return kind


def _explain(schema: type[Any], name: str, many: bool) -> Iterator[str]:
    types = get_type_hints(schema)
    if name:
        yield f"\n{f'[[{name}]]' if many else f'[{name}]'}"
    below = []
    for entry in fields(schema):
        kind = _without_none(types[entry.name])
        inner = get_args(kind)[0] if get_origin(kind) is tuple else kind
        if is_dataclass(inner):
            assert isinstance(inner, type)
            below.append((entry, inner, kind is not inner))
            continue
        notes = "; ".join(part for part in (_type_name(kind), str(_range(entry))) if part)
        yield from textwrap.wrap(
            f"{entry.metadata['doc']} ({notes})", 100, initial_indent="# ", subsequent_indent="#   "
        )
        yield _shown(entry)
    for entry, inner, several in below:
        heading = list(_explain(inner, _join(name, entry.name), several))
        optional = "" if _required(entry) else ", may be left out"
        yield f"{heading[0]}  # {entry.metadata['doc']}{' (any number of these)' if several else optional}"
        yield from heading[1:]


def _shown(entry: Field[Any]) -> str:
    """A key with its default, as a recipe would have it."""
    if _required(entry):
        return f"{entry.name} = ...  # must be given"
    if entry.default is None:
        return f"# {entry.name} = ..."
    return f"{entry.name} = {_toml(entry.default)}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, str | Path):
        escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
        return f'"{escaped}"'
    return repr(value)


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, UnionType):
        (inner,) = (arm for arm in get_args(kind) if arm is not type(None))
        return inner
    return kind


def _type_name(kind: Any) -> str:
    kind = _without_none(kind)
    if get_origin(kind) is tuple:
        return f"a list, each {_type_name(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(repr(choice) for choice in get_args(kind))}"
    return _NAMES.get(kind, "a table")


def _required(entry: Field[Any]) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def _range(entry: Field[Any]) -> _Range:
    limits: _Range = entry.metadata["range"]
    return limits


def _join(name: str, key_name: str) -> str:
    return f"{name}.{key_name}" if name else key_name


def _meant(given: str, known: Any) -> str:
    close = difflib.get_close_matches(given, [str(name) for name in known], n=1)
    return f" (did you mean {close[0]}?)" if close else ""
