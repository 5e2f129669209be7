"""Packaging of flowrl: four import packages, the shipped configs and the small models in the box."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "flowrl" / "__init__.py").read_text(), re.MULTILINE)[1]

PACKAGES = ("flowrl", "samplers", "reward_models", "benchmarks")
EXTRAS = {
    "tracking": ["tensorboard>=2.15", "wandb>=0.17"],
    "hub": ["datasets>=2.20", "sentencepiece>=0.2", "protobuf>=4"],  # hub prompt sets; slow T5 tokenizers
    "quant": ["bitsandbytes>=0.45"],  # int8 and nf4 weights, 8-bit AdamW
    "xformers": ["xformers"],
    "ocr": ["rapidocr>=3.10", "onnxruntime>=1.17", "rapidfuzz>=3.0"],  # its wheel holds the models
    "clip": ["open_clip_torch>=2.32", "timm>=1.0.17", "torchvision"],  # HPSv2, DINO
    "serve": ["fastapi>=0.110", "uvicorn>=0.27"],  # flowrl serve
    "hpsv2": ["hpsv2>=1.2"],  # pins pytest==7.2.0: cannot be installed together with [test]
    "notebook": ["ipykernel>=6", "nbclient>=0.8", "nbformat>=5"],
}
EXTRAS["test"] = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6.80",
    "setuptools>=77",
    *EXTRAS["notebook"],
    *EXTRAS["ocr"],
    *EXTRAS["serve"],
]
EXTRAS["dev"] = [*EXTRAS["test"], "ruff>=0.8", "mypy>=1.11", "pre-commit>=3", "types-PyYAML"]
EXTRAS["all"] = [*EXTRAS["tracking"], *EXTRAS["hub"], *EXTRAS["quant"], *EXTRAS["ocr"], *EXTRAS["serve"]]

setup(
    name="flowrl",
    version=VERSION,
    description="Align text-to-image diffusion and flow models with rewards",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=[f"{name}{rest}" for name in PACKAGES for rest in ("", ".*")]), "flowrl.configs"],
    package_dir={"flowrl.configs": "configs"},  # configs/ installs as flowrl/configs
    package_data={
        "flowrl.configs": ["**/*.yaml", "servers/*.txt"],
        "flowrl": ["models/**/*", "templates/*"],
        "reward_models.judges": ["templates/*"],
        "": ["py.typed"],
    },
    include_package_data=False,
    entry_points={"console_scripts": ["flowrl = flowrl.cli:main"]},
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.35",
        "transformers>=4.57",
        "accelerate>=1.0",
        "peft>=0.17",
        "open_clip_torch>=2.32",  # brings torchvision
        "timm>=1.0.17",
        "safetensors>=0.4",
        "numpy>=1.26",
        "pillow>=10",
        "scipy>=1.11",
        "pydantic>=2.7",
        "httpx>=0.27",
        "PyYAML>=6.0",
        "typer>=0.12",
        "rich>=13",
        "jinja2>=3.1",
        "matplotlib>=3.8",
    ],
    extras_require=EXTRAS,
)
