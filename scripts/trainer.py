"""One rank's share of the main job: a model, an optimizer, a stream of batches; saved and resumed.

What decides the next step is more than weights: the optimizer's moments, the random states from
which dropout draws, the generator from which batches are drawn, the number of steps done. A state
checkpoint holds all of it, for each rank its own random states, so that a run that was killed and
resumed goes on to the last digit as if nothing had happened.

It holds the plain model's names. How activations are kept is no part of it: a run may be resumed
with another `--impl`, and still ends with the same loss.
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from scripts.model import GPT, VOCAB_SIZE, Block
from wrappers import (
    CheckpointImpl,
    apply_activation_checkpointing,
    create_selective_checkpoint_contexts,
    offload_wrapper,
    state,
)
from wrappers.plan.sharding import sharding_for

#: How the activations of a block wait for backward: as they are, as little as a recompute needs, in
#: a file, or as much as a memory budget has room for.
IMPLS = ("none", "reentrant", "no_reentrant", "offload_disk", "planned")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: Operators whose outputs each policy keeps; all others are recomputed.
POLICIES = {
    "recompute_all": None,
    "save_matmuls": [torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
}

#: Options on which the loss depends, besides the text: a run is resumed with the same.
SETTINGS = ("layers", "d_model", "heads", "seq", "batch", "dropout", "dtype", "lr", "seed")


def wrapping(args: argparse.Namespace) -> dict[str, Any]:
    """What `apply_activation_checkpointing` wraps the blocks with."""
    if args.impl == "offload_disk":
        return {
            "checkpoint_wrapper_fn": offload_wrapper,
            "tier": "disk",
            "directory": args.directory or tempfile.gettempdir(),
            "max_inflight_bytes": int(args.max_inflight_mib * 2**20),
        }
    options: dict[str, Any] = {"impl": CheckpointImpl[args.impl.upper()]}
    saved_operators = POLICIES[args.policy]
    if saved_operators is not None:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, saved_operators)
    return options


def planning(
    args: argparse.Namespace, model: nn.Module, device: torch.device, mixed: MixedPrecisionPolicy
) -> dict[str, Any]:
    """What `apply_activation_checkpointing` plans with: a step as `Trainer.step` will make it."""
    tokens = torch.zeros(args.batch, args.seq, dtype=torch.long, device=device)
    blocks = [name for name, module in model.named_modules() if isinstance(module, Block)]
    return {
        "memory_budget": args.budget,
        "count": "activations",
        "sample": tokens,
        "loss_fn": partial(loss_of, targets=tokens),
        "optimizer": partial(make_optimizer, lr=args.lr),
        "sharding": sharding_for(blocks, dist.get_world_size(), mixed),
    }


def build_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Build the model, wrap its blocks, then shard blocks and root over all ranks."""
    torch.manual_seed(args.seed)
    model = GPT(args.model).to(device)
    mixed = MixedPrecisionPolicy(param_dtype=DTYPES[args.dtype], reduce_dtype=torch.float32)
    if args.impl != "none":
        is_planned = args.impl == "planned"
        report = apply_activation_checkpointing(
            model,
            check_fn=lambda module: isinstance(module, Block),
            inplace=args.inplace,
            **(planning(args, model, device, mixed) if is_planned else wrapping(args)),
        )
        if is_planned and dist.get_rank() == 0:
            plan = report.plan
            peak_mib = (plan.peak_bytes - plan.uncounted_bytes) / 2**20
            print(
                f"planned: {plan.num_wrapped} of {len(plan.regions)} blocks wrapped, "
                f"predicted peak {peak_mib:.1f} MiB, {plan.ratio:.2f} of the plain step"
            )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    fully_shard(model, mesh=mesh, mp_policy=mixed)
    return model


def make_optimizer(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """What trains the parameters."""
    return torch.optim.AdamW(parameters, lr=lr)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of a batch, in float32."""
    return F.cross_entropy(logits.float().view(-1, VOCAB_SIZE), targets.reshape(-1))


class Trainer:
    """One rank's model, optimizer and stream of batches.

    Attributes:
        num_steps: Steps done, those before a resume included.
        loss: Of the last step, before its update, averaged over all ranks.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.model = build_model(args, device)
        self.optimizer = make_optimizer(self.model.parameters(), lr=args.lr)
        self.tokens: Tensor = args.tokens
        self.batch_size: int = args.batch
        self.seq_len: int = args.seq
        self.device = device
        self.num_steps = 0
        self.loss = float("nan")
        self._settings = {name: getattr(args, name) for name in SETTINGS}
        self._settings["text"] = f"CRC-32 {zlib.crc32(self.tokens.numpy().data):08x}"
        # Each rank draws batches of its own, and masks of its own for dropout.
        self.generator = torch.Generator().manual_seed(args.seed + 1 + dist.get_rank())
        torch.manual_seed(args.seed + 1 + dist.get_rank())

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Draw sequences at random places; the targets are the same bytes, one later."""
        starts = torch.randint(
            len(self.tokens) - self.seq_len, (self.batch_size, 1), generator=self.generator
        )
        window = self.tokens[starts + torch.arange(self.seq_len + 1)].long().to(self.device)
        return window[:, :-1], window[:, 1:]

    def step(self) -> None:
        """Train on one batch; waits for the device."""
        inputs, targets = self.next_batch()
        logits = self.model(inputs)
        loss = loss_of(logits, targets)
        # The record goes on to use its graph-free copy, so that no activation outlives backward.
        mean_loss = loss.detach().clone()
        loss.backward()
        del logits, loss
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        dist.all_reduce(mean_loss)
        self.loss = (mean_loss / dist.get_world_size()).item()
        self.num_steps += 1

    def save(self, folder: Path, keep_last: int) -> None:
        """Write a state checkpoint; of older ones in the folder all but `keep_last` go."""
        state.save(
            folder / f"step-{self.num_steps:08}",
            self.model,
            self.optimizer,
            {"num_steps": self.num_steps, "loss": self.loss, "settings": self._settings},
            rank_extra={"generator": self.generator},
            keep_last=keep_last,
        )

    def resume(self, folder: Path) -> Path | None:
        """Go on from the newest state checkpoint of a folder, if there is one; returns its path.

        Raises:
            CheckpointException: if it is one of a model of other sizes, or cannot be read.
            ValueError: if it is one of a run with other settings.
        """
        # Rank 0 chooses, so that all ranks load the same.
        found = [state.latest(folder) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found)
        path = found[0]
        if path is None:
            return None
        extra = state.load(
            path, self.model, self.optimizer, rank_extra={"generator": self.generator}
        )
        self.num_steps, self.loss = extra["num_steps"], extra["loss"]
        self._check_settings(path, extra["settings"])
        return path

    def _check_settings(self, path: Path, saved: dict[str, Any]) -> None:
        different = [
            f"{name} {saved.get(name)} there, {value} here"
            for name, value in self._settings.items()
            if saved.get(name) != value
        ]
        if different:
            raise ValueError(
                f"{path} is of a run with other options: {'; '.join(different)}. Resume with the "
                "same, or start anew in another --save directory"
            )
