"""LLaVE on megatron-core: large multimodal models trained into embedding models."""

import os
import warnings

from megatron_llave.distributed import compiler, cuda_environment

__version__ = "0.1.0"

cuda_environment.set_defaults(os.environ)
compiler.keep_compiler_unloaded_by_megatron_core()

# megatron-core warns at import, a dozen lines per process, that optional packages are missing.
warnings.filterwarnings("ignore", module=r"megatron\.core\.")
