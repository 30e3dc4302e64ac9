"""Settings between nested mappings and dataclasses, with errors that name the key and what it expects."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from pisces.algorithms.settings import ALGORITHMS, AlgorithmConfig


def override(values: dict[str, Any], setting: str) -> None:
    """Set one ``a.b=value`` in nested mappings.

    Raises:
        ValueError: if it has another form, or the value is not YAML.
    """
    key, sign, text = setting.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise ValueError(f"override {setting!r}: expected the form section.key=value.")
    for part in parts[:-1]:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    try:
        values[parts[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {setting!r}: the value is not valid YAML.") from error


def section(cls: Any, values: Any, where: str) -> Any:
    """One dataclass from a mapping.

    Args:
        cls: the dataclass; its fields are plain values, tuples of them, dataclasses, or None beside one of these.
        values: what was read.
        where: the key of the section, empty at the top.

    Raises:
        ValueError: naming the key; an unknown one with the nearest known one.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'config'}: got {values!r}, expected a section with keys.")
    hints = get_type_hints(cls)
    known = [item.name for item in dataclasses.fields(cls)]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ValueError(f"{prefix}{key}: unknown key. Did you mean {prefix}{near[0]}? Known: {', '.join(known)}.")
    return cls(**{key: _value(hints[key], value, prefix + key) for key, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type that ``hint`` asks for."""
    if hint == AlgorithmConfig:
        return _algorithm(value, where)
    if get_origin(hint) in (types.UnionType, Union):
        if value is None:
            return None
        return _value(next(kind for kind in get_args(hint) if kind is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return section(hint, value, where)
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        many = kinds[-1] is Ellipsis
        if not isinstance(value, list | tuple) or not (many or len(value) == len(kinds)):
            raise ValueError(f"{where}: got {value!r}, expected a list of {'' if many else len(kinds)} values.")
        return tuple(_value(kinds[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 (no dot) as text.
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise ValueError(f"{where}: got {value!r}, expected {names[hint]}.")
    if hint is float and value - value != 0:
        raise ValueError(f"{where}: got {value!r}, expected a finite number.")
    return value


def _algorithm(value: Any, where: str) -> Any:
    """The algorithm's section: its key ``name`` says which keys it has."""
    if not isinstance(value, Mapping) or "name" not in value:
        raise ValueError(f"{where}: got {value!r}, expected a section with a name out of {', '.join(ALGORITHMS)}.")
    name = value["name"]
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(str(name), ALGORITHMS, n=1, cutoff=0.0)
        raise ValueError(
            f"{where}.name: unknown algorithm {name!r}. Did you mean {near[0]}? Known: {', '.join(ALGORITHMS)}."
        )
    rest = {key: item for key, item in value.items() if key != "name"}
    return section(ALGORITHMS[name], rest, where)


def plain(value: Any) -> Any:
    """Nested dictionaries and lists, as YAML has them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``a.b`` -> value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result
