"""Tiny random models of transformers, one of a kind, with a batch each; nothing is downloaded.

All have dropout, where the architecture has it, and are in training mode.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from wrappers import CheckpointImpl
from wrappers.policies import save_matmuls

VOCABULARY = 32
WIDTH = 16
NUM_LAYERS = 2
LENGTH = 6
BATCH = 2


def _gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH + 4,
        n_embd=WIDTH,
        n_layer=NUM_LAYERS,
        n_head=2,
        **_SPECIAL_TOKENS,
    )


def _llama() -> Any:
    return transformers.LlamaConfig(**_DECODER, attention_dropout=0.1)


def _mixtral() -> Any:
    return transformers.MixtralConfig(
        **_DECODER, attention_dropout=0.1, num_local_experts=4, num_experts_per_tok=2
    )


def _gemma3n() -> Any:
    """The last two of its four blocks use the keys and values of the first two."""
    return transformers.Gemma3nTextConfig(
        **{**_DECODER, "num_hidden_layers": 4},
        head_dim=WIDTH // 2,
        attention_dropout=0.1,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=4,
        altup_num_inputs=2,
    )


def _bert() -> Any:
    return transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=LENGTH,
    )


def _t5() -> Any:
    return transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=WIDTH // 2,
        d_ff=2 * WIDTH,
        num_layers=NUM_LAYERS,
        num_heads=2,
        dropout_rate=0.1,
        decoder_start_token_id=0,
        **{**_SPECIAL_TOKENS, "pad_token_id": 0},
    )


def _vit() -> Any:
    return transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )


_SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4 * LENGTH,
    **_SPECIAL_TOKENS,
}

#: How to make the config, and the class of the model.
MODELS: dict[str, tuple[Any, Any]] = {
    "gpt2": (_gpt2, transformers.GPT2LMHeadModel),
    "llama": (_llama, transformers.LlamaForCausalLM),
    "mixtral": (_mixtral, transformers.MixtralForCausalLM),
    "gemma3n": (_gemma3n, transformers.Gemma3nForCausalLM),
    "bert": (_bert, transformers.BertForMaskedLM),
    "t5": (_t5, transformers.T5ForConditionalGeneration),
    "vit": (_vit, transformers.ViTForImageClassification),
}

#: The classes of the blocks, for the models that all tests run with. T5 has as many blocks in its
#: encoder as in its decoder.
BLOCKS = {
    "gpt2": "GPT2Block",
    "llama": "LlamaDecoderLayer",
    "mixtral": "MixtralDecoderLayer",
    "bert": "BertLayer",
    "t5": "T5Block",
    "vit": "ViTLayer",
}

#: What each technique passes to ``enable``.
TECHNIQUES: dict[str, dict[str, Any]] = {
    "REENTRANT": {"impl": CheckpointImpl.REENTRANT},
    "NO_REENTRANT": {"impl": CheckpointImpl.NO_REENTRANT},
    "REPLAY": {"impl": CheckpointImpl.REPLAY},
    "REPLAY, policy": {"policy": save_matmuls()},
    "offload, disk": {
        "offload": {
            "tier": "disk",
            "directory": tempfile.gettempdir(),
            "min_bytes": 1,
            "keep_last": 0,
        }
    },
}
FACES = {"wrapper": False, "in place": True}


def block_names(model: nn.Module, name: str) -> tuple[str, ...]:
    """FQNs of the blocks of a plain model."""
    return tuple(n for n, m in model.named_modules() if type(m).__name__ == BLOCKS[name])


def make_model(name: str, attention: str = "sdpa", *, use_cache: bool = False) -> nn.Module:
    make_config, cls = MODELS[name]
    config = make_config()
    if hasattr(config, "use_cache"):
        config.use_cache = use_cache
    config._attn_implementation = attention
    torch.manual_seed(0)
    model: nn.Module = cls(config).train()
    return model


def batch(name: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    if name == "vit":
        pixels = torch.randn(BATCH, 3, 8, 8, generator=generator)
        return {"pixel_values": pixels, "labels": torch.arange(BATCH)}
    tokens = torch.randint(4, VOCABULARY, (BATCH, LENGTH), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def step(model: nn.Module, name: str, **more: Any) -> Tensor:
    """The loss of a forward and a backward from a fixed seed."""
    torch.manual_seed(7)
    loss: Tensor = model(**batch(name), **more).loss
    loss.backward()
    return loss.detach()


def saved_bytes(model: nn.Module, name: str) -> int:
    """Bytes that autograd keeps for the backward of a step, outside of regions, no parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    num_bytes = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal num_bytes
        if tensor.untyped_storage().data_ptr() not in parameters:
            num_bytes += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(model, name)
    return num_bytes


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bitwise equality of two dicts of tensors."""
    assert got.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not differing
