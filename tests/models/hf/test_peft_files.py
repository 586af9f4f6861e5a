"""LoRA adapters are merged as PEFT merges them, in every spelling of names, or refused; none is read without effect."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_llave.convert.hf import export_hf, import_hf
from megatron_llave.embedding.embedder import load_model
from megatron_llave.errors import CheckpointError
from megatron_llave.models import open_hf, read_hf_config
from megatron_llave.models.hf.peft_files import find_weights
from megatron_llave.models.hf.weights import HfWeights

GOLDEN = Path(__file__).parents[2] / "golden"
FOLDERS = {
    "llava_onevision": GOLDEN / "hf_tiny",
    **{family: GOLDEN / "qwen_vl" / family for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
}
DECODER = {"llava_onevision": "language_model.model.", "qwen2_vl": "language_model.", "qwen3_vl": "language_model."}
# Canonical names of a decoder layer's weights, and what PEFT's names begin with: base_model.model., and then the names
# that the model has in memory, which depend on the version of transformers and on whether the model has its head.
SPELLINGS = {
    "llava_onevision": ["base_model.model.language_model.model.", "base_model.model.model.language_model."],
    "qwen2_vl": [
        "base_model.model.model.",
        "base_model.model.model.language_model.",
        "base_model.model.language_model.",
        "model.language_model.",
    ],
    "qwen3_vl": ["base_model.model.model.language_model.", "base_model.model.language_model."],
}
TARGETS = ("layers.0.self_attn.q_proj", "layers.1.self_attn.k_proj", "layers.2.mlp.down_proj", "layers.3.mlp.up_proj")


def opened(family: str, adapter: Path, folder: Path | None = None) -> HfWeights:
    folder = folder or FOLDERS[family]
    return open_hf(folder, read_hf_config(folder, with_adapter=True), adapter)


def adapter_config(**changes: Any) -> dict:
    """As PEFT 0.17 writes it."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "no/such-folder",
        "bias": "none",
        "corda_config": None,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 16,
        "lora_bias": False,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "qalora_group_size": 16,
        "r": 4,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["q_proj", "k_proj", "down_proj", "up_proj"],
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        **changes,
    }


def matrices(shapes: dict[str, tuple[int, ...]], ranks: dict[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Random A and B by module."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return {
        module: (draw(ranks[module], math.prod(shape[1:])), draw(shape[0], ranks[module]))
        for module, shape in shapes.items()
    }


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(**config)))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def for_decoder(family: str, folder: Path, spelling: str, suffix: str = "", **config: Any) -> dict[str, Tensor]:
    """Write an adapter for TARGETS, and return what PEFT would add to each weight, by canonical name."""
    base = open_hf(FOLDERS[family])
    ranks = {module: config.get("ranks", {}).get(module, 4) for module in TARGETS}
    alphas = {module: config.get("alphas", {}).get(module, 16) for module in TARGETS}
    config = {key: value for key, value in config.items() if key not in ("ranks", "alphas")}
    pairs = matrices({module: base.shape(f"{DECODER[family]}{module}.weight") for module in TARGETS}, ranks)
    tensors = {}
    for module, (down, up) in pairs.items():
        tensors |= {f"{spelling}{module}.lora_A{suffix}.weight": down, f"{spelling}{module}.lora_B{suffix}.weight": up}
    write(folder, tensors, **config)
    scale = {m: alphas[m] / (math.sqrt(r) if config.get("use_rslora") else r) for m, r in ranks.items()}
    return {f"{DECODER[family]}{m}.weight": scale[m] * (up @ down) for m, (down, up) in pairs.items()}


def assert_merged(weights: HfWeights, changes: dict[str, Tensor]) -> None:
    base = open_hf(weights.files.folder, weights.config)
    for name in weights.names:
        expected = base.read(name)
        if name in changes:
            assert changes[name].abs().max() > 0.1
            expected = (expected.float() + changes[name].view(expected.shape)).to(expected.dtype)
        assert torch.equal(weights.read(name), expected), name


@pytest.mark.parametrize("suffix", ["", ".default"])
@pytest.mark.parametrize(
    ("family", "spelling"), [(family, spelling) for family, all_of in SPELLINGS.items() for spelling in all_of]
)
def test_names_of_all_versions_are_merged(family: str, spelling: str, suffix: str, tmp_path: Path) -> None:
    changes = for_decoder(family, tmp_path / "adapter", spelling, suffix)
    assert_merged(opened(family, tmp_path / "adapter"), changes)


PATTERNS = [
    {"use_rslora": True},
    {"rank_pattern": {"k_proj": 2, "layers.2.mlp.down_proj": 3}, "ranks": {TARGETS[1]: 2, TARGETS[2]: 3}},
    {"alpha_pattern": {r"layers\.[01]\.self_attn\.\w+": 5}, "alphas": {TARGETS[0]: 5, TARGETS[1]: 5}},
    {"alpha_pattern": {"proj": 5, ".*up_proj": 7, "up_proj": 9}, "alphas": {TARGETS[3]: 7}},
    {"rank_pattern": {"up_proj": 1}, "use_rslora": True, "ranks": {TARGETS[3]: 1}, "lora_alpha": 16.0},
    {"fan_in_fan_out": True},  # which PEFT sets to false for linear layers
    {"init_lora_weights": "gaussian", "eva_config": {"rho": 2}, "new_key": None},
]


@pytest.mark.parametrize("config", PATTERNS)
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
def test_scales(family: str, config: dict, tmp_path: Path) -> None:
    changes = for_decoder(family, tmp_path / "adapter", SPELLINGS[family][0], **config)
    assert_merged(opened(family, tmp_path / "adapter"), changes)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_every_matrix_can_have_an_update(family: str, tmp_path: Path) -> None:
    base = open_hf(FOLDERS[family])
    names = [name for name in base.names if len(base.shape(name)) > 1]
    pairs = matrices({name: base.shape(name) for name in names}, dict.fromkeys(names, 4))
    tensors = {}
    for name, (down, up) in pairs.items():
        module = "base_model.model." + base.names[name].removesuffix(".weight")
        kernel = base.shape(name)[1:]
        tensors[f"{module}.lora_A.weight"] = down.view(
            4, *kernel
        )  # of the convolution: [r, 3, 2, P, P], [out, r, 1, 1, 1]
        tensors[f"{module}.lora_B.weight"] = up.view(*up.shape, *[1] * (len(kernel) - 1))
    write(tmp_path / "adapter", tensors)
    assert_merged(opened(family, tmp_path / "adapter"), {name: 4 * (up @ down) for name, (down, up) in pairs.items()})


def test_half_precision_is_merged_in_float32(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(FOLDERS["qwen2_vl"], base)
    tensors = {name: value.bfloat16() for name, value in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    changes = for_decoder("qwen2_vl", tmp_path / "adapter", "base_model.model.model.")
    weights = opened("qwen2_vl", tmp_path / "adapter", base)
    assert {weights.read(name).dtype for name in changes} == {torch.bfloat16}
    assert_merged(weights, changes)


NAME = "base_model.model.model.layers.0.self_attn.q_proj."
REFUSED = [
    ({"peft_type": "LOHA"}, {}, "peft_type='LOHA' .* must be 'LORA'"),
    ({"use_dora": True}, {}, "use_dora=True .* must be False"),
    ({"bias": "all"}, {}, "bias='all' .* must be 'none'"),
    ({"lora_bias": True}, {}, "lora_bias=True"),
    ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save=.* must be null"),
    ({"trainable_token_indices": [1]}, {}, "trainable_token_indices=.* must be null"),
    ({"layer_replication": [[0, 2]]}, {}, "layer_replication=.* must be null"),
    ({"alora_invocation_tokens": [5]}, {}, "alora_invocation_tokens=.* must be null"),
    ({"init_lora_weights": "pissa"}, {}, "init_lora_weights='pissa' .* changes the weights of the base"),
    ({"r": 8}, {}, r"lora_A.weight \[4, 64\] must have 8 rows, as .*adapter_config.json says"),
    ({"rank_pattern": {"q_proj": 2}}, {}, "must have 2 rows"),
    ({"rank_pattern": {"(": 2}}, {}, "rank_pattern=.* is none: missing"),
    ({"lora_alpha": 0}, {}, "lora_alpha=0"),
    ({"r": "four"}, {}, "r='four'"),
    ({}, {NAME + "lora_magnitude_vector": (64,)}, "lora_magnitude_vector is no lora_A or lora_B"),
    ({}, {"base_model.model.lm_head.weight": (512, 64)}, "lm_head.weight is no lora_A or lora_B"),
    ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": (4, 512)}, "lora_embedding_A is no lora_A"),
    ({}, {NAME + "lora_B.bias": (64,)}, "lora_B.bias is no lora_A or lora_B"),
    ({}, {NAME.replace("layers.0", "layers.9") + "lora_A.weight": (4, 64)}, "layers.9.* fits no weight in .*qwen2_vl"),
    ({}, {NAME + "lora_A.other.weight": (4, 64)}, "other.weight is no lora_A or lora_B of a weight"),
    ({}, {NAME.replace("q_proj", "o_proj") + "lora_A.weight": (4, 64)}, "o_proj.lora_A.weight has no other half"),
    ({}, {NAME.replace("model.model.", "model.model.language_model.") + "lora_A.weight": (4, 64)}, "same weight"),
    ({}, {NAME + "lora_A.weight": (4, 32)}, r"lora_A.weight \[4, 32\] and .* do not fit their weight \[64, 64\]"),
]


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED)
def test_what_cannot_be_merged_is_refused(config: dict, tensors: dict, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for_decoder("qwen2_vl", folder, "base_model.model.model.", **config)
    held = load_file(folder / "adapter_model.safetensors")
    write(folder, held | {name: torch.ones(shape) for name, shape in tensors.items()}, **config)
    with pytest.raises(CheckpointError, match=message) as error:
        opened("qwen2_vl", folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_empty_pickled_and_lost_adapters(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", {})
    with pytest.raises(CheckpointError, match="has an adapter without weights"):
        opened("qwen2_vl", folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has neither adapter_model.safetensors nor"):
        opened("qwen2_vl", folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="adapter_model.bin is a pickle"):
        opened("qwen2_vl", folder)


def test_where_the_base_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, base, adapter = FOLDERS["llava_onevision"], tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(source, base)
    for_decoder("llava_onevision", adapter, SPELLINGS["llava_onevision"][0], base_model_name_or_path="../base")
    assert find_weights(source, None) == (source, None)
    assert find_weights(adapter, source) == (source, adapter)
    assert find_weights(adapter, None) == (adapter / "../base", adapter)
    monkeypatch.chdir(adapter)
    assert find_weights(adapter, None) == (Path("../base"), adapter)
    shutil.copytree(adapter, base, dirs_exist_ok=True)
    assert find_weights(base, None) == (base, base)
    with pytest.raises(CheckpointError, match="adapter_config.json is missing; a base is given"):
        find_weights(source, base)
    (adapter / "adapter_config.json").write_text(json.dumps(adapter_config()))
    with pytest.raises(CheckpointError, match="base_model_name_or_path='no/such-folder' .* with --base"):
        find_weights(adapter, None)


def test_only_an_import_merges(groups, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    changes = for_decoder("llava_onevision", folder, SPELLINGS["llava_onevision"][0])
    with pytest.raises(CheckpointError, match="has an adapter and no model; llave convert import merges or keeps it"):
        load_model(folder)
    shutil.copytree(FOLDERS["llava_onevision"], folder, dirs_exist_ok=True)
    for way in (read_hf_config, open_hf, load_model):
        with pytest.raises(
            CheckpointError, match="adapter_config.json: the folder has an adapter, .* import merges it"
        ):
            way(folder)
    checkpoint = import_hf(folder, tmp_path / "checkpoint", groups)
    export_hf(checkpoint, tmp_path / "out", groups)
    merged, base = open_hf(tmp_path / "out"), open_hf(FOLDERS["llava_onevision"])
    for name in base.names:
        expected = base.read(name)
        assert torch.equal(merged.read(name), expected + changes[name] if name in changes else expected), name


def test_tokenizer_of_the_adapter_must_be_that_of_the_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(FOLDERS["qwen2_vl"], base)
    for_decoder("qwen2_vl", adapter, "base_model.model.model.")
    for folder, words in ((base, ["a", "b"]), (adapter, ["a", "b"])):
        model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "a")
        tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    opened("qwen2_vl", adapter, base)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "c": 1}, "a")).save(str(adapter / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="tokenizer.json: '[bc]' must have the id .* remove tokenizer.json"):
        opened("qwen2_vl", adapter, base)
