"""The delta: what comes back, and what is refused with the model unchanged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model
from kan_examples import MIX
from safetensors.torch import load_file, save_file

import kallm
from kallm.errors import DataMismatch, WrongConfiguration
from kallm.kan.ffns import FFNS
from kallm.kan.spec import parse_spec
from kallm.model.places import find_ffns
from kallm.model.retrofit import RetrofitConfig, retrofit_
from kallm.saving.delta import NOTE, file_sha256
from kallm.saving.replaced import find_replaced
from kallm.saving.saved import load, save
from kallm.store.sealed import seal, unseal

KAN = {"ffn": "kan", "basis": "chebyshev2", "degree": 2}
SPECS: dict[str, dict[str, Any]] = {
    "kan": {**KAN, "hidden": 20, "constants": "stored", "scale": "learned"},
    "kat": {"ffn": "kat", "hidden": 24, "groups": 4},
    "swiglu": {"ffn": "swiglu"},
    "mlp": {"ffn": "mlp", "hidden": 10, "activation": "relu"},
    "affine": {"ffn": "affine"},
    "removed": {"ffn": "removed"},
}
IDS = torch.arange(3, 23)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def shake(model: Any, names: str = "") -> None:
    """Change all parameters that train, as a training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and names in name:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)


def retrofitted(**spec: Any) -> Any:
    """Return a tiny model whose last two FFNs are replaced, and alone train."""
    model = make_model().requires_grad_(False)
    retrofit_(model, RetrofitConfig(ffn=spec or KAN, layers="last:2"))
    shake(model)
    return model


@pytest.mark.parametrize("ffn", sorted(FFNS))
def test_a_saved_delta_gives_the_same_bits_on_the_base_again(ffn: str, tmp_path: Path) -> None:
    model, again = retrofitted(**SPECS[ffn]), make_model()
    save(model, tmp_path)
    report = load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert [replacement.name for replacement in report.replacements] == ["model.layers.3.mlp", "model.layers.4.mlp"]
    report.revert()
    assert torch.equal(logits(again), logits(make_model()))


@pytest.mark.parametrize(
    "spec",
    [
        *SPECS.values(),
        {"ffn": "kan", **MIX, "hidden": 20},
        {"ffn": "kan", "layers": [{"basis": "fourier", "degree": 2}, {"basis": "rbf", "size": 3}], "squash": "clamp"},
        {"ffn": "kan", "layers": [{"basis": "jacobi", "degree": 2, "alpha": 1, "beta": 0.5}]},
    ],
)
def test_a_module_is_described_so_that_it_is_built_again(spec: dict[str, Any]) -> None:
    model = retrofitted(**spec)
    (first, _) = find_replaced(model)
    again = first.build("cpu", torch.float32)
    again.load_state_dict(first.module.state_dict())
    rows = torch.randn(5, 48)
    assert torch.equal(again(rows), first.module(rows))
    assert parse_spec(spec).parameters(48, 96) == first.spec.parameters(48, 1)


def test_a_delta_is_small_and_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    model = retrofitted()
    save(model, tmp_path / "a")
    save(model, tmp_path / "b")
    (weights,) = (tmp_path / "a").glob("*.safetensors")
    assert load_file(weights).keys() == {
        f"model.layers.{block}.mlp.layers.{layer}.{name}"
        for block in (3, 4)
        for layer in (0, 1)
        for name in ("linear.weight", "linear.bias", "scale", "mean")
    }
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    (tmp_path / "plain").write_text("")
    assert {path.stat().st_mode for path in (tmp_path / "a").iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_what_trains_of_the_base_goes_along_and_a_tied_head_stays_tied(tmp_path: Path) -> None:
    model, again = make_model(), make_model()
    retrofit_(model, RetrofitConfig(ffn=KAN, layers=(1,)))
    shake(model)
    save(model, tmp_path)
    load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_an_untied_head_comes_back_and_the_embedding_stays(tmp_path: Path) -> None:
    model, again = make_model().requires_grad_(False), make_model()
    retrofit_(model, RetrofitConfig(ffn=KAN, layers=(1,)))
    model.set_output_embeddings(torch.nn.Linear(48, 259, bias=False))
    shake(model)
    save(model, tmp_path / "one")
    load(again, tmp_path / "one")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.model.embed_tokens.weight, make_model().model.embed_tokens.weight)
    assert again.config.tie_word_embeddings is False
    save(again, tmp_path / "two")
    third = make_model()
    load(third, tmp_path / "two")
    assert torch.equal(logits(third), logits(model))


def test_tensors_that_are_named_go_along_and_no_others(tmp_path: Path) -> None:
    model, again = make_model(), make_model()
    retrofit_(model, RetrofitConfig(ffn=KAN, layers=(1,)))
    shake(model, "norm.weight")
    norms = [name for name, _ in model.named_parameters() if name.endswith("norm.weight")]
    save(model, tmp_path, also=norms)
    load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(WrongConfiguration, match="the model has no tensor 'nrom'"):
        save(model, tmp_path, also=["nrom"])
    with pytest.raises(WrongConfiguration, match="expected 'trained' or a list"):
        save(model, tmp_path, also="norm")  # type: ignore[arg-type]


def test_a_new_delta_takes_the_place_of_the_older(tmp_path: Path) -> None:
    model, again = retrofitted(), make_model()
    save(model, tmp_path)
    shake(model)
    save(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    load(again, tmp_path)
    load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("architecture", ["GPT2", "OPT", "GPTNeoX"])
def test_other_architectures_come_back(architecture: str, tmp_path: Path) -> None:
    kind, config = getattr(transformers, f"{architecture}Config"), {}
    if architecture == "OPT":
        config = {"word_embed_proj_dim": 32, "ffn_dim": 64}

    def make() -> Any:
        torch.manual_seed(0)
        settings = kind(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=64,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=2, **config,
        )  # fmt: skip
        return transformers.AutoModelForCausalLM.from_config(settings).eval()

    model, again = make().requires_grad_(False), make()
    retrofit_(model, RetrofitConfig(ffn=KAN, layers="last:2"))
    shake(model)
    save(model, tmp_path)
    load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_the_public_names_lead_here() -> None:
    assert kallm.save is save
    assert kallm.load is load


def edit_note(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    note = unseal((folder / NOTE).read_bytes(), NOTE)
    change(note)
    (folder / NOTE).write_bytes(seal(note))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors, and the hash with them: what only a look at every tensor finds."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    edit_note(folder, lambda note: note.update(weights_sha256=file_sha256(path)))


def flip_a_bit(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


BIAS = "model.layers.3.mlp.layers.0.linear.bias"


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[BIAS] = tensors[BIAS][:5].clone()


def halve(tensors: dict[str, torch.Tensor]) -> None:
    tensors[BIAS] = tensors[BIAS].half()


def swap(note: dict[str, Any]) -> None:
    note["ffns"][0]["names"][0] = "model.layers.9.mlp"


def spoil(note: dict[str, Any]) -> None:
    note["ffns"][0]["spec"]["ffn"] = "kna"


DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "a flipped bit": (flip_a_bit, DataMismatch, "is damaged: its SHA-256 is not the one"),
    "no weights": (lambda f: next(f.glob("*.safetensors")).unlink(), DataMismatch, "is missing, but kallm.json names"),
    "no note": (lambda f: (f / NOTE).unlink(), WrongConfiguration, "holds no delta: kallm.json cannot be read"),
    "a note changed": (lambda f: (f / NOTE).write_text("{}"), DataMismatch, "carries no hash of its own"),
    "a tensor missing": (lambda f: edit_tensors(f, lambda t: t.pop(BIAS)), DataMismatch, f"{BIAS} is missing"),
    "a tensor left over": (
        lambda f: edit_tensors(f, lambda t: t.update(more=torch.zeros(1))), DataMismatch, "more is left over",
    ),
    "another shape": (lambda f: edit_tensors(f, narrow), DataMismatch, r"to be float32 \[48\], but is .*\[5\]"),
    "another dtype": (lambda f: edit_tensors(f, halve), DataMismatch, "but is float16"),
    "another name": (lambda f: edit_note(f, swap), WrongConfiguration, "replaces model.layers.9.mlp, but the FFNs are"),
    "another spec": (lambda f: edit_note(f, spoil), DataMismatch, "unknown ffn 'kna'"),
    "another format": (lambda f: edit_note(f, lambda n: n.update(format=2)), DataMismatch, "format: Input should be 1"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_delta_is_refused_and_the_model_is_unchanged(damage: str, tmp_path: Path) -> None:
    save(retrofitted(), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    spoil_it, error, sentence = DAMAGES[damage]
    spoil_it(tmp_path / "damaged")
    model = make_model()
    before, ffns = logits(model), find_ffns(model)
    with pytest.raises(error, match=sentence):
        load(model, tmp_path / "damaged")
    assert all(ffns[name] is ffn for name, ffn in find_ffns(model).items())
    assert torch.equal(logits(model), before)


def test_another_base_model_is_refused_and_unchanged(tmp_path: Path) -> None:
    save(retrofitted(), tmp_path)
    other = make_model()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-3
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=48, n_layer=5, n_head=4, vocab_size=259))
    for model, sentence in (
        (other, "was saved from LlamaForCausalLM, and this is another model"),
        (make_model().to(torch.bfloat16), "but is float32 .*; load the base model in the dtype"),
        (make_model(num_hidden_layers=4), "replaces model.layers.4.mlp, but the FFNs are"),
        (gpt, "belongs to a LlamaForCausalLM, but this is a GPT2LMHeadModel"),
    ):
        before, ffns = logits(model.eval()), find_ffns(model)
        with pytest.raises((WrongConfiguration, DataMismatch), match=sentence):
            load(model, tmp_path)
        assert all(ffns[name] is ffn for name, ffn in find_ffns(model).items())
        assert torch.equal(logits(model), before)


def test_a_model_that_is_not_retrofitted_or_was_changed_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(WrongConfiguration, match=r"no FFN of this model is replaced: kallm\.retrofit_"):
        save(make_model(), tmp_path / "a")
    model = retrofitted()
    model.model.layers[3].mlp.layers.append(torch.nn.Tanh())
    with pytest.raises(WrongConfiguration, match=r"model\.layers\.3\.mlp is not what its description builds"):
        save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_note_tells_what_a_reader_wants_and_no_path_of_this_machine(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    retrofit_(model, RetrofitConfig(ffn=KAN, layers="last:2"))
    save(model, tmp_path / "delta", also=())
    note = json.loads((tmp_path / "delta" / NOTE).read_bytes())
    assert note["base"]["name"] == "base"
    assert note["ffns"][0]["names"] == ["model.layers.3.mlp", "model.layers.4.mlp"]
    assert str(tmp_path) not in (tmp_path / "delta" / NOTE).read_text()
