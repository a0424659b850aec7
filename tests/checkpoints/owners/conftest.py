"""A folder of one of `packed_models.KINDS`, for test files with a fixture `kind`."""

from __future__ import annotations

from pathlib import Path

import pytest
from packed_models import Made, make


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed") / "model"


@pytest.fixture(scope="module")
def made(kind: str, folder: Path) -> Made:
    return make(folder, kind, num_hidden_layers=1)
