"""What may be done in place to nn.Linear's output, or to its input after the call, may be done to QuantLinear's."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qsurgeon.formats import get_format
from qsurgeon.layers import PackedLinear, Quantization, QuantLinear, straight_through

# Of operations that torch calls experimental, and of inputs without channels.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

MXFP4 = get_format("mxfp4")
WIDTH = 32
SHAPES: dict[str, Callable[[], Tensor]] = {
    "1-D": lambda: rand(WIDTH),
    "2-D": lambda: rand(4, WIDTH),
    "3-D": lambda: rand(2, 4, WIDTH),
    "transposed": lambda: rand(4, 2, WIDTH).transpose(0, 1),
    "4-D": lambda: rand(1, 2, 4, WIDTH),
    "no rows": lambda: rand(2, 0, WIDTH),
}

Act = Callable[[Tensor], Any]
Gradients = list[Tensor | None]


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(y: Tensor) -> list[tuple[Any, ...]]:
    """Return arguments for methods that take none, numbers, a tensor, a mask, an index: each method finds its own."""
    mask, other = y.detach() > 0, y.detach().flip(-1).abs() + 0.5
    index = torch.zeros(y.shape, dtype=torch.int64)
    first = torch.zeros(1, dtype=torch.int64)
    row = y.detach().narrow(-1, 0, 1).clone() if y.dim() else y.detach()
    numbers: list[tuple[Any, ...]] = [(), (0.5,), (1,), (0.1, 0.9), (0, 0), (0, -1), (-1, 0)]
    return [
        *numbers,
        (other,),
        (other, other),
        (mask, 0.5),
        (mask, other),
        (2, 0, 0.5),
        (-1, index, other),
        (-1, first, row),
        (-1, first, 0.5),
        (index, other),
        (-1, index, other, "sum"),
        (-1, first, row, "prod"),
        ((first,) * y.dim(), row.flatten()[:1]),
        (y.shape, y.stride()),
        (rand(*y.shape[:-1], 3), rand(*y.shape[:-2], 3, WIDTH)),  # matrix products,
        (rand(3, *y.shape[-2:-1], 5), rand(3, 5, WIDTH)),  # their sums,
        (rand(WIDTH, 3), rand(3)),
        (rand(*y.shape[:1]), rand(WIDTH)),  # and that of vectors
    ]


def methods() -> list[str]:
    """Return the names of Tensor's methods that work in place."""
    return sorted(
        name
        for name in dir(Tensor)
        if name.endswith("_") and not name.startswith("_") and callable(getattr(Tensor, name))
    )


def functionals() -> dict[str, Act]:
    """Return the functions of torch.nn.functional that work in place, ready for one tensor."""
    found: dict[str, Act] = {}
    for name, act in vars(functional).items():
        if name.startswith("_") or not callable(act):
            continue
        if name.endswith("_"):
            found[name] = partial(act, threshold=0.1, value=0.5) if name == "threshold_" else act
        elif "inplace" in _parameters(act):
            more = {"threshold": 0.1, "value": 0.5} if name == "threshold" else {}
            found[f"{name}(inplace=True)"] = partial(act, inplace=True, **more)
    return found


def _parameters(act: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(act).parameters)
    except (TypeError, ValueError):  # built in, and without a signature: none of those has the argument
        return set()


STATEMENTS: dict[str, Act] = {
    "y += 1": lambda y: y.__iadd__(1),
    "y *= y": lambda y: y.__imul__(y.detach().clone()),
    "y[..., 0] = 0": lambda y: y.__setitem__((..., 0), 0),
    "y[y < 0] = 0": lambda y: y.__setitem__(y < 0, 0),
    "y.view(-1).mul_": lambda y: y.view(-1).mul_(2),
    "y.mT.mul_": lambda y: y.transpose(0, -1).mul_(2),
    "y.narrow": lambda y: y.narrow(-1, 0, WIDTH // 2).mul_(2),
    "out=": lambda y: torch.add(y.detach(), 1, out=y.detach()),
}


def made(kind: type[QuantLinear], bias: bool, gradient: str, saved_inputs: str = "packed") -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH, bias=bias)
    kind.wrap(linear, Quantization(MXFP4, MXFP4, gradient, saved_inputs=saved_inputs))  # type: ignore[arg-type]
    return linear


class Reference(nn.Linear):
    """nn.Linear between operands that are rounded before, with the gradient passed straight through."""

    gradient: Any = "ste"
    is_packed = False

    def forward(self, input: Tensor) -> Tensor:
        weight = straight_through(self.weight, MXFP4, "none" if self.is_packed else self.gradient)
        # A copy: whether linear returns a view, of which less may be done in place, hangs on its operands' layout.
        return functional.linear(straight_through(input, MXFP4, self.gradient), weight, self.bias).clone()


def reference(kind: type[QuantLinear], bias: bool, gradient: str) -> nn.Linear:
    torch.manual_seed(0)
    linear = Reference(WIDTH, WIDTH, bias=bias)
    linear.gradient, linear.is_packed = gradient, kind is PackedLinear
    return linear


def run(linear: nn.Linear, x: Tensor, act: Act) -> tuple[Tensor, Gradients]:
    """Call, work in place, go back; return the changed output and the gradients."""
    x = x.detach().requires_grad_()
    y = linear(x)
    torch.manual_seed(1)  # of what draws
    result = act(y)
    total = result if isinstance(result, Tensor) and result.is_floating_point() else y
    if total.requires_grad:  # detach_ leaves none
        total.square().sum().backward()
    weight = None if isinstance(linear, PackedLinear) or getattr(linear, "is_packed", False) else linear.weight.grad
    return y.detach(), [x.grad, weight, None if linear.bias is None else linear.bias.grad]


def accepted(make: Callable[[Tensor], list[Act]], x: Tensor, bias: bool) -> Act | None:
    """Return the first of the ways to work in place that nn.Linear's output takes, backward pass included."""
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, WIDTH, bias=bias)
    for act in make(plain(x)):
        try:
            run(plain, x, act)
        except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError):
            continue
        return act
    return None


def check(
    make: Callable[[Tensor], list[Act]],
    shapes: Iterable[str] = SHAPES,
    biases: tuple[bool, ...] = (True, False),
    gradients: tuple[str, ...] = ("ste", "clipped"),
) -> int:
    """Compare the layers wherever nn.Linear takes the operation; return how often it did."""
    times = 0
    for shape, bias in product(shapes, biases):
        x = SHAPES[shape]()
        act = accepted(make, x, bias)
        if act is None:
            continue
        times += 1
        for kind, gradient in product((QuantLinear, PackedLinear), gradients):
            found, expected = run(made(kind, bias, gradient), x, act), run(reference(kind, bias, gradient), x, act)
            case = shape, bias, kind.__name__, gradient
            assert torch.equal(found[0].nan_to_num(), expected[0].nan_to_num()), case
            for one, other in zip(found[1], expected[1], strict=True):
                assert (one is None) == (other is None), case
                assert one is None or other is None or torch.allclose(one, other, 1e-5, 1e-6, equal_nan=True), case
    return times


@pytest.mark.parametrize("name", functionals())
def test_every_functional_that_works_in_place(name: str) -> None:
    act = functionals()[name]
    assert check(lambda _: [act])


@pytest.mark.parametrize("name", STATEMENTS)
def test_every_statement_that_works_in_place(name: str) -> None:
    assert check(lambda _: [STATEMENTS[name]])


# These take no output of nn.Linear whose gradient is wanted: whole numbers only, no gradient, or another size.
TAKEN_BY_NONE = {
    *(f"bitwise_{name}_" for name in ("and", "left_shift", "not", "or", "right_shift", "xor")),
    *("acosh_", "arccosh_", "arcsinh_", "arctanh_", "asinh_", "atanh_", "apply_", "float_power_", "floor_divide_"),
    *("gcd_", "heaviside_", "igamma_", "igammac_", "lcm_", "map2_", "map_", "resize_", "resize_as_"),
    *("resize_as_sparse_", "set_", "sparse_resize_", "sparse_resize_and_clear_"),
}


@pytest.mark.parametrize("name", methods())
def test_every_method_of_a_tensor_that_works_in_place(name: str) -> None:
    def make(y: Tensor) -> list[Act]:
        return [lambda y, args=args: getattr(y, name)(*args) for args in arguments(y)]  # type: ignore[misc]

    assert (check(make, ("1-D", "2-D", "3-D"), (True,), ("ste",)) == 0) == (name in TAKEN_BY_NONE)


# ---- what else can be around the operation


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gradient", ["ste", "clipped", "none"])
@pytest.mark.parametrize("saved_inputs", ["packed", "full"])
@pytest.mark.parametrize("kind", [QuantLinear, PackedLinear])
def test_however_the_layer_keeps_its_input(
    kind: type[QuantLinear], saved_inputs: str, gradient: str, shape: str
) -> None:
    x, linear = SHAPES[shape](), made(kind, True, gradient, saved_inputs)
    found, expected = run(linear, x, functional.relu_), run(reference(kind, True, gradient), x, functional.relu_)
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["kept", "reentrant", "not reentrant"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", [QuantLinear, PackedLinear])
def test_under_autocast_and_recomputed(kind: type[QuantLinear], dtype: torch.dtype | None, reentrant: bool) -> None:
    def step(linear: nn.Linear, in_place: bool) -> list[Tensor | None]:
        x = rand(2, 4, WIDTH).requires_grad_()

        def act(x: Tensor) -> Tensor:
            y: Tensor = linear(x)
            return y.mul_(2).relu_() if in_place else y.mul(2).relu()

        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            y = act(x) if reentrant is None else checkpoint(act, x, use_reentrant=reentrant)
        y.float().square().sum().backward()
        return [y.detach(), x.grad, linear.weight.grad, linear.bias.grad]

    one, other = step(made(kind, True, "ste"), True), step(made(kind, True, "ste"), False)
    assert [a is None for a in one] == [b is None for b in other]
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [QuantLinear, PackedLinear])
def test_without_gradients(kind: type[QuantLinear], grad: Callable[[], Any]) -> None:
    linear, x = made(kind, True, "ste"), rand(2, 4, WIDTH)
    with grad():
        assert torch.equal(linear(x).relu_(), linear(x).relu())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_input_that_changes_after_the_call_changes_no_gradient(shape: str, bias: bool) -> None:
    def step(kind: type[QuantLinear], change: bool) -> list[Tensor | None]:
        linear = made(kind, bias, "ste")
        x = SHAPES[shape]().requires_grad_()
        middle = x * 1
        y = linear(middle)
        if change:
            middle.relu_()
        (y.square().sum() + 0 * middle.sum()).backward()
        return [x.grad, linear.weight.grad]

    for kind in (QuantLinear, PackedLinear):
        for one, other in zip(step(kind, True), step(kind, False), strict=True):
            assert (one is None) == (other is None)
            assert one is None or other is None or torch.equal(one, other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports its compiler
@pytest.mark.parametrize("shape", ["1-D", "3-D", "transposed"])
def test_compiled(shape: str) -> None:
    for kind in (QuantLinear, PackedLinear):
        linear = made(kind, True, "ste")
        torch.compiler.reset()
        compiled = torch.compile(lambda x: linear(x).mul_(2).relu_(), backend="aot_eager", fullgraph=True)  # noqa: B023
        one, other = SHAPES[shape]().requires_grad_(), SHAPES[shape]().requires_grad_()
        y, expected = compiled(one), linear(other).mul_(2).relu_()
        y.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(y, expected)
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
