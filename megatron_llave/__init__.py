"""LLaVE on megatron-core: large multimodal models trained into embedding models."""

import warnings

__version__ = "0.1.0"

# megatron-core warns at import, a dozen lines per process, that optional packages are missing.
warnings.filterwarnings("ignore", module=r"megatron\.core\.")
