"""The released prompts, text and ids, and the cut that keeps the pooled token."""

import json
import re
from pathlib import Path

import pytest
import tokenizers

from megatron_llave.data.prompts import (
    IMAGE,
    QWEN_HEAD,
    QWEN_TAIL,
    count_placeholders,
    encode_prompt,
    qwen_prompt,
    user_content,
)
from megatron_llave.data.tokenizer import load_tokenizer
from megatron_llave.errors import DataError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/prompts/prompts.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["train_and_mmeb_eval"]}
DEMO = {case["name"]: case for case in GOLDEN["readme_demo"]}
SPECIAL = GOLDEN["tokenizer"]["special"]
HEAD_IDS, TAIL_IDS = CASES["empty_text"]["input_ids"][:14], CASES["empty_text"]["input_ids"][14:]
# Words that Qwen's merges split further; their ids cannot be told from the golden file by splitting into words.
SPLIT_WORDS = {"text_target_word", "unicode_and_digits", "literal_chatml_in_text"}

# How Qwen2 splits text into words before merging.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_split():
    """Qwen2's pre-tokenizer."""
    return tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_WORDS), "isolated")


def words_of(prompt):
    """The prompt as words, special tokens and <image>."""
    parts = re.split("(" + "|".join(map(re.escape, [*SPECIAL, "<image>"])) + ")", prompt)
    for part in parts:
        if part in SPECIAL or part == "<image>":
            yield part
        elif part:
            yield from (word for word, _ in qwen_split().pre_tokenize_str(part))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A word-level tokenizer with Qwen's ids for the words of the golden prompts."""
    vocabulary = {"[UNK]": 0, **SPECIAL}
    for case in [*CASES.values(), *DEMO.values()]:
        words = list(words_of(case["prompt"]))
        if case["name"] not in SPLIT_WORDS:
            assert len(words) == len(case["input_ids"]), case["name"]
            vocabulary |= {w: i for w, i in zip(words, case["input_ids"]) if w != "<image>"}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = qwen_split()
    model.add_special_tokens(list(SPECIAL))
    path = tmp_path_factory.mktemp("qwen") / "tokenizer.json"
    model.save(str(path))
    return load_tokenizer(path)


@pytest.mark.parametrize("name", CASES)
def test_prompt_text_is_the_released_one(name):
    case = CASES[name]
    content = user_content(case["raw_text"], count_placeholders(case["raw_text"]))
    assert content == case["user_content"]
    assert qwen_prompt(content) == case["prompt"]


@pytest.mark.parametrize("name", DEMO)
def test_demo_prompt_text_is_the_released_one(name):
    case = DEMO[name]
    assert qwen_prompt(user_content(case["question"], case["question"].count("<image>"))) == case["prompt"]


@pytest.mark.parametrize("name", [*CASES, *DEMO])
def test_ids_are_the_released_ones(name, tokenizer):
    case = CASES.get(name) or DEMO[name]
    text = case["raw_text"] if name in CASES else case["question"]
    ids = encode_prompt(text, count_placeholders(text), tokenizer, "qwen", 4096, 0)
    assert ids[:14] == case["input_ids"][:14] == HEAD_IDS
    assert ids[-7:] == case["input_ids"][-7:] == TAIL_IDS
    assert ids[-1] == case["input_ids"][-1] == 198
    if name in SPLIT_WORDS:
        # Ids the word-level tokenizer has no word for are 0; every other one must be there, in the released order.
        released = iter(case["input_ids"])
        assert all(token in released for token in ids if token != 0)
    else:
        assert ids == case["input_ids"]


def test_every_image_has_its_id_and_a_missing_placeholder_goes_first(tokenizer):
    assert user_content(" look: <|image_1|> \n", 1) == "<image>\nlook:"
    assert user_content("compare", 2) == "<image>\n<image>\ncompare"
    assert user_content("look: <|image_1|>", 2) == "<image>\n<image>\nlook:"
    assert encode_prompt("a cat", 2, tokenizer, "qwen", 4096, 10).count(IMAGE) == 2
    for template in ("qwen", "plain"):
        assert encode_prompt("a cat", 0, tokenizer, template, 4096, 0).count(IMAGE) == 0


def test_more_placeholders_than_images_is_an_error(tokenizer):
    with pytest.raises(DataError, match="2 image placeholders for 1 images"):
        encode_prompt("<|image_1|> and <|image_2|>", 1, tokenizer, "qwen", 4096, 1)


def test_plain_is_image_text_end(tokenizer):
    words = tokenizer.encode("Represent the given image")
    ids = encode_prompt("<|image_1|>\nRepresent the given image", 1, tokenizer, "plain", 64, 17)
    assert ids == [IMAGE, *words, tokenizer.eos_id]
    assert encode_prompt("", 0, tokenizer, "plain", 8, 0) == [tokenizer.eos_id]


def test_long_text_is_cut_but_never_the_tail(tokenizer):
    text = "<|image_1|>\nRepresent the given image with the following question: What is in the image"
    whole = encode_prompt(text, 1, tokenizer, "qwen", 4096, 100)
    expanded = len(whole) - 1 + 100
    assert encode_prompt(text, 1, tokenizer, "qwen", expanded, 100) == whole
    for missing in range(1, len(whole) - 1 - len(HEAD_IDS) - len(TAIL_IDS) + 1):
        ids = encode_prompt(text, 1, tokenizer, "qwen", expanded - missing, 100)
        assert ids == whole[: -len(TAIL_IDS) - missing] + TAIL_IDS
        assert ids[14] == IMAGE
    with pytest.raises(
        DataError, match=r"100 visual tokens and 21 of .* data.max_length=120; raise it to at least 121"
    ):
        encode_prompt(text, 1, tokenizer, "qwen", 120, 100)


def test_cut_keeps_images_that_stand_behind_cut_text(tokenizer):
    ids = encode_prompt("<image>\nCompare with <image> please", 2, tokenizer, "qwen", 21 + 8 + 1, 8)
    assert ids == [*HEAD_IDS, IMAGE, 198, IMAGE, *TAIL_IDS]


def test_plain_cut(tokenizer):
    words = tokenizer.encode("What is in the image")
    ids = encode_prompt("What is in the image", 1, tokenizer, "plain", 20, 16)
    assert ids == [IMAGE, *words[:3], tokenizer.eos_id]
    with pytest.raises(DataError, match="16 visual tokens and 1 of the prompt template exceed data.max_length=16"):
        encode_prompt("What", 1, tokenizer, "plain", 16, 16)


def test_head_and_tail_ids_match_the_golden_segments(tokenizer):
    segments = GOLDEN["segments"]
    assert tokenizer.encode(QWEN_TAIL) == segments["<|im_end|>\n"] + segments["<|im_start|>assistant\n\n<|im_end|>\n"]
    assert len(tokenizer.encode(QWEN_HEAD)) == 14
