"""Steps by a token budget against counted micro batches, at several layouts; and a pair that changes between passes."""

import platform
from pathlib import Path

import pytest
from forking import run_script
from reference import pack_pair_batch, random_pairs
from run_ranks import run_ranks

from megatron_llave.config.load import config_from_dict
from megatron_llave.errors import DataError
from megatron_llave.training.micro_batches import MicroBatches

FREED = """
import ctypes, torch
from megatron_llave.processes import return_freed_tensors

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks "
                                                     "fordblks keepcost").split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info

kept = []

def mapped() -> int:
    before = mallinfo2().hblkhd  # bytes in blocks that go back to the system when they are freed
    kept.append(torch.ones(2**21))
    return mallinfo2().hblkhd - before

torch.ones(2**22)  # freed at once: from now on glibc keeps blocks of up to this size
assert mapped() == 0
return_freed_tensors()
assert mapped() >= 2**23
"""
SCRIPT = Path(__file__).parents[1] / "distributed" / "check_micro_batches.py"
# tensor, pipeline, virtual pipeline, context, budget, others
LAYOUTS = {
    1: ["1,1,1,1,280,vision,ema"],
    4: ["1,2,2,1,140,overlap", "2,2,1,1,280,ema", "1,2,1,2,140,vision", "1,1,1,1,250"],
}


@pytest.mark.parametrize("world", LAYOUTS)
def test_loss_and_gradients_are_those_of_counted_micro_batches(openmoji_data: Path, world: int) -> None:
    output = run_ranks(world, SCRIPT, str(openmoji_data), *LAYOUTS[world])
    assert output.count("gradients off by") == len(LAYOUTS[world])
    # In the first step of the last layout some ranks have one micro batch and make one pass, and others two.
    assert world == 1 or "[(1, 1), (2, 1)]" in output


def test_a_pair_that_one_pass_alone_can_read_is_named_and_nothing_large_is_kept() -> None:
    model = config_from_dict({"model": {"preset": "tiny"}}).model
    pairs = random_pairs(model, 6)
    first, second, shorter = (pack_pair_batch(some, model, 1) for some in (pairs[:3], pairs[3:], pairs[3:5]))
    shorter.keys = second.keys[:2]
    coming = iter([first, second, first, shorter])
    batches = MicroBatches(2, 100, "s", lambda: next(coming))
    assert len(batches) == 2 and [batch.keys for batch in batches] == [first.keys, second.keys]
    for batch, kept in zip((first, second), batches.kept, strict=True):
        assert kept.sequences.lengths == batch.sequences.lengths and kept.query_ids.equal(batch.query_ids)
        assert kept.sequences.tiles.numel() == kept.sequences.tokens.numel() == 0
        assert kept.query_ids.untyped_storage().data_ptr() != batch.query_ids.untyped_storage().data_ptr()
    with pytest.raises(DataError, match=f"pair {second.keys[2]} of subset .* in one pass over the step and not"):
        list(batches)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_tensors_of_a_megabyte_go_back_to_the_system(tmp_path: Path) -> None:
    script = tmp_path / "freed.py"
    script.write_text(FREED)
    run_script(script).check_returncode()
