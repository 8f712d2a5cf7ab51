"""The Hugging Face hub, with its failures said in one line."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from autointerp.errors import InputError


@lru_cache
def snapshot(repo: str, patterns: tuple[str, ...], option: str) -> Path:
    """Folder of the files of a hub repository that match `patterns`, downloaded unless they are in the cache.

    `option` is the flag that named it. InputError where the repository is not to be had; at once, without retries.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"{option} {repo}: no such folder here, and not to be had from the hub ({reason.rstrip('.')});"
            f" give --{option} an existing path"
        ) from error
