"""What is chosen, what is skipped and why, what stands in the model afterwards, and the undo."""

from __future__ import annotations

import copy
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as theirs
from torch.distributed.fsdp import wrap

from wrappers import _torch
from wrappers.apply import (
    ApplyReport,
    apply_activation_checkpointing,
    remove_activation_checkpointing,
)
from wrappers.errors import WrapperError
from wrappers.modules.base import ActivationWrapper, InPlaceForward, unwrap
from wrappers.modules.checkpoint import CheckpointImpl, CheckpointWrapper, checkpoint_wrapper
from wrappers.modules.offload import OffloadForward, OffloadWrapper, offload_wrapper
from wrappers.offload.simulated import SimulatedTransport
from wrappers.offload.store import OffloadSettings
from wrappers.select import all_but_last, by_class, by_name, every_nth, min_params


class Block(nn.Module):
    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.up = nn.Linear(dim, dim)
        self.act = nn.ReLU()
        self.down = nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class Model(nn.Module):
    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


BLOCK = by_class(Block)
LAYERS = ("layers.0", "layers.1", "layers.2")


def wrapped_names(model: nn.Module) -> tuple[str, ...]:
    return tuple(n for n, m in model.named_modules() if isinstance(m, ActivationWrapper))


def in_place_names(model: nn.Module) -> tuple[str, ...]:
    return tuple(
        n for n, m in model.named_modules() if isinstance(m.__dict__.get("forward"), InPlaceForward)
    )


def grads(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    model(torch.linspace(-1, 1, 12).reshape(3, 4)).square().sum().backward()
    return [p.grad for p in model.parameters()]


# --- Choosing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check_fn", "expected"),
    [
        (BLOCK, LAYERS),
        (lambda m: isinstance(m, Block), LAYERS),
        (by_name("layers.*"), LAYERS),
        (every_nth(2, BLOCK), LAYERS[::2]),
        (all_but_last(1, BLOCK), LAYERS[:2]),
        (min_params(21) & ~by_class(nn.ModuleList), LAYERS),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_check_fn(check_fn, expected, inplace):
    plain = Model()
    model = copy.deepcopy(plain)
    report = apply_activation_checkpointing(model, check_fn=check_fn, inplace=inplace)
    assert report == ApplyReport(expected, {})
    assert wrapped_names(model) == (() if inplace else expected)
    assert in_place_names(model) == (expected if inplace else ())
    assert list(model.state_dict()) == list(plain.state_dict())
    for ours, theirs_ in zip(grads(model), grads(plain), strict=True):
        assert torch.equal(ours, theirs_)


def test_torchs_signature_is_accepted():
    model = Model()
    apply_activation_checkpointing(model, checkpoint_wrapper, lambda m: isinstance(m, Block), None)
    assert wrapped_names(model) == LAYERS


POLICIES = [
    wrap.always_wrap_policy,
    partial(wrap.lambda_auto_wrap_policy, lambda_fn=lambda m: isinstance(m, Block)),
    partial(wrap.transformer_auto_wrap_policy, transformer_layer_cls={Block}),
    *(
        partial(wrap.size_based_auto_wrap_policy, min_num_params=n)
        for n in (0, 20, 21, 40, 41, 60, 100, 120, 160, 161)
    ),
    partial(wrap.size_based_auto_wrap_policy, min_num_params=20, force_leaf_modules={Block}),
    partial(wrap.size_based_auto_wrap_policy, min_num_params=0, exclude_wrap_modules={nn.ReLU}),
    wrap.ModuleWrapPolicy({Block, nn.ReLU}),
    wrap.CustomPolicy(lambda m: isinstance(m, nn.Linear)),
    partial(
        wrap._or_policy,
        policies=[
            wrap.ModuleWrapPolicy({Block}),
            partial(wrap.lambda_auto_wrap_policy, lambda_fn=lambda m: isinstance(m, nn.ReLU)),
        ],
    ),
]


def wrapped_by_torch(model: nn.Module, policy) -> list[str]:
    theirs.apply_activation_checkpointing(model, auto_wrap_policy=policy)
    return [
        name.replace(theirs._CHECKPOINT_PREFIX, "")
        for name, module in model.named_modules()
        if isinstance(module, theirs.CheckpointWrapper)
    ]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("is_tied", [False, True])
def test_policies_choose_what_they_choose_for_torch(policy, is_tied):
    model = Model()
    if is_tied:
        model.head.weight = model.embed.weight
        model.layers[2].up.weight = model.layers[1].down.weight
    expected = wrapped_by_torch(copy.deepcopy(model), policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some choose nothing
        report = apply_activation_checkpointing(model, auto_wrap_policy=policy)
    assert {*report.wrapped, *report.skipped} == set(expected)


def test_a_policys_arguments_reach_the_wrapper():
    def arguments(module):
        if isinstance(module, Block):
            return {"impl": CheckpointImpl.REENTRANT}
        return isinstance(module, nn.ReLU)

    model = Model(1)
    apply_activation_checkpointing(
        model, auto_wrap_policy=wrap.CustomPolicy(arguments), impl=CheckpointImpl.NO_REENTRANT
    )
    assert model.layers[0].checkpoint_impl is CheckpointImpl.REENTRANT
    assert model.layers[0].act.checkpoint_impl is CheckpointImpl.NO_REENTRANT


def test_nested_matches_are_both_wrapped():
    model = Model(1)
    report = apply_activation_checkpointing(model, check_fn=by_class(Block, nn.Linear))
    assert report.wrapped == ("embed", "layers.0", "layers.0.up", "layers.0.down", "head")
    assert wrapped_names(model) == report.wrapped
    assert all(g is not None for g in grads(model))


@pytest.mark.parametrize("inplace", [False, True])
def test_settings_and_fqns_reach_the_regions(inplace):
    model = Model()
    apply_activation_checkpointing(
        model, check_fn=BLOCK, inplace=inplace, impl=CheckpointImpl.REENTRANT, early_stop=False
    )
    faces = [layer.forward if inplace else layer for layer in model.layers]
    assert [face.region_fqn for face in faces] == list(LAYERS)
    assert [face._checkpoint_region.impl for face in faces] == [CheckpointImpl.REENTRANT] * 3
    assert [face._checkpoint_region.early_stop for face in faces] == [False] * 3


def test_other_wrapper_functions():
    model = Model()
    apply_activation_checkpointing(model, partial(offload_wrapper, min_bytes=7), BLOCK)
    assert all(isinstance(layer, OffloadWrapper) for layer in model.layers)
    assert [layer.offload_settings.min_bytes for layer in model.layers] == [7, 7, 7]
    model = Model()
    apply_activation_checkpointing(model, theirs.checkpoint_wrapper, BLOCK)
    assert [type(layer) for layer in model.layers] == [theirs.CheckpointWrapper] * 3
    model = Model()
    apply_activation_checkpointing(model, CheckpointWrapper, BLOCK)
    assert [layer.region_fqn for layer in model.layers] == list(LAYERS)


@pytest.mark.parametrize("inplace", [False, True])
def test_offload_settings_and_fqns_reach_the_regions(inplace):
    settings = {"min_bytes": 0, "keep_last": 2, "prefetch": 3, "ratio": 0.5}
    plain = Model()
    model = copy.deepcopy(plain)
    report = apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(offload_wrapper, **settings),
        check_fn=BLOCK,
        inplace=inplace,
    )
    assert report == ApplyReport(LAYERS, {})
    assert wrapped_names(model) == (() if inplace else LAYERS)
    assert in_place_names(model) == (LAYERS if inplace else ())
    faces = [layer.forward if inplace else layer for layer in model.layers]
    kind = OffloadForward if inplace else OffloadWrapper
    assert [isinstance(face, kind) for face in faces] == [True] * 3
    assert [face.region_fqn for face in faces] == list(LAYERS)
    assert [face.offload_settings for face in faces] == [OffloadSettings(**settings)] * 3
    with SimulatedTransport() as device:
        for ours, expected in zip(grads(model), grads(plain), strict=True):
            assert torch.equal(ours, expected)
        assert device.num_copies("D2H") > 0
    assert remove_activation_checkpointing(model) == 3
    assert list(model.state_dict()) == list(plain.state_dict())


def test_arguments_of_apply_reach_the_offloaded_regions():
    model = Model()
    apply_activation_checkpointing(model, OffloadWrapper, BLOCK, ratio=0.25)
    assert [layer.offload_settings.ratio for layer in model.layers] == [0.25] * 3
    with pytest.raises(ValueError, match="ratio must lie between 0 and 1, got 2"):
        apply_activation_checkpointing(Model(), offload_wrapper, BLOCK, ratio=2)


# --- Shared modules ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, wrap.ModuleWrapPolicy({Block}), wrap.CustomPolicy(BLOCK)])
def test_a_shared_module_gets_one_wrapper_everywhere(policy):
    block = Block()
    model = nn.Sequential(block, block, nn.Sequential(nn.Identity(), block), Block())
    report = apply_activation_checkpointing(model, check_fn=BLOCK, auto_wrap_policy=policy)
    assert report.wrapped == ("0", "3")
    assert isinstance(model[0], CheckpointWrapper)
    assert model[0] is model[1] is model[2][1]
    assert unwrap(model[0]) is block
    assert remove_activation_checkpointing(model) == 2
    assert model[0] is model[1] is model[2][1] is block


# --- Skipping and warning -----------------------------------------------------------------------


def test_containers_are_skipped_with_the_reason():
    model = Model(1)
    report = apply_activation_checkpointing(model)
    reason = "a container without a forward: it is never called, wrap what it holds"
    assert report.skipped == {"layers": reason}
    assert report.wrapped == tuple(
        name for name, _ in Model(1).named_modules() if name not in ("", "layers")
    )
    with pytest.warns(UserWarning, match="all 1 chosen modules are containers without a forward"):
        apply_activation_checkpointing(Model(), check_fn=by_class(nn.ModuleList))


def test_nothing_matched():
    with pytest.warns(UserWarning, match="no module matched") as caught:
        report = apply_activation_checkpointing(Model(), check_fn=by_class(nn.LSTM))
    assert len(caught) == 1
    assert str(caught[0].message) == (
        "nothing was wrapped: no module matched. Classes in the model: "
        "Linear (8), Block (3), ReLU (3), Model (1), ModuleList (1)"
    )
    assert caught[0].filename == __file__
    assert report == ApplyReport()


@pytest.mark.parametrize("policy", [None, wrap.ModuleWrapPolicy({Model})])
def test_only_the_root_matched(policy):
    model = Model()
    with pytest.warns(UserWarning, match=r"only the root matched \(Model\)"):
        report = apply_activation_checkpointing(
            model, check_fn=by_class(Model), auto_wrap_policy=policy
        )
    assert report == ApplyReport()
    assert wrapped_names(model) == in_place_names(model) == ()


@pytest.mark.parametrize(
    "first",
    [
        apply_activation_checkpointing,
        partial(apply_activation_checkpointing, inplace=True),
        theirs.apply_activation_checkpointing,
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_twice_is_once(first, inplace):
    model = Model()
    first(model, check_fn=BLOCK)
    before = list(model.layers)
    faces = in_place_names(model)
    with pytest.warns(UserWarning, match="3 modules are wrapped already") as caught:
        report = apply_activation_checkpointing(model, check_fn=BLOCK, inplace=inplace)
    assert len(caught) == 1
    assert report == ApplyReport((), dict.fromkeys(LAYERS, "wrapped already"))
    assert all(a is b for a, b in zip(model.layers, before, strict=True))
    assert in_place_names(model) == faces


def test_wrapping_more_modules_later():
    model = Model()
    apply_activation_checkpointing(model, check_fn=by_name("layers.1"))
    with pytest.warns(UserWarning, match="1 modules are wrapped already"):
        report = apply_activation_checkpointing(model, check_fn=BLOCK)
    assert report.wrapped == ("layers.0", "layers.2")
    report = apply_activation_checkpointing(model, check_fn=by_name("layers.*.up"))
    assert report.wrapped == ("layers.0.up", "layers.1.up", "layers.2.up")


def test_checkpointing_and_offload_are_applied_one_after_the_other():
    model = Model()
    apply_activation_checkpointing(model, check_fn=BLOCK)
    report = apply_activation_checkpointing(model, offload_wrapper, BLOCK)
    assert report.wrapped == LAYERS
    assert isinstance(model.layers[0], OffloadWrapper)
    assert isinstance(model.layers[0]._checkpoint_wrapped_module, CheckpointWrapper)
    assert remove_activation_checkpointing(model) == 6
    assert type(model.layers[0]) is Block


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_of_transformers_is_left_alone():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    is_layer = lambda m: type(m).__name__ == "LlamaDecoderLayer"  # noqa: E731
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match=r"gradient_checkpointing_disable\(\)") as caught:
        report = apply_activation_checkpointing(model, check_fn=is_layer)
    assert len(caught) == 1
    names = ("model.layers.0", "model.layers.1")
    reason = "transformers' own gradient checkpointing is on"
    assert report == ApplyReport((), dict.fromkeys(names, reason))
    model.gradient_checkpointing_disable()
    expected = model(torch.arange(6)[None]).logits
    assert apply_activation_checkpointing(model, check_fn=is_layer).wrapped == names
    model.train()
    out = model(torch.arange(6)[None], labels=torch.arange(6)[None])
    assert torch.equal(out.logits, expected)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("on", ["layers.1", "layers"])
def test_gradient_checkpointing_flag_reaches_down(on):
    model = Model()
    model.get_submodule(on).gradient_checkpointing = True
    with pytest.warns(UserWarning, match="gradient checkpointing is on"):
        report = apply_activation_checkpointing(model, check_fn=BLOCK)
    assert set(report.skipped) == ({"layers.1"} if on == "layers.1" else set(LAYERS))


# --- Compiled modules -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it
@pytest.mark.parametrize("inplace", [False, True])
def test_a_compiled_module_is_wrapped_around_and_has_its_plain_name(inplace):
    torch._dynamo.reset()
    plain = Model(1)
    model = copy.deepcopy(plain)
    model.layers[0] = torch.compile(model.layers[0], backend="aot_eager", fullgraph=True)
    report = apply_activation_checkpointing(model, check_fn=BLOCK, inplace=inplace)
    assert report.wrapped == ("layers.0",)
    if not inplace:  # in place nothing is put around the compiled module: its name stays
        assert list(model.state_dict()) == list(plain.state_dict())
    for ours, expected in zip(grads(model), grads(plain), strict=True):
        assert torch.equal(ours, expected)


# --- Removing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_remove(inplace):
    model = Model()
    before = dict(model.named_modules())
    apply_activation_checkpointing(model, check_fn=by_class(Block, nn.Linear), inplace=inplace)
    assert remove_activation_checkpointing(model) == 11
    after = dict(model.named_modules())
    assert all(after[name] is module for name, module in before.items())
    assert all("forward" not in vars(module) for module in after.values())
    assert remove_activation_checkpointing(model) == 0


def test_remove_gives_an_instance_level_forward_back():
    model = Model()
    model.layers[0].forward = forward = lambda x: x
    apply_activation_checkpointing(model, check_fn=BLOCK, inplace=True)
    apply_activation_checkpointing(model, offload_wrapper, BLOCK, inplace=True)
    assert remove_activation_checkpointing(model) == 6
    assert vars(model.layers[0])["forward"] is forward


def test_remove_in_place_from_the_root():
    model = checkpoint_wrapper(Model(), inplace=True)
    assert remove_activation_checkpointing(model) == 1
    assert "forward" not in vars(model)


def test_remove_refuses_sharded_wrappers(monkeypatch):
    class Sharded(CheckpointWrapper):
        pass

    model = Model()
    model.layers[1] = Sharded(model.layers[1])
    monkeypatch.setattr(_torch, "fsdp_types", lambda: (Sharded,))
    with pytest.raises(
        WrapperError, match=r"region `layers\.1`: fully_shard was applied"
    ) as caught:
        remove_activation_checkpointing(model)
    assert caught.value.fqn == "layers.1"
    assert isinstance(model.layers[1], Sharded)


# --- Report, bad arguments, speed -----------------------------------------------------------------


def test_report_is_a_table():
    report = ApplyReport(("a", "layers.10"), {"b": "wrapped already"})
    assert str(report) == (
        "2 wrapped, 1 skipped\n"
        "  a          wrapped\n"
        "  layers.10  wrapped\n"
        "  b          skipped: wrapped already"
    )


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"auto_wrap_policy": 3}, ValueError, "must be callable or a policy object .* got int"),
        ({"check_fn": "Block"}, TypeError, "must be callable, got str"),
        ({"check_fn": BLOCK, "speed": 1}, TypeError, "speed"),
        (
            {"check_fn": BLOCK, "checkpoint_wrapper_fn": lambda m: 1},
            TypeError,
            "checkpoint_wrapper_fn must return a module, got int",
        ),
    ],
)
def test_bad_arguments(kwargs, error, text):
    with pytest.raises(error, match=text):
        apply_activation_checkpointing(Model(), **kwargs)


def is_inner_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) == 9


@pytest.mark.parametrize(
    "kwargs",
    [
        {"check_fn": is_inner_sequential},
        {"check_fn": is_inner_sequential, "inplace": True},
        {"check_fn": every_nth(9, by_class(nn.ReLU)) & ~by_name("x.**") & min_params(0)},
        {"auto_wrap_policy": partial(wrap.lambda_auto_wrap_policy, lambda_fn=is_inner_sequential)},
        {"auto_wrap_policy": wrap.CustomPolicy(is_inner_sequential)},
    ],
)
def test_the_work_is_linear_in_the_number_of_modules(kwargs):
    def num_calls(num_blocks):
        blocks = (nn.Sequential(*(nn.ReLU() for _ in range(9))) for _ in range(num_blocks))
        model = nn.Sequential(*blocks)
        count = 0

        def note(frame, event, arg):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            report = apply_activation_checkpointing(model, **kwargs)
        finally:
            sys.setprofile(None)
        assert len(report.wrapped) == num_blocks
        return count

    num_calls(10)  # what is made once
    assert num_calls(400) < 2.2 * num_calls(200)


def test_torchscript_modules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is deprecated
        scripted = torch.jit.script(nn.Linear(2, 2))
    model = nn.Sequential(scripted, nn.Linear(2, 2))
    report = apply_activation_checkpointing(model, check_fn=lambda m: True, inplace=True)
    assert report.wrapped == ("1",)
    assert "TorchScript" in report.skipped["0"]
    assert apply_activation_checkpointing(model, check_fn=lambda m: m is scripted).wrapped == ("0",)
    model(torch.ones(1, 2)).sum().backward()
    assert scripted.weight.grad is not None
    with pytest.raises(TypeError, match=r"TorchScript module .* wrap the module"):
        checkpoint_wrapper(scripted, inplace=True)


@pytest.mark.parametrize(
    "function", [apply_activation_checkpointing, remove_activation_checkpointing]
)
@pytest.mark.parametrize("model", [None, [nn.Linear(1, 1)]])
def test_what_is_not_a_module_is_refused(function, model):
    with pytest.raises(TypeError, match=r"expected an nn.Module to wrap, got (NoneType|list)"):
        function(model)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_key_value_cache_that_a_recompute_would_fill_again(use_cache):
    model = nn.Sequential(nn.Linear(1, 1))
    model.config = SimpleNamespace(use_cache=use_cache)
    model.gradient_checkpointing_enable = lambda: None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apply_activation_checkpointing(model, check_fn=by_class(nn.Linear))
    assert [("use_cache = False" in str(w.message)) for w in caught] == [True] * use_cache
