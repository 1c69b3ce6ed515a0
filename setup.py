"""Packaging of incr_ds; tested versions of every dependency are in constraints.txt."""

from setuptools import find_packages, setup

REQUIRES = [
    "torch>=2.10",
    "transformers>=5.0,<6",
    "sentencepiece",  # tokenizer.model files of published models, for generate and verify
    "numpy",
    "packaging",
    "safetensors",
    "pydantic>=2.10",
    "typing_extensions>=4.12",
    "PyYAML",
    "typer",
    "rich",
    "xxhash",
    "psutil",
    "isal",
]
# What a training run, its data and figures need beyond it, and what data preparation needs for some kinds of files. Both are
# named in incr_ds/launch/packages.py, too.
TRAIN = [
    "deepspeed>=0.19.8,<0.20",
    "megatron-core==0.16.1",
    "matplotlib",
    "tensorboard",
]
DATA = ["pyarrow>=18", "zstandard>=0.22"]
LIGER = "liger-kernel>=0.8"
EVAL = "lm-eval>=0.4.13"  # tasks for tools/evaluate.py
WANDB = "wandb>=0.31"  # the key wandb of a run file
DEV = [
    "pytest",
    "pytest-xdist",
    "pytest-timeout",
    "hypothesis",
    "atheris; sys_platform == 'linux' and platform_machine == 'x86_64'",  # fuzzing in make faults
    "ruff",
    "mypy",
    "types-PyYAML",
    "types-psutil",
    "accelerate",
    "triton",
    "playwright",  # drives a Chromium, if the machine has one
    LIGER,
    EVAL,
    WANDB,
]

# Each runs incr_ds.cli.MODULE; tools/MODULE.py is the same command, by its path.
COMMANDS = {
    "incr-prepare-data": "prepare_data",
    "incr-inspect": "inspect_checkpoint",
    "incr-grow": "grow_checkpoint",
    "incr-fit-growth": "fit_growth",
    "incr-verify": "verify_checkpoint",
    "incr-export": "export_huggingface",
    "incr-generate": "generate",
    "incr-evaluate": "evaluate",
    "incr-cache-teacher": "cache_teacher",
    "incr-growth-study": "growth_study",
    "incr-plan-growth": "plan_growth",
    "incr-report": "report",
    "incr-study-text": "study_text",
    "incr-doctor": "doctor",
    "incr-write-sbatch": "write_sbatch",
}

setup(
    name="incr_ds",
    version="0.1.0",
    description="Grow a trained language model into a larger one and continue pre-training it under DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["incr_ds", "incr_ds.*"]),
    package_data={
        "incr_ds.arch": ["families/*.yaml", "families/mixtures/*.yaml"],
        "incr_ds.sharding": ["frameworks/*.yaml"],
        "incr_ds.growth": ["published.yaml"],
        "incr_ds.study": ["evidence.yaml"],
        "incr_ds.launch": ["pretrain_body.sh"],
        "incr_ds.offline": ["sentences.txt"],
        "incr_ds.config": ["*.yaml"],
        "incr_ds": ["py.typed"],
        "incr_ds.kernels": ["*.cu", "*.cuh"],
    },
    install_requires=REQUIRES,
    extras_require={
        "train": TRAIN,
        "data": DATA,
        "dev": DEV,
        "liger": [LIGER],
        "eval": [EVAL],
        "wandb": [WANDB],
    },
    entry_points={"console_scripts": [f"{name} = incr_ds.cli.{module}:main" for name, module in COMMANDS.items()]},
)
