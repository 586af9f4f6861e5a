"""What a run starts from: found wherever it is, refused when it is another model, the vocabulary taken over."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from golden_model import ONEVISION, byte_tokenizer

from megatron_llave.checkpoint.pretrained import Pretrained, find_pretrained
from megatron_llave.config.load import load_config
from megatron_llave.config.model import ModelConfig
from megatron_llave.embedding import embedder
from megatron_llave.embedding.embedder import load_model
from megatron_llave.errors import CheckpointError, ConfigError


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
        load_config(path)
    assert load_config(path, [f"checkpoint.init={ONEVISION}"]).model.vision.hidden_size == 0
    with pytest.raises(ConfigError, match="model.vision.num_layers=0 must be positive"):
        load_config(path, [f"checkpoint.init={ONEVISION}", "model.vision.hidden_size=48"])


def test_tokenizer_beside_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((ONEVISION / "config.json").read_bytes())
    tokenizer = byte_tokenizer(tmp_path)
    assert find_pretrained(tmp_path).find_tokenizer() == str(tokenizer)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path} is neither a checkpoint .* would hold config.json"):
        find_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/nothing does not exist; name a checkpoint"):
        find_pretrained(tmp_path / "nothing")


def test_fingerprint_sees_every_byte_of_the_weights_and_no_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(ONEVISION / "config.json", tmp_path / name)
        with open(tmp_path / name / "model.safetensors", "wb") as file:
            file.truncate(40 * 2**20)
    a, b = (find_pretrained(tmp_path / name) for name in ("a", "b"))
    before = a.fingerprint()
    assert before == b.fingerprint()
    with open(tmp_path / "b" / "model.safetensors", "r+b") as file:
        file.seek(25 * 2**20 + 12345)
        file.write(b"x")
    (tmp_path / "a" / "README.md").write_text("weights are all that counts in a Hugging Face folder")
    assert (a.fingerprint(), b.fingerprint() != before) == (before, True)


def test_fingerprint_of_a_checkpoint_is_not_of_an_evaluation_in_its_folder(tmp_path: Path) -> None:
    found = Pretrained(tmp_path, find_pretrained(ONEVISION).cfg, is_hf=False)
    (tmp_path / "assets").mkdir()
    seen = [found.fingerprint()]
    for name in ("__0_0.distcp", "assets/tokenizer.json"):
        (tmp_path / name).write_text("x")
        seen.append(found.fingerprint())
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "report.json").write_text("{}")
    assert len(set(seen)) == 3 and found.fingerprint() == seen[-1]


def test_identity_is_of_the_checkpoint_that_was_loaded(groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on moves `latest` to another checkpoint, or removes this one."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(ONEVISION / name, folder)
    latest = {"run": old}
    monkeypatch.setattr(embedder, "find_pretrained", lambda path: find_pretrained(latest.get(str(path), path)))
    model = load_model("run", overrides=[f"data.tokenizer={byte_tokenizer(tmp_path)}"])
    latest["run"] = new
    assert model.source is not None and model.source.folder == old
    assert model.identity()["weights"] == find_pretrained(old).fingerprint()
    monkeypatch.setattr("builtins.open", gone)
    with pytest.raises(CheckpointError, match=r"old/config\.json cannot be read: No such file or directory; is a run"):
        model.source.fingerprint()


def gone(path: Path, *args: object, **kwargs: object) -> None:
    raise FileNotFoundError(2, "No such file or directory", str(path))
