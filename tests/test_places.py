"""Where FFNs are: what is found and chosen, and what is refused with the names that there are."""

import pytest
import torch
from architectures import ARCHITECTURES, HIDDEN, WIDTH, make_architecture
from conftest import make_model
from torch import nn

from kallm.errors import WrongConfiguration
from kallm.model.places import InlineFFN, find_ffns, linear_maps, map_sizes
from kallm.model.retrofit import RetrofitConfig, retrofit_

KAN = {"ffn": "kan", "basis": "chebyshev2", "degree": 2}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_block_has_one_ffn_from_the_width_and_back(name: str) -> None:
    ffns = find_ffns(make_architecture(name))
    assert len(ffns) == 3
    for ffn in ffns.values():
        sizes = [map_sizes(linear) for linear in linear_maps(ffn)]
        assert sizes[0] == (WIDTH, 2 * HIDDEN if name == "phi3" else HIDDEN)
        assert sizes[-1] == (HIDDEN, WIDTH)
        assert ffn(torch.randn(2, 3, WIDTH)).shape == (2, 3, WIDTH)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ("last:6", "last:6 does not fit a model of 5 blocks"),
        ("last:0", "last:0 does not fit a model of 5 blocks"),
        ((9,), r"there is no block 9; the model has 5: the FFNs are model\.layers\.0\.mlp, .*model\.layers\.4\.mlp"),
        ((-6,), "there is no block -6"),
        ((), "no block is named: the FFNs are"),
        ("3", "'3' is text; give last:N, all, a tuple of numbers, or a regex"),
        ("", "'' is text"),
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


def test_a_model_with_two_lists_of_blocks_is_refused() -> None:
    model = nn.ModuleDict({"vision": make_model().model, "language": make_model().model})
    with pytest.raises(WrongConfiguration, match=r"FFNs in vision\.layers and in language\.layers; give one part"):
        find_ffns(model)
    retrofit_(model["language"], RetrofitConfig(ffn=KAN, layers="last:2"))


def test_the_hooks_of_an_inline_ffn_see_what_it_reads_and_gives() -> None:
    model = make_architecture("opt")
    ffn = list(find_ffns(model).values())[1]
    assert isinstance(ffn, InlineFFN)
    seen: list[torch.Tensor] = []
    hooks = [
        ffn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])),
        ffn.register_forward_hook(lambda _, inputs, output: seen.append(output)),
    ]
    model(torch.arange(3, 9)[None])
    for hook in hooks:
        hook.remove()
    assert torch.equal(ffn(seen[0]), seen[1])
