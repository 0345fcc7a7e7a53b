"""Exported folders, opened by a process in which KALLM cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer
from kan_examples import EXAMPLES, MIX

from kallm.errors import WrongConfiguration
from kallm.model.places import find_ffns
from kallm.model.retrofit import RetrofitConfig, retrofit_
from kallm.saving.exported import export

KAN = {"ffn": "kan", "basis": "chebyshev2", "degree": 2}
FFNS: dict[str, dict[str, Any]] = {
    **{f"kan-{name}": {"ffn": "kan", "basis": name, **sizes, "hidden": 8} for name, sizes in EXAMPLES.items()},
    "kan": KAN,
    "kan-stored": {**KAN, "hidden": 20, "constants": "stored"},
    "kan-learned": {**KAN, "scale": "learned", "squash": "algebraic"},
    "kan-parallel": {"ffn": "kan", **MIX, "hidden": 20},
    "kan-sequential": {"ffn": "kan", "layers": [{**MIX}, {"basis": "fourier", "degree": 2}], "squash": "none"},
    "kan-single": {"ffn": "kan", "layers": [{"basis": "hermite", "degree": 3}]},
    "kat": {"ffn": "kat", "hidden": 24},
    "swiglu": {"ffn": "swiglu"},
    "mlp-gelu": {"ffn": "mlp", "hidden": 10},
    "mlp-silu": {"ffn": "mlp", "hidden": 10, "activation": "silu"},
    "mlp-relu": {"ffn": "mlp", "hidden": 10, "activation": "relu"},
    "affine": {"ffn": "affine"},
    "removed": {"ffn": "removed"},
}
SMALL = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
OTHERS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **SMALL),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, **SMALL
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, **SMALL,
    ),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32,
        max_position_embeddings=64, **SMALL,
    ),
}  # fmt: skip
IDS = torch.arange(3, 33)[None]

OPEN = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("kallm", "jaxtyping", "beartype", "pydantic"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)
ids = torch.arange(3, 33)[None]
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(ids).logits
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    model.train()(ids, labels=ids).loss.backward()
    torch.save({"logits": logits, "text": text}, f"{folder}.pt")
    print(json.dumps({
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "no_gradient": [name for name, p in model.named_parameters() if p.grad is None],
        "modules": sorted(name for name in sys.modules if name.partition(".")[0] == "kallm"),
    }))
"""


def open_elsewhere(folders: list[Path], cache: Path) -> list[dict[str, Any]]:
    """Open exported folders in a process of their own; return what it tells of each."""
    command = [sys.executable, "-I", "-c", OPEN, *map(str, folders)]
    environment = os.environ | {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def make_other(name: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(OTHERS[name]()).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every kind of ffn on a tiny Llama, and one on other architectures; the head of one is its own."""
    found: dict[str, Any] = {}
    for name, spec in FFNS.items():
        found[name] = make_model(num_hidden_layers=2)
        retrofit_(found[name], RetrofitConfig(ffn=spec, layers="last:1"))
    for name in OTHERS:
        found[name] = make_other(name)
        retrofit_(found[name], RetrofitConfig(ffn=KAN, layers="last:2"))
    found["untied"] = make_model(num_hidden_layers=2)
    retrofit_(found["untied"], RetrofitConfig(ffn=KAN, layers="last:1"))
    head = torch.nn.Linear(48, 259, bias=False)
    found["untied"].set_output_embeddings(head)
    found["pretrained"] = make_model(num_hidden_layers=2)
    found["several"] = make_model()
    retrofit_(found["several"], RetrofitConfig(ffn=KAN, layers="last:2"))
    retrofit_(found["several"], RetrofitConfig(ffn={"ffn": "kat", "hidden": 24}, layers=(0,)))
    # as from_pretrained gives it: a plain .to(bfloat16) rounds the rotary frequencies too, which no folder keeps
    make_model(num_hidden_layers=2).save_pretrained(folder := tmp_path_factory.mktemp("bf16"))
    found["bf16"] = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    retrofit_(found["bf16"], RetrofitConfig(ffn=KAN, layers="last:1"))
    return found


@pytest.fixture(scope="module")
def opened(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All models exported and opened elsewhere, in one process: for each, its folder and what was told of it."""
    place = tmp_path_factory.mktemp("exported")
    folders = [export(model, place / name) for name, model in models.items()]
    told = open_elsewhere(folders, tmp_path_factory.mktemp("modules"))
    return {name: (folder, each) for name, folder, each in zip(models, folders, told, strict=True)}


NAMES = [*FFNS, *OTHERS, "untied", "pretrained", "several", "bf16"]


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_model_computes_the_same_bits_without_kallm(
    name: str, models: dict[str, Any], opened: dict[str, Any]
) -> None:
    model, (folder, told) = models[name], opened[name]
    found = torch.load(f"{folder}.pt")
    with torch.no_grad():
        assert torch.equal(found["logits"], model(IDS).logits)
    text = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    assert torch.equal(found["text"], text)
    assert told["parameters"] == sum(p.numel() for p in model.parameters())
    unread = ["model.layers.1.post_attention_layernorm.weight"] if name == "removed" else []
    assert told["no_gradient"] == unread
    assert told["modules"] == []


def test_the_code_holds_what_the_model_needs_and_no_more(opened: dict[str, Any]) -> None:
    code = (opened["kan"][0] / "modeling_kallm.py").read_text()
    assert "class Chebyshev2(" in code
    assert "class KallmLlamaForCausalLM(LlamaForCausalLM)" in code
    for absent in ("BSpline", "class KAT", "Rational", "reset_parameters(self", "pydantic", "import jaxtyping"):
        assert absent not in code.replace("in place of pydantic", "").replace("named as in pydantic", ""), absent
    assert "class Rational(" in (opened["kat"][0] / "modeling_kallm.py").read_text()
    assert max(map(len, code.splitlines())) <= 120
    assert len({path.stat().st_mode for path in opened["kan"][0].iterdir() if path.is_file()}) == 1
    assert len(code.splitlines()) < 1000


def test_private_names_that_would_meet_are_parted(opened: dict[str, Any]) -> None:
    code = (opened["several"][0] / "modeling_kallm.py").read_text()
    names = [line.split("(")[0].split(":")[0] for line in code.splitlines() if line.startswith(("class ", "def "))]
    assert len(names) == len(set(names))


def test_a_model_without_ffns_of_ours_is_exported_without_code(opened: dict[str, Any]) -> None:
    folder, told = opened["pretrained"]
    assert told["class"] == "LlamaForCausalLM"
    assert not (folder / "modeling_kallm.py").exists()


def test_without_trust_the_folder_is_refused_and_not_opened_as_the_plain_architecture(opened: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(opened["kan"][0], trust_remote_code=False)


def test_tokenizer_and_card_stand_beside_the_weights_and_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = make_model()
    retrofit_(model, RetrofitConfig(ffn=KAN))
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    config = model.config.to_dict()
    folder = export(model, tmp_path / "deep" / "out", tokenizer=make_tokenizer(), card="# A card\n")
    assert (folder / "README.md").read_text() == "# A card\n"
    again = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert again("sea")["input_ids"] == make_tokenizer()("sea")["input_ids"]
    assert before == {name: id(tensor) for name, tensor in model.named_parameters()}
    assert model.config.to_dict() == config
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=2)
    retrofit_(model, RetrofitConfig(ffn=KAN, layers="last:1"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(WrongConfiguration, match="is there already: name a folder that is new or empty"):
        export(model, tmp_path / "full")

    class Own(type(model)):  # type: ignore[misc]
        pass

    with pytest.raises(WrongConfiguration, match=r"a class that transformers has, but this is a .*Own; if an adapter"):
        export(Own(model.config), tmp_path / "a")
    find_ffns(model)["model.layers.1.mlp"].double()
    with pytest.raises(WrongConfiguration, match="the model holds float32 and float64"):
        export(model, tmp_path / "b")
    find_ffns(model)["model.layers.1.mlp"].float().layers.append(torch.nn.Tanh())
    with pytest.raises(WrongConfiguration, match="is not what its description builds: it was changed"):
        export(model, tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("KALLM_SLOW") != "1", reason="minutes: set KALLM_SLOW=1")
def test_the_real_model_computes_the_same_bits_without_kallm(real_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    report = retrofit_(real_model, RetrofitConfig(ffn=KAN, layers="last:5"))
    folder = export(real_model, tmp_path / "real", tokenizer=tokenizer)
    open_elsewhere([folder], tmp_path)
    with torch.no_grad():
        assert torch.equal(torch.load(f"{folder}.pt")["logits"], real_model(IDS).logits)
    report.revert()
