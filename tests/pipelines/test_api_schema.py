"""Thousands of made-up requests over the API's own schema: none breaks it, and every answer is one it documents.

`NEXUSGEN_SCHEMA_EXAMPLES=2000` asks for that many of each kind of each path instead of a few.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from api_server import Painter, serving
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pipelines import api

NUM_EXAMPLES = int(os.environ.get("NEXUSGEN_SCHEMA_EXAMPLES", "40"))
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)


def _name_the_model(schema: dict) -> None:
    """Requests ask for the model that there is, or they would all end at its name."""
    for operation in schema["components"]["schemas"].values():
        if "model" in operation.get("properties", {}) and operation.get("additionalProperties") is False:
            operation["properties"]["model"] = {"enum": ["nexusgen", None]}
    schema["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"][
        "properties"
    ]["model"] = {"enum": ["nexusgen"]}
    schema["paths"]["/v1/models/{model_id}"]["get"]["parameters"][0]["schema"] = {"enum": ["nexusgen"]}


DOCUMENT = api.create_app(Painter()).openapi()
_name_the_model(DOCUMENT)
schema = schemathesis.openapi.from_dict(DOCUMENT)
schema.config.generation.update(modes=[schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(Painter()) as url:
        yield url


@schema.parametrize()
@hypothesis.settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@pytest.mark.timeout(3600)
def test_no_request_breaks_the_api(case: schemathesis.Case, url: str) -> None:
    case.call_and_validate(base_url=url, checks=CHECKS, timeout=60)
