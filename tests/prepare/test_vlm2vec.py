"""The data sets of a list of VLM2Vec become shards, and their weights a section of a configuration."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from shard_pairs import read_shard

from megatron_llave.batch import Pair
from megatron_llave.config.load import load_config
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.prepare import mmeb, vlm2vec

TOKEN = "<|image_1|>\n"


def picture(number: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)).save(data, "PNG")
    return data.getvalue()


def mmeb_row(number: int, **more: Any) -> dict[str, Any]:
    row = {"qry": f"{TOKEN}Represent it.", "qry_image_path": f"{number}.png", "pos_text": f"class {number}"}
    return row | {"pos_image_path": ""} | more


def negatives(number: int) -> dict[str, Any]:
    """Two hard negatives as in the data of B3."""
    return {"neg_text": ["no", f"{TOKEN}Represent it."], "neg_image_path": ["", f"{number + 1}.png"]}


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


LIST = """
ImageNet_1K:
    dataset_parser: mmeb
    dataset_name: TIGER-Lab/MMEB-train
    subset_name: ImageNet_1K
    dataset_split: original
    image_dir: vlm2vec_train/MMEB-train/image
    num_sample_per_subset: 3
    weight: 1
VOC:
    dataset_parser: mmeb_neg
    dataset_name: VLM2Vec/B3-2b
    subset_name: VOC2007
    dataset_split: train
    image_dir: vlm2vec_train/MMEB-train/image
    num_sample_per_subset: 100_000
    num_hardneg: 2
    weight: 0.5
colpali_train_set:
    dataset_parser: vidore
    dataset_name: vidore/colpali_train_set
    weight: 10
visrag-indomain:
  dataset_parser: visrag
  dataset_name: openbmb/VisRAG-Ret-Train-In-domain-data
  global_dataset_name: VisRAG-Indomain-data
  weight: 12
"""
"""Entries as they are in the lists of VLM2Vec (main) and of B3 (branch b3)."""


@pytest.fixture
def downloads() -> Path:
    images = Path("root/vlm2vec_train/MMEB-train/image")
    images.mkdir(parents=True)
    for number in range(8):
        (images / f"{number}.png").write_bytes(picture(number))
    Path("list.yaml").write_text(LIST)
    rows = [mmeb_row(number) for number in range(5)]
    for number in range(2):
        part = rows[3 * number : 3 * number + 3]
        write(f"root/TIGER-Lab/MMEB-train/ImageNet_1K/original-{number:05d}-of-00002.parquet", part)
    write("root/TIGER-Lab/MMEB-train/ImageNet_1K/diverse_instruction-00000-of-00001.parquet", rows)
    write("root/B3-2b/VOC2007/train-00000-of-00001.parquet", [mmeb_row(n, **negatives(n)) for n in range(4)])
    image = {"bytes": picture(6), "path": "6.png"}
    page = {"query": "What is it?", "prompt": "long", "image": image, "answer": "noise", "source": "pdf"}
    write("root/vidore/colpali_train_set/data/train-00000-of-00001.parquet", [page])
    write("root/VisRAG-Ret-Train-In-domain-data/data/train-00000-of-00001.parquet", [page])
    return Path("root")


def made(name: str) -> list[Pair]:
    return [pair for shard in sorted(Path("out").glob(f"{name}-*.tar")) for pair in read_shard(shard)]


def test_a_list_of_vlm2vec_and_b3(downloads: Path) -> None:
    prepared = vlm2vec.prepare("list.yaml", "out", downloads, workers=1)
    assert {name: (s.meta_task, s.pairs) for name, s in prepared.index.subsets.items()} == {
        "ImageNet_1K": ("classification", 3),
        "VOC": ("classification", 4),
        "colpali_train_set": ("retrieval", 1),
        "visrag-indomain": ("retrieval", 1),
    }
    pairs = made("ImageNet_1K")
    assert [pair.query.images for pair in pairs] == [[picture(number)] for number in range(3)]
    assert (pairs[1].query.text, pairs[1].target.text) == (f"{TOKEN}Represent it.", "class 1")
    first = made("VOC")[0]
    assert [(side.text, side.images) for side in first.hard_negatives] == [
        ("no", []),
        (f"{TOKEN}Represent it.", [picture(1)]),
    ]
    [page], [found] = made("colpali_train_set"), made("visrag-indomain")
    assert (page.query.text, page.query.images, page.target.text) == ("What is it?", [picture(6)], "noise")
    assert (found.query.text, found.query.images) == ("What is it?", []) and found.target.images == [picture(6)]


def test_the_pairs_are_those_of_the_source_mmeb(downloads: Path) -> None:
    """What both commands read comes out the same."""
    vlm2vec.prepare("list.yaml", "out", downloads, ["ImageNet_1K"], workers=1)
    source = downloads / "TIGER-Lab/MMEB-train"
    for image in (downloads / "vlm2vec_train/MMEB-train/image").iterdir():
        image.rename(source / image.name)
    mmeb.prepare(source, "mmeb", "original", ["ImageNet_1K"], limit=3, workers=1)
    assert Path("mmeb/ImageNet_1K-000000.tar").read_bytes() == Path("out/ImageNet_1K-000000.tar").read_bytes()


def test_the_weights_become_a_section_of_a_configuration(downloads: Path) -> None:
    vlm2vec.prepare("list.yaml", "out", downloads, workers=1)
    mixture = yaml.safe_load(Path("out/mixture.yaml").read_text())
    assert mixture["data"]["path"] == "out" and mixture["data"]["hard_negatives"] == 2
    run = {"model": {"preset": "tiny"}, "train": {"steps": 1}, **mixture}
    Path("run.yaml").write_text(yaml.safe_dump(run))
    weights = {name: subset.weight for name, subset in load_config("run.yaml").data.subsets.items()}
    assert weights == {"ImageNet_1K": 1, "VOC": 0.5, "colpali_train_set": 10, "visrag-indomain": 12}
    chosen = vlm2vec.prepare("list.yaml", "two", downloads, ["VOC", "ImageNet_1K"], limit=2, workers=1)
    assert {name: subset.pairs for name, subset in chosen.index.subsets.items()} == {"VOC": 2, "ImageNet_1K": 2}


def test_json_lines_and_rows_that_are_no_pairs(downloads: Path) -> None:
    bad = [{"qry": 3}, negatives(1) | {"neg_text": ["one"]}, {"qry_image_path": "../../list.yaml"}]
    rows = [mmeb_row(1), *(mmeb_row(2, **row) for row in bad), mmeb_row(3)]
    Path("root/mine").mkdir()
    Path("root/mine/own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"dataset_parser": "mmeb_neg", "dataset_name": "mine", "subset_name": "own"}
    Path("own.yaml").write_text(yaml.safe_dump({"own": entry | {"image_dir": "vlm2vec_train/MMEB-train/image"}}))
    vlm2vec.prepare("own.yaml", "out", "root", workers=1)
    report = [json.loads(line) for line in Path("out/report.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in report] == [
        ("root/mine/own.jsonl:2", "row is no pair"),
        ("root/mine/own.jsonl:3", "row is no pair"),
        ("root/mine/own.jsonl:4", "image path outside the source"),
    ]
    assert "own.jsonl:2: qry must be a string, not '3'" in report[0]["detail"]
    assert "neg_text has 1 values and neg_image_path 2" in report[1]["detail"] and len(made("own")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_parser": "llavahound_qa"}, "set: dataset_parser must be mmeb, mmeb_neg, vidore or visrag, not"),
        ({"dataset_name": "none/such"}, "set: neither root/none/such nor root/such exists; download none/such"),
        ({"dataset_name": None}, "set: dataset_name must be the name of a data set or a folder, not None"),
        ({"subset_name": "none"}, "root/TIGER-Lab/MMEB-train has no folder none and no none.parquet"),
        ({"dataset_split": "none"}, "split none is not there: the splits of .* are diverse_instruction, .*original"),
        ({"weight": "much"}, "set: weight must be a number, not 'much'"),
        ({"weight": "0"}, "set: weight must be above 0, not 0.0"),
        ({"num_hardneg": "-1"}, "set: num_hardneg must be at least 0, not -1"),
    ],
)
def test_what_cannot_be_is_refused(downloads: Path, change: dict[str, Any], message: str) -> None:
    entry = yaml.safe_load(LIST)["ImageNet_1K"] | change
    Path("list.yaml").write_text(yaml.safe_dump({"set": entry}))
    with pytest.raises((ConfigError, DataError), match=message):
        vlm2vec.prepare("list.yaml", "out", downloads, workers=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b: {dataset_parser: mmeb}", "list.yaml: a b: a name must be 1 to 60 letters"),
        ("a: 3", "list.yaml: a must have keys such as dataset_parser and weight, not"),
        ("", "list.yaml has no data set$"),
        ("[", "list.yaml is not valid YAML"),
    ],
)
def test_what_is_no_list_is_refused(text: str, message: str) -> None:
    Path("list.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        vlm2vec.prepare("list.yaml", "out")


def test_a_missing_column_or_part_is_refused(downloads: Path) -> None:
    write("root/TIGER-Lab/MMEB-train/ImageNet_1K/original-00000-of-00002.parquet", [{"qry": "a"}])
    with pytest.raises(DataError, match="original-00000-of-00002.parquet has no column 'qry_image_path'"):
        vlm2vec.prepare("list.yaml", "out", downloads)
    Path("root/TIGER-Lab/MMEB-train/ImageNet_1K/original-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="original-00000-of-00002.parquet is missing; complete the download"):
        vlm2vec.prepare("list.yaml", "out", downloads)
