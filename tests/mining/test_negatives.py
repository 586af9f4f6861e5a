"""tools/mine.py on small shards: the files, at several layouts, after a kill, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forking import run_script
from golden_model import ONEVISION, byte_tokenizer
from PIL import Image
from reference_mining import exact, mine
from run_ranks import run_ranks

from megatron_llave.batch import Pair, Side
from megatron_llave.config.data import DataConfig
from megatron_llave.config.mining import Rules
from megatron_llave.data.index import Index, read_index, write_index
from megatron_llave.data.order import open_order
from megatron_llave.data.shards import read_samples, unpack_json, unpack_list, write_subset
from megatron_llave.data.stored_vectors import open_vectors
from megatron_llave.prepare.audit import verify

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "mine.py"
RULES = ["--negatives", "3", "--depth", "12", "--ratio", "0.999", "--max-uses", "4"]
KILLED = """
import os, signal, sys
from megatron_llave.commands.mine import main
from megatron_llave.embedding.cache import EmbeddingCache
from megatron_llave.mining import negatives_folder

def killed(*args):
    counts[0] += 1
    if counts[0] == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)

counts = [0]
if sys.argv[2] == "embedding":
    original, EmbeddingCache.write = EmbeddingCache.write, killed
else:
    original, negatives_folder._write = negatives_folder._write, killed
main(sys.argv[3:])
"""


def png(folder: Path, number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return (folder / "image.png").read_bytes()


def vqa(images: list[bytes], number: int) -> Pair:
    """Every fourth query comes again with another answer; answers 2 and 3 are one text under two ids."""
    of_query = number // 4 * 3 + min(number % 4, 2)
    query = Side(f"<image>\nWhat is {of_query}?", [images[number % 5]])
    answer = number % 11
    text = "the same" if answer in (2, 3) else f"it is {answer * 7919}"
    own = (number + 5) % 11
    others = [Side("the same" if own in (2, 3) else f"it is {own * 7919}", [])] if number % 6 == 0 else []
    names = [f"a{own}"] if others else []
    return Pair(f"v{number}", "vqa", query, Side(text, []), f"q{of_query}", f"a{answer}", others, names)


def drawn(images: list[bytes], number: int) -> Pair:
    target = Side("<image>\nRepresent the given image.", [images[number]])
    return Pair(f"d{number}", "drawn", Side(f"draw {number * 31}", []), target, f"q{number}", f"i{number}")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of ten pairs: questions about images with texts as answers, and texts with images."""
    folder = tmp_path_factory.mktemp("mined")
    images = [png(folder, number) for number in range(20)]
    shards = folder / "shards"
    subsets = {"vqa": write_subset((vqa(images, i) for i in range(40)), shards, "vqa", "vqa", 10)}
    cut = png(folder, 20)
    images.append(cut[: len(cut) // 2])  # its header can be read, and it cannot be decoded
    subsets["drawn"] = write_subset((drawn(images, i) for i in range(21)), shards, "drawn", "retrieval", 10)
    write_index(shards, Index(subsets))
    return shards


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    shutil.copytree(ONEVISION, folder)
    byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def mined(data: Path, model: Path) -> Path:
    """The negatives, mined on one rank."""
    out = data.parent / "one"
    done = run_script(TOOL, "negatives", "--checkpoint", model, "--data", data, "--out", out, *RULES)
    assert done.returncode == 0, done.stderr
    assert f"{out}: train with data.negatives={out} data.hard_negatives=3" in done.stdout
    assert re.search(r"^vqa, model: of \d+ candidates, left out ratio \d+\.\d %$", done.stdout, re.MULTILINE), (
        done.stdout
    )
    assert "1 of 83 inputs cannot be embedded, and their pairs get no negatives" in done.stderr
    assert f"report: {out / 'report.html'}" in done.stdout and (out / "report.html").is_file()
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pairs_of(data: Path, name: str) -> list[dict[str, Any]]:
    """The JSON of each pair of a subset, in order, with its key and the members of its sample as `images`."""
    samples = [s for shard in read_index(data).subsets[name].shards for s in read_samples(data / shard.file)]
    return [unpack_json(sample, "") | {"__key__": sample["__key__"], "images": sample} for sample in samples]


def reference(data: Path, store: Path, name: str, rules: Rules) -> dict[str, list[str]]:
    """The negatives of each query, by names, of similarities that numpy computes from the stored embeddings."""
    (file,) = store.glob("*.npy")
    vectors = open_vectors(file)
    pairs = [pair for pair in pairs_of(data, name) if vectors.has([f"{name}/target/{pair['target']['id']}"])]
    queries = list(dict.fromkeys(pair["query"]["id"] for pair in pairs))

    def looks(pair: dict, side: dict) -> object:
        return tuple(pair["images"][image] for image in side["images"]) or side["text"]

    targets: dict[object, str] = {}  # what a target looks like -> its first id; here two that look alike are equal
    for pair in pairs:
        targets.setdefault(looks(pair, pair["target"]), pair["target"]["id"])
    numbers = {look: number for number, look in enumerate(targets)}
    positives: list[list[int]] = [[] for _ in queries]
    hidden: list[set[int]] = [set() for _ in queries]
    for pair in pairs:
        query = queries.index(pair["query"]["id"])
        positives[query].append(numbers[looks(pair, pair["target"])])
        for side in (pair["target"], *pair.get("hard_negatives", [])):
            hidden[query].add(numbers[looks(pair, side)])
    positives = [list(dict.fromkeys(own)) for own in positives]
    vectors = open_vectors(file)
    rows = [
        vectors.rows([f"{name}/{kind}/{x}" for x in ids])
        for kind, ids in (("query", queries), ("target", targets.values()))
    ]
    found = mine([exact(*(x.numpy() for x in rows))], positives, hidden, rules)
    names = list(targets.values())
    return {query: [names[number] for number in own] for query, own in zip(queries, found)}


def test_lists_are_those_of_numpy_and_pairs_get_their_contents(data: Path, mined: Path) -> None:
    rules, total = Rules(3, 12, 0, 0.999, max_uses=4), 0
    manifest = json.loads((mined / "negatives.json").read_text())
    for name in ("vqa", "drawn"):
        expected = reference(data, mined.with_name("one.embeddings"), name, rules)
        pairs = pairs_of(data, name)
        sides = {pair["target"]["id"]: (pair["target"], pair["images"]) for pair in reversed(pairs)}
        beside = {s["__key__"]: s for file in mined.glob(f"{name}-*.tar") for s in read_samples(file)}
        of_subset = 0
        for pair in pairs:
            sample = beside.pop(pair["__key__"])
            described = unpack_json(sample, "")
            found, names = unpack_list("hard_negatives", "", described, sample, "")
            assert names == expected.get(pair["query"]["id"], []) and described["query"] == pair["query"]["id"]
            for side, target in zip(found, names):
                right, members = sides[target]
                assert (side.text, side.images) == (right["text"], [members[image] for image in right["images"]])
            values = [entry["similarity"] for entry in described["hard_negatives"]]
            assert values == sorted(values, reverse=True) and len(values) == len(names)
            of_subset += len(names) > 0
        assert not beside
        counts = manifest["subsets"][name]
        assert counts["pairs_with_negatives"] == of_subset and counts["kept"] == sum(map(len, expected.values()))
        assert [shard["of"] for shard in counts["shards"]] == [s.sha256 for s in read_index(data).subsets[name].shards]
        assert counts["pairs"] == len(pairs) and counts["pairs_not_embedded"] == (name == "drawn")
        assert len(expected) == counts["queries"] == (30 if name == "vqa" else 20) and counts["kept"] > 0
        total += counts["kept"]
    assert manifest["checkpoints"] == ["model"]
    assert manifest["complete"] is True and manifest["models"][0]["weights"] and manifest["rules"]["ratio"] == 0.999
    assert total > 60 and manifest["subsets"]["vqa"]["left_out_together"]["max_uses"] > 0


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (2, ["parallel.tensor=2"]),
        pytest.param(2, [], marks=pytest.mark.slow),
        pytest.param(4, [], marks=pytest.mark.slow),
        pytest.param(4, ["parallel.tensor=2"], marks=pytest.mark.slow),
    ],
)
def test_every_layout_writes_the_same_bytes(
    data: Path, model: Path, mined: Path, tmp_path: Path, world: int, overrides: list[str]
) -> None:
    command = ["negatives", "--checkpoint", model, "--data", data, "--out", tmp_path / "out", *RULES, *overrides]
    run_ranks(world, TOOL, *map(str, command))
    assert contents(tmp_path / "out") == contents(mined)


def test_an_approximate_search_is_told_from_an_exact_one(data: Path, model: Path, mined: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    command = ["negatives", "--checkpoint", model, "--data", data, "--store", mined.with_name("one.embeddings"), *RULES]
    done = run_script(TOOL, *command, "--out", tmp_path / "out", "--search", "faiss", "--probes", "7")
    assert done.returncode == 0, done.stderr
    # So few targets are one list.
    assert "vqa, model: the approximate search finds 100.0 % of a query's nearest targets\n" in done.stdout
    manifest, exactly = (json.loads((out / "negatives.json").read_text()) for out in (tmp_path / "out", mined))
    assert manifest.pop("search") == {"kind": "faiss", "probes": 7} and exactly.pop("search") is None
    assert [subset.pop("recall") for subset in manifest["subsets"].values()] == [[1.0], [1.0]]
    assert manifest == exactly
    assert "the approximate search finds 100.0 %" in (tmp_path / "out" / "report.html").read_text()
    done = run_script(TOOL, *command, "--out", tmp_path / "out")
    assert done.returncode == 2 and f"{tmp_path / 'out'} holds negatives of other search; choose" in done.stderr


def test_killed_while_embedding_and_while_writing_it_continues(
    data: Path, model: Path, mined: Path, tmp_path: Path
) -> None:
    script, out = tmp_path / "killed.py", tmp_path / "out"
    script.write_text(KILLED)
    command = ["negatives", "--checkpoint", model, "--data", data, "--out", out, *RULES]
    assert run_script(script, "1", "embedding", *command).returncode == -9
    assert run_script(script, "3", "writing", *command).returncode == -9
    kept = {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    assert len(kept) == 2 and json.loads((out / "negatives.json").read_text())["complete"] is False
    run_ranks(2, TOOL, *map(str, command))
    assert contents(out) == contents(mined)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    done = run_script(TOOL, *command)
    assert done.returncode == 0 and "nothing: the negatives are complete already" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--depth", "13"], "holds negatives of other rules; choose another --out or pass --overwrite"),
        (["--subsets", "vqa"], "holds negatives of other data; choose another --out or pass --overwrite"),
        (["--votes", "2"], "--votes 2 is more than there are checkpoints, 1"),
        (["--subsets", "nowhere"], "--subsets nowhere is not one of drawn, vqa"),
        (["--negatives", "20"], "--depth=12, --skip=0, --negatives=20: the candidates that are left are fewer"),
    ],
)
def test_what_cannot_be_is_one_line(data: Path, model: Path, mined: Path, options: list[str], message: str) -> None:
    before = contents(mined)
    done = run_script(TOOL, "negatives", "--checkpoint", model, "--data", data, "--out", mined, *RULES, *options)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr
    assert contents(mined) == before


def test_the_folder_of_the_shards_is_refused_before_anything_is_embedded(data: Path, model: Path) -> None:
    before = contents(data)
    done = run_script(TOOL, "negatives", "--checkpoint", model, "--data", data, "--out", data, *RULES)
    assert done.returncode == 2 and "holds files with the names of shards but no" in done.stderr.splitlines()[-1]
    assert contents(data) == before and not data.with_name(f"{data.name}.embeddings").exists()


def test_two_models_vote_on_stored_embeddings(data: Path, model: Path, mined: Path, tmp_path: Path) -> None:
    """The same checkpoint twice agrees with itself; the store has its embeddings already."""
    store = mined.with_name("one.embeddings")
    before = contents(store)
    command = ["negatives", "--checkpoint", model, model, "--data", data, "--out", tmp_path / "out", "--store", store]
    done = run_script(TOOL, *command, *RULES, "--votes", "2")
    assert done.returncode == 0, done.stderr
    assert contents(store) == before
    assert {k: v for k, v in contents(tmp_path / "out").items() if k.endswith(".tar")} == {
        k: v for k, v in contents(mined).items() if k.endswith(".tar")
    }


def test_verify_takes_mined_negatives(mined: Path, tmp_path: Path) -> None:
    assert [check.problems for _, check in verify(mined)] == [[]] * 7
    out = Path(shutil.copytree(mined, tmp_path / "out"))
    file = out / "drawn-000000.tar"
    image = next(value for sample in read_samples(file) for name, value in sample.items() if name.endswith(".png"))
    file.write_bytes(file.read_bytes().replace(image, image[:-20] + bytes(20), 1))
    problems = [problem for _, check in verify(out) for problem in check.problems]
    assert len(problems) == 2 and "its sha256 is" in problems[0] and "an image's bytes are not those" in problems[1]


CLUSTERS = ["--cluster-size", "4", "--skip", "0", "--take", "4", "--clustering", "greedy"]


@pytest.fixture(scope="module")
def ordered(data: Path, model: Path, mined: Path) -> Path:
    """The order in which batches are hard, mined on one rank from the embeddings of `mined`."""
    out, store = data.parent / "order", mined.with_name("one.embeddings")
    before = contents(store)
    command = ["batches", "--checkpoint", model, "--data", data, "--out", out, "--store", store, *CLUSTERS]
    done = run_script(TOOL, *command)
    assert done.returncode == 0, done.stderr
    message = f"{out}: train with data.order={out}, and train.global_batch_size a multiple of 4"
    assert message in done.stdout and contents(store) == before
    again = run_script(TOOL, *command)
    assert again.returncode == 0 and "nothing: the order is complete already" in again.stdout
    return out


def test_an_order_has_each_pair_and_says_what_it_is_of(data: Path, ordered: Path) -> None:
    value = json.loads((ordered / "order.json").read_text())
    for name, size, lost in (("vqa", 40, 0), ("drawn", 21, 1)):
        counts, shards = value["subsets"][name], read_index(data).subsets[name].shards
        assert sorted(counts["order"]) == list(range(size)) and counts["pairs"] == size
        assert counts["shards"] == [{"file": shard.file, "sha256": shard.sha256} for shard in shards]
        assert (counts["clusters"], counts["left_over"]) == divmod(size, 4)
        assert counts["pairs_not_embedded"] == lost and counts["connections_inside"] > 0.1 * counts["connections"]
        assert counts["hardest"][0]["batch_size"] == 4
        assert -1 < counts["hardest"][0]["random"] < counts["hardest"][-1]["random"] < 1
    cfg = DataConfig(str(data), order=str(ordered))
    assert open_order(cfg, read_index(data), ["vqa", "drawn"], 8).cluster_size == 4
    assert value["models"][0]["weights"] and value["checkpoints"] == ["model"] and value["rules"]["take"] == 4


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (2, []),
        pytest.param(2, ["parallel.tensor=2"], marks=pytest.mark.slow),
        pytest.param(4, ["parallel.tensor=2"], marks=pytest.mark.slow),
    ],
)
def test_every_layout_writes_the_same_order(
    data: Path, model: Path, ordered: Path, tmp_path: Path, world: int, overrides: list[str]
) -> None:
    """All is embedded again."""
    command = ["batches", "--checkpoint", model, "--data", data, "--out", tmp_path / "out", *CLUSTERS, *overrides]
    run_ranks(world, TOOL, *map(str, command))
    assert contents(tmp_path / "out") == contents(ordered)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--take", "3"], "holds an order of other rules; choose another --out or pass --overwrite"),
        (["--subsets", "vqa"], "holds an order of other data; choose another --out or pass --overwrite"),
        (["--cluster-size", "1"], "--cluster-size=1 must be a finite number of at least 2"),
    ],
)
def test_an_order_that_cannot_be_is_one_line(
    data: Path, model: Path, mined: Path, ordered: Path, options: list[str], message: str
) -> None:
    before = contents(ordered)
    command = ["batches", "--checkpoint", model, "--data", data, "--out", ordered, *CLUSTERS, *options]
    done = run_script(TOOL, *command)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr
    assert contents(ordered) == before
