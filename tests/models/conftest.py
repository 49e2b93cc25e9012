from __future__ import annotations

import pytest

from tests.tiny import tiny_sd1, tiny_sd2, tiny_sdxl

MAKERS = {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}
SIZE_IDS = [[64.0, 96.0, 0.0, 8.0, 64.0, 64.0], [128.0, 64.0, 4.0, 0.0, 64.0, 64.0]]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """One tiny checkpoint of each family, fp32: {family: path}."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: make(folder / f"{family}.safetensors", seed=1) for family, make in MAKERS.items()}


@pytest.fixture(params=sorted(MAKERS))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file.safetensors"
