"""The sizes of the models. Each entry is a dictionary of numbers that fills a ModelConfig.

models.register_family adds the presets of families from outside of the package.

Sources: LLaVE (arXiv 2503.04812); config.json of Qwen2-0.5B, Qwen2-7B and Qwen2.5-1.5B; and
google/siglip-so400m-patch14-384, whose 27th layer the official LLaVE repository deletes
(llava/model/multimodal_encoder/siglip_encoder.py), so 26 layers are built. For the Qwen-VL families, config.json of
Qwen/Qwen2-VL-2B-Instruct and -7B, Qwen/Qwen2.5-VL-3B-Instruct and -7B, Qwen/Qwen3-VL-2B-Instruct, -4B and -8B.
"""

SIGLIP_SO400M = {
    "hidden_size": 1152,
    "num_layers": 26,
    "num_heads": 16,
    "ffn_hidden_size": 4304,
    "image_size": 384,
    "patch_size": 14,
}

# Tile grids (columns, rows) of the official training recipe: "(1x1),...,(2x2)", columns outermost.
GRIDS_2X2 = [[1, 1], [1, 2], [2, 1], [2, 2]]

QWEN2_VL_VISION = {"hidden_size": 1280, "num_layers": 32, "num_heads": 16, "ffn_hidden_size": 5120, "patch_size": 14}
QWEN25_VL_VISION = QWEN2_VL_VISION | {
    "ffn_hidden_size": 3420,
    "window_size": 112,
    "full_attention_layers": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
QWEN3_VL_VISION = {
    "hidden_size": 1024,
    "num_layers": 24,
    "num_heads": 16,
    "ffn_hidden_size": 4096,
    "patch_size": 16,
    "num_positions": 2304,
    "deepstack_layers": [5, 11, 17],
}
QWEN3_VL_8B_VISION = QWEN3_VL_VISION | {
    "hidden_size": 1152,
    "num_layers": 27,
    "ffn_hidden_size": 4304,
    "deepstack_layers": [8, 16, 24],
}

TINY_VISION = {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "ffn_hidden_size": 512, "patch_size": 14}
TINY_LANGUAGE = {
    "hidden_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 352,
    "vocab_size": 1200,
}


def _qwen2_decoder(width: int, layers: int, heads: int, kv_heads: int, ffn: int, rows: int) -> dict:
    return {
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "ffn_hidden_size": ffn,
        "vocab_size": rows,
        "mrope_section": [16, 24, 24],
    }


def _qwen3_decoder(width: int, layers: int, heads: int, ffn: int) -> dict:
    sizes = _qwen2_decoder(width, layers, heads, 8, ffn, 151936)
    head = {} if width == 128 * heads else {"head_size": 128}
    return sizes | head | {"mrope_section": [24, 20, 20], "rope_theta": 5000000.0}


PRESETS = {
    # A complete LLaVE with 1 M parameters for the demo: images of 56 pixels, 16 patches, no anyres.
    "tiny": {
        "vision": TINY_VISION | {"image_size": 56},
        "language": TINY_LANGUAGE,
        "image_grids": [],
    },
    "0.5b": {
        "vision": SIGLIP_SO400M,
        "language": {
            "hidden_size": 896,
            "num_layers": 24,
            "num_heads": 14,
            "num_kv_heads": 2,
            "ffn_hidden_size": 4864,
            "vocab_size": 151936,
        },
        "image_grids": GRIDS_2X2,
    },
    "2b": {
        "vision": SIGLIP_SO400M,
        "language": {
            "hidden_size": 1536,
            "num_layers": 28,
            "num_heads": 12,
            "num_kv_heads": 2,
            "ffn_hidden_size": 8960,
            "vocab_size": 151936,
        },
        "image_grids": GRIDS_2X2,
    },
    "7b": {
        "vision": SIGLIP_SO400M,
        "language": {
            "hidden_size": 3584,
            "num_layers": 28,
            "num_heads": 28,
            "num_kv_heads": 4,
            "ffn_hidden_size": 18944,
            "vocab_size": 152064,
        },
        "image_grids": GRIDS_2X2,
    },
    # Small models of the Qwen-VL families for the demo.
    "tiny_qwen2vl": {
        "family": "qwen2_vl",
        "vision": TINY_VISION,
        "language": TINY_LANGUAGE | {"mrope_section": [4, 6, 6]},
    },
    "tiny_qwen2_5vl": {
        "family": "qwen2_5_vl",
        "vision": TINY_VISION
        | {"ffn_hidden_size": 352, "window_size": 56, "full_attention_layers": [1], "tokens_per_second": 2},
        "language": TINY_LANGUAGE | {"mrope_section": [4, 6, 6]},
    },
    "tiny_qwen3vl": {
        "family": "qwen3_vl",
        "vision": TINY_VISION | {"patch_size": 16, "num_positions": 64, "deepstack_layers": [0]},
        "language": TINY_LANGUAGE | {"mrope_section": [6, 5, 5]},
    },
    "qwen2vl_2b": {
        "family": "qwen2_vl",
        "vision": QWEN2_VL_VISION,
        "language": _qwen2_decoder(1536, 28, 12, 2, 8960, 151936),
    },
    "qwen2vl_7b": {
        "family": "qwen2_vl",
        "vision": QWEN2_VL_VISION,
        "language": _qwen2_decoder(3584, 28, 28, 4, 18944, 152064),
    },
    "qwen2_5vl_3b": {
        "family": "qwen2_5_vl",
        "vision": QWEN25_VL_VISION,
        "language": _qwen2_decoder(2048, 36, 16, 2, 11008, 151936),
    },
    "qwen2_5vl_7b": {
        "family": "qwen2_5_vl",
        "vision": QWEN25_VL_VISION,
        "language": _qwen2_decoder(3584, 28, 28, 4, 18944, 152064),
    },
    "qwen3vl_2b": {"family": "qwen3_vl", "vision": QWEN3_VL_VISION, "language": _qwen3_decoder(2048, 28, 16, 6144)},
    "qwen3vl_4b": {"family": "qwen3_vl", "vision": QWEN3_VL_VISION, "language": _qwen3_decoder(2560, 36, 32, 9728)},
    "qwen3vl_8b": {"family": "qwen3_vl", "vision": QWEN3_VL_8B_VISION, "language": _qwen3_decoder(4096, 36, 32, 12288)},
}
