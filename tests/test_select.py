"""Which modules each predicate chooses, alone, combined, and in a model that is wrapped already."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wrappers.apply import apply_activation_checkpointing
from wrappers.errors import WrapperError
from wrappers.modules.checkpoint import CheckpointWrapper
from wrappers.select import (
    all_but_last,
    as_predicate,
    by_class,
    by_name,
    every_nth,
    min_params,
    plain_modules,
    repeated_blocks,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(2, 2)
        self.mlp = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x):
        return self.mlp(self.attn(x))


def make_model() -> nn.Module:
    model = nn.Module()
    model.embed = nn.Linear(2, 2)
    model.layers = nn.ModuleList(Block() for _ in range(5))
    model.head = nn.Linear(2, 8)
    return model


def names(predicate, model: nn.Module | None = None) -> list[str]:
    model = make_model() if model is None else model
    bound = as_predicate(predicate).bind(model)
    return [fqn for fqn, module in plain_modules(model) if bound(module)]


def layers(*numbers: int) -> list[str]:
    return [f"layers.{number}" for number in numbers]


BLOCK = by_class(Block)
PATTERNS = [
    ("layers.*", layers(0, 1, 2, 3, 4)),
    ("layers.?", layers(0, 1, 2, 3, 4)),
    ("layers.[02]", layers(0, 2)),
    ("layers.[!02]", layers(1, 3, 4)),
    ("layers.[1-3]", layers(1, 2, 3)),
    ("layers.1.*", ["layers.1.attn", "layers.1.mlp"]),
    ("layers.1.**", ["layers.1.attn", "layers.1.mlp"] + [f"layers.1.mlp.{i}" for i in range(3)]),
    ("*.0", ["layers.0"]),
    ("**.mlp", [f"layers.{i}.mlp" for i in range(5)]),
    ("**.head", ["head"]),
    ("*", ["embed", "layers", "head"]),  # not the root
    ("head", ["head"]),
    ("hea", []),
    ("layersX0", []),
]


@pytest.mark.parametrize(("pattern", "expected"), PATTERNS)
def test_by_name(pattern, expected):
    assert names(by_name(pattern)) == expected


def test_a_dot_is_not_any_character():
    assert names(by_name("layers.0")) == ["layers.0"]
    assert names(by_name("layers[.]0")) == ["layers.0"]
    assert names(by_name("layers?0")) == []
    assert names(by_name("layers[!a]0")) == []


def test_by_class():
    assert names(BLOCK) == layers(0, 1, 2, 3, 4)
    assert names(by_class(nn.ReLU, nn.ModuleList)) == [
        "layers",
        *(f"layers.{i}.mlp.1" for i in range(5)),
    ]


@pytest.mark.parametrize(
    ("n", "offset", "expected"),
    [(1, 0, (0, 1, 2, 3, 4)), (2, 0, (0, 2, 4)), (2, 1, (1, 3)), (3, 1, (1, 4)), (9, 5, ())],
)
def test_every_nth(n, offset, expected):
    assert names(every_nth(n, BLOCK, offset)) == layers(*expected)
    assert names(every_nth(n, lambda m: isinstance(m, Block), offset)) == layers(*expected)


@pytest.mark.parametrize(
    ("k", "expected"), [(0, (0, 1, 2, 3, 4)), (1, (0, 1, 2, 3)), (5, ()), (6, ())]
)
def test_all_but_last(k, expected):
    assert names(all_but_last(k, BLOCK)) == layers(*expected)


def test_min_params():
    # A block: (4 + 2) + (8 + 4) + (8 + 2); the head: 16 + 8.
    assert names(min_params(29) & ~by_name("layers")) == [""]
    assert names(min_params(28) & ~by_class(nn.ModuleList)) == ["", *layers(0, 1, 2, 3, 4)]
    assert "head" in names(min_params(24))
    assert "head" not in names(min_params(25))
    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    tied[1].weight = tied[0].weight
    assert names(min_params(5), tied) == []
    assert names(min_params(4), tied) == ["", "0", "1"]


def test_combinations():
    odd = by_name("layers.[13]")
    assert names(BLOCK & ~odd) == layers(0, 2, 4)
    assert names(odd | by_name("head")) == [*layers(1, 3), "head"]
    assert names(odd & (lambda m: isinstance(m, nn.Linear))) == []
    assert names((lambda m: isinstance(m, Block)) & odd) == layers(1, 3)
    assert names((lambda m: isinstance(m, nn.ReLU)) & BLOCK | odd) == layers(1, 3)
    assert names((lambda m: m is None) | odd) == layers(1, 3)
    assert names(every_nth(2, all_but_last(1, BLOCK), offset=1)) == layers(1, 3)


def test_a_wrapped_model_gives_the_same_answers():
    model = make_model()
    for i in range(5):
        model.layers[i] = CheckpointWrapper(model.layers[i])
    torch._dynamo.reset()
    model.layers[2] = torch.compile(model.layers[2], backend="eager")
    for predicate in (BLOCK, by_name("layers.*"), every_nth(2, BLOCK), by_name("**.mlp.0")):
        assert names(predicate, model) == names(predicate)


def test_a_shared_module_is_found_by_each_of_its_names():
    model = nn.ModuleDict({"a": nn.Linear(1, 1)})
    model["b"] = model["a"]
    assert names(by_name("b"), model) == ["a"]
    assert names(every_nth(2, by_class(nn.Linear)), model) == ["a"]


@pytest.mark.parametrize(
    ("predicate", "text"),
    [
        (by_name("layers.*"), r"by_name\('layers\.\*'\)"),
        (every_nth(2, BLOCK, 1), r"every_nth\(2, by_class\(Block\), offset=1\)"),
        (all_but_last(1, BLOCK), r"all_but_last\(1, by_class\(Block\)\)"),
        (by_class(nn.Linear) & by_name("x"), r"by_name\('x'\)"),
    ],
)
def test_an_unbound_predicate_says_what_to_do(predicate, text):
    with pytest.raises(WrapperError, match=text + r" depends on the whole model .* Linear alone"):
        predicate(nn.Linear(1, 1))


def test_repr():
    predicate = BLOCK & ~by_name("a") | min_params(3)
    assert repr(predicate) == "((by_class(Block) & ~by_name('a')) | min_params(3))"
    assert repr(by_name("a").bind(make_model())) == "by_name('a')"


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: by_class(), TypeError, "one or more classes"),
        (lambda: by_class(nn.Linear(1, 1)), TypeError, "one or more classes"),
        (lambda: every_nth(0, BLOCK), ValueError, "n=0"),
        (lambda: every_nth(1, BLOCK, -1), ValueError, "offset=-1"),
        (lambda: all_but_last(-1, BLOCK), ValueError, "k=-1"),
        (lambda: as_predicate("Block"), TypeError, "must be callable, got str"),
        (lambda: BLOCK & 3, TypeError, "must be callable, got int"),
    ],
)
def test_bad_arguments(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    "predicate", [every_nth(2, lambda m: True), all_but_last(2, lambda m: True)]
)
def test_the_root_is_not_counted(predicate):
    """It is never wrapped."""
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    report = apply_activation_checkpointing(model, check_fn=predicate)
    assert report.wrapped == (("0", "2") if "every" in repr(predicate) else ("0", "1"))


@pytest.mark.parametrize("combine", [every_nth, all_but_last])
def test_the_number_comes_first(combine):
    with pytest.raises(TypeError, match=f"{combine.__name__} takes the .* first, got _Plain"):
        combine(by_class(nn.Linear), 2)


# --- What a model repeats


class Layered(Block):
    """A block with a list of experts, more than there are blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(8))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x)


class Activation(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Bag(nn.ModuleList):
    """A list of modules that nobody calls."""


def holding(**children: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def many(make, n: int) -> nn.ModuleList:
    return nn.ModuleList(make() for _ in range(n))


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU())


REPEATS = {
    "blocks, not the layers in their Sequentials": (make_model, layers(0, 1, 2, 3, 4)),
    "blocks, not their experts": (lambda: holding(layers=many(Layered, 2)), layers(0, 1)),
    "blocks, though experts stand outside of them, too": (
        lambda: holding(layers=many(Layered, 2), tail=many(Expert, 2)),
        layers(0, 1),
    ),
    "the class with the most parameters, not with the most modules": (
        lambda: holding(small=many(Block, 4), layers=many(Layered, 2)),
        layers(0, 1),
    ),
    "one class in two lists": (
        lambda: holding(encoder=many(Block, 1), decoder=many(Block, 2)),
        ["encoder.0", "decoder.0", "decoder.1"],
    ),
    "blocks below plain Sequentials, as in a ResNet": (
        lambda: nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block())),
        ["0.0", "0.1", "1.0"],
    ),
    "Sequentials, where there is nothing else": (
        lambda: nn.Sequential(pair(), pair(), nn.Linear(2, 2)),
        ["0", "1"],
    ),
    "no lists that have no forward": (
        lambda: holding(bags=many(lambda: Bag([Block(), Block()]), 2)),
        [f"bags.{i}.{j}" for i in range(2) for j in range(2)],
    ),
    "layers of torch that hold others": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(2, 1, 4), 3, enable_nested_tensor=False
        ),
        layers(0, 1, 2),
    ),
}


@pytest.mark.parametrize("case", REPEATS)
def test_repeated_blocks(case):
    make, expected = REPEATS[case]
    assert names(repeated_blocks(), make()) == expected


def test_a_module_that_stands_in_many_places_repeats():
    shared = Block()
    model = holding(layers=nn.ModuleList([shared] * 3))
    assert names(repeated_blocks(), model) == ["layers.0"]


def test_blocks_on_the_meta_device_and_wrapped_ones_repeat():
    with torch.device("meta"):
        assert names(repeated_blocks(), make_model()) == layers(0, 1, 2, 3, 4)
    model = make_model()
    apply_activation_checkpointing(model, check_fn=repeated_blocks())
    assert [isinstance(m, CheckpointWrapper) for m in model.layers] == [True] * 5
    assert names(repeated_blocks(), model) == layers(0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(2, 2),
        lambda: holding(layers=many(Block, 1)),
        lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU()),
        lambda: holding(one=Block(), two=Block()),
        lambda: nn.Sequential(Activation(), Activation()),
    ],
    ids=["layer", "one block", "single layers", "not in a list", "without parameters"],
)
def test_where_nothing_repeats_it_says_so(make):
    with pytest.raises(ValueError, match=r"nothing repeats in this .* wrappers\.select\.by_class"):
        repeated_blocks().bind(make())
