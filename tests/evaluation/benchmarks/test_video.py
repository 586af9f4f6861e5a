"""Text-video retrieval: ranks by brute force, and the tool on clips that are made here."""

import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from golden_model import ONEVISION, byte_tokenizer
from run_ranks import run_ranks

from megatron_llave.embedding.cache import CachedEmbedder
from megatron_llave.embedding.embedder import load_model
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.benchmarks.video import CaptionedVideo, evaluate_videos
from megatron_llave.evaluation.metrics import ranks_of_right, summarise_ranks
from megatron_llave.prepare.openmoji import clips as clips_module
from megatron_llave.prepare.openmoji.catalogue import Catalogue
from megatron_llave.prepare.openmoji.clips import make_clips

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def clips(emoji_catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Six clips; while the tests here run, the catalogue of the images is one that has been made before."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    with patch.object(clips_module, "build_catalogue", autospec=True, return_value=emoji_catalogue) as build:
        assert make_clips(folder, 6) == 6
        build.assert_called_once_with(56)
        yield folder


@pytest.mark.parametrize("distinct", [3, 40])
def test_ranks_are_those_of_a_stable_sort(distinct):
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(distinct, 8, generator=generator), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(30, 8, generator=generator), dim=1)
    candidates = rows[torch.randint(distinct, (40,), generator=generator)]
    is_right = torch.rand(30, 40, generator=generator) < 0.1
    is_right[:, 7] |= ~is_right.any(1)
    # A product per candidate, so that equal rows tie exactly in the reference too.
    exact = np.array([[np.dot(q, c) for c in candidates.double().numpy()] for q in queries.double().numpy()])
    order = np.argsort(-exact.astype(np.float32), axis=1, kind="stable")
    expected = [1 + int(np.flatnonzero(is_right[i].numpy()[order[i]])[0]) for i in range(30)]
    assert ranks_of_right(queries, candidates, is_right, chunk=7).tolist() == expected


def test_recall_and_median():
    scores = summarise_ranks(torch.tensor([1, 1, 4, 6, 20, 11]))
    expected = {"recall@1": 100 / 3, "recall@5": 50.0, "recall@10": 200 / 3, "median_rank": 5.0}
    assert scores == pytest.approx(expected)


def test_scores_that_cannot_be_written_and_missing_videos_are_one_line(groups, tmp_path):
    def embedder(parts):
        for part in parts:
            yield torch.eye(4)[: len(part)]

    videos = [CaptionedVideo(name, f"{name}.mp4", ["text"]) for name in "ab"]
    (tmp_path / "a.mp4").touch()
    missing = r"data set videos, input 'b': .*b\.mp4 does not exist, 1 of 2 files .*; --videos names the folder"
    with pytest.raises(DataError, match=missing):
        evaluate_videos(CachedEmbedder(embedder, tmp_path / "out", {}, groups.dp), videos, tmp_path)
    (tmp_path / "b.mp4").touch()
    (tmp_path / "out" / "scores.json").mkdir()
    with pytest.raises(DataError, match=r"out/scores\.json cannot be written: Is a directory"):
        evaluate_videos(CachedEmbedder(embedder, tmp_path / "out", {}, groups.dp), videos, tmp_path)


def test_clips_are_the_same_every_time_and_not_overwritten(clips, tmp_path):
    make_clips(tmp_path / "again", 6)
    names = sorted(path.name for path in clips.iterdir())
    assert len(names) == 7 and names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert (clips / "manifest.jsonl").read_bytes() == (tmp_path / "again" / "manifest.jsonl").read_bytes()
    lines = [json.loads(line) for line in (clips / "manifest.jsonl").read_text().splitlines()]
    assert [len(line["captions"]) for line in lines] == [2] * 6
    with pytest.raises(DataError, match="already holds finished videos"):
        make_clips(clips, 2)
    with pytest.raises(ConfigError, match="--count 0 must be at least 1"):
        make_clips(tmp_path / "none", 0)


def test_the_tool_scores_clips_on_two_ranks_as_one_process_does(clips, groups, tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    arguments = ["video", "--checkpoint", str(ONEVISION), "--manifest", str(clips / "manifest.jsonl")]
    arguments += ["--out", str(tmp_path / "out"), f"data.tokenizer={tokenizer}"]
    printed = run_ranks(2, ROOT / "tools" / "evaluate.py", *arguments)
    assert "text to video: recall@1" in printed and "6 videos, 12 captions" in printed
    stored = {
        name: np.load(tmp_path / "out" / "embeddings" / name / "part-00000.npy") for name in ("captions", "videos")
    }
    assert stored["captions"].shape == (12, 64) and stored["videos"].shape == (6, 64)
    model = load_model(ONEVISION, overrides=[f"data.tokenizer={tokenizer}"])
    lines = [json.loads(line) for line in (clips / "manifest.jsonl").read_text().splitlines()]
    texts = [
        f"Find me an video that matches the given caption: {caption}" for line in lines for caption in line["captions"]
    ]
    captions = model.embed(texts)
    np.testing.assert_allclose(stored["captions"], captions.numpy(), atol=3e-6)
    belongs = torch.arange(12)[:, None] // 2 == torch.arange(6)
    expected = summarise_ranks(ranks_of_right(captions, torch.from_numpy(stored["videos"]), belongs))
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["text_to_video"] == expected and scores["video_to_text"]["median_rank"] >= 1
    # Frames matter: the videos are told apart.
    assert np.abs(stored["videos"] - stored["videos"][0]).max(axis=1)[1:].min() > 1e-3
