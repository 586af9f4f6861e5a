"""What a run says of its kernels, with and without the packages that it may find."""

from collections import Counter
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.fusions import fused_bias_dropout, fused_bias_gelu, fused_bias_swiglu
from megatron.core.transformer import mlp
from reference import CAUSAL, one_by_one, pack_pair_batch, random_pairs

from megatron_llave.config.load import config_from_dict
from megatron_llave.config.model import LanguageConfig, ModelConfig
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.models import build_model
from megatron_llave.models.blocks import kernels, qwen2, siglip
from megatron_llave.models.vision_cost import has_buckets
from megatron_llave.train import train_step
from megatron_llave.training.metrics import step_metrics
from megatron_llave.training.optimizer import build_trainable


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


def gradients(groups, multiple: int = 1, **model: float) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and gradients of a step of two micro batches with global negatives."""
    given = {"model": {"preset": "tiny", **model}, "train": {"steps": 1}}
    cfg = config_from_dict(given)
    chunks = build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), seed=0)
    trainable = build_trainable(cfg, chunks, groups)
    pairs = random_pairs(cfg.model, 8)
    batches = [pack_pair_batch(pairs[i::2], cfg.model, multiple) for i in (0, 1)]
    result = train_step(trainable, batches, cfg.loss, 0, groups)
    parameters = trainable.chunks[0].named_parameters()
    return step_metrics(result.shares, batches, groups.dp), {name: p.main_grad.clone() for name, p in parameters}


def test_activations_are_fused_where_they_can_be(groups, found: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core's fused functions, which torch.compile compiles on a GPU alone, against the plain ones."""
    plain_metrics, plain = gradients(groups)
    calls: list[str] = []
    for module, name in (
        (mlp, "bias_swiglu_impl"),
        (mlp, "bias_gelu_impl"),
        (fused_bias_dropout, "bias_dropout_add_fused_train"),
    ):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name: (calls.append(n), f(*a))[1])
    for module in (qwen2, siglip):
        monkeypatch.setattr(module, "fuses_activations", lambda: True)
    metrics, fused = gradients(groups)
    # Two layers in the vision encoder and in the decoder, two micro batches, and a second pass for global negatives.
    counts = {name: calls.count(name) for name in calls}
    assert counts == {"bias_swiglu_impl": 8, "bias_gelu_impl": 8, "bias_dropout_add_fused_train": 16}
    assert metrics["loss"] == pytest.approx(plain_metrics["loss"], rel=1e-6)
    for name, value in fused.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-6, msg=name)
    calls.clear()
    gradients(groups, dropout=0.1)
    assert calls.count("bias_dropout_add_fused_train") == 16, "dropout itself is drawn by torch alone"


@pytest.mark.skipif(torch.cuda.is_available(), reason="megatron-core has compiled its functions already")
def test_new_lengths_need_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile gives a function up after 8 compilations, and each of them takes seconds on a GPU."""
    compilations: Counter[str] = Counter()
    of_torch = getattr(torch.compile, "original", torch.compile)  # megatron-core gets another one on a CPU
    for module, name in (
        *((fused_bias_swiglu, name) for name in ("swiglu", "swiglu_back")),
        *((fused_bias_gelu, name) for name in ("bias_gelu", "bias_gelu_back")),
        (fused_bias_dropout, "bias_dropout_add_fused_train"),
    ):
        count = lambda graph, inputs, name=name: (compilations.update([name]), graph.forward)[1]  # noqa: E731
        monkeypatch.setattr(module, name, of_torch(getattr(module, name), backend=count))

    def run(length: int, tiles: int, is_trained: bool) -> None:
        text, image = torch.randn(length, 1, 8), torch.randn(9, tiles, 8)
        bias = torch.nn.Parameter(torch.randn(8))
        with torch.set_grad_enabled(is_trained):
            text, image = text.requires_grad_(is_trained), image.requires_grad_(is_trained)
            inner = fused_bias_gelu.bias_gelu_impl(image, bias)
            outer = fused_bias_dropout.bias_dropout_add_fused_train((inner, bias), image, 0.0)
            total = fused_bias_swiglu.bias_swiglu_impl(text, None).sum() + outer.sum()
        if is_trained:
            total.backward()

    seen = []
    for shape in ((256, 5), (128, 3), (384, 1), (512, 9), (1024, 4), (640, 11)):
        for is_trained in (False, True):
            run(*shape, is_trained)
        seen.append(dict(compilations))
    assert seen[2] == seen[-1], "nothing is new after two lengths and a single tile"
    assert len(compilations) == 5 and max(compilations.values()) <= 6, compilations


def test_activations_are_not_fused_without_a_gpu_or_compiler(
    found: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found.add("triton")
    monkeypatch.setenv("CC", "cc")
    assert kernels.fuses_activations() == torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert kernels.fuses_activations()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not kernels.fuses_activations()


def test_attention_that_takes_the_row_as_it_is_where_there_is_one(
    found: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found.add(kernels.VARIABLE_LENGTH_ATTENTION)
    local = ModelConfig(precision="bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.attention_kernel(local) == "buckets"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert kernels.attention_kernel(local) == "variable_length"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setenv("CC", "cc")
    assert "no Triton or C compiler to fuse activations with" in kernels.describe_kernels(local, "")
    found.add("triton")
    line = kernels.describe_kernels(local, "fused AdamW of torch")
    assert "attention variable_length, fused activations, fused AdamW of torch" in line
    assert kernels.attention_kernel(ModelConfig(precision="fp32")) == "buckets"
    for size, kernel in ((64, "variable_length"), (256, "variable_length"), (60, "buckets"), (264, "buckets")):
        heads = LanguageConfig(hidden_size=2 * size, num_heads=2)
        model = ModelConfig(precision="bf16", language=heads)
        assert kernels.attention_kernel(model) == kernel
        assert has_buckets(model, on_gpu=True) == (kernel == "buckets") and has_buckets(model, on_gpu=False)
    assert kernels.attention_kernel(ModelConfig(kernels="transformer_engine")) == "transformer_engine"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert kernels.attention_kernel(local) == "buckets"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found.clear()
    assert kernels.attention_kernel(local) == "buckets", "torch before 2.10"
    assert has_buckets(local, on_gpu=True), "the planner asks the same"


def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...
def of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)): ...
def of_torch_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False): ...


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        (of_torch_2_10, {"is_causal": True}),
        (of_torch_2_11, {"window_size": (-1, 0)}),
        (of_torch_2_12, {"window_size": (-1, 0), "enable_gqa": True}),
    ],
)
def test_attention_of_each_torch_is_causal(attention, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "import_module", lambda name: SimpleNamespace(varlen_attn=attention))
    assert kernels.variable_length_attention.__wrapped__() == (attention, expected)


def test_call_fits_the_attention_of_this_torch() -> None:
    """Its signature and that of its stand-in, as it computes on a GPU only. test_layer_specs.py has the mathematics."""
    attention, causal = kernels.variable_length_attention()
    assert causal.items() <= CAUSAL.items() or causal == {"is_causal": True}
    signature(attention).bind(*range(7), **causal)
    names = [list(signature(function).parameters)[:7] for function in (attention, one_by_one)]
    assert names[0] == names[1] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


def test_rounded_row_is_exact(groups) -> None:
    """Padding at the end of the row changes neither loss nor gradients nor what a run records of its step."""
    metrics, exact = gradients(groups)
    rounded_metrics, rounded = gradients(groups, multiple=kernels.ROW_STEP)
    assert metrics.keys() == rounded_metrics.keys() and metrics["tokens"] > 0
    for name, value in metrics.items():
        assert rounded_metrics[name] == pytest.approx(value, rel=1e-6, nan_ok=True), name
    for name, value in rounded.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-4, atol=1e-6, msg=name)


def test_rows_are_rounded_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    split = ParallelConfig(tensor=6, sequence=True)
    fp8 = ModelConfig(precision="fp8", fp8_recipe="mxfp8", kernels="transformer_engine")
    cases = [(ModelConfig(), ParallelConfig()), (ModelConfig(), split), (fp8, ParallelConfig()), (fp8, split)]
    cases += [(ModelConfig(), ParallelConfig(context=2)), (fp8, replace(split, context=3))]
    if not torch.cuda.is_available():
        assert [kernels.row_multiple(*case) for case in cases] == [1, 6, 32, 192, 4, 576]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [kernels.row_multiple(*case) for case in cases] == [128, 384, 128, 384, 256, 1152]
