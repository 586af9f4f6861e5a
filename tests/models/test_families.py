"""The registry of families: one from outside of the package is configured, converted, trained and embedded with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import words_family
from golden_model import byte_tokenizer
from megatron.core.process_groups_config import ProcessGroupCollection
from run_ranks import run_ranks
from safetensors.torch import load_file, save_file

from megatron_llave import models
from megatron_llave.batch import Pair, Side
from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.config.load import config_from_dict, load_config
from megatron_llave.config.presets import PRESETS
from megatron_llave.convert.hf import export_hf, import_hf
from megatron_llave.convert.inspect import inspect
from megatron_llave.data.index import Index, write_index
from megatron_llave.data.shards import write_subset
from megatron_llave.embedding.embedder import LoadedModel, embed
from megatron_llave.errors import CheckpointError, ConfigError, DataError
from megatron_llave.models.hf.mapping import hf_shapes
from megatron_llave.planning.pair_lengths import Kind, read_kinds

SIDES = {text: Side(text, []) for text in ("one", "two words", "three words here")}


@pytest.fixture
def registered() -> Iterator[None]:
    """The family `words`, known for one test."""
    models.register_family(words_family.FAMILY)
    yield
    del models.FAMILIES["words"], PRESETS["words-tiny"]


@pytest.fixture
def hf_folder(registered, groups: ProcessGroupCollection, tmp_path: Path) -> Path:
    """A Hugging Face folder of the family, with random weights."""
    folder = tmp_path / "hf"
    folder.mkdir()
    byte_tokenizer(folder)
    model = config_from_dict({"model": {"preset": "words-tiny"}}).model
    shapes = {n: tuple(p.shape) for n, p in models.model_without_memory(model, groups).named_parameters()}
    rules = words_family.rules(model)
    tensors = {f"words_model.{n}": torch.randn(shape) / 6 for n, shape in hf_shapes(shapes, rules).items()}
    tensors["words_model.head"] = torch.randn(300, 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "words"}')
    return folder


def vectors(folder: Path, groups: ProcessGroupCollection, tokenizer: Path) -> torch.Tensor:
    """Embeddings of SIDES by the model in a folder of any kind."""
    pretrained = find_pretrained(folder)
    cfg = pretrained.cfg
    cfg.data.tokenizer = str(tokenizer)
    chunks = models.build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), None)
    pretrained.load(chunks, groups)
    return embed(LoadedModel(cfg, chunks, models.build_processor(cfg.data, cfg.model), groups), SIDES)


def test_sizes_come_from_the_preset_and_the_name_with_it(registered) -> None:
    model = config_from_dict({"model": {"preset": "words-tiny"}}).model
    assert (model.family, model.language.hidden_size) == ("words", 32)
    assert models.family_of(model) is words_family.FAMILY
    for section, why in [
        ({"preset": "words-tiny", "family": "llava_onevision"}, "words-tiny is of model.family=words, not llava_one"),
        ({"preset": "tiny", "family": "words"}, "model.preset=tiny is of model.family=llava_onevision, not words"),
    ]:
        with pytest.raises(ConfigError, match=why):
            config_from_dict({"model": section})


def test_names_that_are_taken_or_unknown_are_told(registered, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model family words: the name words is taken"):
        models.register_family(words_family.FAMILY)
    model = config_from_dict({"model": words_family.SIZES | {"family": "letters"}}).model
    with pytest.raises(ConfigError, match="model.family='letters' is not one of llava_onevision, .*words"):
        models.family_of(model)
    (tmp_path / "config.json").write_text('{"model_type": "letters"}')
    known = "llava_onevision or llava or llava_qwen or .*words"
    with pytest.raises(CheckpointError, match=f"model_type='letters' .* {known}"):
        models.read_hf_config(tmp_path)


def test_weights_go_in_and_out(hf_folder: Path, groups, tmp_path: Path, capsys) -> None:
    checkpoint = import_hf(hf_folder, tmp_path / "checkpoint", groups, "words-tiny")
    assert load_config(checkpoint / "config.yaml").model.family == "words"
    assert inspect(checkpoint, groups) == inspect(hf_folder, groups) == 0
    assert "words: no images" in capsys.readouterr().out
    tokenizer = hf_folder / "tokenizer.json"
    expected = vectors(hf_folder, groups, tokenizer)
    assert expected.shape == (3, 32) and torch.equal(vectors(checkpoint, groups, tokenizer), expected)
    cfg = find_pretrained(checkpoint).cfg
    cfg.data.tokenizer = str(tokenizer)
    identity = find_pretrained(checkpoint).identity(cfg, average=False)
    assert identity.keys() == {"weights", "averaged", "tokenizer", "precision"}
    assert export_hf(checkpoint, tmp_path / "out", groups) == []
    given, back = (load_file(folder / "model.safetensors") for folder in (hf_folder, tmp_path / "out"))
    assert given.keys() == back.keys() and all(torch.equal(back[name], value) for name, value in given.items())
    with pytest.raises(ConfigError, match="format='llava_qwen' is not one of words"):
        export_hf(checkpoint, tmp_path / "other", groups, "llava_qwen")


def test_a_run_starts_from_its_weights_at_another_layout(hf_folder: Path, groups, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    sides = [(Side(f"what is {n}?", []), Side(f"word {n}", [])) for n in range(16)]
    pairs = [Pair(f"pair-{n}", "words", *both, f"q{n}", f"t{n}") for n, both in enumerate(sides)]
    write_index(data, Index({"words": write_subset(pairs, data, "words", "retrieval")}))
    arguments = [f"data.path={data}", f"train.output={tmp_path / 'run'}", f"checkpoint.init={hf_folder}"]
    config = tmp_path / "run.yaml"
    config.write_text("{train: {steps: 2, global_batch_size: 8}, loss: {temperature: 0.1}, parallel: {pipeline: 2}}")
    run_ranks(2, words_family.__file__, "--config", str(config), *arguments)
    trained = vectors(tmp_path / "run", groups, hf_folder / "tokenizer.json")
    assert not torch.equal(trained, vectors(hf_folder, groups, hf_folder / "tokenizer.json"))
    cfg = load_config(tmp_path / "run" / "config.yaml", leave_out=["parallel"])
    assert cfg.model.family == "words"
    [kind] = read_kinds(data, cfg)
    assert isinstance(kind, Kind) and kind.pairs[0][0].tokens == len("what is 0?") + 1
    with pytest.raises(DataError, match="words have no images"):
        models.build_processor(cfg.data, cfg.model).encode(Side("", [b"image"]))
