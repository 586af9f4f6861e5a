"""The modules that the fork server of forking.py loads once, so that its forks need not load them again."""

import gc

import torch._dynamo  # noqa: F401  (torch loads it with the first optimizer)
import transformers  # noqa: F401  (llave convert verify loads it, and huggingface_hub with it)

import megatron_llave.commands.convert
import megatron_llave.commands.embed
import megatron_llave.commands.evaluate
import megatron_llave.commands.merge
import megatron_llave.commands.plot
import megatron_llave.commands.study  # noqa: F401
import megatron_llave.train  # noqa: F401

# The loaded objects are never released, so the garbage collector of a fork need not examine them.
gc.collect()
gc.freeze()
