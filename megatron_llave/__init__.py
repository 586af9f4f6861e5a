"""LLaVE on megatron-core: large multimodal models trained into embedding models."""

import os
import warnings

from megatron_llave.distributed import cpu_emulation, cuda_environment

__version__ = "0.1.0"

cuda_environment.set_defaults(os.environ)
cpu_emulation.keep_compiler_unloaded()

# megatron-core warns at import, a dozen lines per process, that optional packages are missing.
warnings.filterwarnings("ignore", module=r"megatron\.core\.")
