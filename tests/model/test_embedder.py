"""The whole embedder in one process: where visual tokens go, what is frozen, precision, and equal weights."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from reference import pack, random_pairs, random_sequence

from megatron_llave import config_file
from megatron_llave.config import ModelConfig, ParallelConfig
from megatron_llave.data.packing import EncodedSequence
from megatron_llave.data.prompts import IMAGE
from megatron_llave.model.embedder import LlaveEmbedder, build_model
from megatron_llave.presets import PRESETS


def tiny(**changes) -> ModelConfig:
    cfg = config_file.build({"model": {"preset": "tiny"} | changes, "train": {"steps": 1}})
    return cfg.model


def build(model: ModelConfig, groups: ProcessGroupCollection, seed: int = 0) -> LlaveEmbedder:
    return build_model(model, ParallelConfig(), groups, torch.device("cpu"), seed)[0]


def test_tiny_preset_has_the_documented_size(groups: ProcessGroupCollection) -> None:
    assert sum(parameter.numel() for parameter in build(tiny(), groups).parameters()) == 1_040_768
    assert set(PRESETS) == {"tiny", "0.5b", "2b", "7b"}


def test_visual_tokens_stand_where_the_image_stood(groups: ProcessGroupCollection) -> None:
    """Against the splice written out sequence by sequence."""
    model = tiny()
    embedder = build(model, groups)
    sequences = [random_sequence(model, seed, with_image=seed != 1) for seed in range(4)]
    packed = pack(sequences, model, multiple=8)
    with torch.no_grad():
        hidden = embedder.splice(packed, embedder.visual_tokens(packed)).squeeze(1)
        table = embedder.language.embedding.word_embeddings.weight
        expected = []
        for sequence in sequences:
            for token in sequence.tokens:
                if token != IMAGE:
                    expected.append(table[token][None])
                    continue
                features = embedder.projector(embedder.vision(torch.tensor(sequence.tiles[0])).flatten(0, 1))
                expected += [features, embedder.image_newline[None]]
    expected = torch.cat(expected)
    assert len(hidden) % 8 == 0
    torch.testing.assert_close(hidden[: len(expected)], expected, rtol=0, atol=1e-5)


def test_neighbours_in_the_row_do_not_change_an_embedding(groups: ProcessGroupCollection) -> None:
    model = tiny()
    embedder = build(model, groups)
    sides = [side for pair in random_pairs(model, 4) for side in pair]
    with torch.no_grad():
        together = embedder(pack(sides, model))
        alone = torch.cat([embedder(pack([side], model)) for side in sides])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(sides)))
    assert (together @ together.T - torch.eye(len(sides))).max() < 0.99


def test_a_row_without_images_costs_no_vision(groups: ProcessGroupCollection) -> None:
    model = tiny()
    embedder = build(model, groups)
    embedder.vision.forward = None  # calling it would fail
    texts = [EncodedSequence([1, 2, 3], [], []), EncodedSequence([4, 5], [], [])]
    assert embedder(pack(texts, model)).shape == (2, 128)
    assert embedder(pack([], model)).shape == (0, 128)


@pytest.mark.parametrize("freeze", [[], ["vision"], ["projector"], ["language"], ["vision", "projector"]])
def test_frozen_parts_get_no_gradient(groups: ProcessGroupCollection, freeze: list[str]) -> None:
    model = tiny(freeze=freeze)
    embedder = build(model, groups)
    sides = [side for pair in random_pairs(model, 4) for side in pair]
    embeddings = embedder(pack(sides, model))
    (embeddings[::2] * embeddings[1::2]).sum().backward()
    for part in ("vision", "projector", "language"):
        trained = [parameter.grad is not None for parameter in getattr(embedder, part).parameters()]
        assert not any(trained) if part in freeze else all(trained), part
    assert (embedder.image_newline.grad is None) == ("projector" in freeze)


def test_bf16_stays_close_to_fp32(groups: ProcessGroupCollection) -> None:
    sides = [side for pair in random_pairs(tiny(), 4) for side in pair]
    exact, rounded = (build(tiny(precision=precision), groups) for precision in ("fp32", "bf16"))
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        one, two = exact(pack(sides, tiny())), rounded(pack(sides, tiny()))
    assert two.dtype == torch.float32
    assert F.cosine_similarity(one, two).min() > 0.99


def test_seed_decides_the_weights(groups: ProcessGroupCollection) -> None:
    one, same, other = (dict(build(tiny(), groups, seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    matrices = [name for name in one if one[name].dim() > 1]
    assert all(not torch.equal(one[name], other[name]) for name in matrices)
    for name in matrices:
        weight = one[name].detach()
        assert weight.std() == pytest.approx(weight[0].numel() ** -0.5, rel=0.1), name
