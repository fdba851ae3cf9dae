"""Logits and tables for the align ops."""

import torch

INF = float("inf")
UNTOUCHED = -12345


def untouched_table(num_slots, top_k):
    return torch.full((num_slots, 1 + 2 * top_k), UNTOUCHED, dtype=torch.int32)


def probabilities(table):
    return table[:, 1 + (table.shape[1] - 1) // 2 :].contiguous().view(torch.float32)


def random_rows(num_rows, vocab_size, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num_rows, vocab_size + 9, generator=g) * 3).to(dtype)[:, 4 : 4 + vocab_size]
    for row in range(num_rows):
        kind = row % 9
        if kind == 1:
            logits[row, torch.randperm(vocab_size, generator=g)[: vocab_size // 2]] = -INF
        elif kind == 2:
            hot = int(torch.randint(0, vocab_size, (), generator=g))
            logits[row] = -INF
            logits[row, hot] = -5.0
        elif kind == 3:
            logits[row, vocab_size // 2] = float("nan")
        elif kind == 4:
            logits[row] = -INF
        elif kind == 5:
            logits[row] = torch.randint(0, 3, (vocab_size,), generator=g).to(dtype)
        elif kind == 6:
            logits[row] = logits[row].sort().values
    return logits


def read(store, token_ids, slots):
    """(ids [n, top_k], probs [n, top_k], fresh [n]) of a store's entries, for the tokens that the reader has there.

    A fresh entry was written for this token; others have probability 0, like slot -1.
    """
    entries = store.slots[slots.clamp(min=0)]
    top_k = entries.shape[1] // 2
    fresh = (slots >= 0) & (token_ids >= 0) & (entries[:, 0] == token_ids)
    probs = entries[:, 1 + top_k :].view(torch.float32)
    return entries[:, 1 : 1 + top_k], torch.where(fresh[:, None], probs, 0.0), fresh
