"""Models on the hub, through huggingface_hub: its cache, its token, its offline mode; errors that say what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_vae.convert.tensors import CheckpointError


def list_files(repo_id: str, revision: str | None, cached_as: tuple[str, ...]) -> list[str]:
    """The names of the files of a model; without a network, of those in the cache, if it has one of `cached_as`."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    with _sentences(repo_id, revision):
        try:
            return [file.rfilename for file in HfApi().model_info(repo_id, revision=revision).siblings or []]
        except HfHubHTTPError:
            raise
        except (_connection_error(), OSError):
            for name in cached_as:
                if isinstance(path := try_to_load_from_cache(repo_id, name, revision=revision), str):
                    folder = Path(path.removesuffix(name))
                    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
            raise


def download(repo_id: str, revision: str | None, names: list[str]) -> Path:
    """The folder with those files, fetched unless they are in the cache already."""
    from huggingface_hub import snapshot_download

    with _sentences(repo_id, revision):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=names))


def upload(repo_id: str, folder: Path) -> str:
    """Uploads a model folder, makes the repository where there is none, and returns its address."""
    from huggingface_hub import HfApi

    with _sentences(repo_id, None):
        url = HfApi().create_repo(repo_id, exist_ok=True)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload an MLX autoencoder")
        return str(url)


def _connection_error() -> type[Exception]:
    """The base of the errors of whichever HTTP client huggingface_hub uses: requests or httpx."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


@contextmanager
def _sentences(repo_id: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import constants, errors

    where = f"{repo_id} on {constants.ENDPOINT}"
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{where}: access is granted on request. Ask for it at {constants.ENDPOINT}/{repo_id}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{where}: no such model, or a private one (and no folder or file {repo_id} here). "
            "Check the name; for a private model log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{where}: no revision {revision}. Check the branch, tag or commit") from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo_id}: not the name of a model on the hub ({error})") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        hint = "Log in with `hf auth login`" if status in (401, 403) else "Try again later"
        raise CheckpointError(f"{where}: the hub answered {status}. {hint}") from None
    except errors.OfflineModeIsEnabled:
        raise CheckpointError(f"{where}: not in the cache, and HF_HUB_OFFLINE forbids to fetch it. Unset it") from None
    except (_connection_error(), OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CheckpointError(
                f"{where}: no space left in {constants.HF_HUB_CACHE}. Free some, or set HF_HOME to another disk"
            ) from None
        raise CheckpointError(
            f"{where}: not in the cache, and the hub can't be reached ({type(error).__name__}). "
            "Check the network and try again"
        ) from None
