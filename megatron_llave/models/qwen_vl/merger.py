"""The projector of the Qwen-VL families: the features of four patches are merged into one visual token.

Sources: PatchMerger of transformers' modeling_qwen2_vl.py, modeling_qwen2_5_vl.py and modeling_qwen3_vl.py.
"""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.models.blocks.layer_specs import mlp_submodules
from megatron_llave.models.blocks.settings import common_config
from megatron_llave.models.qwen_vl.resize import MERGED
from megatron_llave.models.qwen_vl.vision import NORM_EPSILON


class Merger(MegatronModule):
    """Norm, and a two-layer MLP over four patches; its inner layer is split over the tensor-parallel ranks."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        norm: type,
        norms_block: bool,
        groups: ProcessGroupCollection,
    ) -> None:
        """`norms_block`: whether the four patches are normalised together or each by itself."""
        super().__init__(config=config)
        self.width, self.norms_block = model.vision.hidden_size * MERGED**2, norms_block
        self.norm = norm(config, self.width if norms_block else model.vision.hidden_size, eps=NORM_EPSILON)
        self.mlp = MLP(config, mlp_submodules(model.kernels), input_size=self.width, tp_group=groups.tp)

    def forward(self, features: Tensor) -> Tensor:
        """[4k, H] -> [k, h]."""
        features = features.reshape(-1, self.width) if self.norms_block else features
        output, bias = self.mlp(self.norm(features).reshape(-1, self.width))
        return output + bias


class Projector(MegatronModule):
    """The merger of the last layer's features, and one for each layer in model.vision.deepstack_layers."""

    def __init__(
        self, model: ModelConfig, parallel: ParallelConfig, groups: ProcessGroupCollection, norm: type
    ) -> None:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=model.language.hidden_size,
            num_attention_heads=parallel.tensor,
            kv_channels=1,
            ffn_hidden_size=model.vision.hidden_size * MERGED**2,
            activation_func=F.gelu,
            add_bias_linear=True,
            tensor_model_parallel_size=parallel.tensor,
            **common_config(model),
        )
        super().__init__(config=config)
        self.merger = Merger(config, model, norm, False, groups)
        # A MegatronModule and not a ModuleList, which would save the parts of tensor-parallel ranks as if whole.
        self.deepstack = MegatronModule(config)
        for index in range(len(model.vision.deepstack_layers)):
            self.deepstack.add_module(str(index), Merger(config, model, norm, True, groups))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """[1 + d, 4k, H] -> 1 + d tensors [k, h]."""
        mergers: list[torch.nn.Module] = [self.merger, *self.deepstack.children()]
        return tuple(merger(of_layer) for merger, of_layer in zip(mergers, features, strict=True))
