"""Thousands of made-up requests over the API's own schema: none breaks it, and every answer is one it documents.

`NEXUSGEN_SCHEMA_EXAMPLES=2000` asks for that many of each kind of each path instead of a few.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from api_server import Painter, picture, serving
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


def _narrow(schema: dict[str, Any]) -> None:
    """Names, sizes and pictures are such as there are, or nearly all requests would end at these."""
    bodies = [*schema["components"]["schemas"].values()]
    bodies.append(
        schema["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    )
    for body in bodies:
        properties = body.get("properties", {})
        if body.get("additionalProperties") is False:
            for name, values in (("model", ["nexusgen"]), ("size", ["64x64", "auto"])):
                if name in properties:
                    properties[name] = {"enum": values}
    schema["components"]["schemas"]["ImageUrl"]["properties"]["url"] = {"enum": [DATA_URI]}
    schema["paths"]["/v1/models/{model_id}"]["get"]["parameters"][0]["schema"] = {"enum": ["nexusgen"]}


DATA_URI = f"data:image/png;base64,{base64.b64encode(picture(size=(8, 8))).decode()}"
DOCUMENT = api.create_app(Painter()).openapi()
_narrow(DOCUMENT)
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
