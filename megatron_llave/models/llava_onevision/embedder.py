"""The LLaVE model: SigLIP, a two-layer projector, the learned image_newline, and Qwen2."""

from collections.abc import Iterable

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.nn import Parameter

from megatron_llave.batch import PackedSequences
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.models.blocks.embedder import Embedder
from megatron_llave.models.blocks.siglip import VisionEncoder
from megatron_llave.models.llava_onevision.projector import build_projector


class LlaveEmbedder(Embedder):
    """Vision encoder -> projector -> visual tokens among the text -> decoder -> last token -> embedding."""

    def add_vision(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """See Embedder."""
        self.vision = VisionEncoder(model, parallel, self.groups)
        self.projector = build_projector(model, parallel, self.groups)
        self.image_newline = Parameter(torch.empty(model.language.hidden_size, dtype=self.config.params_dtype))

    def parameters_of(self, part: str) -> Iterable[Parameter]:
        """See Embedder. image_newline belongs to the projector."""
        newline = [self.image_newline] if part == "projector" and self.pre_process else []
        return [*newline, *getattr(self, part).parameters()]

    def visual_tokens(self, sequences: PackedSequences) -> tuple[Tensor]:
        """Return projected patch features and newlines in packed order, [v, h].

        The base tile and the unpadded grid with a newline after each row (spatial_unpad of the official repository) are
        gathered at once from the features of all tiles; the data pipeline computed the index from the image sizes. Rows
        of an interpolated feature map (anyres_max of the official repository) are blended first and then gathered too.
        A context rank encodes its own tiles, and its visual tokens come from those of all ranks.
        """
        # [k, p, vision h]
        features = self.encoded(sequences, lambda: self.vision(sequences.tiles, sequences.blank))
        newline, patches = self.image_newline[None], features.shape[1]  # in the order of parameters_of
        features = self.projector(features.flatten(0, 1))  # [k * p, h]
        if sequences.context > 1:  # all-gather in forward, reduce-scatter in backward
            features = tensor_parallel.gather_from_sequence_parallel_region(features, group=self.groups.cp)
            features = features[: sequences.num_tiles * patches]
        rows = [features, newline.to(features.dtype)]
        if sequences.blend_source is not None:
            rows.append(blend(features, sequences.blend_source, sequences.blend_weights))
        return (torch.cat(rows).index_select(0, sequences.visual_source),)  # [k * p + 1 + u, h] -> [v, h]


def blend(features: Tensor, source: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums [u, h] of four rows of features [k * p, h] each; summed in at least float32.

    source [u, 4] int64 and weights [u, 4] float32. One corner at a time, so that autograd does not keep [u, 4, h].
    """
    corners = (features.index_select(0, rows) * share[:, None] for rows, share in zip(source.T, weights.T))
    return sum(corners).to(features.dtype)
