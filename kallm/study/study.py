"""The study file: a model, a tail, dialogues, variants, seeds, a recipe and suites. Imports no torch."""

import json
import sys
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kallm.errors import WrongConfiguration, did_you_mean
from kallm.evaluate.lookup import find_suite, read_suite
from kallm.evaluate.suites import SuiteSettings
from kallm.kan.spec import FFNSpec
from kallm.study.problems import check_plain, describe, in_one_line
from kallm.train.recipe import Recipe

__all__ = ["DialogueSettings", "StatisticsSettings", "Study", "Variant", "preset_names", "read_study"]

_YAML_ERRORS = (yaml.YAMLError, AttributeError, KeyError, RecursionError, TypeError, ValueError)
"""PyYAML lets some errors of its own conversions through: ``2001-99-99``, ``!!bool maybe``, five thousand brackets."""
_NAME = r"^[a-z0-9][a-z0-9-]*$"


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Variant(_Settings):
    """Which FFN goes into the tail; written flat, ``{ffn: kan, degree: 2}``."""

    spec: FFNSpec = Field(description="the FFN and its sizes")
    trained: bool = Field(True, description="false: evaluated as it is, once, without a seed")

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, value: Any) -> Any:
        if isinstance(value, dict) and "spec" not in value:
            trained = {"trained": value["trained"]} if "trained" in value else {}
            return {"spec": {k: v for k, v in value.items() if k != "trained"}} | trained
        return value

    @model_validator(mode="after")
    def _fresh_ffns_train(self) -> "Variant":
        if not self.trained and self.spec.ffn != "pretrained":
            raise ValueError(f"trained: false is for ffn: pretrained, not for a fresh {self.spec.ffn}")
        return self


class DialogueSettings(_Settings):
    """Where the conversations come from."""

    source: str = Field("package:chitchat-dataset", description="hub:ORG/NAME[@revision], package:NAME or a folder")
    heldout: int = Field(64, gt=0, description="how many held-out conversations are scored, at most")


class StatisticsSettings(_Settings):
    """What is declared before the results are seen."""

    margin_nats: float = Field(0.01, gt=0, description="cross-entropies closer than this are equivalent")
    contrasts: tuple[tuple[str, str], ...] = Field(
        (("kan", "swiglu-768"), ("kan", "linear")),
        description="pairs tested by declaration; all others are exploratory",
    )


class Study(_Settings):
    """One study; unknown keys are refused."""

    name: str = Field(pattern=_NAME, description="lower-case letters, digits and dashes")
    description: str = Field("", description="one sentence for the report")
    notes: tuple[str, ...] = Field((), description="printed under the table")
    model: str = Field(description="hub:ORG/NAME[@revision], package:NAME or a folder")
    tail: int | Literal["all"] = Field(5, description="how many of the last blocks a cell trains")
    head: Literal["untied", "tied"] = Field(
        "untied",
        description="untied: a copy of the head trains, the embedding stays; tied: it trains as the embedding too",
    )
    trainable: Literal["ffn", "tail", "tail+head"] = Field("tail+head", description="what of the tail trains")
    start: Literal["random", "fitted"] = Field(
        "random", description="how every reset FFN begins: drawn, or fitted to the pretrained one in closed form"
    )
    dialogues: DialogueSettings = DialogueSettings()
    variants: dict[str, Variant] = Field(min_length=1, description="names, or names with a spec")
    seeds: tuple[int, ...] = Field(min_length=1, description="each sets initialisation and data order")
    train: Recipe
    suites: dict[str, SuiteSettings] = Field(min_length=1, description="names, or names with settings")
    statistics: StatisticsSettings = StatisticsSettings()

    @field_validator("variants", mode="before")
    @classmethod
    def _named_variants(cls, value: Any) -> Any:
        return _expand(value, _known_variants(), "variant")

    @field_validator("suites", mode="before")
    @classmethod
    def _named_suites(cls, value: Any) -> Any:
        if isinstance(value, list):  # a name alone stands for its settings' defaults
            value = [{each: {}} if isinstance(each, str) else each for each in value]
        found = _expand(value, {}, "suite")
        if isinstance(found, dict):
            return {name: _parse_suite(name, settings) for name, settings in found.items()}
        return found

    @field_validator("tail")
    @classmethod
    def _positive_tail(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"must be at least 1, or 'all', but is {value}")
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        for seed in value:
            if seed < 0:
                raise ValueError(f"must not be negative, but {seed} is")
            if value.count(seed) > 1:
                raise ValueError(f"names seed {seed} twice: each seed is one cell of a variant")
        return value

    @model_validator(mode="after")
    def _tied_head_trains(self) -> "Study":
        if self.head == "tied" and self.trainable != "tail+head":
            raise ValueError(
                f"head: tied says how the head trains, but trainable: {self.trainable} leaves it as it is; "
                "leave head out, or set trainable: tail+head"
            )
        return self

    @model_validator(mode="after")
    def _contrasts_exist(self) -> "Study":
        if self.statistics.contrasts != StatisticsSettings().contrasts:  # of those, a study tests what it has
            for name in {name for pair in self.statistics.contrasts for name in pair} - set(self.variants):
                raise ValueError(f"statistics.contrasts: unknown variant '{name}': {did_you_mean(name, self.variants)}")
        return self


def preset_names() -> list[str]:
    """Return the names of the studies that ship with the package."""
    folder = resources.files("kallm.study") / "presets"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def read_study(named: str, overrides: list[str] | None = None) -> Study:
    """Read a study: a preset's name, a file, ``-`` for standard input, or YAML text with a newline.

    Args:
        named: the study.
        overrides: ``a.b=value`` each, the value read as JSON, else as text.

    Raises:
        WrongConfiguration: names every problem of the file at once.
    """
    text, place = _text_of(named)
    try:
        raw = yaml.safe_load(text)
    except _YAML_ERRORS as error:
        raise WrongConfiguration(in_one_line(f"{place} is no YAML: {' '.join(str(error).split())}")) from error
    check_plain(raw, place)
    if not isinstance(raw, dict):
        raise WrongConfiguration(f"{place} was expected to hold 'name:', 'model:' and so on, but holds {raw!r:.60}")
    for override in overrides or ():
        _override(raw, override)
    check_plain(raw, place)
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        raise WrongConfiguration(describe(error, Study, place)) from error


def _text_of(named: str) -> tuple[str, str]:
    if named == "-":
        try:
            return sys.stdin.read(), "standard input"
        except UnicodeDecodeError as error:
            raise WrongConfiguration(f"standard input is no text in UTF-8: {error}") from error
    if "\n" in named:
        return named, "the study text"
    if named in preset_names():
        return (resources.files("kallm.study") / "presets" / f"{named}.yaml").read_text(), f"preset '{named}'"
    try:
        return Path(named).read_text(), named
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise WrongConfiguration(
            in_one_line(f"unknown study '{named}': no such file, and as presets {did_you_mean(named, preset_names())}")
        ) from error


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise WrongConfiguration(in_one_line(f"--set expects a.b=value, but got '{override}'"))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    *parents, last = path.split(".")
    place: Any = raw
    for parent in parents:
        place = place.setdefault(parent, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise WrongConfiguration(in_one_line(f"--set {override}: '{'.'.join(parents)}' is not a group of settings"))
    place[last] = value


def _expand(value: Any, known: dict[str, Any], kind: str) -> Any:
    """Turn a list of names, or of names with settings, into a mapping with every name's settings."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, list):
        return value
    found: dict[str, Any] = {}
    for entry in value:
        pairs = list(entry.items()) if isinstance(entry, dict) else [(entry, None)]
        for name, settings in pairs:
            if not isinstance(name, str):
                raise ValueError(f"expected the name of a {kind}, but got {name!r:.60}")
            if name in found:
                raise ValueError(f"names {kind} '{name}' twice")
            if settings is None and name not in known:
                raise ValueError(f"unknown {kind} '{name}': {did_you_mean(str(name), known)}")
            found[name] = known[name] if settings is None else settings
    return found


def _parse_suite(name: str, settings: Any) -> SuiteSettings:
    try:
        return read_suite(name, settings)
    except ValidationError as error:
        raise ValueError("; ".join(describe(error, find_suite(name).settings, name).splitlines())) from error


@cache
def _known_variants() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((resources.files("kallm.study") / "variants.yaml").read_text())
    return found
