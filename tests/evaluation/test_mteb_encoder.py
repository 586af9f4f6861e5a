"""The encoder for mteb as far as it needs no mteb: blocks, image files, texts; tests/distributed has the rest."""

import argparse
import io
import pickle
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from megatron_llave.config.schema import RunConfig
from megatron_llave.embedding.inputs import Input
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation import mteb_encoder
from megatron_llave.evaluation.benchmarks import mteb
from megatron_llave.evaluation.mteb_encoder import ImageFile, blocks, image_bytes
from megatron_llave.evaluation.mteb_instructions import Instructions


def test_blocks_end_at_their_cost_and_at_their_bytes(monkeypatch):
    monkeypatch.setattr(mteb_encoder, "BLOCK_PARTS", 1)
    monkeypatch.setattr(mteb_encoder.parts, "PART_COST", 20)
    texts = [Input(str(number)) for number in range(50)]
    found = list(blocks(iter(texts), "task"))
    assert [(block.first, len(block)) for block in found] == [(0, 20), (20, 20), (40, 10)]
    assert [entry for block in found for entry in block.entries] == texts
    assert [len(block) for block in blocks([Input("", (b"x",))] * 5, "task")] == [2, 2, 1]
    monkeypatch.setattr(mteb_encoder, "BLOCK_BYTES", 1)
    assert [len(block) for block in blocks([Input("", (b"x",))] * 5, "task")] == [1] * 5


def test_a_block_is_named_after_its_content():
    one, same, other = (
        [*blocks([Input(text, (image,))], "task")][0] for text, image in [("a", b"b"), ("a", b"b"), ("a", b"c")]
    )
    assert one.name == same.name != other.name and one.name.startswith("task-")
    assert next(iter(one)).startswith(f"{one.name} 0 ")
    image = ImageFile(b"x" * 1000)
    assert image == b"x" * 1000 and len(repr(image)) < 80 and repr(image) != repr(ImageFile(b"y" * 1000))
    assert pickle.loads(pickle.dumps(Input("", (image,)))).images == (image,)


@pytest.mark.parametrize(
    ("mode", "kept"), [("RGB", "RGB"), ("L", "L"), ("RGBA", "RGBA"), ("CMYK", "RGB"), ("F", "RGB")]
)
def test_pillow_images_become_png(mode, kept):
    image = Image.new(mode, (3, 2), 7 if mode in "LF" else tuple(range(len(mode))))
    again = Image.open(io.BytesIO(image_bytes(image)))
    assert (again.mode, again.size) == (kept, (3, 2))
    assert again.tobytes() == image.convert(kept).tobytes()


def test_stored_images_keep_their_bytes(tmp_path):
    (tmp_path / "x.png").write_bytes(b"stored")
    assert image_bytes({"bytes": b"here", "path": None}) == b"here"
    assert image_bytes({"bytes": None, "path": str(tmp_path / "x.png")}) == b"stored"
    with pytest.raises(DataError, match="an image of type int"):
        image_bytes(3)


def test_texts_of_inputs():
    plain = Instructions()
    assert plain.text("Find it", "a <image>", False) == "Find it\na \\<image>"
    assert plain.text("", "", True) == "Represent the given image." and plain.text("Find it", "", True) == "Find it"
    assert plain.text("", "", False) == " " and plain.text("", "a", True) == "a"
    cfg = RunConfig()
    assert Instructions.of(cfg) == plain
    cfg.data.prompt = "gme"
    assert Instructions.of(cfg).text("Find\nit", "x", False) == "Instruct: Find it\nx"
    assert Instructions.of(cfg).text("", "", True) == ""


def test_documents_have_only_instructions_that_are_meant_for_them():
    task = SimpleNamespace(name="T", type="Retrieval", prompt={"query": "q", "document": "d"})
    assert Instructions().for_document(task) == "d"
    assert Instructions(uses_tasks=False).for_document(task) == ""
    assert Instructions({"document": "all"}).for_document(task) == "all"
    assert Instructions({"document": "all", "Retrieval": {"document": "kind"}}).for_document(task) == "kind"
    assert Instructions({"T": "for queries"}).for_document(SimpleNamespace(name="T", type="", prompt="q")) == ""


def test_missing_packages_are_named_and_overrides_behind_tasks_are_found(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    args = argparse.Namespace(tasks=["CIFAR10", "parallel.tensor=2"])
    assert mteb.BENCHMARK.overrides(args) == ["parallel.tensor=2"]
    with pytest.raises(ConfigError, match="^this benchmark needs mteb: pip install mteb "):
        mteb.BENCHMARK.read_evaluation(args)
    monkeypatch.setenv("RANK", "1")
    assert callable(mteb.BENCHMARK.read_evaluation(args))  # the first rank says it
