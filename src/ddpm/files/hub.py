"""Models on the Hugging Face hub, named hf:OWNER/NAME or hf:OWNER/NAME@REVISION."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpm.errors import InputError, brief

PREFIX = "hf:"


def is_name(path: str | Path) -> bool:
    """Whether `path` names a model on the hub.

    >>> is_name("hf:google/ddpm-cifar10-32"), is_name("runs/digits")
    (True, False)
    """
    return str(path).startswith(PREFIX)


def fetch(name: str) -> Path:
    """The path of the model in the hub's cache, downloaded if it is new: a file of ours or a diffusers folder.

    Without a network, the cached model is taken. Raises InputError if there is none.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    with _errors_named(name, "the hub cannot be reached, and the cache does not have the model"):
        try:
            about = HfApi().model_info(repo, revision=revision or None, timeout=10)
        except (HfHubHTTPError, HFValidationError):  # the hub answered with an error, or the name is not valid
            raise
        except Exception:  # no network
            folder = Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
        else:
            safe = any(file.rfilename.endswith(".safetensors") for file in about.siblings or [])
            weights = "*.safetensors" if safe else "*.bin"
            folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=["*.json", weights]))
    is_diffusers = (folder / "config.json").exists() or (folder / "unet").exists()
    files = [] if is_diffusers else [*folder.glob("*.safetensors")]
    return files[0] if len(files) == 1 else folder


def create(name: str) -> None:
    """Create the model's repository if it does not exist. Call this before the work: it needs a network and a login.

    Raises InputError if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    with _errors_named(name, "the hub cannot be reached"):
        HfApi().create_repo(name.removeprefix(PREFIX), exist_ok=True)


def push(folder: Path, name: str, message: str) -> str:
    """Upload the files of `folder` to the repository that `create` made, and return its address.

    `message` is that of the commit. Raises InputError as `create` does.
    """
    from huggingface_hub import HfApi

    repo = name.removeprefix(PREFIX)
    with _errors_named(name, "the hub cannot be reached"):
        HfApi().upload_folder(folder_path=folder, repo_id=repo, commit_message=message)
    return f"{HfApi().endpoint}/{repo}"


@contextmanager
def _errors_named(name: str, unreachable: str) -> Iterator[None]:
    """Turn errors of the hub into an InputError of one line that begins with `name`."""
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
        raise InputError(f"{name}: no such model on the hub, or a private one, which needs `hf auth login`") from None
    except LocalTokenNotFoundError:
        raise InputError(f"{name}: you are not logged in to the hub; run `hf auth login` first") from None
    except HfHubHTTPError as fault:
        raise InputError(f"{name}: the hub refuses ({brief(fault)})") from fault
    except Exception as fault:
        raise InputError(f"{name}: {unreachable}") from fault
