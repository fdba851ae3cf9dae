"""Logits and tables for the align ops."""

import torch

UNTOUCHED = -12345


def untouched_table(num_slots, top_k):
    return torch.full((num_slots, 1 + 2 * top_k), UNTOUCHED, dtype=torch.int32)


def probabilities(table):
    return table[:, 1 + (table.shape[1] - 1) // 2 :].contiguous().view(torch.float32)


def read(store, token_ids, slots):
    """(ids [n, top_k], probs [n, top_k], fresh [n]) of a store's entries, for the tokens that the reader has there.

    A fresh entry was written for this token; others have probability 0, like slot -1.
    """
    entries = store.slots[slots.clamp(min=0)]
    top_k = entries.shape[1] // 2
    fresh = (slots >= 0) & (token_ids >= 0) & (entries[:, 0] == token_ids)
    probs = entries[:, 1 + top_k :].view(torch.float32)
    return entries[:, 1 : 1 + top_k], torch.where(fresh[:, None], probs, 0.0), fresh
