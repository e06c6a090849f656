"""Runs `scripts/train_accelerate.py` in several ways in the processes of one `accelerate launch`.

    accelerate launch --config_file CONFIG accelerate_job.py FOLDER

Starting processes takes seconds and the runs take milliseconds, so they share them. What each run
gave goes to `FOLDER/results.json`, from the main process.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper as TorchWrapper,
)
from torch.nn.modules.module import register_module_forward_hook

from scripts.model import Attention
from scripts.train_accelerate import make_accelerator, parse_args, train

SIZES = ["--layers=3", "--d-model=32", "--heads=2", "--seq=32", "--batch=2", "--accumulate=2"]
NUM_STEPS = 4
#: What a run is started with, beside the sizes.
RUNS = {
    "none": ["--impl=none"],
    "reentrant": ["--impl=reentrant"],
    "no_reentrant": ["--impl=no_reentrant"],
    "replay": ["--impl=replay", "--policy=save_matmuls"],
}
#: What the launcher sets for FSDP1.
FSDP1 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "1",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def main(folder: Path) -> None:
    results = {name: run(options) for name, options in RUNS.items()}
    own = {"FSDP_ACTIVATION_CHECKPOINTING": "true"}
    results["accelerate's own too"] = run(RUNS["no_reentrant"], **own)
    results["accelerate's own alone"] = run(RUNS["none"], **own)
    results["first half"] = run(
        [*RUNS["no_reentrant"], "--steps=2", f"--save={folder / 'state'}"], weights=folder / "half"
    )
    resume = f"--resume={folder / 'state'}"
    results["second half"] = run([*RUNS["no_reentrant"], resume])
    results["second half, replayed"] = run([*RUNS["replay"], resume])
    results["second half, plain"] = run([*RUNS["none"], resume])
    if results["none"]["distributed_type"] != "FSDP":  # last, as the processes then stay with FSDP
        results["FSDP1"] = run(RUNS["no_reentrant"], **FSDP1)
        results["FSDP1, accelerate's own too"] = run(RUNS["no_reentrant"], **FSDP1, **own)
    if int(os.environ["RANK"]) == 0:
        (folder / "results.json").write_text(json.dumps(results))
    gc.collect()  # DDP goes before the process group, and that before Python: gloo may abort
    dist.barrier()
    dist.destroy_process_group()


def run(options: list[str], weights: Path | None = None, **environment: str) -> dict[str, object]:
    """One training from new; the losses, and what a test wants to know besides."""
    args = parse_args([*SIZES, f"--steps={NUM_STEPS}", *options])
    os.environ.update(environment)
    with warnings.catch_warnings(record=True) as caught, counting_attention() as calls:
        warnings.simplefilter("always")
        accelerator = make_accelerator(gradient_accumulation_steps=args.accumulate)
        result = train(accelerator, args)
    for name in environment:
        del os.environ[name]
    (model,) = accelerator._models
    # On CPUs the full state dict of FSDP1 crashes in torch 2.13, with the plain model too.
    state = {} if environment.get("FSDP_VERSION") == "1" else accelerator.get_state_dict(model)
    if weights is not None and accelerator.is_main_process:
        torch.save(state, weights)
    accelerator.wait_for_everyone()
    plain = accelerator.unwrap_model(model)
    return {
        **asdict(result),
        "num_attention_calls": len(calls),
        "num_torch_wrappers": sum(isinstance(m, TorchWrapper) for m in model.modules()),
        "warnings": [str(w.message) for w in caught if "wrappers" in str(w.message)],
        "state_names": list(state),
        "block_names": [name for name, _ in plain.blocks[0].named_modules()],
        "parameter_names": [name for name, _ in plain.named_parameters()],
    }


@contextmanager
def counting_attention():
    """Collects the calls of attention modules, those of a recompute too."""
    calls: list[None] = []

    def count(module, args, output):
        if isinstance(module, Attention):
            calls.append(None)

    handle = register_module_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
