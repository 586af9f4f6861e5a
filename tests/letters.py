"""A tokenizer for tests of what is made of tokens, which needs no file."""


class Letters:
    """One id per character."""

    vocab_size = 128
    eos_id = 1

    def encode(self, text: str) -> list[int]:
        """The code points of a text's characters."""
        return [ord(letter) for letter in text]
