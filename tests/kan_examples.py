"""One example of every basis, for the contract tests that run over all of them."""

from typing import Any

EXAMPLES: dict[str, dict[str, Any]] = {
    "bspline": {"size": 7, "order": 3},
    "chebyshev1": {"degree": 6},
    "chebyshev2": {"degree": 6},
    "fourier": {"degree": 3},
    "gegenbauer": {"degree": 6, "alpha": 1.5},
    "hermite": {"degree": 6},
    "jacobi": {"degree": 6, "alpha": 1.0, "beta": 0.5},
    "legendre": {"degree": 6},
    "monomial": {"degree": 6},
    "rbf": {"size": 5},
    "switch": {"size": 5},
    "wavelet": {"size": 5},
}

MIX = {
    "parallel": [
        {"basis": "chebyshev2", "degree": 2},
        {"basis": "bspline", "size": 3, "share": 2, "squash": "clamp"},
        {"basis": "rbf", "size": 2, "squash": "algebraic"},
    ]
}
