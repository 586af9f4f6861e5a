"""LoRA adapters of the decoder, by formula: their elements, and what they keep for the backward.

Everything beside adapters is frozen, which `as_frozen` says in the terms of model.freeze. Adapters of projector and
vision encoder are not counted, so they cannot be planned.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_llave.config.lora import LoraConfig
from megatron_llave.config.model import PARTS, ModelConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import require
from megatron_llave.models import family_of
from megatron_llave.models.lora import chosen_linears
from megatron_llave.models.vision_cost import FLOAT, element, has_buckets

NONE = LoraConfig()
"""The section `lora` of a run without adapters."""


@dataclass(frozen=True)
class Adapter:
    """One adapter of a decoder layer, of a Hugging Face linear."""

    name: str
    inputs: int
    outputs: int
    splits_outputs: bool
    """Whether tensor-parallel ranks share the outputs, or else the inputs."""
    rank: int

    def elements(self, tensor: int = 1) -> list[int]:
        """Return those of A and B on one of `tensor` tensor-parallel ranks."""
        inputs, outputs = self.inputs, self.outputs
        if self.splits_outputs:
            return [self.rank * inputs, outputs // tensor * self.rank]
        return [self.rank * (inputs // tensor), outputs * self.rank]


def decoder_adapters(model: ModelConfig, lora: LoraConfig) -> Iterator[Adapter]:
    """Yield the adapters of one decoder layer."""
    language = model.language
    h, f = language.hidden_size, language.ffn_hidden_size
    q, kv = (number * language.head_channels for number in (language.num_heads, language.num_kv_heads))
    shapes = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
    shapes |= {"gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}
    names = {target.removeprefix("language.") for target in lora.targets}
    for name, (inputs, outputs) in shapes.items() if lora.rank else ():
        if "language" in names or name in names:
            yield Adapter(name, inputs, outputs, name not in ("o_proj", "down_proj"), lora.rank)


def as_frozen(cfg: RunConfig) -> RunConfig:
    """Return the configuration with all parts in model.freeze if it has adapters, which alone are trained.

    Projector and vision encoder are left out if they have adapters: they keep about as much for the backward as if they
    were trained.
    """
    if not cfg.lora.rank:
        return cfg
    freeze = [part for part in PARTS if part == "language" or part not in cfg.lora.parts]
    return replace(cfg, model=replace(cfg.model, freeze=freeze))


def require_plannable(cfg: RunConfig) -> None:
    """Refuse adapters that are not counted here, or that the model cannot have.

    Raises:
        ConfigError: there are adapters of other parts than the decoder, or of a linear that it does not have.
    """
    ok = cfg.lora.parts <= {"language"}
    require(ok, f"lora.targets={cfg.lora.targets}: only adapters of the decoder (language) can be planned")
    if cfg.lora.rank:
        chosen_linears(cfg.lora.targets, family_of(cfg.model).hf.rules(cfg.model))


def adapter_activations(
    model: ModelConfig, lora: LoraConfig, tensor: int, sequence: bool, tokens: int, on_gpu: bool
) -> int:
    """Return the bytes that a layer keeps more (or less, below 0) of so many tokens than one that is trained itself.

    The adapters of one of our linears are joined for its products: both matrices, and what lies between them, are kept.
    Frozen linears keep no input: it is kept where there is an adapter, whose dropout keeps copies of its own. A norm of
    several operations, as on a CPU, keeps less if its weight is frozen.
    """
    language, e = model.language, element(model)
    h, q, f = language.hidden_size, language.num_heads * language.head_channels, language.ffn_hidden_size
    kv = language.num_kv_heads * language.head_channels
    adapters = {adapter.name: adapter for adapter in decoder_adapters(model, lora)}
    spread, kept = tensor if sequence else 1, 0
    is_plain = model.recompute == "none"
    # Linears of ours: Hugging Face's, outputs, inputs, bytes of the input of a token that are kept for it alone.
    linears = [
        (("q_proj", "k_proj", "v_proj"), (q + 2 * kv) // tensor, h, h * e // spread),
        (("o_proj",), h, q // tensor, q * e // tensor if is_plain and has_buckets(model, on_gpu) else 0),
        (("gate_proj", "up_proj"), 2 * f // tensor, h, h * e // spread if is_plain else 0),
        (("down_proj",), h, f // tensor, f * e // tensor if is_plain else 0),
    ]
    for names, outputs, inputs, alone in linears:
        number = sum(name in adapters for name in names)
        kept += lora.rank * number * (inputs + outputs + tokens) * e
        kept += number * inputs * tokens * (e + (1 if on_gpu else e)) * (lora.dropout > 0)
        kept -= alone * tokens * (number == 0 or lora.dropout > 0)
    if not on_gpu and model.kernels == "local":
        of_heads = FLOAT * (q + kv) // tensor if family_of(model).cost.decoder.qk_norm else 0
        kept -= (2 * FLOAT * h // spread + of_heads) * tokens
    return kept
