"""What the embedders of all families have in common: visual tokens among the text -> decoder -> pooled last token.

An Embedder is one chunk of the pipeline. The first chunk has vision encoder, projector and token embedding; the last
one pools.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import Parameter

from megatron_llave.batch import PackedSequences
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.models.blocks.kernels import attention_kernel
from megatron_llave.models.blocks.layer_specs import packed_row
from megatron_llave.models.blocks.pooling import last_token_pool
from megatron_llave.models.blocks.qwen2 import DecoderKind, LanguageModel


class Embedder(MegatronModule):
    """Maps PackedSequences to embeddings [n, h] float32 of unit length; chunks but the last return hidden states.

    A family gives `add_vision`, which makes the parts before the decoder, and `visual_tokens`.
    """

    decoder_kind = DecoderKind()

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        groups: ProcessGroupCollection,
        is_first: bool,
        is_last: bool,
        chunk: int | None = None,
    ) -> None:
        language = LanguageModel(model, parallel, groups, is_first, is_last, chunk, self.decoder_kind)
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
            self.add_vision(model, parallel)
        self.language = language
        for part in model.freeze:
            if part == "language" or is_first:
                for parameter in self.parameters_of(part):
                    parameter.requires_grad_(False)

    def add_vision(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Make the modules `vision` and `projector`, and what else stands before the decoder, on the first chunk."""
        raise NotImplementedError

    def visual_tokens(self, sequences: PackedSequences) -> tuple[Tensor, ...]:
        """Return the visual tokens in packed order, [v, h], and the same for each decoder layer that adds features.

        `sequences.num_tiles` is at least 1.
        """
        raise NotImplementedError

    def encoded(self, sequences: PackedSequences, encode: Callable[[], Tensor]) -> Tensor:
        """Return the features of the images; a frozen vision encoder runs once per step, and not in both passes."""
        features = sequences.features
        if features is None:
            with torch.no_grad() if self.vision_is_frozen else nullcontext():
                features = encode()
            if self.vision_is_frozen:
                sequences.features = features
        return features

    def parameters_of(self, part: str) -> Iterable[Parameter]:
        """Return the parameters of a part, one of config.model.PARTS."""
        return getattr(self, part).parameters()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the hidden states of the previous pipeline stage; the schedule calls this."""
        self.language.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, sequences: PackedSequences) -> Tensor:
        """Embed the packed sequences. Every pipeline stage gets the same ones and uses what it needs of them.

        A context rank gets its part of the row, and returns the embeddings of all sequences.
        """
        layout = packed_row(
            sequences.cu_seqlens, sequences.padded_lengths, self.attention, self.groups.cp, sequences.positions
        )
        hidden = deepstack = None
        if self.pre_process:
            hidden, deepstack = self.inputs(sequences)
        hidden = self.language(hidden, layout, deepstack)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # Every tensor-parallel rank pools the same tokens, so the gradient is scattered, not summed.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.groups.tp
            )
        return last_token_pool(hidden, sequences.last_token, self.groups.cp)

    def inputs(self, sequences: PackedSequences) -> tuple[Tensor, Tensor | None]:
        """Return the decoder's inputs [t, 1, h], and what its first d layers add [d * t, 1, h], or None.

        With sequence parallel these are the rows of this tensor-parallel rank.
        """
        visual: tuple[Tensor, ...] = ()
        if sequences.num_tiles > 0:
            visual = self.visual_tokens(sequences)
        elif self.overlap and torch.is_grad_enabled():
            visual = self.no_visual_tokens()
        hidden = self.language.embedding(input_ids=sequences.tokens[None], position_ids=None)  # [t, 1, h]
        place = sequences.visual_position
        deepstack = [self._scattered(splice(torch.zeros_like(hidden), features, place)) for features in visual[1:]]
        hidden = self._scattered(splice(hidden, visual[0], place) if visual else hidden)
        return hidden, torch.cat(deepstack) if deepstack else None

    def _scattered(self, hidden: Tensor) -> Tensor:
        """[t, 1, h] -> the rows of this tensor-parallel rank, with sequence parallel."""
        if not self.config.sequence_parallel:
            return hidden
        return tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.groups.tp)

    def no_visual_tokens(self) -> tuple[Tensor, ...]:
        """Return [0, h] through whose graph all parts before the decoder get gradients of zero.

        With parallel.overlap, gradients are reduced in the order in which the backward pass computes them. That order
        must be the same on data-parallel ranks whose micro batch has images and on those whose micro batch has none.
        """
        # One graph node per parameter, in the order of the forward pass, which autograd goes through in reverse.
        unused = [parameter for part in ("vision", "projector") for parameter in self.parameters_of(part)]
        rows = [NoRows.apply(p, self.config.hidden_size) for p in unused if p.requires_grad]
        return (torch.cat(rows),) if rows else ()


def splice(hidden: Tensor, visual: Tensor, positions: Tensor) -> Tensor:
    """Return hidden [t, 1, h] with the visual tokens [v, h] in the rows `positions` [v] int64."""
    return hidden.squeeze(1).index_copy(0, positions, visual.to(hidden.dtype)).unsqueeze(1)


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
