from __future__ import annotations

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
def implementation(request: pytest.FixtureRequest) -> dict[str, bool]:
    return request.param
