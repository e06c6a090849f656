"""Nested arguments and outputs as flat tensors, and back."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.helpers import watch
from wrappers import _tree

Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass
class Box:
    content: Any
    label: str = "box"


@dataclasses.dataclass(frozen=True)
class Frozen:
    content: Any
    label: Any = None


def tensors_in(value):
    """The tensors of a value, found by another way than the code under test."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_in(item)]
    if isinstance(value, (Box, Frozen)):
        return tensors_in(value.content) + tensors_in(value.label)
    return []


def is_same(a, b):
    """Same structure and types, with the same tensor objects in it."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a is b
    if isinstance(a, dict):
        return list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, (Box, Frozen)):
        return is_same(a.content, b.content) and is_same(a.label, b.label)
    return a is b or a == b


tensors = st.builds(torch.ones, st.integers(0, 3))
atoms = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), tensors)
trees = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(collections.OrderedDict),
        st.tuples(inner, inner).map(lambda pair: Point(*pair)),
        st.builds(Box, inner),
        st.builds(Frozen, inner, inner),
    ),
    max_leaves=8,
)


@given(trees)
@settings(max_examples=200, deadline=None)
def test_round_trip(value):
    flat, build = _tree.flatten(value)
    assert [id(t) for t in flat] == [id(t) for t in tensors_in(value)]
    assert is_same(build(flat), value)


@given(trees)
@settings(max_examples=100, deadline=None)
def test_built_twice_with_other_tensors(value):
    flat, build = _tree.flatten(value)
    for _ in range(2):
        others = [torch.zeros(2) for _ in flat]
        assert [id(t) for t in tensors_in(build(others))] == [id(t) for t in others]
    assert [id(t) for t in tensors_in(value)] == [id(t) for t in flat]


@given(trees)
@settings(max_examples=100, deadline=None)
def test_without_tensors_the_value_itself_comes_back(value):
    flat, build = _tree.flatten(value)
    if not flat:
        assert build([]) is value


@given(st.lists(trees, max_size=3), st.dictionaries(st.text(max_size=2), trees, max_size=3))
@settings(max_examples=100, deadline=None)
def test_calls(args, kwargs):
    flat, build = _tree.flatten_call(tuple(args), kwargs)
    assert [id(t) for t in flat] == [id(t) for t in tensors_in([args, kwargs])]
    got_args, got_kwargs = build(flat)
    assert is_same(tuple(got_args), tuple(args))
    assert is_same(got_kwargs, kwargs)


def test_nothing_keeps_the_tensors_alive():
    value = {"a": [torch.ones(3)], "b": Box(Frozen((torch.ones(2), 1)))}
    watches = [watch(t) for t in tensors_in(value)]
    flat, build = _tree.flatten(value)
    del value, flat
    assert [w.expired() for w in watches] == [True, True]
    out = build([torch.zeros(1), torch.zeros(1)])
    assert out["b"].content.content[1] == 1


def test_nothing_keeps_the_tensors_of_a_call_alive():
    watches = []

    def flatten():
        args = torch.ones(3), [torch.ones(2)]
        kwargs = {"k": Point(torch.ones(1), None)}
        watches.extend(watch(t) for t in tensors_in([args, kwargs]))
        return _tree.flatten_call(args, kwargs)[1]

    build = flatten()
    assert [w.expired() for w in watches] == [True] * 3
    assert build([1, 2, 3]) == ((1, [2]), {"k": Point(3, None)})


def test_a_built_dataclass_is_a_new_object():
    box = Box(torch.ones(1))
    flat, build = _tree.flatten(box)
    first, second = build(flat), build(flat)
    assert first is not box
    assert first is not second
    first.label = "changed"
    assert (box.label, second.label) == ("box", "box")


def test_attributes_of_a_dataclass_that_are_no_fields_stay():
    box = Box(torch.ones(1))
    box.extra = "extra"
    flat, build = _tree.flatten(box)
    assert build(flat).extra == "extra"


def test_a_dataclass_does_not_run_its_init_again():
    calls = []

    @dataclasses.dataclass
    class Counted:
        content: Any

        def __post_init__(self):
            calls.append(1)

    flat, build = _tree.flatten(Counted(torch.ones(1)))
    build(flat)
    assert calls == [1]


def test_the_class_of_a_dataclass_is_not_opened():
    flat, build = _tree.flatten([Box])
    assert flat == []
    assert build([]) == [Box]


def test_types_that_torchs_pytree_knows():
    value = collections.defaultdict(list, a=torch.ones(1), b=[torch.ones(2)])
    flat, build = _tree.flatten(value)
    assert [t.numel() for t in flat] == [1, 2]
    assert build(flat)["missing"] == []
    queue = collections.deque([torch.ones(1), 2], maxlen=2)
    flat, build = _tree.flatten(queue)
    assert build(flat).maxlen == 2


def test_types_that_nobody_knows_are_passed_as_they_are():
    class Opaque:
        def __init__(self):
            self.tensor = torch.ones(1)

    value = Opaque()
    flat, build = _tree.flatten((value, torch.ones(1)))
    assert len(flat) == 1
    assert build(flat)[0] is value


def test_subclasses_of_containers_keep_their_class():
    class MyDict(dict):
        pass

    class MyList(list):
        pass

    value = [MyDict(a=1), MyList([2]), torch.ones(1)]
    flat, build = _tree.flatten(value)
    assert [type(item) for item in build(flat)[:2]] == [MyDict, MyList]


@pytest.mark.parametrize("value", [None, 3, "s", (), [], {}, (1, [2, {"a": None}])])
def test_values_without_tensors(value):
    flat, build = _tree.flatten(value)
    assert flat == []
    assert build(iter([])) is value


def test_a_parameter_and_a_subclass_count_as_tensors():
    parameter = torch.nn.Parameter(torch.ones(1))
    flat, _ = _tree.flatten([parameter])
    assert flat[0] is parameter
