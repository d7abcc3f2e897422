import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "easyaira/__init__.py").read_text())[1]

setup(
    name="easyaira",
    version=VERSION,
    description="Align language models in JAX: SFT and DPO, from and to Hugging Face folders.",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["easyaira", "easyaira.*"]),
    package_data={"easyaira.export": ["*.jinja"], "easyaira.evaluation": ["tasks/*.yaml"]},
    entry_points={"console_scripts": ["easyaira = easyaira.__main__:main"]},
    python_requires=">=3.11",
    install_requires=[
        "datasets>=4.0",
        "flax>=0.12.8",
        "huggingface_hub>=1.0",
        "jax>=0.10,<0.13",
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "markupsafe>=2.1",
        "jsonargparse[signatures]>=4.53",
        "matplotlib>=3.10",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pyarrow>=20.0",
        "pyyaml>=6.0",
        "safetensors>=0.8.0",
        "tensorboard>=2.21",
        "tqdm>=4.67",
        "transformers>=5.17",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10,<0.13"],
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "gs": ["gcsfs>=2026.4"],
        "s3": ["s3fs>=2026.4"],
        "wandb": ["wandb>=0.22"],
        "trackio": ["trackio>=0.5"],
        "mlflow": ["mlflow>=3.0"],
        "energy": ["codecarbon>=3.3"],
        "eval": ["lm-eval>=0.4.13"],
        "backtranslation": ["rouge-score>=0.1.2", "sacrebleu>=2.6"],
        "demo": ["gradio>=6.31", "scikit-learn>=1.9"],
        "dev": [
            "beartype~=0.23.1",
            "codecarbon>=3.3",
            "hypothesis>=6.130",
            "lm-eval[hf]>=0.4.13",
            "mypy~=2.4.1",
            "peft>=0.19",
            "pre-commit>=4.0",
            "pytest>=8.4",
            "pytest-xdist>=3.6",
            "rouge-score>=0.1.2",
            "ruff~=0.17.6",
            "sacrebleu>=2.6",
            "torch>=2.9,<3",
        ],
    },
)
