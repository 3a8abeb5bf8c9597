"""Fixtures that several test files of the pipelines share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_training import make_embedded, make_tiny_model


@pytest.fixture(scope="module", autouse=True)
def loggers_as_before() -> Iterator[None]:
    """Replicas that live in the tests' own process have it log to stderr, which other files' tests read."""
    loggers = [logging.getLogger(name) for name in ("nexusgen.serve", "pipelines.storage")]
    before = [(one.handlers[:], one.level) for one in loggers]
    yield
    for one, (handlers, level) in zip(loggers, before, strict=True):
        one.handlers = handlers
        one.setLevel(level)


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow is embedded in the storage, whatever the environment says."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder with random weights; nobody writes to it."""
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder of the test file's own."""
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def storage_uri(tmp_path_factory: pytest.TempPathFactory, model: Path) -> str:
    """A storage with data named `tiny` in all modes, embedded by `model`."""
    uri = str(tmp_path_factory.mktemp("storage"))
    make_embedded(uri, "tiny", model)
    return uri
