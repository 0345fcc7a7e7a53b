"""The digest of an image, asked of its registry as every container runtime does."""

import re
from typing import Any

from kallm.errors import WrongConfiguration

__all__ = ["find_digest", "is_pinned", "split_image"]

_TIMEOUT_S = 10.0
_DOCKER_HUB = "registry-1.docker.io"
_KINDS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_PATH = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_IMAGE = re.compile(rf"({_PATH}(?:/{_PATH})*)(?::([\w][\w.-]{{0,127}}))?(?:@(sha256:[0-9a-f]{{64}}))?")
_HOST = re.compile(r"(?=[^/]*[.:]|localhost/)([A-Za-z0-9.-]+(?::\d+)?)/(.+)")


def is_pinned(image: str) -> bool:
    """Return whether an image is named by its digest."""
    return "@sha256:" in image


def split_image(image: str) -> tuple[str, str, str]:
    """Return an image's registry, its name there and its tag: ``busybox`` is Docker Hub's ``library/busybox:latest``.

    Raises:
        WrongConfiguration: it is no name of an image.
    """
    host = _HOST.fullmatch(image)
    registry, rest = (host[1], host[2]) if host else ("docker.io", image)
    found = _IMAGE.fullmatch(rest)
    if found is None:
        raise WrongConfiguration(
            f"'{image:.200}' is no name of an image: expected registry/name:tag or registry/name@sha256:…"
        )
    name, tag = found[1], found[2] or "latest"
    if registry in ("docker.io", "index.docker.io"):
        registry, name = _DOCKER_HUB, name if "/" in name else f"library/{name}"
    return registry, name, tag


def find_digest(image: str) -> tuple[str | None, str]:
    """Ask the image's registry for the digest behind its tag, without a login.

    Returns:
        the digest and an empty text; or None and why it could not be found out.
    """
    import httpx2

    registry, name, tag = split_image(image)
    local = registry.partition(":")[0] in ("localhost", "127.0.0.1")
    url = f"{'http' if local else 'https'}://{registry}/v2/{name}/manifests/{tag}"
    try:
        with httpx2.Client(timeout=_TIMEOUT_S, headers={"Accept": ", ".join(_KINDS)}) as client:
            answer = client.head(url)
            if answer.status_code == 401:
                token = _fetch_token(client, answer.headers.get("www-authenticate", ""))
                answer = client.head(url, headers={"Authorization": f"Bearer {token}"}) if token else answer
    except httpx2.HTTPError as error:
        return None, f"{registry} does not answer from here ({type(error).__name__})"
    digest = answer.headers.get("docker-content-digest", "")
    if answer.status_code == 200 and re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        return digest, ""
    return None, f"{registry} answers {answer.status_code} without a login"


def _fetch_token(client: Any, challenge: str) -> str | None:
    """Return the token that a registry gives to everybody, from where its 401 says."""
    asked = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = asked.pop("realm", "")
    if not challenge.lower().startswith("bearer ") or not realm.startswith(("https://", "http://127.0.0.1")):
        return None
    asked.pop("error", None)
    answer = client.get(realm, params=asked)
    if answer.status_code != 200:
        return None
    told = answer.json()
    token = told.get("token") or told.get("access_token")
    return str(token) if token else None
