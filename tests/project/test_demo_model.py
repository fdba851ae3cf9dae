"""The demo model is a chat model: its template works, and an answer ends where the template ends it."""

from transformers import AutoTokenizer, GenerationConfig


def test_the_chat_template_writes_a_conversation_and_an_answer_ends_at_the_end_of_turn(demo_model):
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    chat = [{"role": "user", "content": "Hello!"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\n")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2  # one for the system's turn, one for the user's
    assert tokenizer.decode(ids) == text
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == GenerationConfig.from_pretrained(demo_model).eos_token_id == end
