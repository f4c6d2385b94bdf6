"""The Hugging Face Hub: files fetched through its cache and pushed to it; nothing here knows encoders.

The library reads HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME itself, when it is imported; no
telemetry is sent by this package. Encoders have methods of their own in place of the library's ModelHubMixin: as a base
class it would be needed to import this package, and it rebuilds a model from the arguments of its constructor, while
ours is rebuilt from names, and its backbone, of which only the hash is saved, is checked.
"""

import re
from pathlib import Path
from typing import Any

from featsharp.errors import CheckpointError, MissingDependencyError, first_line

INSTALL = 'pip install "featsharp[hub]"'
# Of a repository that holds a sharp encoder.
WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"


def fetch_file(repository: str, name: str, **options: Any) -> Path:
    """Fetch a file of a repository into the cache of the Hub, or offline find it there; a part of one is not used.

    Args:
        repository: "owner/name".
        name: Of the file in it.
        options: Of ``huggingface_hub.hf_hub_download``: revision, token, cache_dir, force_download, local_files_only.

    Raises:
        MissingDependencyError: Without huggingface_hub.
        CheckpointError: When it cannot be had, with the reason.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise CheckpointError(
            f"there is no folder {repository}; give one that save_pretrained wrote, or 'owner/name' of the Hub"
        )
    library = _library()
    try:
        return Path(library.hf_hub_download(repository, name, **options))
    except Exception as error:  # of the library and its transport, which has changed
        hint = (
            "HF_HUB_OFFLINE is set and the file is not in the cache" if library.constants.HF_HUB_OFFLINE else
            "check the name, the network and, for a private repository, the token"
        )  # fmt: skip
        raise CheckpointError(
            f"cannot fetch {name} of {repository} from the Hub ({first_line(error)}), and there is no folder of that "
            f"name; {hint}"
        ) from error


def find_file(repository: str, name: str, revision: str = "main") -> Path | None:
    """Find a file of a repository in the cache of the Hub, without a network; None where it is not there."""
    path = _library().try_to_load_from_cache(repository, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


def push_folder(folder: Path, repository: str, *, message: str, private: bool | None, token: str | None) -> str:
    """Push the files of a folder to a repository, in one commit; it is made where it does not exist.

    Returns:
        The address of the commit.

    Raises:
        MissingDependencyError: Without huggingface_hub.
        CheckpointError: When that fails, or the Hub is switched off by HF_HUB_OFFLINE.
    """
    library = _library()
    try:
        api = library.HfApi(token=token, library_name="featsharp")
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message))
    except Exception as error:  # of the library and its transport, which has changed
        hint = (
            "HF_HUB_OFFLINE is set" if library.constants.HF_HUB_OFFLINE else
            "check the name, the network and the token (hf auth login)"
        )  # fmt: skip
        raise CheckpointError(f"cannot push to {repository} on the Hub ({first_line(error)}); {hint}") from error


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(f"the Hub needs huggingface_hub ({error}); run: {INSTALL}") from error
    return huggingface_hub
