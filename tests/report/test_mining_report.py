"""The report of mined negatives: what is shown, in which order, for texts, images and videos, and what is refused."""

import base64
import io
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from megatron.core.process_groups_config import ProcessGroupCollection
from PIL import Image

from megatron_llave.batch import Pair, Side
from megatron_llave.commands.mine import main
from megatron_llave.config.mining import Rules
from megatron_llave.data.index import Index, read_index, write_index
from megatron_llave.data.shards import write_subset
from megatron_llave.errors import DataError
from megatron_llave.mining import negatives_folder
from megatron_llave.mining.inputs import SubsetInputs, read_subsets
from megatron_llave.mining.mined import mine_subset
from megatron_llave.mining.neighbours import Neighbours
from megatron_llave.mining.rules import Positives
from megatron_llave.prepare.audit import verify
from megatron_llave.report import mining_report
from megatron_llave.report.mining_report import limit, said_of_recall, write_mining_report

QUERIES, DROPPED, EMPTIED, MOST = 50, 7, 11, 30
RULES = Rules(2, 10, ratio=0.9, ceiling=0.74, min_positive=0.3, max_uses=MOST)
SEEN = '<image>\n<b onclick="x()">hostile &amp; bold</b>'


def image(level: int, size: int = 400) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size // 2), (level, 0, 255 - level)).save(file, "PNG")
    return file.getvalue()


def shown(number: int) -> Pair:
    """Targets are a long text, an image, a video and two images."""
    same = "<image>\nRepresent the given image."
    targets = [
        Side("word " * 100, []),
        Side(same, [image(40)]),
        Side(same, [image(80), image(90), image(100)], is_video=True, seconds=(0.0, 0.5, 1.0)),
        Side(f"<image>\n{same}", [image(120), image(130)]),
    ]
    return Pair(f"s{number}", "shown", Side(SEEN, [image(number)]), targets[number], f"q{number}", f"t{number}")


def words(number: int) -> Pair:
    query, target = Side(f"query number {number}.", []), Side(f"target number {number}.", [])
    return Pair(f"w{number}", "words", query, target, f"q{number}", f"t{number}")


def room(query: int) -> float:
    """How far the nearest negative of a query lies below the limit."""
    return (query * 17 % QUERIES + 1) * 0.005


def neighbours(inputs: SubsetInputs) -> Neighbours:
    """Of query i: target i + 1, of the last one target 1; and of all target 0. The limits are 0.9 x 0.8.

    Of the query EMPTIED, --ceiling leaves out the first candidate and --ratio the second.
    """
    number = np.arange(len(inputs.query_ids))
    targets = np.stack([np.where(number + 1 < len(number), number + 1, 1), np.where(number == 0, 2, 0)], 1)
    first = np.array([0.72 - room(query) for query in number.tolist()])
    positive = np.full(len(number), 0.8)
    if inputs.name == "words":
        positive[DROPPED], first[EMPTIED] = 0.2, 0.75
    second = np.where(number == EMPTIED, 0.73, first - 0.1) if inputs.name == "words" else first - 0.1
    positives = Positives(positive, positive, positive)
    return Neighbours(slice(0, len(number)), targets, np.stack([first, second], 1).astype(np.float32), positives)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, groups: ProcessGroupCollection) -> tuple[Path, Path]:
    """Shards and their mined negatives, with the report."""
    root = tmp_path_factory.mktemp("report")
    data, out = root / "shards", root / "out"
    out.mkdir()
    subsets = {"words": write_subset(map(words, range(QUERIES)), data, "words", "retrieval", 20)}
    subsets["shown"] = write_subset(map(shown, range(4)), data, "shown", "retrieval", 20)
    write_index(data, Index(subsets))
    models = [{"weights": "0" * 64}]
    plan = {"models": models, "rules": asdict(RULES), "data": {"sha256": "1" * 64, "subsets": list(subsets)}}
    negatives_folder.claim(out, plan, read_index(data), overwrite=False)
    written = []
    for inputs in read_subsets(data, read_index(data), list(subsets), []):
        mined = mine_subset(inputs, [[neighbours(inputs)]], RULES)
        written.append((inputs, mined, negatives_folder.write_subset(out, data, inputs, mined)))
    negatives_folder.finish(out, {"checkpoints": ["<i>model</i>"], **plan}, written)
    write_mining_report(out, data)
    return data, out


def sections(out: Path) -> dict[str, str]:
    page = (out / "report.html").read_text()
    return {part.split("</summary>")[0]: part for part in page.split("<details open><summary>")[1:]}


def test_suspicious_queries_come_first_and_then_some_evenly_over_the_rest(folders: tuple[Path, Path]) -> None:
    examples = sections(folders[1])["words"].split("<h3>Examples")[1]
    queries = [int(found) for found in re.findall(r"<div>query number (\d+)\.</div>", examples)]
    order = sorted(set(range(QUERIES)) - {DROPPED, EMPTIED}, key=room)
    rest = order[10:]
    assert queries == order[:10] + [rest[int((i + 0.5) * len(rest) / 10)] for i in range(10)]
    first = examples.split('<div class="mined">')[1]
    assert re.search(r"nearest negative is 0\.00\d\d below the limit of 0\.7200", first)
    cards = re.findall(r'<figure class="card (\w+)"><figcaption><span>[^<]*</span><b>([^<]*)</b>', first)
    nearest = f"{0.72 - room(queries[0]):.4f}"
    assert cards[:3] == [("query", ""), ("right", "0.8000"), ("negative", nearest)]
    assert f"<div>target number {queries[0]}.</div>" in first and f"target number {queries[0] + 1}." in first


def test_why_queries_have_no_negatives_and_which_targets_are_used_most(folders: tuple[Path, Path]) -> None:
    found = sections(folders[1])
    words = found["words"]
    assert (
        f"<td>words</td><td>{QUERIES}</td><td>{QUERIES}</td><td>{QUERIES - 2}</td><td>1</td><td>1</td>"
        in (found["Subsets"])
    )
    assert "<td>1</td><td>2.0 %</td><td>dropped: no positive above --min-positive 0.3</td>" in words
    assert "<td>1</td><td>2.0 %</td><td>without: the last candidates were left out by --ratio</td>" in words
    assert f"<td>--max-uses {MOST}</td><td>{QUERIES - 3 - MOST}</td>" in words
    used = words.split("<h3>Most used negatives</h3>")[1].split("<h3>")[0]
    assert used.split("<figure")[1].endswith("<div>target number 0.</div></figure>")
    assert [int(uses) for uses in re.findall(r"<span>of (\d+) queries</span>", used)] == [MOST, 2, 2, *[1] * 5]
    counted = [int(count) for count in re.findall(r"of each query \((\d+)\)|looked at \((\d+)\)", words)[0] if count]
    assert counted == [QUERIES]


def test_images_are_small_texts_are_cut_and_nothing_is_markup(folders: tuple[Path, Path]) -> None:
    page, shown = (folders[1] / "report.html").read_text(), sections(folders[1])["shown"]
    images = [Image.open(io.BytesIO(base64.b64decode(x))) for x in re.findall(r"image/webp;base64,([^\"]+)", page)]
    assert len(images) > 8 and {one.size for one in images} == {(160, 80)}
    assert "... (+319 characters)" in shown and "word " * 40 not in shown
    assert "video, 3 frames" in shown and "+1 images" in shown
    middle = [one for one in images if abs(one.convert("RGB").getpixel((80, 40))[0] - 90) < 4]
    assert middle, "a video is shown by the frame in its middle"
    assert "&lt;b onclick=&quot;x()&quot;&gt;hostile &amp;amp; bold&lt;/b&gt;" in shown and "&lt;i&gt;model" in page
    assert not re.search(r"<b onclick|<i>model|https?:|<script|&lt;image&gt;", page)


def test_it_is_the_same_again_and_the_folder_stays_what_it_was(folders: tuple[Path, Path], capsys) -> None:
    data, out = folders
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    main(["report", str(out), "--data", str(data)])
    assert capsys.readouterr().out == f"report: {out / 'report.html'}\n"
    assert (out / "report.html").read_bytes() == before
    assert [check.problems for _, check in verify(out)] == [[]] * 4


def test_a_report_goes_with_its_negatives_and_no_other_is_touched(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, out = folders
    index, plan = read_index(data), {"rules": {}}
    shutil.copytree(out, tmp_path / "out")
    assert not negatives_folder.claim(tmp_path / "out", plan, index, overwrite=True)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["negatives.json"]
    (tmp_path / "report.html").write_text("of somebody else")
    with pytest.raises(DataError, match="holds a report.html but no negatives.json; choose another --out"):
        negatives_folder.claim(tmp_path, plan, index, overwrite=True)
    assert (tmp_path / "report.html").read_text() == "of somebody else"


def test_many_subsets_share_a_number_of_examples(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = folders
    monkeypatch.setattr(mining_report, "IN_ALL", 6)
    write_mining_report(out, data)
    assert [sections(out)[name].count('"card query"') for name in ("words", "shown")] == [3, 3]
    monkeypatch.undo()
    write_mining_report(out, data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"complete": False}, "is that of a mining that has not ended"),
        ({"checkpoints": None}, "is malformed (TypeError"),
        ({"rules": {"depth": 3, "nonsense": 1}}, "is malformed (TypeError"),
        ({"subsets": {"birds": {"shards": []}}}, "the data have no subset birds"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    folders: tuple[Path, Path], tmp_path: Path, change: dict[str, object], message: str, capsys
) -> None:
    data, out = folders
    manifest = json.loads((out / "negatives.json").read_text())
    for file in out.glob("*.tar"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "negatives.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path), "--data", str(data)])
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(said) == 1 and message in said[0] and "negatives.json" in said[0]
    assert not (tmp_path / "report.html").exists()


def test_the_limit_is_the_least_of_the_rules_that_are_on() -> None:
    positives = {"least": 0.6, "mean": 0.7, "most": 0.8}
    off = Rules(ratio=None)
    assert limit(positives, off) == 0.6 and limit(None, Rules()) == 1.0
    for rules, expected in (
        ({"ratio": 0.9}, 0.54),
        ({"margin": 0.2}, 0.4),
        ({"mean_margin": 0.25}, 0.45),
        ({"ceiling": 0.3}, 0.3),
        ({"ratio": 0.9, "ceiling": 0.58}, 0.54),
    ):
        assert limit(positives, Rules(**{"ratio": None, **rules})) == pytest.approx(expected)
    assert limit({**positives, "least": -0.2}, Rules(ratio=0.9)) == pytest.approx(-0.22)


def test_a_low_recall_is_said() -> None:
    manifest = {"checkpoints": ["a", "b"]}
    assert list(said_of_recall(manifest, {"recall": [0.95, 0.949]})) == [
        "a: the approximate search finds 95.0 % of a query's nearest targets",
        "b: the approximate search finds 94.9 % of a query's nearest targets; that is low: raise --probes, or use "
        "--search exact",
    ]
    assert list(said_of_recall(manifest, {})) == []
