"""The Qwen-VL embedders: vision encoder -> merger -> visual tokens among the text -> decoder -> last token."""

from torch import Tensor

from megatron_llave.batch import PackedSequences
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.models.blocks.embedder import Embedder
from megatron_llave.models.qwen_vl.merger import Projector
from megatron_llave.models.qwen_vl.vision import TowerKind, VisionTower


class QwenVlEmbedder(Embedder):
    """An Embedder of images that keep their shape. A family sets `tower_kind`, and `decoder_kind`."""

    tower_kind: TowerKind

    def add_vision(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """See Embedder."""
        self.vision = VisionTower(model, parallel, self.groups, self.tower_kind)
        self.projector = Projector(model, parallel, self.groups, self.tower_kind.norm)

    def visual_tokens(self, sequences: PackedSequences) -> tuple[Tensor, ...]:
        """Return the visual tokens [v, h], and those that deepstack adds, in packed order.

        If context ranks share the row, each encodes all images and takes the tokens of its own part.
        """
        # [1 + d, 4k, vision h]
        features = self.encoded(sequences, lambda: self.vision(sequences.tiles, sequences.grids))
        return tuple(tokens.index_select(0, sequences.visual_source) for tokens in self.projector(features))
