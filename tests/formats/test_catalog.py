"""The named formats, and what a wrong name is answered with."""

import pytest

from qsurgeon.errors import FormatError, nearest
from qsurgeon.formats import CATALOG, get_format

NAMED = {
    "mxfp4": ("e2m1", 32, "e8m0", "floor", "none"),
    "mxfp6_e2m3": ("e2m3", 32, "e8m0", "floor", "none"),
    "mxfp6_e3m2": ("e3m2", 32, "e8m0", "floor", "none"),
    "mxfp8_e4m3": ("e4m3", 32, "e8m0", "floor", "none"),
    "mxfp8": ("e4m3", 32, "e8m0", "floor", "none"),
    "mxfp8_e5m2": ("e5m2", 32, "e8m0", "floor", "none"),
    "mxint8": ("int8/64", 32, "e8m0", "floor", "none"),
    "nvfp4": ("e2m1", 16, "e4m3", "nearest", "by_role"),
    "fp8_e4m3": ("e4m3", "none", "none", "none", "tensor"),
    "fp8_e4m3_row": ("e4m3", "none", "none", "none", "row"),
    "fp8_e4m3_128x128": ("e4m3", [128, 128], "fp32", "nearest", "none"),
    "fp8_e5m2": ("e5m2", "none", "none", "none", "tensor"),
    "fp8_e5m2_row": ("e5m2", "none", "none", "none", "row"),
    "fp8_e5m2_128x128": ("e5m2", [128, 128], "fp32", "nearest", "none"),
    "int8": ("int8", "none", "none", "none", "row"),
    "int4_b32": ("int4", 32, "bf16", "nearest", "none"),
    "int4_b64": ("int4", 64, "bf16", "nearest", "none"),
    "int4_b128": ("int4", 128, "bf16", "nearest", "none"),
}
PLAIN = {"static_scale": "none", "rounding": "nearest", "hadamard": "none", "four_over_six": False, "seed": 0}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_format_has_these_fields(name: str) -> None:
    keys = ("element", "block", "scale", "scale_rule", "tensor_scale")
    assert get_format(name).to_dict() == {**dict(zip(keys, NAMED[name], strict=True)), **PLAIN}


def test_the_catalogue_holds_these_formats_under_their_own_names() -> None:
    assert {name: entry.name for name, entry in CATALOG.items()} == {name: name for name in NAMED}


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(FormatError) as caught:
        get_format("mxpf4")
    assert str(caught.value) == "no format 'mxpf4'; did you mean 'mxfp4'?"


def test_a_name_like_no_other_is_answered_with_all_of_them() -> None:
    with pytest.raises(FormatError) as caught:
        get_format("q")
    assert str(caught.value) == f"no format 'q'; expected one of: {', '.join(sorted(NAMED))}"


def test_a_wrong_format_is_a_value_error_so_that_pydantic_locates_it() -> None:
    assert issubclass(FormatError, ValueError)


def test_nearest_guesses_one_word() -> None:
    assert nearest("wieght", ["weight", "input", "freight"]) == "did you mean 'weight'?"


def test_nearest_lists_all_words_in_order_where_none_is_close() -> None:
    assert nearest("zzz", ["weight", "block", "input"]) == "expected one of: block, input, weight"


def test_nearest_takes_any_iterable() -> None:
    assert nearest("blok", iter({"block": 1, "scale": 2})) == "did you mean 'block'?"
