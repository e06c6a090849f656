"""A byte-level GPT, small enough to read in two minutes.

The main job and the benchmarks need a model whose activations behave as those of a real
transformer: attention through `scaled_dot_product_attention`, an MLP four times as wide as the
model, dropout in three places (so that a recompute with the wrong random state shows in the loss)
and pre-norm residual blocks. Its tokens are bytes, so it needs no tokenizer and no download.

The unit of activation checkpointing and of sharding is `Block`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB_SIZE = 256


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT`.

    Raises:
        ValueError: if a size is not positive, `d_model` is no multiple of `num_heads`, or
            `dropout` lies outside [0, 1).
    """

    num_layers: int = 6
    d_model: int = 256
    num_heads: int = 8
    seq_len: int = 256
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("num_layers", "d_model", "num_heads", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model must be a multiple of num_heads, got {self.d_model} and {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


class Attention(nn.Module):
    """Causal self-attention over `(batch, seq, d_model)`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, d_model = x.shape
        qkv = self.qkv(x).view(batch, seq, 3, self.num_heads, d_model // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, seq, d_model))
        return out


class Block(nn.Module):
    """A pre-norm transformer block: attention, then the MLP, each on the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.d_model)
        self.attention = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.d_model)
        self.mlp = nn.Sequential(
            nn.Linear(config.d_model, 4 * config.d_model),
            nn.GELU(),
            nn.Linear(4 * config.d_model, config.d_model),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_attention(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm_mlp(x)))
        return out


class GPT(nn.Module):
    """Bytes `(batch, seq)` to logits `(batch, seq, 256)`; the head is not tied to the embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_token = nn.Embedding(VOCAB_SIZE, config.d_model)
        self.embed_position = nn.Embedding(config.seq_len, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, VOCAB_SIZE, bias=False)
        self.apply(_init_weights)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.embed_token(tokens) + self.embed_position(positions))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
