"""Which weights can be quantized, and who is named where one is already; the files are laid out as theirs are."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qsurgeon.checkpoint import read_headers
from qsurgeon.checkpoint.reading.headers import BITS, Tensor
from qsurgeon.checkpoint.reading.quantized import refuse_quantized_weight
from qsurgeon.errors import CheckpointError

PROJ = "model.layers.0.mlp.up_proj"
WEIGHT = f"{PROJ}.weight"
EXPECTED = "expected a weight in full precision: F16, BF16, F32, F64"

WORDS, BYTES, CODES, FLOATS = (
    torch.zeros(4, 4, dtype=torch.int32),
    torch.zeros(4, 4, dtype=torch.uint8),
    torch.zeros(4, 4, dtype=torch.int8),
    torch.zeros(4, 4),
)
FP8 = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)


def refused(folder: Path, tensors: dict[str, torch.Tensor], name: str = WEIGHT) -> str:
    """Return the error's text without the file's name."""
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        refuse_quantized_weight(name, read_headers(folder))
    start = f"{folder}/model.safetensors: "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        pytest.param(
            {WEIGHT: FP8, f"{WEIGHT}_scale_inv": FLOATS},
            f"as DeepSeek's FP8 models are ({WEIGHT}_scale_inv is beside it)",
            id="deepseek",
        ),
        pytest.param(
            {WEIGHT: FP8, f"{WEIGHT}_scale": FLOATS},
            f"by compressed-tensors or ModelOpt ({WEIGHT}_scale is beside it)",
            id="fp8-with-a-scale",
        ),
        pytest.param(
            {WEIGHT: BYTES, f"{WEIGHT}_scale": FP8, f"{WEIGHT}_scale_2": FLOATS},
            f"by ModelOpt ({WEIGHT}_scale_2 is beside it)",
            id="modelopt",
        ),
        pytest.param(
            {WEIGHT: BYTES, f"{WEIGHT}.absmax": FLOATS, f"{WEIGHT}.quant_map": FLOATS},
            f"by bitsandbytes ({WEIGHT}.absmax is beside it)",
            id="bitsandbytes-4",
        ),
        pytest.param(
            {WEIGHT: CODES, f"{PROJ}.SCB": FLOATS}, f"by bitsandbytes ({PROJ}.SCB is beside it)", id="bitsandbytes-8"
        ),
    ],
)
def test_a_weight_of_another_dtype_names_who_quantized_it(
    tmp_path: Path, tensors: dict[str, torch.Tensor], expected: str
) -> None:
    dtype = {torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}[tensors[WEIGHT].dtype]
    assert refused(tmp_path, tensors) == f"{WEIGHT} is {dtype}, quantized already {expected}; {EXPECTED}"


@pytest.mark.parametrize(
    ("tensors", "mark", "how"),
    [
        pytest.param(
            {f"{PROJ}.qweight": WORDS, f"{PROJ}.qzeros": WORDS, f"{PROJ}.scales": FLOATS, f"{PROJ}.g_idx": WORDS},
            "qweight",
            "by GPTQ or AWQ",
            id="gptq",
        ),
        pytest.param(
            {f"{PROJ}.qweight": WORDS, f"{PROJ}.qzeros": WORDS, f"{PROJ}.scales": FLOATS},
            "qweight",
            "by GPTQ or AWQ",
            id="awq",
        ),
        pytest.param(
            {f"{WEIGHT}_packed": WORDS, f"{WEIGHT}_scale": FLOATS, f"{WEIGHT}_shape": WORDS},
            "weight_packed",
            "by compressed-tensors",
            id="compressed-tensors",
        ),
    ],
)
def test_what_lies_in_place_of_a_weight_names_who_quantized_it(
    tmp_path: Path, tensors: dict[str, torch.Tensor], mark: str, how: str
) -> None:
    assert refused(tmp_path, tensors) == (
        f"has {PROJ}.{mark} in place of {WEIGHT}: it is quantized already, {how}; {EXPECTED}"
    )


def test_blocks_in_place_of_experts_are_mxfp4(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert refused(tmp_path, {f"{name}_blocks": BYTES, f"{name}_scales": BYTES}, name) == (
        f"has {name}_blocks in place of {name}: it is quantized already, to MXFP4, as gpt-oss is; {EXPECTED}"
    )


@pytest.mark.parametrize("dtype", sorted(BITS.keys() - {"F16", "BF16", "F32", "F64"}))
def test_every_other_dtype_is_refused_also_where_nothing_tells_who_made_it(dtype: str) -> None:
    tensor = Tensor(WEIGHT, Path("x.safetensors"), (8,), dtype, 0, BITS[dtype])
    with pytest.raises(CheckpointError) as caught:
        refuse_quantized_weight(WEIGHT, {WEIGHT: tensor})
    already = "" if dtype in {"BOOL", "C64"} else ", quantized already"
    assert str(caught.value) == f"x.safetensors: {WEIGHT} is {dtype}{already}; {EXPECTED}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_weight_in_full_precision_passes(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({WEIGHT: torch.zeros(4, 4, dtype=dtype)}, tmp_path / "model.safetensors")
    refuse_quantized_weight(WEIGHT, read_headers(tmp_path))


def test_a_weight_that_is_not_there_at_all_passes(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": FLOATS, f"{PROJ}2.qweight": WORDS}, tmp_path / "model.safetensors")
    refuse_quantized_weight(WEIGHT, read_headers(tmp_path))
