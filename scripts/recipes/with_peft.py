"""LoRA adapters on a frozen base, with PEFT: nothing that embeddings give requires a gradient.

python scripts/recipes/with_peft.py
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from wrappers.integrations import transformers as checkpointing


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_cache=False,
    )
    base = LlamaForCausalLM(config)  # yours: from_pretrained(...)
    adapters = LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    model = get_peft_model(base, adapters).to(device).train()
    if "--plain" not in sys.argv:
        checkpointing.enable(model)  # no enable_input_require_grads needed
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for step in range(1, 5):
        tokens = torch.randint(256, (4, 32)).to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item()!r}")


if __name__ == "__main__":
    main()
