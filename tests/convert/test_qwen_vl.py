"""Qwen-VL folders -> checkpoint -> folder: bit-equal, in all layouts, read whole by transformers, verified with it."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from forking import run_script
from golden_model import byte_tokenizer
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_llave.checkpoint.folders import write_manifest
from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.convert.hf import export_hf, import_hf
from megatron_llave.convert.inspect import inspect
from megatron_llave.convert.verify import verify
from megatron_llave.distributed import process_groups
from megatron_llave.errors import CheckpointError, ConfigError
from megatron_llave.models import FAMILIES, open_hf
from megatron_llave.models.hf.config_json import read_config_json

pytestmark = pytest.mark.long

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen_vl"
TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_hf.py"
NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
HEAD = "lm_head.weight"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors by canonical name."""
    weights = open_hf(folder)
    return {name: weights.files.read(spelling) for name, spelling in weights.names.items()}


def assert_bit_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


def variant(folder: Path, family: str, change: Callable[[dict, dict[str, Tensor]], dict[str, Tensor] | None]) -> Path:
    """A golden folder with its config and tensors changed."""
    folder.mkdir()
    config = json.loads((GOLDEN / family / "config.json").read_text())
    tensors = load_file(GOLDEN / family / "model.safetensors")
    tensors = change(config, tensors) or tensors
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def renamed(family: str, **prefixes: str) -> Callable:
    """A change that writes other prefixes for `language_model.`, `visual.` and `lm_head.`."""

    def change(config: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        hf, found = FAMILIES[family].hf, {}
        for name, value in tensors.items():
            part, rest = hf.canonical_name(name, family).split(".", 1)
            if prefixes.get(part, part) is not None:
                found[f"{prefixes.get(part, part)}.{rest}"] = value
        return found

    return change


def tied(config: dict, tensors: dict[str, Tensor]) -> None:
    config["tie_word_embeddings"] = True
    del tensors[HEAD]


def tied_with_copy(config: dict, tensors: dict[str, Tensor]) -> None:
    config["tie_word_embeddings"] = True
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[HEAD] = tensors[embedding].clone()


def in_bfloat16(config: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    config["dtype"] = "bfloat16"
    return {name: value.bfloat16() for name, value in tensors.items()}


def flat(config: dict, tensors: dict[str, Tensor]) -> None:
    """As older versions of transformers write it."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    config |= {key: value for key, value in text.items() if key != "model_type"}
    config["torch_dtype"] = config.pop("dtype")


VARIANTS = [
    *((family, name, change) for family in NAMES for name, change in {"tied": tied, "bfloat16": in_bfloat16}.items()),
    ("qwen2_vl", "tied with a copy", tied_with_copy),
    ("qwen2_vl", "flat", flat),
    ("qwen2_5_vl", "flat", flat),
    ("qwen2_vl", "in memory", renamed("qwen2_vl", language_model="model.language_model", visual="model.visual")),
    ("qwen2_5_vl", "without the head", renamed("qwen2_5_vl", lm_head=None)),
    ("qwen3_vl", "without the head", renamed("qwen3_vl", lm_head=None)),
]


@pytest.mark.parametrize("family", NAMES)
def test_round_trip_in_several_files(family: str, groups: ProcessGroupCollection, tmp_path: Path) -> None:
    checkpoint, out = import_hf(GOLDEN / family, tmp_path / "checkpoint", groups), tmp_path / "out"
    notes = export_hf(checkpoint, out, groups, shard_bytes=500_000)
    assert notes == ["There is no tokenizer.json, so transformers cannot make a processor of this folder."]
    assert len(list(out.glob("model-*-of-*.safetensors"))) >= 3 and (out / "model.safetensors.index.json").is_file()
    assert_bit_equal(tensors_of(out), tensors_of(GOLDEN / family))
    again = import_hf(out, tmp_path / "again", groups)
    export_hf(again, tmp_path / "back", groups)
    # Also the spelling is that of transformers.
    assert_bit_equal(
        load_file(tmp_path / "back" / "model.safetensors"), load_file(GOLDEN / family / "model.safetensors")
    )
    assert inspect(checkpoint, groups) == inspect(out, groups) == 0
    done = run_script(TOOL, "verify", "--hf", out, "--checkpoint", checkpoint)
    assert done.returncode == 0 and "the same model (tolerance 3e-05" in done.stdout, done.stdout + done.stderr
    assert "image: largest difference" in done.stdout


def test_verify_takes_the_plain_prompt_of_a_run(
    groups: ProcessGroupCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer of a run with data.prompt=plain has no tokens of chat turns."""
    monkeypatch.setattr(process_groups, "destroy_model_parallel", lambda: None)  # other tests go on with them
    source = variant(tmp_path / "source", "qwen2_vl", lambda config, tensors: None)
    byte_tokenizer(source)
    checkpoint = import_hf(source, tmp_path / "checkpoint", groups)
    refused = "has no token <|im_start|>, which data.prompt needs; set data.prompt=plain"
    with pytest.raises(ConfigError, match=re.escape(refused)):
        verify(source, checkpoint, "a cat")
    config = checkpoint / "config.yaml"
    config.write_text(config.read_text().replace("prompt: qwen", "prompt: plain"))
    write_manifest(checkpoint, step=0, layout=None)
    assert verify(source, checkpoint, "a cat") == 0


GME = {"auto_map": {"AutoModel": "modeling_gme_qwen2vl.GmeQwen2VL"}}
EMBEDDERS = [
    ("qwen2_vl", "gme", GME | {"min_image_tokens": 64, "max_image_tokens": 512}, (64, 512)),
    ("qwen2_vl", "gme", GME, (256, 1280)),
    ("qwen2_vl", "gme", {"_name_or_path": "Alibaba-NLP/gme-Qwen2-VL-7B-Instruct"}, (256, 1280)),
    ("qwen3_vl", "qwen3_vl_embedding", {"_name_or_path": "Qwen/Qwen3-VL-Embedding-2B"}, (64, 16384)),
    ("qwen3_vl", "qwen3_vl_embedding", {}, (64, 16384)),
    ("qwen2_5_vl", "qwen", {}, (64, 16384)),
]


@pytest.mark.parametrize(("family", "prompt", "keys", "tokens"), EMBEDDERS)
def test_prompt_and_budget_of_released_embedding_models(
    family: str, prompt: str, keys: dict, tokens: tuple[int, int], groups: ProcessGroupCollection, tmp_path: Path
) -> None:
    source, notes = variant(tmp_path / "source", family, lambda config, tensors: config.update(keys)), []
    tokenizer = tokenizers.Tokenizer.from_file(str(byte_tokenizer(source)))
    if prompt == "qwen3_vl_embedding" and not keys:
        tokenizer.add_special_tokens(["<|endoftext|>"])
        end = [("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A <|endoftext|>", special_tokens=end)
        tokenizer.save(str(source / "tokenizer.json"))
    (source / "chat_template.jinja").write_text("of the source")
    patch = FAMILIES[family].hf.read_config(read_config_json(source)).model.vision.patch_size
    size = {"shortest_edge": 64 * (2 * patch) ** 2, "longest_edge": 16384 * (2 * patch) ** 2}
    colours = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if family == "qwen3_vl" else {}
    images = {"size": size, "patch_size": patch, **colours}
    (source / "preprocessor_config.json").write_text(json.dumps(images))
    checkpoint = import_hf(source, tmp_path / "checkpoint", groups, tell=notes.append)
    data = find_pretrained(checkpoint).cfg.data
    budget = tuple(n * (2 * patch) ** 2 for n in tokens)
    assert (data.prompt, data.min_pixels, data.max_pixels) == (prompt, *budget)
    told = "\n".join(notes)
    assert "chat template in chat_template.jinja: not used" in told and f"data.prompt={prompt}" in told
    assert ("16384 visual tokens, more than data.max_length=4096" in told) == (tokens[1] == 16384)
    assert (f"data.max_pixels={budget[1]}: as GME's code has it" in told) == (prompt == "gme")
    export_hf(checkpoint, tmp_path / "out", groups)
    assert find_pretrained(tmp_path / "out").cfg.data == replace(data, tokenizer=None)


@pytest.mark.parametrize(("family", "name", "change"), VARIANTS)
def test_variants_come_back_and_are_read_whole(
    family: str, name: str, change: Callable, groups: ProcessGroupCollection, tmp_path: Path
) -> None:
    source = variant(tmp_path / "source", family, change)
    checkpoint = import_hf(source, tmp_path / "checkpoint", groups)
    export_hf(checkpoint, tmp_path / "out", groups)
    assert_bit_equal(tensors_of(tmp_path / "out"), tensors_of(source))
    model_class = getattr(transformers, json.loads((source / "config.json").read_text())["architectures"][0])
    model, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    golden, embedding = load_file(GOLDEN / family / "model.safetensors"), model.get_input_embeddings().weight
    expected = embedding if "tied" in name or "without" in name else golden[HEAD].to(embedding.dtype)
    assert torch.equal(model.lm_head.weight, expected)


def test_buffers_of_old_folders_are_not_exported(groups: ProcessGroupCollection, tmp_path: Path) -> None:
    """transformers computes them, and versions of today do not expect them."""
    buffer = "visual.rotary_pos_emb.inv_freq"
    source = variant(tmp_path / "source", "qwen2_vl", lambda config, tensors: {**tensors, buffer: torch.ones(3)})
    export_hf(import_hf(source, tmp_path / "checkpoint", groups), tmp_path / "exported", groups)
    found, given = tensors_of(tmp_path / "exported"), tensors_of(source)
    assert given.pop(buffer).sum() == 3
    assert_bit_equal(found, given)


def test_heads_wider_than_their_share_of_the_width(groups: ProcessGroupCollection, tmp_path: Path) -> None:
    """As in Qwen3-VL-4B; written by transformers, without the head."""
    config = transformers.Qwen3VLConfig.from_pretrained(GOLDEN / "qwen3_vl")
    config.text_config.head_dim = 32
    config.text_config.rope_parameters["mrope_section"] = [8, 4, 4]
    torch.manual_seed(0)
    transformers.Qwen3VLModel(config).save_pretrained(tmp_path / "source")
    checkpoint = import_hf(tmp_path / "source", tmp_path / "checkpoint", groups)
    assert find_pretrained(checkpoint).cfg.model.language.head_size == 32
    export_hf(checkpoint, tmp_path / "out", groups)
    assert_bit_equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "source"))
    done = run_script(TOOL, "verify", "--hf", tmp_path / "source", "--checkpoint", checkpoint)
    assert done.returncode == 0 and "the same model (tolerance 3e-05" in done.stdout, done.stdout + done.stderr


def test_a_model_without_a_source_is_read_whole(groups: ProcessGroupCollection, tmp_path: Path) -> None:
    """The checkpoint of a run from scratch has no assets of another folder."""
    for family in NAMES:
        checkpoint = import_hf(GOLDEN / family, tmp_path / family, groups)
        shutil.rmtree(checkpoint / "assets")
        (checkpoint / "manifest.json").unlink()
        out = tmp_path / f"{family}-out"
        export_hf(checkpoint, out, groups, dtype="bfloat16")
        model_class = getattr(transformers, json.loads((out / "config.json").read_text())["architectures"][0])
        model, info = model_class.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
        assert model.dtype == torch.bfloat16 and open_hf(out).config.model == open_hf(GOLDEN / family).config.model


def test_an_embedding_without_room_for_image_tokens_grows(groups: ProcessGroupCollection, tmp_path: Path) -> None:
    """A run from scratch, whose tokenizer has a token for each row of the embedding and none for images."""
    checkpoint = import_hf(GOLDEN / "qwen2_vl", tmp_path / "checkpoint", groups)
    shutil.rmtree(checkpoint / "assets")
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "assets").mkdir()
    words = {f"word{i}": i for i in range(511)} | {"<|im_end|>": 511}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(checkpoint / "assets" / "tokenizer.json"))
    out = tmp_path / "out"
    assert export_hf(checkpoint, out, groups) == []
    config = json.loads((out / "config.json").read_text())
    ids = [config[key] for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")]
    assert sorted(ids) == [512, 513, 514, 515] and config["text_config"]["vocab_size"] == 516
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.encode("<|image_pad|><|im_end|>") == [ids[0], 511]
    model, info = transformers.Qwen2VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and len(model.get_input_embeddings().weight) == 516
    assert inspect(import_hf(out, tmp_path / "again", groups), groups) == 0


def test_faults_of_a_folder_are_listed(groups: ProcessGroupCollection, tmp_path: Path, capsys) -> None:
    def change(config: dict, tensors: dict[str, Tensor]) -> None:
        del tensors["model.visual.deepstack_merger_list.1.norm.bias"]
        tensors["model.visual.blocks.9.norm1.weight"] = torch.ones(48)
        tensors["model.language_model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)

    source = variant(tmp_path / "source", "qwen3_vl", change)
    assert inspect(source, groups) == 1
    printed = capsys.readouterr().out
    for line in (
        "missing: model.visual.deepstack_merger_list.1.norm.bias [192]",
        "extra: model.visual.blocks.9.norm1.weight [48]",
        "wrong shape: model.language_model.layers.0.self_attn.q_norm.weight [8], config.json makes it [16]",
        "vision: 4 layers of 48",
    ):
        assert line in printed, printed
    with pytest.raises(CheckpointError, match="does not fit its config.json: missing: model.visual.deepstack"):
        import_hf(source, tmp_path / "checkpoint", groups)
    twice = variant(
        tmp_path / "twice",
        "qwen2_vl",
        lambda config, tensors: tensors | {"model.visual.merger.ln_q.bias": torch.ones(48)},
    )
    with pytest.raises(CheckpointError, match="are the same tensor in two spellings"):
        import_hf(twice, tmp_path / "checkpoint", groups)
    assert not list(tmp_path.glob("checkpoint*"))
