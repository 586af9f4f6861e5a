"""Ablations of the LLaVE paper, for the study's write-ups. Nothing but numbers.

Mean Precision@1 on MMEB in percent; evaluation/benchmarks/mmeb.py has the means of the published models.
"""

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
"""Study -> variant -> means over MMEB of the 2B model (arXiv 2503.04812, table 3)."""
ABLATION_NOTES = {
    "negatives": "There with alpha 0 and a frozen vision encoder; 4 pairs per device, 32 gathered.",
    "hardness": "There with a frozen vision encoder and 32 pairs gathered.",
    "freezing": "There with alpha 0 and negatives of the own device alone.",
}
"""Study -> the other settings of those runs."""
