"""Checks of a RunConfig that involve several of its sections.

load.py calls `validate` on the configuration that it has read, and `require_effects` on that of a new run. Each section
checks its own values when it is built, in the file that has it.
"""

from dataclasses import fields

from megatron_llave.config.data import REMOTE
from megatron_llave.config.lora import LoraConfig, part_of_target
from megatron_llave.config.loss import WHOLE_STEP
from megatron_llave.config.mining import MiningConfig
from megatron_llave.config.model import PARTS, LanguageConfig, ModelConfig, VisionConfig
from megatron_llave.config.schema import LOSS_OF_SUBSET, RunConfig, loss_of_subset
from megatron_llave.errors import require

MOST_LAYERS = 500
NEEDED = {"hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size"}
"""Sizes without a default that every family has."""
OF_COSENT = ("objective", "temperature", "negatives")
"""What a subset may set for CoSENT."""


def validate(cfg: RunConfig) -> None:
    """Refuse a configuration that is impossible with any number of processes.

    Raises:
        ConfigError: names the key and the values that do not fit.
    """
    sizes_come_with_weights = cfg.checkpoint.init is not None and not has_sizes(cfg.model)
    if not sizes_come_with_weights:
        gives = "give all sizes or none beside checkpoint.init"
        _validate_model(cfg.model, "set it or choose model.preset" if cfg.checkpoint.init is None else gives)
        dims, width = cfg.loss.matryoshka_dims, cfg.model.language.hidden_size
        ok = max(dims, default=0) <= width
        require(ok, f"loss.matryoshka_dims={dims} go beyond the embedding, model.language.hidden_size={width}")
    ok = cfg.loss.hardness != "hard_negatives" or cfg.loss.alpha == 0 or cfg.data.hard_negatives > 0
    require(ok, "loss.hardness=hard_negatives weights nothing while data.hard_negatives=0; set it to at least 1")
    if cfg.loss.temperature_learning != "none":  # here and not in LossConfig, as a warmup may start outside of them
        own = {f"data.subsets.{name}.temperature": subset.temperature for name, subset in cfg.data.subsets.items()}
        for key, value in {"loss.temperature": cfg.loss.temperature, **own}.items():
            low, high = cfg.loss.temperature_bounds
            ok = value is None or low <= value <= high
            require(ok, f"{key}={value}, where learning starts, is not within loss.temperature_bounds=[{low}, {high}]")
    ok = cfg.loss.negatives != "own_micro_batch" or cfg.train.micro_batch_size != 1
    require(ok, "loss.negatives=own_micro_batch: with train.micro_batch_size=1 a pair has no negative")
    section = cfg.optimizer
    ok = cfg.model.precision != "fp32" or (section.moments, section.offload_fraction) == ("fp32", 0)
    named = f"optimizer.moments={section.moments}, optimizer.offload_fraction={section.offload_fraction}"
    require(ok, f"{named}: with model.precision=fp32 moments are fp32 and nothing is offloaded; use bf16 or fp8")
    ok = cfg.train.tokens_per_micro_batch is None or cfg.loss.negatives in WHOLE_STEP
    needs = f"train.tokens_per_micro_batch={cfg.train.tokens_per_micro_batch} needs loss.negatives={WHOLE_STEP[0]}"
    require(ok, f"{needs}: with {cfg.loss.negatives} the loss depends on the micro batch that a pair is in")
    late = [name for name, subset in cfg.data.subsets.items() if subset.start_step > 0]
    require(
        not cfg.data.subsets or len(late) < len(cfg.data.subsets),
        f"data.subsets: every subset ({', '.join(late)}) starts late, so step 0 has nothing to draw",
    )
    parts, batch = cfg.data.sub_batches, cfg.train.global_batch_size
    require(batch % parts == 0, f"train.global_batch_size={batch} is not a multiple of data.sub_batches={parts}")
    mixed = f"data.sub_batches={parts} mixes subsets in one loss"
    for name, subset in cfg.data.subsets.items():
        for key in LOSS_OF_SUBSET:
            ok = parts == 1 or getattr(subset, key) is None
            require(ok, f"{mixed}: data.subsets.{name}.{key} cannot be set")
    ok = parts == 1 or cfg.loss.temperature_learning != "subset"
    require(ok, f"{mixed}, which has one temperature: use loss.temperature_learning=one, or data.sub_batches=1")
    ok = cfg.log.montage_queries == 0 or cfg.evaluate.interval > 0
    require(ok, f"log.montage_queries={cfg.log.montage_queries} draws nothing while evaluate.interval=0; set that too")
    _validate_objectives(cfg)
    _validate_lora(cfg)


def _validate_objectives(cfg: RunConfig) -> None:
    """Refuse losses that the data, as it is used, leaves nothing to learn from."""
    losses = {f"data.subsets.{name}": loss_of_subset(cfg, name) for name in cfg.data.subsets} or {"loss": cfg.loss}
    for name, loss in losses.items():
        ok = loss.negatives != "own" or cfg.data.hard_negatives > 0
        require(ok, f"{name}.negatives=own leaves no negatives while data.hard_negatives=0; set it to at least 1")
    ok = cfg.data.negatives is None or cfg.data.hard_negatives > 0
    require(ok, f"data.negatives={cfg.data.negatives} is not used while data.hard_negatives=0; set it to at least 1")
    ok = cfg.loss.soft_labels is None or cfg.data.hard_negatives > 0 or cfg.data.positives != 1
    require(ok, "loss.soft_labels weighs targets and hard negatives: with data.positives=1 set data.hard_negatives")
    hint = "a file or folder made by llave embed --shards"
    using = _users_of_stored(cfg)
    ok = cfg.loss.stored_embeddings is not None or not using
    require(ok, f"{' and '.join(using)} need loss.stored_embeddings, {hint}")


def _users_of_stored(cfg: RunConfig) -> list[str]:
    """The settings that take loss.stored_embeddings."""
    users = {"reward": cfg.loss.reward, "soft_labels": cfg.loss.soft_labels}
    return [f"loss.{key}=stored" for key, value in users.items() if value == "stored"]


def require_effects(cfg: RunConfig) -> None:
    """Refuse settings that would change nothing in a new run, and mining while training that cannot be done.

    A saved configuration may have some, which earlier versions took.

    Raises:
        ConfigError: names the key without effect.
    """
    losses = {name: loss_of_subset(cfg, name) for name in cfg.data.subsets}
    for name, loss in losses.items():
        for key in LOSS_OF_SUBSET:
            ok = loss.objective != "cosent" or key in OF_COSENT or getattr(cfg.data.subsets[name], key) is None
            require(ok, f"data.subsets.{name}.{key} has no effect with objective=cosent; leave it out")
        ok = cfg.loss.temperature_learning != "one" or cfg.data.subsets[name].temperature is None
        require(ok, f"data.subsets.{name}.temperature has no effect with loss.temperature_learning=one; use subset")
    all_losses = list(losses.values()) or [cfg.loss]
    ok = cfg.loss.reward == "self" or any(loss.weighs_hardness for loss in all_losses)
    judged = f"loss.reward={cfg.loss.reward} judges hardness"
    require(ok, f"{judged}, which no contrastive loss here gives a weight (alpha above 0); use reward=self")
    ok = cfg.loss.soft_labels is None or any(loss.objective == "contrastive" for loss in all_losses)
    require(ok, f"loss.soft_labels={cfg.loss.soft_labels} is of no use where every subset has objective=cosent")
    stored = cfg.loss.stored_embeddings
    ok = stored is None or _users_of_stored(cfg)
    require(ok, f"loss.stored_embeddings={stored} is used by loss.reward or soft_labels=stored alone")
    decay, adapted = cfg.optimizer.vision_layer_decay, cfg.lora.parts if cfg.lora.rank else PARTS
    ok = decay == 1 or "vision" not in cfg.model.freeze
    require(ok, f"optimizer.vision_layer_decay={decay} has no layers to slow down: model.freeze has vision")
    ok = decay == 1 or "vision" in adapted
    require(ok, f"optimizer.vision_layer_decay={decay} has nothing to slow down: lora.targets has no vision")
    for key in ("part_learning_rates", "part_start_steps"):
        for part in getattr(cfg.optimizer, key):
            require(part in adapted, f"optimizer.{key}.{part} has nothing to train: lora.targets has no {part}")
    _require_minable(cfg)


def _require_minable(cfg: RunConfig) -> None:
    """Refuse mining while training where it cannot be done, or where its negatives would be of no use."""
    mining, interval = cfg.mining, cfg.mining.interval
    changed = [rule.name for rule in fields(mining) if getattr(mining, rule.name) != rule.default]
    named = f"mining.{''.join(changed[:1])} has no effect without mining.interval"
    require(interval > 0 or not changed, f"{named}; set that too, or leave it out")
    if not interval:
        return
    ok = mining.search == "faiss" or mining.probes == MiningConfig.probes
    require(ok, f"mining.probes={mining.probes} has no effect without mining.search=faiss; set that too")
    key, every, tensor = f"mining.interval={interval}", cfg.checkpoint.interval, cfg.parallel.tensor
    ok = cfg.data.hard_negatives > 0
    require(ok, f"{key} mines negatives that are not used while data.hard_negatives=0; set it to at least 1")
    ok = not REMOTE.match(cfg.data.path)
    require(ok, f"{key} needs the shards in a local folder, not data.path={cfg.data.path}; copy them, or use 0")
    ok = every > 0 and interval % every == 0
    require(
        ok, f"{key} must be a multiple of checkpoint.interval={every}, which is to be above 0: checkpoints are mined"
    )
    ok = mining.processes % tensor == 0
    hint = "use a multiple of it, or 0 to mine on other machines"
    require(ok, f"mining.processes={mining.processes} cannot share the model as parallel.tensor={tensor} says; {hint}")
    losses = [loss_of_subset(cfg, name) for name in cfg.data.subsets] or [cfg.loss]
    ok = any(loss.objective == "contrastive" for loss in losses)
    require(ok, f"{key} is of no use where every subset has objective=cosent, which leaves mined negatives out")
    ok = cfg.loss.soft_labels != "scores" or cfg.loss.contrastive_weight > 0
    hint = "which leave mined negatives out"
    require(ok, f"{key} is of no use where loss.contrastive_weight=0 leaves only soft labels from scores, {hint}")


def _validate_lora(cfg: RunConfig) -> None:
    lora = cfg.lora
    if not lora.rank:
        return
    ok = cfg.checkpoint.init is not None
    require(ok, f"lora.rank={lora.rank} needs checkpoint.init: adapters of random weights are of no use")
    frozen = [target for target in lora.targets if part_of_target(target) in cfg.model.freeze]
    clash = f"lora.targets: {''.join(frozen[:1])} is of a part that model.freeze={cfg.model.freeze} names"
    require(not frozen, f"{clash}; all weights but adapters are frozen anyway, so remove it there")


def require_same_adapters(configured: LoraConfig, stored: LoraConfig, source: str, remedy: str) -> None:
    """Refuse adapters of another kind than those that are configured, unless none are: then they can be merged.

    Args:
        configured: the section `lora` of a run or of a model that is loaded.
        stored: that of the configuration beside the weights.
        source: where `stored` comes from, for the message.
        remedy: what to do instead, for the message.

    Raises:
        ConfigError: names the key that differs, with both values.
    """
    for name in ("rank", "alpha", "targets") if configured.rank else ():
        ours, theirs = getattr(configured, name), getattr(stored, name)
        is_same = sorted(ours) == sorted(theirs) if name == "targets" else ours == theirs
        what = f"lora.{name}={ours} contradicts the adapters in {source}, where it is {theirs}"
        require(is_same, f"{what}; {remedy}")


def require_same_model(configured: ModelConfig, stored: ModelConfig, source: str) -> None:
    """Refuse weights of another model.

    The size of the vocabulary may differ, because the one beside the weights is the right one.

    Args:
        configured: the model in the configuration or preset.
        stored: the model that the configuration beside the weights describes.
        source: where `stored` comes from, for the message.

    Raises:
        ConfigError: names the first key that differs, with both values.
    """
    is_same = configured.family == stored.family
    require(is_same, f"model.family={configured.family} contradicts {source}, where it is {stored.family}")
    for part in ("vision", "language"):
        for f in fields(getattr(configured, part)):
            name = "head_channels" if f.name == "head_size" else f.name  # 0 and the size that it stands for are equal
            ours, theirs = getattr(getattr(configured, part), name), getattr(getattr(stored, part), name)
            require(
                ours == theirs or f.name == "vocab_size",
                f"model.{part}.{f.name}={ours} contradicts {source}, where it is {theirs}",
            )


def has_sizes(model: ModelConfig) -> bool:
    """Whether any size of the model was set, by a preset or by a key."""
    return (model.vision, model.language) != (VisionConfig(), LanguageConfig())


def require_sizes(cfg: RunConfig) -> None:
    """Raise a ConfigError if the sizes of the model come with the weights that it starts from."""
    require(has_sizes(cfg.model), f"checkpoint.init={cfg.checkpoint.init} has the model's sizes: name model.preset too")


def _validate_model(model: ModelConfig, remedy: str) -> None:
    for part, values in (("vision", model.vision), ("language", model.language)):
        for f in fields(values):
            value = getattr(values, f.name)
            if f.name in NEEDED or value != f.default and not isinstance(value, list):
                require(value > 0, f"model.{part}.{f.name}={value} must be positive; {remedy}")
        require(
            values.num_layers <= MOST_LAYERS, f"model.{part}.num_layers={values.num_layers} is beyond {MOST_LAYERS}"
        )
        ok = values.hidden_size % values.num_heads == 0 or getattr(values, "head_size", 0) > 0
        sizes = f"model.{part}.hidden_size={values.hidden_size}"
        require(ok, f"{sizes} is not divisible by model.{part}.num_heads={values.num_heads}")
    vision, language = model.vision, model.language
    ok = vision.image_size == 0 or vision.image_size >= vision.patch_size
    sizes = f"model.vision.image_size={vision.image_size}"
    require(ok, f"{sizes} is smaller than model.vision.patch_size={vision.patch_size}")
    heads = f"model.language.num_heads={language.num_heads}"
    ok = language.num_heads % language.num_kv_heads == 0
    require(ok, f"{heads} is not a multiple of model.language.num_kv_heads={language.num_kv_heads}")
    ok = language.head_channels % 2 == 0
    sizes = f"model.language.hidden_size={language.hidden_size} / {heads}"
    sizes = f"model.language.head_size={language.head_size}" if language.head_size else sizes
    require(ok, f"{sizes} must be even, as rotary embeddings turn pairs of channels")
    section, pairs = language.mrope_section, language.head_channels // 2
    ok = not section or len(section) == 3 and sum(section) == pairs and min(section) > 0
    require(
        ok, f"model.language.mrope_section={section} must be three numbers whose sum is {pairs}, the pairs of a head"
    )
    require(set(model.freeze) != set(PARTS), f"model.freeze={model.freeze} leaves nothing to train")
