"""A user's own pairs: every value comes back, and what is not of the schema is named by file and line."""

import io
import json
import re
from dataclasses import replace

import pytest
from golden_model import byte_tokenizer
from PIL import Image
from shard_pairs import read_shard

from megatron_llave.batch import Pair, Side
from megatron_llave.config.load import config_from_dict
from megatron_llave.data.index import read_index
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.benchmarks.prepared import read_evaluation
from megatron_llave.planning.pair_lengths import read_kinds
from megatron_llave.prepare import audit, jsonl, own_pairs, shard_jobs, source_sides
from megatron_llave.prepare.held_out import build_sets, one_of_each_group
from megatron_llave.prepare.own_pairs import Options
from megatron_llave.prepare.shard_jobs import make_id


def picture(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_lines(path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def text_pair(number, **more):
    return {"query": {"text": f"q{number}"}, "target": {"text": f"t{number}"}, **more}


def pairs_of(out):
    subsets = read_index(out).subsets
    return {name: [p for s in subset.shards for p in read_shard(out / s.file)] for name, subset in subsets.items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepare(files, out, **options):
    meta_task = options.pop("meta_task", "retrieval")
    return jsonl.prepare(files, out, meta_task, Options(**{"workers": 1, **options}))


def test_every_value_comes_back(tmp_path):
    (tmp_path / "in/pictures").mkdir(parents=True)
    (tmp_path / "in/pictures/a.png").write_bytes(picture(1))
    (tmp_path / "b.png").write_bytes(picture(2))
    line = {
        "subset": "birds",
        "id": "my-bird_1",
        "query": {"text": "<image> which \u732b?", "images": ["pictures/a.png", "../b.png"], "id": "query 7"},
        "target": {"images": [str(tmp_path / "b.png")]},
        "hard_negatives": [{"text": "no", "id": "n"}, {"image": "pictures/a.png"}],
    }
    made = prepare([write_lines(tmp_path / "in/cats.jsonl", text_pair(0), line)], tmp_path / "out", meta_task="vqa")
    pairs = pairs_of(tmp_path / "out")
    assert list(pairs) == ["birds", "cats"] and not any(made.skipped.values())
    assert {subset.meta_task for subset in made.index.subsets.values()} == {"vqa"}
    (bird,) = pairs["birds"]
    assert (bird.key, bird.query_id, bird.hard_negative_ids[0]) == ("my-bird_1", "query 7", "n")
    assert bird.query == Side("<image> which \u732b?", [picture(1), picture(2)])
    assert bird.target == Side("", [picture(2)])
    assert bird.hard_negatives == [Side("no", []), Side("", [picture(1)])]
    assert bird.hard_negative_ids[1] == make_id("", ["pictures/a.png"])
    (cat,) = pairs["cats"]
    assert (cat.key, cat.query_id, cat.target_id) == ("cats-00000000", make_id("q0", []), make_id("t0", []))


def test_several_targets_and_scores_come_back(tmp_path):
    """Of the targets and hard negatives that cannot be read, the scores go too."""
    (tmp_path / "a.png").write_bytes(picture(1))
    targets = [{"image": "none.png"}, {"text": "one", "id": "1"}, {"image": "a.png"}]
    negatives = [{"text": "no"}, {"image": "nowhere.png", "id": "n"}, {"text": "never"}]
    line = {"query": {"text": "q"}, "target": targets, "hard_negatives": negatives}
    line["scores"] = {"target": [0.5, 0.9, 1], "hard_negatives": [-1, 2, 3.5e-1]}
    single = text_pair(0, scores={"target": 4})
    gone = {"query": {"text": "q"}, "target": targets[:1], "scores": {"target": [1]}}
    made = prepare([write_lines(tmp_path / "x.jsonl", line, single, gone)], tmp_path / "out")
    first, second = pairs_of(tmp_path / "out")["x"]
    assert first.targets == [Side("one", []), Side("", [picture(1)])]
    assert first.target_ids == ["1", make_id("", ["a.png"])]
    assert first.hard_negatives == [Side("no", []), Side("never", [])] and len(first.hard_negative_ids) == 2
    assert first.scores == [0.9, 1, -1, 0.35] and second.scores == [4]
    reasons = {shard_jobs.ONE_TARGET: 1, shard_jobs.HARD_NEGATIVE: 1, "": 1}
    assert made.skipped["x"] == {prefix + source_sides.MISSING: number for prefix, number in reasons.items()}
    counts = audit.inspect(tmp_path / "out").subsets["x"]
    assert (counts.with_hard_negatives, counts.with_several_targets, counts.with_scores) == (1, 1, 2)
    assert not [problem for _, check in audit.verify(tmp_path / "out") for problem in check.problems]


def check_right_answers(inputs, made, answers):
    """Each query has each of its answers that is a candidate as a right one, its first answer first, and no other."""
    candidates = [inputs[key].text for key in made.candidates]
    for key, first, more in zip(made.queries, made.positives, made.further, strict=True):
        texts = answers[inputs[key].text]
        assert candidates[first] == texts[0] and first not in more
        assert {candidates[number] for number in [first, *more]} == {*texts} & {*candidates}


def test_no_right_answer_is_a_wrong_candidate_of_a_held_out_query():
    """A class may be the further target of one pair and the first of another, or the target of a pair left out."""
    answers = [["cat", "dog"], ["dog", "dog"], ["bird", "fish"], ["cow"], ["cow"]]
    sides = [[Side(text, []) for text in texts] for texts in answers]
    pairs = [Pair(f"p{i}", "vqa", Side(f"q{i % 4}", []), *side[:1], "q", "t") for i, side in enumerate(sides)]
    pairs = [replace(pair, further_targets=side[1:]) for pair, side in zip(pairs, sides)]
    held_out = one_of_each_group(pairs, {pair.key: pair.query.text.encode() for pair in pairs})
    inputs, (made,), (unused,) = build_sets({"vqa": held_out}, "vqa")
    assert [inputs[key].text for key in made.candidates] == ["cat", "dog", "bird", "cow"]
    assert len(made.queries) == 4
    check_right_answers(inputs, made, {"q0": ["cat", "dog", "cow"], "q1": ["dog"], "q2": ["bird"], "q3": ["cow"]})
    assert unused.startswith("subset vqa: number of held-out pairs that are in neither training nor a set: 1; they")


@pytest.mark.parametrize("num_single", [0, 30])
def test_classes_of_pairs_with_several_labels_all_stay_candidates(tmp_path, num_single):
    """200 pairs of eight classes, most or all of which have two labels."""
    answers = {f"photo {i}": [f"class {i % 8}", f"class {(i + 3) % 8}"][: 2 - (i < num_single)] for i in range(200)}
    lines = [{"query": {"text": q}, "target": [{"text": label} for label in labels]} for q, labels in answers.items()]
    source = write_lines(tmp_path / "labels.jsonl", *lines)
    made = prepare([source], tmp_path / "out", meta_task="classification", held_out=0.2)
    assert len(pairs_of(tmp_path / "out")["labels"]) == 160 and not made.unused
    inputs, (described,) = read_evaluation(tmp_path / "out")
    assert len(described.queries) == 40 and len(described.candidates) == 8
    check_right_answers(inputs, described, answers)
    assert described.chance == 25 if not num_single else 12.5 < described.chance < 25


def test_pairs_that_are_in_neither_training_nor_a_set_are_told(tmp_path):
    """Subset tiny is a ring of pairs with common targets, and of each two neighbours in the other one is left out."""
    lines = [text_pair(i, target=[{"text": f"t{i // 2}"}, {"text": f"u{i}"}], subset="even") for i in range(60)]
    ring = [[{"text": f"r{i}"}, {"text": f"r{(i + 1) % 6}"}] for i in range(6)]
    lines += [text_pair(60 + i, target=targets, subset="tiny") for i, targets in enumerate(ring)]
    made = prepare([write_lines(tmp_path / "x.jsonl", *lines)], tmp_path / "out", held_out=0.9)
    told = dict(re.fullmatch(r"subset (\w+): number .* nor a set: (\d+); .*", line).groups() for line in made.unused)
    trained = {name: len(pairs) for name, pairs in pairs_of(tmp_path / "out").items()}
    assert {held_out.name for held_out in made.evaluation} == {"even_query_to_target", "even_target_to_query"}
    assert trained["even"] + len(made.evaluation[0].queries) + int(told["even"]) == 60
    assert trained.get("tiny", 0) == 0 and told["tiny"] == "6"
    assert made.unused[1].endswith("6; a set needs at least 2 pairs that share no image or text")


def test_frames_of_a_video_are_one_input(tmp_path):
    (tmp_path / "v").mkdir()
    for number in range(3):
        (tmp_path / f"v/{number}.png").write_bytes(picture(number))
    Image.new("RGB", (4, 4)).save(tmp_path / "v/other.png")
    video = {"text": "<image>\nWhat happens?", "frames": ["v/0.png", "v/1.png", "v/2.png"], "fps": 0.5}
    line = {"query": video, "target": {"text": "t"}, "hard_negatives": [{"frames": "v/1.png"}]}
    uneven = {"query": {"frames": ["v/0.png", "v/other.png"]}, "target": {"text": "t"}}
    made = prepare([write_lines(tmp_path / "clips.jsonl", line, uneven, line)], tmp_path / "out")
    assert made.skipped == {"clips": {source_sides.CORRUPT: 1}}
    pair, _ = pairs_of(tmp_path / "out")["clips"]
    assert pair.query == Side(
        "<image>\nWhat happens?", [picture(n) for n in range(3)], is_video=True, seconds=(0, 2, 4)
    )
    assert pair.hard_negatives == [Side("", [picture(1)], is_video=True)] and not pair.target.is_video
    data = {"prompt": "plain", "tokenizer": str(byte_tokenizer(tmp_path))}
    cfg = config_from_dict({"model": {"preset": "tiny"}, "data": data, "train": {"global_batch_size": 2}})
    [kind] = read_kinds(tmp_path / "out", cfg)
    query, target = kind.pairs[0]
    assert (query.tiles, query.visual_tokens) == (3, 13) and query.tokens == 13 + len("What happens?") + 1
    assert (target.tiles, target.tokens) == (0, 2)
    with pytest.raises(DataError, match="2 image placeholders for 1 images"):
        video = {"text": "<image> <image>", "frames": ["v/0.png", "v/1.png"]}
        prepare([write_lines(tmp_path / "more.jsonl", {"query": video, "target": video})], tmp_path / "more")


def test_ids_tell_files_of_two_folders_apart(tmp_path):
    for number, folder in enumerate("ab"):
        line = {"query": {"text": "q"}, "target": {"images": ["./x.png"]}}
        write_lines(tmp_path / folder / f"{folder}.jsonl", line, {**line, "target": {"images": ["x.png"]}})
        (tmp_path / folder / "x.png").write_bytes(picture(number))
    prepare([tmp_path / "a/a.jsonl", tmp_path / "b/b.jsonl"], tmp_path / "out")
    pairs = pairs_of(tmp_path / "out")
    ids = [pair.target_id for name in "ab" for pair in pairs[name]]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert pairs["a"][0].query_id == pairs["b"][0].query_id


def test_mixed_subsets_of_several_files_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(own_pairs, "PAIRS_PER_SHARD", 10)
    first = [text_pair(n, subset="ab"[n % 2]) for n in range(43)]
    second = [text_pair(n, subset="b") for n in range(43, 60)]
    files = [write_lines(tmp_path / "1.jsonl", *first), write_lines(tmp_path / "2.jsonl", *second)]
    made = prepare(files, tmp_path / "out")
    pairs = pairs_of(tmp_path / "out")
    assert [pair.query.text for pair in pairs["a"]] == [f"q{n}" for n in range(0, 43, 2)]
    assert [pair.query.text for pair in pairs["b"]] == [f"q{n}" for n in [*range(1, 43, 2), *range(43, 60)]]
    assert [pair.key for pair in pairs["a"]] == [f"a-{n:08d}" for n in range(22)]
    assert [shard.pairs for shard in made.index.subsets["b"].shards] == [10, 10, 10, 8]
    assert [shard.file for shard in made.index.subsets["a"].shards] == [f"a-00000{n}.tar" for n in range(3)]


def test_workers_do_not_change_the_bytes(tmp_path):
    lines = [text_pair(n, subset="abc"[n % 3]) for n in range(4000)]
    lines[17]["target"] = {"images": ["none.png"]}
    file = write_lines(tmp_path / "x.jsonl", *lines)
    prepare([file], tmp_path / "one")
    prepare([file], tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_urls_are_never_fetched(tmp_path):
    urls = ["http://127.0.0.1:9/x.png", "https://host/x.png", "s3://bucket/x.png", "data:image/png;base64,AAAA"]
    lines = [{"query": {"images": [url]}, "target": {"text": "t"}} for url in urls]
    made = prepare([write_lines(tmp_path / "x.jsonl", text_pair(0), *lines)], tmp_path / "out")
    assert made.skipped == {"x": {source_sides.IS_URL: 4}}
    report = [json.loads(line) for line in (tmp_path / "out/report.jsonl").read_text().splitlines()]
    assert [line["row"] for line in report] == [f"{tmp_path / 'x.jsonl'}:{n}" for n in range(2, 6)]
    assert len(pairs_of(tmp_path / "out")["x"]) == 1


def test_sides_that_are_empty_are_skipped_and_blank_lines_do_not_count(tmp_path):
    lines = [text_pair(0), {"query": {"text": " "}, "target": {"text": "t"}}]
    lines += [{"query": {"text": "q"}, "target": {"images": []}}]
    file = write_lines(tmp_path / "x.jsonl", *lines)
    file.write_text("\ufeff" + file.read_text() + "\n \n", encoding="utf-8")
    made = prepare([file], tmp_path / "out")
    assert made.skipped == {"x": {source_sides.EMPTY: 2}}


GOOD = text_pair(0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"query": "\xff"}', "not UTF-8"),
        ([], "must be an object with subset, id, query, target, hard_negatives, scores, not "),
        ({**GOOD, "negatives": []}, "unknown key 'negatives'; known keys: subset, id, query"),
        ({"query": {"text": "q"}}, "target is missing"),
        ({**GOOD, "query": "q"}, "query: must be an object with id, text, image, images, frames, fps, not 'q'"),
        ({**GOOD, "query": {}}, "query: neither text nor image"),
        ({**GOOD, "query": {"id": "x"}}, "query: neither text nor image"),
        (
            {**GOOD, "query": {"picture": "x.png"}},
            "query: unknown key 'picture'; known keys: id, text, image, images, frames",
        ),
        ({**GOOD, "query": {"frames": ["x.png"], "image": "y.png"}}, "query: image and frames are two spellings"),
        ({**GOOD, "query": {"text": "q", "frames": []}}, "query: frames must name at least one file"),
        ({**GOOD, "query": {"frames": ["x.png"], "fps": 0}}, "query: fps must be the frames per second, a number from"),
        ({**GOOD, "query": {"image": "x.png", "fps": 2}}, "query: fps is for the images in frames, which are missing"),
        ({**GOOD, "query": {"image": "x.png", "images": ["y.png"]}}, "query: image and images are two spellings"),
        ({**GOOD, "target": {"text": 3}}, "target: text must be a string, not 3"),
        ({**GOOD, "target": {"text": None}}, "target: text must be a string, not None"),
        (
            {**GOOD, "target": {"images": {"a": 1}}},
            "target: images must be a file name or a list of them, not {'a': 1}",
        ),
        ({**GOOD, "target": {"images": [""]}}, "target: images must be a file name or a list of them"),
        ({**GOOD, "target": {"image": [3]}}, "target: image must be a file name or a list of them"),
        ({**GOOD, "target": {"text": "t", "id": 3.5}}, "target: id must be a whole number or a string .*, not 3.5"),
        ({**GOOD, "target": {"text": "t", "id": True}}, "target: id must be a whole number or a string .*, not True"),
        ({**GOOD, "target": {"text": "t", "id": ""}}, "target: id must be a whole number or a string of printable"),
        ({**GOOD, "hard_negatives": {}}, "hard_negatives must be a list"),
        ({**GOOD, "hard_negatives": [{"text": ""}, {"x": 1}]}, r"hard_negatives\[1\]: unknown key 'x'"),
        ({**GOOD, "target": []}, "target must be an item or a list of at least one"),
        ({**GOOD, "target": [{"text": "t"}, {}]}, r"target\[1\]: neither text nor image"),
        (
            {**GOOD, "target": [{"text": "t"}, {"text": "t"}]},
            r"target\[1\] is the same as target\[0\]; a pair has each",
        ),
        (
            {**GOOD, "target": {"text": "a", "id": 7}, "hard_negatives": [{"text": "b"}, {"text": "c", "id": "7"}]},
            r"hard_negatives\[1\] is the same as target; a pair has each target and hard negative once",
        ),
        (
            {**GOOD, "target": {"image": "a.png", "id": 7}, "hard_negatives": [{"image": "./x/../a.png", "id": 8}]},
            r"hard_negatives\[0\] is the same as target; a pair has each target and hard negative once",
        ),
        (
            {**GOOD, "target": [{"text": "a", "id": 7}, {"text": "a"}]},
            r"target\[1\] is the same as target\[0\]; a pair has each target and hard negative once",
        ),
        ({**GOOD, "scores": [0.5]}, r"scores: must be an object with target, hard_negatives, not \[0.5\]"),
        ({**GOOD, "scores": {"negative": 1}}, "scores: unknown key 'negative'; known keys: target, hard_negatives"),
        ({**GOOD, "scores": {}}, "scores.target is missing; give one number for each of the 1 of target"),
        ({**GOOD, "scores": {"target": [1, 2]}}, "scores.target has 2 numbers for 1 of target; give one for each"),
        ({**GOOD, "scores": {"target": 1, "hard_negatives": [0]}}, "scores.hard_negatives has 1 numbers for 0 of"),
        ({**GOOD, "scores": {"target": "1"}}, "scores.target must be numbers from -1e.30 to 1e.30, not '1'"),
        ({**GOOD, "scores": {"target": float("nan")}}, "not valid JSON .NaN is no finite number"),
        (
            b'{"query": {"text": "q"}, "target": {"text": "t"}, "scores": {"target": 1e99}}',
            "must be numbers from -1e.30 to 1e.30, not",
        ),
        ({**GOOD, "subset": "a.b"}, "subset 'a.b' must be 1 to 60 letters"),
        ({**GOOD, "subset": "x" * 61}, "must be 1 to 60 letters"),
        ({**GOOD, "subset": 3}, "subset 3 must be"),
        ({**GOOD, "id": 3}, "id must be a string, not 3"),
        ({**GOOD, "id": "a/b"}, "id 'a/b' must be 1 to 80 letters"),
        ({**GOOD, "id": "taken"}, "id 'taken' comes twice in subset 'cats'"),
        ({**GOOD, "id": "cats-00000000"}, "id 'cats-00000000' is kept for pair 0"),
    ],
)
def test_what_is_not_of_the_schema_is_named_before_anything_is_written(tmp_path, line, message):
    file = write_lines(tmp_path / "cats.jsonl", {**GOOD, "id": "taken"}, {**GOOD, "id": "cats-00000001"})
    bad = line if isinstance(line, bytes) else json.dumps(line).encode()
    file.write_bytes(file.read_bytes() + bad + b"\n")
    with pytest.raises(DataError, match=re.escape(f"{file}:3") + "(:| is) .*" + message) as caught:
        prepare([file], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_id_that_comes_twice_in_another_subset_is_another(tmp_path):
    lines = [text_pair(0, subset="a", id="x"), text_pair(1, subset="b", id="x")]
    prepare([write_lines(tmp_path / "x.jsonl", *lines)], tmp_path / "out")
    assert [pairs[0].key for pairs in pairs_of(tmp_path / "out").values()] == ["x", "x"]


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="none.jsonl cannot be read: No such file"):
        prepare([tmp_path / "none.jsonl"], tmp_path / "out")
    empty = write_lines(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="empty.jsonl: no line with a pair"):
        prepare([empty], tmp_path / "out")
    with pytest.raises(DataError, match=r"my.pairs.jsonl:1: subset 'my.pairs' must be"):
        prepare([write_lines(tmp_path / "my.pairs.jsonl", GOOD)], tmp_path / "out")
    with pytest.raises(ConfigError, match="names a file twice"):
        prepare([empty, tmp_path / "x/../empty.jsonl"], tmp_path / "out")
    with pytest.raises(ConfigError, match="--meta-task='ranking' is not one of classification"):
        prepare([empty], tmp_path / "out", meta_task="ranking")
