"""The tokenizer that the tests of this folder share."""

from pathlib import Path

import pytest
from qwen_inputs import qwen_vl_tokenizer

from megatron_llave.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of a tokenizer with the special tokens of the Qwen-VL families."""
    return qwen_vl_tokenizer(tmp_path_factory.mktemp("qwen_vl"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    """The tokenizer of `tokenizer_file`."""
    return load_tokenizer(tokenizer_file)
