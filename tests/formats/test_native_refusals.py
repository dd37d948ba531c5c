"""What the native kernels are not given: a format that they do not know, and a tensor without memory."""

import pytest
import torch

from qsurgeon.errors import FormatError, ShapeError
from qsurgeon.formats import get_format
from qsurgeon.formats.kernels import native
from qsurgeon.formats.kernels.native import _at


def test_a_format_without_native_code_is_an_error_where_native_code_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda *_: None)
    with pytest.raises(FormatError) as caught:
        native._loaded(get_format("mxfp4"), torch.float64)
    assert str(caught.value) == "no native kernel for format 'mxfp4' in torch.float64"


def test_a_tensor_whose_memory_was_given_back_is_refused() -> None:
    freed = torch.zeros(2, 32)
    freed.untyped_storage().resize_(0)
    for tensor, device in ((freed, "cpu"), (torch.zeros(2, 32, device="meta"), "meta")):
        with pytest.raises(ShapeError) as caught:
            _at(tensor)
        assert str(caught.value) == (
            f"a kernel of the CPU was given a tensor (2, 32) of torch.float32 on {device} that has no memory there: "
            "it was not loaded, or was freed (sharded, offloaded)"
        )


def test_an_empty_tensor_needs_no_memory() -> None:
    assert _at(torch.zeros(0, 32)).value is None
    assert _at(None).value is None
