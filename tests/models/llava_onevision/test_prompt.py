"""The released prompts, text and ids, and the cut that keeps the pooled token."""

import json
from pathlib import Path

import pytest

from megatron_llave.data.packing import IMAGE
from megatron_llave.data.placeholders import count_placeholders, mark_user_text, remove_placeholders
from megatron_llave.data.tokenizer import load_tokenizer
from megatron_llave.errors import DataError
from megatron_llave.models.llava_onevision.prompt import QWEN_HEAD, QWEN_TAIL, encode_prompt, qwen_prompt, user_content

FOLDER = Path(__file__).parents[2] / "golden/prompts"
GOLDEN = json.loads((FOLDER / "prompts.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["train_and_mmeb_eval"]}
DEMO = {case["name"]: case for case in GOLDEN["readme_demo"]}
HEAD_IDS, TAIL_IDS = CASES["empty_text"]["input_ids"][:14], CASES["empty_text"]["input_ids"][14:]


@pytest.fixture(scope="module")
def tokenizer():
    """Qwen's ids for the golden texts, made from its real vocabulary."""
    return load_tokenizer(FOLDER / "qwen_subset_tokenizer.json")


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
    assert ids == case["input_ids"]
    assert ids[:14] == HEAD_IDS and ids[-7:] == TAIL_IDS and ids[-1] == 198


@pytest.mark.parametrize("segment", GOLDEN["segments"])
def test_ids_of_the_fixed_pieces_are_the_released_ones(segment, tokenizer):
    assert tokenizer.encode(segment) == GOLDEN["segments"][segment]


def test_special_tokens_in_user_text_are_special(tokenizer):
    end = GOLDEN["tokenizer"]["special"]["<|im_end|>"]
    assert encode_prompt("weird <|im_end|> text", 0, tokenizer, "qwen", 64, 0).count(end) == 4
    assert encode_prompt("weird text", 0, tokenizer, "qwen", 64, 0).count(end) == 3


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


@pytest.mark.parametrize("template", ["qwen", "plain"])
def test_a_backslash_makes_a_placeholder_ordinary_text(tokenizer, template):
    def literal(text: str, images: int = 0) -> list[int]:
        return encode_prompt(text, images, tokenizer, template, 4096, images)

    ids = literal(r"Is \<image> or \<|image_1|> right?")
    assert IMAGE not in ids and ids != literal("Is <image> or <|image_1|> right?", 2)
    words = tokenizer.encode("Is <image> or <|image_1|> right?")  # none of the marks is a token of this tokenizer
    assert str(words)[1:-1] in str(ids), "the ids are those of the text without the backslashes"
    both = literal(r"a screenshot of \<image> in XML", 1)
    assert both.count(IMAGE) == 1 and count_placeholders(r"\<image>") == 0
    assert str(tokenizer.encode("a screenshot of <image> in XML"))[1:-1] in str(both)
    assert remove_placeholders(r"see \<image>, <image> not") == r"see \<image>, not"


@pytest.mark.parametrize(
    ("text", "num_images", "marked"),
    [
        ("the <image> tag", 0, "the \\<image> tag"),
        ("<|image_1|> and <|im_end|>", 0, "\\<|image_1|> and \\<|im_end|>"),
        ("<image>\nthe \\<image> tag", 1, "<image>\nthe \\<image> tag"),
        ("a <video> and </s>", 1, "a \\<video> and \\</s>"),
        ("<image_newline> and </s>", 0, "\\<image_newline> and \\</s>"),
        ("C:\\dir <b> <s >", 0, "C:\\dir <b> <s >"),
    ],
)
def test_marks_of_users_are_literal_unless_they_place_images(text, num_images, marked, tokenizer):
    assert mark_user_text(text, num_images) == mark_user_text(marked, num_images) == marked
    for template in ("qwen", "plain"):
        assert encode_prompt(marked, num_images, tokenizer, template, 4096, 9).count(IMAGE) == num_images
    with pytest.raises(DataError, match=r"2 image placeholders for 1 images: .*; write .<image> where"):
        mark_user_text("<image> and <image>", 1)


def test_special_tokens_of_users_are_ordinary_text(tokenizer):
    end = GOLDEN["tokenizer"]["special"]["<|im_end|>"]
    written = "weird <|im_end|> text"
    ids = encode_prompt(mark_user_text(written, 0), 0, tokenizer, "qwen", 64, 0)
    assert ids == [*HEAD_IDS, *tokenizer.encode_plain(written), *TAIL_IDS] and end not in tokenizer.encode_plain(
        written
    )
    assert encode_prompt(mark_user_text(written, 0), 0, tokenizer, "plain", 64, 0)[:-1] == ids[14:-7]
    assert tokenizer.encode_plain("a cat") == tokenizer.encode("a cat")
    two = encode_prompt("<image>\nWhat is \\<image> or \\<|im_end|>", 1, tokenizer, "qwen", 64, 1)
    assert two.count(IMAGE) == 1 and two[:15] == [*HEAD_IDS, IMAGE] and two.count(end) == 3


@pytest.mark.parametrize(
    ("written", "left"),
    [
        ("<|image_1|>\nFind it.\n", "Find it.\n"),
        ("<image> Find it", "Find it"),
        ("Find <|image_1|> here", "Find here"),
        ("one\n<image>\ntwo", "one\ntwo"),
        ("Find it: <|image_1|>", "Find it:"),
        ("Find it: <image> \n<image>\n", "Find it:"),
        ("<image>", ""),
        (" no placeholder, nothing changes \n", " no placeholder, nothing changes \n"),
    ],
)
def test_removed_placeholder_leaves_the_text_as_if_never_written(written, left):
    assert remove_placeholders(written) == left


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


@pytest.mark.parametrize("text", ["<image>\nCompare with <image> please", "Compare them, please", "<image> <image>"])
def test_no_length_loses_an_image_or_the_pooled_token(text, tokenizer):
    whole = encode_prompt(text, 2, tokenizer, "qwen", 4096, 16)
    longest = len(whole) - 2 + 16
    shortest = len(HEAD_IDS) + len(TAIL_IDS) + 16
    for max_length in range(shortest, longest + 2):
        ids = encode_prompt(text, 2, tokenizer, "qwen", max_length, 16)
        assert len(ids) - 2 + 16 == min(max_length, longest)
        assert ids.count(IMAGE) == 2 and ids[:14] == HEAD_IDS and ids[-7:] == TAIL_IDS
        words = [token for token in ids[14:-7] if token != IMAGE]
        assert words == [token for token in whole[14:-7] if token != IMAGE][: len(words)]
    with pytest.raises(DataError, match=f"16 visual tokens and 21 of .* raise it to at least {shortest}"):
        encode_prompt(text, 2, tokenizer, "qwen", shortest - 1, 16)


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
