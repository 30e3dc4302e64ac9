"""What the tests change of Triton's interpreter: programs that wait for each other, products of bfloat16, its speed.

As it comes, the interpreter runs one program after the other: a program that waits for a later one never ends. Here
every program can be a thread. Python switches threads between the operations of a program, in an order that nobody
controls: results that depend on it are found by chance, not by proof.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

STUCK_SECONDS = 120


class _OwnPlace(threading.local):
    place: tuple[int, int, int] = (0, 0, 0)


def run_programs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every launch of this test run its programs as threads. A program that never ends fails the test."""
    own = _OwnPlace()
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(type(builder), "grid_idx", property(lambda self: own.place), raising=False)
    monkeypatch.setattr(type(builder), "set_grid_idx", lambda self, *place: setattr(own, "place", place))
    run_launch = interpreter.GridExecutor.__call__

    def launch(executor: Any, *arguments: Any, **options: Any) -> None:
        program, threads, errors = executor.fn, [], []

        def start(**values: Any) -> None:
            place = own.place

            def run() -> None:
                own.place = place
                try:
                    program(**values)
                except BaseException as error:
                    errors.append(error)

            threads.append(threading.Thread(target=run, daemon=True))

        executor.fn = _as(program, start)
        patched = interpreter._patch_lang

        def patch_until_all_have_ended(function: Any) -> Any:
            """The first patch of a launch is undone at its end: not before its programs have ended."""
            scope = patched(function)
            undo = scope.restore

            def restore() -> None:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(STUCK_SECONDS)
                undo()
                assert not any(thread.is_alive() for thread in threads), "a program waits for ever"
                assert not errors, errors

            scope.restore = restore
            interpreter._patch_lang = patched
            return scope

        interpreter._patch_lang = patch_until_all_have_ended
        run_launch(executor, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)


def _as(program: Callable[..., None], start: Callable[..., None]) -> Callable[..., None]:
    """`start` with what the interpreter asks a program for: its signature, and `tl` among its globals."""

    class Starter:
        __signature__ = inspect.signature(program)
        __name__, __globals__ = program.__name__, program.__globals__

        def __call__(self, **values: Any) -> None:
            start(**values)

    return Starter()


def multiply_bfloat16_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies bfloat16 as the integers of its bits (Triton 3.9): here as the numbers they are."""
    builder = type(interpreter.interpreter_builder)
    dot = builder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *others: dot(self, wide(a), wide(b), *others))


_PATCHED: set[int] = set()


def patch_triton_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch what a module knows of triton.language once, not at every call of a device function: most of the time."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if id(self.fn.__globals__) not in _PATCHED:
            interpreter._patch_lang(self.fn)
            _PATCHED.add(id(self.fn.__globals__))
        return self.rewrite()(*arguments, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
