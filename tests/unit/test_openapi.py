"""The document says what the parser does."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from musetalk.errors import RequestError
from tests.support.schemas import values_of
from worker.jobs import PARAMS, parse_job
from worker.web.openapi import document, job_schema

GOOD = {"musetalk_job_id": "job-1", "video_url": "https://host/a.mp4", "audio_url": "https://host/a.wav"}


def test_the_document_is_json_and_its_references_lead_somewhere() -> None:
    text = json.dumps(document("1.2.3"))
    schemas = document("1.2.3")["components"]["schemas"]  # type: ignore[index]
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.split('"')[0] in schemas
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def schema_of(name: str) -> st.SearchStrategy[Any]:
    """Values that the document allows for a parameter."""
    schema: Any = PARAMS[name].schema
    return values_of(schema)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(PARAMS)).flatmap(lambda name: st.tuples(st.just(name), schema_of(name))))
def test_every_parameter_the_document_allows_is_read(pair: tuple[str, Any]) -> None:
    name, value = pair
    if name == "face_box" and value is not None and (value[2] <= value[0] or value[3] <= value[1]):
        # The one thing a schema cannot say: the box's corners are in order.
        with pytest.raises(RequestError, match="x1 > x0"):
            parse_job({**GOOD, "params": {name: value}})
        return
    assert parse_job({**GOOD, "params": {name: value}}).params.ignored == ()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(sorted(PARAMS)),
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.lists(st.integers()),
)
def test_what_the_document_refuses_is_refused(name: str, value: Any) -> None:
    try:
        jsonschema.validate(value, PARAMS[name].schema)
    except jsonschema.ValidationError:
        with pytest.raises(RequestError, match=f"params.{name}"):
            parse_job({**GOOD, "params": {name: value}})


@pytest.mark.parametrize("field", ["musetalk_job_id", "video_url", "audio_url"])
@pytest.mark.parametrize("value", [None, "", 3, [], {}, "x" * 10_000, math.pi])
def test_required_fields_are_required_by_both(field: str, value: Any) -> None:
    body = {**GOOD, field: value}
    with pytest.raises(RequestError):
        parse_job(body)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(body, job_schema())
