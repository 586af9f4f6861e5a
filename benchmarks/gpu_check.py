"""Compare embeddings and gradients of the tiny golden model on this device with those of a CPU in float32.

    CUDA_VISIBLE_DEVICES= python -m benchmarks.gpu_check --save reference.safetensors
    python -m benchmarks.gpu_check --against reference.safetensors local:fp32 local:bf16 transformer_engine:fp8:delayed

The weights are those of tests/golden/hf_tiny. Its inputs (texts, and images of one to five tiles) are pairs of one
micro batch in one packed row. Loss and gradient are computed by the schedule of the training step. A case is
KERNELS:PRECISION[:FP8_RECIPE]. Each case prints a line and appends it to --raw at once, so that a crash of a later case
loses nothing. The exit status is 1 if a case is off.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from golden_model import CASES, OFFICIAL, ONEVISION, PATCHES_PER_SIDE, TILE, embeddings, sequence
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_llave.batch import PairBatch
from megatron_llave.config.load import config_from_dict, override_config
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.packing import TileShape, pack_sequences
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.errors import exit_with_one_line, require
from megatron_llave.loss import build_loss
from megatron_llave.models import build_model, open_hf, read_hf_config
from megatron_llave.models.blocks.initialization import named_global_parameters
from megatron_llave.models.blocks.kernels import row_multiple
from megatron_llave.models.hf.mapping import local_kernel_name
from megatron_llave.models.hf.weights import fill_from_hf
from megatron_llave.training.gradient_cache import forward_backward
from megatron_llave.training.logger import quiet_dependencies
from megatron_llave.training.optimizer import build_trainable

LEAST_COSINE = {
    **{("local", "fp32"): 0.999999, ("transformer_engine", "fp32"): 0.9999},  # its products are in TF32
    **{("local", "bf16"): 0.995, ("transformer_engine", "bf16"): 0.995},
}
"""The least cosine of embeddings. An H200 reached 0.998 in bf16."""
LEAST_GRADIENT_COSINE = {"fp32": 0.999, "bf16": 0.98}
"""The least cosine of the gradients of all parameters as one vector."""
FP8 = {
    "delayed": {"embedding_cosine": 0.922, "gradient_cosine": 0.765, "gradient_norm_ratio": 0.895},
    "blockwise": {"embedding_cosine": 0.926, "gradient_cosine": 0.786, "gradient_norm_ratio": 0.887},
    "tensorwise": {"embedding_cosine": 0.915, "gradient_cosine": 0.810, "gradient_norm_ratio": 0.973},
}
"""Means of 20 draws on a CPU, where tests/engine/double.py rounds as each recipe says. With only 64 channels, one draw
says little: its standard deviation is 0.02 to 0.04, 0.04 to 0.06, and 0.07 to 0.08. A draw changes every weight by some
2**-9 of itself, as rounding to bf16 does."""
DRAWS = 8
"""Draws of a case in FP8."""
FP8_MARGIN = {"embedding_cosine": 0.05, "gradient_cosine": 0.08, "gradient_norm_ratio": 0.1}
"""How far the means of DRAWS may be off: 3 standard errors of the difference, of the recipe that varies most. With a
forward product 15 % too large, all three were further off, and with such a gradient of a norm, the last one was."""
SOFT_LOSS = ["loss.temperature=0.2", "loss.alpha=1.0"]
"""A soft loss, which does not amplify rounding errors."""
USED = (CASES + OFFICIAL)[:6]
"""The inputs: three queries, then their targets."""


def build_case(case: str) -> RunConfig:
    """The configuration of KERNELS:PRECISION[:FP8_RECIPE]."""
    kernels, precision, recipe = (*case.split(":"), "tensorwise")[:3]
    require(precision != "fp8" or recipe in FP8, f"{case}: the recipe must be one of {', '.join(FP8)}")
    fixed = {"model": {"preset": "tiny"}, "train": {"steps": 1, "global_batch_size": 3}}
    cfg = override_config(config_from_dict(fixed), SOFT_LOSS)
    model = replace(read_hf_config(ONEVISION).model, kernels=kernels, precision=precision, fp8_recipe=recipe)
    return replace(cfg, model=model)


def golden_batch(multiple: int) -> PairBatch:
    """The inputs as three pairs in one packed row."""
    row = pack_sequences([sequence(case) for case in USED], multiple, TileShape(TILE, PATCHES_PER_SIDE**2))
    ids = torch.arange(len(USED) // 2)
    return PairBatch(row, ids, ids, ids[:0], "golden", [str(i) for i in ids.tolist()])


def compute(cfg: RunConfig, draw: int = 0) -> dict[str, Tensor]:
    """Compute embeddings, loss and the gradient of every parameter; returns them in float32 on the CPU.

    Draw 0 has the golden weights, the others slightly different ones.
    """
    groups, device = process_groups.initialize_model_parallel(cfg.parallel), process_groups.device()
    chunks = build_model(cfg.model, cfg.parallel, groups, device, seed=None)
    fill_from_hf(chunks, open_hf(ONEVISION), groups)
    if draw > 0:
        shake(chunks[0], draw)
    trainable = build_trainable(cfg, chunks, groups)
    batch = golden_batch(row_multiple(cfg.model, cfg.parallel)).to(device)
    with torch.no_grad():
        computed = {"embeddings": chunks[0](batch.sequences)}
    trainable.zero_gradients()
    [(computed["loss"], _)] = forward_backward(trainable.chunks, [batch], build_loss(cfg.loss, groups.dp), cfg.loss)
    for name, parameter in named_global_parameters(chunks[0]):
        computed[f"gradient {local_kernel_name(name)}"] = parameter.main_grad
    return {name: value.detach().float().cpu().clone() for name, value in computed.items()}


@torch.no_grad()
def shake(chunk: torch.nn.Module, seed: int) -> None:
    """Change every weight by 2**-9 of itself, times a normal number."""
    generator = torch.Generator().manual_seed(seed)
    for weight in chunk.parameters():
        weight.copy_(weight.float() * (1 + 2**-9 * torch.randn(weight.shape, generator=generator).to(weight.device)))


def compare_with(computed: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float | str]:
    """Distances and cosines to the golden embeddings, and to the loss and the gradients of the reference."""
    golden = embeddings()[: len(USED)]
    names = sorted(name for name in wanted if name.startswith("gradient"))
    assert names == sorted(name for name in computed if name.startswith("gradient")), "the parameters differ"
    ours, theirs = (torch.cat([values[name].flatten() for name in names]).double() for values in (computed, wanted))
    apart = {
        name: float((computed[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)) for name in names
    }
    worst = max(apart, key=lambda name: apart[name])
    return {
        "embedding_cosine": float((computed["embeddings"] * golden).sum(1).min()),
        "embedding_apart": float((computed["embeddings"] - golden).abs().max()),
        "loss_apart": float((computed["loss"] - wanted["loss"]).abs()),
        "gradient_cosine": float(ours @ theirs / (ours.norm() * theirs.norm())),
        "gradient_norm_ratio": float(ours.norm() / theirs.norm()),
        "worst_gradient": worst.removeprefix("gradient "),
        "worst_gradient_apart": apart[worst],
    }


def is_within_limits(model: ModelConfig, deviations: dict[str, float | str]) -> bool:
    """Whether the figures of `compare_with`, in FP8 the means of DRAWS of them, are as good as they should be."""
    if model.precision == "fp8":
        expected = FP8[model.fp8_recipe]
        return all(abs(deviations[name] - expected[name]) <= margin for name, margin in FP8_MARGIN.items())
    is_good = deviations["embedding_cosine"] >= LEAST_COSINE[model.kernels, model.precision]
    return is_good and deviations["gradient_cosine"] >= LEAST_GRADIENT_COSINE[model.precision]


def check(case: str, against: Path, raw: Path | None) -> bool:
    """Compute a case and print how it compares. True if it is within the limits."""
    if torch.cuda.is_available():
        torch.compiler.reset()  # else the kernels compiled for other cases count towards torch's limit
    cfg, wanted = build_case(case), load_file(against)
    draws = [compare_with(compute(cfg, draw), wanted) for draw in range(DRAWS if cfg.model.precision == "fp8" else 1)]
    means = {k: mean(draw[k] for draw in draws) for k, v in draws[0].items() if not isinstance(v, str)}
    deviations = draws[0] | means
    is_good = is_within_limits(cfg.model, deviations)
    figures = ", ".join(
        f"{k} {v:.3g}" if abs(v) < 0.9 else f"{k} {v:.7f}" for k, v in deviations.items() if k[0] != "w"
    )
    print(
        f"{case}: {'right' if is_good else 'OFF'}: {figures}; {deviations['worst_gradient']} is the furthest",
        flush=True,
    )
    if raw is not None:
        with raw.open("a") as file:
            print(json.dumps({"case": case, "is_good": is_good, **deviations}), file=file)
    return is_good


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="file to write the results of local kernels in float32 to")
    parser.add_argument("--against", type=Path, help="a file written with --save")
    parser.add_argument("--raw", type=Path, help="file to append figures to, one JSON object per line")
    parser.add_argument("cases", nargs="*", help="KERNELS:PRECISION[:FP8_RECIPE]")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # which the convolution of the vision encoder uses by default
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        process_groups.initialize_distributed(600)
        if args.save:
            save_file(compute(build_case("local:fp32")), args.save)
        results = [check(case, args.against, args.raw) for case in args.cases]
        process_groups.destroy_distributed()
    if not all(results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
