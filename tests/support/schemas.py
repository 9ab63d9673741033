"""Values that a JSON schema allows, for the few words that our document uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


def values_of(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values of `schema`: types, enum, bounds, lengths, items, properties, required; addresses by their pattern."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return st.one_of([_of_kind(kind, schema) for kind in kinds])


def _of_kind(kind: str, schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    low, high = schema.get("minimum"), schema.get("maximum")
    if kind == "null":
        return st.none()
    if kind == "boolean":
        return st.booleans()
    if kind == "integer":
        whole = st.integers(low, high)
        return whole | whole.map(float)
    if kind == "number":
        return st.floats(low, high, allow_nan=False, allow_infinity=False)
    if kind == "string":
        if "{6}" in schema.get("pattern", ""):
            return st.from_regex(schema["pattern"], fullmatch=True)
        longest = min(schema.get("maxLength", 40), 40)
        text = st.text(min_size=schema.get("minLength", 0), max_size=longest)
        return (
            st.sampled_from(["http://", "https://"]).flatmap(lambda begin: text.map(begin.__add__))
            if ("https?://" in schema.get("pattern", ""))
            else text
        )
    if kind == "array":
        return st.lists(
            values_of(schema["items"]), min_size=schema.get("minItems", 0), max_size=schema.get("maxItems", 5)
        )
    assert kind == "object", kind
    properties = {name: values_of(part) for name, part in schema.get("properties", {}).items()}
    required = schema.get("required", [])
    return st.fixed_dictionaries(
        {name: properties[name] for name in required},
        optional={name: part for name, part in properties.items() if name not in required},
    )
