"""Wrap a function so that all of it runs inside a ``with`` block, including what it awaits or yields."""

from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import AbstractContextManager, aclosing
from functools import partial, wraps
from inspect import isasyncgen, isasyncgenfunction, iscoroutine, iscoroutinefunction, isgenerator, isgeneratorfunction
from typing import Any

from qsurgeon.layers.phases.state import Block, State, current, entered, inside
from qsurgeon.patching import Method

Enter = Callable[[], AbstractContextManager[Any]]


def around(function: Method, enter: Enter) -> Method:
    """Return ``function`` such that all it does runs inside ``enter()``, what it leaves to be done later too.

    A coroutine or a generator works when it is awaited or iterated. Between two steps of a generator the caller is in
    its own state.
    """
    if iscoroutinefunction(function):
        call = _coroutine_function(function, enter)
    elif isgeneratorfunction(function):
        call = _generator_function(function, enter)
    elif isasyncgenfunction(function):
        call = _async_generator_function(function, enter)
    else:
        call = _function(function, enter)
    return wraps(function)(call)


def _function(function: Method, enter: Enter) -> Method:
    def call(*args: Any, **kwargs: Any) -> Any:
        with enter():
            return _later(function(*args, **kwargs), current())

    return call


def _coroutine_function(function: Method, enter: Enter) -> Method:
    async def call(*args: Any, **kwargs: Any) -> Any:
        with enter():
            return await function(*args, **kwargs)

    return call


def _generator_function(function: Method, enter: Enter) -> Method:
    def call(*args: Any, **kwargs: Any) -> Any:
        with enter():
            state = current()
        return (yield from _stepwise(function(*args, **kwargs), state))

    return call


def _async_generator_function(function: Method, enter: Enter) -> Method:
    async def call(*args: Any, **kwargs: Any) -> Any:
        with enter():
            state = current()
        async with aclosing(_stepwise_async(function(*args, **kwargs), state)) as steps:
            async for item in steps:
                yield item

    return call


def _later(result: Any, state: State) -> Any:
    """Return ``result`` such that what it has still to compute is computed in ``state``."""
    if isgenerator(result):
        return _stepwise(result, state)
    if isasyncgen(result):
        return _stepwise_async(result, state)
    return _awaited(result, state) if iscoroutine(result) else result


async def _awaited(result: Coroutine[Any, Any, Any], state: State) -> Any:
    with entered(Block(state.named, state.off, noises=state.noises)):
        return await result


def _stepwise(result: Generator[Any, Any, Any], state: State) -> Generator[Any, Any, Any]:
    """Yield what ``result`` does, each step in the state that the one before left, the first in ``state``."""
    steps = _Steps(state)
    step: Callable[[], Any] = partial(next, result)
    while True:
        try:
            with steps:
                item = step()
        except StopIteration as end:
            return end.value
        try:
            step = partial(result.send, (yield item))
        except GeneratorExit:
            with steps:
                result.close()
            raise
        except BaseException as error:  # noqa: BLE001  # is the generator's to handle
            step = partial(result.throw, error)


async def _stepwise_async(result: AsyncGenerator[Any, Any], state: State) -> AsyncGenerator[Any, Any]:
    steps = _Steps(state)
    try:
        while True:
            with steps:
                item = await anext(result)
            yield item
    except StopAsyncIteration:
        return
    finally:
        with steps:
            await result.aclose()


class _Steps:
    """Goes on in the state in which it was left, with each ``with``."""

    def __init__(self, state: State) -> None:
        self._state = state

    def __enter__(self) -> None:
        self._inside = inside(self._state)
        self._inside.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._state = current()
        self._inside.__exit__(None, None, None)
