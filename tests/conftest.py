"""Fixtures that several test files share. Array shapes in annotations of `nexusgen` are checked in every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

# Before anything imports nexusgen, or its functions stay unchecked. The hook lives as long as the test process.
install_import_hook("nexusgen", "beartype.beartype")

import torch  # noqa: E402 (torch is nexusgen's, so it comes after the hook too)

torch.set_num_threads(1)  # the machine's cores are shared with Ray's workers

TEST_DATA_VARIABLE = "NEXUSGEN_TEST_DATA"
RAY_CPUS = 8  # logical; as many as the local cluster of a laptop


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with real tars in `data/` and recorded reference numbers in `golden/`; too large for the repository."""
    folder = os.environ.get(TEST_DATA_VARIABLE)
    if not folder:
        pytest.skip(f"{TEST_DATA_VARIABLE} is unset: no real data")
    if not (Path(folder) / "data").is_dir():
        pytest.skip(f"{TEST_DATA_VARIABLE}={folder} holds no folder `data`")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer in Qwen's layout."""
    from nexusgen.base_training import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [
        "system\nYou are a helpful assistant.",
        "user\nDraw a large red circle in the middle of a white picture.",
        "assistant\nHere is the picture that you asked for.",
        "What colour is the small square at the top left? It is blue.",
        "Make the star green and leave the rest as it is.",
        "画一个红色的大圆形。图中有几个蓝色的正方形？两个。",
    ]
    train_tokenizer(folder, texts)
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One real local Ray cluster for all tests that need one; jobs under test find it and leave it running."""
    from pipelines import runtime

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with runtime.ray_cluster(1, "the tests", local_cpus=RAY_CPUS) as cluster:
            yield cluster


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """An empty storage folder."""
    folder = tmp_path / "storage"
    folder.mkdir()
    return folder
