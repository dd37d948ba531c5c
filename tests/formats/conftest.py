"""Each test of formats chooses backends anew: some change what a backend supports, and a choice is kept."""

import pytest

from qsurgeon.formats.kernels import choosing


@pytest.fixture(autouse=True)
def own_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_chosen", {})
