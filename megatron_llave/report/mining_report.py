"""The report of mined negatives: one HTML page, made from their folder and its shards, without embedding anything.

Of the shards and of the contents of the negatives, only what is shown is read. docs/mining.md says what is in the page.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llave.batch import Side
from megatron_llave.config.mining import Rules
from megatron_llave.data.index import Shard, read_index
from megatron_llave.data.mined_negatives import MANIFEST_FILE, REPORT_FILE, parse_manifest, require_fits
from megatron_llave.data.shard_reader import ShardReader
from megatron_llave.data.shards import NEGATIVES, unpack_json, unpack_list, unpack_pair
from megatron_llave.data.storage import Storage
from megatron_llave.errors import DataError
from megatron_llave.files import read_json, write_text
from megatron_llave.report.html_page import Section, html_page
from megatron_llave.report.mining_cards import STYLE, card, common_text, histogram, row_of_cards, table

EXAMPLES, IN_ALL = 20, 400
"""Examples of a subset, and of all subsets together; each subset has at least one."""
NEGATIVES_SHOWN = 8
"""Negatives of an example that are shown."""
DIGITS = 4
"""Decimal places of the similarities in the files, and so of what is computed from them."""
LOW_RECALL = 0.95
"""Recall of an approximate search below which more is advised."""
MOST_USED = 8
"""Targets that are shown as the most used ones."""
WHAT_TO_DO = (
    "Look at the examples first: they begin with the negatives that are nearest to what the rules leave out. Where "
    "such a negative is a right answer too, lower --ratio, raise --margin, or leave out the first candidates by "
    "--skip; where negatives are unlike their query, or a query has too few, raise --ratio or --depth. Where a few "
    "targets are the negatives of very many queries, set --max-uses. Mining with other rules embeds nothing again."
)
EMPTIED = {
    "no_candidates": "no candidates: all targets of the subset are right answers",
    "max_uses": "all candidates that passed were used up (--max-uses)",
    "votes": "too few models agree (--votes)",
}
"""Why a query has no negatives, where it is no rule about similarities or ranks."""


@dataclass
class Found:
    """What the files of a subset say of its queries with negatives, without any contents."""

    places: list[tuple[int, str]] = field(default_factory=list)
    """Shard and key of the first pair of each query, in the order of the shards."""
    room: list[float] = field(default_factory=list)
    """How far the query's most similar negative lies below the limit."""
    uses: dict[str, list[int]] = field(default_factory=dict)
    """Target id -> number of queries that it is a negative of; then number of the first of them, and place there."""


def write_mining_report(out: Path, data: Path) -> Path:
    """Write the page into a complete folder of mined negatives, and return its name; equal folders give equal bytes.

    Args:
        out: the folder.
        data: the local folder of shards.

    Raises:
        DataError: the folder is not complete, is of other shards, or cannot be read or written.
    """
    path = out / MANIFEST_FILE
    parsed, manifest, index = parse_manifest(path, str(path)), read_json(path), read_index(data)
    require_fits(parsed, index, sorted(parsed.subsets), str(path))
    stores = (ShardReader(Storage(str(data), None), 1), ShardReader(Storage(str(out), None), 1))
    number = min(EXAMPLES, max(1, IN_ALL // max(1, len(parsed.subsets))))
    try:
        rules = Rules(**manifest["rules"])
        sections = [
            Section("What to do", WHAT_TO_DO),
            Section("Subsets", "", *_overview(manifest["subsets"])),
        ]
        for name, mined in parsed.subsets.items():
            files = (index.subsets[name].shards, [one.shard for one in mined])
            found = scan(stores[1], files[1], rules)
            inner = _numbers(manifest, manifest["subsets"][name], rules)
            inner += _most_used(found, files[1], stores[1])
            inner += _examples(found, files, stores, choose(found.room, number), rules)
            sections.append(Section(name, inner=inner))
        sections.append(Section("Models and rules", inner=table(("what", "value"), about(manifest))))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path} is malformed ({type(error).__name__}: {error}); mine again") from error
    models = ", ".join(manifest["checkpoints"])
    page = html_page("Mined negatives", f"Mined by {models}.", sections, STYLE)
    try:
        write_text(out / REPORT_FILE, page)
    except OSError as error:
        raise DataError(f"{out / REPORT_FILE} cannot be written: {error.strerror or error}") from error
    return out / REPORT_FILE


def limit(positives: Mapping[str, float] | None, rules: Rules) -> float:
    """The similarity at which the rules begin to leave out candidates of a query; without such a rule, its positive's.

    Args:
        positives: "least", "mean" and "most"; None: unknown, as in negatives of earlier versions, which gives 1.
        rules: of the mining.
    """
    if positives is None:
        return 1.0
    least, mean = positives["least"], positives["mean"]
    limits = [least - (1 - rules.ratio) * abs(least)] if rules.ratio is not None else []
    limits += [least - rules.margin] if rules.margin is not None else []
    limits += [mean - rules.mean_margin] if rules.mean_margin is not None else []
    limits += [rules.ceiling] if rules.ceiling is not None else []
    return min(limits, default=least)


def scan(reader: ShardReader, files: Sequence[Shard], rules: Rules) -> Found:
    """Go through the files of a subset once, reading no images."""
    found, seen = Found(), set()
    for shard, key, described in _described(reader, files):
        if described["query"] in seen or not described[NEGATIVES]:
            continue
        seen.add(described["query"])
        of_query = described[NEGATIVES]
        nearest = max(entry["similarity"] for entry in of_query)
        found.room.append(round(limit(described.get("positives"), rules) - nearest, DIGITS))
        for place, entry in enumerate(of_query):
            found.uses.setdefault(entry["id"], [0, len(found.places), place])[0] += 1
        found.places.append((shard, key))
    return found


def _described(reader: ShardReader, files: Sequence[Shard]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    for number, shard in enumerate(files):
        for sample, key in enumerate(reader.keys(shard)):
            yield number, key, reader.describe(shard, sample)[0]


def choose(room: Sequence[float], number: int) -> list[int]:
    """Numbers of at most `number` queries: half of them the nearest to the limit, then some evenly over the others.

    The nearest come first; equal ones in the order of the shards.
    """
    order = np.argsort(np.array(room), kind="stable").tolist()
    nearest, others = order[: (number + 1) // 2], order[(number + 1) // 2 :]
    more = min(number - len(nearest), len(others))
    return nearest + [others[(2 * i + 1) * len(others) // (2 * more)] for i in range(more)]


def _overview(subsets: Mapping[str, Any]) -> tuple[Sequence[str], list[Sequence[str]]]:
    columns = ("subset", "pairs", "queries", "with negatives", "dropped", "without", "targets", "negatives per query")
    rows = []
    for name, counts in subsets.items():
        dropped, without = counts["queries_dropped"], counts["queries_without_negatives"]
        some = counts["queries"] - dropped - without
        numbers = (counts["pairs"], counts["queries"], some, dropped, without, counts["targets"])
        rows.append((name, *(f"{number:,}" for number in numbers), f"{counts['kept'] / max(some, 1):.2f}"))
    return columns, rows


def _numbers(manifest: Mapping[str, Any], counts: Mapping[str, Any], rules: Rules) -> str:
    """The histogram, the queries, and what the rules did."""
    queries, dropped = counts["queries"], counts["queries_dropped"]
    without = counts["queries_without_negatives"]
    rows = [("with negatives", queries - dropped - without)]
    rows += [(f"dropped: no positive above --min-positive {rules.min_positive}", dropped)] if dropped else []
    for rule, number in sorted(counts.get("emptied_by", {}).items(), key=lambda item: -item[1]):
        why = EMPTIED.get(rule, f"the last candidates were left out by {_flag(rule)}")
        rows.append((f"without: {why}", number))
    rows += [("without negatives", without)] if without and "emptied_by" not in counts else []
    shown = [(f"{number:,}", _percent(number, queries), what) for what, number in rows]
    if counts["pairs_not_embedded"]:
        lost = counts["pairs_not_embedded"]
        shown.append((f"{lost:,} pairs", _percent(lost, counts["pairs"]), "cannot be embedded, and get no negatives"))
    parts = [f"<p>{escape(line)}</p>" for line in said_of_recall(manifest, counts)]
    parts += ["<h3>Similarities</h3>", histogram(counts["similarity"])]
    parts += ["<h3>Queries</h3>", table(("queries", "share", "what"), shown)]
    models = counts["models"]
    names = manifest["checkpoints"] if len(models) > 1 else ["candidates left out"]
    of_rules = []
    for rule in (name for name in models[0] if name not in ("candidates", "kept")):
        setting = getattr(rules, rule)
        if setting is not None and (setting or any(model[rule] for model in models)):
            left_out = (f"{model[rule]:,} ({_percent(model[rule], model['candidates'])})" for model in models)
            of_rules.append((f"{_flag(rule)} {setting:g}", *left_out))
    kept = (f"{model['kept']:,} ({_percent(model['kept'], model['candidates'])})" for model in models)
    of_rules.append(("kept by these rules", *kept))
    parts += ["<h3>Rules</h3>", table(("rule", *names), of_rules)]
    together = [(f"{_flag(rule)} {getattr(rules, rule)}", n) for rule, n in counts["left_out_together"].items() if n]
    if together:
        parts.append(table(("of those", "left out"), [(what, f"{number:,}") for what, number in together]))
    return "".join(parts)


def _most_used(found: Found, files: Sequence[Shard], reader: ShardReader) -> str:
    """The targets that most queries have as a negative."""
    if not found.uses:
        return ""
    of_all = sum(uses for uses, _, _ in found.uses.values())
    most = sorted(found.uses.items(), key=lambda item: (-item[1][0], item[1][1:]))[:MOST_USED]
    sides = []
    for _, (_, query, place) in most:
        shard, key = found.places[query]
        sides.append(_negatives(reader, files[shard], key)[0][place])
    unsaid = common_text(sides)
    cards = [card("used", f"of {uses:,} queries", "", side, unsaid) for (_, (uses, _, _)), side in zip(most, sides)]
    share = _percent(sum(uses for _, (uses, _, _) in most), of_all)
    note = f"{of_all:,} negatives are {len(found.uses):,} different targets; these {len(most)} are {share} of all uses."
    return "<h3>Most used negatives</h3>" + row_of_cards(note, cards)


def _negatives(reader: ShardReader, shard: Shard, key: str) -> tuple[list[Side], dict[str, Any]]:
    """The mined negatives of a pair, and what the JSON says of them."""
    members, where = reader.members(shard, key)
    described = unpack_json(members, where)
    return unpack_list(NEGATIVES, "hard negative", described, members, where)[0], described


def _examples(
    found: Found,
    files: tuple[Sequence[Shard], Sequence[Shard]],
    stores: tuple[ShardReader, ShardReader],
    chosen: Sequence[int],
    rules: Rules,
) -> str:
    """A row for each of the chosen queries: the query, a positive and its negatives."""
    if not chosen:
        return "<p>No query has negatives.</p>"
    rows = ["<h3>Examples: the most suspicious first, then evenly over the rest</h3>"]
    for query in chosen:
        shard, key = found.places[query]
        pair = unpack_pair(*stores[0].members(files[0][shard], key))
        negatives, described = _negatives(stores[1], files[1][shard], key)
        positives, entries = described.get("positives"), described[NEGATIVES]
        room, at = found.room[query], limit(positives, rules)
        beside = f"{abs(room):.4f} {'below' if room > 0 else 'above'}"  # above: by another model than the first
        beside = "just below" if abs(room) <= 0.1**DIGITS else beside  # both are rounded
        note = f"The nearest negative is {beside} the limit of {at:.4f}."
        unsaid = common_text([*pair.targets, *negatives])
        of_positive = "" if positives is None else _range(positives)
        caption = "positive" if len(pair.targets) == 1 else f"positive (+{len(pair.targets) - 1})"
        cards = [card("query", "query", "", pair.query), card("right", caption, of_positive, pair.targets[0], unsaid)]
        shown = list(zip(negatives, entries))[:NEGATIVES_SHOWN]
        cards += [
            card("negative", f"negative {number}", f"{entry['similarity']:.4f}", side, unsaid)
            for number, (side, entry) in enumerate(shown, start=1)
        ]
        rows.append(row_of_cards(note, cards))
    return "".join(rows)


def _range(positives: Mapping[str, float]) -> str:
    least, most = positives["least"], positives["most"]
    return f"{least:.4f}" if least == most else f"{least:.4f} to {most:.4f}"


def about(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What negatives.json or order.json says of models, rules and data, as (what, value)."""
    rows = []
    for name, model in zip(manifest["checkpoints"], manifest["models"]):
        rows += [("model", name), *((f"its {key.replace('_', ' ')}", str(value)) for key, value in model.items())]
    rules = (f"{_flag(name)} {'none' if value is None else value}" for name, value in manifest["rules"].items())
    search = manifest.get("search")  # not in files of earlier versions, which were exact
    kind = "exact" if search is None else f"--search {search['kind']} --probes {search['probes']}, approximate"
    return [
        *rows,
        ("rules", " ".join(rules)),
        ("search", kind),
        ("data, SHA-256 of the index", manifest["data"]["sha256"]),
    ]


def said_of_recall(manifest: Mapping[str, Any], counts: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each model whose search of a subset was approximate, from negatives.json or order.json."""
    for name, recall in zip(manifest["checkpoints"], counts.get("recall", [])):
        hint = "" if recall >= LOW_RECALL else "; that is low: raise --probes, or use --search exact"
        yield f"{name}: the approximate search finds {100 * recall:.1f} % of a query's nearest targets{hint}"


def _flag(rule: str) -> str:
    return f"--{rule.replace('_', '-')}"


def _percent(number: int, of: int) -> str:
    return f"{100 * number / max(of, 1):.1f} %"
