"""Methods that do more: each addition once, and every kind of method as it was."""

from typing import Any

import pytest

from qsurgeon.patching import Method, patch


class Owner:
    def own(self, x: int) -> list[Any]:
        """Say what it got."""
        return [type(self), x]

    @classmethod
    def of_class(cls, x: int) -> list[Any]:
        return [cls, x]

    @staticmethod
    def static(x: int) -> list[Any]:
        return [Owner, x]


class Heir(Owner):
    pass


def saying_more(method: Method) -> Method:
    return lambda *args: [*method(*args), "more"]


def saying_most(method: Method) -> Method:
    return lambda *args: [*method(*args), "most"]


@pytest.mark.parametrize("name", ["own", "of_class", "static"])
def test_each_addition_is_made_once_and_the_method_stays_of_its_kind(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Owner, name, vars(Owner)[name])  # so that it is undone
    before = vars(Owner)[name]
    for make in (saying_more, saying_more, saying_most, saying_more, saying_most):
        patch(Owner, name, make)
    assert type(vars(Owner)[name]) is type(before)
    for method in (getattr(Owner(), name), getattr(Heir(), name)):
        assert method(3)[1:] == [3, "more", "most"]
    assert getattr(Heir(), name)(3)[0] is (Owner if name == "static" else Heir)
    assert getattr(Owner, name).__doc__ == before.__doc__
