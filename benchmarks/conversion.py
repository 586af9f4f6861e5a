"""Measure the conversion of a full-size model in both directions: seconds, and peak memory beside the model size.

    python benchmarks/conversion.py --preset 0.5b --dtype bfloat16 --folder runs/conversion

The benchmark writes a Hugging Face folder of random weights in transformers' format, imports it, exports the checkpoint
in every format of the family, and compares every tensor bitwise. As an alternative, transformers loads and saves the
same folder.
Each step is a process of its own; its peak is the largest resident memory that the kernel counted, including mapped
files.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_llave.config.load import config_from_dict
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.errors import exit_with_one_line
from megatron_llave.models import FAMILIES, family_of, model_without_memory, open_hf
from megatron_llave.models.hf.mapping import hf_shapes
from megatron_llave.models.hf.tensor_files import write_tensor_files

TOOL = Path(__file__).resolve().parents[1] / "tools" / "convert_hf.py"
ALONE = "import sys; from megatron_llave.convert import hf"
WITH_TRANSFORMERS = (
    "import sys, torch, transformers; m = getattr(transformers, sys.argv[4]).from_pretrained("
    "sys.argv[1], dtype=getattr(torch, sys.argv[3])); m.save_pretrained(sys.argv[2])"
)


def main() -> None:
    """Make the folder, run and measure each step, compare the tensors, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = [preset for family in FAMILIES.values() for preset in family.hf.presets]
    parser.add_argument("--preset", default="0.5b", choices=presets, help="the model")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="dtype of the weights"
    )
    parser.add_argument(
        "--folder", default="runs/conversion", type=Path, help="scratch folder, emptied before and after"
    )
    parser.add_argument("--without-transformers", action="store_true", help="do not measure transformers")
    args = parser.parse_args()
    with exit_with_one_line():
        shutil.rmtree(args.folder, ignore_errors=True)
        source, checkpoint, from_transformers = (args.folder / name for name in ("source", "ckpt", "transformers"))
        model = config_from_dict({"model": {"preset": args.preset}}).model
        layouts = family_of(model).hf.layouts
        config, num_bytes, largest = make_folder(source, model, args.dtype)
        python = [sys.executable, "-W", "ignore"]
        convert = [*python, str(TOOL)]
        export = [*convert, "export", "--from", str(checkpoint), "--format"]
        commands = {
            "imports of Python alone": [*python, "-c", ALONE],
            "import": [*convert, "import", "--from", str(source), "--to", str(checkpoint), "--preset", args.preset],
            **{f"export {layout}": [*export, layout, "--to", str(args.folder / layout)] for layout in layouts},
        }
        if not args.without_transformers:
            arguments = [str(source), str(from_transformers), args.dtype, config["architectures"][0]]
            command = [*python, "-c", WITH_TRANSFORMERS, *arguments]
            commands["transformers: from_pretrained, save_pretrained"] = command
        rows = {name: measured(command) for name, command in commands.items()}
        compared = {out.name: num_equal(source, out) for out in (args.folder / layout for layout in layouts)}
        shutil.rmtree(args.folder)
    sizes = f"{num_bytes / 1e9:.2f} GB of weights, the largest tensor {largest / 1e9:.2f} GB"
    print(f"\n{args.preset}, {args.dtype}: {sizes}\n")
    print("| step | seconds | peak GB | peak / model |\n|---|---:|---:|---:|")
    for name, (seconds, peak) in rows.items():
        print(f"| {name} | {seconds:.1f} | {peak / 1e9:.2f} | {peak / num_bytes:.2f} |")
    for name, (equal, total) in compared.items():
        print(f"\n{name}: {equal} of {total} tensors bit-equal to the source")
    sys.exit(any(equal < total for equal, total in compared.values()))


def make_folder(folder: Path, model: ModelConfig, dtype: str) -> tuple[dict, int, int]:
    """Write random weights in the family's first format.

    Returns:
        config.json, the bytes of all tensors, and those of the largest.
    """
    cpu_emulation.enable()
    process_groups.initialize_distributed(60)
    hf, stored = family_of(model).hf, getattr(torch, dtype)
    embedder = model_without_memory(model, process_groups.initialize_model_parallel(ParallelConfig()))
    tensor_shapes = hf_shapes({name: tuple(p.shape) for name, p in embedder.named_parameters()}, hf.rules(model))
    tensor_shapes |= hf.unused_shapes(model)
    layout = hf.layouts[0]
    shapes = {hf.layout_name(name, layout): (shape, stored) for name, shape in tensor_shapes.items()}
    folder.mkdir(parents=True)
    write_tensor_files(folder, shapes, random_tensors(shapes))
    config = hf.build_config(model, layout, True, dtype, None)
    (folder / "config.json").write_text(json.dumps(config))
    process_groups.destroy_distributed()
    sizes = [torch.Size(shape).numel() * stored.itemsize for shape in tensor_shapes.values()]
    return config, sum(sizes), max(sizes)


def random_tensors(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield random tensors one after the other."""
    generator = torch.Generator().manual_seed(0)
    for name, (shape, dtype) in shapes.items():
        yield name, torch.randn(shape, generator=generator).to(dtype)


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a process. If it fails, the benchmark ends."""
    # The kernel only tells the largest child so far, so each command is the only child of a process of its own.
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - start, int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


def num_equal(source: Path, out: Path) -> tuple[int, int]:
    """The number of tensors of `out` that are bitwise equal to those of `source`, and the number of all tensors."""
    original, converted = (open_hf(folder) for folder in (source, out))
    both = original.names.keys() & converted.names.keys()
    equal = 0
    for name in both:
        a, b = original.read(name), converted.read(name)
        equal += a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return equal, len(original.names.keys() | converted.names.keys())


if __name__ == "__main__":
    main()
