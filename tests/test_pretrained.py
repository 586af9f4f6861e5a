"""What a run starts from: found wherever it is, refused when it is another model, the vocabulary taken over."""

from dataclasses import replace
from pathlib import Path

import pytest
from golden_model import ONEVISION, byte_tokenizer

from megatron_llave import config_file
from megatron_llave.config_model import ModelConfig
from megatron_llave.errors import CheckpointError, ConfigError
from megatron_llave.pretrained import find_pretrained


def test_sizes_come_with_the_weights() -> None:
    own = find_pretrained(ONEVISION)
    assert own.is_hf and own.find_tokenizer() is None
    given = ModelConfig(freeze=["vision"], precision="bf16")
    adopted = own.adopt(given)
    assert (adopted.vision, adopted.language) == (own.cfg.model.vision, own.cfg.model.language)
    assert adopted.image_grids == own.cfg.model.image_grids != []
    assert (adopted.freeze, adopted.precision) == (["vision"], "bf16")
    assert own.adopt(replace(given, image_grids=[[1, 1]])).image_grids == [[1, 1]]


def test_given_sizes_must_agree_but_for_the_vocabulary() -> None:
    own = find_pretrained(ONEVISION)
    model = own.cfg.model
    larger = replace(model, language=replace(model.language, vocab_size=600), image_grids=[[1, 1]])
    assert own.adopt(larger).language.vocab_size == 512 and own.adopt(larger).image_grids == [[1, 1]]
    wider = replace(model, vision=replace(model.vision, ffn_hidden_size=97))
    with pytest.raises(ConfigError, match="model.vision.ffn_hidden_size=97 contradicts .*hf_tiny, where it is 96"):
        own.adopt(wider)
    with pytest.raises(ConfigError, match="rope_theta=10000.0 contradicts"):
        own.adopt(replace(model, language=replace(model.language, rope_theta=10000.0)))


def test_configuration_may_leave_the_sizes_to_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 1}\n")
    with pytest.raises(ConfigError, match="model.vision.hidden_size=0 must be positive"):
        config_file.load(path)
    assert config_file.load(path, [f"checkpoint.init={ONEVISION}"]).model.vision.hidden_size == 0
    with pytest.raises(ConfigError, match="model.vision.num_layers=0 must be positive"):
        config_file.load(path, [f"checkpoint.init={ONEVISION}", "model.vision.hidden_size=48"])


def test_tokenizer_beside_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((ONEVISION / "config.json").read_bytes())
    tokenizer = byte_tokenizer(tmp_path)
    assert find_pretrained(tmp_path).find_tokenizer() == str(tokenizer)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=f"{path} is neither a checkpoint .* would hold config.json"):
            find_pretrained(path)
