"""Which fields combine, and what is said of those that do not."""

from typing import Any

import pytest
import torch

from qsurgeon.errors import FormatError
from qsurgeon.formats import CATALOG, Format, check_operands, get_format
from qsurgeon.formats.element import ELEMENTS
from qsurgeon.formats.fields import shown
from qsurgeon.formats.scale import BF16, E4M3_SCALE, E8M0, FP32, SCALES, rules_for

MXFP4, NVFP4, FP8 = get_format("mxfp4"), get_format("nvfp4"), get_format("fp8_e4m3")


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_element_goes_with_every_scale_and_all_its_rules(element: str, scale: str) -> None:
    for rule in rules_for(SCALES[scale], ELEMENTS[element]):
        fmt = MXFP4.with_fields("mine", element=element, scale=scale, scale_rule=rule)
        assert fmt.largest <= 3.4028235e38
        assert fmt.smallest > 0


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"block": [16, 16], "four_over_six": True}, id="square-blocks-and-four-over-six"),
        pytest.param({"hadamard": 128, "rounding": "stochastic", "seed": 7}, id="rotation-and-stochastic"),
        pytest.param({"tensor_scale": "static", "static_scale": 0.5, "hadamard": 16}, id="static-and-rotation"),
        pytest.param({"element": "int4", "block": 7}, id="integer-in-odd-blocks"),
        pytest.param({"scale": "fp32", "tensor_scale": "none", "four_over_six": True}, id="fp32-and-four-over-six"),
        pytest.param({"block": "none", "scale": "none", "scale_rule": "none", "tensor_scale": "row"}, id="no-blocks"),
    ],
)
def test_these_combine_and_come_back_from_their_fields(fields: dict[str, Any]) -> None:
    fmt = NVFP4.with_fields("mine", **fields)
    assert Format.from_dict("mine", fmt.to_dict()) == fmt
    assert fmt.to_dict().items() >= fields.items()


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        pytest.param(
            MXFP4,
            {"block": "none"},
            "block none does not go with scale e8m0: a block is what shares a scale, so that there are both or neither",
            id="scale-without-block",
        ),
        pytest.param(
            FP8,
            {"block": 32},
            "block 32 does not go with scale none: a block is what shares a scale, so that there are both or neither",
            id="block-without-scale",
        ),
        pytest.param(
            MXFP4,
            {"block": "none", "scale": "none"},
            "scale rule 'floor' does not go with scale none; expected one of: none",
            id="rule-without-scale",
        ),
        pytest.param(
            MXFP4,
            {"element": "e4m3", "scale_rule": "rceil/7.25"},
            "scale rule 'rceil/7.25' is not defined for element e4m3; did you mean 'rceil'?",
            id="rule-of-another-element",
        ),
        pytest.param(
            MXFP4,
            {"block": "none", "scale": "none", "scale_rule": "none"},
            "tensor_scale 'none' with block none: nothing would scale the values",
            id="no-scale-at-all",
        ),
        pytest.param(
            MXFP4,
            {"scale": "bf16", "scale_rule": "nearest", "tensor_scale": "tensor"},
            "tensor_scale 'tensor' with scale bf16: it spans FP32's range already; leave it at 'none'",
            id="wide-scale-under-a-tensor-scale",
        ),
        pytest.param(
            NVFP4,
            {"block": [16, 16], "tensor_scale": "row"},
            "tensor_scale 'row' with block 16×16: such a block spans rows",
            id="square-block-and-row",
        ),
        pytest.param(
            NVFP4,
            {"static_scale": 0.1},
            "static_scale goes with tensor_scale 'static', not 'by_role'",
            id="number-without-static",
        ),
        pytest.param(
            NVFP4,
            {"tensor_scale": "static", "static_scale": -1},
            "static_scale is -1.0; expected a number from 7.9e-31 to 3.4e+38",
            id="negative-static",
        ),
        pytest.param(
            NVFP4,
            {"tensor_scale": "static", "static_scale": "many"},
            "static_scale is 'many'; expected a number (1.0e-3, not 1e-3, which YAML reads as text), or none",
            id="static-word",
        ),
        pytest.param(
            NVFP4,
            {"tensor_scale": "static", "static_scale": 10**400},
            "static_scale is inf; expected a number from 7.9e-31 to 3.4e+38",
            id="static-beyond-float32",
        ),
        pytest.param(
            MXFP4,
            {"block": 2**33},
            "block is 8589934592; at most 1048576 values share a scale (block: none, for a whole row or tensor)",
            id="block-of-more-than-fit",
        ),
        pytest.param(
            NVFP4, {"rounding": "nearst"}, "no rounding 'nearst'; did you mean 'nearest'?", id="misspelt-rounding"
        ),
        pytest.param(
            NVFP4, {"hadamard": 48}, "hadamard is 48; expected one of: 16, 32, 64, 128", id="hadamard-of-another-size"
        ),
        pytest.param(NVFP4, {"hadamard": "all"}, "hadamard is 'all'; expected a whole number", id="hadamard-word"),
        pytest.param(
            MXFP4,
            {"four_over_six": True},
            "four_over_six with scale e8m0: no such scale is 1.5 times another, as 6 is of 4",
            id="four-over-six-of-powers-of-two",
        ),
        pytest.param(
            NVFP4,
            {"four_over_six": True, "element": "e2m3"},
            "four_over_six with element e2m3: it chooses between the largest values of e2m1",
            id="four-over-six-of-another-element",
        ),
        pytest.param(
            NVFP4, {"four_over_six": "yes"}, "four_over_six is 'yes'; expected true or false", id="four-over-six-word"
        ),
        pytest.param(
            NVFP4,
            {"seed": 3},
            "seed is 3, but nothing is random: there is no hadamard, and rounding is nearest",
            id="seed-of-nothing",
        ),
        pytest.param(
            NVFP4, {"rounding": "stochastic", "seed": -1}, "seed is -1; expected 0 to 2147483647", id="negative-seed"
        ),
        pytest.param(NVFP4, {"block": [16, 0]}, "block is 16×0; at least 1 value must share a scale", id="no-columns"),
        pytest.param(
            NVFP4,
            {"block": [16, 16, 16]},
            "block is [16, 16, 16]; expected a whole number, two of them [rows, columns], or none",
            id="three-dimensions",
        ),
    ],
)
def test_what_does_not_combine_is_an_error_that_says_why(base: Format, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        base.with_fields("mine", **fields)
    assert str(caught.value) == message


def test_a_rounding_that_is_none_of_the_known_is_refused_in_python_too() -> None:
    with pytest.raises(FormatError) as caught:
        Format("mine", ELEMENTS["e2m1"], 32, E8M0, "floor", rounding="up")  # type: ignore[arg-type]
    assert str(caught.value) == "no rounding 'up'; expected one of: nearest, stochastic"


def test_a_block_of_one_row_is_a_row_of_values() -> None:
    assert MXFP4.with_fields("mine", block=[1, 16]).block == 16


def test_blocks_that_span_rows_are_for_weights() -> None:
    square = MXFP4.with_fields("mine", block=[32, 32])
    assert square.as_weight is square
    with pytest.raises(FormatError) as caught:
        check_operands(None, square)
    assert str(caught.value) == (
        "block 32×32 of format 'mine' spans rows: an input's rows are tokens, whose values must not depend on each "
        "other; such a block is for weights"
    )


def test_two_operands_are_rotated_alike_or_their_product_is_another() -> None:
    here, there = (MXFP4.with_fields("mine", hadamard=32, seed=seed) for seed in (1, 2))
    check_operands(here, here)
    check_operands(here, None)
    check_operands(None, here)
    check_operands(here, NVFP4.with_fields("other", hadamard=32, seed=1))
    with pytest.raises(FormatError) as caught:
        check_operands(here, there)
    assert str(caught.value) == (
        "seed 1 of the weight's format and 2 of the input's: both operands are rotated by the same random signs, or "
        "their product is another"
    )
    with pytest.raises(FormatError) as caught:
        check_operands(here, MXFP4)
    assert str(caught.value) == (
        "hadamard 32 of the weight's format and none of the input's: both operands are rotated alike, or their "
        "product is another"
    )


def test_a_seed_of_the_rounding_alone_may_differ_between_operands() -> None:
    one, other = (MXFP4.with_fields("mine", rounding="stochastic", seed=seed) for seed in (1, 2))
    check_operands(one, other)


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [
        pytest.param(CATALOG["mxfp6_e2m3"], 6.25, id="mxfp6"),
        pytest.param(CATALOG["fp8_e4m3"], 8, id="one-scale-a-tensor"),
        pytest.param(CATALOG["int4_b64"], 4.25, id="int4"),
        pytest.param(MXFP4.with_fields("square", block=[32, 32]), 4 + 8 / 1024, id="square"),
    ],
)
def test_bits_count_the_element_and_its_share_of_the_block_scale(fmt: Format, bits: float) -> None:
    assert fmt.bits == bits


def test_a_kernel_depends_on_no_field_that_it_is_told_when_it_runs() -> None:
    keys = {
        NVFP4.with_fields("mine", **fields).kernel_key
        for fields in (
            {},
            {"tensor_scale": "row"},
            {"tensor_scale": "static", "static_scale": 2.0},
            {"hadamard": 16, "seed": 5},
        )
    }
    assert len(keys) == 1
    assert NVFP4.with_fields("mine", block=32).kernel_key not in keys


def test_the_largest_scale_is_that_of_its_own_numbers_below_a_limit() -> None:
    assert E8M0.largest(5.0) == 4.0
    assert E4M3_SCALE.largest(1e9) == 448.0
    assert BF16.largest(1.001) == 1.0
    assert 0.1 - 1e-8 < FP32.largest(0.1) <= 0.1


def test_a_block_is_shown_as_people_write_it() -> None:
    assert [shown(block) for block in (32, (16, 16), [128, 128], None)] == ["32", "16×16", "128×128", "none"]


@pytest.mark.parametrize("name", CATALOG)
def test_a_format_can_be_made_while_new_tensors_have_no_memory(name: str) -> None:
    # As transformers does: it makes a model, and reads its config, under the meta device.
    with torch.device("meta"):
        made = Format.from_dict(name, CATALOG[name].to_dict())
    assert made == CATALOG[name]
    assert made.largest == CATALOG[name].largest
