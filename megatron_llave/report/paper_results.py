"""What LLaVE's paper reports for the published models. Nothing but numbers.

Precision@1 on MMEB in percent, as on its leaderboard: arXiv 2503.04812, table 1. None: not reported.
"""

MMEB = {
    "0.5b": {"classification": 57.4, "vqa": 50.3, "retrieval": 59.8, "grounding": 82.9, "overall": 59.1},
    "2b": {
        **{"classification": 62.1, "vqa": 60.2, "retrieval": 65.2, "grounding": 84.9, "overall": 65.2},
        **{"ind": 69.4, "ood": 59.8},
    },
    "7b": {
        **{"classification": 65.7, "vqa": 65.4, "retrieval": 70.9, "grounding": 91.9, "overall": 70.3},
        **{"ind": 75.0, "ood": 64.4},
    },
}
"""By preset: meta-task, ind, ood or overall -> mean over its data sets."""

ABLATIONS = {
    "negatives": {
        "own micro batch": {"in distribution": 60.5, "out of distribution": 58.3, "all held out": 59.5},
        "gathered": {"in distribution": 68.6, "out of distribution": 58.4, "all held out": 64.0},
    },
    "hardness": {
        "alpha 0": {"in distribution": 68.6, "out of distribution": 58.4, "all held out": 64.0},
        "alpha 9": {"in distribution": 69.4, "out of distribution": 59.8, "all held out": 65.1},
    },
    "freezing": {
        "nothing frozen": {"in distribution": 60.6, "out of distribution": 56.4, "all held out": 58.7},
        "vision frozen": {"in distribution": 60.5, "out of distribution": 58.3, "all held out": 59.5},
        "projector frozen": {"in distribution": 60.3, "out of distribution": 57.0, "all held out": 58.8},
    },
}
"""Study -> arm -> means over MMEB of the 2B model: table 3."""
ABLATION_NOTES = {
    "negatives": "There with alpha 0 and a frozen tower; 4 pairs per device, 32 gathered.",
    "hardness": "There with a frozen tower and 32 pairs gathered.",
    "freezing": "There with alpha 0 and negatives of the own device alone.",
}
"""Study -> what else those runs had."""
