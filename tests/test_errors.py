"""Errors go from one process to another, with all that they say."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from qsurgeon import errors
from qsurgeon.errors import Mistake, MistakesError, PlanError, QSurgeonError

MISTAKES = tuple(Mistake(f"r.yaml:{line}:1", "wrong", "  line\n  ^") for line in range(120))


def kinds(of: type[QSurgeonError] = QSurgeonError) -> list[type[QSurgeonError]]:
    return [of, *(kind for below in of.__subclasses__() for kind in kinds(below))]


def made(kind: type[QSurgeonError]) -> QSurgeonError:
    return kind(MISTAKES) if issubclass(kind, MistakesError) else kind("what is wrong")


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda error: pickle.loads(pickle.dumps(error)),
    "oldest pickle": lambda error: pickle.loads(pickle.dumps(error, 0)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_error_survives_being_copied(kind: type[QSurgeonError], how: str) -> None:
    error = made(kind)
    error.add_note("in rank 3")
    found = COPIES[how](error)
    assert type(found) is kind
    assert str(found) == str(error)
    assert found.args == error.args
    assert found.__notes__ == ["in rank 3"]
    assert vars(found) == vars(error)


def test_all_errors_are_tried() -> None:
    public = {name for name in vars(errors) if name.endswith("Error") and not name.startswith("OS")}
    assert public == {kind.__name__ for kind in kinds()}


def fail() -> None:
    raise PlanError(MISTAKES)


def test_a_worker_process_hands_its_mistakes_over() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool, pytest.raises(PlanError) as caught:
        pool.submit(fail).result()
    assert caught.value.mistakes == MISTAKES
    assert str(caught.value) == str(PlanError(MISTAKES))
