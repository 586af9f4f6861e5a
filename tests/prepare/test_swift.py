"""The embedding data of ms-swift becomes pairs, in its present form and in the older one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from shard_pairs import read_shard

from megatron_llave.batch import Pair
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.prepare import swift
from megatron_llave.prepare.own_pairs import Options

SENTENCE = {"messages": [{"role": "user", "content": "sentence1"}]}
SENTENCE |= {"positive_messages": [[{"role": "user", "content": "sentence2"}]]}


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def made(*lines: Any, **options: Any) -> list[Pair]:
    """The pairs of these lines."""
    Path("data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in range(5):
        if not Path(f"{number}.png").exists():
            Image.new("RGB", (4, 5), (40 * number, 0, 0)).save(f"{number}.png")
    swift.prepare(["data.jsonl"], "out", **{"options": Options(workers=1)} | options)
    return [pair for shard in sorted(Path("out").glob("*.tar")) for pair in read_shard(shard)]


def shown(pair: Pair) -> list[tuple[str, list[int]]]:
    """Texts and numbers of the images of all sides."""
    numbers = {Path(f"{number}.png").read_bytes(): number for number in range(5)}
    sides = (pair.query, *pair.targets, *pair.hard_negatives)
    return [(side.text, [numbers[image] for image in side.images]) for side in sides]


FORMS = [
    # The examples of "Embedding Training" in ms-swift's documentation, version 4.5, with other images.
    (SENTENCE | {"label": 0.8}, [("sentence1", []), ("sentence2", [])], [0.8]),
    (
        {
            **{"messages": user("<image>"), "images": ["0.png"], "label": 1},
            **{"positive_messages": [user("<image>sentence")], "positive_images": [["1.png"]]},
        },
        [("<image>", [0]), ("<image>sentence", [1])],
        [1],
    ),
    (
        {
            **{"messages": user("<image>sentence1"), "images": ["0.png"]},
            **{"positive_messages": [user("<image>sentence2")], "positive_images": [["1.png"]]},
            "negative_messages": [user("<image><image>sentence3"), user("<image>sentence4")],
            "negative_images": [["2.png", "3.png"], ["4.png"]],
        },
        [("<image>sentence1", [0]), ("<image>sentence2", [1]), ("<image><image>sentence3", [2, 3])]
        + [("<image>sentence4", [4])],
        [],
    ),
    (
        # An instruction, more than one positive, messages of an assistant, and images in the parts of a message.
        {
            "messages": [{"role": "system", "content": "Instruction"}, *user("Anchor")],
            "positive_messages": [[{"role": "assistant", "content": "Positive"}], user("Another")],
            "negative_messages": [user([{"type": "image", "image": "2.png"}, {"type": "text", "text": "part"}])],
        },
        [("Instruction Anchor", []), ("Positive", []), ("Another", []), ("<image>part", [2])],
        [],
    ),
    (
        # Fewer tags than images: they come first. An image as an object, and one without a list.
        {"messages": user("a"), "images": {"path": "3.png"}, "positive_messages": [user("b <image>")]}
        | {"positive_images": ["1.png"]},
        [("a", [3]), ("b <image>", [1])],
        [],
    ),
    # The older form, version 3.5.
    (
        {"query": "<image>", "response": "<image>sentence", "images": ["0.png", "1.png"], "label": 0.7},
        [("<image>", [0]), ("<image>sentence", [1])],
        [0.7],
    ),
    (
        {
            **{"query": "<image>sentence1", "response": "<image>sentence2"},
            **{"rejected_response": ["<image>x", "y<image>"], "images": [f"{number}.png" for number in range(4)]},
        },
        [("<image>sentence1", [0]), ("<image>sentence2", [1]), ("<image>x", [2]), ("y<image>", [3])],
        [],
    ),
    ({"query": "a", "response": "b", "rejected_response": "c"}, [("a", []), ("b", []), ("c", [])], []),
    ({"messages": [*user("<image>a"), *user("b")], "image": "4.png"}, [("<image>a", [4]), ("b", [])], []),
]


@pytest.mark.parametrize(("line", "sides", "scores"), FORMS)
def test_forms_of_a_line(line: dict[str, Any], sides: list, scores: list[float]) -> None:
    [pair] = made(line)
    assert (shown(pair), pair.scores, pair.subset) == (sides, scores, "data")


NO_PAIRS = [
    ([], "a line must be an object with messages and positive_messages, not []"),
    ({"messages": user("a")}, "needs messages and positive_messages, or query and response"),
    (SENTENCE | {"positive_messages": []}, "positive_messages is empty"),
    (SENTENCE | {"messages": "text"}, "messages must be a list of objects with role and content, not 'text'"),
    (SENTENCE | {"messages": [{"role": "user", "content": None}]}, "messages must be a list of objects"),
    (SENTENCE | {"positive_messages": [["x"]]}, "positive_messages[0] must be a list of objects"),
    (SENTENCE | {"messages": user("<image>")}, "1 <image> for 0 images: '<image>'"),
    (SENTENCE | {"positive_images": [["a"], ["b"]]}, "positive_images has 2 lists for 1 positive_messages"),
    (SENTENCE | {"images": [3]}, "images must be a list of paths, not [3]"),
    (SENTENCE | {"videos": ["a.mp4"]}, "videos are not read; write the frames of a video as frames"),
    (SENTENCE | {"negative_messages": 3}, "negative_messages and negative_images must be lists"),
    (SENTENCE | {"label": "high"}, "label 'high' must be a number from -1e"),
    (SENTENCE | {"label": 1, "negative_messages": [user("n")]}, "a line with it has one positive and no negatives"),
    (SENTENCE | {"messages": user([{"type": "audio", "audio": "a"}])}, "messages has the part {'type': 'audio'"),
    ({"query": "<image>a", "response": "b"}, "1 <image> in query, response and rejected_response for 0 images"),
    ({"query": "a", "response": 3}, "query and response (and rejected_response) as texts"),
]


def test_lines_that_are_no_pairs_are_counted_and_named() -> None:
    pairs = made(SENTENCE, *(line for line, _ in NO_PAIRS))
    report = [json.loads(line) for line in Path("out/report.jsonl").read_text().splitlines()]
    assert len(pairs) == 1 and len(report) == len(NO_PAIRS)
    for number, (line, (_, detail)) in enumerate(zip(report, NO_PAIRS), start=2):
        assert (line["row"], line["reason"]) == (f"data.jsonl:{number}", "row is no pair") and detail in line["detail"]


def test_images_and_limit_and_subsets() -> None:
    line = {"messages": user("<image>"), "images": ["0.png"], "positive_messages": [user("text")]}
    made(line, line)
    Path("other").mkdir()
    Path("other/b.c.jsonl").write_text("".join(json.dumps(line | {"images": [f"{n}.png"]}) + "\n" for n in (9, 1, 2)))
    swift.prepare(["data.jsonl", "other/b.c.jsonl"], "more", ".", 2, options=Options(workers=1))
    assert [len(list(read_shard(f"more/{name}-000000.tar"))) for name in ("data", "b-c")] == [2, 1]
    for name in "xy":
        Path(name).mkdir()
        shutil.copy("other/b.c.jsonl", f"{name}/train.jsonl")
    made_of = swift.prepare(["x/train.jsonl", "y/train.jsonl"], "both", ".", 2, options=Options(workers=1))
    sizes = {name: subset.pairs for name, subset in made_of.index.subsets.items()}
    assert sizes == {"x-train": 1, "y-train": 1} and not made_of.remarks, "the first two lines of each file"
    report = map(json.loads, Path("more/report.jsonl").read_text().splitlines())
    assert ("other/b.c.jsonl:1", "missing image") in [(line["row"], line["reason"]) for line in report]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(
        DataError, match="data.jsonl:1: needs messages and positive_messages.*; no row of the source is"
    ):
        made({"text": "a"}, {"text": "b"})
    with pytest.raises(ConfigError, match="--source names a file twice"):
        swift.prepare(["data.jsonl", "./data.jsonl"], "out")
    with pytest.raises(DataError, match="gone.jsonl cannot be read"):
        swift.prepare(["gone.jsonl"], "out")
    Path("data.jsonl").write_text(json.dumps(SENTENCE) + "\n{")
    with pytest.raises(DataError, match="data.jsonl:2 is not valid JSON"):
        swift.prepare(["data.jsonl"], "out", options=Options(workers=1))
