"""Packed attention and norms against plain padded ones, forward and gradient; the kernels that are not here."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from reference import CAUSAL, one_by_one

from megatron_llave.batch import padded_length
from megatron_llave.config.model import LanguageConfig, ModelConfig
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.data.context import row_order
from megatron_llave.errors import ConfigError
from megatron_llave.models.blocks import layer_specs
from megatron_llave.models.blocks.initialization import initialize_parameters
from megatron_llave.models.blocks.layer_specs import LocalAttention, RMSNorm, layer_spec, packed_row
from megatron_llave.models.blocks.qwen2 import LanguageModel, language_transformer_config

LENGTHS = [5, 1, 17, 16, 2, 9, 33]
MODEL = ModelConfig(
    language=LanguageConfig(
        hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, vocab_size=64
    )
)


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_layout_restarts_positions_and_finds_every_token() -> None:
    layout = packed_row(boundaries(LENGTHS), LENGTHS, "buckets")
    expected = torch.cat([torch.arange(length) for length in LENGTHS])
    assert torch.equal(layout.positions, expected)
    row = torch.arange(sum(LENGTHS)) * 10
    buckets = torch.cat([row[rows.flatten()] for rows in layout.bucket_rows])
    assert torch.equal(buckets[layout.from_buckets], row)
    # A bucket holds lengths between the same powers of two: 1 | 2 | 5 | 9 and 16 | 17 | 33.
    shapes = sorted(tuple(rows.shape) for rows in layout.bucket_rows)
    assert shapes == [(1, 1), (1, 2), (1, 5), (1, 17), (1, 33), (2, 16)]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's FlashAttention compute one sequence at a time, as it does not run on a CPU."""
    monkeypatch.setattr(layer_specs, "variable_length_attention", lambda: (one_by_one, CAUSAL))


ATTENTIONS = pytest.mark.parametrize("attention_kernel", ["buckets", "variable_length"])


@ATTENTIONS
def test_packed_attention_equals_one_sequence_at_a_time(groups, on_cpu: None, attention_kernel: str) -> None:
    config = language_transformer_config(MODEL, ParallelConfig())
    attention = LocalAttention(config, 1, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), 1, heads, 8) for heads in (4, 2, 2)]
    packed = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    single = [x.detach().clone().requires_grad_() for x in packed]
    layout = packed_row(boundaries(LENGTHS), LENGTHS, attention_kernel)
    output = attention(*packed, None, packed_seq_params=layout)

    expected = []
    for query, key, value in zip(*(x.squeeze(1).split(LENGTHS) for x in single)):
        key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
        scores = torch.einsum("qnd,knd->nqk", query, key) / 8**0.5
        hidden = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        expected.append(torch.einsum("nqk,knd->qnd", weights, value).flatten(1))
    expected = torch.cat(expected).unsqueeze(1)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    for ours, reference in zip(packed, single):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=0, atol=1e-11)


def compare_shared_attention(
    attention_kernel: str, ranks: int, like: torch.Tensor, atol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank with its chunks and the keys of all, which one process stands in for: outputs and gradients.

    The reference is one rank in float64 on the CPU; the ranks compute with the device and the dtype of `like`.
    """
    attention = LocalAttention(language_transformer_config(MODEL, ParallelConfig()), 1, AttnMaskType.causal, "self")
    lengths = [padded_length(length, ranks) for length in LENGTHS]
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), 1, heads, 8) for heads in (4, 2, 2)]
    whole = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    shared = [x.detach().to(like).requires_grad_() for x in whole]
    direction = torch.randn(sum(lengths), 1, 32, generator=generator, dtype=torch.float64)
    expected = attention(*whole, None, packed_seq_params=packed_row(boundaries(lengths), lengths, "buckets"))
    (expected * direction).sum().backward()

    order = torch.from_numpy(row_order(lengths, ranks))
    parts = list(zip(*(x[order.to(like.device)].chunk(ranks) for x in shared)))
    gathered = torch.cat([torch.cat([key, value], dim=-1).squeeze(1) for _, key, value in parts])
    monkeypatch.setattr(layer_specs, "gather_from_sequence_parallel_region", lambda own, group: gathered)
    for rank, part in enumerate(parts):
        group = SimpleNamespace(rank=partial(int, rank), size=partial(int, ranks))
        layout = packed_row(boundaries(lengths).to(like.device), lengths, attention_kernel, group)
        places = order.chunk(ranks)[rank]
        assert torch.equal(layout.positions.cpu(), torch.cat([torch.arange(length) for length in lengths])[places])
        output = attention(*part, None, packed_seq_params=layout)
        torch.testing.assert_close(output.cpu().double(), expected[places], rtol=0, atol=atol)
        (output * direction[places].to(like)).sum().backward(retain_graph=True)
    for ours, reference in zip(shared, whole):
        torch.testing.assert_close(ours.grad.cpu().double(), reference.grad, rtol=0, atol=10 * atol)


@ATTENTIONS
@pytest.mark.parametrize("ranks", [2, 3])
def test_attention_shared_by_context_ranks_equals_that_of_one(
    on_cpu: None, attention_kernel: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_shared_attention(attention_kernel, ranks, torch.empty(0, dtype=torch.float64), 1e-12, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_attention_of_torch_aligns_its_mask_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a chunk has more keys than queries, FlashAttention's causal mask must let its last query see all keys."""
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    compare_shared_attention("variable_length", 2, like, 3e-2, monkeypatch)


@ATTENTIONS
def test_packed_decoder_equals_padded_batch(groups, on_cpu: None, attention_kernel: str) -> None:
    """The same sequences in one packed row, and right-padded to the longest in one batch."""
    config = language_transformer_config(MODEL, ParallelConfig())
    assert not config.sequence_parallel
    language = LanguageModel(MODEL, ParallelConfig(), groups, is_first=True, is_last=True, chunk=None)
    holder = torch.nn.Module()
    holder.language = language
    initialize_parameters([holder], groups.tp, seed=0)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(sum(LENGTHS), 1, 32, generator=generator, requires_grad=True)
    output = language(packed, packed_row(boundaries(LENGTHS), LENGTHS, attention_kernel))
    direction = torch.randn(output.squeeze(1).shape, generator=generator)
    (output.squeeze(1) * direction).sum().backward()
    gradients = {name: p.grad.clone() for name, p in language.named_parameters() if p.grad is not None}
    language.zero_grad()

    sequences = [x.detach() for x in packed.squeeze(1).split(LENGTHS)]
    padded = torch.nn.utils.rnn.pad_sequence(sequences).requires_grad_()  # [s, b, h]
    angles = language.rotary(torch.arange(max(LENGTHS)))
    padded_output = language.decoder(hidden_states=padded, attention_mask=None, rotary_pos_emb=angles)
    real = torch.cat([padded_output[:length, index] for index, length in enumerate(LENGTHS)])
    torch.testing.assert_close(output.squeeze(1), real, rtol=0, atol=2e-5)
    (real * direction).sum().backward()
    assert gradients
    for name, parameter in language.named_parameters():
        if name in gradients:
            error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
            assert error < 1e-5, f"{name}: {error:.1e}"


def test_transformer_engine_is_told_a_length_that_repeats_on_a_gpu() -> None:
    """The bound of the longest sequence; the boundaries are exact, and on a CPU so is the bound."""
    longest = {}
    for device in ("cpu", "cuda"):
        row = packed_row(SimpleNamespace(device=torch.device(device)), [3, 700, 40], "transformer_engine")
        assert row.qkv_format == "thd" and row.max_seqlen == 700 and not row.bucket_rows
        longest[device] = (row.max_seqlen_q, row.max_seqlen_kv)
    assert longest == {"cpu": (700, 700), "cuda": (1024, 1024)}


def test_rms_norm_marks_its_weight_for_sequence_parallel() -> None:
    config = language_transformer_config(MODEL, ParallelConfig(tensor=2, sequence=True))
    norm = RMSNorm(config, 32)
    assert norm.weight.sequence_parallel is True
    hidden = torch.randn(3, 32)
    expected = hidden / torch.sqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(norm(hidden), expected)


def test_transformer_engine_that_is_not_installed_is_one_clear_error() -> None:
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="model.kernels=transformer_engine needs Transformer Engine"):
            layer_spec("transformer_engine", RMSNorm, AttnMaskType.causal)
    else:
        assert layer_spec("transformer_engine", RMSNorm, AttnMaskType.causal).submodules is not None


def test_rotary_angles_turn_pairs_of_channels(groups) -> None:
    language = LanguageModel(MODEL, ParallelConfig(), groups, is_first=True, is_last=True, chunk=None)
    angles = language.rotary(torch.tensor([0, 1, 7]))
    assert angles.shape == (3, 1, 1, 8)
    slow = 1e6 ** -(6 / 8)
    assert angles[2, 0, 0].tolist() == pytest.approx([7.0, 7 * 1e6**-0.25, 7 * 1e6**-0.5, 7 * slow] * 2)
    assert F.cosine_similarity(angles[1].flatten(), angles[2].flatten(), dim=0) == pytest.approx(1.0)
