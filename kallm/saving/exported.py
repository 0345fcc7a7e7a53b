"""A retrofitted model as a folder that transformers opens where KALLM is not installed.

The folder holds one file of code, ``modeling_kallm.py``, made of KALLM's own definitions (see ``bundle.py``): the same
lines compute the same bits. A model without FFNs of ours is saved as transformers saves it, without code.
"""

import copy
import importlib.metadata
import os
import sys
import tempfile
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kallm.errors import WrongConfiguration
from kallm.saving.bundle import Origin, bundle
from kallm.saving.delta import let_read_
from kallm.saving.replaced import Replaced, find_replaced, group_replaced
from kallm.store.local import naming_disk_errors

__all__ = ["export", "render_modeling"]

_MODULE = "modeling_kallm"
_STANDALONE = "kallm.saving.standalone"
_SUBSTITUTES: dict[Origin, Origin] = {
    ("kallm.kan.layerspec", "Spec"): (_STANDALONE, "Spec"),
    ("pydantic", "Field"): (_STANDALONE, "Field"),
    ("kallm.errors", "WrongConfiguration"): (_STANDALONE, "WrongConfiguration"),
}
_REGISTRIES = ("BASES", "BASIS_SETTINGS", "FFNS", "SQUASHES")

_HEAD = '''"""{base} with other modules in the place of {count} of its FFNs; written by KALLM {version}.

``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` opens it; it needs torch and transformers only.
Annotations like ``Float[Tensor, "N D"]`` tell the dtype and the shape of a tensor and are never evaluated.
"""

from __future__ import annotations

'''
_TAIL = '''

class Kallm{config}({config}):
    """{config}, and in ``kallm`` which modules stand in the place of which FFNs."""

    model_type = "kallm_{model_type}"


class Kallm{base}({base}):
    """{base} with the FFNs that its config names replaced."""

    config_class = Kallm{config}

    def __init__(self, config: Kallm{config}) -> None:
        super().__init__(config)
        put_ffns_(self, config.kallm, {specs}, FFNS, put_ffn_)
'''


def export(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
) -> Path:
    """Write a model into a new folder that ``from_pretrained(folder, trust_remote_code=True)`` opens without KALLM.

    It then computes the same bits as the model does in the dtype that it was loaded in; ``model.to(torch.bfloat16)``
    also rounds what no folder holds, such as rotary frequencies.

    Args:
        model: a causal LM of transformers, retrofitted or not; it stays as it is.
        folder: is made; it appears when it is whole.
        tokenizer: written beside the weights.
        card: the text of ``README.md``.

    Returns:
        The folder.

    Raises:
        WrongConfiguration: the folder is not empty, or the model is wrapped, quantised, of mixed dtypes, or not of a
            class that transformers has.
        StorageUnavailable: the disk does not take it.
    """
    target = Path(folder).absolute()
    _check(model, target)
    found = find_replaced(model)
    with naming_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
            whole = Path(temporary) / target.name
            whole.mkdir()
            _write(model, found, whole)
            for file in whole.glob("*.safetensors"):
                let_read_(file, whole)
            if tokenizer is not None:
                tokenizer.save_pretrained(whole)
            if card is not None:
                (whole / "README.md").write_text(card)
            os.rename(whole, target)
    return target


def render_modeling(model: PreTrainedModel, found: list[Replaced]) -> str:
    """Return the code of an exported model: its base class's name, and the definitions that its FFNs need."""
    words = set(_words(group_replaced(found)))
    kinds = {each.spec.ffn: type(each.spec) for each in found}
    base, config = type(model).__name__, type(model.config).__name__
    names = {
        "base": base,
        "config": config,
        "model_type": model.config.model_type,
        "count": len(found),
        "version": importlib.metadata.version("kallm"),
        "specs": "{" + ", ".join(f'"{name}": {kind.__name__}' for name, kind in sorted(kinds.items())) + "}",
    }
    definitions = bundle(
        [
            (_STANDALONE, "put_ffns_"),
            ("kallm.model.places", "put_ffn_"),
            *((kind.__module__, kind.__name__) for kind in kinds.values()),
            ("kallm.kan.ffns", "FFNS"),
        ],
        substitutes=_SUBSTITUTES,
        registries=dict.fromkeys(_REGISTRIES, words),
        extra_imports={base: ("transformers", base), config: ("transformers", config)},
    )
    return _HEAD.format(**names) + definitions + _TAIL.format(**names)


def _check(model: PreTrainedModel, target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WrongConfiguration(f"'{target}' is there already: name a folder that is new or empty")
    kind, config = type(model), type(model.config)
    for each in (kind, config):
        if not each.__module__.startswith("transformers.") or getattr(transformers, each.__name__, None) is not each:
            raise WrongConfiguration(
                f"expected a model of a class that transformers has, but this is a {each.__module__}.{each.__name__}; "
                "if an adapter wraps it, merge it first (merge_and_unload)"
            )
    if getattr(model, "hf_quantizer", None) is not None:
        raise WrongConfiguration("a quantised model cannot be exported: load it without quantization_config")
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    if len(dtypes) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise WrongConfiguration(f"the model holds {names}, but a folder has one dtype: model.to(…) one of them first")


def _write(model: PreTrainedModel, found: list[Replaced], folder: Path) -> None:
    """Write code, config and weights: through the class that will read them, so that the names are its own."""
    tied = _is_tied(model)
    if not found:
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings = tied
        _save_as(type(model), config, model, folder)
        return
    code = render_modeling(model, found)
    (folder / f"{_MODULE}.py").write_text(code)
    with _executed(code) as module:
        kind, config_kind = module[f"Kallm{type(model).__name__}"], module[f"Kallm{type(model.config).__name__}"]
        told = {
            key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "model_type")
        }
        config = config_kind(**{**told, "tie_word_embeddings": tied, "kallm": group_replaced(found)})
        config.auto_map = {
            "AutoConfig": f"{_MODULE}.{config_kind.__name__}",
            "AutoModelForCausalLM": f"{_MODULE}.{kind.__name__}",
        }
        _save_as(kind, config, model, folder)


def _save_as(kind: Any, config: PreTrainedConfig, model: PreTrainedModel, folder: Path) -> None:
    with torch.device("meta"):
        shell = kind(config)
    shell.load_state_dict(model.state_dict(), assign=True)
    shell.generation_config = model.generation_config
    shell.save_pretrained(folder)


def _is_tied(model: PreTrainedModel) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


@contextmanager
def _executed(code: str) -> Iterator[dict[str, Any]]:
    """Execute the code as a module that is there for the block; dataclasses look their module up."""
    module = types.ModuleType(f"_{_MODULE}_{id(code)}")
    sys.modules[module.__name__] = module
    try:
        exec(compile(code, f"{_MODULE}.py", "exec"), vars(module))
        yield vars(module)
    finally:
        del sys.modules[module.__name__]


def _words(value: Any) -> Iterable[str]:
    """Yield every text in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _words(each)
    elif isinstance(value, list):
        for each in value:
            yield from _words(each)
