"""What a profile of a sharded model predicts against what two ranks see."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import wrappers
from scripts.measure import memory_timeline
from scripts.model import GPT, Block, GPTConfig
from wrappers import make_plan, profile
from wrappers.plan.chain import chain_of, plain_choice
from wrappers.plan.ranks import plan_together
from wrappers.select import by_class

CONFIG = GPTConfig(num_layers=3, d_model=64, num_heads=2, seq_len=64, dropout=0.0)
CPU = torch.device("cpu")


def _sharded(dtype=None):
    torch.manual_seed(0)
    model = GPT(CONFIG)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def _tokens():
    return torch.arange(8 * 64).reshape(8, 64) % 256


def _loss(logits):
    return logits.float().square().mean()


def _step(model, tokens):
    out = model(tokens)
    loss = _loss(out)
    loss.backward()
    del out, loss


def _peak(model, tokens):
    def step():
        _step(model, tokens)
        model.zero_grad(set_to_none=True)

    step()
    # gloo's threads let go of a buffer of a collective sooner or later.
    return min(memory_timeline(step, CPU).peak_bytes for _ in range(4))


def _gradients(model, tokens):
    _step(model, tokens)
    found = [p.grad.to_local().clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def _profile(model, tokens):
    return profile(model, tokens, check_fn=by_class(Block), loss_fn=_loss, hardware="CPU")


def _compare():
    """By budget: predicted and real peak, the plan's hash, whether gradients are equal."""
    torch.set_num_threads(1)
    model, tokens = _sharded(), _tokens()
    parameters = [id(p) for p in model.parameters()]
    num_groups = len(dist.distributed_c10d._world.pg_names)
    found = _profile(model, tokens)
    assert [id(p) for p in model.parameters()] == parameters
    assert len(dist.distributed_c10d._world.pg_names) == num_groups
    chain = chain_of(found)
    start = found.persistent.parameter_bytes + found.persistent.sample_bytes
    smallest, plain = chain.smallest()[0], chain.peak_bytes(plain_choice(found))
    results = [(plain - start, _peak(model, tokens), "", True)]
    gradients = _gradients(model, tokens)
    for budget in (smallest, (smallest + plain) // 2):
        plan = plan_together(
            lambda: found, lambda profiled, budget=budget: make_plan(profiled, budget)
        )
        plan.apply(model)
        real = _peak(model, tokens)
        same = all(map(torch.equal, gradients, _gradients(model, tokens)))
        wrappers.remove_activation_checkpointing(model)
        results.append((plan.peak.num_bytes - start, real, plan.hash, same))
    return results


def test_peaks_are_predicted_and_plans_agreed_on(ranks):
    results = ranks(_compare)
    for rank in results:
        for predicted, real, _, same in rank:
            assert abs(predicted / real - 1) < 0.01
            assert same
    first, second = ([digest for _, _, digest, _ in rank] for rank in results)
    assert first == second
    assert len(set(first)) == 3


def _persistent():
    model = _sharded(torch.bfloat16)
    found = _profile(model, _tokens())
    local = sum(p.to_local().numel() * 4 for p in model.parameters())
    return found.persistent, local, found.world_size


def test_persistent_bytes_are_those_of_the_rank(ranks):
    block = sum(p.numel() for p in Block(CONFIG).parameters())
    for persistent, local, world_size in ranks(_persistent):
        assert persistent.parameter_bytes == local
        assert persistent.gradient_bytes == local
        assert world_size == 2
        assert persistent.unsharded_bytes >= 2 * block  # bfloat16
