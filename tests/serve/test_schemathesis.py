"""Whatever the description of the API allows or forbids, sent to it: no failure of the server, and nothing that is not
described, neither a status nor a content type nor a shape."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from serve.engine import Engine
from serve.http.api import Served, Service, create_app
from serve.template import Template
from serve.worker import Worker

KEY = {"Authorization": "Bearer key"}
GET = ["/health", "/ping", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/{name}"]
POST = {  # and how many requests of each kind, valid and not, are made
    "/v1/completions": 40,
    "/v1/chat/completions": 40,
    "/v1/embeddings": 20,
    "/tokenize": 20,
    "/detokenize": 20,
    "/predict/{name}": 20,
}
CHECKED = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
]  # valid by its description, a request may still ask for more than a model can: that is 400, and no fault


@pytest.fixture(scope="module")
def app(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=8, max_len=100), waiting=64)
    served = Served.local(worker, "tiny", Template(tokenizer))
    yield create_app(Service.of(served, keys=["key"]))
    worker.stop()


@pytest.fixture(scope="module")
def api(app):
    load_all_checks()
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=KEY)


def test_everything_is_described(app):
    assert set(app.openapi()["paths"]) == {*GET, *POST}


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", [*GET, *POST])
def test_the_api_is_as_described(api, path, mode):
    operation = api[path]["POST" if path in POST else "GET"]
    if mode is GenerationMode.NEGATIVE and "{" not in path and path not in POST:
        mode = GenerationMode.POSITIVE  # there is nothing that could be wrong
    checks = CHECKS.get_by_names(CHECKED)

    @settings(
        max_examples=POST.get(path, 3),
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(headers=KEY, checks=checks)

    check()
