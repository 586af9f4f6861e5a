"""Side files of exported folders, read by transformers: tokenizer, processor, and the model card's own code.

The tokenizer is a byte-level BPE of about 300 tokens learned here; the model is random.
"""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hf_processors import load_processor, use_processors
from PIL import Image
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import (
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Tokenizer,
)

from megatron_llave.batch import Side
from megatron_llave.data.packing import IMAGE
from megatron_llave.data.tokenizer import Tokenizer as OurTokenizer
from megatron_llave.data.tokenizer import load_tokenizer
from megatron_llave.embedding.embedder import LoadedModel, load_model
from megatron_llave.errors import CheckpointError
from megatron_llave.models import read_hf_config
from megatron_llave.models.hf.side_files import SIDE_FILES, keep_side_files, make_tokenizer_json
from megatron_llave.models.llava_onevision.hf_config import build_config_json
from megatron_llave.models.llava_onevision.hf_files import write_side_files
from megatron_llave.models.llava_onevision.prompt import (
    QWEN_HEAD,
    QWEN_TAIL,
    encode_prompt,
    qwen_prompt,
    user_content,
)

GOLDEN = Path(__file__).parents[2] / "golden"
CORPUS = ["system user assistant You are a helpful assistant.", "Find an image that matches the caption", "1234 a-b c"]
TEXTS = [
    "You're helpful: caf\u00e9 = cafe\u0301, 12345 tokens!",
    "line\n\n  two \r\n\tthree   ",
    qwen_prompt("<image>\nFind it's <|endoftext|> now"),
    "\u4f60\u597d \U0001f600 A-b_c",
]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as LLaVA-NeXT leaves it: vocab.json, merges.txt, and the special tokens beside them."""
    folder = tmp_path_factory.mktemp("parts")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS * 4, vocab_size=290, min_frequency=2, show_progress=False)
    trained.save_model(str(folder))
    size = trained.get_vocab_size()
    assert 256 < size <= 290
    decoder = {
        str(size + i): {"content": token, "special": True, "normalized": False} for i, token in enumerate(SPECIAL)
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": decoder,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "chat_template": "{{ messages }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "added_tokens.json").write_text(json.dumps({token: size + i for i, token in enumerate(SPECIAL)}))
    return folder


@pytest.fixture(scope="module")
def config() -> dict:
    """config.json of the tiny fixture, whose image token is the last of its 512 rows."""
    found = read_hf_config(GOLDEN / "hf_tiny")
    return build_config_json(found.model, "llava_onevision", False, "float32", found)


@pytest.fixture(scope="module")
def exported(parts: Path, config: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder: side files and random weights."""
    out = tmp_path_factory.mktemp("exported")
    assert write_side_files(out, "llava_onevision", config, parts, None) == []
    torch.manual_seed(0)
    written = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig.from_pretrained(out))
    model.save_pretrained(out)
    for name, content in written.items():  # what we wrote, not what transformers makes of it
        (out / name).write_bytes(content)
    return out


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_made_of_its_parts_is_qwen2s(text: str, parts: Path, tmp_path: Path) -> None:
    theirs = Qwen2Tokenizer.from_pretrained(parts)
    (tmp_path / "tokenizer.json").write_text(make_tokenizer_json(parts), encoding="utf-8")
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(text) == theirs.encode(text)
    decoded = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(
        theirs.encode(text), skip_special_tokens=False
    )
    assert decoded == theirs.decode(theirs.encode(text))


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_and_we_read_the_same_tokenizer(text: str, parts: Path, exported: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(exported), load_tokenizer(exported / "tokenizer.json")
    assert isinstance(theirs, Qwen2Tokenizer)
    assert theirs.encode(text) == ours.encode(text)
    without = Qwen2Tokenizer.from_pretrained(parts)
    if "<image>" not in text:
        assert theirs.encode(text) == without.encode(text), "two more tokens must not change the others"
    assert theirs.eos_token == "<|im_end|>"


def test_image_and_video_are_tokens(config: dict, exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = {"<image>": config["image_token_index"], "<video>": config["video_token_index"]}
    assert ids == {"<image>": 511, "<video>": 510}  # behind a gap of some 220 ids
    for token, token_id in ids.items():
        assert tokenizer.encode(token) == [token_id]
        assert load_tokenizer(exported / "tokenizer.json").encode(f"a{token}b")[1] == token_id
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    assert settings["added_tokens_decoder"]["511"]["content"] == "<image>"
    assert json.loads((exported / "added_tokens.json").read_text())["<video>"] == 510


def test_processor(config: dict, exported: Path) -> None:
    processor = load_processor(exported)
    assert (processor.image_token, processor.image_token_id, processor.video_token_id) == ("<image>", 511, 510)
    assert (processor.num_image_tokens, processor.vision_aspect_ratio) == (16, "anyres_max_9")
    assert processor.vision_feature_select_strategy == "full"
    images = processor.image_processor
    assert images.image_grid_pinpoints == config["image_grid_pinpoints"]
    assert dict(images.size) == {"height": 56, "width": 56}
    assert list(images.image_mean) == list(images.image_std) == [0.5] * 3
    assert (images.resample, images.do_pad, images.do_convert_rgb) == (Image.Resampling.BICUBIC, True, True)
    made = processor(text="<image>", images=Image.new("RGB", (112, 50)), return_tensors="pt")
    assert made["pixel_values"].shape == (1, 3, 3, 56, 56)  # base and two tiles side by side
    assert made["pixel_values"].amin() == -1  # black, of mean and deviation 0.5
    count = 16 + 4 * (8 + 1)  # base; 4 rows of 8 patches and a newline
    assert made["input_ids"].tolist() == [[511] * count]


@pytest.mark.parametrize("text", ["", "Describe it.\n"])
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_chat_template_is_the_prompt(text: str, num_images: int, exported: Path) -> None:
    content = [{"type": "text", "text": text}, *[{"type": "image"}] * num_images]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "\n"}]
    expected = qwen_prompt(user_content(text, num_images))
    processor = load_processor(exported)
    assert processor.apply_chat_template(messages) == expected
    assert processor.apply_chat_template(messages[:1]) == expected
    assert processor.apply_chat_template(messages[:1], add_generation_prompt=True) == expected
    own = {"role": "system", "content": "Be brief."}
    assert processor.apply_chat_template([own]) == "<|im_start|>system\nBe brief.<|im_end|>\n"


IMAGE_PART = {"type": "image"}
INPUTS = {
    "text": ("You're helpful \u00e9", "You're helpful \u00e9", 0),
    "text in a list": ([{"type": "text", "text": " a-b  c\n"}], " a-b  c\n", 0),
    "image": ([IMAGE_PART], "", 1),
    "image and text": ([IMAGE_PART, {"type": "text", "text": "Find it"}], "Find it", 1),
    "text and two images": ([{"type": "text", "text": "Both"}, IMAGE_PART, IMAGE_PART], "Both", 2),
    "image in a text": ("<image>\nFind it", "<image>\nFind it", 1),
    "image inside a text": ([IMAGE_PART, {"type": "text", "text": "Is <image> it? "}], "Is <image> it? ", 1),
}


@pytest.fixture(scope="module", params=["qwen", "plain"])
def trained(
    request: pytest.FixtureRequest, parts: Path, config: dict, exported: Path, groups: object
) -> tuple[Path, LoadedModel]:
    """The folder of a model that a run with this prompt trained from one with another chat template, and our model."""
    source = shutil.copytree(parts, exported.parent / f"{request.param}-source")
    (source / "chat_template.json").write_text('{"chat_template": "theirs <image>"}')
    out = exported.parent / request.param
    out.mkdir()
    write_side_files(out, "llava_onevision", config, source, f"data:\n  prompt: {request.param}\n")
    (out / "model.safetensors").symlink_to(exported / "model.safetensors")
    return out, load_model(out, [f"data.prompt={request.param}"])


@pytest.mark.parametrize("name", INPUTS)
def test_chat_template_gives_our_ids_and_our_vector(name: str, trained: tuple[Path, LoadedModel]) -> None:
    folder, ours = trained
    content, text, num_images = INPUTS[name]
    images = [Image.linear_gradient("L").convert("RGB").resize((100, 60 + 50 * index)) for index in range(num_images)]
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files):
        image.save(file, "PNG")
    side = Side(text, [file.getvalue() for file in files])
    encoded, layouts = ours.encoder.encode(side), iter(ours.encoder.encode(side).layouts)
    expected = [id for token in encoded.tokens for id in ([511] * len(next(layouts)) if token == IMAGE else [token])]

    processor, messages = load_processor(folder), [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages)
    assert prompt == processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == processor.tokenizer.apply_chat_template(messages, tokenize=False)
    inputs = processor(text=prompt, images=images or None, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == expected

    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        state = model.model(**inputs).last_hidden_state[0, -1]
    vector = torch.nn.functional.normalize(state, dim=0)
    torch.testing.assert_close(vector, ours.embed(side), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prompt", ["qwen", "plain"])
def test_tokenizer_of_llava_qwen_has_the_prompt_too(prompt: str, parts: Path, tmp_path: Path) -> None:
    source, ours = tmp_path / "source", load_tokenizer_of_parts(parts, tmp_path)
    shutil.copytree(parts, source)
    (source / "chat_template.jinja").write_text("text only")
    out = tmp_path / "out"
    out.mkdir()
    raw = read_hf_config(GOLDEN / "hf_tiny_llava_qwen").raw
    write_side_files(out, "llava_qwen", raw, source, f"data:\n  prompt: {prompt}\n")
    theirs = AutoTokenizer.from_pretrained(out)
    for content, text, num_images in INPUTS.values():
        messages = [{"role": "user", "content": content}]
        for begun in (False, True):
            written = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=begun)
            if prompt == "qwen":
                assert written == qwen_prompt(user_content(text, num_images))
            if num_images == 0:
                assert theirs.encode(written) == encode_prompt(text, 0, ours, prompt, 1000, 0)


def load_tokenizer_of_parts(parts: Path, folder: Path) -> OurTokenizer:
    (folder / "tokenizer.json").write_text(make_tokenizer_json(parts), encoding="utf-8")
    return load_tokenizer(folder / "tokenizer.json")


def test_embedding_as_the_guide_says(trained: tuple[Path, LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, ours = trained
    monkeypatch.chdir(folder.parent)
    Image.linear_gradient("L").convert("RGB").resize((100, 60)).save("photo.png")
    guide = (Path(__file__).parents[3] / "docs/conversion.md").read_text()
    code, *others = re.findall(r"```python[^\n]*\n(.*?)```", guide, re.DOTALL)
    card = (folder / "README.md").read_text()
    assert len(others) == 2 and all(other.replace('"OUT"', '"."') in card for other in others)
    use_processors(monkeypatch)
    names: dict = {}
    exec(compile(code.replace('"OUT"', repr(str(folder))), "conversion.md", "exec"), names)
    expected = ours.embed({"text": "Represent the given image.", "image": Path("photo.png")})
    torch.testing.assert_close(names["vector"], expected, atol=1e-5, rtol=0)


def test_model_card_runs(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (exported / "README.md").read_text()
    code, *_ = re.findall(r"```python\n(.*?)```", card, re.DOTALL)  # test_sentence_transformers.py runs the others
    monkeypatch.chdir(exported)
    use_processors(monkeypatch)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), names)
    assert (names["HEAD"], names["TAIL"]) == (QWEN_HEAD, QWEN_TAIL)
    assert -1.001 <= float(printed.getvalue()) <= 1.001

    model, tokenizer = names["model"], names["processor"].tokenizer
    ids = torch.tensor([tokenizer.encode(qwen_prompt(user_content("a text", 0)))])
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    expected = torch.nn.functional.normalize(states[0, -1], dim=0)
    torch.testing.assert_close(names["embed"]("a text"), expected, atol=1e-6, rtol=0)

    picture = Image.linear_gradient("L").convert("RGB").resize((100, 60))
    with_image = names["embed"]("a text", picture)
    assert with_image.shape == (64,)
    torch.testing.assert_close(with_image.norm(), torch.tensor(1.0), atol=1e-6, rtol=0)
    assert not torch.allclose(with_image, names["embed"]("a text"), atol=1e-3)
    assert not torch.allclose(with_image, names["embed"]("a text", picture.rotate(180)), atol=1e-3)


def test_files_of_each_layout(parts: Path, config: dict, exported: Path, tmp_path: Path) -> None:
    common = {"README.md", "config.json", "generation_config.json", "tokenizer.json"} | {
        path.name for path in parts.iterdir()
    }
    processor = {"preprocessor_config.json", "processor_config.json", "chat_template.json"}
    sentence = {"modules.json", "1_Pooling", "sentence_bert_config.json", "config_sentence_transformers.json"}
    assert {path.name for path in exported.iterdir()} == common | processor | sentence | {"model.safetensors"}
    assert json.loads((exported / "config.json").read_text()) == config
    found = read_hf_config(GOLDEN / "hf_tiny_llava_qwen")
    assert write_side_files(tmp_path, "llava_qwen", found.raw, parts, None) == []
    assert {path.name for path in tmp_path.iterdir()} == common
    for path in parts.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "config.json").read_text()) == found.raw
    special = {"bos_token_id": 501, "eos_token_id": 502, "pad_token_id": 500}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == special
    card = (tmp_path / "README.md").read_text()
    assert "```python" not in card and "library_name" not in card and "- llava_qwen" in card and repr(QWEN_TAIL) in card


def test_an_export_gives_back_what_was_kept(exported: Path, config: dict, tmp_path: Path) -> None:
    source, kept, out = (tmp_path / name for name in ("source", "kept", "out"))
    for folder in (source, kept, out):
        folder.mkdir()
    for name in (*SIDE_FILES, "config.json"):
        if (exported / name).is_file():
            shutil.copyfile(exported / name, source / name)
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (source / "chat_template.json").write_text('{"chat_template": "theirs <image>"}')
    (source / "video_preprocessor_config.json").write_text('{"do_sample_frames": true}')
    (source / "pytorch_model.bin").write_bytes(b"never read")
    keep_side_files(source, kept)
    assert {path.name for path in kept.iterdir()} == {path.name for path in source.iterdir()} - {"pytorch_model.bin"}
    write_side_files(out, "llava_onevision", config, kept, None)
    for path in kept.iterdir():
        assert (out / path.name).read_text() == path.read_text(), path.name
    other = tmp_path / "other"
    other.mkdir()
    write_side_files(other, "llava_qwen", read_hf_config(GOLDEN / "hf_tiny_llava_qwen").raw, kept, None)
    names = {path.name for path in other.iterdir()}
    assert not {"chat_template.json", "video_preprocessor_config.json", "processor_config.json"} & names


def test_template_of_a_tokenizer_gives_way_to_the_processors(parts: Path, config: dict, tmp_path: Path) -> None:
    source = shutil.copytree(parts, tmp_path / "source")
    (source / "chat_template.jinja").write_text("text only")
    for layout, kept in (("llava_qwen", True), ("llava_onevision", False)):
        out = tmp_path / layout
        out.mkdir()
        write_side_files(out, layout, config, source, None)
        assert (out / "chat_template.jinja").is_file() == kept
        assert (out / "chat_template.json").is_file() != kept


def test_tokenizer_json_alone_is_enough(parts: Path, config: dict, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "tokenizer.json").write_text(make_tokenizer_json(parts), encoding="utf-8")
    assert write_side_files(out, "llava_onevision", config, source, None) == []
    tokenizer = load_processor(out).tokenizer
    for text in TEXTS:
        assert tokenizer.encode(text) == load_tokenizer(out / "tokenizer.json").encode(text)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize("with_model", [False, True])
def test_without_tokenizer_there_is_no_processor(with_model: bool, config: dict, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    if with_model:
        (source / "tokenizer.model").write_bytes(b"a SentencePiece model")
    (note,) = write_side_files(out, "llava_onevision", config, source if with_model else None, None)
    names = {"README.md", "config.json", "generation_config.json"}
    assert {path.name for path in out.iterdir()} == names | ({"tokenizer.model"} if with_model else set())
    card = (out / "README.md").read_text()
    assert note in card and "```python" not in card and repr(QWEN_HEAD) in card


def test_card_has_the_prompt_of_the_run(config: dict, tmp_path: Path) -> None:
    """How it was trained follows in convert/training_record.py, whose tests compare it."""
    for training in (None, "data:\n  prompt: qwen\nloss:\n  alpha: 9.0\n"):
        write_side_files(tmp_path, "llava_onevision", config, None, training)
        card = (tmp_path / "README.md").read_text()
        assert "end-of-sequence" not in card and "im_start" in card and "## Training" not in card
    write_side_files(tmp_path, "llava_onevision", config, None, training.replace("qwen", "plain"))
    card = (tmp_path / "README.md").read_text()
    assert "end-of-sequence" in card and "im_start" not in card
    header = card.split("---")[1]
    assert "pipeline_tag: feature-extraction" in header and "base_model" not in header


@pytest.mark.parametrize(
    ("name", "known"), [("lmms-lab/llava-onevision-qwen2-0.5b-ov", True), ("runs/checkpoint", False), (7, False)]
)
def test_card_names_the_base_model(name: str, known: bool, config: dict, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "config.json").write_text(json.dumps(config | {"_name_or_path": name}))
    write_side_files(out, "llava_onevision", config, source, None)
    assert (f"base_model: {name}\n" in (out / "README.md").read_text()) == known


def test_tokens_that_contradict_config_json(parts: Path, config: dict, tmp_path: Path) -> None:
    ids = Tokenizer.from_str(make_tokenizer_json(parts)).get_vocab()
    outs = [tmp_path / name for name in ("taken", "elsewhere", "unigram")]
    for out in outs:
        out.mkdir()
    taken = config | {"image_token_index": ids["<|im_end|>"]}
    with pytest.raises(CheckpointError, match=rf"'<image>' must have the id {ids['<|im_end|>']}.*is '<\|im_end\|>'"):
        write_side_files(outs[0], "llava_onevision", taken, parts, None)
    source = shutil.copytree(parts, tmp_path / "source")
    settings = json.loads((parts / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"]["400"] = {"content": "<image>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="'<image>' must have the id 511, as config.json says, but has 400"):
        write_side_files(outs[1], "llava_onevision", config, source, None)
    spec = {"added_tokens": [], "model": {"type": "Unigram", "vocab": [["a", 0.0]]}}
    (source / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match="cannot take <image>"):
        write_side_files(outs[2], "llava_onevision", config, source, None)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("merges.txt", "a b c d\n", "vocab.json and merges.txt"),
        ("vocab.json", "{", "vocab.json and merges.txt"),
        ("added_tokens.json", "[]", "added_tokens.json holds a list"),
        ("added_tokens.json", '{"<a>": 0}', "'<a>' must have the id 0, as added_tokens.json says, but that is '!'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<a>"}}}', "no list of added tokens"),
        ("added_tokens.json", '{"<a>": 999, "<b>": 999}', "'<b>' must have the id 999.*but that is '<a>'"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
    ],
)
def test_damaged_tokenizer(name: str, content: str, word: str, parts: Path, tmp_path: Path) -> None:
    source = shutil.copytree(parts, tmp_path / "source")
    (source / name).write_text(content)
    with pytest.raises(CheckpointError, match=word) as caught:
        make_tokenizer_json(source)
    assert "\n" not in str(caught.value)
