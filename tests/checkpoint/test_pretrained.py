"""What a run starts from: found wherever it is, refused when it is another model, the vocabulary taken over."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_model import ONEVISION, byte_tokenizer
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_llave.checkpoint.async_writer import CheckpointWriter
from megatron_llave.checkpoint.pretrained import Pretrained, find_pretrained
from megatron_llave.checkpoint.state import TrainingState
from megatron_llave.config.load import load_config
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import ParallelConfig, RunConfig, TrainConfig
from megatron_llave.convert.hf import import_hf
from megatron_llave.embedding import embedder
from megatron_llave.embedding.embedder import load_model
from megatron_llave.errors import CheckpointError, ConfigError
from megatron_llave.models import build_model
from megatron_llave.models.blocks import qwen2
from megatron_llave.models.blocks.layer_specs import RMSNorm
from megatron_llave.training.optimizer import build_trainable


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
    with pytest.raises(ConfigError, match="model.family=qwen2_vl contradicts .*, where it is llava_onevision"):
        own.adopt(ModelConfig(family="qwen2_vl"))
    with pytest.raises(ConfigError, match="model.language.rope_theta=10.0 contradicts .*hf_tiny, where it is"):
        load_model(ONEVISION, ["model.language.rope_theta=10"])


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


class NormWithExtraState(RMSNorm):
    """Has an extra state, as the norm of Transformer Engine does."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        raise AssertionError("no checkpoint holds an extra state")


def test_layers_with_and_without_extra_states_have_the_same_checkpoints(groups, tmp_path: Path, monkeypatch) -> None:
    own = find_pretrained(ONEVISION)

    def build(norm: type) -> list[torch.nn.Module]:
        with monkeypatch.context() as patch:
            patch.setattr(qwen2, "final_norm", lambda kernels, kind: norm)
            return build_model(own.cfg.model, ParallelConfig(), groups, torch.device("cpu"), seed=None)

    plain = import_hf(ONEVISION, tmp_path / "plain", groups)
    expected = build(RMSNorm)
    own.load(expected, groups)
    chunks = build(NormWithExtraState)
    assert "language.decoder.final_layernorm._extra_state" in chunks[0].state_dict()
    find_pretrained(plain).load(chunks, groups)
    cfg = RunConfig(model=own.cfg.model, train=TrainConfig(output=str(tmp_path / "run")))
    trainable = build_trainable(cfg, chunks, groups)
    state = TrainingState(chunks, trainable, None, groups).to_save(1)
    assert {type(part) for part in state["model"].values()} <= {ShardedTensor, ShardedTensorFactory}
    writer = CheckpointWriter(cfg, groups)
    assert writer.save(1, state, None) and writer.poll(wait=True)
    loaded = build(RMSNorm)
    find_pretrained(writer.last).load(loaded, groups)
    for model in (chunks[0], loaded[0]):
        for mine, other in zip(model.parameters(), expected[0].parameters(), strict=True):
            assert torch.equal(mine, other)


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
