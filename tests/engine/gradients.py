"""Gradients of a small model on Transformer Engine against those of local kernels, at one precision and layout."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from check_layouts import BUCKET_SIZE, GLOBAL_BATCH, comparison, family_of, micro_batches, parse_layout, small_config
from engine import extension
from full_parameters import full_gradients, let_go, worst_relative_error
from megatron.core.distributed import DistributedDataParallelConfig as DataParallelConfig
from megatron.core.fp8_utils import get_fp8_context
from reference import random_pairs
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_llave.config.lora import LoraConfig
from megatron_llave.config.model import PARTS
from megatron_llave.config.schema import RunConfig
from megatron_llave.distributed import process_groups
from megatron_llave.models import build_model
from megatron_llave.models.hf.mapping import local_kernel_name
from megatron_llave.models.lora import is_adapter
from megatron_llave.training import optimizer
from megatron_llave.training.gradient_cache import forward_backward
from megatron_llave.training.optimizer import build_trainable

LOCAL, ENGINE = "local", "transformer_engine"
RECIPES = ("tensorwise", "delayed", "blockwise")
PRECISIONS = ("fp32", "bf16", *RECIPES)
ONE = "1,1,1,0,0"
QWEN = "qwen3_vl"
"""The other family, whose vision encoder attends without a mask, and whose tokens' positions are given."""
LORA = "lora"
"""Adapters on all linear layers of llava_onevision, also on those that Transformer Engine fuses a norm into."""
LAYOUTS = ("2,1,1,0,0", "2,1,1,1,0", "1,2,1,0,0", "1,2,2,0,0", ONE, f"{ONE},overlap")
"""Of two processes: tensor, the same with sequence parallel, pipeline, interleaved pipeline, data, overlapped."""
FREEZES = ("vision", "language", "vision,language")
RECOMPUTES = ("none", "selective", "full")
CONTEXTS = {2: [f"{ONE},context2"], 4: ["2,1,1,1,0,context2", "1,2,1,0,0,context2"]}
"""Layouts of so many processes of which two share each row, in bf16."""


SETS = ("", *FREEZES)
AT_LAYOUTS = [
    *(("fp32", "2,1,1,1,0", "full"), ("fp32", "1,2,2,0,0", "none"), ("fp32", f"{ONE},vision,overlap", "selective")),
    *(("bf16", "2,1,1,0,0,vision,language", "none"), ("bf16", "1,2,1,0,0,vision", "full")),
    *(("bf16", f"{ONE},language", "selective"), ("tensorwise", "2,1,1,1,0", "none")),
    *(("tensorwise", "1,2,1,0,0,vision,language", "selective"), ("tensorwise", "1,2,2,0,0,language", "full")),
    *(("delayed", "2,1,1,1,0,vision,language", "selective"), ("delayed", "1,2,1,0,0", "full")),
    *(("delayed", "1,2,2,0,0,vision", "none"), ("blockwise", "2,1,1,0,0", "selective")),
    *(("blockwise", f"{ONE},vision,language", "full"), ("blockwise", f"{ONE},language,overlap", "none")),
    *(
        ("fp32", f"2,1,1,1,0,{QWEN}", "full"),
        ("bf16", f"1,2,2,0,0,{QWEN}", "none"),
        ("tensorwise", f"{ONE},{QWEN}", "none"),
    ),
    *(("fp32", f"2,1,1,1,0,{LORA}", "full"), ("tensorwise", f"2,1,1,1,0,{LORA}", "selective")),
    *(("bf16", f"1,2,2,0,0,{LORA}", "none"), ("fp32", f"{ONE},{LORA},overlap", "none")),
]
"""Cases of the tests. Of the 119 ways in which two of precision, layout, frozen parts and recomputation can meet, they
have most. `all` has every precision at every layout, with all recomputations and frozen parts."""


def config(kernels: str, precision: str, layout: str = ONE, recompute: str = "none", num_layers: int = 4) -> RunConfig:
    """A run of the small model, whose sizes FP8 and cuDNN take at tensor parallel 2; FP8 is named by its recipe."""
    cfg = small_config(*parse_layout(layout), family_of(layout))
    language = replace(cfg.model.language, hidden_size=64, ffn_hidden_size=96, num_layers=num_layers)
    if language.mrope_section:
        language.mrope_section = [2, 3, 3]
    if LORA in layout.split(","):
        cfg.lora = LoraConfig(rank=8, targets=[*PARTS])
    fp8 = {"precision": "fp8", "fp8_recipe": precision} if precision in RECIPES else {"precision": precision}
    cfg.model = replace(cfg.model, language=language, kernels=kernels, recompute=recompute, **fp8)
    return cfg


def gradients_of(cfg: RunConfig) -> dict[str, Tensor]:
    """Every parameter's gradient, and the loss, of one step with negatives of the global batch.

    Delayed scaling has no scales at first: its gradients are those of a second step, with the same weights.
    """
    groups = process_groups.initialize_model_parallel(cfg.parallel)
    chunks = build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), 0, cfg.lora)
    for name, parameter in (item for chunk in chunks for item in chunk.named_parameters()):
        if is_adapter(name) and name.endswith("_up"):  # zero, it would leave the gradient of A zero
            parameter.data.fill_(0.01)
    with patch.object(optimizer, "DistributedDataParallelConfig", partial(DataParallelConfig, bucket_size=BUCKET_SIZE)):
        trainable = build_trainable(cfg, chunks, groups)
    is_delayed = cfg.model.precision == "fp8" and cfg.model.fp8_recipe == "delayed"
    for _ in range(2 if is_delayed else 1):
        batches = micro_batches(random_pairs(cfg.model, GLOBAL_BATCH), 2, cfg, groups)
        trainable.zero_gradients()
        seen = forward_backward(trainable.chunks, batches, comparison(cfg, groups), cfg.loss)
    found = {local_kernel_name(name): value for name, value in full_gradients(trainable, groups).items()}
    if seen:
        loss = torch.stack([share for share, _ in seen]).mean()
        torch.distributed.all_reduce(loss, group=groups.dp)
        found["loss"] = loss / groups.dp.size()
    let_go(trainable)
    reset_engine()
    return found


def reset_engine() -> None:
    """Transformer Engine remembers the layers of models that are gone, and groups, which keep threads of gloo alive."""
    from transformer_engine.pytorch import distributed
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    distributed.get_distributed_world_size.cache_clear()
    distributed.get_distributed_rank.cache_clear()


def compared(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, object]:
    """The worst relative error of a parameter, that of the whole gradient, and that of the loss."""
    loss, expected_loss = found.pop("loss", None), expected.pop("loss")
    expected = {name: expected[name] for name in found}
    name, worst = worst_relative_error(found, expected)
    rows = {key: min(len(found[key]), len(expected[key])) for key in found}
    difference = torch.stack([(found[key][:n] - expected[key][:n]).norm() for key, n in rows.items()]).norm()
    whole = float(difference / torch.stack([value.norm() for value in expected.values()]).norm())
    figures = {"parameter": name, "worst": worst, "whole": whole}
    if loss is not None:
        figures["loss"] = abs(float(loss) / float(expected_loss) - 1)
    return figures


def compare(folder: Path, precision: str, layout: str, recompute: str, reference: str) -> dict[str, object]:
    """Gradients of Transformer Engine against those in FOLDER/REFERENCE.safetensors."""
    extension.CALLS.clear()
    found = gradients_of(config(ENGINE, precision, layout, recompute))
    kinds = {"fp8 products": "fp8 gemm", "attention": "attention", "context": "attention of context ranks"}
    figures = {name: extension.CALLS[kind] for name, kind in kinds.items()}
    return figures | compared(found, load_file(folder / f"{reference}.safetensors"))


def package() -> dict[str, object]:
    """Which Transformer Engine runs."""
    import transformer_engine
    from transformer_engine.pytorch.module import linear

    return {"version": transformer_engine.__version__, "layers": linear.__file__}


def broken(folder: Path) -> dict[str, object]:
    """Gradients with a kernel that is off by one percent."""
    right = extension.rmsnorm_bwd

    def off(*args: object) -> tuple:
        dx, weight = right(*args)
        return dx * 1.01, weight

    with patch.object(extension, "rmsnorm_bwd", off):
        return compare(folder, "fp32", ONE, "none", "local fp32")


def one_layer(recipe: str) -> dict[str, object]:
    """A linear layer in FP8 against its definition: output and gradients, as relative errors.

    With the same input twice, delayed scaling has the scales of that input, as tensorwise scaling has at once.
    """
    cfg = config(ENGINE, recipe)
    groups = process_groups.initialize_model_parallel(cfg.parallel)
    (chunk,) = build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), seed=0)
    layer = chunk.language.decoder.layers[0].mlp.linear_fc2
    generator = torch.Generator().manual_seed(0)
    sizes = layer.weight.shape[::-1]
    input, direction = (torch.randn(128, 1, size, generator=generator).bfloat16() for size in sizes)
    input.requires_grad_()
    for _ in range(2):
        input.grad, layer.weight.main_grad = None, torch.zeros(layer.weight.shape)
        chunk.set_is_first_microbatch()  # so that the weight is rounded anew
        with get_fp8_context(chunk.config):
            output, _ = layer(input)
        output.backward(direction)
    reset_engine()
    x, w, g = input.detach().flatten(0, 1), layer.weight.detach(), direction.flatten(0, 1)
    rows, columns = ((1,), (0,)) if recipe == "blockwise" else ((0, 1), (0, 1))
    weight = rounded(w, torch.float8_e4m3fn, (0, 1), recipe)
    expected = {
        "output": rounded(x, torch.float8_e4m3fn, rows, recipe) @ weight.T,
        "input": rounded(g, torch.float8_e5m2, rows, recipe) @ weight,
        "weight": rounded(g, torch.float8_e5m2, columns, recipe).T @ rounded(x, torch.float8_e4m3fn, columns, recipe),
    }
    found = {"output": output.flatten(0, 1), "input": input.grad.flatten(0, 1), "weight": layer.weight.main_grad}
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}


def rounded(matrix: Tensor, dtype: torch.dtype, dims: tuple[int, ...], recipe: str) -> Tensor:
    """float32 values that an FP8 format holds, after the largest ones along `dims` are scaled to its maximum.

    The matrix is one block of blockwise scaling, whose scales are powers of two.
    """
    scale = torch.finfo(dtype).max / matrix.float().abs().amax(dims, keepdim=True)
    if recipe == "blockwise":
        scale = torch.exp2(scale.log2().floor())
    return (matrix.float() * scale).to(dtype).float() / scale


def write(path: Path, kernels: str, precision: str, family: str = "") -> dict[str, object]:
    """Write gradients that others are compared with, and compare them with those of local kernels in fp32."""
    found = gradients_of(config(kernels, precision, ONE + family))
    save_file({name: value.contiguous() for name, value in found.items()}, path)
    return compared(found, load_file(path.parent / f"local fp32{family}.safetensors"))


def cases(world: int, folder: Path, is_all: bool) -> dict[str, Callable[[], dict[str, object]]]:
    """Cases by name: precision, layout, recomputation."""
    if world == 1:
        return _of_one_process(folder, is_all)
    chosen = [("bf16", layout, "none") for layout in CONTEXTS[world]]
    if world == 2:
        every = itertools.product(PRECISIONS, LAYOUTS, SETS, RECOMPUTES)
        chosen += [(p, with_frozen(layout, f), r) for p, layout, f, r in every] if is_all else AT_LAYOUTS
    found = {}
    for precision, layout, recompute in chosen:
        kind = next((f",{kind}" for kind in (QWEN, LORA) if kind in layout), "")
        reference = f"local fp32{kind}" if precision == "fp32" else f"engine {precision}{kind}"
        case = partial(compare, folder, precision, layout, recompute, reference)
        found[f"{precision} {layout} recompute {recompute}"] = case
    return found


def _of_one_process(folder: Path, is_all: bool) -> dict[str, Callable[[], dict[str, object]]]:
    found: dict[str, Callable[[], dict[str, object]]] = {"package": package}
    for name, kernels, precision in (("local fp32", LOCAL, "fp32"), ("local bf16", LOCAL, "bf16")):
        found[name] = partial(write, folder / f"{name}.safetensors", kernels, precision)
    for precision in PRECISIONS:
        found[f"engine {precision}"] = partial(write, folder / f"engine {precision}.safetensors", ENGINE, precision)
    for (name, kernels, precision), kind in itertools.product(
        (
            ("local fp32", LOCAL, "fp32"),
            ("engine bf16", ENGINE, "bf16"),
            ("engine tensorwise", ENGINE, "tensorwise"),
        ),
        (QWEN, LORA),
    ):
        found[f"{name},{kind}"] = partial(write, folder / f"{name},{kind}.safetensors", kernels, precision, f",{kind}")
    found[f"engine fp32,{LORA}"] = partial(
        write, folder / f"engine fp32,{LORA}.safetensors", ENGINE, "fp32", f",{LORA}"
    )
    found["broken"] = partial(broken, folder)
    for recipe in RECIPES:
        found[f"layer {recipe}"] = partial(one_layer, recipe)
    for precision, recompute in itertools.product(PRECISIONS, RECOMPUTES[1:]) if is_all else ():
        same = partial(compare, folder, precision, ONE, recompute, f"engine {precision}")
        found[f"{precision} recompute {recompute}"] = same
    return found


def with_frozen(layout: str, frozen: str) -> str:
    """Frozen parts stand before `overlap`."""
    plain = layout.removesuffix(",overlap")
    return ",".join(part for part in (plain, frozen, "overlap" if plain != layout else "") if part)
