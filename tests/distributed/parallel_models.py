"""Small models for model parallelism, and what two steps of one of them show in one rank.

Each model computes the same in one process and in several. Everything is in float64: a parallel
sum adds up in another order than a single process does, and there the difference is far below what
any mistake would make. Random numbers stand for the whole tensor and each rank takes its part, so
dropout is alike too.

A model's forward puts a mark between its blocks, through which backward comes as well, so that
each collective is known to belong to one block (:class:`Collectives`). Blocks let their
intermediate results be watched (:func:`watch`): a region's must be gone after its forward.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.nn import functional as dist_nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.matrix import RERUNS, WORKS
from tests.distributed.models import assert_equal
from wrappers.offload.store import finish_offloading

DIM, NUM_HEADS, HIDDEN = 16, 4, 32
BATCH, NUM_TOKENS = 2, 6
NUM_BLOCKS = 3

# --- What a step shows --------------------------------------------------------------------------


class _Probe:
    """What the models of this file note while they run.

    Attributes:
        layer: The block that runs forward or backward; -1 around the blocks.
        watched: The memory of intermediate results, whoever holds it.
        peak: The largest number of them that a test has found alive.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.layer = -1
        self.watched: list[StorageWeakRef] = []
        self.peak = 0

    def num_alive(self) -> int:
        return sum(not ref.expired() for ref in self.watched)


probe = _Probe()

#: How many results of each Block, and of each other block of this file, are watched.
NUM_WATCHED = 3


def watch(tensor: Tensor) -> Tensor:
    """Watch the memory of a result that autograd saves."""
    probe.watched.append(StorageWeakRef(tensor.untyped_storage()))
    return tensor


class _Mark(torch.autograd.Function):
    """Between two blocks: forward goes on to the next one, backward to the one before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, before: int, after: int) -> Tensor:
        ctx.before = before
        probe.layer = after
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        probe.layer = ctx.before
        return gradient, None, None


def run_marked(blocks: Any, x: Any) -> Any:
    """Run blocks one after the other, with marks between them."""
    layers = [*range(len(blocks)), -1]
    x = _Mark.apply(x, -1, layers[0])
    for index, block in enumerate(blocks):
        x = _Mark.apply(block(x), index, layers[index + 1])
    return x


_WAITS = ("wait_tensor", "_wrap_tensor_autograd")


class Collectives(TorchDispatchMode):
    """Counts by block what ranks say to each other: ``{(block, operator): number}``."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[int, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # What it does, it does with operators on its local tensors.
        namespace = getattr(func, "namespace", "")
        if namespace.startswith(("_c10d_functional", "c10d")):
            name = func.overloadpacket.__name__
            if name not in _WAITS:
                self.counts[probe.layer, name] += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Seen:
    """What two equal steps of a model have shown in one rank; counts are those of the second.

    Attributes:
        losses: By step.
        gradients: By step and name, as far as this rank has them.
        whole: By name, those of the last step put together; only if asked for.
        forward: Collectives in forward.
        backward: Collectives in backward.
        num_watched: How many results were watched in forward.
        num_alive: How many of them were alive after it.
        names: Of parameters, buffers, modules and in the state dict.
        fallen: Why regions have fallen back.
        num_replayed: Operators that regions have replayed.
        warnings: All that were raised.
    """

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    whole: dict[str, Tensor] = field(default_factory=dict)
    forward: Counter[tuple[int, str]] = field(default_factory=Counter)
    backward: Counter[tuple[int, str]] = field(default_factory=Counter)
    num_watched: int = 0
    num_alive: int = 0
    names: list[str] = field(default_factory=list)
    fallen: list[str] = field(default_factory=list)
    num_replayed: int = 0
    warnings: list[str] = field(default_factory=list)


def two_steps(
    model: nn.Module,
    loss_of: Callable[[nn.Module], Tensor],
    whole: Callable[[nn.Module], dict[str, Tensor]] | None = None,
) -> Seen:
    """Run two equal steps.

    Args:
        model: The model.
        loss_of: Runs forward; what it returns is differentiated.
        whole: Puts the gradients of all ranks together.
    """
    seen = Seen(names=names_of(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model.zero_grad()
            probe.clear()
            torch.manual_seed(7)
            with Collectives() as forward:
                loss = loss_of(model)
            finish_offloading()  # What is on its way to the disk will not stay.
            seen.num_watched, seen.num_alive = len(probe.watched), probe.num_alive()
            with Collectives() as backward:
                loss.backward()
            seen.losses.append(loss.detach().clone())
            seen.gradients.append(local_gradients(model))
            seen.forward, seen.backward = forward.counts, backward.counts
        if whole is not None:
            seen.whole = whole(model)
    seen.warnings = [str(warning.message) for warning in caught]
    note_regions(seen, model)
    return seen


def note_regions(seen: Seen, model: nn.Module) -> None:
    """Note what the regions of a model have gone through."""
    blocks = [block for module in model.modules() for block in getattr(module, "blocks", ())]
    for block in dict.fromkeys([*model.modules(), *blocks]):
        for face in (block, block.forward):
            region = getattr(face, "_checkpoint_region", None)
            if region is None:
                continue
            if region.experience.fallen_at is not None:
                seen.fallen.append(region.experience.reason)
            if region.experience.stats is not None:
                seen.num_replayed += region.experience.stats.num_replayed


def names_of(model: nn.Module) -> list[str]:
    """All names that a user sees in a model."""
    return [
        *(f"parameter {name}" for name, _ in model.named_parameters()),
        *(f"buffer {name}" for name, _ in model.named_buffers()),
        *(f"module {name}" for name, _ in model.named_modules()),
        *(f"entry {name}" for name in model.state_dict()),
    ]


def local_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name; of DTensors this rank's part."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            found[name] = local.detach().clone()
    return found


def whole_dtensors(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name; what is sharded is put together, what is partial is summed."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        found[name] = gradient.detach().clone()
    return found


def sum_of_ranks(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name where each rank has a part of every sum, or nothing."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if dist.is_initialized():
            dist.all_reduce(gradient)
        found[name] = gradient
    return found


# --- What it must show --------------------------------------------------------------------------


def assert_cell(
    results: list[Seen],
    plain: list[Seen],
    technique: str,
    outcome: str,
    *,
    own: tuple[str, ...],
    last: str | None,
    num_kept: int = 1,
) -> None:
    """Compare a wrapped parallel model with the same one without wrapping, rank by rank.

    Losses and gradients are equal to the last bit: the same operators ran on the same numbers.

    Args:
        results: What the wrapped model has shown.
        plain: What the other one has shown.
        technique: The column of the matrix.
        outcome: What the matrix says about the cell.
        own: The collectives of the blocks themselves, which a recompute may have to repeat.
        last: The one at the end of each block, if no saved tensor depends on it.
        num_kept: How many of a block's watched results ``save_matmuls`` keeps.
    """
    is_rerun = technique == "NO_REENTRANT" or outcome == RERUNS
    is_replayed = technique.startswith("REPLAY") and outcome == WORKS
    for got, expected in zip(results, plain, strict=True):
        for step in range(2):
            assert torch.equal(got.losses[step], expected.losses[step])
            assert_equal(got.gradients[step], expected.gradients[step])
        repeated = _of_blocks(expected.forward, own) if technique == "REENTRANT" or is_rerun else {}
        if is_rerun and last is not None:  # It ends once the last saved tensor is back.
            for layer in range(NUM_BLOCKS):
                repeated[layer, last] -= 1
        assert got.forward == expected.forward
        assert got.backward == expected.backward + Counter(repeated)
        assert expected.num_watched > 0
        assert expected.num_alive == expected.num_watched == got.num_watched
        assert got.num_alive == (num_kept * NUM_BLOCKS if technique == "REPLAY, policy" else 0)
        assert got.names == expected.names
        assert (got.num_replayed > 0) == is_replayed
        assert len(got.fallen) == (NUM_BLOCKS if outcome == RERUNS else 0)
        told = [text for text in got.warnings if text.startswith("region `blocks.")]
        assert len(told) == len(got.fallen)
        assert len(got.warnings) == len(expected.warnings) + len(told), got.warnings


def _of_blocks(counts: Counter[tuple[int, str]], own: tuple[str, ...]) -> Counter[tuple[int, str]]:
    found = Counter({key: num for key, num in counts.items() if key[0] >= 0 and key[1] in own})
    assert found, "the blocks talk"
    return found


def assert_close(got: Seen, loss: Tensor, gradients: dict[str, Tensor]) -> None:
    """Compare with a single process, which adds up in another order: to the rounding of float64."""
    torch.testing.assert_close(got.losses[-1], loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.whole, gradients, rtol=1e-10, atol=1e-12)


# --- A transformer whose layers are parallelized from outside -----------------------------------


class Dropout(nn.Module):
    """Dropout that draws for the whole tensor, of which this rank may have one part.

    Attributes:
        part: Dimension, rank and number of ranks that the tensor is split over.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.part: tuple[int, int, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        dim, rank, num = self.part or (0, 0, 1)
        shape = list(x.shape)
        shape[dim] *= num
        mask = (torch.rand(shape, dtype=x.dtype) > self.p).chunk(num, dim)[rank]
        return x * mask / (1 - self.p)


class Attention(nn.Module):
    """Self-attention with as many heads as the projections give."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(DIM, DIM)
        self.wk = nn.Linear(DIM, DIM)
        self.wv = nn.Linear(DIM, DIM)
        self.wo = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, DIM // NUM_HEADS)).transpose(1, 2)
            for project in (self.wq, self.wk, self.wv)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.wo(watch(y.transpose(1, 2).flatten(2)))
        return out


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, HIDDEN)
        self.drop = Dropout(0.25)
        self.down = nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(watch(watch(self.up(x)).sin()))
        out: Tensor = self.down(self.drop(hidden))
        return out


class Block(nn.Module):
    """Pre-norm attention and MLP; the last operator that saves something is the last product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(DIM)
        self.attention = Attention()
        self.drop = Dropout(0.25)
        self.norm_mlp = nn.LayerNorm(DIM)
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm_attention(x)))
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(run_marked(self.blocks, self.embed(x)))
        return out.tanh()  # FSDP warns of a root that returns a view.


def make(kind: Callable[[], nn.Module]) -> nn.Module:
    """A model whose weights are the same wherever it is made."""
    torch.manual_seed(0)
    return kind().double()


def tokens(seed: int, num: int = NUM_TOKENS) -> Tensor:
    """A batch ``(batch, tokens, width)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, num, DIM, generator=generator, dtype=torch.float64)


# --- Blocks that talk themselves ----------------------------------------------------------------


class Alone:
    """One process has all tokens: there is nobody to talk to."""

    rank, num = 0, 1

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The tokens of all ranks, in dimension 0."""
        return x

    def scatter(self, x: Tensor) -> Tensor:
        """Sum over ranks, of which this one gets its tokens, in dimension 0."""
        return x


class _FunctionalSum(torch.autograd.Function):
    """``funcol.all_reduce`` has no gradient in some versions of torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return funcol.wait_tensor(funcol.all_reduce(x, "sum", dist.group.WORLD))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return funcol.wait_tensor(funcol.all_reduce(gradient, "sum", dist.group.WORLD))


class _Ranks:
    def __init__(self) -> None:
        self.rank, self.num = dist.get_rank(), dist.get_world_size()


class Functional(_Ranks):
    """``torch.distributed._functional_collectives``: results are new tensors, to be waited for."""

    def sum(self, x: Tensor) -> Tensor:
        return _FunctionalSum.apply(x)

    def gather(self, x: Tensor) -> Tensor:
        return quiet(funcol.all_gather_tensor_autograd, x, 0, dist.group.WORLD)

    def scatter(self, x: Tensor) -> Tensor:
        return quiet(funcol.reduce_scatter_tensor_autograd, x, "sum", 0, dist.group.WORLD)


class Classic(_Ranks):
    """``torch.distributed.nn``: collectives that write into tensors, in autograd functions."""

    def sum(self, x: Tensor) -> Tensor:
        return quiet(dist_nn.all_reduce, x)

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(quiet(dist_nn.all_gather, x))

    def scatter(self, x: Tensor) -> Tensor:
        parts = [part.contiguous() for part in x.chunk(self.num)]
        return quiet(dist_nn.reduce_scatter, torch.empty_like(parts[0]), parts)


def quiet(function: Callable[..., Any], *args: Any) -> Any:
    """Call what newer versions of torch have under another name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning)
        return function(*args)


class TalkingBlock(nn.Module):
    """Each rank has a part of the tokens, and takes a part of the MLP's width.

    A sum over ranks in a norm, keys and values gathered, and around the MLP a gather of the tokens
    and a scatter of its partial sums. Tokens are in dimension 0.
    """

    def __init__(self, talk: Any) -> None:
        super().__init__()
        self.talk = talk
        self.q = nn.Linear(DIM, DIM)
        self.kv = nn.Linear(DIM, 2 * DIM)
        self.up = nn.Linear(DIM, HIDDEN)
        self.down = nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        talk = self.talk
        mean = talk.sum(x.square().sum()) / (x.numel() * talk.num)
        y = x * (mean + 1e-6).rsqrt()
        keys, values = talk.gather(self.kv(y)).chunk(2, -1)
        weights = watch((self.q(y) @ keys.mT).softmax(-1))
        x = x + weights @ values
        up = self.up.weight.chunk(talk.num)[talk.rank]
        down = self.down.weight.chunk(talk.num, 1)[talk.rank]
        hidden = F.gelu(watch(watch(F.linear(talk.gather(x), up)).sin()))
        out: Tensor = x + talk.scatter(F.linear(hidden, down))
        return out


class Talking(nn.Module):
    def __init__(self, talk: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TalkingBlock(talk) for _ in range(NUM_BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = run_marked(self.blocks, x)
        return out


NUM_EXPERTS, TOP_K = 4, 3


class MoEBlock(nn.Module):
    """Each token goes to the experts of its best scores, wherever they are.

    Every score stands twice, so each choice of an odd number of experts is one between equals.
    Each rank has all experts but calls its own only; so names are those of the plain model.
    """

    def __init__(self, talk: Any) -> None:
        super().__init__()
        self.talk = talk
        self.norm = nn.LayerNorm(DIM)
        self.router = nn.Linear(DIM, NUM_EXPERTS // 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(NUM_EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        scores = watch(self.router(y).sigmoid()).repeat(1, 2)
        gates, chosen = scores.topk(TOP_K, dim=-1)
        order = chosen.flatten().argsort(stable=True)
        token = order // TOP_K
        counts = torch.bincount(chosen.flatten(), minlength=NUM_EXPERTS)
        sent = y[token]
        received = self._exchange(sent, counts)
        out = sent.new_zeros(x.shape).index_add(0, token, received * gates.flatten()[order, None])
        return x + out

    def _exchange(self, sent: Tensor, counts: Tensor) -> Tensor:
        """Send tokens, sorted by expert, to their experts and back."""
        talk = self.talk
        if talk.num == 1:
            return self._run_experts(sent, counts[None])
        to = counts.view(talk.num, -1).sum(1).tolist()
        theirs = funcol.wait_tensor(
            funcol.all_to_all_single(counts, None, None, dist.group.WORLD)
        ).view(talk.num, -1)
        back = theirs.sum(1).tolist()
        arrived = funcol.all_to_all_single_autograd(sent, back, to, dist.group.WORLD)
        results = self._run_experts(arrived, theirs)
        return funcol.all_to_all_single_autograd(results, to, back, dist.group.WORLD)

    def _run_experts(self, arrived: Tensor, counts: Tensor) -> Tensor:
        """Run this rank's experts on tokens sorted by source and expert.

        Args:
            arrived: The tokens.
            counts: How many tokens there are from each source (row) for each expert (column).
        """
        num = NUM_EXPERTS // self.talk.num
        first = self.talk.rank * num
        parts = arrived.split(counts.flatten().tolist())
        results = list(parts)
        for column in range(num):
            mine = [row * num + column for row in range(len(counts))]
            inputs = torch.cat([parts[i] for i in mine])
            hidden = watch(self.experts[first + column](inputs).tanh())
            for i, part in zip(mine, hidden.split([len(parts[i]) for i in mine]), strict=True):
                results[i] = part
        return torch.cat(results)


class MoE(nn.Module):
    def __init__(self, talk: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MoEBlock(talk) for _ in range(NUM_BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = run_marked(self.blocks, x)
        return out


# --- Stages of a pipeline -----------------------------------------------------------------------


class Stage(nn.Module):
    """Some blocks; random numbers depend on the stage and on the micro-batch."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, seed: Tensor) -> Tensor:
        torch.manual_seed(100 * self.index + int(seed))
        for block in self.blocks:
            x = block(x)
        return x


def make_stage(index: int) -> nn.Module:
    """A stage whose weights are the same wherever it is made."""
    torch.manual_seed(index)
    return Stage(index).double()
