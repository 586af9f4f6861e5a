"""The evaluation sets of the openmoji source: a benchmark like MMEB, held out by family, skin tone and subgroup.

This is the third step of the openmoji source (prepare.py). The sets do not depend on the seed of the training pairs.
"""

from dataclasses import dataclass, field
from random import Random

from megatron_llave.batch import Side
from megatron_llave.evaluation.benchmarks.prepared import EvaluationSet, input_key
from megatron_llave.prepare.openmoji.catalogue import TONES
from megatron_llave.prepare.openmoji.tasks import REPRESENT_IMAGE, World, answer_text, make_example

QUERIES = 300
"""Number of queries of a set, or fewer if there are not so many emoji."""
CANDIDATES = 1000
"""Number of candidates of the retrieval sets."""
PER_SUBGROUP = 8
"""The largest number of held-out emoji of one subgroup in the classification sets."""


@dataclass
class _Benchmark:
    """Collects sets and their inputs; each input is stored once."""

    world: World
    queries: int
    inputs: dict[str, Side] = field(default_factory=dict)
    sets: list[EvaluationSet] = field(default_factory=list)

    def keep(self, side: Side) -> str:
        key = input_key(side)
        self.inputs[key] = side
        return key

    def add(self, name: str, task: str, meta_task: str, split: str, answers: list[int], pool: list[Side]) -> None:
        """Add a set with one query for each of the first `answers`; equal inputs of `pool` are one candidate."""
        candidates = list(dict.fromkeys(self.keep(side) for side in pool))
        position = {key: number for number, key in enumerate(candidates)}
        rng = Random(f"evaluation/{name}")
        queries, positives = [], []
        for index in answers[: self.queries]:
            example = make_example(self.world, task, index, rng)
            queries.append(self.keep(example.query))
            positives.append(position[input_key(example.target)])
        self.sets.append(EvaluationSet(name, meta_task, split, queries, candidates, positives))

    def pictures(self, indices: list[int]) -> list[Side]:
        return [Side(REPRESENT_IMAGE, [self.world.clean(index)]) for index in indices]

    def names(self, indices: list[int]) -> list[Side]:
        return [Side(answer_text(self.world, "image_to_name", index), []) for index in indices]


def make_evaluation(world: World, scale: float = 1.0) -> tuple[dict[str, Side], list[EvaluationSet]]:
    """Return the inputs of all sets by key, and the sets.

    Args:
        world: the emoji.
        scale: fraction of the queries to make, at least 8 per set; the number of candidates does not depend on it.
    """
    benchmark = _Benchmark(world, max(8, round(QUERIES * scale)))
    _add_classification(benchmark)
    _add_retrieval(benchmark)
    _add_canvases(benchmark)
    _add_untrained(benchmark)
    return benchmark.inputs, benchmark.sets


def _texts(texts: list[str]) -> list[Side]:
    return [Side(text, []) for text in texts]


def _shuffled(items: list[int], name: str) -> list[int]:
    return Random(f"evaluation/order/{name}").sample(items, len(items))


def _add_classification(benchmark: _Benchmark) -> None:
    """Add the sets with emoji of held-out families, PER_SUBGROUP of one subgroup at most."""
    world = benchmark.world
    counts: dict[str, int] = {}
    answers = []
    for index in _shuffled(world.by_split["base"], "classification"):
        subgroup = world.emoji[index].subgroup
        counts[subgroup] = counts.get(subgroup, 0) + 1
        if counts[subgroup] <= PER_SUBGROUP:
            answers.append(index)
    benchmark.add("group", "group", "classification", "ind", answers, _texts(world.group_names))
    benchmark.add("subgroup", "subgroup", "classification", "ind", answers, _texts(world.subgroup_names))


def _combo_pool(world: World) -> list[int]:
    """Return candidates: the emoji with held-out tones, then their other tones, then training emoji."""
    held_out = world.by_split["combo"]
    siblings = [i for index in held_out for i in world.by_base[world.emoji[index].base]]
    return list(dict.fromkeys([*held_out, *siblings, *_shuffled(world.named, "combo")]))[:CANDIDATES]


def _add_retrieval(benchmark: _Benchmark) -> None:
    """Add the sets with held-out tones of trained emoji, and the sets of trained pairs, which measure memory."""
    world = benchmark.world
    held_out = _shuffled(world.by_split["combo"], "held out")
    pool = _combo_pool(world)
    names, pictures = benchmark.names(pool), benchmark.pictures(pool)
    composed = [i for i in held_out if world.emoji[i].base in world.tones]
    benchmark.add("image_to_name", "image_to_name", "retrieval", "ind", held_out, names)
    benchmark.add("name_to_image", "name_to_image", "retrieval", "ind", held_out, pictures)
    benchmark.add("composed", "composed", "retrieval", "ind", composed, pictures)
    seen = _shuffled(world.named, "seen")
    pool = [*seen[:QUERIES], *_shuffled(seen[QUERIES:] + world.by_split["combo"], "seen pool")][:CANDIDATES]
    names, pictures = benchmark.names(pool), benchmark.pictures(pool)
    benchmark.add("image_to_name_seen", "image_to_name", "retrieval", "seen", seen, names)
    benchmark.add("name_to_image_seen", "name_to_image", "retrieval", "seen", seen, pictures)


def _add_canvases(benchmark: _Benchmark) -> None:
    """Add the sets with new canvases of trained emoji; the instruction of grounding_by_name is never trained."""
    world = benchmark.world
    rng = Random("evaluation/canvases")
    answers = [rng.choice(world.scene) for _ in range(QUERIES)]
    names, pictures = benchmark.names(world.scene), benchmark.pictures(world.scene)
    benchmark.add("vqa", "vqa", "vqa", "ind", answers, names)
    benchmark.add("grounding", "grounding", "grounding", "ind", answers, pictures)
    benchmark.add("grounding_by_name", "grounding_by_name", "grounding", "ood", answers, pictures)


def _add_untrained(benchmark: _Benchmark) -> None:
    """Add the sets with subgroups and instructions that are never trained."""
    world = benchmark.world
    ood = world.by_split["ood"]
    pictures, tones = benchmark.pictures(ood), _texts(list(TONES))
    toned = [i for i in ood if world.emoji[i].tone is not None]
    composed = _shuffled([i for i in toned if world.emoji[i].base in world.tones], "composed_ood")
    benchmark.add("composed_ood", "composed", "retrieval", "ood", composed, pictures)
    all_ood = _shuffled(ood, "image_to_image_ood")
    benchmark.add("image_to_image_ood", "image_to_image", "retrieval", "ood", all_ood, pictures)
    held_out = _shuffled(world.by_split["combo"], "tone")
    benchmark.add("tone_classification", "tone", "classification", "ood", held_out, tones)
    toned = _shuffled(toned, "tone ood")
    benchmark.add("tone_classification_ood", "tone", "classification", "ood", toned, tones)
