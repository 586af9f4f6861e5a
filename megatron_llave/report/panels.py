"""Chooses queries of evaluation sets, and their best candidates, for montage.py to draw."""

from collections.abc import Iterable, Mapping

import numpy as np

from megatron_llave.batch import Side
from megatron_llave.evaluation.task import SetResult
from megatron_llave.report.montage import Panel, Row


def example_panels(
    results: list[SetResult], inputs: Mapping[str, Side], per_set: int = 3, k: int = 5, with_right: bool = False
) -> list[Panel]:
    """Panels with some queries of each set, evenly spread over it, and their k best candidates.

    With the right one, it is the last of the k candidates.
    """
    panels = []
    for result in results:
        count = min(per_set, len(result.queries))
        chosen = [number * len(result.queries) // count for number in range(count)]
        panels.append(_panel(result, inputs, chosen, k, with_right))
    return panels


def mistake_panels(results: list[SetResult], inputs: Mapping[str, Side], per_set: int = 3, k: int = 5) -> list[Panel]:
    """Panels with the worst mistakes of each set: the queries whose best candidate is furthest ahead of the right one.

    A set without mistakes has no panel. The last of the k candidates is the right one.
    """
    panels = []
    for result in results:
        margins = np.subtract(result.hardest_negative, result.positive)
        worst = [number for number in np.argsort(-margins, kind="stable")[:per_set].tolist() if margins[number] > 0]
        if worst:
            panels.append(_panel(result, inputs, worst, k, with_right=True))
    return panels


def _panel(
    result: SetResult, inputs: Mapping[str, Side], queries: Iterable[int], k: int, with_right: bool = False
) -> Panel:
    shown = k - 1 if with_right else k
    score = f"Precision@1 {result.precision_at_1:.1f} % (chance {result.chance:.3g} %)"
    rows = []
    for query in queries:
        right = result.positives[query]
        best = (result.top[query] + [-1] * shown)[:shown] + [right] * with_right
        all_right = {right, *(result.further[query] if result.further else ())}
        candidates = [(inputs[result.candidates[index]], index in all_right) if index >= 0 else None for index in best]
        rows.append(Row(inputs[result.queries[query]], candidates))
    headings = (*map(str, range(1, shown + 1)), *["right"] * with_right)
    return Panel(result.name, f"{result.meta_task}, {result.split}, {score}", rows, headings)
