"""Search in your own images by text, by image, or by both: build an index, ask it, serve it as a web page.

`llave search --help` explains the command; megatron_llave/options/search.py has its options.
"""

import argparse
import importlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from megatron_llave.commands.progress import progress_bar
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.errors import exit_with_one_line, import_optional, require, to_one_line
from megatron_llave.launch import procs
from megatron_llave.options.search import KINDS, PROMPTS, parse
from megatron_llave.prepare.openmoji.images import write_images
from megatron_llave.search.build import UNREADABLE, BuildOptions, Built, build_index
from megatron_llave.search.index import about, open_index
from megatron_llave.search.prompts import require_places
from megatron_llave.search.query import load_query_model, read_image
from megatron_llave.search.vectors import recall, shorten
from megatron_llave.training.logger import quiet_dependencies

SERVER = "megatron_llave.search.server"
LISTED = 20
"""Unreadable files that are printed one by one."""


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run the command."""
    args = parse(argv)
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        RUN[args.command](args)
        process_groups.destroy_distributed()


def prompts_of(args: argparse.Namespace) -> dict[str, str]:
    """The prompts that the command line gives, by name.

    Raises:
        ConfigError: one that takes the user's words has no place for them, or one has places for several images.
    """
    given = {option: getattr(args, option[2:].replace("-", "_"), None) for option in PROMPTS}
    given = {option: text.replace("\\n", "\n") for option, text in given.items() if text is not None}
    for option, text in given.items():
        require_places(option, text)
    return {option[2:].removesuffix("-prompt"): text for option, text in given.items()}


def run_build(args: argparse.Namespace) -> None:
    """Build the index; the first rank prints what was done."""
    procs.require_as_started(args.procs)
    options = BuildOptions(
        Path(args.pictures),
        Path(args.out),
        args.checkpoint,
        tuple(args.overrides),
        args.average,
        prompts_of(args),
        args.vectors,
        args.dims,
        args.rebuild,
    )
    with progress_bar() as progress:
        built = build_index(options, progress)
    if built is not None:
        print("\n".join(lines_of(built, args.out)))


def lines_of(built: Built, index: str) -> Iterator[str]:
    """What a build has done, for people."""
    manifest = built.manifest
    copies = manifest.files - manifest.images
    further = f" and {count(copies, 'copy', 'copies')} of them" if copies else ""
    yield f"{index}: {count(manifest.images, 'image')}{further}"
    if built.is_written:
        kept = f", {built.kept} taken over from an interrupted build" if built.kept else ""
        changes = f"{built.new} new, {built.changed} changed, {built.removed} removed"
        yield f"files: {changes}; images embedded: {built.embedded}{kept}"
    else:
        yield "it is up to date"
    yield f"search: {manifest.kind}"
    for name in ("text", "like", "both"):
        yield f"prompt of a query ({name}): {getattr(manifest.prompts, name)!r}"
    yield from (f"note: {note}" for note in built.notes)
    if built.problems:
        yield f"{count(len(built.problems), 'file')} cannot be used:"
        yield from (f"  {to_one_line(name)}: {to_one_line(problem)}" for name, problem in built.problems[:LISTED])
    if len(built.problems) > LISTED:
        yield f"  and {len(built.problems) - LISTED:,} more: {index}/{UNREADABLE}"
    if built.others:
        endings = sorted(built.others.items(), key=lambda item: -item[1])
        named = ", ".join(f"{number} {to_one_line(ending)}" for ending, number in endings[:5])
        yield f"{count(sum(built.others.values()), 'other file')} left out by the ending of the name: {named}"


def count(number: int, one: str, several: str = "") -> str:
    """A number with its noun."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def run_query(args: argparse.Namespace) -> None:
    """Ask the index once and print what it finds."""
    require(args.top >= 1, f"--top {args.top} must be at least 1")
    require(bool(args.text.strip() or args.image), "give words to look for, or --image FILE, or both")
    image = read_image(args.image) if args.image else None
    index = open_index(args.index)
    model = load_query_model(index, args.checkpoint, args.overrides, prompts_of(args))
    query = model(args.text, image, args.image)
    if os.environ.get("RANK", "0") != "0":
        return
    hits = [(hit.similarity, [file.name for file in index.files_of(hit.row)]) for hit in index.search(query, args.top)]
    if args.json:
        found = [{"similarity": similarity, "files": files} for similarity, files in hits]
        print(json.dumps({**about(index.manifest), "found": found}))  # in ASCII, with \udcXX for odd bytes of names
        return
    if not hits:
        print(f"{args.index} holds no image")
    for similarity, files in hits:
        copies = f"  (and {count(len(files) - 1, 'copy', 'copies')})" if len(files) > 1 else ""
        print(f"{similarity:.3f}  {to_one_line(files[0])}{copies}")
    if not index.manifest.is_exact:
        print(f"the search is {index.manifest.kind}")


def run_serve(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    require(os.environ.get("WORLD_SIZE", "1") == "1", "the page is served by one process; start it without torchrun")
    for package in ("starlette", "uvicorn"):
        import_optional(package, "the page needs", "pip install starlette uvicorn (the extra search)")
    server = importlib.import_module(SERVER)
    load = partial(load_query_model, checkpoint=args.checkpoint, overrides=args.overrides, prompts=prompts_of(args))
    server.serve(args.index, load, args.host, args.port, args.pictures)


def run_recall(args: argparse.Namespace) -> None:
    """Print the recall of each form of vectors, and what it takes."""
    index = open_index(args.index)
    width = index.manifest.width
    lengths: Sequence[int] = args.dims or [dims for dims in (width, width // 2, width // 4) if dims]
    for dims in lengths:
        require(1 <= dims <= width, f"--dims {dims} must be between 1 and {width}")
    print(f"{count(len(index), 'image')}; the share of the exact 1 and 10 nearest images that is found")
    print(f"{'vectors':<10}{'numbers':>8}{'MB':>10}{'recall@1':>10}{'recall@10':>11}")
    for dims in lengths:
        for kind in KINDS:
            small = shorten(np.asarray(index.vectors), dims, kind)
            size = (small.rows.nbytes + (0 if small.scales is None else small.scales.nbytes)) / 1e6
            is_exact = kind == "float32" and dims == width
            found = recall(index.vectors, None if is_exact else small)
            print(f"{kind:<10}{dims:>8}{size:>10.1f}{found['recall@1']:>10.3f}{found['recall@10']:>11.3f}")


def run_demo_images(args: argparse.Namespace) -> None:
    """Write the images of `make search`."""
    print(f"{args.out}: {write_images(args.out):,} images")


RUN = {
    "build": run_build,
    "query": run_query,
    "serve": run_serve,
    "recall": run_recall,
    "demo-images": run_demo_images,
}
