"""A transformers model under Trainer, in one process or more.

torchrun --standalone --nproc-per-node 2 scripts/recipes/with_transformers.py
"""

import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from wrappers.integrations import transformers as checkpointing
from wrappers.policies import save_matmuls


def main() -> None:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.1,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)  # yours: from_pretrained(...)
    if "--plain" not in sys.argv:
        checkpointing.enable(model, policy=save_matmuls())
    texts = torch.randint(256, (32, 33))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=4,
            per_device_train_batch_size=4,
            logging_steps=1,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
            save_strategy="no",
            # gradient_checkpointing stays off: it would recompute the blocks a second time
        )
        data = [{"input_ids": text, "labels": text} for text in texts]
        trainer = Trainer(model, args, train_dataset=data)
        trainer.train()
    if trainer.is_world_process_zero():
        for entry in trainer.state.log_history[:-1]:
            print(f"step {entry['step']}: loss {entry['loss']!r}")
    trainer.accelerator.end_training()  # gloo may abort a process that exits with a group


if __name__ == "__main__":
    main()
