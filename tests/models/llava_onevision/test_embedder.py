"""The whole embedder in one process: where visual tokens go, what is frozen, precision, and equal weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from reference import pack, random_pairs, random_sequence

from megatron_llave.config.load import config_from_dict
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.presets import PRESETS
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.data.packing import IMAGE, EncodedSequence, TileShape, VisualLayout, pack_sequences
from megatron_llave.models import build_model
from megatron_llave.models.llava_onevision.anyres import visual_layout
from megatron_llave.models.llava_onevision.embedder import LlaveEmbedder, blend

GOLDEN = Path(__file__).parents[2] / "golden"
MERGE = [case for case in json.loads((GOLDEN / "anyres/merge.json").read_text()) if case["modality"] == "image"]


def tiny(**changes) -> ModelConfig:
    cfg = config_from_dict({"model": {"preset": "tiny"} | changes, "train": {"steps": 1}})
    return cfg.model


def build(model: ModelConfig, groups: ProcessGroupCollection, seed: int = 0) -> LlaveEmbedder:
    return build_model(model, ParallelConfig(), groups, torch.device("cpu"), seed)[0]


def test_tiny_preset_has_the_documented_size(groups: ProcessGroupCollection) -> None:
    assert sum(parameter.numel() for parameter in build(tiny(), groups).parameters()) == 1_040_768
    own = {name for name, sizes in PRESETS.items() if "family" not in sizes}
    assert own == {"tiny", "0.5b", "2b", "7b"}


def test_visual_tokens_stand_where_the_image_stood(groups: ProcessGroupCollection) -> None:
    """Against the splice written out sequence by sequence."""
    model = tiny()
    embedder = build(model, groups)
    sequences = [random_sequence(model, seed, with_image=seed != 1) for seed in range(4)]
    packed = pack(sequences, model, multiple=8)
    with torch.no_grad():
        hidden = embedder.inputs(packed)[0].squeeze(1)
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


def merge_case(case: dict) -> EncodedSequence:
    """An image of a golden merge between two text tokens; its tiles are never looked at."""
    n = 6 if case["grid"].endswith("(6x6)") else 2
    grids = tuple((columns, rows) for columns in range(1, n + 1) for rows in range(1, n + 1))
    layout = visual_layout(*case["size_wh"], () if case["name"] == "single_tile" else grids, 384, 27, 9)
    return EncodedSequence([5, IMAGE, 6], [np.zeros((case["n_tiles_in"], 3, 1, 1), np.uint8)], [layout])


def merged(cases: list[dict], multiple: int) -> list[torch.Tensor]:
    """Visual tokens [v, 8] of each case out of one packed row, the tower and projector replaced by golden features."""
    arrays = np.load(GOLDEN / "anyres/merge.npz")
    features = torch.cat([torch.from_numpy(arrays[f"{case['name']}_in"]) for case in cases])
    packed = pack_sequences([merge_case(case) for case in cases], multiple, TileShape(size=1, patches=729))
    assert len(packed.tiles) == len(features) and len(packed.tokens) % multiple == 0
    stand_in = SimpleNamespace(
        vision=lambda tiles, blank: features,
        projector=torch.nn.Identity(),
        image_newline=torch.from_numpy(arrays["image_newline"]),
        encoded=lambda sequences, encode: encode(),
    )
    row = torch.full((len(packed.tokens), 8), torch.nan)
    [row[packed.visual_position]] = LlaveEmbedder.visual_tokens(stand_in, packed)
    bounds = packed.cu_seqlens.tolist()
    assert row[packed.tokens > 0].isnan().all()
    return [row[start + 1 : end - 1] for start, end in zip(bounds, bounds[1 : len(cases) + 1])]


@pytest.mark.parametrize("together", [False, True])
def test_visual_tokens_are_merged_as_released(together: bool) -> None:
    """Exact copies; 1e-6 where the feature map is interpolated."""
    arrays = np.load(GOLDEN / "anyres/merge.npz")
    rows = merged(MERGE, 64) if together else [merged([case], 1)[0] for case in MERGE]
    assert len(rows) == 10
    for case, ours in zip(MERGE, rows):
        released = torch.from_numpy(arrays[f"{case['name']}_out"])
        atol = 1e-6 if case["name"] == "anyres_2000x800_g6" else 0
        torch.testing.assert_close(ours, released, rtol=0, atol=atol, msg=lambda text: f"{case['name']}: {text}")


def test_gradient_flows_through_interpolation() -> None:
    """The gradient that interpolate gives, in float64, 1e-6 (the weights are float32)."""
    layout = visual_layout(90, 60, ((3, 2),), 30, 4, 2)
    torch.manual_seed(0)
    features = torch.randn(7 * 16, 3, dtype=torch.float64, requires_grad=True)
    ours = blend(features, torch.tensor(layout.blend_source), torch.tensor(layout.blend_weights))
    whole = features[16:].reshape(2, 3, 4, 4, 3).permute(4, 0, 2, 1, 3).reshape(1, 3, 8, 12)
    expected = F.interpolate(whole, [4, 6], mode="bilinear")[0].flatten(1).T
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    downstream = torch.randn_like(ours)
    gradients = [torch.autograd.grad(out, features, downstream, retain_graph=True)[0] for out in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)
    assert gradients[0].abs().sum() > 1


def test_blend_in_bf16_is_rounded_once() -> None:
    layout = visual_layout(90, 60, ((3, 2),), 30, 4, 2)
    torch.manual_seed(0)
    features = torch.randn(7 * 16, 3).bfloat16()
    source, weights = torch.tensor(layout.blend_source), torch.tensor(layout.blend_weights)
    assert blend(features, source, weights).equal(blend(features.float(), source, weights).bfloat16())


@pytest.mark.parametrize("freeze", [[], ["vision"]])
def test_blank_tile_is_zeros_after_normalisation(groups: ProcessGroupCollection, freeze: list[str]) -> None:
    """As the released code's input for a placeholder without image; 127, the nearest grey, gives other features."""
    released = np.load(GOLDEN / "hf_tiny/official_image_token_without_image.npz")["pixel_values"]
    model = tiny(freeze=freeze)
    embedder = build(model, groups)
    layout = VisualLayout(np.append(np.arange(16), -1))
    tile = np.full((1, 3, 56, 56), 127, np.uint8)
    sequences = [EncodedSequence([IMAGE, 3], [tile], [layout], blank) for blank in (True, False)]
    with torch.no_grad():
        blank, grey = embedder.visual_tokens(pack(sequences, model))[0].split(17)
        expected = embedder.projector(embedder.vision.encoder(torch.from_numpy(released)).flatten(0, 1))
    torch.testing.assert_close(blank[:16], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(blank[16], embedder.image_newline.detach())
    assert (grey[:16] - expected).abs().max() > 1e-4


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
