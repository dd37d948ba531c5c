"""The CPU kernels: native.cpp compiled with a format's numbers, once for each format and dtype, kept on disk.

The compiler is ``$CXX``, else c++, g++ or clang++. What it makes is kept under ``$QSURGEON_CACHE``, else in
``qsurgeon`` under ``$XDG_CACHE_HOME`` or ``~/.cache``, by a name that depends on all that it was made from. A folder
that anybody else can write to is not used: then each process compiles for itself.
"""

import ctypes
import dataclasses
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from qsurgeon.errors import FormatError, ShapeError
from qsurgeon.formats.element import Element, FloatElement, IntegerElement
from qsurgeon.formats.fields import SMALLEST_TENSOR_SCALE, Fields
from qsurgeon.formats.kernels.backend import Above, Backend, Operation
from qsurgeon.formats.kernels.direct import Direct
from qsurgeon.formats.kernels.pieces import empty_codes, matrices
from qsurgeon.formats.kernels.private import NotPrivateError, private_folder, read_private
from qsurgeon.formats.packing import group
from qsurgeon.formats.scale import ElementScale, NearestRule, PowerOfTwoScale, PowerRule, WideScale
from qsurgeon.formats.tensor_scale import per_row
from qsurgeon.telling import say

SMALL = 1 << 15  # values below which a second thread costs more than it gives
_SOURCE = Path(__file__).with_name("product.cpp")
_INCLUDED = [Path(__file__).with_name(name) for name in ("operand.cpp", "native.cpp", "native_numbers.h")]
_FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# Tried in turn: not every compiler knows how to tune for this machine, or has OpenMP.
_TUNINGS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
_COMPILE_SECONDS = 120
_lock = Lock()
_libraries: dict[tuple[str, torch.dtype], "Library | None"] = {}


class Library:
    """The compiled kernels of one format and one dtype."""

    def __init__(self, file: Path) -> None:
        self._functions = ctypes.CDLL(str(file))
        self.direct = Direct(self._functions)

    def fake_quantize(self, rows: Tensor, out: Tensor, above: Tensor | None, seed: int) -> None:
        """Write ``rows`` (matrices, rows, columns) rounded into ``out``, both contiguous.

        ``above``, here and below: the tensor scale, one number or one a row, contiguous float32, or None.
        """
        self._functions.fake_quantize(
            _at(rows), _at(out), *_sizes(rows.shape), *_above(above), ctypes.c_uint32(seed), _threads(rows.numel())
        )

    def quantize(self, rows: Tensor, data: Tensor, scale: Tensor | None, above: Tensor | None, seed: int) -> None:
        """Write the packed codes and the scales of ``rows`` into ``data`` and ``scale``, both contiguous."""
        self._functions.quantize(
            _at(rows), _at(data), _at(scale), *_sizes(rows.shape), *_above(above), ctypes.c_uint32(seed),
            _threads(rows.numel()),
        )  # fmt: skip

    def dequantize(self, data: Tensor, scale: Tensor | None, above: Tensor | None, out: Tensor) -> None:
        """Write the values of packed codes into ``out`` (matrices, rows, columns)."""
        self._functions.dequantize(
            _at(data), _at(scale), _at(out), *_sizes(out.shape), *_above(above), _threads(out.numel())
        )

    def saturates(self, rows: Tensor, out: Tensor, above: Tensor | None) -> None:
        """Write where ``rows`` exceed the largest that their blocks can hold into ``out`` (bool), both contiguous."""
        self._functions.saturates(_at(rows), _at(out), *_sizes(rows.shape), *_above(above), _threads(rows.numel()))


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    """Return where ``tensor`` lies. Raises: ShapeError if it is elsewhere, or its memory was given back."""
    if tensor is None:
        return ctypes.c_void_p(None)
    at = tensor.data_ptr() if tensor.device.type == "cpu" else 0
    if not at and tensor.numel():
        raise ShapeError(
            f"a kernel of the CPU was given a tensor {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device} that "
            "has no memory there: it was not loaded, or was freed (sharded, offloaded)"
        )
    return ctypes.c_void_p(at)


def _sizes(shape: torch.Size) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, shape))


def _above(above: Tensor | None) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    """Return the tensor scales and how far the next row's is; ``above`` is contiguous float32."""
    return _at(above), ctypes.c_int64(0 if above is None or above.numel() == 1 else 1)


def _threads(values: int) -> ctypes.c_int:
    return ctypes.c_int(1 if values < SMALL else torch.get_num_threads())


def library(fields: Fields, dtype: torch.dtype) -> Library | None:
    """Return the kernels of a format for ``dtype``, compiled if they never were.

    None where native.cpp does not know the format or the dtype, and where there is no compiler. Says on stderr what it
    compiles, and once why it cannot.
    """
    key = (fields.kernel_key, dtype)
    if key not in _libraries:
        with _lock:
            if key not in _libraries:
                _libraries[key] = _load(fields, dtype)
    return _libraries[key]


def compiled() -> int:
    """Return how many kernels this process has loaded: one a format and dtype, whatever the shapes."""
    return sum(one is not None for one in _libraries.values())


def _load(fields: Fields, dtype: torch.dtype) -> Library | None:
    if dtype not in DTYPES or not _knows(fields):
        return None
    name, command = compiler()
    if command is None:
        return None
    defines = [f"-D{key}={value}" for key, value in constants(fields, dtype).items()]
    text = [file.read_text("utf-8") for file in (_SOURCE, *_INCLUDED)]
    made_from = "\0".join([*text, name, *command, *defines, processor()])
    what = f"the CPU kernel of {fields.name}, {str(dtype).removeprefix('torch.')}"
    file = f"{hashlib.sha256(made_from.encode()).hexdigest()[:24]}.so"
    try:
        try:
            return _kept(private_folder(cache_folder()) / file, [*command, *defines], what)
        except NotPrivateError as error:
            _keep_nothing(str(error))
        return _passing(file, [*command, *defines], what)
    except (OSError, NotPrivateError, subprocess.SubprocessError) as error:
        _fall_back(_reason(error))
        return None


def _kept(file: Path, command: list[str], what: str) -> Library:
    """Return the kernels in ``file``, in a private folder; made first if they are not there, or not whole."""
    if not _is_whole(file):
        with FileLock(file.with_suffix(".lock")):
            if not _is_whole(file):
                say(f"compiling {what}: some seconds, once; kept in {file.parent}")
                _compile(command, file)
    return Library(file)


def _passing(name: str, command: list[str], what: str) -> Library:
    """Return kernels from a file that is gone as soon as they are loaded, out of a folder that is this call's own."""
    with tempfile.TemporaryDirectory(prefix="qsurgeon-") as folder:
        file = private_folder(Path(folder).absolute()) / name
        say(f"compiling {what}: some seconds")
        _compile(command, file)
        return Library(file)


@cache
def _keep_nothing(reason: str) -> None:
    """Say, once for each reason, that every process waits for the compiler."""
    say(
        f"compiled CPU kernels are not kept, and none is loaded that was: {reason}. "
        "Set QSURGEON_CACHE to a folder that you alone can write to"
    )


def _is_whole(file: Path) -> bool:
    """Return whether ``file`` is as it was compiled: loading what a full disk or a crash cut short is fatal."""
    made, sum = read_private(file), read_private(file.with_suffix(".sha256"))
    return made is not None and sum == hashlib.sha256(made).hexdigest().encode()


def _compile(command: list[str], file: Path) -> None:
    """Make ``file`` and its checksum appear whole: another process may be waiting for them."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made, sum = Path(folder) / file.name, Path(folder) / "sum"
        subprocess.run(
            [*command, str(_SOURCE), "-o", str(made)],
            check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS,
        )  # fmt: skip
        sum.write_text(hashlib.sha256(made.read_bytes()).hexdigest(), "utf-8")
        for one, place in ((made, file), (sum, file.with_suffix(".sha256"))):
            one.chmod(0o600)  # whatever the umask says
            one.replace(place)


@cache
def compiler() -> tuple[str, list[str] | None]:
    """Return the compiler's version and the command that compiles for this machine; None if there is none.

    A command is tried on an empty program; the reason why none works is said once.
    """
    try:
        known = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["c++"], ["g++"], ["clang++"]]
    except ValueError as error:
        _fall_back(f"CXX is no command: {str(error).lower()}: {os.environ['CXX']}")
        return "", None
    found = next((words for words in known if words and shutil.which(words[0])), None)
    if found is None:
        _fall_back(f"no C++ compiler is there ({', '.join(map(shlex.join, known))})")
        return "", None
    reason = ""
    for tuning in _TUNINGS:
        command = [*found, *_FLAGS, *tuning]
        try:
            with tempfile.TemporaryDirectory() as folder:
                trial = ["-x", "c++", os.devnull, "-o", str(Path(folder) / "trial.so")]
                subprocess.run([*command, *trial], check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
                version = subprocess.run([*found, "--version"], check=True, capture_output=True, text=True)
        except (OSError, subprocess.SubprocessError) as error:
            reason = reason or _reason(error)
        else:
            return version.stdout.partition("\n")[0] or shlex.join(found), command
    _fall_back(reason)
    return "", None


def _reason(error: Exception) -> str:
    told = getattr(error, "stderr", None) or ""
    text = told.decode("utf-8", "replace") if isinstance(told, bytes) else told  # bytes after a timeout
    return next((line for line in text.splitlines() if "error" in line), str(error))


@cache
def _fall_back(reason: str) -> None:
    """Say, once for each reason, that everything still works."""
    say(f"the CPU kernels cannot be compiled, so that slower torch operations compute the same values: {reason}")


@cache
def processor() -> str:
    """Return what tells this machine's instructions from another's: a cache may lie on a disk that both share."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.lower().startswith(("flags", "features", "model name", "cpu part"))]
    return "\n".join(sorted(set(told))) or f"{platform.machine()} {platform.processor()}"


def cache_folder() -> Path:
    """Return the folder where compiled kernels are kept."""
    try:
        if os.environ.get("QSURGEON_CACHE"):
            return Path(os.environ["QSURGEON_CACHE"]).expanduser()
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # A relative one is to be ignored, says the specification: it would lie in whatever folder one happens to be in.
        return (base if base.is_absolute() else Path.home() / ".cache") / "qsurgeon"
    except RuntimeError as error:  # a user without a home, in a container
        raise OSError(f"{error} Set QSURGEON_CACHE to a folder that can be written.") from error


def constants(fields: Fields, dtype: torch.dtype) -> dict[str, str]:
    """Return what native.cpp is compiled with, by name: see native_numbers.h. Raises: KeyError for what it lacks."""
    rows, columns = fields.block_shape
    codes, size = group(fields.element.bits)
    return {
        "DTYPE": DTYPES[dtype],
        **_of_element("ELEMENT", fields.element),
        "GROUP_CODES": str(codes),
        "GROUP_BYTES": str(size),
        "BLOCK_ROWS": str(rows),
        "BLOCK_COLUMNS": str(columns),
        "SCALE_SMALLEST": _float(fields.scale.smallest if fields.scale else 1.0),
        "SCALE_LARGEST": _float(fields.largest_scale),
        **_SCALES[type(fields.scale), type(fields.rule)](fields),
        "STOCHASTIC": _ROUNDINGS[fields.rounding],
        "FOUR_OVER_SIX": str(int(fields.four_over_six)),
        "FOUR": _float(fields.element.magnitudes[-2]),
        "TOP": _float(fields.top),
        "SMALLEST_ABOVE": _float(SMALLEST_TENSOR_SCALE),
    }


def _of_element(prefix: str, element: Element) -> dict[str, str]:
    numbers = {
        "BITS": str(element.bits),
        "MAX": _float(element.max),
        "SMALLEST": _float(element.smallest),
        "NAN_CODE": str(element.nan),
        **_ELEMENTS[type(element)](element),
    }
    return {f"{prefix}_{key}": value for key, value in numbers.items()}


def _of_float(element: Any) -> dict[str, str]:
    return {
        "FLOAT": "1",
        "MANTISSA": str(element.mantissa),
        "MIN_NORMAL": _float(element.min_normal),
        "BIAS": str(element.bias),
        "FINITE": f"{len(element.magnitudes)}u",
        "INFINITY": str(int(element.special == "ieee")),
    }


def _of_power(fields: Any) -> dict[str, str]:
    return {
        "SCALE": "1",
        "SCALE_EMAX": str(fields.element.emax),
        "SCALE_CARRY": str(fields.rule.carry_of(fields.element)),
    }


# What native.cpp knows, by exact kind: a kind derived from one of these may compute something else.
DTYPES = {torch.float32: "1", torch.bfloat16: "2", torch.float16: "3"}
_WIDE = {torch.bfloat16: "3", torch.float32: "4"}
_ROUNDINGS = {"nearest": "0", "stochastic": "1"}
_ELEMENTS: dict[type, Callable[[Any], dict[str, str]]] = {
    FloatElement: _of_float,
    IntegerElement: lambda element: {"FLOAT": "0", "INFINITY": "0"},
}
_SCALES: dict[tuple[type, type], Callable[[Any], dict[str, str]]] = {
    (type(None), type(None)): lambda fields: {"SCALE": "0"},
    (PowerOfTwoScale, PowerRule): _of_power,
    (ElementScale, NearestRule): lambda fields: {"SCALE": "2"} | _of_element("SCALE", fields.scale.element),
    (WideScale, NearestRule): lambda fields: {"SCALE": _WIDE[fields.scale.dtype]},
}
_FIELDS = {"name", "element", "block", "scale", "scale_rule", "rounding", "four_over_six"}
_FIELDS |= {"tensor_scale", "static_scale", "seed", "hadamard"}  # what comes of these, a kernel is given


def _knows(fields: Fields) -> bool:
    """Return whether native.cpp can be told of a format: of a field that is new here, only what it is unsaid."""
    return (
        type(fields.element) in _ELEMENTS
        and (type(fields.scale), type(fields.rule)) in _SCALES
        and (not isinstance(fields.scale, WideScale) or fields.scale.dtype in _WIDE)
        and fields.rounding in _ROUNDINGS
        and all(one.name in _FIELDS or getattr(fields, one.name) == one.default for one in dataclasses.fields(Fields))
    )


def _float(value: float) -> str:
    """Return a float32 as C++ writes it, exactly."""
    if not math.isfinite(value):
        raise ValueError(f"no constant for {value}")
    return f"{float(value).hex()}f"


class Native(Backend):
    """native.cpp on a CPU."""

    name = "native"
    preferred_on = frozenset({"cpu"})
    reads_memory = True

    def supports(self, fields: Fields, dtype: torch.dtype, device: str, operation: Operation) -> bool:
        """Return whether native.cpp knows all that the format consists of; all operations alike."""
        return device == "cpu" and dtype in DTYPES and _knows(fields)

    def is_ready(self, fields: Fields, dtype: torch.dtype) -> bool:
        """Return whether there is a compiled kernel, compiling it if there never was."""
        return library(fields, dtype) is not None

    def fake_quantize(self, rows: Tensor, above: Above, fields: Fields) -> Tensor:
        """Return ``rows`` rounded, in their own dtype."""
        flat = matrices(rows).contiguous()
        out = torch.empty_like(flat)
        _loaded(fields, rows.dtype).fake_quantize(flat, out, per_row(above, rows), fields.seed)
        return out.view(rows.shape)

    def quantize(self, rows: Tensor, above: Above, fields: Fields) -> tuple[Tensor, Tensor | None]:
        """Return the packed codes (…, rows, bytes) of ``rows``, and their block scales' (…, rows, blocks)."""
        data, scale = empty_codes(rows, fields)
        flat = matrices(rows).contiguous()
        _loaded(fields, rows.dtype).quantize(flat, data, scale, per_row(above, rows), fields.seed)
        return data, scale

    def dequantize(
        self, data: Tensor, scale: Tensor | None, above: Above, fields: Fields, length: int, dtype: torch.dtype
    ) -> Tensor:
        """Return the values (…, rows, length) of what ``quantize`` returned, in ``dtype``."""
        out = torch.empty(*data.shape[:-1], length, dtype=dtype)
        contiguous = None if scale is None else scale.contiguous()
        _loaded(fields, dtype).dequantize(data.contiguous(), contiguous, per_row(above, out), matrices(out))
        return out

    def saturates(self, rows: Tensor, above: Above, fields: Fields) -> Tensor:
        """Return where (bool) a value of ``rows`` exceeds the largest that its block can hold."""
        flat = matrices(rows).contiguous()
        out = torch.empty(rows.shape, dtype=torch.bool)
        _loaded(fields, rows.dtype).saturates(flat, out, per_row(above, rows))
        return out


def _loaded(fields: Fields, dtype: torch.dtype) -> Library:
    found = library(fields, dtype)
    if found is None:
        raise FormatError(f"no native kernel for format '{fields.name}' in {dtype}")
    return found


NATIVE = Native()
