"""The files that ``--config`` reads: where the tool's own are, and how one is read."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from resnetv2_cli import plans
from resnetv2_cli.errors import UserError, shown, unknown
from resnetv2_cli.settings import renewed
from resnetv2_cli.weightfile import find, sha256

_PACKAGED = Path(__file__).parent / "configs"  # in a wheel; a checkout has it beside the package
CONFIGS = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parent.parent / "configs"

Made = TypeVar("Made")

LARGEST = 100_000  # bytes of a config
NOT_YAML = (  # what PyYAML raises: a tag such as !!bool fails on a bad value as Python does
    yaml.YAMLError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file; a bare name is looked for in ``configs/`` too.

    Raises:
        UserError: the file is missing, too large, not UTF-8, not YAML, or not a mapping.
    """
    candidates = [path, CONFIGS / path, CONFIGS / f"{path}.yaml"]
    found = next((p for p in candidates if p.is_file()), None)
    if found is None:
        known = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
        raise unknown("config file", str(path), known)
    if found.stat().st_size > LARGEST:
        raise UserError(f"{path} is too large for a config", f"they have at most {LARGEST:,} bytes")
    try:
        given = yaml.safe_load(found.read_text(encoding="utf-8"))
    except NOT_YAML as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path} is not YAML: {line}", "one 'key: value' per line") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise UserError(f"{path} holds no keys", "one 'key: value' per line")
    return given


def asked_for(
    path: Path | str | None, overrides: Mapping[str, Any], known: Iterable[str]
) -> dict[str, Any]:
    """The settings of a file and of ``overrides``, which win over it.

    ``known``: the names of all settings; ``layout`` stands for the settings of its row.

    Raises:
        UserError: the file is missing or not a YAML mapping, or has a key that is no setting; or
            the length of the training is given twice; or the weights do not have the SHA-256
            that is asked for.
    """
    given = renewed(read_yaml(Path(path))) if path else {}
    known = ["layout", *known]
    for key in given:
        if key not in known:
            raise unknown("key", key, known, where=f"{path}: ")
    if "epochs" in overrides and "steps" in overrides:
        raise UserError("--steps and --epochs are both given", "give one of them")
    for one, other in (("epochs", "steps"), ("steps", "epochs")):
        if one in overrides:
            given.pop(other, None)
    if "weights" in overrides and given.get("weights"):  # a SHA-256 alone says what they must be
        given.pop("weights_sha256", None)
    try:
        given = plans.laid_out(given)
    except UserError as error:
        raise UserError(f"{path}: {error}", error.hint) from None
    asked = given | plans.laid_out(overrides)
    if "weights" in overrides:
        refuse_other_weights(asked["weights"], asked.get("weights_sha256"))
    return asked


def refuse_other_weights(weights: object, wanted: object) -> None:
    """Refuse weights that do not have the SHA-256 that is wanted, if one is.

    Raises:
        UserError: the file is missing, or its SHA-256 is another.
    """
    if wanted and weights and sha256(find(Path(str(weights)))) != wanted:
        hint = f"name the file whose SHA-256 is {shown(wanted)}, or leave weights_sha256 out"
        raise UserError(f"{weights} is not what weights_sha256 asks for", hint)


def made(
    kind: Callable[..., Made],
    path: Path | str | None,
    overrides: Mapping[str, Any],
    known: Iterable[str],
) -> Made:
    """``kind``, built from the settings of a file and of ``overrides``.

    Raises:
        UserError: a setting is wrong; the message names the file if it is wrong without the
            overrides too.
    """
    known = list(known)
    given = asked_for(path, overrides, known)
    try:
        return kind(**given)
    except UserError as error:
        if path and str(error) == mistake(kind, asked_for(path, {}, known)):
            raise UserError(f"{path}: {error}", error.hint) from None
        raise


def mistake(kind: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """The message of what is wrong with some settings; empty if nothing is."""
    try:
        kind(**given)
    except UserError as error:
        return str(error)
    return ""
