"""What the loss's collectives cost, by formula: bytes, hops and link speeds. study.py compares it with measurements.

A collective of N ranks is a ring: N - 1 hops, in each of which a rank receives one N-th of the whole; an all-reduce is
two such rounds, one that scatters the sums and one that gathers them. A hop takes the latency of a link and its share
of the bytes over the link's bandwidth. Pure functions of numbers; no process group is needed.
Shapes: N ranks, b pairs of a rank, d width of the embedding.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from megatron_llave.config.load import config_from_dict
from megatron_llave.planning.flops import DENSE_TFLOPS, step_flops
from megatron_llave.planning.pair_lengths import mmeb_like
from megatron_llave.planning.plan import NODE, count_parameters, mean_work

ROUNDS = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
"""Kind of collective -> times that the whole goes around the ring."""
FLOAT, COUNT = 4, 8
"""Bytes of a float32, and of a number of rows."""
MODELS = ("0.5b", "2b", "7b")
CLUSTERS = (8, 16, 32, 64, 128, 256, 512, 1024)
"""GPUs."""
PAIRS_PER_GPU = (4, 8, 16, 32)
GPU = "H100"
UTILISATION = 0.4
"""Assumed share of the GPU's dense bfloat16 FLOP/s that the model's FLOPs get."""
MAX_TOKENS = 4096
"""Of a side: data.max_length of the recipe."""


@dataclass(frozen=True)
class Collective:
    """One call of a collective."""

    kind: str
    """Of ROUNDS."""
    whole: int
    """Bytes that all ranks' parts have together: what is gathered, or what each rank has before it is summed."""

    def received(self, ranks: int) -> int:
        """Bytes that a rank receives in a ring."""
        return ROUNDS[self.kind] * self.whole * (ranks - 1) // ranks


@dataclass(frozen=True)
class Channel:
    """What a hop of a ring goes through."""

    latency: float
    """Seconds per hop."""
    bandwidth: float
    """Bytes per second that a rank receives."""


@dataclass(frozen=True)
class Links:
    """The links of a cluster of equal nodes."""

    inside: Channel
    """Between the GPUs of a node."""
    between: Channel
    """Between nodes, for each GPU: it has a network adapter of its own."""
    node: int = NODE
    """GPUs of a node."""


H100_NODES = Links(inside=Channel(3.4e-6, 450e9), between=Channel(14.0e-6, 50e9))
"""Nominal, by the vendor. NVLink 4: 900 GB/s of a GPU, both directions together (NVIDIA's H100 data sheet). One
ConnectX-7 of 400 Gb/s per GPU (NVIDIA's DGX H100 user guide). Latency of a ring's hop: what NCCL tunes itself by, for
the protocol Simple (hwLat in NCCL's src/graph/tuning.cc)."""


def loss_collectives(pairs: int, dim: int, ranks: int) -> list[Collective]:
    """Those of one loss over b pairs of each of N ranks, in the order of loss/contrastive.py; none for a single rank.

    Of the paper's loss: no hard negatives, no ids to mask by, no other model's cosines, one width.
    """
    if ranks == 1:
        return []
    floats = FLOAT * ranks * pairs
    return [
        Collective("all_gather", 2 * COUNT * ranks),  # rows: pairs, and hard negatives
        Collective("all_gather", floats * dim),  # targets
        Collective("all_gather", floats),  # cosines of the positives
        Collective("all_reduce", floats),  # largest logit of each column
        Collective("all_reduce", floats),  # sums of exponentials below it
        Collective("reduce_scatter", floats * dim),  # gradients of the targets
    ]


def reduction_collectives(parameters: int, ranks: int) -> list[Collective]:
    """Of the distributed optimizer: float32 gradients of what is trained are summed, then bfloat16 weights gathered."""
    if ranks == 1:
        return []
    return [Collective("reduce_scatter", 4 * parameters), Collective("all_gather", 2 * parameters)]


def received_bytes(collectives: Iterable[Collective], ranks: int) -> int:
    """Bytes that a rank receives in all of them."""
    return sum(one.received(ranks) for one in collectives)


def ring_seconds(one: Collective, ranks: int, channel: Channel, slowdown: float = 1.0) -> float:
    """Of one collective over a ring of equal links.

    Args:
        one: the collective.
        ranks: N.
        channel: of every hop.
        slowdown: 1 where each rank has a core or a GPU of its own, see `oversubscription`.

    Returns:
        Seconds; 0 for a single rank.
    """
    hop = channel.latency + one.whole / ranks / channel.bandwidth
    return slowdown * ROUNDS[one.kind] * (ranks - 1) * hop


def oversubscription(ranks: int, cores: int) -> float:
    """How many times longer a hop takes where ranks share cores; 1 with a core for each.

    On loopback all of a hop is work of the CPU, for copies and for waking the next rank, and a hop is over when every
    rank has done its part.
    """
    return max(1.0, ranks / cores)


def cluster_seconds(one: Collective, ranks: int, links: Links) -> float:
    """Of one collective over nodes in two levels: rings between GPUs of one place in their nodes, each for its part of
    the whole, and rings within the nodes; one after the other.

    Args:
        one: the collective.
        ranks: GPUs; beyond a node a multiple of its size.
        links: the cluster's.

    Returns:
        Seconds; within a node those of `ring_seconds`.

    Raises:
        ValueError: the last node would not be full.
    """
    local = _per_node(ranks, links)
    part = Collective(one.kind, one.whole // local)
    return ring_seconds(part, ranks // local, links.between) + ring_seconds(one, local, links.inside)


def one_ring_seconds(one: Collective, ranks: int, links: Links) -> float:
    """Of one collective over a ring through all GPUs, node by node, as NCCL's "Ring": all hops follow each other.

    There are as many such rings as GPUs in a node, each with its part of the bytes and an adapter of its own; the
    slower of adapters and inner links sets the pace. Arguments and errors as of `cluster_seconds`.
    """
    local = _per_node(ranks, links)
    nodes = ranks // local
    latency = (nodes - 1) * links.between.latency + (ranks - nodes) * links.inside.latency
    slowest = min(links.inside.bandwidth, local * links.between.bandwidth) if nodes > 1 else links.inside.bandwidth
    return ROUNDS[one.kind] * (latency + one.whole * (ranks - 1) / ranks / slowest)


def _per_node(ranks: int, links: Links) -> int:
    """GPUs of the collective in each node."""
    local = min(ranks, links.node)
    if ranks % local:
        raise ValueError(f"{ranks} GPUs are not a multiple of a node's {links.node}")
    return local


def fit_channels(samples: Sequence[tuple[Collective, float]], ranks: int, slowdown: float) -> dict[str, Channel]:
    """Latency and bandwidth of each kind of collective, from how long those of several sizes took.

    Least squares of the relative deviations, none of both below 0. What a library does that is no ring (gloo's
    reduce-scatter is one of several rounds) is in the numbers of its kind.

    Args:
        samples: collectives of at least two sizes per kind, and seconds of each.
        ranks: N of all of them, at least 2.
        slowdown: see `ring_seconds`.

    Returns:
        By kind. The bandwidth is infinite where the size made no difference.
    """
    channels = {}
    for kind in dict.fromkeys(one.kind for one, _ in samples):
        own = [(one.whole, seconds) for one, seconds in samples if one.kind == kind]
        hops = slowdown * ROUNDS[kind] * (ranks - 1)
        seconds = np.array([found for _, found in own])  # [n]
        terms = np.array([[hops, hops * whole / ranks] for whole, _ in own])  # [n, 2]
        scale = terms.max(axis=0)  # seconds and seconds per byte are far apart
        (latency, per_byte), _ = nnls(terms / scale / seconds[:, None], np.ones(len(own)))
        per_byte = float(per_byte / scale[1])
        channels[kind] = Channel(float(latency / scale[0]), 1 / per_byte if per_byte else float("inf"))
    return channels


def local_seconds(
    collectives: Iterable[Collective], ranks: int, channels: Mapping[str, Channel], slowdown: float
) -> float:
    """Of all of them, one after the other, over the channels that `fit_channels` found."""
    return sum(ring_seconds(one, ranks, channels[one.kind], slowdown) for one in collectives)


@dataclass(frozen=True)
class ClusterStep:
    """A modelled step; every GPU is a data-parallel rank."""

    model: str
    gpus: int
    pairs: int
    """Of a GPU."""
    compute_seconds: float
    """Forward and backward at the assumed utilisation; a second forward, for several micro batches, is not in it."""
    gather_seconds: float
    """The loss's collectives, none of them hidden behind computing."""
    one_ring_seconds: float
    """The same, each as one ring through all GPUs."""
    gather_bytes: int
    """Received by a GPU."""
    reduction_seconds: float
    """Gradients and weights, of which most can be hidden behind computing."""
    reduction_bytes: int
    """Received by a GPU."""

    @property
    def share(self) -> float:
        """Of the gather in gather and computing together; the reduction is left out."""
        return self.gather_seconds / (self.gather_seconds + self.compute_seconds)

    @property
    def one_ring_share(self) -> float:
        """The same with one ring through all GPUs."""
        return self.one_ring_seconds / (self.one_ring_seconds + self.compute_seconds)


def cluster_steps(
    links: Links = H100_NODES, flops_per_second: float = DENSE_TFLOPS[GPU] * 1e12, utilisation: float = UTILISATION
) -> list[ClusterStep]:
    """Steps of the paper's models with its recipe (frozen tower, pairs like MMEB's) on clusters of all sizes.

    Args:
        links: of the cluster.
        flops_per_second: of a GPU, dense bfloat16.
        utilisation: share of them that is had.
    """
    found = []
    for name in MODELS:
        recipe = {"preset": name, "precision": "bf16", "freeze": ["vision"]}
        model = config_from_dict({"model": recipe}).model
        kinds = mmeb_like(model, MAX_TOKENS)
        counts = count_parameters(model)
        trained = sum(counts.values()) - counts["vision"]
        for gpus in CLUSTERS:
            reduction = reduction_collectives(trained, gpus)
            for pairs in PAIRS_PER_GPU:
                gather = loss_collectives(pairs, model.language.hidden_size, gpus)
                compute = step_flops(model, mean_work(kinds, pairs)) / (flops_per_second * utilisation)
                found.append(
                    ClusterStep(
                        model=name,
                        gpus=gpus,
                        pairs=pairs,
                        compute_seconds=compute,
                        gather_seconds=sum(cluster_seconds(one, gpus, links) for one in gather),
                        one_ring_seconds=sum(one_ring_seconds(one, gpus, links) for one in gather),
                        gather_bytes=received_bytes(gather, gpus),
                        reduction_seconds=sum(cluster_seconds(one, gpus, links) for one in reduction),
                        reduction_bytes=received_bytes(reduction, gpus),
                    )
                )
    return found
