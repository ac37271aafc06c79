"""Packaging. Exact versions of what a study was measured with are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="socratic-trainer",
    version="0.1.0",
    description="Distil step-by-step reasoning into small language models with DeepSpeed ZeRO",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["trainer", "trainer.*"]),
    package_data={
        "trainer.teacher": ["prompts/*.j2"],
        "trainer.report": ["page/*", "targets.yaml"],
        "trainer.planning": ["*.json"],
        "trainer.doctor": ["*.txt"],
    },
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19",
        "transformers>=5.0",
        "accelerate",  # transformers asks for it to load weights straight into ZeRO-3 shards
        "datasets",
        "safetensors",
        "mpi4py",
        "wandb",
        "tokenizers",
        "numpy",
        "packaging",
        "pyyaml",
        "rich",
        "jinja2",
        "matplotlib",
        "psutil",
        "openai",  # annotation by a teacher behind any OpenAI-compatible endpoint
        "sacrebleu",  # quality of a decomposer's sub-questions
    ],
    extras_require={
        "mpi": ["mpich"],  # MPI without root; clusters bring their own
        "bertscore": ["bert-score"],  # the report shows it when this and a local model are there
        "dev": [
            *("pytest", "pytest-xdist", "scipy", "ruff", "mypy", "types-PyYAML", "ninja"),
            "playwright",  # drives a Chromium that is already installed
            "transformers[serving]",  # a real endpoint for the teacher's tests
        ],
    },
)
