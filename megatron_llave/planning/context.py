"""From which length of a pair context parallelism saves time: what a decoder layer computes against what it sends.

Compared are the forward and backward pass of one micro batch of one pair, in one decoder layer. In seconds, for t
tokens whose sequences have the squared lengths s, on c context ranks and T tensor-parallel ranks:

    forward       F = (f t + 2 q s) / (T P)        f t + 2 q s: FLOPs of the layer (flops.decoder_flops)
    communication C = 2 (c - 1) (L + 2 k e t / (c T B))

C is the gather of keys and values, and the reduce-scatter of their gradients, as rings of c - 1 hops. P are the FLOP/s
of a GPU, L and B the latency in seconds and the bytes/s of a hop, q and k the widths of all query and of all key heads,
e the bytes of an activation. The backward computes twice as much as the forward.
"""

from bisect import bisect_left
from dataclasses import dataclass

from megatron_llave.config.schema import RunConfig
from megatron_llave.models.vision_cost import element
from megatron_llave.planning.flops import DENSE_TFLOPS, FP8_OVER_BF16, decoder_flops
from megatron_llave.planning.memory import head_widths
from megatron_llave.planning.pair_lengths import Kind, scaled_longest
from megatron_llave.planning.plan import LONGEST, NODE


@dataclass(frozen=True)
class Channel:
    """The latency and bandwidth of a hop of a ring."""

    latency: float
    """Latency of a hop in seconds."""
    bandwidth: float
    """Bandwidth in bytes per second, counting what one rank receives."""


@dataclass(frozen=True)
class Links:
    """The links of a cluster of equal nodes."""

    inside: Channel
    """The link between two GPUs of the same node."""
    between: Channel
    """The link between nodes for each GPU; every GPU has its own network adapter."""
    node: int = NODE
    """Number of GPUs per node."""


H100_NODES = Links(inside=Channel(3.4e-6, 450e9), between=Channel(14.0e-6, 50e9))
"""Nominal figures of the vendor. NVLink 4 has 900 GB/s per GPU, both directions together (NVIDIA's H100 data sheet).
There is one ConnectX-7 adapter of 400 Gb/s per GPU (NVIDIA's DGX H100 user guide). The latencies of a ring's hop are
those with which NCCL tunes itself for the protocol Simple (hwLat in NCCL's src/graph/tuning.cc)."""


def layer_seconds(cfg: RunConfig, tokens: int, squared_lengths: int, links: Links = H100_NODES) -> tuple[float, float]:
    """Return F and C of the module's docstring for H100 GPUs, with cfg.parallel.context ranks.

    Args:
        cfg: configuration of the run, with the sizes of its model.
        tokens: t, of the pair.
        squared_lengths: s, of its sequences.
        links: of the cluster. Hops are between nodes if a node has fewer GPUs than a pair has tensor- and
            context-parallel ranks.
    """
    model, context, tensor = cfg.model, cfg.parallel.context, cfg.parallel.tensor
    flops = decoder_flops(model.language, tokens, squared_lengths) / model.language.num_layers
    peak = DENSE_TFLOPS["H100"] * 1e12 * (FP8_OVER_BF16 if model.precision == "fp8" else 1)
    hop = links.inside if tensor * context <= links.node else links.between
    gathered = 2 * head_widths(model)[1] * element(model) * tokens / tensor
    return flops / tensor / peak, 2 * (context - 1) * (hop.latency + gathered / context / hop.bandwidth)


def shortest_pairs(cfg: RunConfig, kinds: list[Kind]) -> tuple[int, int]:
    """Return from how many tokens of a pair on the cfg.parallel.context ranks, at least 2, save time.

    The pair is in the proportion of the longest one of these kinds.

    Returns:
        For the time of a pair, against one rank: 3 F (1 - 1 / c) > C. For the time of all GPUs together, against
        data-parallel ranks that recompute the layer: F > c C.
    """
    context = cfg.parallel.context

    def seconds(tokens: int) -> tuple[float, float]:
        lengths = [side.tokens for side in scaled_longest(kinds, tokens)]
        return layer_seconds(cfg, sum(lengths), sum(length**2 for length in lengths))

    def is_faster(tokens: int) -> bool:
        forward, communication = seconds(tokens)
        return 3 * forward * (1 - 1 / context) > communication

    def is_cheaper(tokens: int) -> bool:
        forward, communication = seconds(tokens)
        return forward > context * communication

    return tuple(1 + bisect_left(range(1, LONGEST), True, key=key) for key in (is_faster, is_cheaper))
