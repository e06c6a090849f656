"""Models to try the planner on at once: ``gpt:12x768``, ``llama:7b``.

They have the sizes and the parameter counts of the models that they are named after, and nothing
of their weights. Their forward ends in the loss, as the logits and their gradient are a large part
of what a step of a language model needs. All of them can be built on the meta device.

A name may be followed by options: ``gpt:12x768:seq=512,batch=4``, ``llama:8b:dtype=float32``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GPT", "Builtin", "Llama", "Sizes", "builtin_named", "is_builtin"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and of its sample.

    Attributes:
        layers: Number of blocks.
        width: Width of the residual stream.
        heads: Heads of the queries.
        kv_heads: Heads of the keys and values.
        hidden: Width inside of the MLP.
        vocab: Number of tokens.
        seq: Length of the sample's sequences.
        batch: How many of them.
        dtype: Name of the parameters' type.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int
    seq: int
    batch: int
    dtype: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"width {self.width} must be a multiple of heads {self.heads}, and that of "
                f"kv_heads {self.kv_heads}"
            )
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")


# --- GPT ------------------------------------------------------------------------------------


class GPTAttention(nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.out = nn.Linear(sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, seq, width)`` to the same shape."""
        batch, seq, width = x.shape
        qkv = self.qkv(x).view(batch, seq, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, seq, width))
        return out


class GPTBlock(nn.Module):
    """Attention, then the MLP, each on the residual stream behind a LayerNorm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(sizes.width)
        self.attention = GPTAttention(sizes)
        self.mlp_norm = nn.LayerNorm(sizes.width)
        self.mlp = nn.Sequential(
            nn.Linear(sizes.width, sizes.hidden),
            nn.GELU(approximate="tanh"),
            nn.Linear(sizes.hidden, sizes.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, seq, width)`` to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class GPT(nn.Module):
    """GPT-2 without dropout; the head shares the embedding's weight."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocab, sizes.width)
        self.positions = nn.Embedding(sizes.seq, sizes.width)
        self.blocks = nn.ModuleList(GPTBlock(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocab, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss of ``(batch, seq)`` tokens against as many targets."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return _loss(self.head(self.norm(x)), targets)


# --- Llama ----------------------------------------------------------------------------------


class LlamaAttention(nn.Module):
    """Causal self-attention with rotary positions; several queries may share a key."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_width = sizes.width // sizes.heads
        self.is_grouped = sizes.kv_heads < sizes.heads
        kv_width = sizes.kv_heads * self.head_width
        self.q = nn.Linear(sizes.width, sizes.width, bias=False)
        self.k = nn.Linear(sizes.width, kv_width, bias=False)
        self.v = nn.Linear(sizes.width, kv_width, bias=False)
        self.out = nn.Linear(sizes.width, sizes.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map ``(batch, seq, width)`` to the same shape; ``(seq, head width)`` of positions."""
        batch, seq, width = x.shape
        q, k, v = (
            part(x).view(batch, seq, -1, self.head_width).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        q, k = (t * cos + _rotated(t) * sin for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.is_grouped)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, seq, width))
        return out


class LlamaBlock(nn.Module):
    """Attention, then the gated MLP, each on the residual stream behind an RMSNorm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(sizes.width, eps=1e-5)
        self.attention = LlamaAttention(sizes)
        self.mlp_norm = nn.RMSNorm(sizes.width, eps=1e-5)
        self.gate = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.up = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map ``(batch, seq, width)`` to the same shape; ``(seq, head width)`` of positions."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y = self.mlp_norm(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


class Llama(nn.Module):
    """A Llama: rotary positions, RMSNorm, gated MLP, a head of its own."""

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocab, sizes.width)
        self.blocks = nn.ModuleList(LlamaBlock(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width, eps=1e-5)
        self.head = nn.Linear(sizes.width, sizes.vocab, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        head_width = sizes.width // sizes.heads
        rates = 10_000.0 ** (-torch.arange(0, head_width, 2) / head_width)
        angles = torch.outer(torch.arange(sizes.seq), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss of ``(batch, seq)`` tokens against as many targets."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return _loss(self.head(self.norm(x)), targets)


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# --- By name --------------------------------------------------------------------------------

_LLAMAS = {
    "7b": Sizes(32, 4096, 32, 32, 11008, 32_000, 4096, 1, "bfloat16"),
    "8b": Sizes(32, 4096, 32, 8, 14336, 128_256, 4096, 1, "bfloat16"),
    "13b": Sizes(40, 5120, 40, 40, 13824, 32_000, 4096, 1, "bfloat16"),
    "70b": Sizes(80, 8192, 64, 8, 28672, 128_256, 4096, 1, "bfloat16"),
}

#: What can follow a name; the structure itself is said by the name.
OPTIONS = ("seq", "batch", "vocab", "dtype")

FORMS = (
    "gpt:LAYERSxWIDTH such as gpt:12x768, or llama:SIZE with SIZE one of "
    f"{', '.join(_LLAMAS)}; either may be followed by options, such as :seq=1024,batch=8 "
    f"({', '.join(OPTIONS)})"
)


@dataclass(frozen=True)
class Builtin:
    """A model that comes with the package, and its sample.

    Attributes:
        name: What it was asked for by.
        sizes: Its sizes.
        model_class: ``GPT`` or ``Llama``.
    """

    name: str
    sizes: Sizes
    model_class: Callable[[Sizes], nn.Module]

    def build(self) -> nn.Module:
        """The model, on the default device."""
        return self.model_class(self.sizes).to(_DTYPES[self.sizes.dtype])

    def sample(self) -> dict[str, Tensor]:
        """Tokens and targets, on the default device."""
        shape = (self.sizes.batch, self.sizes.seq)
        return {name: torch.randint(self.sizes.vocab, shape) for name in ("tokens", "targets")}


def is_builtin(target: str) -> bool:
    """Whether a target can only mean a built-in model: no Python name begins with a digit."""
    family, _, size = target.partition(":")
    return family in ("gpt", "llama") and size[:1].isdigit()


def builtin_named(target: str) -> Builtin:
    """The built-in model of a name.

    Raises:
        ValueError: There is none of this name, or an option cannot be read.
    """
    family, _, rest = target.partition(":")
    size, _, options = rest.partition(":")
    if family == "gpt" and (match := re.fullmatch(r"(\d+)x(\d+)", size)):
        sizes = _gpt_sizes(int(match[1]), int(match[2]))
    elif family == "llama" and size in _LLAMAS:
        sizes = _LLAMAS[size]
    else:
        raise ValueError(f"there is no built-in model {target!r}; there are {FORMS}")
    try:
        sizes = replace(sizes, **dict(map(_read_option, filter(None, options.split(",")))))
    except ValueError as error:
        raise ValueError(f"built-in model {target!r}: {error}") from None
    return Builtin(target, sizes, GPT if family == "gpt" else Llama)


def _gpt_sizes(layers: int, width: int) -> Sizes:
    # Heads of 64, or a little wider where these do not fill the width.
    heads = next((h for h in range(width // 64, 1, -1) if width % h == 0), 1)
    return Sizes(layers, width, heads, heads, 4 * width, 50_257, 1024, 8, "float32")


def _read_option(option: str) -> tuple[str, Any]:
    name, _, value = option.partition("=")
    if name not in OPTIONS:
        raise ValueError(f"{name!r} is no option; there are {', '.join(OPTIONS)}")
    if name != "dtype" and not value.isdigit():
        raise ValueError(f"{name} must be a number, got {value!r}")
    return name, value if name == "dtype" else int(value)
