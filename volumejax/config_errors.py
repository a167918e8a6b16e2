"""One line and a remedy for every mistake in an experiment file."""

import difflib
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError
except ImportError as error:
    raise ImportError("experiment files need the run extra: pip install 'volumejax[run]'") from error

Models = Mapping[str, type[BaseModel]]
"""The model behind each key or kind that may appear in an error's location; the root under ""."""


class ConfigError(ValueError):
    """A mistake in an experiment file; its text is one line: file, line, key, what is wrong, the remedy."""


def read_yaml(text: str, source: str) -> dict[Any, Any]:
    """The mapping that the text holds, or a `ConfigError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        number = mark.line + 1 if mark is not None else None
        problem = str(error.problem or error.context or "unreadable")
        if problem.startswith("found duplicate key"):
            key = problem.split('"')[1] if '"' in problem else "?"
            raise ConfigError(one_line(source, f"{_plain(key)}: given twice; remove one of them", number)) from None
        if "another document" in problem:
            raise ConfigError(one_line(source, "holds two YAML documents; keep one per file", number)) from None
        message = f"not valid YAML: {problem}; check indentation, brackets and quotes here"
        raise ConfigError(one_line(source, message, number)) from None
    except RecursionError:
        raise ConfigError(one_line(source, "is nested too deeply; flatten it")) from None
    except Exception as error:  # the pure parser raises bare ValueError, TypeError, ... on malformed scalars
        raise ConfigError(one_line(source, f"not valid YAML: {error}; fix or quote the value")) from None
    if data is None:
        raise ConfigError(one_line(source, "is empty; start from configs/digits_mlp.yaml"))
    if not isinstance(data, dict):
        message = f"expected `key: value` lines at the top, got {_shown(data)}; start from configs/digits_mlp.yaml"
        raise ConfigError(one_line(source, message))
    return data


def explain(error: ValidationError, data: Any, text: str, source: str, models: Models) -> ConfigError:
    """The first mistake that pydantic found in ``data``, the mapping read from ``text``, as one line."""
    # A misspelt key shows up twice, as unknown and as missing: the unknown one explains the other.
    first, *rest = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    others = [e for e in rest if e["type"] != "missing"]
    path = _key_path(first["loc"], data)
    where = f"{_dotted(path)}: " if path else ""
    more = f" (and {len(others)} more to fix)" if others else ""
    return ConfigError(one_line(source, where + _explain(first, models) + more, _line_number(text, path)))


_OF_NUMBERS = ("exponents", "cutoffs", "betas", "widths")


def _explain(error: ErrorDetails, models: Models) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = [name for name in _model_at(error["loc"], models).model_fields]
        return f"unknown key; {_nearest(error['loc'][-1], allowed)}"
    if kind == "missing":
        field = _model_at(error["loc"], models).model_fields[str(error["loc"][-1])]
        return f"missing; add `{(field.examples or [f'kind: {_only_word(field.annotation)}'])[0]}`"
    if kind in ("literal_error", "union_tag_invalid"):
        words = re.findall(r"'([^']+)'", str(context.get("expected") or context.get("expected_tags")))
        value = value.get("kind") if kind == "union_tag_invalid" and isinstance(value, Mapping) else value
        if words in (["rms"], ["auto"]):
            return f"expected a number or the word `{words[0]}`, got {_shown(value)}"
        what = error["loc"][-1] if kind == "literal_error" else "kind"
        return f"unknown {what} {_shown(value)}; {_nearest(value, words)}"
    if kind == "invalid_key":
        return "is not a text key; rename it or remove it"
    if kind == "union_tag_not_found":
        return "missing kind; add `kind: isotropic` or another"
    if value is None and kind != "model_type":
        return "has no value; write one after the colon, or remove the key"
    if kind in ("float_type", "int_type", "bool_type") and isinstance(value, str):
        number = as_number(value)
        if number is not None and kind != "bool_type":
            return f"is the string {_shown(value)}, not a number; write it without quotes: {_written(number)}"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"expected a whole number, got {value:g}; write {int(value)}"
    if kind == "tuple_type" and error["loc"][-1] in _OF_NUMBERS:
        return f"expected a list of numbers such as [0.1, 1], got {_shown(value)}"
    if kind == "too_short":
        return "is an empty list; write at least one entry into it, or remove the key"
    first = "region" if "tethers" in error["loc"] else "kind"
    wanted = {
        "float_type": "a number such as 0.01",
        "int_type": "a whole number such as 256",
        "bool_type": "true or false",
        "string_type": "text (put it in quotes)",
        "tuple_type": f"a list of entries, each starting with `- {first}:`",
        "model_type": f"a mapping such as {{{first}: ...}}",
        "model_attributes_type": f"a mapping such as {{{first}: ...}}",
        "int_parsing_size": "a smaller whole number",
        "finite_number": "a finite number",
        "string_too_short": "some text",
        "string_too_long": f"at most {context.get('max_length')} characters",
        "string_pattern_mismatch": "letters, digits, '.', '_' and '-' only, at most 80",
    }.get(kind)
    for limit, words in (("gt", "greater than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most")):
        if limit in context:
            wanted = f"a number {words} {_written(float(context[limit]))}"
    if wanted is not None:
        return f"expected {wanted}, got {_shown(value)}"
    return error["msg"]


def _model_at(loc: Sequence[Any], models: Models) -> type[BaseModel]:
    owners = [part for part in loc[:-1] if isinstance(part, str) and part in models]
    return models[owners[-1] if owners else ""]


def _only_word(annotation: Any) -> str:
    return getattr(annotation, "__args__", ("...",))[0]


def _key_path(loc: Sequence[Any], data: Any) -> list[Any]:
    """The location without the union tags that pydantic writes into it."""
    path: list[Any] = []
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        if isinstance(data, Mapping):
            if data.get("kind") == part and not (last and part in data):
                continue
            path.append(part)
            data = data.get(part)
        elif isinstance(data, Sequence) and not isinstance(data, str) and isinstance(part, int):
            path.append(part)
            data = data[part] if part < len(data) else None
    return path


def _dotted(path: Sequence[Any]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{_plain(part)}" for part in path)
    return text.removeprefix(".")


def _line_number(text: str, path: Sequence[Any]) -> int | None:
    """The line, from 1, of the key at ``path``, or of its closest parent in the text."""
    node: Any = YAML(typ="safe", pure=True).compose(text)
    line = None
    for part in path:
        if isinstance(part, int) and node.id == "sequence" and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
            continue
        pairs = node.value if node.id == "mapping" else []
        found = next(((key, value) for key, value in pairs if key.value == str(part)), None)
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def as_number(text: str) -> float | None:
    """The number that the text spells, if it does.

    Example:
        >>> as_number("1e-2"), as_number("rms")
        (0.01, None)
    """
    try:
        return float(text)
    except ValueError:
        return None


def _written(number: float) -> str:
    # A dot in the mantissa makes it a number for YAML 1.1 readers as well.
    text = repr(int(number)) if number.is_integer() and abs(number) < 1e16 else repr(number)
    return text.replace("e", ".0e", 1) if "e" in text and "." not in text else text


def _nearest(word: Any, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(word).lower(), allowed, n=1)
    return f"did you mean `{close[0]}`?" if close else f"use one of {', '.join(allowed)}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple | set):
        return "a list"
    if isinstance(value, int) and abs(value) > 10**18:  # repr refuses very long integers
        return "a huge number"
    text = repr(value) if isinstance(value, str | int | float | bool) else type(value).__name__
    return text if len(text) <= 40 else f"{text[:36]}…{text[-1]}"


def _plain(key: Any) -> str:
    text = str(key)
    return text if text.isprintable() and len(text) <= 60 else repr(text[:60])


def one_line(source: str | Path, message: str, number: int | None = None) -> str:
    """The place, then the message, with every line break taken out.

    Example:
        >>> one_line("tiny.yaml", "is empty;   write something", 3)
        'tiny.yaml:3: is empty; write something'
    """
    name = str(source) if str(source).isprintable() else repr(str(source))
    place = f"{name}:{number}" if number else name
    return " ".join(f"{place}: {message}".split())
