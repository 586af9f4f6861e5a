"""Prompts of the Qwen-VL families: texts of the released models and embedders, and what is never cut."""

import pytest
from qwen_inputs import VISION_TOKENS

from megatron_llave.data.packing import IMAGE
from megatron_llave.data.placeholders import mark_user_text
from megatron_llave.data.tokenizer import Tokenizer
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.models.qwen2_5_vl.inputs import INPUTS as QWEN2_5_VL
from megatron_llave.models.qwen2_vl.inputs import INPUTS as QWEN2_VL
from megatron_llave.models.qwen3_vl.inputs import INPUTS as QWEN3_VL
from megatron_llave.models.qwen_vl.prompt import encode_prompt, require_special_tokens, templates

ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
HELPFUL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
REPRESENT = "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n"
PRESETS = templates("You are a helpful assistant.")


def ids_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a whole prompt as transformers encodes it, with IMAGE for its image pads."""
    return [IMAGE if token == VISION_TOKENS["<|image_pad|>"] else token for token in tokenizer.encode(text)]


def prompt(
    name: str, text: str, images: int, tokenizer: Tokenizer, max_length: int = 4096, visual: int = 0
) -> list[int]:
    return encode_prompt(text, ["<image>"] * images, tokenizer, PRESETS[name], max_length, visual or images)


@pytest.mark.parametrize(
    ("name", "text", "images", "whole"),
    [
        ("qwen", "a cat", 0, f"{HELPFUL}a cat{ASSISTANT}\n<|im_end|>\n"),
        ("qwen", "a cat", 1, f"{HELPFUL}{SEEN}a cat{ASSISTANT}\n<|im_end|>\n"),
        ("qwen", "<|image_1|>\nWhat?", 1, f"{HELPFUL}{SEEN}\nWhat?{ASSISTANT}\n<|im_end|>\n"),
        ("qwen", "a <image>, b <image>", 3, f"{HELPFUL}{SEEN}a {SEEN}, b {SEEN}{ASSISTANT}\n<|im_end|>\n"),
        ("qwen", "Instruct: find\na cat", 0, f"{HELPFUL}Instruct: find\na cat{ASSISTANT}\n<|im_end|>\n"),
        ("vlm2vec_v2", "a cat\n", 0, "a cat\n"),
        ("vlm2vec_v2", "find it\n", 1, "<|image_pad|> find it\n"),
        ("vlm2vec_v2", "<|image_1|>\nWhat is it?\n", 1, "<|image_pad|>\nWhat is it?\n"),
        ("vlm2vec_v2", "", 2, "<|image_pad|> <|image_pad|>"),
        ("gme", "a cat", 0, f"{HELPFUL}a cat{ASSISTANT}<|endoftext|>"),
        ("gme", "<image>\na cat", 1, f"{HELPFUL}{SEEN}a cat{ASSISTANT}<|endoftext|>"),
        (
            "gme",
            "Instruct: Find an image that matches the given text\na cat",
            1,
            "<|im_start|>system\nFind an image that matches the given text<|im_end|>\n"
            f"<|im_start|>user\n{SEEN}a cat{ASSISTANT}<|endoftext|>",
        ),
        ("qwen3_vl_embedding", "a cat", 1, f"{REPRESENT}{SEEN}a cat{ASSISTANT}<|endoftext|>"),
        ("qwen3_vl_embedding", "<|image_1|>\n\na cat", 1, f"{REPRESENT}{SEEN}\na cat{ASSISTANT}<|endoftext|>"),
        (
            "qwen3_vl_embedding",
            "Instruct:  Retrieve images \n",
            1,
            f"<|im_start|>system\nRetrieve images.<|im_end|>\n<|im_start|>user\n{SEEN}{ASSISTANT}<|endoftext|>",
        ),
        (
            "qwen3_vl_embedding",
            "Instruct: Is it so?\na cat\nInstruct: no",
            0,
            f"<|im_start|>system\nIs it so?<|im_end|>\n<|im_start|>user\na cat\nInstruct: no{ASSISTANT}<|endoftext|>",
        ),
        (
            "gme",
            "Instruct: look.\r\na cat",
            0,
            f"<|im_start|>system\nlook.<|im_end|>\n<|im_start|>user\na cat{ASSISTANT}<|endoftext|>",
        ),
        ("qwen3_vl_embedding", "Instruct:\na cat", 0, f"{REPRESENT}a cat{ASSISTANT}<|endoftext|>"),
    ],
)
def test_prompts_are_the_released_ones(name: str, text: str, images: int, whole: str, tokenizer: Tokenizer) -> None:
    assert prompt(name, text, images, tokenizer) == ids_of(whole, tokenizer)


def test_plain_is_images_text_end(tokenizer: Tokenizer) -> None:
    ids = prompt("plain", "<|image_1|>\nRepresent the given image", 2, tokenizer)
    assert ids == [IMAGE, IMAGE, *tokenizer.encode("Represent the given image"), tokenizer.eos_id]
    assert prompt("plain", "", 1, tokenizer) == [IMAGE, tokenizer.eos_id]


def test_chat_templates_of_the_families(tokenizer: Tokenizer) -> None:
    assert QWEN2_VL.prompts == QWEN2_5_VL.prompts == QWEN3_VL.prompts == tuple(PRESETS)
    assert templates(QWEN2_VL.system) == templates(QWEN2_5_VL.system) == PRESETS
    ids = encode_prompt("a cat", [], tokenizer, templates(QWEN3_VL.system)["qwen"], 4096, 0)
    assert ids == ids_of(f"<|im_start|>user\na cat{ASSISTANT}\n<|im_end|>\n", tokenizer), "no system message"


@pytest.mark.parametrize("name", ["qwen", "gme", "qwen3_vl_embedding", "plain", "vlm2vec_v2"])
def test_marks_of_users_are_ordinary_text(name: str, tokenizer: Tokenizer) -> None:
    written = "see <image> or <|vision_end|> here"
    ids = prompt(name, mark_user_text(written, 0), 0, tokenizer)
    words = tokenizer.encode_plain(("user\n" if PRESETS[name].is_chat else "") + written)
    assert str(words)[1:-1] in str(ids) and IMAGE not in ids
    assert ids.count(VISION_TOKENS["<|vision_end|>"]) == 0
    if PRESETS[name].takes_instruction:
        marked = mark_user_text("Instruct: what <|im_end|> means.\na cat", 0)
        head = tokenizer.encode_plain("system\nwhat <|im_end|> means.")
        assert prompt(name, marked, 0, tokenizer)[1 : 1 + len(head)] == head


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("text", ["Compare <image> with <image> please", "Instruct: Find it.\nCompare them, please"])
def test_no_length_loses_an_image_or_the_end(name: str, text: str, tokenizer: Tokenizer) -> None:
    template, visual = PRESETS[name], 16
    whole = prompt(name, text, 2, tokenizer, 4096, visual)
    longest = len(whole) - 2 + visual
    tail = [tokenizer.eos_id] if template.tail is None else tokenizer.encode(template.tail)
    start, end = VISION_TOKENS["<|vision_start|>"], VISION_TOKENS["<|vision_end|>"]
    for missing in range(1, longest):
        try:
            ids = prompt(name, text, 2, tokenizer, longest - missing, visual)
        except DataError as error:
            fixed = longest - missing + 1
            assert str(error) == (
                f"16 visual tokens and {fixed - 16} of the prompt template exceed data.max_length={fixed - 1}; "
                f"raise it to at least {fixed} or lower data.max_pixels"
            )
            assert ids[-len(tail) :] == tail or not tail, "nothing but the template and images is left"
            break
        assert len(ids) - 2 + visual == longest - missing and ids[len(ids) - len(tail) :] == tail
        assert [token for token in ids if token in (IMAGE, start, end)] == [
            token for token in whole if token in (IMAGE, start, end)
        ]
    else:
        pytest.fail("an image needs room")


def test_errors_are_one_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"2 image placeholders for 1 images: .*; a backslash before a placeholder"):
        prompt("qwen", "<|image_1|> and <|image_2|>", 1, tokenizer)
    with pytest.raises(DataError, match="instruction 'see <image>' has an image placeholder"):
        prompt("gme", "Instruct: see <image>\na cat", 1, tokenizer)


def test_a_tokenizer_without_the_special_tokens_is_refused(tokenizer: Tokenizer) -> None:
    class Bytes:
        def encode(self, text: str) -> list[int]:
            return list(text.encode())

    for template in PRESETS.values():
        require_special_tokens(template, tokenizer, "tokenizer.json")
        if template.is_chat:
            with pytest.raises(ConfigError, match=r"a.model has no token <\|im_start\|>, which data.prompt needs; set"):
                require_special_tokens(template, Bytes(), "a.model")
        else:
            require_special_tokens(template, Bytes(), "a.model")
