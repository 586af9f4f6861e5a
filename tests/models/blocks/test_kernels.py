"""What a run says of its kernels, with and without the packages that it may find."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_llave.config.model import ModelConfig
from megatron_llave.models.blocks import kernels


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the packages that are there."""
    names: set[str] = set()
    monkeypatch.setattr(kernels, "find_spec", lambda name: SimpleNamespace() if name in names else None)
    return names


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_cpu_uses_torch() -> None:
    line = kernels.describe_kernels(ModelConfig(), "AdamW of torch")
    assert line == (
        f"kernels on CPU: torch {torch.__version__}, fp32, recompute none, weight gradients not fused, AdamW of torch"
    )


def test_apex_that_is_another_package_is_named(found: set[str]) -> None:
    found.add("apex")
    assert "apex here is not NVIDIA's" in kernels.describe_kernels(ModelConfig(), "")
    found.add("apex.optimizers")
    assert "not NVIDIA's" not in kernels.describe_kernels(ModelConfig(), "")


def test_apex_that_cannot_even_be_imported_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("import a_web_framework")
    monkeypatch.syspath_prepend(tmp_path)
    assert "apex here is not NVIDIA's" in kernels.describe_kernels(ModelConfig(), "")


def test_weight_gradients_are_fused_where_they_can_be(found: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.fuses_weight_gradients("transformer_engine")
    found.add(kernels.APEX_WEIGHT_GRADIENT)
    assert not kernels.fuses_weight_gradients("local"), "the extension is for GPUs"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert kernels.fuses_weight_gradients("local")
    found.clear()
    assert not kernels.fuses_weight_gradients("local")


def test_fp8_names_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "version", lambda package: "2.9.0")
    model = ModelConfig(precision="fp8", kernels="transformer_engine", fp8_recipe="blockwise")
    line = kernels.describe_kernels(model, "FusedAdam of transformer_engine")
    assert "Transformer Engine 2.9.0, fp8 (blockwise)" in line and "fused weight gradients" in line
