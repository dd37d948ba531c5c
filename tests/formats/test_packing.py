"""Codes to bytes and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsurgeon.errors import ShapeError
from qsurgeon.formats.packing import pack, unpack


def uint8(*codes: int) -> torch.Tensor:
    return torch.tensor(codes, dtype=torch.uint8)


def test_the_earlier_of_two_codes_is_the_low_nibble() -> None:
    assert pack(uint8(0x1, 0x2, 0xE, 0xF), bits=4).tolist() == [0x21, 0xFE]


def test_the_low_nibble_is_the_earlier_of_two_codes() -> None:
    assert unpack(uint8(0x21, 0xFE), bits=4, length=4).tolist() == [0x1, 0x2, 0xE, 0xF]


def test_a_last_byte_that_is_not_full_is_filled_with_code_zero() -> None:
    assert pack(uint8(0x1, 0x2, 0xF), bits=4).tolist() == [0x21, 0x0F]


def test_unpacking_drops_what_filled_the_last_byte() -> None:
    assert unpack(uint8(0x21, 0x0F), bits=4, length=3).tolist() == [0x1, 0x2, 0xF]


def test_eight_bit_codes_are_bytes_already() -> None:
    assert pack(uint8(0, 1, 254, 255), bits=8).tolist() == [0, 1, 254, 255]
    assert unpack(uint8(0, 1, 254, 255), bits=8, length=4).tolist() == [0, 1, 254, 255]


def test_every_pair_of_codes_has_a_byte_of_its_own() -> None:
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    assert pack(pairs, bits=4).unique().numel() == 256
    assert torch.equal(unpack(pack(pairs, bits=4), bits=4, length=2), pairs)


def test_each_row_is_packed_by_itself() -> None:
    codes = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)
    assert pack(codes, bits=4).tolist() == [[0x21, 0x03], [0x54, 0x06]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_does_not_depend_on_strides(bits: int) -> None:
    codes = torch.arange(12, dtype=torch.uint8).view(4, 3).t()
    assert torch.equal(pack(codes, bits), pack(codes.contiguous(), bits))
    assert torch.equal(unpack(codes, bits, 32 // bits), unpack(codes.contiguous(), bits, 32 // bits))


def test_four_six_bit_codes_fill_three_bytes_from_the_low_bits_up() -> None:
    codes = uint8(0b000001, 0b000010, 0b000100, 0b100000)
    assert pack(codes, bits=6).tolist() == [0b10_000001, 0b0100_0000, 0b100000_00]
    assert unpack(pack(codes, bits=6), bits=6, length=4).tolist() == codes.tolist()


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_six_bit_codes_that_fill_no_three_bytes_take_the_bytes_they_need(length: int) -> None:
    packed = pack(torch.full((length,), 63, dtype=torch.uint8), bits=6)
    assert packed.numel() == -(-length * 6 // 8)
    assert sum(map(int.bit_count, packed.tolist())) == 6 * length


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((0,), id="nothing"),
        pytest.param((0, 6), id="no rows"),
        pytest.param((6, 0), id="empty rows"),
    ],
)
def test_what_is_empty_survives_the_round_trip(shape: tuple[int, ...], bits: int) -> None:
    codes = torch.empty(shape, dtype=torch.uint8)
    assert unpack(pack(codes, bits), bits, shape[-1]).shape == shape


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    bits=st.sampled_from(range(1, 9)),
    seed=st.integers(0, 99),
)
def test_unpacking_gives_back_what_was_packed_at_any_rank(shape: list[int], bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], (shape[-1] * bits + 7) // 8)
    assert torch.equal(unpack(packed, bits, shape[-1]), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("length", [1, 5, 8, 29])
def test_a_row_is_a_run_of_bits_with_the_earlier_code_in_the_lower_ones(bits: int, length: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (length,), generator=generator, dtype=torch.uint8)
    run = sum(code << (bits * place) for place, code in enumerate(codes.tolist()))
    assert bytes(pack(codes, bits).tolist()) == run.to_bytes(-(-length * bits // 8), "little")


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_a_width_without_a_layout_is_an_error_that_names_the_others(bits: int) -> None:
    text = f"no byte layout for codes of {bits} bits; expected 1 to 8"
    with pytest.raises(ShapeError) as caught:
        pack(uint8(1, 2), bits=bits)
    assert str(caught.value) == text
    with pytest.raises(ShapeError) as caught:
        unpack(uint8(1, 2), bits=bits, length=2)
    assert str(caught.value) == text


def test_too_few_bytes_for_four_bit_codes_say_how_many_were_expected() -> None:
    with pytest.raises(ShapeError) as caught:
        unpack(uint8(0x21, 0x43), bits=4, length=5)
    assert str(caught.value) == "2 bytes a row cannot be 5 codes of 4 bits; expected 3"


def test_too_many_bytes_for_eight_bit_codes_say_how_many_were_expected() -> None:
    with pytest.raises(ShapeError) as caught:
        unpack(uint8(1, 2, 3), bits=8, length=2)
    assert str(caught.value) == "3 bytes a row cannot be 2 codes of 8 bits; expected 2"
