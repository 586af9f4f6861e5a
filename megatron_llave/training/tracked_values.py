"""What of a step's record the trackers get: numbers and histograms, with the same names in each of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_llave.training.metrics import GRADIENT_NORMS, HISTOGRAM_RANGES

GROUPS = {
    "train": (
        *("learning_rate", *GRADIENT_NORMS, "temperature", "temperature_gradient", "alpha"),
        *("soft_label_loss", "bad_steps"),
    ),
    "similarity": (
        *("positive_similarity", "hardest_negative_similarity"),
        *("similarity_margin", "similarity_auc", "similarity_overlap", "effective_negatives", "hardest_share"),
    ),
    "data": (
        *("pairs", "targets", "hard_negatives", "tokens", "tiles", "squared_lengths", "patch_pairs"),
        *("skipped", "cut", "data_seconds", "negatives_age"),
    ),
    "performance": ("seconds", "save_seconds", "mining_seconds", "tflops", "mfu", "memory_gb"),
}
"""Group -> keys of a record; the name of a scalar is GROUP/KEY. `scalars_of` adds the groups' further scalars."""
GROUP_OF = {key: group for group, keys in GROUPS.items() for key in keys}


def scalars_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Names and values of a step's scalars, the same for every tracker.

    The loss is `loss/all` and `loss/SUBSET`, because its level differs between subsets. A learned temperature is
    `temperature/SUBSET` too. The throughput is `performance/pairs_per_second` and `performance/tokens_per_second`.
    Lists, texts and None are left out; a number without a group gets the group `train`.
    """
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"}
    scalars = {}
    if "loss" in numbers:
        loss = numbers.pop("loss")
        scalars = {"loss/all": loss, **({f"loss/{record['subset']}": loss} if "subset" in record else {})}
    if "temperature_gradient" in numbers and "subset" in record:
        scalars[f"temperature/{record['subset']}"] = numbers["temperature"]
    scalars |= {f"{GROUP_OF.get(key, 'train')}/{key}": value for key, value in numbers.items()}
    for key in ("pairs", "tokens"):
        if key in numbers and numbers.get("seconds", 0) > 0:
            scalars[f"performance/{key}_per_second"] = numbers[key] / numbers["seconds"]
    return scalars


@dataclass(frozen=True)
class Histogram:
    """Counts in equal bins."""

    counts: list[int]
    low: float
    """Lower edge of the first bin."""
    high: float
    """Upper edge of the last bin."""

    @property
    def edges(self) -> np.ndarray:
        """Edges of the n bins, [n + 1] float."""
        return np.linspace(self.low, self.high, len(self.counts) + 1)


def histograms_of(record: Mapping[str, Any]) -> dict[str, Histogram]:
    """Names and values of the histograms of a step that has some, the same for every tracker."""
    found = {key: ends for key, ends in HISTOGRAM_RANGES.items() if key in record}
    return {f"similarity/{key}": Histogram(record[key], *ends) for key, ends in found.items()}
