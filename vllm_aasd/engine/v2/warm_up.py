"""The kinds of logits that steps hand to our kernels, each of which is another compilation."""

from collections.abc import Iterator

import torch

from vllm_aasd.kernels.common.rows_triton import rows_of_shapes

_PADDING = 64
"""vLLM pads a vocabulary to a multiple of it, and cuts the logits back."""


def kinds_of_logits(vocab_size: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> Iterator[torch.Tensor]:
    """Logits of every kind that a step may have: few rows and many, of each dtype, whole or cut back.

    A large batch is verified in parts. Where rows are no multiple of 16 bytes, a part begins at any address.

    Args:
        vocab_size: columns.
        dtypes: the model's, and float32, which vLLM's sampler makes of it where a request asks for more than an argmax.
        device: the model's.

    Yields:
        ``[num_rows, vocab_size]``, zeros.
    """
    for dtype in dict.fromkeys(dtypes):
        for stride in dict.fromkeys((vocab_size, -(-vocab_size // _PADDING) * _PADDING)):
            for num_rows in rows_of_shapes(vocab_size):
                rows = torch.zeros(num_rows + 1, stride, dtype=dtype, device=device)[:, :vocab_size]
                yield rows[:num_rows]
                if stride * dtype.itemsize % 16:
                    yield rows[1:]
