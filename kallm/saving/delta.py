"""What a delta's folder holds: ``kallm.json``, which carries its own hash, and one safetensors file that it names."""

import hashlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kallm.errors import DataMismatch, WrongConfiguration
from kallm.kan.spec import FFNSpec
from kallm.store.local import naming_disk_errors
from kallm.store.sealed import unseal

__all__ = [
    "NOTE",
    "Base",
    "Delta",
    "Group",
    "check_tensors",
    "describe_tensor",
    "file_sha256",
    "let_read_",
    "read_delta",
    "read_tensors",
]

NOTE = "kallm.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Group(_Frozen):
    """FFNs of one description."""

    spec: FFNSpec
    width: int
    names: tuple[str, ...]


class Base(_Frozen):
    """The model that the delta belongs to: its class, and a hash of all its tensors that the delta does not hold."""

    architecture: str
    name: str
    sha256: str


class Delta(_Frozen):
    """``kallm.json``."""

    format: Literal[1] = 1
    kallm: str
    base: Base
    ffns: tuple[Group, ...]
    trained: tuple[str, ...] = Field(description="tensors of the base that the delta holds too")
    untied: bool = Field(description="whether the head is a tensor of its own where the base model's is the embedding")
    weights: str = Field(pattern=r"^weights-[0-9a-f]{12}\.safetensors$")
    weights_sha256: str


def let_read_(weights: Path, folder: Path) -> None:
    """Let those read a file of weights who may read a folder; safetensors lets its owner alone."""
    weights.chmod(stat.S_IMODE(folder.stat().st_mode) & 0o666)


def read_delta(folder: Path) -> Delta:
    """Read what a folder's note says.

    Raises:
        WrongConfiguration: there is none.
        DataMismatch: it is damaged, or of another format.
    """
    path = folder / NOTE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WrongConfiguration(f"'{folder}' holds no delta: {NOTE} cannot be read ({error.strerror})") from error
    try:
        return Delta.model_validate(unseal(data, str(path)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise DataMismatch(f"{path} is no delta that this version reads: {where}: {first['msg']}") from error


def read_tensors(path: Path, delta: Delta) -> dict[str, Tensor]:
    """Read the file that the note names.

    Raises:
        DataMismatch: it is missing, or its bytes are not the ones that the note names.
    """
    if not path.is_file():
        raise DataMismatch(f"{path} is missing, but {NOTE} names it: copy the whole folder again")
    if file_sha256(path) != delta.weights_sha256:
        raise DataMismatch(f"{path} is damaged: its SHA-256 is not the one that {NOTE} names; copy it again")
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataMismatch(f"{path} is no safetensors file: {error}") from error


def check_tensors(loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Compare names, shapes and dtypes.

    Raises:
        DataMismatch: they differ; the message names the first that do.
    """
    if loaded.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - loaded.keys()), sorted(loaded.keys() - expected.keys())
        told = [f"{name} is missing" for name in missing[:2]] + [f"{name} is left over" for name in extra[:2]]
        raise DataMismatch(f"{path} holds other tensors than {NOTE} describes: {', '.join(told)}")
    for name, tensor in loaded.items():
        wanted = expected[name]
        if (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
            raise DataMismatch(
                f"{path}: {name} was expected to be {describe_tensor(wanted)}, but is {describe_tensor(tensor)}; "
                "load the base model in the dtype that the delta was saved in"
            )


def describe_tensor(tensor: Tensor) -> str:
    """Return a tensor's dtype and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with naming_disk_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
