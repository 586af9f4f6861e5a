"""What the fork server of forking.py loads once, so that all it forks find it in place."""

import gc

import torch._dynamo  # noqa: F401  (torch loads it with the first optimizer)

import megatron_llave.train  # noqa: F401
import tools.convert_hf
import tools.embed
import tools.evaluate
import tools.merge
import tools.plot
import tools.study  # noqa: F401

# None of it is ever let go: a fork that collects garbage need not look at it again.
gc.collect()
gc.freeze()
