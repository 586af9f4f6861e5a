"""Merged weights against the mean computed from full tensors, and what cannot be merged."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forking import run_script
from golden_model import ONEVISION
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.merge import merge
from megatron_llave.checkpoint.stream import read_weights, write_weights
from megatron_llave.config.load import config_from_dict, load_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.convert.hf import import_hf
from megatron_llave.convert.training_record import training_record
from megatron_llave.errors import CheckpointError, UserError
from megatron_llave.models import model_without_memory

ROOT = Path(__file__).resolve().parents[2]


def weights_of(folder: Path, groups: ProcessGroupCollection) -> dict[str, Tensor]:
    cfg = load_config(folder / folders.CONFIG)
    return dict(read_weights(folder, model_without_memory(cfg.model, groups), groups))


def write_random(folder: Path, cfg: RunConfig, groups: ProcessGroupCollection, seed: int) -> Path:
    folder.mkdir()
    embedder = model_without_memory(cfg.model, groups)
    shapes = {name: parameter.shape for name, parameter in embedder.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    dtype = embedder.config.params_dtype
    write_weights(folder, cfg, embedder, groups, lambda name: values[name].to(dtype))
    return folder


@pytest.fixture
def cfg() -> RunConfig:
    return config_from_dict({"model": {"preset": "tiny"}})


@pytest.mark.parametrize(
    ("preset", "shares"),
    [
        *(("tiny", shares) for shares in [(0.25, 0.75), (1.0, 0.0), (1.5, -0.5), (0.5, 0.2, 0.3)]),
        *((f"tiny_qwen{version}vl", (0.25, 0.75)) for version in ("2_5", "3")),
    ],
)
def test_merge_is_the_weighted_mean(groups, tmp_path: Path, preset: str, shares: tuple[float, ...]) -> None:
    cfg = config_from_dict({"model": {"preset": preset}})
    parts = [write_random(tmp_path / str(seed), cfg, groups, seed) for seed in range(len(shares))]
    out = merge(list(zip(parts, shares)), tmp_path / "merged", groups)
    values = [weights_of(part, groups) for part in parts]
    merged = weights_of(out, groups)
    assert merged.keys() == values[0].keys()
    for name, value in merged.items():
        expected = sum(share * one[name].double() for share, one in zip(shares, values))
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)
    if shares == (1.0, 0.0):
        assert all(torch.equal(value, values[0][name]) for name, value in merged.items())


def test_bfloat16_is_summed_in_float32(groups, tmp_path: Path) -> None:
    cfg = config_from_dict({"model": {"preset": "tiny", "precision": "bf16"}})
    parts = [write_random(tmp_path / str(seed), cfg, groups, seed) for seed in range(3)]
    merged = weights_of(merge([(part, 1 / 3) for part in parts], tmp_path / "merged", groups), groups)
    values = [weights_of(part, groups) for part in parts]
    for name, value in merged.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, (sum(1 / 3 * one[name].float() for one in values)).to(torch.bfloat16)), name


def test_assets_come_along_and_the_tool_says_where(groups, tmp_path: Path) -> None:
    source = import_hf(ONEVISION, tmp_path / "imported", groups)
    command = [sys.executable, str(ROOT / "tools" / "merge.py"), f"{source}=0.5", f"{source}=0.5"]
    done = subprocess.run([*command, "--to", str(tmp_path / "merged")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"checkpoint: {tmp_path / 'merged'}" in done.stdout, done.stderr
    before, after = weights_of(source, groups), weights_of(tmp_path / "merged", groups)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    names = {str(path.relative_to(source)) for path in (source / "assets").rglob("*")}
    assert (
        names == {str(p.relative_to(tmp_path / "merged")) for p in (tmp_path / "merged" / "assets").rglob("*")} != set()
    )


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((1.0,), "at least two checkpoints"),
        ((0.5, 0.6), "shares 0.5, 0.6 must add up to 1, not 1.1"),
        ((0.5, float("nan")), "must add up to 1"),
        ((1e300, -1e300, 1.0), "share 1e\\+300 is too large"),
    ],
)
def test_shares_that_make_no_mean(groups, cfg, tmp_path: Path, shares, message: str) -> None:
    part = write_random(tmp_path / "part", cfg, groups, 0)
    with pytest.raises(UserError, match=message):
        merge([(part, share) for share in shares], tmp_path / "merged", groups)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_the_card_says_that_it_is_merged_and_of_what(groups, cfg, tmp_path: Path, order: tuple[int, ...]) -> None:
    """Whatever the order: the configuration is that of the first part, which may be no run's."""
    run = config_from_dict({"model": {"preset": "tiny"}, "train": {"steps": 8}})
    trained = tmp_path / "trained" / folders.FOLDER / "step-0000006"
    trained.parent.mkdir(parents=True)
    folders.write_manifest(write_random(trained, run, groups, 0), 6, {"tensor": 2})
    merged, imported = tmp_path / "merged before", write_random(tmp_path / "imported", cfg, groups, 0)
    merge([(imported, 0.5), (trained, 0.5)], merged, groups)
    parts = [(trained, 0.25), (merged, 1.25), (imported, -0.5)]
    out = merge([parts[number] for number in order], tmp_path / "merged", groups)
    rows = [
        "| trained | 0.25 | trained, 6 of 8 steps |",
        "| merged before | 1.25 | merged from several checkpoints |",
        "| imported | -0.5 | converted, not trained |",
    ]
    record = training_record(out, folders.saved_config(out))
    assert "Merged: the weights are the weighted mean" in record and "Converted" not in record
    assert "\n".join(rows[number] for number in order) in record and str(tmp_path) not in record
    assert ("| weights | Merged from several" in record) == ("## Recipe" in record) == (order[0] == 0)
    assert "Trained by" not in record and ("No run has trained the first" in record) == (order[0] == 2)
    manifest = json.loads((out / folders.MANIFEST).read_text())
    (out / folders.MANIFEST).write_text(json.dumps(manifest | {"merged": [{"name": "a"}]}))
    with pytest.raises(CheckpointError, match="manifest.json is damaged: merged: "):
        training_record(out, folders.saved_config(out))


def test_other_models_tokenizers_and_damage_are_named(groups, cfg, tmp_path: Path) -> None:
    one, two = (write_random(tmp_path / name, cfg, groups, 0) for name in ("one", "two"))
    wide = config_from_dict({"model": {"preset": "tiny", "language": {"hidden_size": 64}}})
    other = write_random(tmp_path / "wide", wide, groups, 0)
    with pytest.raises(UserError, match=re.escape("language.hidden_size")):
        merge([(one, 0.5), (other, 0.5)], tmp_path / "merged", groups)
    for folder, text in ((one, "a"), (two, "b")):
        (folder / "assets").mkdir()
        (folder / "assets" / "tokenizer.model").write_text(text)
    with pytest.raises(CheckpointError, match="one/assets/tokenizer.model and .*two/assets/tokenizer.model differ"):
        merge([(one, 0.5), (two, 0.5)], tmp_path / "merged", groups)
    shutil.rmtree(two / "assets")
    data = (two / "__0_0.distcp").read_bytes()
    (two / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="two cannot be loaded"):
        merge([(one, 0.5), (two, 0.5)], tmp_path / "merged", groups)
    with pytest.raises(CheckpointError, match="nowhere does not exist; "):
        merge([(one, 0.5), (tmp_path / "nowhere", 0.5)], tmp_path / "merged", groups)
    assert not list(tmp_path.glob("merged*"))


def test_part_without_a_share_is_named(tmp_path: Path) -> None:
    done = run_script(ROOT / "tools" / "merge.py", "runs/a", "runs/b=0.5", "--to", tmp_path / "out")
    assert done.returncode == 2 and "'runs/a' must be a checkpoint with its share" in done.stderr
    assert "Traceback" not in done.stderr
