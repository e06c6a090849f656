"""Memory that a kernel takes for itself and gives back before it returns.

No operator makes it, so a dispatch mode does not see it; but at the peak of a step it counts. Known
are the kernels of the CPU that take most: fused attention, the backward of layer norm and of batch
norm, products of matrices, convolutions. Sizes follow torch 2.11 to 2.13
(``aten/src/ATen/native/cpu/FlashAttentionKernel.cpp`` and ``layer_norm_kernel.cpp``); those of
convolutions are bounds. Not known is what products in half precision take on a CPU. On an
accelerator kernels take theirs from the caching allocator; the margin of a budget is for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wrappers import _device

aten = torch.ops.aten

#: Keys that fused attention looks at together.
_KEYS_TOGETHER = 512

#: Channels that convolutions pad to.
_CHANNELS_TOGETHER = 16


def _queries_together(num_queries: int) -> int:
    if num_queries >= 768:
        return 256
    return 64 if num_queries >= 192 else 32


def _attention(query: Tensor, key: Tensor, *rest: Any, **_: Any) -> int:
    num_queries, num_keys, width = query.shape[-2], key.shape[-2], query.shape[-1]
    queries = min(_queries_together(num_queries), num_queries)
    keys = min(_KEYS_TOGETHER, num_keys)
    elements = queries * keys + 2 * queries + queries * width
    return 4 * elements * torch.get_num_threads()


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, *rest: Any, **_: Any) -> int:
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    queries = min(_queries_together(num_queries), num_queries)
    keys = min(_KEYS_TOGETHER, num_keys)
    return 4 * (2 * queries * keys + queries) * torch.get_num_threads()


def _layer_norm_backward(gradient: Tensor, input: Tensor, shape: Any, *rest: Any, **_: Any) -> int:
    width = 1
    for size in shape:
        width *= size
    return 2 * 4 * width * torch.get_num_threads()


def _product(*matrices: Tensor, **_: Any) -> int:
    """Copies of what BLAS cannot read as it lies, such as the expanded gradient of a sum."""
    num_bytes = 0
    for matrix in matrices[-2:]:
        rows, columns = matrix.shape[-2:]
        by_row, by_column = matrix.stride()[-2:]
        is_plain = by_column == 1 and by_row >= max(1, columns)
        if not is_plain and not (by_row == 1 and by_column >= max(1, rows)):
            num_bytes += matrix.numel() * matrix.element_size()
    return num_bytes


def _convolution(input: Tensor, weight: Tensor, *rest: Any, out: Tensor, **_: Any) -> int:
    return _blocked(input, weight.transpose(0, 1), out)


def _convolution_backward(
    gradient: Tensor, input: Tensor, weight: Tensor, *rest: Any, **_: Any
) -> int:
    return _blocked(gradient, input, weight, weight.transpose(0, 1))


def _blocked(*tensors: Tensor) -> int:
    """Copies in a layout with blocks of channels, which oneDNN may make: a bound."""
    num_bytes = 0
    for tensor in tensors:
        channels = max(tensor.shape[1], 1)
        padded = -(-channels // _CHANNELS_TOGETHER) * _CHANNELS_TOGETHER
        num_bytes += tensor.numel() // channels * padded * tensor.element_size()
    return num_bytes


def _batch_norm_backward(gradient: Tensor, input: Tensor, *rest: Any, **_: Any) -> int:
    return input.numel() * input.element_size()


_KNOWN: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.mm.default: _product,
    aten.addmm.default: _product,
    aten.bmm.default: _product,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}


def workspace_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """What the kernel of an operator takes for itself.

    Args:
        func: The operator.
        args: Its arguments; tensors may be fake.
        kwargs: Its keyword arguments.
        out: Its result.
    """
    known = _KNOWN.get(func)
    if known is None or not _device.is_host(args[0]):
        return 0
    return known(*args, out=out, **kwargs)
