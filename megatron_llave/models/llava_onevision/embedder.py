"""The LLaVE model: vision encoder -> projector -> visual tokens among the text -> decoder -> last token -> embedding.

A LlaveEmbedder is one chunk of the pipeline. The first chunk has vision encoder, projector and token embedding; the
last one pools.
"""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_llave.batch import PackedSequences
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.models.blocks.kernels import attention_kernel
from megatron_llave.models.blocks.layer_specs import packed_row
from megatron_llave.models.blocks.pooling import last_token_pool
from megatron_llave.models.blocks.qwen2 import LanguageModel
from megatron_llave.models.blocks.siglip import VisionEncoder
from megatron_llave.models.llava_onevision.projector import build_projector


class LlaveEmbedder(MegatronModule):
    """Maps PackedSequences to embeddings [n, h] float32 of unit length; chunks but the last return hidden states."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        groups: ProcessGroupCollection,
        is_first: bool,
        is_last: bool,
        chunk: int | None = None,
    ) -> None:
        language = LanguageModel(model, parallel, groups, is_first, is_last, chunk)
        super().__init__(config=language.config)
        self.attention = attention_kernel(model)
        self.groups = groups
        self.vision_is_frozen = "vision" in model.freeze
        self.overlap = parallel.overlap
        # Names that megatron-core's schedules, data-parallel wrapper and gradient finalisation look for.
        self.pre_process, self.post_process, self.vp_stage = is_first, is_last, chunk
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        if is_first:
            self.vision = VisionEncoder(model, parallel, groups)
            self.projector = build_projector(model, parallel, groups)
            self.image_newline = torch.nn.Parameter(
                torch.empty(model.language.hidden_size, dtype=language.config.params_dtype)
            )
        self.language = language
        self._freeze(model.freeze)

    def _freeze(self, parts: list[str]) -> None:
        for part in parts:
            if part == "language" or self.pre_process:
                getattr(self, part).requires_grad_(False)
            if part == "projector" and self.pre_process:
                self.image_newline.requires_grad_(False)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the hidden states of the previous pipeline stage; the schedule calls this."""
        self.language.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, sequences: PackedSequences) -> Tensor:
        """Embed the packed sequences. Every pipeline stage gets the same ones and uses what it needs of them.

        A context rank gets its part of the row, and returns the embeddings of all sequences.
        """
        layout = packed_row(sequences.cu_seqlens, sequences.padded_lengths, self.attention, self.groups.cp)
        hidden = None
        if self.pre_process:
            hidden = self.splice(sequences, self.visual_tokens(sequences))  # [t, 1, h]
            if self.config.sequence_parallel:
                hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.groups.tp)
        hidden = self.language(hidden, layout)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # Every tensor-parallel rank pools the same tokens, so the gradient is scattered, not summed.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.groups.tp
            )
        return last_token_pool(hidden, sequences.last_token, self.groups.cp)

    def visual_tokens(self, sequences: PackedSequences) -> Tensor | None:
        """Return projected patch features and newlines in packed order, [v, h]; without images None, or [0, h].

        The base tile and the unpadded grid with a newline after each row (spatial_unpad of the official repository) are
        gathered at once from the features of all tiles; the data pipeline computed the index from the image sizes. Rows
        of an interpolated feature map (anyres_max of the official repository) are blended first and then gathered too.
        A context rank encodes its own tiles, and its visual tokens come from those of all ranks.
        """
        if sequences.num_tiles == 0:
            return self._no_visual_tokens() if self.overlap and torch.is_grad_enabled() else None
        newline = self.image_newline[None]  # before the rest, so that its gradient comes after theirs
        features = sequences.features
        if features is None:
            with torch.no_grad() if self.vision_is_frozen else nullcontext():
                features = self.vision(sequences.tiles, sequences.blank)  # [k, p, vision h]
            if self.vision_is_frozen:
                sequences.features = features
        patches = features.shape[1]
        features = self.projector(features.flatten(0, 1))  # [k * p, h]
        if sequences.context > 1:  # all-gather in forward, reduce-scatter in backward
            features = tensor_parallel.gather_from_sequence_parallel_region(features, group=self.groups.cp)
            features = features[: sequences.num_tiles * patches]
        rows = [features, newline.to(features.dtype)]
        if sequences.blend_source is not None:
            rows.append(blend(features, sequences.blend_source, sequences.blend_weights))
        return torch.cat(rows).index_select(0, sequences.visual_source)  # [k * p + 1 + u, h] -> [v, h]

    def _no_visual_tokens(self) -> Tensor | None:
        """Return [0, h] through whose graph vision encoder, projector and newline get gradients of zero.

        With parallel.overlap, gradients are reduced in the order in which the backward pass computes them. That order
        must be the same on data-parallel ranks whose micro batch has images and on those whose micro batch has none.
        """
        parts = (self.vision, self.projector)
        unused = [self.image_newline, *(parameter for part in parts for parameter in part.parameters())]
        # One graph node per parameter, in the order of the forward pass, which autograd goes through in reverse.
        rows = [NoRows.apply(p, self.config.hidden_size) for p in unused if p.requires_grad]
        return torch.cat(rows) if rows else None

    def splice(self, sequences: PackedSequences, visual: Tensor | None) -> Tensor:
        """Return token embeddings with the visual tokens at their positions, [t, 1, h]."""
        hidden = self.language.embedding(input_ids=sequences.tokens[None], position_ids=None)  # [t, 1, h]
        if visual is None:
            return hidden
        text = hidden.squeeze(1)  # [t, h]
        return text.index_copy(0, sequences.visual_position, visual.to(text.dtype)).unsqueeze(1)


class NoRows(torch.autograd.Function):
    """Returns an empty tensor [0, width] for any parameter, and a gradient of zeros for the parameter."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, width: int) -> Tensor:
        """See the class."""
        ctx.like = parameter.new_empty(()).expand_as(parameter)
        return parameter.new_empty(0, width)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """See the class."""
        return torch.zeros_like(ctx.like, memory_format=torch.contiguous_format), None


def blend(features: Tensor, source: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums [u, h] of four rows of features [k * p, h] each; summed in at least float32.

    source [u, 4] int64 and weights [u, 4] float32. One corner at a time, so that autograd does not keep [u, 4, h].
    """
    corners = (features.index_select(0, rows) * share[:, None] for rows, share in zip(source.T, weights.T))
    return sum(corners).to(features.dtype)
