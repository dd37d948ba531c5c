"""The state goes where the work goes: threads, pools, tasks, generators, and blocks that are left in any order."""

import asyncio
import copy
import gc
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import copy_context
from itertools import permutations
from multiprocessing.pool import ThreadPool
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsurgeon
from qsurgeon.errors import UsageError
from qsurgeon.formats import get_format
from qsurgeon.layers import Quantization, QuantLinear, current_phase, is_active
from qsurgeon.layers.phases.state import current

MXFP4 = get_format("mxfp4")
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
Seen = tuple[bool, bool, bool]  # which of the three layers round


def make(phases: str = "both") -> nn.Linear:
    linear = nn.Linear(64, 64)
    QuantLinear.wrap(linear, Quantization(MXFP4, MXFP4, phases=phases))
    return linear


@contextmanager
def inside(*names: str) -> Iterator[None]:
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(STATES[name][0]())
        yield


LAYERS = {phases: make(phases) for phases in ("both", "training", "rollout")}
STATES: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Seen]] = {
    "outside": (nullcontext, (True, True, False)),
    "training": (lambda: qsurgeon.phase("training"), (True, True, False)),
    "rollout": (lambda: qsurgeon.phase("rollout"), (True, False, True)),
    "disabled": (lambda: qsurgeon.disabled(LAYERS["both"]), (False, True, False)),
    "both": (lambda: inside("disabled", "rollout"), (False, False, True)),
}
WITHIN = pytest.mark.parametrize("name", list(STATES))


def seen() -> Seen:
    """Return which layers round here, by what they compute."""
    found = []
    with torch.no_grad():
        for linear in LAYERS.values():
            plain = nn.functional.linear(X, linear.weight, linear.bias)
            found.append(not torch.equal(linear(X), plain))
    return found[0], found[1], found[2]


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    assert seen() == STATES["outside"][1]
    yield
    assert seen() == STATES["outside"][1]
    assert current().blocks == ()


# ---- threads


class Own(threading.Thread):
    """A thread with a ``run`` of its own."""

    def run(self) -> None:
        super().run()


def of_the_object(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread()
    vars(thread)["run"] = target
    return thread


THREADS: dict[str, Callable[[Callable[[], None]], threading.Thread]] = {
    "Thread": lambda target: threading.Thread(target=target),
    "a subclass": lambda target: Own(target=target),
    "a run of the object": of_the_object,
    "Timer": lambda target: threading.Timer(0, target),
    "a thread of a thread": lambda target: threading.Thread(target=lambda: run(threading.Thread(target=target))),
}


def run(thread: threading.Thread) -> None:
    thread.start()
    thread.join()


@WITHIN
@pytest.mark.parametrize("kind", list(THREADS))
def test_a_thread_runs_in_the_state_in_which_it_was_started(kind: str, name: str) -> None:
    enter, expected = STATES[name]
    found: list[Seen] = []
    thread = THREADS[kind](lambda: found.append(seen()))
    with enter():
        run(thread)
    assert found == [expected]


def test_a_thread_stays_in_its_state_after_the_block_was_left() -> None:
    go, found = threading.Event(), []

    def work() -> None:
        go.wait()
        found.append(seen())

    thread = threading.Thread(target=work)
    with inside("both"):
        thread.start()
    go.set()
    thread.join()
    assert found == [STATES["both"][1]]


def test_a_thread_that_was_there_before_is_not_told() -> None:
    go, done, found = threading.Event(), threading.Event(), []

    def work() -> None:
        go.wait()
        found.append(seen())
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    with inside("both"):
        go.set()
        done.wait()
    thread.join()
    assert found == [STATES["outside"][1]]


def test_threads_are_in_states_of_their_own() -> None:
    barrier = threading.Barrier(len(STATES))
    found: dict[str, list[Seen]] = {name: [] for name in STATES}

    def work(name: str) -> None:
        for _ in range(3):
            with STATES[name][0]():
                barrier.wait()
                found[name].append(seen())
                barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in STATES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [expected] * 3 for name, (_, expected) in STATES.items()}


def test_a_thread_that_is_over_holds_nothing() -> None:
    with inside("rollout"):
        thread = Own(target=seen)
        run(thread)
    assert "run" not in vars(thread)
    with pytest.raises(RuntimeError, match="threads can only be started once"):
        thread.start()


def test_a_replica_of_a_model_is_disabled_with_it() -> None:
    """As torch's DataParallel makes them, one a GPU, each of which runs in a thread."""
    replica, found = LAYERS["both"]._replicate_for_data_parallel(), []
    vars(replica).update(weight=LAYERS["both"].weight, bias=LAYERS["both"].bias)
    with inside("disabled"):
        replica = LAYERS["both"]._replicate_for_data_parallel()
        run(threading.Thread(target=lambda: found.append(is_active(replica, "both"))))
    assert found == [False]
    assert is_active(replica, "both")


# ---- pools

Map = Callable[[Any, Callable[[int], Seen]], list[Seen]]
POOLS: dict[str, tuple[Callable[[], Any], Map]] = {
    "submit": (lambda: ThreadPoolExecutor(2), lambda pool, f: [pool.submit(f, 0).result()]),
    "executor.map": (lambda: ThreadPoolExecutor(2), lambda pool, f: list(pool.map(f, range(3)))),
    "apply": (lambda: ThreadPool(2), lambda pool, f: [pool.apply(f, (0,))]),
    "apply_async": (lambda: ThreadPool(2), lambda pool, f: [pool.apply_async(func=f, args=(0,)).get()]),
    "map": (lambda: ThreadPool(2), lambda pool, f: pool.map(f, range(3))),
    "map_async": (lambda: ThreadPool(2), lambda pool, f: pool.map_async(f, range(3), chunksize=2).get()),
    "starmap": (lambda: ThreadPool(2), lambda pool, f: pool.starmap(f, [(0,), (1,)])),
    "starmap_async": (lambda: ThreadPool(2), lambda pool, f: pool.starmap_async(f, [(0,), (1,)]).get()),
    "imap": (lambda: ThreadPool(2), lambda pool, f: list(pool.imap(f, range(3)))),
    "imap_unordered": (lambda: ThreadPool(2), lambda pool, f: list(pool.imap_unordered(f, range(3)))),
}


@pytest.mark.parametrize("made", list(STATES))
@pytest.mark.parametrize("kind", list(POOLS))
def test_a_task_of_a_pool_runs_in_the_state_in_which_it_was_submitted(kind: str, made: str) -> None:
    """Whenever the pool was made, and whichever thread it is that has the task."""
    make_pool, submit = POOLS[kind]
    with ExitStack() as stack:
        with inside(made):
            pool = stack.enter_context(make_pool())
            assert set(submit(pool, lambda _: seen())) == {STATES[made][1]}
        for name in ("rollout", "outside", "both", "outside"):
            with inside(name):
                assert set(submit(pool, lambda _: seen())) == {STATES[name][1]}


def test_a_task_that_raises_leaves_its_thread_as_it_was() -> None:
    def fail() -> None:
        with inside("both"):
            raise ZeroDivisionError

    with ThreadPoolExecutor(1) as pool:
        with inside("rollout"), pytest.raises(ZeroDivisionError):
            pool.submit(fail).result()
        assert pool.submit(seen).result() == STATES["outside"][1]


# ---- asyncio


def test_coroutines_that_are_interleaved_are_each_in_their_own_state() -> None:
    async def work(name: str, barrier: asyncio.Barrier) -> list[Seen]:
        found = []
        for _ in range(2):
            with STATES[name][0]():
                await barrier.wait()
                found.append(seen())
                await barrier.wait()
                found.append(seen())
        return found

    async def main() -> list[list[Seen]]:
        barrier = asyncio.Barrier(len(STATES))
        found = await asyncio.gather(*(work(name, barrier) for name in STATES))
        assert seen() == STATES["outside"][1]
        return found

    assert asyncio.run(main()) == [[expected] * 4 for _, expected in STATES.values()]


async def _seen() -> Seen:
    await asyncio.sleep(0)
    return seen()


async def _later(loop_call: Callable[..., Any]) -> Seen:
    found: asyncio.Future[Seen] = asyncio.get_running_loop().create_future()
    loop_call(lambda: found.set_result(seen()))
    return await found


async def _from_another_thread(executor: Executor | None) -> Seen:
    return await asyncio.get_running_loop().run_in_executor(executor, seen)


def _loop_of_another_thread() -> Seen:
    """As TRL has one for the tools of an agent, which is there before the block."""
    return asyncio.run_coroutine_threadsafe(_seen(), LOOP).result()


LOOP = asyncio.new_event_loop()
threading.Thread(target=LOOP.run_forever, daemon=True).start()

ASYNC: dict[str, Callable[[], Any]] = {
    "await": _seen,
    "create_task": lambda: asyncio.create_task(_seen()),
    "gather": lambda: asyncio.wait_for(_seen(), None),
    "to_thread": lambda: asyncio.to_thread(seen),
    "run_in_executor": lambda: _from_another_thread(None),
    "call_soon": lambda: _later(asyncio.get_running_loop().call_soon),
    "call_soon_threadsafe": lambda: _later(asyncio.get_running_loop().call_soon_threadsafe),
    "another loop": lambda: asyncio.to_thread(_loop_of_another_thread),
}


@WITHIN
@pytest.mark.parametrize("kind", list(ASYNC))
def test_what_asyncio_runs_is_in_the_state_of_who_asked_for_it(kind: str, name: str) -> None:
    async def main() -> tuple[Seen, Seen]:
        with inside(name):
            there = await ASYNC[kind]()
        return there, await ASYNC[kind]()

    assert asyncio.run(main()) == (STATES[name][1], STATES["outside"][1])


def test_an_asynchronous_generator_that_another_task_closes_leaves_nothing() -> None:
    async def steps() -> AsyncIterator[Seen]:
        with inside("both"):
            yield seen()
            yield seen()

    async def main() -> Seen:
        running = steps()
        assert await anext(running) == STATES["both"][1]
        await asyncio.create_task(running.aclose())  # type: ignore[attr-defined]
        return seen()

    assert asyncio.run(main()) == STATES["outside"][1]


# ---- generators, and blocks that are left in any order


def lending(name: str) -> Iterator[None]:
    with inside(name):
        yield


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_blocks_may_be_left_in_any_order(order: tuple[int, ...]) -> None:
    names = ["rollout", "disabled", "training"]
    blocks = [STATES[name][0]() for name in names]
    for block in blocks:
        block.__enter__()
    for step, place in enumerate(order):
        blocks[place].__exit__(None, None, None)
        still = [names[other] for other in sorted(order[step + 1 :])]
        there = seen()
        with inside(*still):
            assert seen() == there
        phase = next((name for name in reversed(still) if name != "disabled"), "training")
        assert there == ("disabled" not in still, phase == "training", phase == "rollout")


def test_generators_that_are_interleaved_leave_nothing() -> None:
    first, second = lending("rollout"), lending("both")
    next(first)
    assert seen() == STATES["rollout"][1]
    next(second)
    assert next(first, None) is None
    assert seen() == STATES["both"][1]
    assert next(second, None) is None


@pytest.mark.parametrize("close", [True, False])
def test_a_generator_that_is_dropped_in_another_thread_leaves_nothing(close: bool) -> None:
    held = [lending("both")]
    next(held[0])

    def drop() -> None:
        one = held.pop()
        if close:
            one.close()  # type: ignore[attr-defined]
        del one
        gc.collect()

    run(threading.Thread(target=drop))
    assert seen() == STATES["outside"][1]


def test_a_block_that_is_entered_again_is_refused() -> None:
    block = qsurgeon.phase("rollout")
    with block, pytest.raises(UsageError) as caught, block:
        pass
    assert str(caught.value) == "this block is entered already, and was not left; make another one for a second `with`"
    with block:
        assert seen() == STATES["rollout"][1]


# ---- decorated functions


@qsurgeon.phase("rollout")
def decorated() -> Seen:
    return seen()


@qsurgeon.phase("rollout")
async def decorated_coroutine() -> Seen:
    await asyncio.sleep(0)
    return seen()


@qsurgeon.phase("rollout")
def decorated_generator(count: int) -> Iterator[Seen]:
    """Yield what is seen, and in the end in a block of its own, which the next step is in too."""
    for _ in range(count):
        yield seen()
    with qsurgeon.phase("training"):
        yield seen()
        yield seen()


@qsurgeon.phase("rollout")
async def decorated_async_generator() -> AsyncIterator[Seen]:
    yield seen()
    await asyncio.sleep(0)
    yield seen()


@qsurgeon.phase("rollout")
def returns_a_generator() -> Iterator[Seen]:
    return (seen() for _ in range(2))


@qsurgeon.phase("rollout")
def returns_a_coroutine() -> Any:
    return _seen()


def test_a_decorated_function_is_inside_whatever_kind_it_is() -> None:
    rollout, outside = STATES["rollout"][1], STATES["outside"][1]
    assert [decorated(), decorated()] == [rollout] * 2
    assert asyncio.run(decorated_coroutine()) == rollout
    assert asyncio.run(returns_a_coroutine()) == rollout
    assert list(returns_a_generator()) == [rollout] * 2
    found = []
    for there in decorated_generator(2):
        assert seen() == outside
        found.append(there)
    assert found == [rollout, rollout, outside, outside]

    async def main() -> list[Seen]:
        found = []
        async for there in decorated_async_generator():
            assert seen() == outside
            found.append(there)
        return found

    assert asyncio.run(main()) == [rollout] * 2


def test_a_decorated_generator_is_sent_to_thrown_at_and_closed_like_any() -> None:
    heard: list[Any] = []

    @qsurgeon.phase("rollout")
    def talking() -> Iterator[str]:
        try:
            heard.append((yield "a"))
            try:
                yield "b"
            except ZeroDivisionError:
                yield "caught"
        finally:
            heard.append(seen())

    one: Any = talking()
    assert next(one) == "a"
    assert one.send("hello") == "b"
    assert one.throw(ZeroDivisionError()) == "caught"
    one.close()
    assert heard == ["hello", STATES["rollout"][1]]


# ---- whom `disabled` means


def test_a_copy_of_a_model_that_was_disabled_is_another_model() -> None:
    teacher = nn.Sequential(make(), make())
    with qsurgeon.disabled(teacher):
        copies = [copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))]
        assert not any(is_active(layer, "both") for layer in teacher)
        assert all(is_active(layer, "both") for one in copies for layer in one)
    for one in copies:
        with qsurgeon.disabled(one):
            assert not any(is_active(layer, "both") for layer in one)
            assert all(is_active(layer, "both") for layer in teacher)


def test_a_part_may_be_disabled_and_a_whole_and_two_at_once() -> None:
    first, second, third = make(), make(), make()
    whole = nn.Sequential(first, second)

    def acting() -> list[bool]:
        return [is_active(one, "both") for one in (first, second, third)]

    with qsurgeon.disabled(first):
        assert acting() == [False, True, True]
        with qsurgeon.disabled(whole):
            assert acting() == [False, False, True]
        assert acting() == [False, True, True]
    with qsurgeon.disabled(whole, third):
        assert acting() == [False, False, False]
    whole.append(third)
    with qsurgeon.disabled(whole):
        assert acting() == [False, False, False]
    assert acting() == [True, True, True]


# ---- backward passes


class _Calls(torch.autograd.Function):
    """Calls a function in its backward pass, as checkpointing that is not torch's does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[], None]) -> Tensor:
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        ctx.function()
        return grads[0], None


@WITHIN
def test_a_backward_pass_is_in_the_state_of_who_called_it_in_other_threads_too(name: str) -> None:
    """Torch goes on in a thread of its own, below Python, where backward passes lie deep inside of each other."""
    found: list[tuple[int, Seen]] = []

    def deeper(depth: int) -> None:
        found.append((threading.get_ident(), seen()))
        if depth:
            x = torch.zeros(1, requires_grad=True)
            with torch.enable_grad():
                y = _Calls.apply(x, lambda: deeper(depth - 1)).sum()  # type: ignore[no-untyped-call]
            y.backward()
            found.append((threading.get_ident(), seen()))

    with inside(name):
        deeper(70)
    assert len({thread for thread, _ in found}) == 2
    assert {there for _, there in found} == {STATES[name][1]}


def test_a_backward_pass_with_a_context_of_its_own_is_in_that() -> None:
    with inside("both"):
        context = copy_context()
    x = torch.zeros(1, requires_grad=True)
    found: list[Seen] = []
    context.run(lambda: _Calls.apply(x, lambda: found.append(seen())).sum().backward())  # type: ignore[no-untyped-call]
    assert found == [STATES["both"][1]]


# ---- compiled


class Counting:
    """A backend that counts what it compiles, and runs it as it is."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.compiled += 1
        return graph.forward


@pytest.mark.parametrize("phases", ["both", "training", "rollout"])
def test_compiled_blocks_follow_the_state_and_share_their_graphs(phases: str) -> None:
    """More blocks than dynamo compiles anew for, each compiled by itself, as accelerate's compile_regions does."""
    torch._dynamo.reset()
    backend, blocks = Counting(), nn.Sequential(*(Block(phases) for _ in range(12)))
    expected = {}
    for name in STATES:
        with state_for(name, blocks), torch.no_grad():
            expected[name] = blocks(X)
    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    for _ in range(3):
        for name in STATES:
            with state_for(name, blocks), torch.no_grad():
                assert torch.equal(blocks(X), expected[name])
    assert backend.compiled <= len(STATES)


class Block(nn.Module):
    def __init__(self, phases: str) -> None:
        super().__init__()
        self.linear = make(phases)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.linear, QuantLinear)
        acts = is_active(self.linear, self.linear.quantization.behavior.phases)
        moved: Tensor = x + (1 if acts else 0) * self.linear.bias
        return moved


def state_for(name: str, model: nn.Module) -> AbstractContextManager[Any]:
    stack = ExitStack()
    if name in ("rollout", "both"):
        stack.enter_context(qsurgeon.phase("rollout"))
    if name in ("disabled", "both"):
        stack.enter_context(qsurgeon.disabled(model))
    return stack


def test_a_compiled_model_follows_threads_and_interleaved_coroutines() -> None:
    torch._dynamo.reset()
    block = Block("training")
    plain, acting = X.clone(), block(X).detach()
    block.compile(backend=Counting(), fullgraph=True)

    async def work(name: str, barrier: asyncio.Barrier) -> Tensor:
        with inside(name):
            await barrier.wait()
            found = block(X)
            await barrier.wait()
            assert torch.equal(found, block(X))
        return found.detach()  # type: ignore[no-any-return]

    async def main() -> tuple[Tensor, Tensor]:
        barrier = asyncio.Barrier(2)
        return await asyncio.gather(work("rollout", barrier), work("outside", barrier))

    rollout, outside = asyncio.run(main())
    assert torch.equal(rollout, plain)
    assert torch.equal(outside, acting)
    with inside("rollout"), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(block, X).result(), plain)


def test_the_phase_can_be_asked() -> None:
    assert current_phase() == "training"
    with inside("rollout"):
        assert current_phase() == "rollout"
