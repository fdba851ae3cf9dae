"""Engines that several modules share."""

import contextlib

import pytest

from aasd_testing.engines import Engine

# What any of the modules needs. Prompts come in chunks, and drafts have the same length on every machine.
OPTIONS = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "block_size": 32,
    "enable_prompt_embeds": True,
    "reasoning_config": {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"},
}
AASD = {
    "aasd_draft_length": 8,
    "aasd_alignment": True,
    "aasd_allow_request_override": "any",
    "aasd_corpora": {},
}


@pytest.fixture(scope="session")
def plain_engine(demo_model):
    """An engine without speculation: what the target says alone."""
    with contextlib.closing(Engine(demo_model, **OPTIONS)) as engine:
        yield engine


@pytest.fixture(scope="session")
def aasd_engine(demo_model):
    """The default rule; requests ask for what they want."""
    with contextlib.closing(Engine(demo_model, AASD, **OPTIONS)) as engine:
        yield engine
