"""The named formats, and what a wrong name is answered with."""

import pytest

from qsurgeon.errors import FormatError, nearest
from qsurgeon.formats import CATALOG, get_format


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        pytest.param("mxfp4", ("e2m1", 32, "e8m0", "floor", "none"), id="mxfp4"),
        pytest.param("mxfp8", ("e4m3", 32, "e8m0", "floor", "none"), id="mxfp8"),
        pytest.param("nvfp4", ("e2m1", 16, "e4m3", "nearest", "by_role"), id="nvfp4"),
    ],
)
def test_a_named_format_has_these_fields(name: str, fields: tuple[str | int, ...]) -> None:
    keys = ("element", "block", "scale", "scale_rule", "tensor_scale")
    assert get_format(name).to_dict() == dict(zip(keys, fields, strict=True))


def test_the_catalogue_holds_these_formats_under_their_own_names() -> None:
    assert {name: entry.name for name, entry in CATALOG.items()} == {
        "mxfp4": "mxfp4",
        "mxfp8": "mxfp8",
        "nvfp4": "nvfp4",
    }


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        pytest.param("mxfp4", 4.25, id="mxfp4"),
        pytest.param("mxfp8", 8.25, id="mxfp8"),
        pytest.param("nvfp4", 4.5, id="nvfp4"),
    ],
)
def test_bits_count_the_element_and_its_share_of_the_scale(name: str, bits: float) -> None:
    assert get_format(name).bits == bits


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(FormatError) as caught:
        get_format("mxpf4")
    assert str(caught.value) == "no format 'mxpf4'; did you mean 'mxfp4'?"


def test_a_name_like_no_other_is_answered_with_all_of_them() -> None:
    with pytest.raises(FormatError) as caught:
        get_format("int")
    assert str(caught.value) == "no format 'int'; expected one of: mxfp4, mxfp8, nvfp4"


def test_a_wrong_format_is_a_value_error_so_that_pydantic_locates_it() -> None:
    assert issubclass(FormatError, ValueError)


def test_nearest_guesses_one_word() -> None:
    assert nearest("wieght", ["weight", "input", "freight"]) == "did you mean 'weight'?"


def test_nearest_lists_all_words_in_order_where_none_is_close() -> None:
    assert nearest("zzz", ["weight", "block", "input"]) == "expected one of: block, input, weight"


def test_nearest_takes_any_iterable() -> None:
    assert nearest("blok", iter({"block": 1, "scale": 2})) == "did you mean 'block'?"
