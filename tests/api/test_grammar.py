"""Grammars: what a schema becomes before a model has to keep to it."""

from __future__ import annotations

from typing import Any

import pytest

from swarmkit.api.grammar import closed, json_grammar
from swarmkit.api.refusals import ApiError

A = {"type": "object", "properties": {"a": {"type": "integer"}}}
CASES: list[tuple[Any, Any]] = [
    (A, {**A, "additionalProperties": False}),
    ({**A, "additionalProperties": True}, {**A, "additionalProperties": True}),
    ({"type": "array", "items": A}, {"type": "array", "items": {**A, "additionalProperties": False}}),
    ({"allOf": [A, A]}, {"allOf": [A, A]}),
    ({"const": A}, {"const": A}),
    ({"type": "object"}, {"type": "object"}),
]


@pytest.mark.parametrize(("schema", "wanted"), CASES)
def test_objects_have_the_properties_that_their_schema_names(schema: Any, wanted: Any) -> None:
    assert closed(schema) == wanted


def test_a_property_that_is_called_properties_is_no_schema() -> None:
    schema = {"type": "object", "properties": {"properties": {"type": "string"}}}
    assert closed(schema)["properties"] == {"properties": {"type": "string"}}


WRONG: list[Any] = [{"type": "fox"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}]


@pytest.mark.parametrize("schema", WRONG)
def test_a_schema_that_cannot_be_kept_to_is_refused(schema: Any) -> None:
    with pytest.raises(ApiError, match="schema cannot be used"):
        json_grammar(schema, "response_format")
