"""Names of 0.1 that programs import: they still work, and say what they are called now."""

import pytest

from qsurgeon import layers


@pytest.mark.parametrize(("then", "now"), [("quant_linears", "quant_layers"), ("packed_linears", "packed_layers")])
def test_a_name_of_0_1_still_works(then: str, now: str) -> None:
    with pytest.deprecated_call(match=f"^qsurgeon.layers.{then} is called {now} since 0.2$"):
        assert getattr(layers, then) is getattr(layers, now)


def test_a_name_that_never_was_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module .qsurgeon\.layers. has no attribute .quant_lines.$"):
        layers.quant_lines  # noqa: B018
