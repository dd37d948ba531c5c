"""What each engine computes with an exported checkpoint: read in its source, and said before anybody serves it.

A file says how weights are stored, and what inputs are asked for. What an engine does with that depends on the GPU. The
rows are of vLLM 0.33, SGLang 0.5.23, mlx-lm 0.32 and llama.cpp's converter of 2026-11, and of transformers 5.23 with
compressed-tensors 0.20, which was run; what nobody has read is no row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qsurgeon.errors import ExchangeError, nearest
from qsurgeon.exchange.grids import input_grid
from qsurgeon.exchange.target import Exported
from qsurgeon.formats import Format

REFUSED = "refused"
AS_IT_IS = "full precision"


@dataclass(frozen=True)
class Row:
    """What engines compute with a scheme of a target.

    weight, input: the grids of the scheme; "*" stands for all. computes: the input that the engine multiplies with, as
    a grid, or ``REFUSED``. rule: by which rule it finds the scales of that, where they are powers of two. why: more.
    """

    engines: tuple[str, ...]
    targets: tuple[str, ...]
    weight: str
    input: str
    computes: str
    rule: str = ""
    why: str = ""


ENGINES = {
    "vllm-blackwell": "vLLM on SM100 and later",
    "vllm-hopper": "vLLM on SM89 and SM90",
    "vllm-ampere": "vLLM on SM80 and SM86",
    "sglang-blackwell": "SGLang on SM100 and later",
    "sglang-hopper": "SGLang before SM100",
    "transformers": "transformers with compressed-tensors",
    "mlx": "mlx-lm",
    "llama.cpp": "llama.cpp, by its converter",
    "any": "any program that reads safetensors",
}
_BLACKWELL, _HOPPER, _AMPERE = ("vllm-blackwell",), ("vllm-hopper",), ("vllm-ampere",)
_OLDER = (*_HOPPER, *_AMPERE)
_CT, _BOTH = ("compressed-tensors",), ("compressed-tensors", "modelopt")
_MARLIN = "Marlin multiplies 4-bit weights with inputs in 16 bits"
_FUSING = tuple(one for one in ENGINES if one.startswith(("vllm", "sglang")))  # they join q, k, v and gate, up

_ROWS = (
    Row(_BLACKWELL, _CT, "mxfp4", "mxfp4", "mxfp4", "rceil"),
    Row(_BLACKWELL, _CT, "mxfp4", "", "mxfp4", "rceil", "MXFP4 weights go to its W4A4 kernel, whatever the inputs"),
    Row(_OLDER, _CT, "mxfp4", "*", AS_IT_IS, why=_MARLIN),
    Row(_BLACKWELL, _BOTH, "nvfp4", "nvfp4, a static scale", "nvfp4, a static scale"),
    Row(_BLACKWELL, _BOTH, "nvfp4", "", AS_IT_IS),
    Row(_OLDER, _BOTH, "nvfp4", "*", AS_IT_IS, why=_MARLIN),
    Row(_BLACKWELL, _BOTH, "mxfp8", "mxfp8", "mxfp8"),
    Row((*_BLACKWELL, *_OLDER), _CT, "mxfp6_e2m3", "*", REFUSED, why="it has no scheme for 6 bits"),
    Row((*_BLACKWELL, *_HOPPER), _BOTH, "fp8_e4m3", "fp8, a static scale", "fp8, a static scale"),
    Row((*_BLACKWELL, *_HOPPER), _CT, "fp8_e4m3_row", "fp8, a scale per token", "fp8, a scale per token"),
    Row((*_BLACKWELL, *_HOPPER), _CT, "fp8_e4m3", "fp8, a scale per token", "fp8, a scale per token"),
    Row((*_BLACKWELL, *_HOPPER), _CT, "fp8_e4m3_128x128", "fp8, a scale per 128", "fp8, a scale per 128"),
    Row(_OLDER, _CT, "int8", "int8, a scale per token", "int8, a scale per token"),
    Row((*_BLACKWELL, *_OLDER), _CT, "int4_b32", "", AS_IT_IS),
    Row((*_BLACKWELL, *_OLDER), _CT, "int4_b64", "", AS_IT_IS),
    Row((*_BLACKWELL, *_OLDER), _CT, "int4_b128", "", AS_IT_IS),
    Row(
        ("sglang-blackwell", "sglang-hopper"), _CT, "mxfp4", "mxfp4", REFUSED,
        why="its 4-bit inputs are NVFP4's only; use --quantization mxfp4 on a model in full precision",
    ),
    Row(("sglang-blackwell",), _BOTH, "nvfp4", "nvfp4, a static scale", "nvfp4, a static scale"),
    Row(("sglang-hopper",), _BOTH, "nvfp4", "*", AS_IT_IS, why=_MARLIN),
    *(
        Row(("transformers",), _CT, weight, "", AS_IT_IS, why="it decompresses the weights at the first call")
        for weight in ("mxfp4", "nvfp4", "mxfp8", "int4_b32", "int4_b64", "int4_b128")
    ),
    Row(("transformers",), _CT, "mxfp4", "mxfp4", "mxfp4", "even"),
    Row(("mlx",), _CT, "mxfp4", "*", AS_IT_IS),
    Row(("mlx",), _CT, "nvfp4", "*", AS_IT_IS),
    Row(("llama.cpp",), _BOTH, "nvfp4", "*", AS_IT_IS, why="its converter repacks the codes; K must be divided by 64"),
    Row(("llama.cpp",), _CT, "mxfp4", "*", REFUSED, why="its converter knows no such files"),
    Row(("any",), ("dense",), "*", "*", AS_IT_IS),
)  # fmt: skip


@dataclass(frozen=True)
class Computed:
    """What an engine computes with modules of one scheme, beside what they were trained with.

    trained, computes: the input. same: whether the engine computes what was trained, as far as its source tells.
    """

    engine: str
    weight: str
    trained: str
    computes: str
    modules: int
    same: bool
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-ready values."""
        return dict(vars(self))


def check_engine(name: str | None, target: str) -> None:
    """Do nothing for an engine that reads files of ``target``. Raises: ExchangeError for another."""
    if name is None:
        return
    if name not in ENGINES:
        raise ExchangeError(f"no engine '{name}'; {nearest(name, ENGINES)}")
    reading = [one for one in ENGINES if any(one in row.engines and target in row.targets for row in _ROWS)]
    if name not in reading:
        raise ExchangeError(f"nothing is known of {ENGINES[name]} with {target}; known are: {', '.join(reading)}")


def computed(target: str, exported: Sequence[Exported], engine: str | None = None) -> list[Computed]:
    """Return what engines, or ``engine`` alone, compute with an export, each scheme once.

    Raises: ExchangeError if ``engine`` refuses a scheme.
    """
    found: list[Computed] = []
    for name in ENGINES if engine is None else (engine,):
        groups: dict[tuple[str, str, Format | None], list[Exported]] = {}
        for one in exported:
            groups.setdefault((one.scheme.weight, one.scheme.input, one.source.how.input), []).append(one)
        for (weight, asked, trained), ones in groups.items():
            row = next((row for row in _rows(name, target) if _fits(row, weight, asked)), None)
            if row is None:
                if engine is not None:
                    raise ExchangeError(
                        f"{ones[0].source.module.name}: nothing is known of {ENGINES[name]} with weights in {weight} "
                        f"and inputs in {asked or AS_IT_IS}"
                    )
                continue
            if row.computes == REFUSED and engine is not None:
                raise ExchangeError(
                    f"{ones[0].source.module.name}: {ENGINES[name]} refuses weights in {weight} with inputs in "
                    f"{asked or AS_IT_IS}: {row.why}"
                )
            found.append(_computed(row, name, weight, trained, len(ones)))
    return found


def fuses(engine: str) -> bool:
    """Return whether an engine joins the Linear layers that multiply the same input, under one tensor scale."""
    return engine in _FUSING


def _rows(engine: str, target: str) -> Iterator[Row]:
    return (row for row in _ROWS if engine in row.engines and target in row.targets)


def _fits(row: Row, weight: str, asked: str) -> bool:
    return row.weight in ("*", weight) and row.input in ("*", asked)


def _computed(row: Row, engine: str, weight: str, trained: Format | None, count: int) -> Computed:
    was = AS_IT_IS if trained is None else _said(trained)
    now = f"{row.computes}, rule {row.rule}" if row.rule else row.computes
    if row.computes == REFUSED:
        return Computed(engine, weight, was, REFUSED, count, False, row.why)
    return Computed(engine, weight, was, now, count, was == now, row.why)


def _said(trained: Format) -> str:
    """Return what an input was rounded to in training, in the words of the rows."""
    grid = input_grid(trained) or trained.name
    return f"{grid}, rule {trained.scale_rule}" if trained.scale_rule not in (None, "nearest") else grid
