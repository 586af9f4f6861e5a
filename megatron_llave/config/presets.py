"""The sizes of the LLaVE models. Each entry is a dictionary of numbers that fills a ModelConfig.

models.register_family adds the presets of families from outside of the package.

Sources: LLaVE (arXiv 2503.04812); config.json of Qwen2-0.5B, Qwen2-7B and Qwen2.5-1.5B; and
google/siglip-so400m-patch14-384, whose 27th layer the official LLaVE repository deletes
(llava/model/multimodal_encoder/siglip_encoder.py), so 26 layers are built.
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

PRESETS = {
    # A complete LLaVE with 1 M parameters for the demo: images of 56 pixels, 16 patches, no anyres.
    "tiny": {
        "vision": {
            "hidden_size": 128,
            "num_layers": 2,
            "num_heads": 4,
            "ffn_hidden_size": 512,
            "image_size": 56,
            "patch_size": 14,
        },
        "language": {
            "hidden_size": 128,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 352,
            "vocab_size": 1200,
        },
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
}
