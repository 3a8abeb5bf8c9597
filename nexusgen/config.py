"""Configuration: frozen pydantic models filled from one YAML file and dotted overrides, nothing else.

Order: class default < YAML file < `key=value` on the command line. Unknown keys are refused with the nearest known
name. Values after `=` are read as YAML, so `n=3`, `flag=true` and `list=[1, 2]` have the types they look like.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from nexusgen.errors import ConfigError


class Config(BaseModel):
    """Base of every job's configuration: immutable, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(cls: type[ConfigT], path: Path | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a configuration of class `cls` from a YAML file and `key.sub=value` overrides.

    Raises: ConfigError if the file can't be read, isn't a mapping, or holds an unknown key or a wrong value.
    """
    return parse_config(cls, read_values(path, overrides), str(path) if path is not None else "the command line")


def read_values(path: Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys and values of a YAML file with `key.sub=value` overrides, unchecked. Raises: ConfigError."""
    values = _read_yaml(path) if path is not None else {}
    for override in overrides:
        _apply(values, override)
    return values


def parse_config(cls: type[ConfigT], values: Mapping[str, Any], where: str) -> ConfigT:
    """Check a mapping against `cls`; `where` names its origin in messages. Raises: ConfigError."""
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(cls, detail) for detail in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror or error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found a {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    *parents, leaf = key.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = {}
            node[parent] = child
        node = child
    node[leaf] = value


def _explain(cls: type[BaseModel], detail: Any) -> str:
    location = detail["loc"]
    name = ".".join(str(part) for part in location) or "the config"
    if detail["type"] != "extra_forbidden":
        return f"{name} = {detail['input']!r}: {detail['msg']}"
    known = sorted(_keys_at(cls, location[:-1]))
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {name!r}; {hint}"


def _keys_at(cls: type[BaseModel], parents: Sequence[Any]) -> Iterator[str]:
    """Names of the fields of the model found by walking `parents` down from `cls`."""
    current = cls
    for parent in parents:
        field = current.model_fields.get(str(parent))
        if field is None:
            break
        nested = [t for t in _types_in(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        if nested:
            current = nested[0]
    yield from current.model_fields


def _types_in(annotation: Any) -> list[Any]:
    found = [annotation]
    for argument in get_args(annotation):
        found += _types_in(argument)
    return found
