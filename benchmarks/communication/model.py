"""Models the cost of the loss's collectives from bytes, hops and link speeds. study.py compares it with measurements.

A collective over N ranks is modelled as a ring. In each of N - 1 hops, a rank receives one N-th of all bytes. An
all-reduce needs two such rounds: the first scatters the sums, the second gathers them. The time of a hop is the latency
of a link plus the bytes of the hop divided by the bandwidth of the link. The functions only compute with numbers; they
need no process group. In the formulas, N is the number of ranks, b the number of pairs per rank, and d the embedding
width.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from megatron_llave.config.load import config_from_dict
from megatron_llave.planning.context import H100_NODES, Channel, Links
from megatron_llave.planning.flops import DENSE_TFLOPS, step_flops
from megatron_llave.planning.pair_lengths import mmeb_like
from megatron_llave.planning.plan import count_parameters, mean_work

ROUNDS = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
"""Kind of collective -> the number of rounds in which all bytes travel around the ring."""
FLOAT, COUNT = 4, 8
"""Size in bytes of a float32, and of a row count."""
MODELS = ("0.5b", "2b", "7b")
CLUSTERS = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Sizes of the modelled clusters, in GPUs."""
PAIRS_PER_GPU = (4, 8, 16, 32)
GPU = "H100"
UTILISATION = 0.4
"""Assumed model FLOPs utilisation: the fraction of the GPU's dense bfloat16 peak that the model reaches."""
MAX_TOKENS = 4096
"""Maximum number of tokens of a query or a target, as data.max_length in the paper's recipe."""


@dataclass(frozen=True)
class Collective:
    """One call of a collective."""

    kind: str
    """The kind of the collective, a key of ROUNDS."""
    whole: int
    """Size in bytes of the gathered tensor, or of the tensor on each rank before it is reduced."""

    def received(self, ranks: int) -> int:
        """The number of bytes that each rank receives if the collective is a ring over so many ranks."""
        return ROUNDS[self.kind] * self.whole * (ranks - 1) // ranks


def loss_collectives(pairs: int, dim: int, ranks: int) -> list[Collective]:
    """List the collectives of one loss over N ranks with b pairs each; the list is empty for a single rank.

    The order is that of loss/contrastive.py. The loss is that of the paper, without hard negatives, masking of equal
    targets, hardness from another model, or Matryoshka widths.

    Args:
        pairs: number of pairs per rank, b.
        dim: embedding width, d.
        ranks: number of ranks, N.
    """
    if ranks == 1:
        return []
    floats = FLOAT * ranks * pairs
    return [
        Collective("all_gather", 3 * COUNT * ranks),  # numbers of pairs, targets and hard negatives
        Collective("all_gather", floats * dim),  # targets
        Collective("all_gather", floats),  # cosines of the positives
        Collective("all_reduce", floats),  # largest logit of each column
        Collective("all_reduce", floats),  # sum of exponentials of each column
        Collective("reduce_scatter", floats * dim),  # gradients of the targets
    ]


def reduction_collectives(parameters: int, ranks: int) -> list[Collective]:
    """List the collectives of the distributed optimizer; the list is empty for a single rank.

    A reduce-scatter sums the float32 gradients of the trained parameters, then an all-gather collects the bfloat16
    weights. `parameters` is the number of trained parameters.
    """
    if ranks == 1:
        return []
    return [Collective("reduce_scatter", 4 * parameters), Collective("all_gather", 2 * parameters)]


def received_bytes(collectives: Iterable[Collective], ranks: int) -> int:
    """The number of bytes that each rank receives in all these collectives together."""
    return sum(collective.received(ranks) for collective in collectives)


def ring_seconds(collective: Collective, ranks: int, channel: Channel, slowdown: float = 1.0) -> float:
    """Predict the time of a collective on a ring whose links are all equal.

    Args:
        collective: kind and size.
        ranks: number of ranks in the ring.
        channel: latency and bandwidth of every hop.
        slowdown: factor by which hops take longer; 1 if each rank has its own core or GPU, see `oversubscription`.

    Returns:
        The time in seconds; 0 for a single rank.
    """
    hop = channel.latency + collective.whole / ranks / channel.bandwidth
    return slowdown * ROUNDS[collective.kind] * (ranks - 1) * hop


def oversubscription(ranks: int, cores: int) -> float:
    """The factor by which a hop takes longer if ranks share cores; 1 if there is a core for each rank.

    On the loopback device a hop is entirely CPU work: copying, and waking the next rank. A hop ends when every rank has
    done its part.
    """
    return max(1.0, ranks / cores)


def cluster_seconds(collective: Collective, ranks: int, links: Links) -> float:
    """Predict the time of a collective that runs in two levels, first between the nodes and then within them.

    Between the nodes, the GPUs with the same local index form a ring, and each of these rings carries an equal part of
    the bytes. Then one ring runs within each node. The two levels do not overlap.

    Args:
        collective: kind and size.
        ranks: number of GPUs; if more than a node has, a multiple of the node size.
        links: the links of the cluster.

    Returns:
        The time in seconds; within a single node, that of `ring_seconds`.

    Raises:
        ValueError: the number of GPUs is not a multiple of the node size.
    """
    local = _per_node(ranks, links)
    part = Collective(collective.kind, collective.whole // local)
    return ring_seconds(part, ranks // local, links.between) + ring_seconds(collective, local, links.inside)


def one_ring_seconds(collective: Collective, ranks: int, links: Links) -> float:
    """Predict the time of a collective that runs as a ring through all GPUs, node by node, like NCCL's "Ring".

    There are as many such rings as GPUs per node. Each carries an equal part of the bytes and uses its own network
    adapter. The bandwidth is limited by the adapters or by the links inside a node, whichever are slower. Arguments and
    errors are those of `cluster_seconds`.
    """
    local = _per_node(ranks, links)
    nodes = ranks // local
    latency = (nodes - 1) * links.between.latency + (ranks - nodes) * links.inside.latency
    slowest = min(links.inside.bandwidth, local * links.between.bandwidth) if nodes > 1 else links.inside.bandwidth
    return ROUNDS[collective.kind] * (latency + collective.whole * (ranks - 1) / ranks / slowest)


def _per_node(ranks: int, links: Links) -> int:
    """The number of GPUs in each node that take part in the collective."""
    local = min(ranks, links.node)
    if ranks % local:
        raise ValueError(f"{ranks} GPUs are not a multiple of a node's {links.node}")
    return local


def fit_channels(samples: Sequence[tuple[Collective, float]], ranks: int, slowdown: float) -> dict[str, Channel]:
    """Fit latency and bandwidth of each kind of collective to the measured times of several sizes.

    The fit minimises the squared relative deviations and keeps both values at 0 or above. If a library does not use a
    ring (the reduce-scatter of gloo has several rounds), the fitted values of that kind include the difference.

    Args:
        samples: collectives of at least two sizes per kind, each with its time in seconds.
        ranks: number of ranks of all collectives, at least 2.
        slowdown: see `ring_seconds`.

    Returns:
        Kind of collective -> its channel. The bandwidth is infinite if the size made no difference.
    """
    channels = {}
    for kind in dict.fromkeys(collective.kind for collective, _ in samples):
        timings = [(collective.whole, seconds) for collective, seconds in samples if collective.kind == kind]
        hops = slowdown * ROUNDS[kind] * (ranks - 1)
        seconds = np.array([measured for _, measured in timings])  # [n]
        terms = np.array([[hops, hops * whole / ranks] for whole, _ in timings])  # [n, 2]
        scale = terms.max(axis=0)  # latencies and times per byte differ by orders of magnitude
        (latency, per_byte), _ = nnls(terms / scale / seconds[:, None], np.ones(len(timings)))
        per_byte = float(per_byte / scale[1])
        channels[kind] = Channel(float(latency / scale[0]), 1 / per_byte if per_byte else float("inf"))
    return channels


def local_seconds(
    collectives: Iterable[Collective], ranks: int, channels: Mapping[str, Channel], slowdown: float
) -> float:
    """Predict the time in seconds of collectives that run one after another, with the channels of `fit_channels`."""
    return sum(ring_seconds(collective, ranks, channels[collective.kind], slowdown) for collective in collectives)


@dataclass(frozen=True)
class ClusterStep:
    """A modelled training step on a cluster in which every GPU is a data-parallel rank."""

    model: str
    gpus: int
    pairs: int
    """Number of pairs per GPU."""
    compute_seconds: float
    """Seconds of forward and backward at the assumed utilisation.

    With several micro batches there is a second forward pass, which is not included.
    """
    gather_seconds: float
    """Seconds of the loss's collectives in two levels; none of them overlaps with computation."""
    one_ring_seconds: float
    """Seconds of the loss's collectives if each is a ring through all GPUs."""
    gather_bytes: int
    """Bytes that each GPU receives in the loss's collectives."""
    reduction_seconds: float
    """Seconds of reducing the gradients and gathering the weights, most of which can overlap with computation."""
    reduction_bytes: int
    """Bytes that each GPU receives of gradients and weights."""

    @property
    def share(self) -> float:
        """The fraction of the step spent in the loss's collectives; the reduction of the gradients is left out."""
        return self.gather_seconds / (self.gather_seconds + self.compute_seconds)

    @property
    def one_ring_share(self) -> float:
        """The fraction of the step spent in the loss's collectives if each is a ring through all GPUs."""
        return self.one_ring_seconds / (self.one_ring_seconds + self.compute_seconds)


def cluster_steps(
    links: Links = H100_NODES, flops_per_second: float = DENSE_TFLOPS[GPU] * 1e12, utilisation: float = UTILISATION
) -> list[ClusterStep]:
    """Model a step of each of the paper's models on clusters of all sizes.

    The recipe is the paper's: the vision encoder is frozen, and the pairs are like those of MMEB.

    Args:
        links: the links of the cluster.
        flops_per_second: dense bfloat16 peak of a GPU.
        utilisation: fraction of the peak that the model reaches.
    """
    steps = []
    for name in MODELS:
        recipe = {"preset": name, "precision": "bf16", "freeze": ["vision"]}
        cfg = config_from_dict({"model": recipe, "data": {"max_length": MAX_TOKENS}})
        model, kinds = cfg.model, mmeb_like(cfg)
        counts = count_parameters(model)
        trained = sum(counts.values()) - counts["vision"]
        for gpus in CLUSTERS:
            reduction = reduction_collectives(trained, gpus)
            for pairs in PAIRS_PER_GPU:
                gather = loss_collectives(pairs, model.language.hidden_size, gpus)
                compute = step_flops(model, mean_work(kinds, pairs)) / (flops_per_second * utilisation)
                steps.append(
                    ClusterStep(
                        model=name,
                        gpus=gpus,
                        pairs=pairs,
                        compute_seconds=compute,
                        gather_seconds=sum(cluster_seconds(collective, gpus, links) for collective in gather),
                        one_ring_seconds=sum(one_ring_seconds(collective, gpus, links) for collective in gather),
                        gather_bytes=received_bytes(gather, gpus),
                        reduction_seconds=sum(cluster_seconds(collective, gpus, links) for collective in reduction),
                        reduction_bytes=received_bytes(reduction, gpus),
                    )
                )
    return steps
