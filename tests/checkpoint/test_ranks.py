"""Processes that share an output: who speaks, and how long one waits for another."""

from datetime import timedelta

import pytest
import torch

from qsurgeon.checkpoint.writing.ranks import launched, leads, ranks, together

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.usefixtures("alone")
def test_a_process_waits_longer_than_any_download_takes() -> None:
    backend = ranks().group._get_backend(torch.device("cpu"))
    assert backend.options._timeout >= timedelta(days=30)


@pytest.mark.parametrize(
    ("changed", "shares", "speaks"),
    [
        ({}, True, False),
        ({"RANK": "0"}, True, True),
        ({"WORLD_SIZE": "1", "RANK": "0"}, False, True),
        # A rank that something else set, in an environment that nobody launched this process from.
        ({"WORLD_SIZE": None, "MASTER_PORT": None}, False, True),
    ],
)
def test_of_those_that_were_launched_together_rank_0_speaks(
    changed: dict[str, str | None], shares: bool, speaks: bool
) -> None:
    environment = {key: value for key, value in (TORCHRUN | changed).items() if value is not None}
    assert launched(environment) == shares
    assert together(environment) == (2 if shares else 1)
    assert leads(environment) == speaks
