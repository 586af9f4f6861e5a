"""The tasks of the openmoji source: how a query and a target are made from an emoji.

This is the second step of the openmoji source (prepare.py), which training pairs and evaluation sets share. All random
choices come from the generator that is passed in, so an example is a pure function of (task, emoji, generator).
"""

import io
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from random import Random

from PIL import Image

from megatron_llave.batch import Side
from megatron_llave.prepare.openmoji.catalogue import SCENE, TONES, Catalogue

POSITIONS = ("top left", "top right", "bottom left", "bottom right")
REPRESENT_IMAGE = "Represent the given image."
NO_TONE = "no skin tone"

INSTRUCTIONS = {
    "group": "Identify the category of the emoji.",
    "subgroup": "Identify the fine-grained class of the emoji.",
    "image_to_name": "Find the name of the emoji.",
    "name_to_image": "Find the emoji: {}",
    "composed": "Find the same emoji with {}.",
    "vqa": "Which emoji is at the {}?",
    # The query has the position and not the name, which would tell the target without a look at the image.
    "grounding": "Select the part of the image at the {}.",
    "image_to_image": "Find the same emoji.",
    "tone": "Identify the skin tone of the emoji.",
    "grounding_by_name": "Select the part of the image with {}.",
}

# The augmentation is light: a stronger one, or stronger colours, cost a small model most of its accuracy.
SMALLEST_SIZE = 0.9
DARKEST_BACKGROUND = 225
LARGEST_ROTATION = 4.0
"""The largest rotation in degrees."""
SMALLEST_CELL = 0.93
# Canvases are nearly white, because a coloured one could be matched by its colour instead of its content.
DARKEST_CANVAS = 235


@dataclass
class Example:
    """A query and its target, with their ids and hard negatives."""

    query: Side
    target: Side
    query_id: str
    """Code of the emoji, its name, or code and tone for a composed query; the augmentation does not count."""
    target_id: str
    """Code of the emoji, or the text."""
    hard_negatives: list[Side] = field(default_factory=list)
    """Wrong targets that look or sound like the right target."""
    hard_negative_ids: list[str] = field(default_factory=list)
    """One id per hard negative, made like `target_id`."""


class World:
    """The emoji grouped by their roles in the tasks, and the ways to draw them."""

    def __init__(self, catalogue: Catalogue, image_size: int) -> None:
        """Prepare the emoji for drawing; `image_size` is the width and height of every image in pixels."""
        self.emoji = catalogue.emoji
        self.size = image_size
        # Resizing and rotating need premultiplied alpha, and would otherwise convert to it each time.
        self.pictures = [Image.fromarray(pixels).convert("RGBa") for pixels in catalogue.pixels]
        self.clean_pngs: dict[int, bytes] = {}
        self.cells: dict[tuple[int, int], Image.Image] = {}

    @cached_property
    def by_split(self) -> dict[str, list[int]]:
        """The emoji of each split, in the order of the catalogue."""
        return _group((e.split, i) for i, e in enumerate(self.emoji))

    @cached_property
    def scene(self) -> list[int]:
        """Training emoji that are put on canvases."""
        return [i for i in self.by_split["train"] if self.emoji[i].subgroup in SCENE]

    @cached_property
    def named(self) -> list[int]:
        """Training emoji whose names are trained; the others are trained with their group and subgroup only."""
        scene = set(self.scene)
        return [i for i in self.by_split["train"] if i in scene or self.emoji[i].group == "People & Body"]

    @cached_property
    def by_base(self) -> dict[str, list[int]]:
        """The emoji of each code without tone, in all their tones."""
        return _group((e.base, i) for i, e in enumerate(self.emoji))

    @cached_property
    def tones(self) -> dict[str, list[int]]:
        """Like `by_base`, for the emoji that exist in all five tones and without a tone."""
        return {base: members for base, members in self.by_base.items() if len(members) == len(TONES) + 1}

    @cached_property
    def train_subgroups(self) -> dict[str, list[int]]:
        """The training emoji of each subgroup."""
        return _group((self.emoji[i].subgroup, i) for i in self.by_split["train"])

    @cached_property
    def scene_subgroups(self) -> dict[str, list[int]]:
        """The scene emoji of each subgroup."""
        return _group((self.emoji[i].subgroup, i) for i in self.scene)

    @cached_property
    def group_names(self) -> list[str]:
        """The names of all groups, sorted."""
        return sorted({e.group for e in self.emoji})

    @cached_property
    def subgroup_names(self) -> list[str]:
        """The texts of all subgroups that are not out of distribution, sorted."""
        return [subgroup_text(name) for name in sorted({e.subgroup for e in self.emoji if e.split != "ood"})]

    def clean(self, index: int) -> bytes:
        """Return a PNG of an emoji on white that fills the image."""
        if index not in self.clean_pngs:
            self.clean_pngs[index] = self._draw_emoji(index, self.size, (0, 0), (255, 255, 255), 0.0)
        return self.clean_pngs[index]

    def augmented(self, index: int, rng: Random) -> bytes:
        """Return a PNG of an emoji that is slightly smaller, shifted and rotated, on a light background."""
        size = int(self.size * rng.uniform(SMALLEST_SIZE, 1.0))
        room = self.size - size
        background = _light_colour(rng, DARKEST_BACKGROUND)
        corner = (rng.randint(0, room), rng.randint(0, room))
        return self._draw_emoji(index, size, corner, background, rng.uniform(-LARGEST_ROTATION, LARGEST_ROTATION))

    def _draw_emoji(
        self, index: int, size: int, corner: tuple[int, int], background: tuple[int, int, int], rotation: float
    ) -> bytes:
        picture = _resized(self.pictures[index], size)
        if rotation:
            picture = picture.rotate(rotation, Image.Resampling.BILINEAR)
        picture = picture.convert("RGBA")
        canvas = Image.new("RGB", (self.size, self.size), background)
        canvas.paste(picture, corner, picture)
        return _png(canvas)

    def canvas(self, cells: list[int | None], rng: Random) -> bytes:
        """Return a PNG of up to four emoji at half size, in the order of POSITIONS."""
        half = self.size // 2
        canvas = Image.new("RGB", (self.size, self.size), _light_colour(rng, DARKEST_CANVAS))
        for position, index in enumerate(cells):
            if index is not None:
                size = int(half * rng.uniform(SMALLEST_CELL, 1.0))
                left = position % 2 * half + rng.randint(0, half - size)
                top = position // 2 * half + rng.randint(0, half - size)
                cell = self._cell(index, size)
                canvas.paste(cell, (left, top), cell)
        return _png(canvas)

    def _cell(self, index: int, size: int) -> Image.Image:
        if (index, size) not in self.cells:
            self.cells[index, size] = _resized(self.pictures[index], size).convert("RGBA")
        return self.cells[index, size]


def _group(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    groups = defaultdict(list)
    for name, index in pairs:
        groups[name].append(index)
    return dict(groups)


def _light_colour(rng: Random, darkest: int) -> tuple[int, int, int]:
    return (rng.randint(darkest, 255), rng.randint(darkest, 255), rng.randint(darkest, 255))


def _resized(picture: Image.Image, size: int) -> Image.Image:
    return picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.BILINEAR)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def subgroup_text(subgroup: str) -> str:
    """Return the name of a subgroup, such as `animal-bird`, as words."""
    return subgroup.replace("-", " ")


def make_example(world: World, task: str, index: int, rng: Random) -> Example:
    """Make an example of a task (a key of INSTRUCTIONS) whose answer is emoji `index`."""
    if task in ("vqa", "grounding", "grounding_by_name"):
        return _on_canvas(world, task, index, rng)
    emoji = world.emoji[index]
    picture_target = Side(REPRESENT_IMAGE, [world.clean(index)])
    if task == "name_to_image":
        return Example(Side(INSTRUCTIONS[task].format(emoji.name), []), picture_target, emoji.name, emoji.code)
    if task == "composed":
        source = rng.choice(_sources(world, index))
        tone = NO_TONE if emoji.tone is None else TONES[emoji.tone]
        query = Side(INSTRUCTIONS[task].format(tone), [world.augmented(source, rng)])
        return Example(query, picture_target, f"{world.emoji[source].code}, {tone}", emoji.code)
    query = Side(INSTRUCTIONS[task], [world.augmented(index, rng)])
    if task == "image_to_image":
        return Example(query, picture_target, emoji.code, emoji.code)
    text = answer_text(world, task, index)
    return Example(query, Side(text, []), emoji.code, text)


def add_hard_negatives(world: World, task: str, index: int, example: Example, count: int, rng: Random) -> None:
    """Add up to `count` wrong targets to the example: training emoji of its base, then of its subgroup.

    Tasks whose answer is a group or subgroup get none, since these names have no near misses.
    """
    if count == 0 or task in ("group", "subgroup"):
        return
    emoji, named = world.emoji[index], set(world.named)
    near = [
        [i for i in members if i != index and i in named]
        for members in (world.by_base[emoji.base], world.train_subgroups.get(emoji.subgroup, []))
    ]
    siblings = rng.sample(near[0], len(near[0]))
    others = [i for i in rng.sample(near[1], len(near[1])) if i not in siblings]
    for wrong in (*siblings, *others)[:count]:
        if example.target.images:
            side, name = Side(REPRESENT_IMAGE, [world.clean(wrong)]), world.emoji[wrong].code
        else:
            side, name = Side(world.emoji[wrong].name, []), world.emoji[wrong].name
        example.hard_negatives.append(side)
        example.hard_negative_ids.append(name)


def answer_text(world: World, task: str, index: int) -> str:
    """Return the target of a task whose answer is a text."""
    emoji = world.emoji[index]
    if task == "group":
        return emoji.group
    if task == "subgroup":
        return subgroup_text(emoji.subgroup)
    if task == "tone":
        return TONES[emoji.tone]
    return emoji.name


def _sources(world: World, target: int) -> list[int]:
    """Return the other tones of the target that a query may show: training emoji, or those of its held-out family."""
    split = world.emoji[target].split
    allowed = {"train", split} - {"combo"}
    return [i for i in world.tones[world.emoji[target].base] if i != target and world.emoji[i].split in allowed]


def _on_canvas(world: World, task: str, index: int, rng: Random) -> Example:
    """Make an example with one to three other emoji beside the answer, in half of the cases one of its subgroup."""
    emoji = world.emoji[index]
    others = [i for i in rng.sample(world.scene, 4) if i != index][:3]
    siblings = [i for i in world.scene_subgroups[emoji.subgroup] if i != index]
    if rng.random() < 0.5 and siblings:
        sibling = rng.choice(siblings)
        others = [sibling, *(i for i in others if i != sibling)]
    shown = [index, *others[: rng.randint(1, 3)]]
    cells: list[int | None] = shown + [None] * (len(POSITIONS) - len(shown))
    rng.shuffle(cells)
    asked = emoji.name if task == "grounding_by_name" else POSITIONS[cells.index(index)]
    query = Side(INSTRUCTIONS[task].format(asked), [world.canvas(cells, rng)])
    layout = " ".join("_" if i is None else world.emoji[i].code for i in cells)
    query_id = f"{layout}, {asked}"
    if task == "vqa":
        return Example(query, Side(emoji.name, []), query_id, emoji.name)
    return Example(query, Side(REPRESENT_IMAGE, [world.clean(index)]), query_id, emoji.code)


def spread(items: list[int], count: int, rng: Random) -> list[int]:
    """Return `count` draws in which all items are equally frequent, to one draw, and none comes twice in a row."""
    drawn: list[int] = []
    while len(drawn) < count:
        order = rng.sample(items, len(items))
        if drawn and order[0] == drawn[-1]:
            order.reverse()
        drawn += order
    return drawn[:count]


def spread_over_classes(classes: dict[str, list[int]], count: int, rng: Random) -> list[int]:
    """Return `count` draws in which all classes are equally frequent, to one draw, and so are the items of a class."""
    names = list(classes)
    order = spread(list(range(len(names))), count, rng)
    members = {c: iter(spread(classes[name], order.count(c), rng)) for c, name in enumerate(names)}
    return [next(members[c]) for c in order]


def training_answers(world: World, task: str, count: int, rng: Random) -> list[int]:
    """Return the emoji that `count` training pairs of a task are about, all of split train, in shuffled order."""
    if task in ("group", "subgroup"):
        return spread_over_classes(world.train_subgroups, count, rng)
    if task in ("vqa", "grounding"):
        return spread(world.scene, count, rng)
    if task == "composed":
        named = set(world.named)
        return spread([i for members in world.tones.values() for i in members if i in named], count, rng)
    return spread(world.named, count, rng)
