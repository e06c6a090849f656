"""Run a model here with the operators that an accelerator would run.

The same Python code runs other operators on another device: attention picks a kernel, dropout keeps
a mask instead of drawing it again. A plan names operators, and bytes hang on what they save; so a
profile for a device that is not here replaces these calls by what that device would run, which
fake tensors of the CPU accept.

Known are fused attention and dropout. Attention in half precision without a mask is taken to run
as flash attention, other attention as memory-efficient attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

_HALF = (torch.float16, torch.bfloat16)

_PLAIN_ATTENTION, _PLAIN_DROPOUT = F.scaled_dot_product_attention, F.dropout


class AcceleratorOperators(TorchFunctionMode):
    """While it is entered, calls that differ by device run as on an accelerator."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.multi_head_attention_forward:  # What it calls does not come here.
            with _replaced():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _replaced() -> Iterator[None]:
    F.scaled_dot_product_attention, F.dropout = _attention, _dropout
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout = _PLAIN_ATTENTION, _PLAIN_DROPOUT


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or inplace or not 0 < p < 1:
        return _PLAIN_DROPOUT(input, p, training, inplace)
    dropped: Tensor = torch.native_dropout(input, p, True)[0]
    return dropped


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    num_groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    if num_groups > 1:
        key = key.repeat_interleave(num_groups, -3)
        value = value.repeat_interleave(num_groups, -3)
    if query.dim() != 4:
        return _PLAIN_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if attn_mask is None and query.dtype in _HALF:
        out: Tensor = aten._scaled_dot_product_flash_attention.default(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
        return out
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
            attn_mask.logical_not(), float("-inf")
        )
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return aten._scaled_dot_product_efficient_attention.default(  # type: ignore[no-any-return]
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
