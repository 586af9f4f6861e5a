"""Exported folders in sentence-transformers and mteb: the vectors of `load_model`, whatever family and prompt."""

import contextlib
import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import tokenizers
import torch
import transformers
from golden_model import ONEVISION
from hf_processors import load_processor, use_processors
from megatron.core.process_groups_config import ProcessGroupCollection
from PIL import Image

from megatron_llave.batch import Side
from megatron_llave.checkpoint.folders import write_manifest
from megatron_llave.convert.hf import export_hf, import_hf
from megatron_llave.embedding.embedder import LoadedModel, load_model
from megatron_llave.models.hf.side_files import SPECIAL_TOKEN

sentence_transformers = pytest.importorskip("sentence_transformers")

pytestmark = pytest.mark.long

QWEN_VL = Path(__file__).parents[1] / "golden" / "qwen_vl"
IDS = {"<|endoftext|>": 500, "<|im_end|>": 501, "<|im_start|>": 502}
IDS |= {"<|image_pad|>": 505, "<|video_pad|>": 506, "<|vision_start|>": 507, "<|vision_end|>": 508}
PICTURE = Image.linear_gradient("L").convert("RGB").resize((100, 60))
TEXT = "Find an image that matches the caption: a red square."


def write_tokenizer(folder: Path, ids: dict[str, int]) -> None:
    """A tokenizer.json with one id per byte and special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    spec = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])).to_str())
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec["decoder"] = spec["pre_tokenizer"]
    spec["model"]["vocab"] |= ids
    spec["added_tokens"] = [{"id": i, "content": token, **SPECIAL_TOKEN} for token, i in ids.items()]
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def trained(family: str, prompt: str, folder: Path, groups: ProcessGroupCollection, *changes: tuple[str, str]) -> Path:
    """The checkpoint of a run with this prompt, with the family's golden weights."""
    source = shutil.copytree(ONEVISION if family == "llava_onevision" else QWEN_VL / family, folder / "source")
    write_tokenizer(source, dict(list(IDS.items())[:3]) if family == "llava_onevision" else IDS)
    checkpoint = import_hf(source, folder / "checkpoint", groups)
    config = checkpoint / "config.yaml"
    text = config.read_text()
    for old, new in ((r"prompt: \w+", f"prompt: {prompt}"), (r"\n  steps: 0", "\n  steps: 1"), *changes):
        text, count = re.subn(old, new, text)
        assert count == 1, old
    config.write_text(text)
    write_manifest(checkpoint, step=0, layout=None)
    return checkpoint


def side(text: str, image: Image.Image | None = None) -> Side:
    """An input as `load_model` takes it."""
    if image is None:
        return Side(text, [])
    image.save(stored := io.BytesIO(), "PNG")
    return Side(text, [stored.getvalue()])


def assert_same(found: object, right: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(found), right, atol=tolerance, rtol=0)


def loaded(folder: Path) -> sentence_transformers.SentenceTransformer:
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


QUICK = [
    *(("llava_onevision", "qwen"), ("qwen2_vl", "qwen"), ("qwen2_vl", "gme"), ("qwen2_vl", "vlm2vec_v2")),
    *(("qwen2_5_vl", "plain"), ("qwen3_vl", "qwen3_vl_embedding")),
]
PROMPTS = {
    "llava_onevision": ("qwen", "plain"),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), ("qwen", "plain", "vlm2vec_v2", "gme", "qwen3_vl_embedding")
    ),
}
OTHERS = [(family, prompt) for family in PROMPTS for prompt in PROMPTS[family] if (family, prompt) not in QUICK]
INSTRUCTION = "Find what a cafe sells"


@pytest.mark.parametrize(
    ("family", "prompt"), [*QUICK, *(pytest.param(*both, marks=pytest.mark.slow) for both in OTHERS)]
)
def test_vectors_are_those_of_load_model(
    family: str, prompt: str, groups: ProcessGroupCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images too: the Pillow processors, which transformers has without torchvision, make the same pixels as we do."""
    use_processors(monkeypatch)
    checkpoint, out = trained(family, prompt, tmp_path, groups), tmp_path / "out"
    assert export_hf(checkpoint, out, groups) == []
    ours, theirs = load_model(checkpoint), loaded(out)
    takes_instruction = prompt in ("gme", "qwen3_vl_embedding")
    texts = [TEXT, "caf\u00e9 " * 50, " a-b  c\n", INSTRUCTION]
    expected = torch.stack([ours.embed(side(text)) for text in texts])
    assert_same(theirs.encode(texts), expected)  # in one batch, which is padded
    given = f"Instruct: {INSTRUCTION}\n{TEXT}" if takes_instruction else INSTRUCTION + TEXT
    assert_same(theirs.encode(TEXT, prompt=INSTRUCTION), ours.embed(side(given)))
    assert_same(theirs.encode_query(TEXT), expected[0])
    assert_same(theirs.encode_document(TEXT), expected[0])
    check_what_vllm_reads(out)
    check_messages(out, ours, has_images=prompt != "vlm2vec_v2")
    if prompt == "vlm2vec_v2":
        parts = [{"type": "image", "image": PICTURE}, {"type": "text", "text": TEXT}]
        for given, words in (
            ({"image": PICTURE}, "'image' is not supported"),
            ({"image": PICTURE, "text": TEXT}, "is not supported"),
            ([[{"role": "user", "content": parts}]], "visual tokens had the positions of texts"),
        ):
            with pytest.raises(Exception, match=words):
                theirs.encode(given)
        return
    assert_same(theirs.encode({"image": PICTURE}), ours.embed(side("", PICTURE)))
    tall = PICTURE.resize((40, 150))  # images of several shapes and a text in one batch
    batch = theirs.encode([{"text": TEXT, "image": PICTURE}, {"image": tall, "text": "x"}, TEXT])
    assert_same(batch, torch.stack([ours.embed(each) for each in (side(TEXT, PICTURE), side("x", tall), side(TEXT))]))
    assert_same(theirs.encode({"image": PICTURE}, prompt=INSTRUCTION), ours.embed(side(with_image(given), PICTURE)))


def with_image(given: str) -> str:
    """The text of an input with an instruction whose own text is empty."""
    return given.removesuffix(TEXT)


def check_messages(out: Path, ours: LoadedModel, has_images: bool) -> None:
    """`apply_chat_template` of a user's message alone, and transformers' own model, give the vector."""
    processor = load_processor(out)
    model = transformers.AutoModel.from_pretrained(out).eval()
    contents = {TEXT: side(TEXT)}
    parts = [{"type": "image", "image": PICTURE}, {"type": "text", "text": TEXT}]
    for content, right in [*contents.items(), *([(parts, side(TEXT, PICTURE))] if has_images else [])]:
        for begun in (False, True):
            messages = [{"role": "user", "content": content}]
            inputs = processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=begun
            )
            with torch.no_grad():
                state = model(**inputs).last_hidden_state[0, -1]
            cosine = torch.nn.functional.cosine_similarity(state, ours.embed(right), dim=0)
            assert abs(float(cosine) - 1) < 1e-5, (content, begun)


@pytest.mark.parametrize(
    ("family", "prompt"), [("qwen2_vl", "plain"), pytest.param("qwen3_vl", "gme", marks=pytest.mark.slow)]
)
def test_an_export_that_is_imported_and_exported_keeps_its_prompt(
    family: str, prompt: str, groups: ProcessGroupCollection, tmp_path: Path
) -> None:
    """Of weights that no run has trained since, only the chat template says which prompt they need."""
    export_hf(trained(family, prompt, tmp_path, groups), tmp_path / "out", groups)
    export_hf(import_hf(tmp_path / "out", tmp_path / "again", groups), tmp_path / "back", groups)
    for name in ("chat_template.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        assert (tmp_path / "back" / name).read_text() == (tmp_path / "out" / name).read_text(), name


@pytest.mark.parametrize("family", [pytest.param("llava_onevision", marks=pytest.mark.slow), "qwen2_vl"])
def test_a_chat_template_of_others_is_kept_and_not_used(
    family: str, groups: ProcessGroupCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights that were only converted: sentence-transformers has the template of embeddings for itself."""
    use_processors(monkeypatch)
    trained(family, "qwen", tmp_path, groups)
    template = {"chat_template": "theirs <image> {{ messages[0]['content'] }}"}
    (tmp_path / "source" / "chat_template.json").write_text(json.dumps(template))
    export_hf(import_hf(tmp_path / "source", tmp_path / "again", groups), tmp_path / "out", groups)
    assert json.loads((tmp_path / "out" / "chat_template.json").read_text()) == template
    assert "vllm serve" not in (tmp_path / "out" / "README.md").read_text()
    assert_same(loaded(tmp_path / "out").encode(TEXT), load_model(tmp_path / "out").embed(side(TEXT)))


def test_long_inputs_are_not_cut(
    groups: ProcessGroupCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut from the right would remove the end of the prompt of an input with an image, and pool another token."""
    use_processors(monkeypatch)
    checkpoint, out = trained("qwen2_vl", "qwen", tmp_path, groups), tmp_path / "out"
    export_hf(checkpoint, out, groups)
    ours, theirs = load_model(checkpoint), loaded(out)
    theirs.max_seq_length = 100
    assert_same(theirs.encode(TEXT * 5), ours.embed(side(TEXT * 5)))
    assert_same(theirs.encode({"image": PICTURE, "text": TEXT * 5}), ours.embed(side(TEXT * 5, PICTURE)))
    # Who asks for a cut gets that of this package, of a text.
    cut = {"text": {"truncation": True, "max_length": 100}}
    shorter = load_model(checkpoint, ["data.max_length=100"])
    assert_same(theirs.encode(TEXT * 5, processing_kwargs=cut), shorter.embed(side(TEXT * 5)))
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        theirs.encode(
            {"image": PICTURE, "text": TEXT}, processing_kwargs={"text": {"truncation": True, "max_length": 20}}
        )


def test_several_images_of_an_input(
    groups: ProcessGroupCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers has no tiles for them in llava_onevision, so that they are refused; Qwen-VL has them as they are."""
    use_processors(monkeypatch)
    for family in ("llava_onevision", "qwen2_vl"):
        folder = tmp_path / family
        folder.mkdir()
        checkpoint, out = trained(family, "qwen", folder, groups), folder / "out"
        export_hf(checkpoint, out, groups)
        parts = [{"type": "image", "image": PICTURE}] * 2 + [{"type": "text", "text": TEXT}]
        message, theirs = [{"role": "user", "content": parts}], loaded(out)
        if family == "llava_onevision":
            with pytest.raises(Exception, match="give one image in each input"):
                theirs.encode([message])
        else:
            both = Side(TEXT, side("", PICTURE).images * 2)
            assert_same(theirs.encode([message])[0], load_model(checkpoint).embed(both))


def check_what_vllm_reads(out: Path) -> None:
    """vLLM 0.33: names in modules.json, and a loop over message['content'], by which it gives content in parts."""
    modules = json.loads((out / "modules.json").read_text())
    kinds = {module["type"].removeprefix("sentence_transformers.models."): module["path"] for module in modules}
    assert kinds.keys() == {"Transformer", "Pooling", "Normalize"}
    pooling = json.loads((out / kinds["Pooling"] / "config.json").read_text())
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_lasttoken"]
    for file in ("chat_template.json", "tokenizer_config.json"):
        template = json.loads((out / file).read_text())["chat_template"]
        loops = [node.iter for node in jinja2.Environment().parse(template).find_all(jinja2.nodes.For)]
        keys = [node.arg.value for node in loops if isinstance(node, jinja2.nodes.Getitem)]
        assert "content" in keys, "vLLM would write images into the text itself"


class StandInForVllm:
    """vLLM's LLM as far as a card uses it, by transformers' model; vLLM itself needs a GPU."""

    def __init__(self, folder: str, runner: str, max_model_len: int) -> None:
        assert runner == "pooling" and max_model_len == 4096
        self.processor, self.model = load_processor(folder), transformers.AutoModel.from_pretrained(folder).eval()

    def embed(self, prompts: list[str | dict]) -> list[SimpleNamespace]:
        return [SimpleNamespace(outputs=SimpleNamespace(embedding=self._embed(prompt))) for prompt in prompts]

    def _embed(self, prompt: str | dict) -> list[float]:
        prompt = {"prompt": prompt} if isinstance(prompt, str) else prompt
        image = prompt.get("multi_modal_data", {}).get("image")
        images = None if image is None else [image]
        with torch.no_grad():
            inputs = self.processor(text=[prompt["prompt"]], images=images, return_tensors="pt")
            state = self.model(**inputs).last_hidden_state[0, -1]
        return torch.nn.functional.normalize(state, dim=0).tolist()


CARDS = [
    *(("llava_onevision", "plain"), ("qwen2_vl", "vlm2vec_v2")),
    *(pytest.param(*both, marks=pytest.mark.slow) for both in (("qwen3_vl", "gme"), ("qwen2_5_vl", "qwen"))),
]


@pytest.mark.parametrize(("family", "prompt"), CARDS)
def test_the_code_of_a_card_runs_as_printed(
    family: str, prompt: str, groups: ProcessGroupCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_processors(monkeypatch)
    dims = (r"matryoshka_dims: \[\]", "matryoshka_dims: [8, 32]")
    checkpoint, out = trained(family, prompt, tmp_path, groups, dims), tmp_path / "out"
    export_hf(checkpoint, out, groups)
    monkeypatch.chdir(out)
    card, ours = Path("README.md").read_text(), load_model(checkpoint)
    assert "first 8, 32 numbers" in card and "truncate_dim=8)" in card
    assert json.loads(Path("config.json").read_text())["matryoshka_dimensions"] == [8, 32]  # which vLLM reads
    cut = sentence_transformers.SentenceTransformer(".", truncate_dim=8, device="cpu").encode(TEXT)
    assert_same(cut, ours.embed(side(TEXT))[:8])
    codes = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    query = ours.embed(side("Find an image that matches the caption: a red square on white."))
    image = ours.embed(side("Represent the given image.", Image.new("RGB", (64, 48), "red")))
    target = ours.embed(side("A red square on white.")) if prompt == "vlm2vec_v2" else image
    names = [run(code, monkeypatch, tmp_path) for code in codes]
    for found, right in ((names[0], image), (names[1], target)):
        assert_same(found["query"], query)
        assert_same(found["target"], right)
    assert names[2]["results"].task_results and not names[2]["results"].exceptions
    assert_same(names[3]["first"], query)
    assert_same(names[3]["second"], target)


def run(code: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict:
    """Run code of a card, with tasks of mteb that need no download, and with a stand-in for vLLM."""
    mteb = pytest.importorskip("mteb")
    from mteb.mocks.mock_run import ALL_MOCK_TASK_TEST_GRID

    wanted = {"MockSTSTask", *(["MockAny2AnyRetrievalI2TTask"] if "MIEB" in code else [])}
    given = [task for task in ALL_MOCK_TASK_TEST_GRID if type(task).__name__ in wanted]
    assert len(given) == len(wanted)
    monkeypatch.setenv("MTEB_CACHE", str(folder / "mteb"))
    monkeypatch.setattr(mteb, "get_benchmark", lambda name: given)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=StandInForVllm))
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.mark.slow
def test_mteb_runs_all_its_tasks_of_texts_and_images(
    groups: ProcessGroupCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mteb = pytest.importorskip("mteb")
    use_processors(monkeypatch)
    checkpoint, out = trained("qwen2_vl", "qwen", tmp_path, groups), tmp_path / "out"
    export_hf(checkpoint, out, groups)
    model = mteb.SentenceTransformerEncoderWrapper(str(out))
    update = {"name": "local/model", "modalities": ["text", "image"]}
    model.mteb_model_meta = model.mteb_model_meta.model_copy(update=update)
    results = mteb.mock_run(model).task_results
    assert sum(type(result).__name__ == "TaskResult" for result in results.values()) == 43, results
