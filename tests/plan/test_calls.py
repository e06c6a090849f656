"""A call of a region can be made again on other tensors."""

from __future__ import annotations

import torch

from wrappers import _torch
from wrappers.plan.calls import call_of, make_tensors, specs_of, with_output

CPU = torch.device("cpu")


def _call(*args, **kwargs):
    return call_of(args, kwargs)


def test_tensors_are_made_alike():
    whole = torch.ones(4, 8)
    tensors = [whole, whole[1:], whole.t(), torch.ones(3, dtype=torch.int64)]
    made = make_tensors(specs_of(tensors), CPU)
    for old, new in zip(tensors, made, strict=True):
        assert (old.shape, old.stride(), old.dtype) == (new.shape, new.stride(), new.dtype)
        assert old.storage_offset() == new.storage_offset()
    keys = [_torch.storage_key(t) for t in made]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert _torch.storage_bytes(made[1]) == 4 * 8 * 4


def test_whole_tensors_are_no_views():
    spec, part = specs_of([torch.ones(4, 8).t(), torch.ones(4, 8)[:, :4]])
    assert spec.is_whole
    assert not part.is_whole
    assert not make_tensors([spec], CPU)[0]._is_view()


def test_a_call_is_made_again():
    call = _call(torch.ones(2), [torch.ones(3), 5], mask=None, x=torch.ones(4))
    made = make_tensors(call.inputs, CPU)
    args, kwargs = call.run(lambda *args, **kwargs: (args, kwargs), made)
    assert args[0] is made[0]
    assert (args[1][0], args[1][1]) == (made[1], 5)
    assert kwargs == {"mask": None, "x": made[2]}


def test_calls_are_alike_where_looks_and_constants_are():
    x = torch.ones(2, 3)
    assert _call(x, 1.0).key() == _call(torch.zeros(2, 3), 1.0).key()
    others = [
        _call(x, 2.0),
        _call(x, True),
        _call(x, None),
        _call(x, scale=1.0),
        _call(torch.ones(3, 3), 1.0),
        _call(torch.ones(3, 2).t(), 1.0),
        _call(x.double(), 1.0),
        _call(x.clone().requires_grad_(), 1.0),
    ]
    with torch.no_grad():
        others.append(_call(x, 1.0))
    with torch.autocast("cpu", torch.bfloat16):
        others.append(_call(x, 1.0))
    keys = [call.key() for call in (_call(x, 1.0), *others)]
    assert len(set(map(repr, keys))) == len(keys)


def test_tensors_that_share_memory_are_not_like_those_that_do_not():
    x = torch.ones(2)
    assert _call(x, x).key() != _call(x, torch.ones(2)).key()


def test_the_state_around_a_call_is_there_again():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        call = _call(torch.ones(2))
    assert torch.is_grad_enabled()
    with call.surroundings():
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_the_other_way_round_too():
    call = _call(torch.ones(2))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), call.surroundings():
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")


def test_results_are_described():
    x, y = torch.ones(2), torch.ones(3)
    out = {"new": y * 2, "same": x, "n": 3}
    saved = {_torch.storage_key(out["new"])}
    call = with_output(call_of((x, y), {}), [x, y], out, saved)
    assert [spec.size for spec in call.outputs] == [(3,), (2,)]
    assert call.passed_on == ((1, 0),)
    assert [spec.is_own for spec in call.outputs] == [True, False]
    assert call.build_output([1, 2]) == {"new": 1, "same": 2, "n": 3}
    call = call.with_own([True, False]).with_own_outputs([False, True])
    assert [spec.is_own for spec in call.inputs] == [True, False]
    assert [spec.is_own for spec in call.outputs] == [False, True]
