"""The form an answer must have: what may be asked for, its bounds, its JSON. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from core.bounds import Wire, check_texts, refuse_unknown, table
from core.errors import InvalidField

PARAM = "params.structured_outputs"
MAX_SCHEMA_CHARACTERS = 65_536  #: of a JSON schema, written without a needless byte
MAX_SCHEMA_DEPTH = 32  #: objects and arrays in each other
MAX_REGEX_CHARACTERS = 4_096
MAX_GRAMMAR_CHARACTERS = 65_536
MAX_CHOICES = 256
MAX_CHOICE_CHARACTERS = 1_024
#: What an answer can be held to, exactly one of them: JSON of a schema, any JSON object, a regular expression, one of
#: several texts, a grammar in Lark's syntax.
FORMS = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True)
class Structured:
    """One form, as text: equal exactly if the wire is.

    Raises:
        InvalidField: out of a bound; ``param`` is ``params.structured_outputs.<form>``.
    """

    form: str
    text: str  #: the expression, the grammar; JSON of the schema, of the list of choices, or ``true``

    @classmethod
    def from_wire(cls, wire: object) -> Structured:
        """Read ``{"json": {…}}``, ``{"json_object": true}``, ``{"regex": "…"}``, ``{"choice": […]}``, or a grammar.

        Raises:
            UnknownField, InvalidField: naming the field.
        """
        fields = table(PARAM, wire)
        refuse_unknown(fields, FORMS, prefix=f"{PARAM}.")
        if len(fields) != 1:
            raise InvalidField(PARAM, f"must hold exactly one of {', '.join(FORMS)}")
        [(form, value)] = fields.items()
        _check(f"{PARAM}.{form}", form, value)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        if len(text) > MAX_SCHEMA_CHARACTERS and form == "json":
            raise InvalidField(f"{PARAM}.json", f"must be at most {MAX_SCHEMA_CHARACTERS} characters long as JSON")
        return cls(form, text)

    def to_wire(self) -> Wire:
        return {self.form: self.text if self.form in _TEXTS else json.loads(self.text)}


_TEXTS: Mapping[str, int] = {"regex": MAX_REGEX_CHARACTERS, "grammar": MAX_GRAMMAR_CHARACTERS}


def _check(param: str, form: str, value: object) -> None:
    if form in _TEXTS:
        if not isinstance(value, str) or not 0 < len(value) <= _TEXTS[form]:
            raise InvalidField(param, f"must be a string of 1 to {_TEXTS[form]} characters")
    elif form == "choice":
        if not isinstance(value, list) or not value:
            raise InvalidField(param, f"must be a list of 1 to {MAX_CHOICES} strings")
        check_texts(param, tuple(value), MAX_CHOICES, MAX_CHOICE_CHARACTERS)
    elif form == "json":
        if not isinstance(value, dict):
            raise InvalidField(param, "must be a JSON schema, an object")
        if _depth(value) > MAX_SCHEMA_DEPTH:
            raise InvalidField(param, f"must be nested at most {MAX_SCHEMA_DEPTH} deep")
    elif value is not True:
        raise InvalidField(param, "must be true")


def _depth(value: object) -> int:
    """Of objects and arrays in each other; looks no deeper than it must to refuse."""
    level = [value]
    for depth in range(1, MAX_SCHEMA_DEPTH + 1):
        level = [inner for outer in level for inner in _inner(outer) if isinstance(inner, dict | list)]
        if not level:
            return depth
    return MAX_SCHEMA_DEPTH + 1


def _inner(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
