"""Surgery on tiny models: what changes, what stays, what is refused."""

from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from architectures import make_architecture
from conftest import make_model
from torch import nn
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import kallm
from kallm.errors import WrongConfiguration
from kallm.kan.ffns import FFN, FFNS
from kallm.kan.spec import parse_spec
from kallm.model.retrofit import RetrofitConfig, find_ffns, retrofit_
from kallm.model.start import freeze, record_ffn_inputs, start_tail
from kallm.model.trunk import Passage, split

KAN = {"ffn": "kan", "basis": "chebyshev2", "degree": 2}
UNEVEN = {"ffn": "kan", "parallel": [{"basis": "rbf", "size": 2, "share": 4}, {"basis": "legendre", "degree": 2}]}
EXAMPLES = {
    "affine": {},
    "kan": {"basis": "chebyshev2", "degree": 2},
    "kat": {"hidden": 24},
    "mlp": {"hidden": 24},
    "removed": {},
    "swiglu": {},
}


def test_the_public_names_lead_to_the_rooms() -> None:
    assert kallm.retrofit_ is retrofit_
    assert {"kan", "swiglu"} <= set(kallm.FFNS)
    assert "chebyshev2" in kallm.BASES


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ("last:2", [3, 4]),
        ("all", [0, 1, 2, 3, 4]),
        ((0, -1), [0, 4]),
        ((4, 1, -1), [1, 4]),
        (r"layers\.[13]\.", [1, 3]),
    ],
)
def test_the_named_ffns_are_replaced_and_no_others(layers, blocks: list[int]) -> None:
    model = make_model()
    before = find_ffns(model)
    report = retrofit_(model, RetrofitConfig(ffn=KAN, layers=layers))
    after = find_ffns(model)
    assert [index for index, name in enumerate(before) if before[name] is not after[name]] == blocks
    assert [r.name for r in report.replacements] == [f"model.layers.{index}.mlp" for index in blocks]
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


@pytest.mark.parametrize("ffn", EXAMPLES)
def test_every_ffn_goes_in_on_the_cpu_and_on_meta_and_out_again(ffn: str) -> None:
    assert set(EXAMPLES) == set(FFNS)
    config = RetrofitConfig(ffn={"ffn": ffn, **EXAMPLES[ffn]}, layers="last:2")
    model = make_model()
    before, prompt = dict(model.named_parameters()), torch.arange(3, 9)[None]
    report = retrofit_(model, config)
    assert all(isinstance(r.after, FFN) for r in report.replacements)
    assert model(prompt).logits.isfinite().all()
    report.revert()
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    with torch.device("meta"):
        empty = make_model()
    report = retrofit_(empty, config)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    report.revert()
    assert list(empty.state_dict()) == list(model.state_dict())


def test_the_report_is_a_table_of_parameters_before_and_after() -> None:
    report = retrofit_(make_architecture("opt"), RetrofitConfig(ffn=KAN, layers="last:2"))
    assert str(report).splitlines() == [
        "FFN                         before     parameters  after  parameters",
        "model.decoder.layers.1.fc1  InlineFFN       4,192  KAN         4,160",
        "model.decoder.layers.2.fc1  InlineFFN       4,192  KAN         4,160",
        "all                                         8,384              8,320",
    ]
    assert repr(report) == "<Report: 2 FFNs of 8,384 parameters replaced by 8,320>"
    assert str(retrofit_(make_model(), RetrofitConfig(ffn={"ffn": "pretrained"}))) == "the pretrained FFNs stay"


def test_the_fresh_ffns_alone_train_in_a_frozen_model_and_follow_its_mode() -> None:
    model = make_model().requires_grad_(False).train()
    report = retrofit_(model, RetrofitConfig(ffn=KAN, layers="last:2"))
    fresh = [parameter for r in report.replacements for parameter in r.after.parameters()]
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == set(map(id, fresh))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("ffn", [KAN, {"ffn": "removed"}])
def test_a_revert_follows_a_model_that_was_moved_and_set_to_train(ffn: dict[str, object]) -> None:
    expected = make_architecture("gpt2").to(torch.bfloat16)
    model = make_architecture("gpt2")
    report = retrofit_(model, RetrofitConfig(ffn=ffn, layers="last:2"))
    model.to(torch.bfloat16).train()
    report.revert()
    assert all(module.training for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_revert_after_something_else_was_put_there_is_refused_and_changes_nothing() -> None:
    model = make_model()
    report = retrofit_(model, RetrofitConfig(ffn=KAN, layers="last:2"))
    model.model.layers[4].mlp = other = nn.Linear(48, 48)
    with pytest.raises(WrongConfiguration, match=r"model\.layers\.4\.mlp is not what this retrofit put there"):
        report.revert()
    assert model.model.layers[3].mlp is report.replacements[0].after
    assert model.model.layers[4].mlp is other


def test_a_revert_to_weights_that_were_never_loaded_is_refused() -> None:
    with torch.device("meta"):
        model = make_model()
    report = retrofit_(model, RetrofitConfig(ffn=KAN, layers="last:2"))
    model.to_empty(device="cpu")
    with pytest.raises(WrongConfiguration, match=r"the pretrained model\.layers\.3\.mlp stayed on the meta device"):
        report.revert()


def adapted(model: PreTrainedModel) -> None:
    model.model.layers[4].mlp.down_proj.base_layer = nn.Identity()


def quantised(model: PreTrainedModel) -> None:
    linear = model.model.layers[4].mlp.gate_proj
    linear.weight = nn.Parameter(linear.weight.data.to(torch.uint8), requires_grad=False)


def offloaded(model: PreTrainedModel) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


def replaced(model: PreTrainedModel) -> None:
    retrofit_(model, RetrofitConfig(ffn=KAN, layers=(-1,)))


def without_linear_maps(model: PreTrainedModel) -> None:
    model.model.layers[4].mlp = nn.LayerNorm(48)


def of_other_widths(model: PreTrainedModel) -> None:
    model.model.layers[4].mlp = nn.Linear(48, 47)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (adapted, "mlp carries adapters, which would be lost; retrofit first"),
        (quantised, r"mlp is quantised to torch\.uint8; load the model in bfloat16 or float32"),
        (offloaded, "mlp is offloaded; load the model without a device map"),
        (replaced, r"mlp is replaced already; call revert\(\)"),
        (without_linear_maps, r"mlp is a LayerNorm whose linear maps do not lead .* outputs: \[\]\)"),
        (of_other_widths, r"mlp is a Linear whose linear maps do not lead .*\(48, 47\)"),
    ],
)
def test_an_ffn_that_cannot_be_replaced_is_refused_and_nothing_changes(
    spoil: Callable[[PreTrainedModel], None], sentence: str
) -> None:
    model = make_model()
    spoil(model)
    before, attributes = find_ffns(model), dict(vars(model))
    with pytest.raises(WrongConfiguration, match=sentence):
        retrofit_(model, RetrofitConfig(ffn=KAN, layers="last:2"))
    assert all(before[name] is module for name, module in find_ffns(model).items())
    assert vars(model) == attributes


def test_a_mixture_of_experts_is_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2))
    with pytest.raises(WrongConfiguration, match="Qwen3MoeSparseMoeBlock whose linear maps do not lead"):
        retrofit_(model, RetrofitConfig(ffn=KAN, layers="last:1"))


@pytest.mark.parametrize(
    ("ffn", "inputs", "sentence"),
    [
        (UNEVEN, None, "parallel must divide the channels"),
        (
            KAN,
            [(64, 48)],
            r"one tensor for each of the 2 FFNs, of widths \[48, 48\], but their shapes are \[\(64, 48\)\]",
        ),
        (KAN, [(64, 48), (64, 47)], r"\(64, 47\)"),
        (KAN, [], r"but their shapes are \[\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_and_nothing_changes(ffn, inputs, sentence: str) -> None:
    model = make_model()
    before = find_ffns(model)
    given = None if inputs is None else [torch.randn(shape) for shape in inputs]
    with pytest.raises(WrongConfiguration, match=sentence):
        retrofit_(model, RetrofitConfig(ffn=ffn, layers="last:2"), inputs=given)
    assert all(before[name] is module for name, module in find_ffns(model).items())
    assert "save_pretrained" not in vars(model)


def test_inputs_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(WrongConfiguration, match="inputs calibrate nothing on the meta device"):
        retrofit_(model, RetrofitConfig(ffn=KAN, layers=(0,)), inputs=[torch.randn(64, 48)])


def test_an_unknown_setting_names_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'layer': known are ffn, layers\. Did you mean 'layers'"):
        RetrofitConfig(ffn=KAN, layer="last:2")


def test_a_tail_is_not_guarded_so_that_it_is_freed_at_once() -> None:
    _, tail = split(make_model(), 2)
    retrofit_(tail, RetrofitConfig(ffn=KAN, layers="all"))
    assert not any("save_pretrained" in vars(module) for module in tail.modules())


def test_the_recorded_inputs_are_what_the_ffns_read() -> None:
    model = make_model()
    trunk, tail = split(model, 2)
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
