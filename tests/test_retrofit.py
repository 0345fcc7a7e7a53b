"""Surgery on tiny models: what changes, what stays, what is refused."""

import pytest
import torch
from conftest import make_model

import kallm
from kallm.errors import WrongConfiguration
from kallm.kan.spec import parse_spec
from kallm.model.retrofit import RetrofitConfig, find_ffns, retrofit_
from kallm.model.start import freeze, record_ffn_inputs, start_tail
from kallm.model.trunk import split

KAN = {"ffn": "kan", "basis": "chebyshev2", "degree": 2}


def test_the_public_names_lead_to_the_rooms() -> None:
    assert kallm.retrofit_ is retrofit_
    assert {"kan", "swiglu"} <= set(kallm.FFNS)
    assert "chebyshev2" in kallm.BASES


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [("last:2", [3, 4]), ("all", [0, 1, 2, 3, 4]), ((0, -1), [0, 4]), (r"layers\.[13]\.", [1, 3])],
)
def test_the_named_ffns_are_replaced_and_no_others(layers, blocks: list[int]) -> None:
    model = make_model()
    before = find_ffns(model)
    report = retrofit_(model, RetrofitConfig(ffn=KAN, layers=layers))
    after = find_ffns(model)
    assert [index for index, name in enumerate(before) if before[name] is not after[name]] == sorted(blocks)
    assert sum(p.numel() for r in report.replacements for p in r.after.parameters()) == len(blocks) * parse_spec(
        KAN
    ).parameters(48, 96)
    report.revert()
    assert all(before[name] is module for name, module in find_ffns(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_retrofitted_model_generates_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    retrofit_(model, RetrofitConfig(ffn=KAN, layers="last:2"))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    prompt = torch.randint(3, 259, (2, 6), generator=torch.Generator().manual_seed(0))
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 9)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ("last:6", "last:6 does not fit a model of 5 blocks"),
        ((9,), "there is no block 9; the model has 5"),
        ("encoder", r"'encoder' matches none of the FFNs model\.layers\.0\.mlp"),
        ("[", "neither last:N, all nor a regex"),
    ],
)
def test_layers_that_are_not_there_are_refused_and_nothing_changes(layers, sentence: str) -> None:
    model = make_model()
    before = find_ffns(model)
    with pytest.raises(WrongConfiguration, match=sentence):
        retrofit_(model, RetrofitConfig(ffn=KAN, layers=layers))
    assert all(before[name] is module for name, module in find_ffns(model).items())


def test_a_model_without_ffns_is_refused_with_the_names_it_has() -> None:
    with pytest.raises(WrongConfiguration, match="no block of Sequential has a module named mlp"):
        retrofit_(torch.nn.Sequential(torch.nn.Linear(2, 2)), RetrofitConfig(ffn=KAN))


def test_the_recorded_inputs_are_what_the_ffns_read() -> None:
    model = make_model()
    trunk, tail = split(model, 2)
    from kallm.model.trunk import Passage

    passage = Passage(torch.arange(3, 13), torch.arange(10))
    seen = record_ffn_inputs(tail.eval(), [(trunk(passage), passage.position_ids)])
    kept = []
    hook = model.model.layers[4].mlp.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0][0]))
    with torch.no_grad():
        model(passage.input_ids[None], use_cache=False)
    hook.remove()
    assert torch.equal(seen[1], kept[0])


def test_a_start_depends_on_the_seed_alone() -> None:
    model = make_model()
    inputs = [torch.randn(64, 48, generator=torch.Generator().manual_seed(n)) for n in range(2)]

    def weights(seed: int) -> list[torch.Tensor]:
        tail = split(model, 2)[1]
        torch.manual_seed(torch.seed() % 1000)
        start_tail(tail, parse_spec(KAN), inputs, seed=seed)
        return list(tail.parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


@pytest.mark.parametrize(("trainable", "count"), [("ffn", "ffn"), ("tail", "tail"), ("tail+head", "all")])
def test_what_trains_is_what_the_study_says(trainable: str, count: str) -> None:
    _, tail = split(make_model(), 2)
    freeze(tail, trainable)
    numbers = {
        "ffn": sum(p.numel() for ffn in find_ffns(tail).values() for p in ffn.parameters()),
        "tail": sum(p.numel() for p in tail.body.parameters()),
        "all": sum(p.numel() for p in tail.parameters()),
    }
    assert sum(p.numel() for p in tail.parameters() if p.requires_grad) == numbers[count]
