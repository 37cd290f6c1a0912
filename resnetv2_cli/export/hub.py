"""Upload to a hub, which needs the extra ``hub`` and a network connection."""

from pathlib import Path

from resnetv2_cli.errors import UserError


def check_package() -> None:
    """Check that the package of the extra ``hub`` is installed.

    Raises:
        UserError: it is not.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            "--push needs the package huggingface_hub", "pip install 'resnetv2-cli[hub]'"
        ) from None


def push(repository: str, file: Path, card: Path) -> str:
    """Upload a file, and its card as the repository's README.md; return the repository's URL.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        url = api.create_repo(repository, exist_ok=True)
        for path, name in ((file, file.name), (card, "README.md")):
            api.upload_file(path_or_fileobj=path, path_in_repo=name, repo_id=repository)
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError, ValueError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        hint = f"{file} is kept; log in with: hf auth login"
        raise UserError(f"cannot upload to {repository}: {line}", hint) from None
    return str(url)
