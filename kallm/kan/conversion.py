"""Exact conversion between polynomial bases. Legend: D inputs, O outputs, K basis functions."""

import torch
from jaxtyping import Float
from torch import Tensor

from kallm.errors import WrongConfiguration
from kallm.kan.bases import BASES, build_basis
from kallm.kan.layerspec import BASIS_SETTINGS, BasisSpec
from kallm.kan.linear import KANLinear
from kallm.kan.polynomials import Polynomials

__all__ = ["convert"]


@torch.no_grad()
def convert(layer: KANLinear, basis: BasisSpec) -> KANLinear:
    """Return a layer that is the same function in another family of polynomials, of the same degree and squashing.

    With p = M q + M_0 for the old and new polynomials, the coefficients become c M and the centres M⁻¹ (m - M_0), so
    that p - m = M (q - m') and the constants stay. M is found in float64.

    Raises:
        WrongConfiguration: one of the two is no polynomial, or the degrees differ.
    """
    old = layer.layer
    _require_polynomial(old.basis, "the layer's basis")
    _require_polynomial(basis.basis, "the basis to convert to")
    if basis.degree != old.degree:
        raise WrongConfiguration(
            f"conversion keeps the degree, but the layer's is {old.degree} and the new basis's {basis.degree}; "
            f"give degree {old.degree}"
        )
    settings = {name: getattr(basis, name) for name in BasisSpec.model_fields}
    weight = layer.linear.weight
    spec = old.model_copy(update=settings)
    new = KANLinear(layer.in_features, layer.out_features, layer=spec, device=weight.device, dtype=weight.dtype)
    new.load_state_dict(layer.state_dict())
    matrix, constants = _change(_basis_of(old), basis)
    num_constants = weight.shape[1] - layer.mean.shape[0]
    blocks = weight[:, num_constants:].double().view(layer.out_features, len(matrix), layer.in_features)
    matrix, constants = matrix.to(weight.device), constants.to(weight.device)
    changed = torch.einsum("oki,kj->oji", blocks, matrix)
    new.linear.weight[:, num_constants:] = changed.flatten(1).to(weight.dtype)
    means = layer.mean.double().view(len(matrix), layer.in_features) - constants[:, None]
    new.mean.copy_(torch.linalg.solve(matrix, means).flatten())
    return new


def _basis_of(spec: BasisSpec) -> BasisSpec:
    """Return the basis of a layer without the layer's other settings."""
    return BasisSpec(**{name: getattr(spec, name) for name in BasisSpec.model_fields})


def _require_polynomial(name: str | None, what: str) -> None:
    known = sorted(other for other in BASIS_SETTINGS if issubclass(BASES[other], Polynomials))
    if name not in known:
        raise WrongConfiguration(
            f"{what} must be one of the polynomials {', '.join(known)}, but it is {name or 'a mix'}"
        )


def _change(old: BasisSpec, new: BasisSpec) -> tuple[Float[Tensor, "K K"], Float[Tensor, " K"]]:
    """Return M and M_0 with p = M q + M_0, from the values at as many points as there are coefficients."""
    size = old.num_functions
    points = torch.cos(torch.pi * (torch.arange(size + 1, dtype=torch.float64) + 0.5) / (size + 1))
    ours, theirs = build_basis(old)(points), build_basis(new)(points)
    solved = torch.linalg.solve(torch.cat([torch.ones(size + 1, 1, dtype=torch.float64), theirs], dim=1), ours)
    return solved[1:].T, solved[0]
