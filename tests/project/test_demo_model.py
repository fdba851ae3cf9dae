"""The demo model is a chat model: its template works, and an answer ends where the template ends it."""

import pytest
from transformers import AutoTokenizer, GenerationConfig

CHAT = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return AutoTokenizer.from_pretrained(demo_model)


def test_the_chat_template_writes_a_conversation(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\n")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2  # one for the system's turn, one for the user's
    assert tokenizer.decode(ids) == text


def test_an_answer_ends_at_the_end_of_turn(demo_model, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == end
    assert GenerationConfig.from_pretrained(demo_model).eos_token_id == end
