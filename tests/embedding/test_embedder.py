"""Embedding through a checkpoint's model: order, packing limits, inputs that cannot be read, and scores."""

from functools import partial

import pytest
import torch
from letters import Letters
from PIL import Image

from megatron_llave.batch import Side
from megatron_llave.config.load import config_from_dict
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.embedding.cache import CachedEmbedder
from megatron_llave.embedding.describe import describe
from megatron_llave.embedding.embeddable import to_sides
from megatron_llave.embedding.embedder import LoadedModel, embed, embed_parts
from megatron_llave.errors import DataError
from megatron_llave.evaluation.benchmarks.prepared import EvaluationSet, build_tasks
from megatron_llave.evaluation.evaluate import evaluate_tasks
from megatron_llave.evaluation.task import SetResult
from megatron_llave.models import build_model
from megatron_llave.models.llava_onevision.processor import LlavaOnevisionProcessor


@pytest.fixture
def model(groups) -> LoadedModel:
    cfg = config_from_dict({"model": {"preset": "tiny"}, "train": {"steps": 1}, "evaluate": {"tokens_per_batch": 20}})
    chunks = build_model(cfg.model, ParallelConfig(), groups, torch.device("cpu"), seed=0)
    return LoadedModel(cfg, chunks, LlavaOnevisionProcessor(Letters(), "plain", 4096, (), 56, 14), groups)


def evaluate(model: LoadedModel, inputs: dict[str, Side], sets: list[EvaluationSet]) -> list[SetResult]:
    embedder = CachedEmbedder(partial(embed_parts, model), None, {}, model.groups.dp)
    return evaluate_tasks(embedder, build_tasks(inputs, sets), "strict").results


def test_packing_and_order_of_inputs_do_not_matter(model: LoadedModel) -> None:
    texts = ["a", "a much longer text than the others", "bc", "def", "g" * 18, "h"]
    together = embed(model, {text: Side(text, []) for text in texts})
    alone = torch.cat([embed(model, {text: Side(text, [])}) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert embed(model, {}).shape == (0, 128)


def test_a_model_is_printed_in_three_lines(model: LoadedModel) -> None:
    count = sum(weight.numel() for chunk in model.chunks for weight in chunk.parameters()) / 1e6
    kind, takes, where = repr(model).splitlines()
    assert kind == "LoadedModel llava_onevision tiny: 2 layers of 128, vision 2 of 128; in training"
    assert takes == "takes texts, images and videos, up to 4096 tokens, prompt qwen; gives 128 numbers of unit length"
    assert where == f"on cpu in fp32, {count:,.4g} M parameters"
    cfg = config_from_dict(
        {
            "model": {"preset": "tiny"},
            "loss": {"matryoshka_dims": [32, 64]},
            "parallel": {"tensor": 2},
            "train": {"steps": 1},
        }
    )
    cfg.lora.rank = 8
    kind, takes, where = describe(cfg, model.chunks, "org/tiny@1f", True, 4).splitlines()
    assert kind.endswith("vision 2 of 128, adapters of rank 8; averaged weights of org/tiny@1f")
    assert takes.endswith("gives 128 numbers of unit length (also trained: the first 32, 64)")
    assert where.endswith(f"M parameters, {count:,.4g} M of them here; tensor 2, data 2")


def test_images_that_lose_something_are_counted(model: LoadedModel, capsys) -> None:
    sticker = Image.merge("RGBA", [Image.linear_gradient("L")] * 4)
    embed(model, {"a": Side("", [sticker]), "b": Side("", [sticker, Image.new("L", (9, 9))]), "c": Side("c", [])})
    model.print_image_notes()
    assert capsys.readouterr().err.startswith("noticed: 2 x image with transparency, 1 x image of one colour (")


def test_a_mapping_may_have_the_frames_of_a_video() -> None:
    frames = [Image.new("RGB", (8, 6)), Image.new("RGB", (8, 6), "red")]
    item = {"text": "<image> x", "frames": frames}
    [video, images, timed], _ = to_sides([item, {"text": "<image> x", "image": frames}, {**item, "fps": 4}])
    assert timed == Side("<image> x", frames, is_video=True, seconds=(0, 0.25))
    with pytest.raises(DataError, match="seconds of a Side must be rising .* one for each of its 2 frames, not .1,"):
        Side("", frames, is_video=True, seconds=(1,))
    assert video == Side("<image> x", frames, is_video=True) and images == Side("<image> x", frames)
    assert to_sides(video) == ([video], True), "a Side stays what it is"
    with pytest.raises(DataError, match="the input: image and frames are two spellings of one key"):
        to_sides({"image": frames, "frames": frames})
    with pytest.raises(DataError, match="input 0: text has 2 image placeholders for 1 images"):
        to_sides([{"text": "<image> <image>", "frames": frames}])


def test_input_that_cannot_be_read_is_named(model: LoadedModel) -> None:
    with pytest.raises(DataError, match="input broken cannot be embedded: not a readable image in a known format"):
        embed(model, {"fine": Side("a", []), "broken": Side("", [b"no picture"])})


def test_scores_find_each_input_itself(model: LoadedModel) -> None:
    inputs = {text: Side(text, []) for text in ("one", "two", "three", "four")}
    keys = list(inputs)
    right = EvaluationSet("right", "retrieval", "ind", queries=keys, candidates=keys[::-1], positives=[3, 2, 1, 0])
    wrong = EvaluationSet("wrong", "retrieval", "ood", queries=keys, candidates=keys, positives=[1, 2, 3, 0])
    results = evaluate(model, inputs, [right, wrong])
    assert [result.precision_at_1 for result in results] == [100, 0]
    assert results[0].candidates[results[0].top[0][0]] == results[0].queries[0] == "prepared 0 one"
    assert results[0].positive == pytest.approx([1.0] * 4)


def test_embeddings_that_are_not_finite_are_not_scored(model: LoadedModel) -> None:
    inputs = {text: Side(text, []) for text in ("ab", "c", "d")}
    two_queries = EvaluationSet("a set", "retrieval", "ind", ["ab", "c"], ["d", "c"], [0, 1])
    weight = next(p for name, p in model.chunks[0].named_parameters() if "word_embeddings" in name)
    with torch.no_grad():
        weight[ord("d")] = float("nan")
    with pytest.raises(DataError, match="input prepared 2 d has no finite embedding .1 of 3 inputs"):
        evaluate(model, inputs, [two_queries])
