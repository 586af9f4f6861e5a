"""Images with captions become training pairs, held-out evaluation sets and a tokenizer, from a folder or a CSV."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shard_pairs import read_shard

from megatron_llave.batch import Pair
from megatron_llave.data.tokenizer import load_tokenizer
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.benchmarks.prepared import read_evaluation, read_tasks
from megatron_llave.options.prepare import TRAIN
from megatron_llave.prepare import jsonl
from megatron_llave.prepare.captions import prepare_csv, prepare_folder
from megatron_llave.prepare.own_pairs import Options

OPTIONS = Options(held_out=0.25, tokenizer=TRAIN, workers=1)
HELD_OUT = {"blue thing 6", "white thing 3", "green thing 1", "white thing 11", "green thing 13"}
COLOURS = "red green blue white".split()


def picture(path: Path, number: int, suffix: str = ".bmp") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (9, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path.with_suffix(suffix))
    return path.with_suffix(suffix)


def caption(number: int) -> str:
    return f"{COLOURS[number % 4]} thing {number}"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty images, half of them in a subfolder, without captions."""
    for number in range(20):
        picture(
            tmp_path / "photos" / ("sub" if number % 2 else "") / f"{COLOURS[number % 4]}-thing_{number:02d}", number
        )
    return tmp_path / "photos"


def images(photos: Path) -> list[Path]:
    return sorted(photos.rglob("*.bmp"), key=lambda path: path.stem[-2:])


def pairs_of(out: Path) -> list[Pair]:
    return [pair for shard in sorted(out.glob("*.tar")) for pair in read_shard(shard)]


def trained_texts(out: Path) -> set[str]:
    return {pair.query.text for pair in pairs_of(out)}


def held_out_texts(out: Path) -> set[str]:
    return {side.text for side in read_evaluation(out)[0].values() if not side.images}


def write_captions(photos: Path, form: str) -> None:
    """Write the captions of all images in one of the forms that are read."""
    rows = [(str(path.relative_to(photos)), caption(int(path.stem[-2:]))) for path in images(photos)]
    if form == "metadata.jsonl":
        lines = [json.dumps({"file_name": image, "text": text, "more": 1}) for image, text in rows]
    elif form == "metadata.csv":
        lines = ["more,text,file_name", *(f'x,"{text}",{image}' for image, text in rows)]
    elif form == "metadata.parquet":
        columns = {"file_name": [row[0] for row in rows], "more": [[1]] * len(rows), "text": [row[1] for row in rows]}
        pq.write_table(pa.table(columns), photos / form)
        return
    elif form == "captions.tsv":
        lines = ["filepath\ttitle", *(f"{image}\t{text}" for image, text in rows)]
    elif form == "captions.txt":
        lines = ["image,caption", *(f"{image},{text}" for image, text in rows)]
    else:
        for image, text in rows:
            (photos / image).with_suffix(".txt").write_text(f"{text}\n")
        return
    (photos / form).write_text("\n".join(lines) + "\n\n", encoding="utf-8-sig")


FORMS = ["metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.tsv", "captions.txt", "photo.txt"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_captions_gives_the_same_pairs(photos: Path, form: str) -> None:
    write_captions(photos, form)
    made = prepare_folder(photos, "out", options=OPTIONS)
    every = {caption(number) for number in range(20)}
    held_out = held_out_texts(Path("out"))
    assert not made.skipped["captions"] and made.index.subsets["captions"].pairs == 15
    assert len(held_out) == 5 and trained_texts(Path("out")) == every - held_out
    for pair in pairs_of(Path("out")):
        number = int(pair.query.text.split()[-1])
        (image,) = pair.target.images
        assert image == next(path for path in images(photos) if path.stem.endswith(f"{number:02d}")).read_bytes()
    tasks = {task.name: task for task in read_tasks("out")}
    assert list(tasks) == ["caption_to_image", "image_to_caption"] == [held_out.name for held_out in made.evaluation]
    assert [task.chance for task in tasks.values()] == [20.0, 20.0]
    # Which images are held out depends on their contents and captions alone: it is the same for every form.
    assert held_out == HELD_OUT
    assert load_tokenizer("out/tokenizer.model").vocab_size <= 1200


def test_a_parquet_file_may_lack_captions_and_have_them_in_another_column(photos: Path) -> None:
    names = [str(path.relative_to(photos)) for path in images(photos)]
    texts = [None, "", *(caption(int(Path(name).stem[-2:])) for name in names[2:])]
    table = pa.table({"file_name": names, "words": texts, "text": [3] * len(names)})
    pq.write_table(table, photos / "metadata.parquet")
    with pytest.raises(DataError, match="metadata.parquet: the columns are 'file_name, words', but it needs filepath"):
        prepare_folder(photos, "out", options=OPTIONS)
    made = prepare_folder(photos, "out", options=OPTIONS, caption_column="words")
    assert made.skipped["captions"] == {"empty side": 2}
    assert trained_texts(Path("out")) | held_out_texts(Path("out")) == set(texts[2:])
    (photos / "metadata.parquet").write_bytes((photos / "metadata.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="metadata.parquet cannot be read"):
        prepare_folder(photos, "new", options=OPTIONS)


def test_images_without_a_caption_are_counted(photos: Path) -> None:
    write_captions(photos, "metadata.csv")
    lines = (photos / "metadata.csv").read_text().splitlines()
    (photos / "metadata.csv").write_text("\n".join(lines[:-4]) + "\n")  # the last line is blank
    made = prepare_folder(photos, "out", options=OPTIONS)
    assert made.skipped["captions"] == {"empty side": 3}
    (photos / "metadata.csv").unlink()
    lines = [
        {"file_name": str(path.relative_to(photos)), "text": None, "caption": path.stem} for path in images(photos)
    ]
    lines[:2] = [line | {"caption": None} for line in lines[:2]]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = prepare_folder(photos, "out", options=replace(OPTIONS, overwrite=True))
    assert made.skipped["captions"] == {"empty side": 2}, "null is no caption"


def test_captions_from_names_only_when_asked(photos: Path) -> None:
    with pytest.raises(DataError, match="photos has 20 images but no captions.*--captions names takes them from"):
        prepare_folder(photos, "out", options=OPTIONS)
    with pytest.raises(DataError, match="form 4 groups without common image or text"):
        prepare_folder(photos, "out", "names", replace(OPTIONS, held_out=0.1))
    assert not Path("out").exists()
    prepare_folder(photos, "out", "names", replace(OPTIONS, held_out=0))
    assert trained_texts(Path("out")) == {f"{colour} thing" for colour in COLOURS} and not Path("out/eval").exists()


def test_equal_images_and_captions_stay_on_one_side(photos: Path) -> None:
    write_captions(photos, "photo.txt")
    files = images(photos)
    for number in range(10):  # a copy of an image with another caption, and another image with its caption again
        copy = files[number].with_name(f"copy{number}.bmp")
        shutil.copy(files[number], copy)
        copy.with_suffix(".txt").write_text(f"again {number}")
        picture(photos / f"new{number}", 100 + number).with_suffix(".txt").write_text(f"  AGAIN\t{number} ")
    made = prepare_folder(photos, "out", options=OPTIONS)
    trained = [pair.query.text.casefold() for pair in pairs_of(Path("out"))]
    inputs, sets = read_evaluation("out")
    groups = [{caption(number), f"again {number}"} for number in range(10)]
    assert all(sum(text in trained for text in group) in (0, 2) for group in groups)
    assert len(trained) == 40 - 10 == made.index.subsets["captions"].pairs
    assert len(sets[0].queries) == len(set(sets[0].queries)) == len(sets[0].candidates) < 10  # one pair of each group
    seen = {image for pair in pairs_of(Path("out")) for image in pair.target.images}
    assert not seen & {image for side in inputs.values() for image in side.images}


def test_images_that_cannot_be_used_are_counted_and_the_split_survives_a_second_run(photos: Path) -> None:
    write_captions(photos, "photo.txt")
    (photos / "empty.bmp").write_bytes(b"")
    (photos / "empty.txt").write_text("an empty file")
    picture(photos / "no-caption", 99)
    images(photos)[0].with_suffix(".txt").write_text("the <image> tag of SVG")
    made = prepare_folder(photos, "out", options=OPTIONS)
    assert r"the \<image> tag of SVG" in trained_texts(Path("out")) | held_out_texts(Path("out")), "ordinary text"
    report = [json.loads(line) for line in Path("out/report.jsonl").read_text().splitlines()]
    assert {line["row"]: line["reason"] for line in report} == {
        str(photos / "empty.bmp"): "corrupt image",
        str(photos / "no-caption.bmp"): "empty side",
    }
    assert made.skipped["captions"].total() == 2
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    with pytest.raises(DataError, match="already holds finished shards.*--overwrite"):
        prepare_folder(photos, "out", options=OPTIONS)
    prepare_folder(photos, "out", options=replace(OPTIONS, overwrite=True))
    assert before == {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    Path("out/eval/mine.txt").write_text("a file of the user")
    prepare_folder(photos, "out", options=replace(OPTIONS, overwrite=True, held_out=0))
    assert [path.name for path in Path("out/eval").iterdir()] == ["mine.txt"]


def test_csv_files_of_several_folders(tmp_path: Path) -> None:
    for name in "ab":
        for number in range(4):
            picture(tmp_path / name / f"{number}", ord(name) * 100 + number)
        rows = "".join(f'"{name} says ""{number}"", twice";{number}.bmp\n' for number in range(4))
        (tmp_path / name / "list.csv").write_text("what;where\n" + rows)
    files = [tmp_path / "a/list.csv", tmp_path / "b/list.csv"]
    with pytest.raises(
        DataError, match=r"list.csv:1: the columns are 'what, where', but it needs filepath and title or"
    ):
        prepare_csv(files, "out", options=OPTIONS)
    prepare_csv(files, "out", ("where", "what"), OPTIONS)
    texts = trained_texts(Path("out")) | held_out_texts(Path("out"))
    assert texts == {f'{name} says "{number}", twice' for name in "ab" for number in range(4)}
    assert len({pair.target_id for pair in pairs_of(Path("out"))}) == 6


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.bmp"}\n', r"metadata.jsonl:1: needs file_name and text, both strings"),
        ("metadata.jsonl", "[]\n", r"metadata.jsonl:1: needs file_name and text"),
        ("metadata.jsonl", '{"file_name": "a.bmp", "text": 3}', r"metadata.jsonl:1: needs file_name and text"),
        ("captions.txt", "a.bmp a red car\n", r"captions.txt:1: needs a file name, a tab or a comma, and a caption"),
        ("captions.csv", "image,caption\na.bmp\n", r"captions.csv:2: has 1 values, but the first line has 2 names"),
        ("captions.csv", "picture,caption\n", r"captions.csv:1: the columns are 'picture, caption', but it needs"),
        ("captions.csv", "image,caption,caption\n", r"captions.csv:1: 'caption' is the name of two columns"),
        ("captions.csv", "image,caption,file_name,text\n", r"captions.csv:1: image and caption are in several columns"),
        ("captions.csv", "", r"captions.csv:1: the columns are '', but it needs"),
        ("captions.csv", b"image,caption\na.bmp,\xff\n", r"captions.csv is not UTF-8 text"),
        ("captions.csv", "image,caption\n", "the source has no pair for training"),
        ("captions.csv", "image,caption\na.bmp,a cat, on a mat\n", r"captions.csv:2: has 3 values, .* quotation marks"),
        ("captions.csv", 'image,caption\na.bmp,"a cat\nb.bmp,a dog\n', r"captions.csv:\d: unexpected end of data"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_written(tmp_path: Path, file: str, text, message: str) -> None:
    picture(tmp_path / "photos/a", 0)
    (tmp_path / "photos" / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as caught:
        prepare_folder(tmp_path / "photos", "out", options=replace(OPTIONS, held_out=0))
    assert "\n" not in str(caught.value) and not Path("out").exists()


def test_wrong_arguments(photos: Path) -> None:
    write_captions(photos, "photo.txt")
    with pytest.raises(ConfigError, match="--held-out 1.5 must be a fraction of the pairs"):
        prepare_folder(photos, "out", options=replace(OPTIONS, held_out=1.5))
    with pytest.raises(DataError, match="--tokenizer nowhere is no tokenizer file"):
        prepare_folder(photos, "out", options=replace(OPTIONS, tokenizer="nowhere"))
    with pytest.raises(DataError, match="--source nowhere is not a folder"):
        prepare_folder("nowhere", "out")
    with pytest.raises(ConfigError, match="--out .*photos is the folder of the images; choose another"):
        prepare_folder(photos, photos)
    with pytest.raises(ConfigError, match="--columns image image: a column cannot be both image and caption"):
        prepare_csv([photos / "a.csv"], "out", ["image", "image"])
    Path("bare").mkdir()
    with pytest.raises(DataError, match="bare has no images: no file that ends in .avif"):
        prepare_folder("bare", "out")
    picture(Path("bare/a"), 0)
    with pytest.raises(DataError, match="--captions classes needs folders of images in bare, whose names are"):
        prepare_folder("bare", "out", "classes")


def test_jsonl_with_classes_holds_out_images_and_not_classes(photos: Path, tmp_path: Path) -> None:
    lines = [
        {
            "query": {"text": "What colour?", "image": str(path)},
            "target": {"text": COLOURS[number % 4]},
            "hard_negatives": [{"image": str(images(photos)[number - 1])}],
        }
        for number, path in enumerate(images(photos))
    ]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = jsonl.prepare([tmp_path / "colours.jsonl"], "out", "classification", OPTIONS)
    (task,) = read_tasks("out")
    assert (task.name, task.meta_task, len(task.queries)) == ("colours_query_to_target", "classification", 5)
    assert len(task.candidates) == 4 and made.index.subsets["colours"].pairs == 15
    held_out = {image for side in read_evaluation("out")[0].values() for image in side.images}
    pairs = pairs_of(Path("out"))
    assert not held_out & {
        image for pair in pairs for side in (pair.query, *pair.hard_negatives) for image in side.images
    }
    assert 0 < sum(len(pair.hard_negatives) for pair in pairs) < 15  # without those that are held out


@pytest.mark.parametrize("form", ["metadata.jsonl", "metadata.csv"])
def test_imagefolder_with_a_column_of_its_own_and_files_in_the_folders_of_the_splits(photos: Path, form: str) -> None:
    for split in ("one", "two"):
        (photos / split).mkdir()
    for number, path in enumerate(images(photos)):
        path.rename(photos / "one two".split()[number % 2] / path.name)
    for split in ("one", "two"):
        rows = [(path.name, caption(int(path.stem[-2:]))) for path in images(photos / split)]
        if form.endswith("csv"):
            lines = ["file_name,alt,words", *(f"{image},x,{text}" for image, text in rows)]
        else:
            lines = [json.dumps({"file_name": image, "words": text, "text": "x"}) for image, text in rows]
        (photos / split / form).write_text("\n".join(lines))
    made = prepare_folder(photos, "out", options=OPTIONS, caption_column="words")
    assert not made.skipped["captions"] and held_out_texts(Path("out")) == HELD_OUT
    with pytest.raises(ConfigError, match="--captions column=words needs metadata.jsonl or a table"):
        prepare_folder(photos, "out", "names", OPTIONS, caption_column="words")
    with pytest.raises(DataError, match=f"{form}:1: .*none"):
        prepare_folder(photos, "new", options=OPTIONS, caption_column="none")


def test_folders_are_classes_when_asked(photos: Path) -> None:
    with pytest.raises(DataError, match="--captions classes takes the names of their folders as classes"):
        prepare_folder(photos, "out", options=OPTIONS)
    for number, path in enumerate(images(photos)):
        folder = photos / "red_panda snow-leopard".split()[number % 2] if number < 18 else photos
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    made = prepare_folder(photos, "out", "classes", replace(OPTIONS, target_prompt="Class: "))
    assert made.index.subsets["classes"].meta_task == "classification"
    assert made.skipped["classes"] == {"empty side": 2}, "the two images that lie in no folder of a class"
    pairs = pairs_of(Path("out"))
    assert {(pair.query.text, pair.target.text) for pair in pairs} == {
        ("Represent the given image.", f"Class: {name}") for name in ("red panda", "snow leopard")
    }
    assert all(len(pair.query.images) == 1 and not pair.target.images for pair in pairs)
    assert len({pair.target_id for pair in pairs}) == 2, "images of a class have equal targets"
    [task] = read_tasks("out")
    assert task.name == "classes_query_to_target"


def test_prompts_of_captions(photos: Path) -> None:
    write_captions(photos, "photo.txt")
    options = replace(OPTIONS, held_out=0, tokenizer=None, query_prompt="Find: ", target_prompt="A photo.")
    prepare_folder(photos, "out", options=options)
    assert {(pair.query.text[:6], pair.target.text) for pair in pairs_of(Path("out"))} == {("Find: ", "A photo.")}
