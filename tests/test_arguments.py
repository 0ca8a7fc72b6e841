"""sprint.arguments: what each kind of hint takes, how it refuses, and that compiled code is not touched."""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sprint
from sprint.arguments import checked

Model = TypeVar("Model", bound=nn.Module)


class Named(Protocol):
    def name(self) -> str: ...


class Fits:
    def name(self):
        return "fits"


ZERO = torch.zeros(1)


@checked
def f(  # noqa: PLR0917
    x: Tensor = ZERO, number: float = 0.0, count: int = 1, flag: bool = True, word: Literal["a", "b"] = "a",
    text: str | None = None, grid: Sequence[int] = (1, 2), pair: tuple[float, float] = (0.0, 1.0),
    drop: sprint.Drop | None = None, call: Callable[..., Any] = len,
    table: Mapping[str, int] | None = None, kind: type[nn.Module] = nn.Linear,
    named: Named | None = None, dtype: torch.dtype = torch.float32, free: Any = None, *rest: int, **more: int,
) -> str:  # fmt: skip
    return "ran"


@pytest.mark.parametrize(
    "given",
    [
        {"x": nn.Parameter(torch.ones(2))}, {"number": 1}, {"number": np.float32(1)}, {"number": float("inf")},
        {"count": np.int64(3)}, {"text": "x"}, {"grid": [1, 2]}, {"grid": torch.Size([2])}, {"grid": ()}, {"pair": [0, 1]},
        {"drop": sprint.RandomDrop(0.5)}, {"call": lambda: 0}, {"table": {"a": 1}}, {"kind": nn.Conv2d}, {"named": Fits()},
        {"free": object()}, {"more": "unchecked"},
    ],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_what_is_taken(given):
    assert f(**given) == "ran"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"x": np.ones((2, 3))},
            TypeError,
            r"x of f must be a tensor, got a ndarray of shape \(2, 3\) and float64: torch.from",
        ),
        ({"x": None}, TypeError, "x of f must be a tensor, got None: leave it out for a Tensor"),
        ({"number": "1"}, TypeError, "number of f must be a number, got the text '1'"),
        ({"number": True}, TypeError, "number of f must be a number, got True"),
        ({"number": 1j}, TypeError, "number of f must be a number, got 1j"),
        ({"number": float("nan")}, ValueError, "number of f must be a number, got nan"),
        ({"number": torch.ones(2)}, TypeError, r"number .* got a Tensor of shape \(2,\) and torch.float32"),
        ({"count": 2.0}, TypeError, "count of f must be a whole number, got 2.0"),
        ({"count": False}, TypeError, "count of f must be a whole number, got False"),
        ({"flag": "no"}, TypeError, "flag of f must be True or False, got the text 'no'"),
        ({"flag": 1}, TypeError, "flag of f must be True or False, got 1"),
        ({"word": "c"}, ValueError, "word of f must be one of 'a', 'b', got the text 'c'"),
        ({"word": None}, TypeError, "word of f must be one of 'a', 'b', got None: leave it out for the text 'a'"),
        ({"text": b"x"}, TypeError, "text of f must be text or None, got a bytes"),
        ({"grid": "12"}, TypeError, "grid of f must be a sequence of whole numbers, got the text '12'"),
        ({"grid": [1.5]}, TypeError, r"grid of f must be a sequence of whole numbers, got \[1.5\]"),
        ({"grid": [*range(99), "x"]}, TypeError, "grid .* got a list of 100"),
        ({"pair": (1.0,)}, ValueError, r"pair of f must be 2 numbers, in a tuple, got \(1.0,\)"),
        ({"pair": (0.0, "1")}, TypeError, "pair of f must be 2 numbers, in a tuple"),
        ({"pair": [0.0, float("nan")]}, ValueError, "pair of f must be 2 numbers"),
        ({"drop": sprint.RandomDrop}, TypeError, r"drop .* got the class RandomDrop: an object of it, RandomDrop\(...\)"),
        ({"drop": 0.5}, TypeError, "drop of f must be a drop sampler such as StructuredDrop\\(0.75\\) or None, got 0.5"),
        ({"call": nn.Linear}, TypeError, "call of f must be a function, got the class Linear: an object"),
        ({"call": 3}, TypeError, "call of f must be a function, got 3"),
        ({"table": [("a", 1)]}, TypeError, "table of f must be a Mapping or None"),
        ({"kind": nn.Linear(1, 1)}, TypeError, "kind of f must be a class of Module, got a Linear"),
        ({"kind": int}, TypeError, "kind of f must be a class of Module, got the class int"),
        ({"named": Fits}, TypeError, "named of f must be a Named or None, got the class Fits"),
        ({"named": 3}, TypeError, "named of f must be a Named or None, got 3"),
        ({"dtype": "float32"}, TypeError, "dtype of f must be a dtype such as torch.bfloat16, got the text 'float32'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_refused(given, error, message):
    with pytest.raises(error, match=message) as caught:
        f(**given)
    assert caught.traceback[-1].path.name == "arguments.py"
    with pytest.raises(error):  # by place too
        f(*[given.get(name, value) for name, value in zip(DEFAULTS, DEFAULTS.values(), strict=True)])


DEFAULTS = {
    "x": torch.zeros(1), "number": 0.0, "count": 1, "flag": True, "word": "a", "text": None, "grid": (1, 2),
    "pair": (0.0, 1.0), "drop": None, "call": len, "table": None, "kind": nn.Linear, "named": None, "dtype": torch.float32,
}  # fmt: skip


@checked
@dataclass(frozen=True)
class Point:
    x: float
    name: str = "p"

    def moved(self, by: float) -> "Point":
        return Point(self.x + by)

    @classmethod
    def at(cls, x: float) -> "Point":
        return cls(x)


def test_classes_are_checked_when_made_and_called():
    assert Point(1).moved(2).x == Point.at(3).x == 3
    for call, message in (
        (lambda: Point("1"), "x of Point must be a number"),
        (lambda: Point(1, name=2), "name of Point must be text, got 2"),
        (lambda: Point(1).moved(None), "by of Point.moved must be a number, got None"),
        (lambda: Point.at("3"), "x of Point.at must be a number"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_a_bound_variable_is_its_bound():
    @checked
    def same(model: Model) -> Model:
        return model

    assert isinstance(same(nn.Linear(1, 1)), nn.Linear)
    with pytest.raises(TypeError, match=r"model of .*same must be a torch.nn.Module, got 3"):
        same(3)


def test_compiled_code_is_left_alone():
    """One graph, and nothing of the check in it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    assert torch.compile(lambda x: twice(x, by=2.0), backend=backend, fullgraph=True)(torch.ones(2)).equal(
        torch.full((2,), 2.0)
    )
    assert len(graphs) == 1
    assert "isinstance" not in graphs[0]


@checked
def twice(x: Tensor, *, by: float) -> Tensor:
    return by * x


def test_every_hint_of_the_public_surface_can_be_read():
    """A hint that cannot be evaluated would check nothing, silently; those of a type checker alone are listed here."""
    script = (
        "import sprint, inspect, typing\n"
        "for room in [sprint, *(getattr(sprint, n) for n in ('middle', 'flow', 'data', 'models', 'hosts', 'training'))]:\n"
        "    for name in room.__all__:\n"
        "        target = getattr(room, name)\n"
        "        for one in [target, *vars(target).values()] if inspect.isclass(target) else [target]:\n"
        "            one = getattr(one, '__func__', one)\n"
        "            if inspect.isfunction(one) and one.__module__.startswith('sprint'):\n"
        "                try: typing.get_type_hints(one)\n"
        "                except NameError as error: print(one.__qualname__, error.name)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert set(found.splitlines()) == {"center_crop Image", "SiT.preset Unpack"}
