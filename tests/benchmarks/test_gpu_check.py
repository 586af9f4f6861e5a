"""What benchmarks/gpu_check.py takes for right in FP8: figures measured with kernels that are right, and wrong."""

import pytest

from benchmarks.gpu_check import is_within_limits
from megatron_llave.config.model import ModelConfig

NAMES = ("embedding_cosine", "gradient_cosine", "gradient_norm_ratio")


@pytest.mark.parametrize(
    ("recipe", "figures", "is_right"),
    [
        # One draw each on an H200.
        ("delayed", (0.930, 0.801, 0.890), True),
        ("blockwise", (0.916, 0.798, 0.806), True),
        ("tensorwise", (0.888, 0.848, 0.901), True),
        # The means of eight draws with the double of tests/engine: the gradient of RMSNorm 15 % too large, and
        # each product of the forward pass 15 % too large.
        ("tensorwise", (0.9182, 0.7581, 1.6326), False),
        ("tensorwise", (0.7082, 0.4576, 0.7145), False),
    ],
)
def test_limits_in_fp8_tell_right_kernels_from_wrong_ones(recipe: str, figures: tuple, is_right: bool) -> None:
    model = ModelConfig(kernels="transformer_engine", precision="fp8", fp8_recipe=recipe)
    assert is_within_limits(model, dict(zip(NAMES, figures))) == is_right
