"""Prints what a bug report needs: versions, platform and devices; no path, no name of this machine, no credential."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from flip_hf import __version__
from flip_hf.console.parsers import ScriptParser
from flip_hf.redaction import install

# Those of pyproject.toml that decide what is computed, and what else a run may use.
PACKAGES = (
    *("torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "huggingface_hub"),
    *(
        "numpy",
        "pillow",
        "simplejpeg",
        "pyarrow",
        "scikit-learn",
        "evaluate",
        "torchvision",
        "deepspeed",
        "open_clip_torch",
    ),
    *("torchao", "peft", "gradio"),
)


def make_parser() -> ScriptParser:
    """The command's options: none."""
    return ScriptParser(prog="flip-hf env", description="Prints the versions and the hardware that a bug report needs.")


def installed(package: str) -> str:
    """The version of a package that is installed, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def facts() -> dict[str, str]:
    """Everything that is printed, by its name."""
    import torch

    from flip_hf.training.hardware import device_name

    found = {
        "flip_hf": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": f"{platform.system()} {platform.release()}, {platform.machine()}",
        **{package: installed(package) for package in PACKAGES},
        "processor": f"{device_name('cpu')}; torch uses {torch.get_num_threads()} threads",
        "CUDA": _cuda(),
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"GPU {index}"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    return found


def _cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return f"this torch is built without it{', for ROCm' if torch.version.hip else ''}"
    state = f"cuDNN {torch.backends.cudnn.version()}" if torch.cuda.is_available() else "no device that can be used"
    return f"{torch.version.cuda}, {state}"


def main(argv: Sequence[str]) -> None:
    """Prints a fact a line, in Markdown, as an issue takes it."""
    install()
    make_parser().parse_args(argv)
    for name, value in facts().items():
        print(f"- {name}: {value}")
