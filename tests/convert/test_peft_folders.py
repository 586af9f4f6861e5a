"""Adapters between checkpoints and PEFT: peft loads ours, we load peft's; merged in an export, and several averaged."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from check_lora import config_of, embeddings_of
from forking import ROOT, run_script
from golden_lora import ALPHA, PAIRS, RANK, drawn, embedding, folder_of, lora_of, shrink, targeted
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.adapters import read_adapters, write_adapters
from megatron_llave.checkpoint.assets import keep_assets
from megatron_llave.checkpoint.merge import merge
from megatron_llave.checkpoint.pretrained import Base, Pretrained, find_pretrained, read_base
from megatron_llave.config.loss import LossConfig
from megatron_llave.convert import peft_folders
from megatron_llave.convert.hf import export_hf, import_hf
from megatron_llave.convert.peft_folders import export_adapter, import_adapter
from megatron_llave.errors import UserError
from megatron_llave.models import build_model, open_hf
from megatron_llave.models.lora import HfAdapter

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
from huggingface_hub import ModelCard  # noqa: E402  (which transformers needs)

TOOL = ROOT / "tools" / "convert_hf.py"
CASES = [("llava_onevision", "all"), ("qwen3_vl", "all"), ("qwen2_vl", "some")]


def checkpoint(
    out: Path, family: str, targets: str, groups, size: float = 1.0, base: Path | None = None, **others: object
) -> Path:
    """A checkpoint of random adapters for the golden model of a family; `others` are sections of its configuration."""
    weights = open_hf(base or folder_of(family))
    linears = targeted(weights, targets)
    values = drawn(weights, linears)
    found = [HfAdapter(n, values[f"{n}.down"] * size, values[f"{n}.up"], ALPHA / RANK) for n in linears]
    cfg = replace(config_of(family, "1,1,1,0,0"), lora=lora_of(targets), **others)
    record = find_pretrained(weights.files.folder).as_base(None)
    write_adapters(out, cfg, groups, found, record, partial(keep_assets, weights))
    return out


@torch.no_grad()
def embedded(folder: Path, groups) -> Tensor:
    """Embeddings of the golden pairs, with adapters beside the weights if there are some."""
    pretrained = find_pretrained(folder)
    cfg = pretrained.cfg
    chunks = build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), None, cfg.lora)
    pretrained.load(chunks, groups)
    return embeddings_of([chunk.eval() for chunk in chunks], cfg, groups)


def adapters_of(folder: Path, groups) -> dict[str, HfAdapter]:
    cfg = folders.saved_config(folder)
    return {adapter.module: adapter for adapter in read_adapters(folder, cfg, groups)}


def loaded_by_peft(folder: Path, family: str) -> torch.nn.Module:
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder_of(family), dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model.double().eval(), str(folder))
    result = peft.set_peft_model_state_dict(adapted, peft.load_peft_weights(str(folder)))
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    return adapted


@torch.no_grad()
def embedded_by_peft(adapted: torch.nn.Module, family: str) -> Tensor:
    model = adapted.get_base_model()  # in which PEFT has replaced the layers
    model = model if family == "llava_onevision" else model.model
    cases = PAIRS.get(family, PAIRS["qwen"])
    return torch.stack([embedding(model, family, case) for pair in cases for case in pair]).float()


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_peft_loads_ours_and_we_load_its(groups, tmp_path: Path, family: str, targets: str) -> None:
    base = shutil.copytree(folder_of(family), tmp_path / "base")
    source, out = checkpoint(tmp_path / "source", family, targets, groups, base=base), tmp_path / "out"
    shutil.move(base, tmp_path / "moved")  # an export of adapters alone does not need it
    export_adapter(source, out, groups)
    shutil.move(tmp_path / "moved", base)
    adapted, ours = loaded_by_peft(out, family), embedded(source, groups)
    without = embedded(folder_of(family), groups)
    torch.testing.assert_close(embedded_by_peft(adapted, family), ours, rtol=0, atol=2e-5)
    assert (ours - without).abs().max() > 1e-2
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "peft" and "lora" in card.data.tags and str(tmp_path) not in card.content
    assert f"the SHA-256 `{read_base(source).sha256}`. It identifies these files alone" in card.content
    assert "gives other embeddings" not in card.content
    adapted.float().save_pretrained(tmp_path / "peft")
    again = import_adapter(tmp_path / "peft", tmp_path / "again", groups, base=base)
    expected, found = adapters_of(source, groups), adapters_of(again, groups)
    assert found.keys() == expected.keys()
    for name, adapter in found.items():
        assert torch.equal(adapter.down, expected[name].down) and torch.equal(adapter.up, expected[name].up), name
        assert adapter.scale == expected[name].scale
    export_adapter(again, tmp_path / "exported again", groups)
    text = (tmp_path / "exported again" / "README.md").read_text()
    assert "Converted, not trained" in text and "## Recipe" not in text
    lora = folders.saved_config(again).lora
    assert set(lora.targets) == set(lora_of(targets).targets) and (lora.rank, lora.alpha) == (RANK, ALPHA)


def test_a_base_of_the_hub_is_named_with_its_commit(groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = checkpoint(tmp_path / "source", *CASES[0], groups), tmp_path / "out"
    commit = "a" * 40
    monkeypatch.setattr(peft_folders, "read_base", lambda folder: Base(f"org/tiny@{commit}", "0" * 64))
    export_adapter(source, out, groups)
    config = peft.PeftConfig.from_pretrained(str(out))
    assert (config.base_model_name_or_path, config.revision) == ("org/tiny", commit)
    assert ModelCard.load(out / "README.md").data.base_model == "org/tiny"


@pytest.mark.parametrize(("family", "targets"), CASES[:2])
def test_export_with_merged_adapters_embeds_the_same(groups, tmp_path: Path, family: str, targets: str) -> None:
    base, alone = shutil.copytree(folder_of(family), tmp_path / "base"), tmp_path / "alone"
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        shrink(tensors.items())
        save_file(tensors, file, {"format": "pt"})
    source = checkpoint(tmp_path / "source", family, targets, groups, base=base)
    export_hf(source, tmp_path / "out", groups)
    merged = embedded(tmp_path / "out", groups)
    torch.testing.assert_close(merged, embedded(source, groups), rtol=0, atol=1e-6)
    export_adapter(source, alone, groups)
    import_hf(alone, tmp_path / "imported", groups, base=base)
    torch.testing.assert_close(embedded(tmp_path / "imported", groups), merged, rtol=0, atol=1e-6)


def test_several_adapters_of_one_base_are_averaged(groups, tmp_path: Path) -> None:
    """The mean of what they change, although it is no product of means of their matrices; runs had stored rewards."""
    family, targets = CASES[0]
    shares = {1.0: 0.25, -0.5: 0.75}
    stored = LossConfig(reward="stored", stored_embeddings="other model.npy")
    parts = [checkpoint(tmp_path / str(size), family, targets, groups, size, loss=stored) for size in shares]
    out = merge(list(zip(parts, shares.values())), tmp_path / "merged", groups)
    exports = [tmp_path / f"export {number}" for number in range(3)]
    for folder, export in zip((*parts, out), exports):
        export_hf(folder, export, groups)
    one, other, mean = (load_file(export / "model.safetensors") for export in exports)
    assert any(not torch.equal(one[name], other[name]) for name in mean)
    for name, value in mean.items():
        torch.testing.assert_close(value, 0.25 * one[name] + 0.75 * other[name], rtol=0, atol=1e-6)
    cfg = folders.saved_config(out)
    assert cfg.lora.rank == 2 * RANK and cfg.loss == stored


def test_what_cannot_be_merged_is_named(groups, tmp_path: Path) -> None:
    family = CASES[0][0]
    one, some = (checkpoint(tmp_path / targets, family, targets, groups) for targets in ("all", "some"))
    whole = import_hf(folder_of(family), tmp_path / "whole", groups)
    for other in (some, whole):
        with pytest.raises(UserError, match=rf"{other} has lora.rank=.*must be adapters alone"):
            merge([(one, 0.5), (other, 0.5)], tmp_path / "merged", groups)
    moved = shutil.copytree(folder_of(family), tmp_path / "base")
    changed = json.loads((moved / "config.json").read_text()) | {"note": "another file"}
    (moved / "config.json").write_text(json.dumps(changed))
    elsewhere = checkpoint(tmp_path / "elsewhere", family, "all", groups, base=moved)
    with pytest.raises(UserError, match="hold adapters for different weights"):
        merge([(one, 0.5), (elsewhere, 0.5)], tmp_path / "merged", groups)


def test_adapters_that_cannot_be_trained_are_named(groups, tmp_path: Path) -> None:
    family = CASES[0][0]
    source, out = checkpoint(tmp_path / "source", family, "some", groups), tmp_path / "out"
    export_adapter(source, out, groups)
    file, config = out / "adapter_model.safetensors", json.loads((out / "adapter_config.json").read_text())
    tensors = load_file(file)
    module = config["target_modules"][0]
    some = {name: value for name, value in tensors.items() if f".{module}." not in name}
    save_file(some, file)
    with pytest.raises(UserError, match="has adapters on some layers alone; import it without --keep-adapter"):
        import_adapter(out, tmp_path / "in", groups, base=folder_of(family))
    save_file(tensors, file)
    (out / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {module: 3}}))
    with pytest.raises(UserError, match="has several ranks and scales"):
        import_adapter(out, tmp_path / "in", groups, base=folder_of(family))
    with pytest.raises(UserError, match="has no adapter_config.json"):
        import_adapter(folder_of(family), tmp_path / "in", groups)
    with pytest.raises(UserError, match="has no adapters: lora.rank=0; leave out --adapter"):
        export_adapter(import_hf(folder_of(family), tmp_path / "whole", groups), tmp_path / "alone", groups)


def test_options_that_would_have_no_effect_are_refused(groups, tmp_path: Path) -> None:
    family = CASES[0][0]
    base, out = folder_of(family), tmp_path / "out"
    source, whole = checkpoint(tmp_path / "source", family, "some", groups), tmp_path / "whole"
    with pytest.raises(UserError, match=f"--base {base}: {import_hf(base, whole, groups)} holds all of its weights"):
        export_hf(whole, out, groups, base=str(base))
    for option, value in (("--base", base), ("--shard-size", 1)):
        done = run_script(TOOL, "export", "--from", source, "--to", out, "--adapter", option, value)
        assert done.returncode == 2 and f"{option} is for complete weights" in done.stderr, done.stderr
    for size in ("inf", "nan", "-1", "0", "1e300"):
        done = run_script(TOOL, "export", "--from", source, "--to", out, "--shard-size", size)
        assert done.returncode == 2 and done.stderr.startswith(f"error: --shard-size {float(size):g} must"), done.stderr
    export_adapter(source, out, groups)
    with pytest.raises(UserError, match="contradicts config.json"):
        import_adapter(out, tmp_path / "again", groups, preset="2b", base=base)


def test_the_hash_of_the_base_is_compared_once(groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on with adapters records the base, and loads it."""
    source, hashed = checkpoint(tmp_path / "source", CASES[0][0], "some", groups), []
    fingerprint = Pretrained.fingerprint
    monkeypatch.setattr(Pretrained, "fingerprint", lambda self: hashed.append(self.folder) or fingerprint(self))
    pretrained = find_pretrained(source)
    assert pretrained.as_base(None) == read_base(source) and pretrained.find_base(None).folder == hashed[0]
    assert hashed == [folder_of(CASES[0][0]).absolute()]
