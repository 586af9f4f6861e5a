"""LLaVE on megatron-core: large multimodal models trained into embedding models."""

import warnings

from megatron_llave.distributed import cpu_emulation

__version__ = "0.1.0"

cpu_emulation.keep_compiler_unloaded()

# megatron-core warns at import, a dozen lines per process, that optional packages are missing.
warnings.filterwarnings("ignore", module=r"megatron\.core\.")
