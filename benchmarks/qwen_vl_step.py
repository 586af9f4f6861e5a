"""Measure a training step of a Qwen-VL family beside the plain way on transformers' model.

    OMP_NUM_THREADS=1 python -m benchmarks.qwen_vl_step [--family qwen2_vl] [--layers 1] [--pairs 4] [--repeats 3]

The model is a reduced one in one CPU process: it has the real widths, heads, patches, image sizes and lengths of text,
but few layers and a small vocabulary. Images have at most 200,704 pixels, which are 256 visual tokens (196 of
Qwen3-VL), unless --overrides names another data.max_pixels. The plain way (`released`) is transformers' model with
SDPA: queries and targets have a forward pass each, both padded at their end to the longest of the micro batch, and the
negatives are those of the micro batch. Both variants have the same weights and take the same pairs, in the shares of
training_step.MIXED; a step has five micro batches. The vision encoder is frozen. Embeddings and losses are compared
first.

`FLOPs` is the ratio of the operations that torch counts in a step of each, the attention computed as plain matrix
products; `reached` is the measured ratio divided by it. Seconds are wall time, or with --cpu-time the CPU time of the
process, for a machine with other work. The rest of the table is that of training_step.py.
"""

import argparse
import inspect
import sys
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training_step
from benchmarks.released_step import HEAD, SIZES, TEXT, TEXT_AND_IMAGE, Side, sequences_of
from benchmarks.training_step import Ours, PairsOfStep, Released, Step
from megatron_llave.config.data import DataConfig
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.packing import IMAGE, EncodedSequence, TileShape, VisualLayout
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.errors import exit_with_one_line
from megatron_llave.models import family_of
from megatron_llave.models.qwen_vl.positions import token_positions
from megatron_llave.models.qwen_vl.resize import FRAMES, MERGED, frame_tiles, normalise, num_visual_tokens, pixel_budget
from megatron_llave.training.logger import quiet_dependencies

PRESETS = {"qwen2_vl": "qwen2vl_2b", "qwen2_5_vl": "qwen2_5vl_3b", "qwen3_vl": "qwen3vl_2b"}
"""Family -> the model whose widths are measured."""
MAX_PIXELS = 200704
MOST_DEEPSTACK = 3
SPECIAL = 16
"""Number of the last ids of the vocabulary, which are no words: special tokens are among them."""


def build_config(family: str, layers: int, pairs: int, overrides: Sequence[str]) -> RunConfig:
    """The configuration of the reduced model. Of several layers, the last of the vision encoder sees whole images."""
    own = [f"data.max_pixels={MAX_PIXELS}"]
    if family == "qwen2_5_vl":
        own.append(f"model.vision.full_attention_layers={[layers - 1] if layers > 1 else []}")
    if family == "qwen3_vl":
        own.append(f"model.vision.deepstack_layers={list(range(min(layers, MOST_DEEPSTACK)))}")
    return training_step.build_config(layers, pairs, [*own, *overrides], PRESETS[family])


def make_side(data: DataConfig, model: ModelConfig, has_image: bool, rng: np.random.Generator) -> Side:
    """Make random text, and an image of random pixels in one of SIZES."""
    fewest, most = TEXT_AND_IMAGE if has_image else TEXT
    words = rng.integers(1, model.language.vocab_size - SPECIAL, rng.integers(fewest, most + 1)).tolist()
    if not has_image:
        return Side(EncodedSequence(words, [], [], positions=token_positions(words, [])), None)
    size, patch = SIZES[rng.integers(len(SIZES))], model.vision.patch_size
    grid = pixel_budget(data, patch).image_grid(*size)
    pixels = rng.integers(0, 256, (grid[1] * patch, grid[2] * patch, 3), np.uint8)
    tokens = [*words[:HEAD], IMAGE, *words[HEAD:]]
    sequence = EncodedSequence(
        tokens,
        [frame_tiles(pixels[None], patch, 1)],
        [VisualLayout(np.arange(num_visual_tokens(grid)))],
        positions=token_positions(tokens, [grid]),
        grids=[grid],
    )
    return Side(sequence, size)


def tile_shape(model: ModelConfig) -> TileShape:
    """The sizes of the tiles that `make_side` makes."""
    patch = model.vision.patch_size
    return TileShape(patch, 1, (MERGED**2, 3, FRAMES, patch, patch))


class Plain(Released):
    """transformers' model, and two padded forward passes per micro batch."""

    def build(self, attention: str) -> Module:
        """Make the model with random weights and a frozen vision encoder; its mergers are trained."""
        hf, model = family_of(self.cfg.model).hf, self.cfg.model
        values = hf.build_config(model, hf.layouts[0], True, "float32", None)
        config = transformers.CONFIG_MAPPING[model.family].from_dict(values)
        made = transformers.AutoModel.from_config(config, attn_implementation=attention, dtype=self.dtype)
        for name, parameter in made.visual.named_parameters():
            parameter.requires_grad_("merger" in name)
        return made.train()  # the model has no dropout

    def prepare(self, micro_batches: PairsOfStep) -> list[tuple[dict[str, Tensor], ...]]:
        """Pad the micro batches: the keyword arguments of the model's forward, for the queries and for the targets."""
        return [tuple(self._padded(sides) for sides in sequences_of(pairs)) for pairs in micro_batches]

    def _padded(self, sides: Sequence[Side]) -> dict[str, Tensor]:
        image, longest = self.model.config.image_token_id, max(side.sequence.length for side in sides)
        ids, mask = (torch.zeros(len(sides), longest, dtype=torch.int64) for _ in range(2))
        for row, side in enumerate(sides):
            layouts = iter(side.sequence.layouts)
            parts = [[image] * len(next(layouts)) if token == IMAGE else [token] for token in side.sequence.tokens]
            tokens = torch.tensor(sum(parts, []))
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        images = [tile for side in sides for tile in side.sequence.tiles]
        if images:
            kind = family_of(self.cfg.model).embedder.tower_kind
            mean, std = torch.tensor(kind.mean), torch.tensor(kind.std)
            inputs["pixel_values"] = (
                normalise(torch.from_numpy(np.concatenate(images)), mean, std).flatten(0, 1).flatten(1)
            )
            inputs["image_grid_thw"] = torch.tensor([grid for side in sides for grid in side.sequence.grids])
            if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:  # since transformers 5
                inputs["mm_token_type_ids"] = (ids == image).long()
        return inputs

    def embed_sides(self, sides: dict[str, Tensor]) -> Tensor:
        """Unit vectors [n, h] of padded queries or targets."""
        hidden = self.model(**sides, use_cache=False).last_hidden_state
        last = sides["attention_mask"].sum(1) - 1
        return F.normalize(hidden[torch.arange(len(last)), last].float(), dim=-1)


def counted_flops(steps: dict[str, Step]) -> dict[str, float]:
    """FLOPs of a step of each variant, counted by torch, divided by those of ours with one pass."""
    counts = {}
    for variant, step in steps.items():
        # torch counts no operations in the attention kernel of the CPU, so it is computed without it.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step()
        counts[variant] = counter.get_total_flops()
    return {variant: count / counts[training_step.VARIANTS[0]] for variant, count in counts.items()}


def run(args: argparse.Namespace) -> None:
    """Print the table, or for --memory one number."""
    cfg = build_config(args.family, args.layers, args.pairs, args.overrides)
    groups = training_step.start(cfg)
    micro_batches = training_step.make_step(cfg, True, make=partial(make_side, cfg.data))
    make_ours = partial(Ours, cfg, groups, tile_shape(cfg.model))
    if args.memory:
        training_step.print_growth(args.memory[0], micro_batches, make_ours, partial(Plain, cfg))
        return
    print(f"{args.family}, {torch.get_num_threads()} thread(s), {args.layers} encoder and decoder layer(s)\n")
    ours, plain = make_ours(), Plain(cfg)
    apart = training_step.check(cfg, ours, plain, micro_batches)
    print(f"embeddings {apart[0]:.1e} apart, losses {apart[1]:.1e}", file=sys.stderr, flush=True)
    steps = training_step.steps_of(ours, plain, micro_batches)
    flops = counted_flops(steps)
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds = training_step.time_variants(steps, args.repeats, clock)
    del ours, plain, steps
    options = ("--family", args.family)
    memory = lambda variant: training_step.memory_of(variant, "mixed", args.pairs, args, *options)  # noqa: E731
    training_step.print_heads()
    training_step.print_rows("mixed", cfg, flops, seconds, None if args.no_memory else memory)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=PRESETS, default="qwen2_vl")
    parser.add_argument("--layers", type=int, default=1, help="layers of the vision encoder and of the decoder (1)")
    parser.add_argument("--pairs", type=int, default=4, help="pairs per micro batch (4)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="measure the CPU time of the process")
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    parser.add_argument("--memory", nargs=2, metavar=("VARIANT", "BATCHES"), help=argparse.SUPPRESS)
    parser.add_argument("--overrides", nargs="*", default=[], help="section.key=value")
    args = parser.parse_args()
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        run(args)
        process_groups.destroy_distributed()


if __name__ == "__main__":
    main()
