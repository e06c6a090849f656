"""What an operator has chosen is chosen once: top-k, by which mixtures of experts route.

Where scores are equal, or a kernel computes them anew and a little differently, a second top-k may
choose otherwise. A replay would then differentiate what the forward has not computed, and no shape
would tell. So REPLAY keeps a choice whatever the policy says, unless it says MUST_RECOMPUTE.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wrappers import (
    CheckpointImpl,
    CheckpointPolicy,
    checkpoint_wrapper,
    is_recomputing,
    region_report,
)
from wrappers.policies import recompute_all, save_compute_and_communication, save_matmuls

REPLAY, NO_REENTRANT = CheckpointImpl.REPLAY, CheckpointImpl.NO_REENTRANT

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")


def top_k_that_breaks_ties_anew(
    scores: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    """Takes the first of equal scores; the last where it runs again."""
    is_flipped = is_recomputing()
    values, indices = (scores.flip(dim) if is_flipped else scores).sort(
        dim=dim, descending=largest, stable=True
    )
    indices = scores.shape[dim] - 1 - indices if is_flipped else indices
    return values.narrow(dim, 0, k).contiguous(), indices.narrow(dim, 0, k).contiguous()


@contextlib.contextmanager
def ties_broken_anew() -> Iterator[None]:
    """Put a kernel in the place of top-k's that does not choose the same again."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("topk", top_k_that_breaks_ties_anew, "CPU")
        yield


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


class Routing(nn.Module):
    """Each row goes through one of two layers with equal scores: shapes do not depend on which.

    Args:
        by: The operator that chooses.
        saves: What of the choice autograd saves, besides values that are computed from it: the
            choice itself, or a view of it.
    """

    def __init__(self, by: str = "topk", saves: str = "itself") -> None:
        super().__init__()
        self.by = by
        self.saves = saves
        self.router = nn.Linear(4, 1)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x.sin()).sigmoid().repeat(1, 2)
        choose = torch.argmax if self.by == "argmax" else _first_of_top_k
        chosen = choose(scores.detach(), -1, keepdim=True)
        outs = torch.stack([layer(x) for layer in self.layers], 1).tanh()
        if self.saves == "itself":
            gate, index = scores.gather(1, chosen), chosen[:, :, None].repeat(1, 1, 4)
        else:
            gate, index = scores[:, :1], chosen[:, :, None].expand(-1, 1, 4)
        return (outs.gather(1, index).squeeze(1) * gate).exp()


def _first_of_top_k(scores: Tensor, dim: int, keepdim: bool) -> Tensor:
    return scores.topk(1, dim).indices


def make(by: str = "topk", saves: str = "itself") -> Routing:
    torch.manual_seed(0)
    return Routing(by, saves)


def two_steps(model: nn.Module) -> tuple[list[dict[str, Tensor]], list[Counter[Any]]]:
    """Gradients by step, and the operators of each backward."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    gradients, counts = [], []
    for _ in range(2):
        model.zero_grad()
        loss = model(x.clone().requires_grad_()).sum()
        with Calls() as calls:
            loss.backward()
        counts.append(calls.counts)
        trained = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
        gradients.append({k: gradient.clone() for k, gradient in trained.items()})
    return gradients, counts


def assert_same(got: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_other_kernel_does_choose_otherwise():
    """Without this the tests below would show nothing: a rerun gives other gradients."""
    plain, _ = two_steps(make())
    with ties_broken_anew():
        rerun, _ = two_steps(checkpoint_wrapper(make(), impl=NO_REENTRANT))
    assert not torch.equal(rerun[0]["layers.0.weight"], plain[0]["layers.0.weight"])


@pytest.mark.parametrize("verify", ["first", "always", "never"])
@pytest.mark.parametrize(
    "preset", [None, recompute_all, save_matmuls, save_compute_and_communication]
)
def test_a_replay_does_not_choose_again(preset, verify):
    policy = None if preset is None else preset()
    with ties_broken_anew():
        plain, _ = two_steps(make())
        model = checkpoint_wrapper(make(), impl=REPLAY, policy=policy, verify=verify)
        got, counts = two_steps(model)
    assert_same(got, plain)
    assert [num[torch.ops.aten.topk] for num in counts] == [0, 0]
    assert model._checkpoint_region.experience.fallen_at is None


@pytest.mark.parametrize("saves", ["itself", "a view"])
def test_a_rerun_that_chooses_otherwise_says_nothing_about_the_replay(saves):
    """Its tensors are those of another route: they must not take the replay's place."""
    with ties_broken_anew():
        plain, _ = two_steps(make(saves=saves))
        model = checkpoint_wrapper(make(saves=saves), impl=REPLAY)
        got, _ = two_steps(model)
    assert_same(got, plain)
    experience = model._checkpoint_region.experience
    assert experience.note == "a rerun chooses otherwise than the forward did"
    assert experience.is_verified


def test_where_choices_agree_the_check_still_finds_a_wrong_replay():
    """The keeper of a choice gets no pass for all else that differs."""

    class Uncertain(Routing):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 1 if is_recomputing() else x)

    torch.manual_seed(0)
    model = checkpoint_wrapper(Uncertain(), impl=REPLAY)
    with pytest.warns(UserWarning, match="its first replay gave another result"):
        two_steps(model)


class Unfreezing(nn.Module):
    """Nothing that is saved depends on the choice while the weight is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 5.0), requires_grad=False)
        self.bias = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        chosen = x.sign().abs().topk(2, -1).indices
        picked = (x * self.weight).gather(1, chosen.flip(-1))
        return picked.exp().sum() + self.bias.exp().sum()


def test_a_choice_that_nothing_has_needed_is_kept_as_soon_as_something_does():
    found = []
    with ties_broken_anew():
        for model in (Unfreezing(), checkpoint_wrapper(Unfreezing(), impl=REPLAY, verify="never")):
            two_steps(model)
            model.weight.requires_grad_()
            gradients, counts = two_steps(model)
            found.append(gradients)
    assert_same(found[1], found[0])
    assert [num[torch.ops.aten.topk] for num in counts] == [0, 0]


@pytest.mark.parametrize("by", ["topk", "argmax"])
def test_a_choice_counts_as_kept(by):
    model = nn.Sequential(checkpoint_wrapper(make(by), impl=REPLAY))
    _, counts = two_steps(model)
    assert [num[getattr(torch.ops.aten, by)] for num in counts] == [0, 0]
    (line,) = [line for line in str(region_report(model)).splitlines() if "REPLAY" in line]
    assert line.split()[3] == "1"


def choose_again(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_choice = op is torch.ops.aten.topk.default
    return CheckpointPolicy.MUST_RECOMPUTE if is_choice else CheckpointPolicy.PREFER_RECOMPUTE


def test_a_policy_that_insists_is_obeyed():
    plain, _ = two_steps(make())
    model = checkpoint_wrapper(make(), impl=REPLAY, policy=choose_again, verify="never")
    with pytest.warns(UserWarning, match="keeps the output of no operator"):
        got, counts = two_steps(model)
    assert_same(got, plain)
    assert [num[torch.ops.aten.topk] for num in counts] == [1, 1]


def test_a_rerun_with_the_preset_does_not_choose_again():
    """Also where the policy is looked up by an operator's name and number."""
    with ties_broken_anew():
        plain, _ = two_steps(make())
        policy = save_compute_and_communication()
        got, counts = two_steps(checkpoint_wrapper(make(), impl=NO_REENTRANT, policy=policy))
    assert_same(got, plain)
    assert [num[torch.ops.aten.topk] for num in counts] == [0, 0]
