"""Packaging of Q-Align kernels: two packages, torch at run time, which brings its Triton."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"',
    (ROOT / "qalign_kernels" / "__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
)
REPOSITORY = "https://github.com/qalign-kernels/qalign-kernels"
if VERSION is None:
    raise RuntimeError('qalign_kernels/__init__.py: expected a line __version__ = "..."')

# torch brings the Triton that fits it; a torch for CPUs alone brings none, and the interpreter and the compiler need one
TRITON = ['triton>=3.6; platform_system == "Linux"']
DIFFUSERS = [
    "diffusers>=0.36",
    "transformers>=5",
    "accelerate>=1.10",
    "safetensors>=0.4.5",
    "scikit-learn>=1.4",
]
BESIDES = [
    "huggingface_hub",
    "numpy>=1.26",
    "Pillow>=10",
    "threadpoolctl>=3",
    "tokenizers",
    "tqdm>=4.66",
]  # imported; DIFFUSERS bring them too
BENCH = ["pytest>=8", "pytest-benchmark>=4", "matplotlib", *TRITON]
DEMO = ["scikit-image", "matplotlib", "psutil"]
DEV = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "packaging>=23",
    "setuptools>=77",
    "ruff",
    "mypy",
    "uv",
    *TRITON,
]


def long_description() -> str:
    """Read the README, its links made absolute: relative ones lead nowhere on the page of a package index."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)(\[[^\[\]]*\])\((?![a-z]+:|#)([^()\s]+)\)", absolute_link, text)


def absolute_link(link: re.Match[str]) -> str:
    """Lead to the file's page, or, of a picture, to its bytes."""
    mark, text, path = link.groups()
    return f"{mark}{text}({REPOSITORY}/{'raw' if mark else 'blob'}/main/{path})"


setup(
    name="qalign-kernels",
    version=VERSION[1],
    description="Q-Align: appearance transfer by query-query alignment, as attention kernels and diffusers processors that never hold an N×N map",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    url=REPOSITORY,
    project_urls={
        "Source": REPOSITORY,
        "Issues": f"{REPOSITORY}/issues",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
    },
    author="Q-Align kernels contributors",
    keywords=["attention", "diffusers", "triton", "stable diffusion", "appearance transfer", "image editing"],
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["qalign_kernels", "qalign_kernels.*", "qalign", "qalign.*"]),
    package_data={
        "qalign_kernels": ["py.typed", "_triton/tiles.json"],
        "qalign": ["py.typed", "embedded/weights/*.json", "embedded/weights/*/*"],
    },
    install_requires=["torch>=2.10"],
    extras_require={
        "triton": TRITON,
        "diffusers": DIFFUSERS + BESIDES,
        "bench": DIFFUSERS + BESIDES + BENCH,
        "demo": DIFFUSERS + BESIDES + DEMO,
        "dev": DEV,
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
)
