"""Packaging: what the library needs, and the extras for one kind of use each."""

from pathlib import Path

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    "torch>=2.6",
    # Exact: some private seams of the engine are used; tests/contract asserts each of them.
    "megatron-core==0.16.1",
    "numpy>=1.26",
    "packaging>=24.2",
    # megatron-core's dist_checkpointing imports psutil and does not declare it.
    "psutil>=5.9",
    "pyyaml>=6.0",
    "sentencepiece>=0.2.0",
    "tqdm>=4.66",
    "zstandard>=0.22",
]

# `apex` is declared nowhere: the package of that name on the Python package index is not NVIDIA's. NVIDIA's kernels are
# probed for at run time; they come with NGC images or from a build of NVIDIA's repository.
HF = ["transformers>=5.0", "safetensors>=0.4.3"]
LOGGING = ["tensorboard>=2.16", "matplotlib>=3.8"]
EXTRAS_REQUIRE = {
    # The build that is tested without a GPU. On a plain index this version of torch is the CUDA build as well.
    "cpu": ["torch==2.13.0"],
    "te": ["transformer-engine[pytorch]>=2.9,<2.12"],
    "hf": HF,
    "eval": ["datasets>=2.19"],
    "logging": LOGGING,
    # Ranges of the checkers are narrow, because a new minor version of each brings new findings.
    "dev": [
        "pytest>=8.1",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.5",
        "hypothesis>=6.100",
        "ruff>=0.17.5,<0.18",
        "mypy>=2.4,<2.5",
        "import-linter>=2.15,<2.17",
        *HF,
        *LOGGING,
    ],
}

if __name__ == "__main__":
    setup(
        name="megatron_metro",
        version="0.1.0",
        description="METRO-T5, T5 and SPACTOR-T5 pretraining with 3D parallelism on Megatron-Core",
        long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        python_requires=">=3.10,<3.13",
        packages=find_packages(include=["megatron_metro", "megatron_metro.*"]),
        install_requires=INSTALL_REQUIRES,
        extras_require=EXTRAS_REQUIRE,
    )
