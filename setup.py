"""Packaging of Q-Align kernels: two packages, torch at run time, Triton on Linux only."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "qalign_kernels" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
if VERSION is None:
    raise RuntimeError("qalign_kernels/__init__.py: expected a line __version__ = \"...\"")

DIFFUSERS = ["diffusers>=0.35", "transformers", "accelerate", "safetensors", "scikit-learn>=1.4"]
BESIDES = ["numpy", "Pillow", "threadpoolctl", "tokenizers", "tqdm"]  # imported directly; those of DIFFUSERS bring them too
BENCH = ["pytest>=8", "pytest-benchmark>=4", "matplotlib"]
DEMO = ["scikit-image", "matplotlib", "psutil"]
DEV = ["pytest>=8", "pytest-xdist>=3.6", "packaging", "setuptools>=77", "ruff", "mypy"]

setup(
    name="qalign-kernels",
    version=VERSION[1],
    description="Q-Align: appearance transfer by query-query alignment, as attention kernels and diffusers processors that never hold an N×N map",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="Q-Align kernels contributors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["qalign_kernels", "qalign_kernels.*", "qalign", "qalign.*"]),
    package_data={"qalign_kernels": ["py.typed", "_triton/tiles.json"], "qalign": ["py.typed", "embedded/weights/*.json", "embedded/weights/*/*"]},
    install_requires=["torch>=2.9", 'triton>=3.5; platform_system == "Linux"'],
    extras_require={
        "diffusers": DIFFUSERS + BESIDES,
        "bench": DIFFUSERS + BESIDES + BENCH,
        "demo": DIFFUSERS + BESIDES + DEMO,
        "dev": DEV,
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
