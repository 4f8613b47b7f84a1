"""Models on the Hugging Face hub: hf:OWNER/NAME, or hf:OWNER/NAME@REVISION."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpm.errors import InputError
from ddpm.files.images import one_line

PREFIX = "hf:"


def is_name(path: str | Path) -> bool:
    """Whether `path` is a name on the hub.

    >>> is_name("hf:google/ddpm-cifar10-32"), is_name("runs/digits")
    (True, False)
    """
    return str(path).startswith(PREFIX)


def fetch(name: str) -> Path:
    """The model as a file (one of ours) or a folder (of diffusers) in the hub's cache; fetched where it is not there.

    Without a network it is what the cache has. Raises InputError, one line, where there is nothing.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    with _told(name, "the hub cannot be reached, and the cache has nothing of it"):
        try:
            about = HfApi().model_info(repo, revision=revision or None, timeout=10)
        except (HfHubHTTPError, HFValidationError):  # the hub has answered, or was not asked
            raise
        except Exception:
            folder = Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
        else:
            safe = any(file.rfilename.endswith(".safetensors") for file in about.siblings or [])
            weights = "*.safetensors" if safe else "*.bin"
            folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=["*.json", weights]))
    files = [] if (folder / "config.json").exists() or (folder / "unet").exists() else [*folder.glob("*.safetensors")]
    return files[0] if len(files) == 1 else folder


def create(name: str) -> None:
    """Make the model's place, if it is not there; before the work, since it needs the hub and one's leave.

    Raises InputError, one line, where the hub cannot be reached or does not let one.
    """
    from huggingface_hub import HfApi

    with _told(name, "the hub cannot be reached"):
        HfApi().create_repo(name.removeprefix(PREFIX), exist_ok=True)


def push(folder: Path, name: str, message: str) -> str:
    """Put the files of `folder` into the place that `create` made; its address. Raises what `create` raises."""
    from huggingface_hub import HfApi

    repo = name.removeprefix(PREFIX)
    with _told(name, "the hub cannot be reached"):
        HfApi().upload_folder(folder_path=folder, repo_id=repo, commit_message=message)
    return f"{HfApi().endpoint}/{repo}"


@contextmanager
def _told(name: str, unreachable: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError:
        raise InputError(f"{name}: want hf:OWNER/NAME, or hf:OWNER/NAME@REVISION") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise InputError(f"{name}: no such model on the hub, or not for you: `hf auth login`") from None
    except LocalTokenNotFoundError:
        raise InputError(f"{name}: the hub does not know you; want `hf auth login` first") from None
    except HfHubHTTPError as fault:
        raise InputError(f"{name}: the hub refuses ({one_line(fault)})") from fault
    except Exception as fault:
        raise InputError(f"{name}: {unreachable}") from fault
