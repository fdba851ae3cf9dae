"""A tokenizer with a chat template, whose tokens are letters."""


class Tokenizer:
    """ "." ends a turn.

    Args:
        template: from the text of a question, and whether an answer is to begin, to what is written.
    """

    bos_token_id, eos_token_id = 1, ord(".")

    def __init__(self, template):
        self._template = template

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        return self._template(messages[0]["content"], add_generation_prompt)

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(letter) for letter in text]
