"""Pytest plugin for POT's published tests: puts our functions in POT's place and notes which tests called them.

`run_pot.py` loads it with `-p pot_plugin`. POT's test folder has a `conftest.py` of its own that its source
distributions leave out; the fixture and the two markers that the tests expect from it are here.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase as fnmatch
from types import ModuleType
from typing import Any

import ot
import pytest
from ot.backend import get_backend_list

from pisces_kernels.compat import pot

# Where each function lives in POT. It is replaced under every name by which a module of POT knows it.
REPLACED: dict[str, ModuleType] = {
    "sinkhorn": ot.bregman,
    "sinkhorn2": ot.bregman,
    "sinkhorn_log": ot.bregman,
    "sinkhorn_unbalanced": ot.unbalanced,
    "sinkhorn_unbalanced2": ot.unbalanced,
    "entropic_partial_wasserstein": ot.partial,
    "entropic_partial_wasserstein_logscale": ot.partial,
}


class Recorder:
    """Which test runs, which ones called our functions, and how each ended."""

    def __init__(self, mode: str) -> None:
        self.mode = mode  # "ours", "pot" (nothing is replaced, only counted) or "wrong" (every second result is)
        self.current = ""
        self.calls: dict[str, dict[str, int]] = {}
        self.outcomes: dict[str, str] = {}

    def wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        function = original if self.mode == "pot" else getattr(pot, name)

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls = self.calls.setdefault(self.current, {})
            calls[name] = calls.get(name, 0) + 1
            result = function(*args, **kwargs)
            if self.mode != "wrong" or calls[name] % 2:
                return result
            return (result[0] * 1.5, *result[1:]) if isinstance(result, tuple) else result * 1.5

        return counted

    def install(self) -> None:
        for name, home in REPLACED.items():
            original = getattr(home, name)
            wrapped = self.wrap(name, original)
            for module_name, module in list(sys.modules.items()):
                if module_name == "ot" or module_name.startswith("ot."):
                    for attribute, value in list(vars(module).items()):
                        if value is original:
                            setattr(module, attribute, wrapped)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep the tests whose names or patterns are asked for."""
        wanted = os.environ["POT_TESTS"].split()
        kept = [item for item in items if any(fnmatch(n, w) for n in (item.name, _function(item)) for w in wanted)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.current = item.nodeid
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        with open(os.environ["POT_RECORD"], "w") as file:
            json.dump({"calls": self.calls, "outcomes": self.outcomes}, file)


def _function(item: pytest.Item) -> str:
    return item.name.partition("[")[0]


@pytest.fixture(params=[b for b in get_backend_list() if b.__name__ in ("numpy", "torch")], ids=lambda b: b.__name__)
def nx(request: pytest.FixtureRequest) -> Any:
    """POT's backends whose arrays we take."""
    return request.param


def skip_arg(arg: Any, value: Any, reason: str = "", getter: Callable[[Any], Any] = lambda x: x) -> Any:
    """Decorator that POT's tests use for a backend or a method that another library lacks."""
    names, values = ((arg,), (value,)) if isinstance(arg, str) else (arg, value)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**arguments: Any) -> None:
            if all(n in arguments and getter(arguments[n]) == v for n, v in zip(names, values, strict=True)):
                pytest.skip(reason or f"{arg} is {value}")
            test(**arguments)

        return run

    return decorate


def pytest_configure(config: pytest.Config) -> None:
    """Offer POT's markers under the names that its tests use, and start to record."""
    pytest.skip_arg = skip_arg  # type: ignore[attr-defined]
    pytest.skip_backend = functools.partial(skip_arg, "nx", getter=str)  # type: ignore[attr-defined]
    recorder = Recorder(os.environ["POT_MODE"])
    recorder.install()
    config.pluginmanager.register(recorder, "pot-recorder")
