"""Fixtures that several test files of the pipelines share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_training import make_tiny_model


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow is embedded in the storage, whatever the environment says."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder with random weights; nobody writes to it."""
    return make_tiny_model(tmp_path_factory.mktemp("base"))
