"""Videos: the released code's choice of frames and pooled tokens, files written and read back, and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_llave.batch import Side
from megatron_llave.config.data import VIDEO_NEWLINES
from megatron_llave.config.load import config_from_dict
from megatron_llave.data.packing import IMAGE, NEWLINE, pack_sequences
from megatron_llave.data.video import choose_frames, read_frames
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.benchmarks.video import CaptionedVideo, read_videos
from megatron_llave.models.llava_onevision.anyres import video_layout
from megatron_llave.models.llava_onevision.processor import (
    LlavaOnevisionProcessor,
    count_tokens,
    video_lengths,
)
from megatron_llave.prepare.openmoji.clips import FRAMES_PER_SECOND, write_video


class Letters:
    """A token per character."""

    eos_id, vocab_size = 0, 300

    def encode(self, text: str) -> list[int]:
        return [1 + ord(letter) % 250 for letter in text]


GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "anyres" / "merge.npz"


def merged(features: np.ndarray, newline: np.ndarray, mode: str) -> np.ndarray:
    """[v, d] tokens that the layout makes of features [frames, p, d]."""
    layout = video_layout(len(features), round(features.shape[1] ** 0.5), mode)
    rows = features.reshape(-1, features.shape[-1])
    blended = (rows[layout.blend_source] * layout.blend_weights[..., None]).sum(1)
    table = np.concatenate([rows, blended, newline[None]])
    return table[np.where(layout.source == NEWLINE, len(table) - 1, layout.source)]


@pytest.mark.parametrize("mode", VIDEO_NEWLINES)
def test_tokens_of_a_video_are_the_released_ones(mode):
    with np.load(GOLDEN) as golden:
        found = merged(golden["video_in"], golden["image_newline"], mode)
        np.testing.assert_allclose(found, golden[f"video_{mode}_out"], atol=1e-6)
        if mode == "no_token":
            np.testing.assert_allclose(found.reshape(3, 196, 8), golden["video_pooled"], atol=1e-6)


def test_lengths_of_the_released_frames():
    lengths = {mode: len(video_layout(32, 27, mode)) for mode in VIDEO_NEWLINES}
    assert lengths == {"one_token": 32 * 196 + 1, "grid": 6720, "frame": 32 * 197, "no_token": 32 * 196}


def test_frames_are_chosen_as_released():
    assert choose_frames(90, 29.97).tolist() == list(range(0, 90, 10))
    assert choose_frames(320, 30).tolist() == list(range(0, 320, 10))  # 32 of them: the limit
    assert choose_frames(321, 30).tolist() == np.linspace(0, 320, 32, dtype=int).tolist()
    assert choose_frames(5, 1).tolist() == [0, 1, 2, 3, 4]  # less than three a second: all
    assert choose_frames(7, 0).tolist() == list(range(7))  # a rate that the file does not say


def counting_frames(count: int, size: int = 64) -> list[np.ndarray]:
    """Grey levels that rise by 4 from frame to frame."""
    return [np.full((size, size, 3), 10 + 4 * number, np.uint8) for number in range(count)]


def test_a_file_written_and_read_gives_the_chosen_frames(tmp_path):
    write_video(tmp_path / "a.mp4", counting_frames(36))
    frames, seconds = read_frames(tmp_path / "a.mp4")
    assert seconds == tuple(np.arange(0, 36, 4) / FRAMES_PER_SECOND)
    assert frames.shape == (9, 64, 64, 3) and frames.dtype == np.uint8
    levels = frames.mean(axis=(1, 2, 3))
    assert np.abs(levels - (10 + 4 * np.arange(0, 36, 4))).max() < 3  # the codec loses a little
    frames, seconds = read_frames(tmp_path / "a.mp4", limit=5)
    assert len(frames) == 5 and seconds == tuple(np.array([0, 8, 17, 26, 35]) / FRAMES_PER_SECOND)


def test_bad_files_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"video .*a\.mp4 cannot be read: Invalid data"):
        read_frames(tmp_path / "a.mp4")
    with pytest.raises(DataError, match=r"video .*none\.mp4 cannot be read: No such file"):
        read_frames(tmp_path / "none.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"pip install av \(the extra video\)"):
        read_frames(tmp_path / "a.mp4")


def test_manifest(tmp_path):
    lines = [{"id": "a", "video": "x/a.mp4", "captions": ["one", "two"]}]
    lines += [{"id": 7, "video": "b.avi", "captions": ["c"]}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_videos(tmp_path / "m.jsonl", tmp_path) == [
        CaptionedVideo("a", "x/a.mp4", ["one", "two"]),
        CaptionedVideo("7", "b.avi", ["c"]),
    ]
    (tmp_path / "list.txt").write_text("7\n")
    assert [one.id for one in read_videos(tmp_path / "m.jsonl", tmp_path, chosen=tmp_path / "list.txt")] == ["7"]
    (tmp_path / "list.txt").write_text("7\n8\n")
    with pytest.raises(DataError, match=r"names video '8', which has no caption in .*m\.jsonl .1 such"):
        read_videos(tmp_path / "m.jsonl", tmp_path, chosen=tmp_path / "list.txt")


def test_msrvtt_and_msvd_as_published(tmp_path):
    (tmp_path / "video7.webm").touch()
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text(
        'key,vid_key,video_id,sentence\nret0,msr7,video7,a woman is singing\nret1,msr9,video9,"a car, and a dog"\n'
    )
    assert read_videos(tmp_path / "MSRVTT_JSFUSION_test.csv", tmp_path) == [
        CaptionedVideo("video7", "video7.webm", ["a woman is singing"]),
        CaptionedVideo("video9", "video9.mp4", ["a car, and a dog"]),
    ]
    videos = [{"video_id": "video1", "split": "train"}, {"video_id": "video2", "split": "test"}]
    sentences = [{"video_id": "video1", "caption": "no"}]
    sentences += [{"video_id": "video2", "caption": f"c{i}"} for i in range(2)]
    (tmp_path / "data.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    assert read_videos(tmp_path / "data.json", tmp_path) == [CaptionedVideo("video2", "video2.mp4", ["c0", "c1"])]
    descriptions = tmp_path / "AllVideoDescriptions.txt"
    descriptions.write_text("# lines\n\nab_1_5 a squirrel eats\nab_1_5 a squirrel\ncd_2_3 x\n")
    assert read_videos(descriptions, tmp_path) == [
        CaptionedVideo("ab_1_5", "ab_1_5.mp4", ["a squirrel eats", "a squirrel"]),
        CaptionedVideo("cd_2_3", "cd_2_3.mp4", ["x"]),
    ]


def test_byte_order_marks_and_rare_line_ends_are_text(tmp_path):
    caption = "a\u2028b\u0085c"
    line = json.dumps({"id": "a", "video": "a.mp4", "captions": [caption]}, ensure_ascii=False)
    texts = {"a.jsonl": f"{line}\n", "a.csv": f'video_id,sentence\r\na,"{caption}\nd"\r\n', "a.txt": f"a {caption}\n"}
    texts["a.json"] = MSRVTT % json.dumps({"video_id": "a", "caption": caption})
    texts["a.json"] = texts["a.json"].replace('"v"', '"a"')
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig", newline="")
        [one] = read_videos(tmp_path / name, tmp_path)
        assert (one.id, one.file) == ("a", "a.mp4")
        assert one.captions == [caption + "\nd" if name == "a.csv" else caption], name


MSRVTT = '{"videos": [{"video_id": "v", "split": "test"}], "sentences": [%s]}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"id": "a", "video": "a.mp4"}\n', r'a\.jsonl:1: must be {"id"'),
        ("a.jsonl", '{"id": "a", "video": "a.mp4", "captions": []}\n', r"a\.jsonl:1: video must be a file name, capt"),
        ("a.jsonl", 2 * '{"id": "a", "video": "a.mp4", "captions": ["x"]}\n', r"a\.jsonl:2: id 'a' comes twice"),
        ("a.csv", "a,b\n1,2\n", r"a\.csv must have the columns video_id and sentence"),
        ("a.jsonl", '{"id": "a", "video": "", "captions": ["x"]}\n', r"a\.jsonl:1: video must be a file name, capt"),
        ("a.jsonl", '\n{"id": "a", "video": "a.mp4", "captions": ["x", " "]}\n', r"a\.jsonl:2: .* none empty"),
        ("a.jsonl", '{"id": "a", "video": "a.mp4", "captions": ["x", null]}\n', r"a\.jsonl:1: video must be a file"),
        ("a.csv", "video_id,sentence\nv, \n", r"a\.csv:2: video 'v' has ' ' for a caption, which must be a text"),
        ("a.csv", "video_id,sentence\nv,x\nw\n", r"a\.csv:3: video 'w' has None for a caption"),
        ("a.csv", "video_id,sentence\n,x\n", r"a\.csv:2: video '' must be the id of a video"),
        ("a.json", MSRVTT % '{"video_id": "v", "caption": null}', r"a\.json: sentence 0: video 'v' has None for a"),
        ("a.json", MSRVTT % '{"video_id": ["v"], "caption": "x"}', r"a\.json must hold videos .*unhashable"),
        ("a.txt", "v\n", r"a\.txt:1: video 'v' has '' for a caption"),
        ("a.json", "[]", r"a\.json must hold videos .video_id, split. and sentences"),
        ("a.txt", "\n", r"a\.txt has no video"),
    ],
)
def test_bad_annotations_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_videos(tmp_path / name, tmp_path)


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"a\.pkl: annotations end in \.jsonl, \.csv, \.json, \.txt; or give"):
        read_videos(tmp_path / "a.pkl", tmp_path)


def test_a_video_is_one_image_of_a_tile_per_frame():
    encoder = LlavaOnevisionProcessor(Letters(), "plain", 4096, ((1, 1), (2, 2)), 56, 14, video_newline="grid")
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), np.uint8)
    encoded = encoder.encode(Side("<image>\nRepresent the given video.", [], frames))
    assert [tiles.shape for tiles in encoded.tiles] == [(3, 3, 56, 56)]
    assert encoded.tokens.count(IMAGE) == 1 and len(encoded.layouts[0]) == 3 * 2 * 3
    packed = pack_sequences([encoded], 1, encoder.tile_shape)
    assert packed.num_tokens == encoded.length == len(encoded.tokens) - 1 + 18
    assert packed.blend_source.shape == (3 * 4, 4) and packed.blend_source.max() == 3 * 16 - 1
    images = [Image.fromarray(frame) for frame in frames]
    stored = encoder.encode(Side("<image>\nRepresent the given video.", images, is_video=True))
    assert stored.tokens == encoded.tokens and np.array_equal(stored.tiles[0], encoded.tiles[0])
    cfg = config_from_dict({"model": {"preset": "tiny"}, "data": {"prompt": "plain", "video_newline": "grid"}})
    assert video_lengths(3, 50, 40, cfg.data, cfg.model) == (18, 3)
    sizes = [[50, 40]] * 3
    assert count_tokens("Represent the given video.", sizes, True, Letters(), cfg.data, cfg.model) == encoded.length
