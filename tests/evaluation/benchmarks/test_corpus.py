"""Retrieval on the user's own files: scores, TREC ranking, resume, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_mmeb import GOLDEN
from golden_model import ONEVISION, byte_tokenizer
from PIL import Image
from run_ranks import run_ranks

from megatron_llave.embedding import cache
from megatron_llave.embedding.cache import CachedEmbedder
from megatron_llave.embedding.embedder import load_model
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation import ranking
from megatron_llave.evaluation.benchmarks import corpus
from megatron_llave.evaluation.benchmarks.corpus import evaluate_retrieval, read_retrieval
from megatron_llave.evaluation.metrics import TIES_BY_INDEX
from megatron_llave.evaluation.ranking import search

ROOT = Path(__file__).resolve().parents[3]
IDENTITY = {"weights": "made up"}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PART_COST", 10)


def vector(text: str) -> torch.Tensor:
    """[8] of unit length, the same for texts that end in the same word."""
    seed = int.from_bytes(text.split()[-1].encode(), "little") % 2**31
    return torch.nn.functional.normalize(torch.randn(8, generator=torch.Generator().manual_seed(seed)), dim=0)


def embedder(parts):
    for part in parts:
        yield torch.stack([vector(part[key].text) for key in part])


def write_files(folder: Path, num: int = 40, judgements: str | None = None) -> tuple[Path, Path, Path]:
    """Query i asks for word i, which candidate c{i} has; judged so in TREC's format."""
    paths = folder / "queries.jsonl", folder / "corpus.jsonl", folder / "qrels.txt"
    words = [f"{chr(97 + i % 26)}{i}" for i in range(num)]
    paths[0].write_text("".join(json.dumps({"id": f"q{i}", "text": f"find {w}"}) + "\n" for i, w in enumerate(words)))
    paths[1].write_text("".join(json.dumps({"id": f"c{i}", "text": f"it is {w}"}) + "\n" for i, w in enumerate(words)))
    paths[2].write_text(judgements or "".join(f"q{i} 0 c{i} 1\n" for i in range(num)))
    return paths


def test_scores_and_the_files_written(groups, tmp_path):
    data = read_retrieval(*write_files(tmp_path))
    _, scores = evaluate_retrieval(CachedEmbedder(embedder, tmp_path / "out", IDENTITY, groups.dp), data, [1, 5])
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    chance = {"precision@1": 2.5, "recall@1": 2.5, "recall@5": 12.5, "ndcg@1": 2.5}
    assert {name: written["chance"][name] for name in chance} == pytest.approx(chance)
    counts = {"queries_left_out_of_their_own_ranking": 0, "queries_in_corpus_under_another_id": 0}
    assert written == {"ties": TIES_BY_INDEX, **counts, "chance": written["chance"], **scores}
    assert "order" in TIES_BY_INDEX
    assert set(scores.values()) == {100.0}
    lines = [line.split() for line in (tmp_path / "out" / "ranking.trec").read_text().splitlines()]
    assert len(lines) == 40 * 5 and lines[0][:4] == ["q0", "Q0", "c0", "1"] and lines[0][5] == "megatron_llave"
    for start in range(0, len(lines), 5):
        row = lines[start : start + 5]
        assert [line[3] for line in row] == ["1", "2", "3", "4", "5"]
        similarities = [float(line[4]) for line in row]
        assert similarities == sorted(similarities, reverse=True) and similarities[0] == pytest.approx(1, abs=1e-6)
    # A second time everything is there, and a corpus smaller than k is ranked whole.
    nothing = CachedEmbedder(lambda parts: iter([]), tmp_path / "out", IDENTITY, groups.dp)
    assert evaluate_retrieval(nothing, data, [1, 5])[1] == scores
    evaluate_retrieval(nothing, data, [1, 10**20])
    assert len((tmp_path / "out" / "ranking.trec").read_text().splitlines()) == 40 * 40


def test_beirs_table_and_grades(groups, tmp_path):
    table = "query-id\tcorpus-id\tscore\nq0\tc1\t2\nq0\tc0\t1\nq1\tc1\t0\n"
    data = read_retrieval(*write_files(tmp_path, judgements=table))
    assert data.judgements == {"q0": {"c1": 2, "c0": 1}, "q1": {"c1": 0}}
    _, scores = evaluate_retrieval(CachedEmbedder(embedder, tmp_path / "out", IDENTITY, groups.dp), data, [1])
    assert scores["precision@1"] == 100.0 and scores["ndcg@1"] == 50.0  # one query is judged relevant to anything


def test_queries_that_are_in_the_corpus_do_not_find_themselves(groups, tmp_path):
    """As BEIR and MTEB score ArguAna and Quora; a query that is judged relevant to itself stays."""
    paths = write_files(tmp_path, num=6)
    paths[0].write_text(paths[1].read_text())
    paths[2].write_text("".join(f"c{i} 0 c{i ^ 1} 1\n" for i in range(6)) + "c5 0 c5 1\n")
    data = read_retrieval(*paths)

    def first(same_id: str) -> tuple[dict[str, float], list[str]]:
        embed = CachedEmbedder(embedder, tmp_path / "out", IDENTITY, groups.dp)
        _, scores = evaluate_retrieval(embed, data, [1, 2], same_id)
        rows = [line.split() for line in (tmp_path / "out" / "ranking.trec").read_text().splitlines()]
        assert len(rows) == 6 * 2
        return scores, [row[2] for row in rows if row[3] == "1"]

    kept, found = first("keep")
    assert found == [f"c{i}" for i in range(6)] and kept["precision@1"] == pytest.approx(100 / 6)
    _, found = first("leave_out")
    assert not any(name == f"c{i}" for i, name in enumerate(found[:5])) and found[5] == "c5"
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["queries_left_out_of_their_own_ranking"] == 5
    assert corpus._same_inputs(data, "leave_out")[0].startswith("5 queries are in the corpus under the same id and are")
    paths[0].write_text(paths[0].read_text().replace("it is", "that is", 2))
    line = "5 queries are in the corpus under the same id and can find themselves (--same-id); 2 of them"
    assert corpus._same_inputs(read_retrieval(*paths), "keep")[0].startswith(line)
    paths[0].write_text(paths[1].read_text().replace('"c', '"q'))
    paths[2].write_text("q0 0 c0 1\n")
    assert corpus._same_inputs(read_retrieval(*paths), "keep") == [
        "5 queries are in the corpus under another id, 'q1' is the first; they are ranked"
    ]


@pytest.mark.parametrize(
    ("which", "text", "message"),
    [
        (2, f"q0 0 c0 {'1' * 5000}\n", r"qrels\.txt:1: .* is neither"),
        (2, "q0 0 c0 1\n\x00\ud83d", r"qrels\.txt:2 is not UTF-8 text"),
        (1, "[" * 100_000, r"corpus\.jsonl:1 is not valid JSON .nested deeper than 100"),
        (0, '{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n', r"queries\.jsonl:2: id 'a' is that of line 1 too"),
        (1, '{"id": "a b", "text": "x"}\n', r"corpus\.jsonl:1: id 'a b' must be without white space"),
        (1, "", r"corpus\.jsonl has no lines"),
        (2, "q0 0 c0 1\nq0 0 c99 1\n", r"qrels\.txt:2: no candidate has the id 'c99'"),
        (2, "q99 0 c0 1\n", r"qrels\.txt:1: no query has the id 'q99'"),
        (2, "q0 0 c0 high\n", r"qrels\.txt:1: 'q0 0 c0 high' is neither QUERY 0 CANDIDATE GRADE nor"),
        (2, "q0 c0 1.0\nq1 c1 1\n", r"qrels\.txt:1: 'q0 c0 1\.0' is neither .* with a whole number as grade"),
        (2, "q0 c0 1\nq1 c1 1.5\n", r"qrels\.txt:2: 'q1 c1 1\.5' is neither"),
        (2, "q0 c0 nan\n", r"qrels\.txt:1: 'q0 c0 nan' is neither"),
        (2, "q0 c0 --5\n", r"qrels\.txt:1: 'q0 c0 --5' is neither"),
        (2, "q0 0 c0 \u00b2\n", r"qrels\.txt:1: 'q0 0 c0 .' is neither"),
        (2, "q0 c0 \u00b2\n", r"qrels\.txt:1: 'q0 c0 .' is neither"),
        (2, "q0 c0 1\nq1 c1 1\nq0 c0 2\n", r"qrels\.txt:3: 'q0' and 'c0' have grade 2 here and 1 before"),
        (2, "q0 0 c0 0\n", r"qrels\.txt has no candidate with a grade above 0"),
    ],
)
def test_bad_files_are_named(tmp_path, which, text, message):
    paths = write_files(tmp_path)
    paths[which].write_text(text, errors="surrogatepass")
    with pytest.raises(DataError, match=message):
        read_retrieval(*paths)


def test_without_judgements_equal_ids_are_right(tmp_path):
    queries, corpus, _ = write_files(tmp_path, num=3)
    with pytest.raises(
        DataError, match=r"queries\.jsonl: no candidate in .*corpus\.jsonl has the id 'q0'; without --j"
    ):
        read_retrieval(queries, corpus)
    for path in (queries, corpus):
        path.write_text("".join(json.dumps({"text": f"{path.stem} {i}"}) + "\n" for i in range(3)))
    assert read_retrieval(queries, corpus).judgements == {"1": {"1": 1}, "2": {"2": 1}, "3": {"3": 1}}


def test_byte_order_marks_and_rare_line_ends_are_text(tmp_path):
    paths = write_files(tmp_path)
    queries = '{"id": "q0", "text": "two\u2028lines"}\n{"id": "q1", "text": "x"}\n'
    paths[0].write_text(queries, encoding="utf-8-sig")
    paths[2].write_text("query-id\tcorpus-id\tscore\r\nq0\tc0\t1\r\n\r\nq0\tc0\t1\r\n", encoding="utf-8-sig")
    data = read_retrieval(*paths)
    assert data.queries.ids == ["q0", "q1"] and data.queries.inputs.entries[0].text == "two\u2028lines"
    assert data.judgements == {"q0": {"c0": 1}}
    paths[2].write_text("q0 0 c0 1\n", encoding="utf-8-sig")
    assert read_retrieval(*paths).judgements == {"q0": {"c0": 1}}


def test_pictures_outside_the_folder_and_missing_ones(groups, tmp_path):
    (tmp_path / "far").mkdir()
    paths = write_files(tmp_path)
    image = tmp_path / "far" / "0.png"
    image.write_bytes((GOLDEN / "ImageNet-1K" / "0.png").read_bytes())
    lines = [{"id": "q0", "image": str(image)}, {"id": "q1", "image": ["near.png", str(image)]}]
    lines += [{"id": "q2", "image": ["near.png", "near.png"]}]
    (tmp_path / "queries").mkdir()
    path = tmp_path / "queries" / "queries.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths[2].write_text("q0 0 c0 1\n")
    data = read_retrieval(path, *paths[1:])
    assert data.queries.inputs["queries 0 " + str(image)].images == [image.read_bytes()]
    missing = r"data set queries, input 'q1': .*near\.png does not exist, 1 of 2 files looked for are missing; they "
    with pytest.raises(DataError, match=missing + rf"start from the folder of {path}"):
        evaluate_retrieval(CachedEmbedder(embedder, tmp_path / "out", IDENTITY, groups.dp), data, [1])


def test_depths_below_one_are_refused(groups, tmp_path):
    with pytest.raises(ConfigError, match="--k 0,5 must be numbers of at least 1"):
        evaluate_retrieval(
            CachedEmbedder(embedder, tmp_path, IDENTITY, groups.dp), read_retrieval(*write_files(tmp_path)), [0, 5]
        )


@pytest.mark.parametrize("k", [1, 7, 500])
def test_search_is_numpys_argsort(k, monkeypatch):
    monkeypatch.setattr(ranking, "CANDIDATES_PER_BLOCK", 64)
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(90, 16, generator=generator), dim=1)
    candidates, queries = rows[torch.randint(90, (300,), generator=generator)], rows[:20] * -1
    index, similarity = search(queries, candidates, k, chunk=6)
    exact = (queries.double() @ candidates.double().T).numpy()
    order = np.argsort(-exact.astype(np.float32), axis=1, kind="stable")[:, :k]
    shown = min(k, 300)
    np.testing.assert_allclose(similarity[:, :shown], np.take_along_axis(exact, order, 1), atol=1e-7)
    assert (index[:, shown:] == -1).all() and similarity[:, shown:].eq(-torch.inf).all()
    # Equal candidates come in the order of their indices.
    same = similarity[:, 1:shown] == similarity[:, : shown - 1]
    assert (index[:, 1:shown] > index[:, : shown - 1])[same].all()


def test_the_tool_on_two_ranks_and_a_model(groups, tmp_path):
    paths = write_files(tmp_path, num=12)
    out, tokenizer = tmp_path / "out", byte_tokenizer(tmp_path)
    names = ("--queries", "--corpus", "--judgements")
    files = [word for name, path in zip(names, paths) for word in (name, str(path))]
    common = ["retrieval", "--checkpoint", str(ONEVISION), *files, "--k", "3", f"data.tokenizer={tokenizer}"]
    printed = run_ranks(2, ROOT / "tools" / "evaluate.py", *common[:-1], "--out", str(out), common[-1])
    assert "recall@3" in printed and printed.count("scores, ranking and report") == 1 and "(chance 25.00 %)" in printed
    page = (out / "report.html").read_text()
    assert "<td>recall@3</td>" in page and "<td>25.00</td>" in page and "data:image/png" in page
    assert (
        f"<td>checkpoint</td><td>{ONEVISION}</td>" in page and f"<td>data</td><td>{paths[0]}, {paths[1]}</td>" in page
    )
    assert Image.open(out / "montage.png").height > 8 * 116  # 8 queries
    model = load_model(ONEVISION, overrides=[f"data.tokenizer={tokenizer}"])
    rows = model.embed([f"find {chr(97 + i)}{i}" for i in range(12)])
    best = search(rows, model.embed([f"it is {chr(97 + i)}{i}" for i in range(12)]), 3)[0]
    lines = [line.split()[2] for line in (out / "ranking.trec").read_text().splitlines()]
    assert lines == [f"c{index}" for index in best.flatten().tolist()]
