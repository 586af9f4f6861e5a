"""What a missing key means is what transformers itself takes for it."""

from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

from megatron_llave.models.llava_onevision.hf_keys import (
    DEFAULT_ROPE_THETA,
    IMAGE_TOKENS,
    LANGUAGE_FIXED,
    LANGUAGE_KEYS,
    ONEVISION_FIXED,
    VISION_FIXED,
    VISION_KEYS,
)


def test_decoder() -> None:
    theirs = Qwen2Config().to_dict()
    assert {key: theirs[key] for key, _ in LANGUAGE_KEYS.values()} == dict(LANGUAGE_KEYS.values())
    assert theirs["hidden_act"] == LANGUAGE_FIXED["hidden_act"][0]
    assert theirs["rope_parameters"] == {"rope_theta": DEFAULT_ROPE_THETA, "rope_type": "default"}
    assert theirs["tie_word_embeddings"] is False


def test_tower() -> None:
    theirs = SiglipVisionConfig().to_dict()
    assert {key: theirs[key] for key, _ in VISION_KEYS.values()} == dict(VISION_KEYS.values())
    assert {key: theirs[key] for key in VISION_FIXED} == {key: default for key, (default, _) in VISION_FIXED.items()}


def test_top_level() -> None:
    theirs = LlavaOnevisionConfig().to_dict()
    expected = {key: default for key, (default, _) in ONEVISION_FIXED.items()} | IMAGE_TOKENS
    assert {key: theirs[key] for key in expected} == expected
    assert (theirs["vision_feature_layer"], theirs["vision_aspect_ratio"]) == (-1, "anyres_max_9")
