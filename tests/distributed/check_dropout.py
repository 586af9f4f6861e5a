"""Under torchrun: with dropout on, the replay pass of every micro batch drops what its embed pass dropped."""

import sys

import torch
import torch.distributed as dist
from check_layouts import ALPHA, GLOBAL_BATCH, TEMPERATURE, comparison, micro_batches, parse_layout, small_config
from full_parameters import full_gradients, let_go, worst_relative_error
from reference import dense_contrastive_loss, random_pairs

from megatron_llave.config.lora import LoraConfig
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.loss.inputs import PairEmbeddings
from megatron_llave.models import build_model
from megatron_llave.models.lora import is_adapter
from megatron_llave.training.gradient_cache import forward_backward
from megatron_llave.training.optimizer import build_trainable


def check(text: str) -> None:
    """Two steps: equal embeddings in both passes of one, others in the next; gradients, where one process can tell."""
    layout, freeze = parse_layout(text)
    cfg = small_config(layout, freeze)
    if "lora" in text:
        cfg.lora = LoraConfig(rank=3, dropout=0.3)
    else:
        cfg.model.dropout = 0.2
    groups = process_groups.initialize_model_parallel(layout)
    chunks = build_model(cfg.model, layout, groups, torch.device("cpu"), 0, cfg.lora)
    for name, parameter in (item for chunk in chunks for item in chunk.named_parameters()):
        if is_adapter(name) and name.endswith("_up"):  # zero, it would hide what is dropped before it
            parameter.data.fill_(0.1)
    trainable = build_trainable(cfg, chunks, groups)
    seen_embeddings: list[torch.Tensor] = []
    if chunks[-1].post_process:
        chunks[-1].register_forward_hook(lambda module, inputs, output: seen_embeddings.append(output.detach()))
    batches = micro_batches(random_pairs(cfg.model, GLOBAL_BATCH), 2, cfg, groups)
    count = len(batches)
    before = torch.get_rng_state()
    for _ in range(2):
        trainable.zero_gradients()
        forward_backward(trainable.chunks, batches, comparison(cfg, groups), cfg.loss)
    check_replicas(chunks, groups)
    if seen_embeddings:
        assert len(seen_embeddings) == 4 * count
        passes = [torch.cat(seen_embeddings[start : start + count]) for start in range(0, 4 * count, count)]
        assert torch.equal(passes[0], passes[1]) and torch.equal(passes[2], passes[3]), text
        assert not torch.allclose(passes[0], passes[2], atol=1e-3), f"{text}: two steps drop the same"
        if groups.pp.size() == 1:
            check_evaluation(chunks[-1], batches[0], passes[0])
    if groups.dp.size() * groups.tp.size() * groups.pp.size() == 1:
        check_gradients(cfg, trainable, chunks[0], batches, groups, before)
    let_go(trainable)
    print(f"{text}: both passes drop the same")


def check_replicas(chunks, groups) -> None:
    """Tensor-parallel ranks have dropped the same where they hold the same: the gradients of what they share."""
    for name, parameter in (item for chunk in chunks for item in chunk.named_parameters()):
        if parameter.requires_grad and not getattr(parameter, "tensor_model_parallel", False):
            own = parameter.main_grad.clone()
            dist.broadcast(own, dist.get_global_rank(groups.tp, 0), group=groups.tp)
            torch.testing.assert_close(parameter.main_grad, own, rtol=1e-4, atol=1e-6, msg=name)


def check_evaluation(chunk, batch, embeddings) -> None:
    chunk.eval()
    with torch.no_grad():
        outputs = [chunk(batch.sequences) for _ in range(2)]
    chunk.train()
    assert torch.equal(*outputs) and not torch.allclose(outputs[0], embeddings[: len(outputs[0])], atol=1e-3)


def check_gradients(cfg, trainable, chunk, batches, groups, before) -> None:
    """Autograd alone, from the same random state: micro batches in order, one loss over all of them."""
    torch.set_rng_state(before)
    trainable.zero_gradients()
    forward_backward(trainable.chunks, batches, comparison(cfg, groups), cfg.loss)
    ours = full_gradients(trainable, groups)
    torch.set_rng_state(before)
    trainable.zero_gradients()
    both = PairEmbeddings.of([chunk(batch.sequences) for batch in batches], batches)
    dense_contrastive_loss(both.query, both.target, TEMPERATURE, ALPHA).backward()
    name, error = worst_relative_error(ours, full_gradients(trainable, groups))
    assert error <= 1e-5, f"gradient of {name} is off by {error:.1e}"


if __name__ == "__main__":
    cpu_emulation.enable()
    process_groups.initialize_distributed(120)
    for layout in sys.argv[1:]:
        check(layout)
        process_groups.destroy_model_parallel()
    process_groups.destroy_distributed()
