"""The specs' counts against the published accounting, and their messages against what a user types."""

import subprocess
import sys

import pytest
from pydantic import TypeAdapter

from kallm.errors import WrongConfiguration
from kallm.kan.spec import FFNSpec, parse_spec

CHEBYSHEV = {"basis": "chebyshev2", "degree": 2}
COUNTS = [
    ({"ffn": "pretrained"}, 2_654_208),
    ({"ffn": "swiglu"}, 2_654_208),
    ({"ffn": "swiglu", "hidden": 768}, 1_327_104),
    ({"ffn": "mlp", "hidden": 1152}, 1_327_104),
    ({"ffn": "affine"}, 332_352),
    ({"ffn": "removed"}, 0),
    ({"ffn": "kat", "hidden": 1152}, 2 * 576 * 1152 + 1152 + 576 + 76),
    ({"ffn": "kan", **CHEBYSHEV}, 1_328_256),
    ({"ffn": "kan", **CHEBYSHEV, "hidden": 384}, 884_736 + 384 + 576),
    ({"ffn": "kan", **CHEBYSHEV, "hidden": 384, "constants": "stored"}, 1_327_104),
    ({"ffn": "kan", **CHEBYSHEV, "hidden": []}, 2 * 576 * 576 + 576),
    ({"ffn": "kan", **CHEBYSHEV, "hidden": 64, "scale": "learned"}, 4 * 576 * 64 + 2 * 640),
]


@pytest.mark.parametrize(("data", "count"), COUNTS)
def test_counts_are_the_published_ones(data: dict[str, object], count: int) -> None:
    assert parse_spec(data).parameters(576, 1536) == count


def test_a_spec_survives_its_own_dump() -> None:
    data = {
        "ffn": "kan",
        "squash": "algebraic",
        "layers": [CHEBYSHEV, {"parallel": [CHEBYSHEV, {"basis": "bspline", "size": 2, "share": 2}], "squash": "tanh"}],
    }
    spec = parse_spec(data)
    assert parse_spec(spec.model_dump()) == spec
    assert TypeAdapter(FFNSpec).validate_json(spec.model_dump_json()) == spec
    first, second = spec.layers
    assert (first.squash, second.squash, second.branches[0].squash) == ("algebraic", "tanh", "tanh")
    assert second.channels(576) == (192, 384)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"ffn": "kann"}, "unknown ffn 'kann': known are affine, kan, kat"),
        ({"hidden": 3}, "ffn is missing"),
        (
            {"ffn": "kan", "basis": "spine", "size": 3},
            r"unknown basis 'spine': known are bspline, .* Did you mean 'bspl",
        ),
        ({"ffn": "kan", "bsis": "rbf"}, "unknown key 'bsis': known are .* Did you mean 'basis'"),
        ({"ffn": "kan", "basis": "rbf", "degree": 3}, "basis 'rbf' takes size, not degree"),
        ({"ffn": "kan", "basis": "legendre", "size": 3}, "basis 'legendre' takes degree, not size"),
        ({"ffn": "kan", "basis": "legendre"}, "basis 'legendre' needs degree"),
        (
            {"ffn": "kan", "basis": "legendre", "degree": -1},
            "degree of basis 'legendre' must be at least 1, but it is -1",
        ),
        ({"ffn": "kan", "basis": "rbf", "size": 0}, "size of basis 'rbf' must be at least 1, but it is 0"),
        ({"ffn": "kan", "basis": "bspline", "size": 2, "order": 3}, "order of basis 'bspline' must be at most size 2"),
        ({"ffn": "kan", "basis": "gegenbauer", "degree": 2, "alpha": 0}, "alpha of basis 'gegenbauer'"),
        ({"ffn": "kan", "degree": 2}, "degree is given without a basis"),
        ({"ffn": "kan"}, "one of basis, parallel, layers, but it has none"),
        ({"ffn": "kan", **CHEBYSHEV, "layers": [CHEBYSHEV]}, "but it has basis and layers"),
        ({"ffn": "kan", "layers": []}, "layers must have at least 1"),
        ({"ffn": "kan", "layers": [CHEBYSHEV], "hidden": 8}, "hidden is given, but one layer has nothing between"),
        ({"ffn": "kan", "layers": [CHEBYSHEV] * 2, "hidden": [8, 8]}, "hidden needs 1 sizes for 2 layers"),
        ({"ffn": "kan", **CHEBYSHEV, "hidden": 0}, "hidden must be at least 1, but it is 0"),
        ({"ffn": "kan", "parallel": [CHEBYSHEV] * 3, "hidden": 100}, r"shares 1 \+ 1 \+ 1 of parallel must divide"),
        ({"ffn": "kan", "layers": [{**CHEBYSHEV, "squish": 1}]}, "layers.0: unknown key 'squish'"),
        ({"ffn": "kat", "hidden": 100, "groups": 8}, "groups must divide hidden 100, but it is 8"),
        ({"ffn": "swiglu", "hidden": 0}, "hidden: .* greater than or equal to 1"),
    ],
)
def test_a_wrong_spec_is_refused_in_the_users_words(data: dict[str, object], words: str) -> None:
    with pytest.raises(WrongConfiguration, match=words):
        parse_spec(data)


@pytest.mark.parametrize(
    "data",
    [{"ffn": "kat", "hidden": 16, "groups": 8}, {"ffn": "kan", "parallel": [CHEBYSHEV] * 2}],
)
def test_a_width_that_does_not_divide_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(WrongConfiguration, match="divide"):
        parse_spec(data).parameters(13, 40)


def test_specs_import_no_torch() -> None:
    code = "import sys, kallm.kan.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
