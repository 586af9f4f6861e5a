"""Under torchrun: the golden model at a layout, from a checkpoint or an HF folder, gives the golden embeddings.

check_golden_model.py FOLDER:tensor,pipeline[,sequence] ...
"""

import sys
import tempfile
from pathlib import Path

import torch
from golden_model import CASES, arrays, byte_tokenizer, embeddings, packed

from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.embedding.embedder import forward_only, load_model

EMBEDDING_TOLERANCE = 3e-5
HIDDEN_TOLERANCE = 1e-4


def check(folder: str, layout: str) -> None:
    """Load at the layout, compare embeddings and last hidden states."""
    tensor, pipeline, *sequence = [int(number) for number in layout.split(",")]
    is_sequence = bool(sequence and sequence[0])
    overrides = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.sequence={is_sequence}"]
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = byte_tokenizer(Path(scratch))
        model = load_model(folder, overrides=[*overrides, f"data.tokenizer={tokenizer}"])
    hidden = {}
    if model.groups.pp.rank() == pipeline - 1:
        model.chunks[-1].language.register_forward_hook(lambda *call: hidden.update(value=call[-1]))
    batch = packed(tensor if is_sequence else 1)
    with torch.no_grad():
        rows = forward_only(model, [batch])
    if hidden:
        worst = (rows[0] - embeddings()).abs().max().item()
        assert worst <= EMBEDDING_TOLERANCE, f"{folder} at {layout}: embeddings are {worst} off"
        far = 0.0 if is_sequence else check_hidden_states(hidden["value"].squeeze(1), batch)
        print(f"{Path(folder).name} at {layout}: embeddings {worst:.1e}, last hidden states {far:.1e}", flush=True)


def check_hidden_states(hidden: torch.Tensor, batch) -> float:
    """Largest difference from the golden last hidden states, of the cases that have them."""
    bounds, far = batch.cu_seqlens.tolist(), []
    for index, case in enumerate(CASES):
        golden = arrays(case).get("last_hidden_state")
        if golden is not None:
            own = hidden[bounds[index] : bounds[index + 1]]
            assert own.shape == golden.shape, (own.shape, golden.shape)
            far.append((own - torch.from_numpy(golden)).abs().max().item())
    assert len(far) == 2 and max(far) <= HIDDEN_TOLERANCE, f"last hidden states are {far} off"
    return max(far)


if __name__ == "__main__":
    cpu_emulation.enable()
    process_groups.initialize_distributed(120)
    for argument in sys.argv[1:]:
        check(*argument.rsplit(":", 1))
        process_groups.destroy_model_parallel()
    process_groups.destroy_distributed()
