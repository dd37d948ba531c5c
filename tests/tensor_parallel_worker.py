"""What each process of tests/test_tensor_parallel.py runs: layers and models split over two processes.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/tensor_parallel_worker.py BASE

Each folder in BASE holds a wrapped model. What was found is written to BASE/found-RANK.json: of each case nothing if
the processes together compute what one process does, or what was wrong.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from qsurgeon.errors import ShapeError, SurgeryError
from qsurgeon.formats import CATALOG, Format, get_format
from qsurgeon.layers import PackedLinear, Quantization, QuantLinear
from qsurgeon.watch import Watch

MXFP4, NVFP4 = get_format("mxfp4"), get_format("nvfp4")
ROTATED = MXFP4.with_fields("rotated", hadamard=32, seed=7)
STATIC = NVFP4.with_fields("static", tensor_scale="static", static_scale=0.01)
DITHERED = MXFP4.with_fields("dithered", rounding="stochastic", seed=3)
FORMATS: list[Format] = [*CATALOG.values(), ROTATED, STATIC]

Found = dict[str, str]


def pair(kind: type[QuantLinear], format: Format, gradient: Any, inner: int = 256) -> nn.Sequential:
    """Return two layers, the first to be split along its outputs and the second along its inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, inner), nn.Linear(inner, 64))
    for name, layer in model.named_children():
        kind.wrap(layer, Quantization(format, MXFP4 if format.is_two_dimensional else format, gradient), name)
    return model


def split(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return model


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Return the output of a step, and the gradients of the input and of the parameters."""
    x = x.clone().requires_grad_()
    y = whole(model(x))
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(one.grad for one in model.parameters())]
    return [None if one is None else whole(one) for one in found]


def apart(found: list[Tensor | None], expected: list[Tensor | None]) -> str:
    """Return how far apart the two are, if more than another order of a sum explains."""
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        if (one is None) != (other is None):
            return f"{i}: one of them is missing"
        if one is not None and other is not None and not torch.allclose(one, other, 1e-4, 1e-3):
            return f"{i}: {(one - other).abs().max().item():.1e}"
    return ""


def layers(mesh: DeviceMesh) -> Iterator[tuple[str, str]]:
    """Compare two layers with every format, in every storage."""
    few = (MXFP4, NVFP4, ROTATED, STATIC)
    cases = [*product((QuantLinear, PackedLinear), FORMATS, ("ste",)), *product((QuantLinear,), few, ("clipped",))]
    for kind, format, gradient in cases:
        expected, model = pair(kind, format, gradient), split(pair(kind, format, gradient), mesh)
        case = f"{kind.__name__} {format.name} {gradient}"
        yield case, apart(step(model, rand(2, 3, 64)), step(expected, rand(2, 3, 64)))
        with torch.no_grad():  # where the product is computed without autograd
            yield f"{case} eval", apart([whole(model(rand(3, 64)))], [expected(rand(3, 64))])


def placements(mesh: DeviceMesh) -> Iterator[tuple[str, str]]:
    """Compare a layer whose input and weight are placed in every way that nn.Linear takes."""
    ways = (Replicate(), Shard(0), Shard(1))
    for format, x_way, weight_way in product((MXFP4, NVFP4, STATIC), ways, ways):
        expected, model = (pair(QuantLinear, format, "ste")[0] for _ in range(2))
        for name, parameter in list(model.named_parameters()):
            way = Replicate() if name == "bias" and weight_way == Shard(1) else weight_way
            model.register_parameter(name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [way])))
        x = distribute_tensor(rand(4, 64), mesh, [x_way])
        yield f"{format.name} x {x_way} weight {weight_way}", apart(step(model, x), step(expected, rand(4, 64)))


def refused(mesh: DeviceMesh) -> Iterator[tuple[str, str]]:
    """Yield the errors for what a part would round otherwise than the whole."""
    cases: dict[str, Callable[[], Any]] = {
        "cut blocks": lambda: split(pair(QuantLinear, MXFP4, "ste", 96), mesh),
        "cut codes": lambda: split(pair(PackedLinear, MXFP4, "ste", 96), mesh),
        "cut rows of blocks": lambda: split(pair(QuantLinear, get_format("fp8_e4m3_128x128"), "ste", 128), mesh),
        "random": lambda: split(pair(QuantLinear, DITHERED, "ste"), mesh),
        "watched": lambda: watched(split(pair(QuantLinear, MXFP4, "ste"), mesh)),
        "a part": lambda: part(pair(QuantLinear, NVFP4, "ste")),
    }
    for name, make in cases.items():
        try:
            make()(rand(3, 64))
        except (ShapeError, SurgeryError) as error:
            yield name, str(error)
        else:
            yield name, "not refused"


def part(model: nn.Sequential) -> nn.Sequential:
    """Give the first layer a part of its weight as a plain tensor."""
    first: Any = model[0]
    first.weight, first.bias = (nn.Parameter(one.detach()[:128]) for one in (first.weight, first.bias))
    return model


def watched(model: nn.Sequential) -> nn.Sequential:
    """Watch a model for as long as it lives."""
    vars(model)["watch"] = Watch(model, every=1)
    return model


def nan(mesh: DeviceMesh) -> Iterator[tuple[str, str]]:
    """Compare where a value that is not finite, in the part of one process, reaches all that share its scale."""
    for format, value in product((NVFP4, get_format("fp8_e4m3"), get_format("fp8_e4m3_row")), (torch.nan, torch.inf)):
        expected, model = (pair(QuantLinear, format, "ste") for _ in range(2))
        for one in (expected, model):
            with torch.no_grad():
                one.get_parameter("1.weight")[3, 200] = value
        model = split(model, mesh)
        with torch.no_grad():
            found, wanted = whole(model(rand(3, 64))), expected(rand(3, 64))
        same = torch.allclose(found, wanted, 1e-4, 1e-3, equal_nan=True) and bool(wanted.isnan().any())
        yield f"{format.name} {value}", "" if same else "another"


def models(base: Path) -> Iterator[tuple[str, str]]:
    """Compare models that transformers splits as it loads them."""
    tokens = torch.arange(1, 13)[None]
    for folder in sorted(path for path in base.iterdir() if path.is_dir()):
        expected = AutoModelForCausalLM.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
        for name, context in (("training", nullcontext), ("eval", torch.no_grad)):
            with context():
                one, other = (whole(each(tokens, use_cache=False).logits) for each in (model, expected))
            yield f"{folder.name} {name}", apart([one.detach()], [other.detach()])
        names = [name for name, one in expected.named_parameters() if one.requires_grad]
        for each in (model, expected):
            each(tokens, labels=tokens, use_cache=False).loss.backward()
        grads: list[list[Tensor | None]] = [
            [whole(dict(each.named_parameters())[name].grad) for name in names] for each in (model, expected)
        ]
        yield f"{folder.name} gradients", apart(grads[0], grads[1]) if names else ""


def main(base: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    found = {check.__name__: dict(check(mesh)) for check in (layers, placements, refused, nan)}
    found["models"] = dict(models(base))
    (base / f"found-{dist.get_rank()}.json").write_text(json.dumps(found), "utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # All is saved. In one run of several, a thread that torch still had made the interpreter's own end abort.
    sys.stderr.flush()
    os._exit(0)
