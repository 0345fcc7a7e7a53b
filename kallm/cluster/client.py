"""One namespace of the cluster that a kubeconfig names: objects come and go as dicts, refusals are sentences.

The package ``kubernetes`` takes a second to import, so only what talks to a cluster does.
"""

import json
import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import yaml

from kallm.errors import WrongConfiguration, did_you_mean

__all__ = [
    "CONFIG_MAP",
    "EVENT",
    "JOB",
    "NAMESPACE",
    "NODE",
    "POD",
    "SECRET",
    "SERVICE_ACCOUNT",
    "WORKFLOW",
    "Cluster",
    "Kind",
    "Refused",
    "Unreachable",
    "connect",
]

_CONNECT_S, _READ_S = 5.0, 30.0
_ADVICE = "name a file with KUBECONFIG, as your site's portal gives it, and look with 'kubectl config get-contexts'"


@dataclass(frozen=True)
class Kind:
    """Where the API server keeps objects of one kind."""

    noun: str
    path: str
    plural: str
    namespaced: bool = True


CONFIG_MAP = Kind("ConfigMap", "/api/v1", "configmaps")
EVENT = Kind("Event", "/api/v1", "events")
JOB = Kind("Job", "/apis/batch/v1", "jobs")
NAMESPACE = Kind("Namespace", "/api/v1", "namespaces", namespaced=False)
NODE = Kind("Node", "/api/v1", "nodes", namespaced=False)
POD = Kind("Pod", "/api/v1", "pods")
SECRET = Kind("Secret", "/api/v1", "secrets")
SERVICE_ACCOUNT = Kind("ServiceAccount", "/api/v1", "serviceaccounts")
WORKFLOW = Kind("Workflow", "/apis/argoproj.io/v1alpha1", "workflows")


class Unreachable(WrongConfiguration):
    """The API server does not answer."""


class Refused(WrongConfiguration):
    """The API server answered with a refusal; ``status`` is HTTP's."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


class Cluster:
    """A namespace of a cluster; what is not namespaced is read too."""

    def __init__(self, api: Any, *, context: str, namespace: str) -> None:
        self.api = api
        self.context, self.namespace = context, namespace
        self.server = str(api.configuration.host)

    def get(self, kind: Kind, name: str) -> dict[str, Any] | None:
        """Return an object, or None where there is none.

        Raises:
            Refused: the user may not read it.
            Unreachable: the API server does not answer.
        """
        try:
            return self._ask("GET", kind, name)
        except Refused as error:
            if error.status == 404:
                return None
            raise

    def list(self, kind: Kind, *, labels: str = "", fields: str = "") -> list[dict[str, Any]]:
        """Return the objects of a kind that selectors choose; raises as ``get`` does."""
        found = self._ask("GET", kind, labelSelector=labels, fieldSelector=fields)
        items: list[dict[str, Any]] = found["items"]
        return items

    def create(self, kind: Kind, body: dict[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
        """Create an object, unknown fields refused; return it as the server made it. A dry run stores nothing."""
        return self._ask("POST", kind, body=body, fieldValidation="Strict", dryRun="All" if dry_run else "")

    def patch(self, kind: Kind, name: str, change: dict[str, Any]) -> dict[str, Any]:
        """Merge a change into an object."""
        return self._ask("PATCH", kind, name, body=change)

    def delete(self, kind: Kind, name: str) -> None:
        """Delete an object and, after it, what it owns; gone already is as good."""
        try:
            self._ask("DELETE", kind, name, propagationPolicy="Background")
        except Refused as error:
            if error.status != 404:
                raise

    def knows(self, kind: Kind) -> bool:
        """Return whether the cluster has objects of this kind at all."""
        try:
            served = self._send("GET", kind.path)
        except Refused as error:
            if error.status == 404:
                return False
            raise
        return any(each["name"] == kind.plural for each in served["resources"])

    def _ask(self, method: str, kind: Kind, name: str = "", body: Any = None, **query: str) -> dict[str, Any]:
        path = kind.path + (f"/namespaces/{quote(self.namespace)}" if kind.namespaced else "") + f"/{kind.plural}"
        given = urlencode({key: value for key, value in query.items() if value})
        return self._send(method, path + (f"/{quote(name)}" if name else "") + (f"?{given}" if given else ""), body)

    def _send(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if method == "PATCH":
            headers["Content-Type"] = "application/merge-patch+json"
        _, url, headers, _, _ = self.api.param_serialize(
            method, path, header_params=headers, auth_settings=["BearerToken"]
        )
        try:
            answer = self.api.call_api(method, url, headers, body, _request_timeout=(_CONNECT_S, _READ_S))
            data = answer.read()
        except (HTTPError, ApiException, OSError) as error:
            raise Unreachable(
                f"the Kubernetes API server {self.server} of context '{self.context}' does not answer "
                f"({_first_line(error)}): is the cluster up, and are you on its network?"
            ) from error
        if not 200 <= answer.status < 300:
            # a login plugin that failed leaves the user nameless, which is no lack of rights
            status = 401 if b"system:anonymous" in data else answer.status
            raise Refused(self._explain(status, data), status)
        try:
            found: dict[str, Any] = json.loads(data)
        except ValueError as error:
            raise Unreachable(
                f"{self.server} answers, but not as a Kubernetes API server does: log in again"
            ) from error
        return found

    def _explain(self, status: int, data: bytes) -> str:
        try:
            message = json.loads(data)["message"]
        except (ValueError, KeyError, TypeError):
            message = data.decode(errors="replace")
        told = " ".join(str(message).split())[:400] or f"HTTP {status}"
        if status == 401:
            return f"the cluster does not accept the credentials of context '{self.context}' ({told}): log in again"
        if status == 403:
            return f"context '{self.context}' may not do this in namespace '{self.namespace}': {told}"
        return f"the cluster refuses this: {told}"


def connect(context: str | None = None, namespace: str | None = None) -> Cluster:
    """Open the cluster of a kubeconfig's context; the namespace is the context's own unless given.

    Raises:
        WrongConfiguration: there is no kubeconfig, no such context or namespace, or the server does not answer.
    """
    from kubernetes import config
    from kubernetes.client import ApiClient, Configuration
    from kubernetes.config.config_exception import ConfigException

    file = os.environ.get("KUBECONFIG") or "~/.kube/config"
    try:
        contexts, current = config.list_kube_config_contexts(file)
        known = {each["name"]: each.get("context") or {} for each in contexts}
        chosen = context or current["name"]
        if chosen not in known:
            raise WrongConfiguration(f"--context: unknown context '{chosen}' in {file}: {did_you_mean(chosen, known)}")
        settings = Configuration()
        settings.retries = 0
        config.load_kube_config(file, context=chosen, client_configuration=settings, persist_config=False)
    except (ConfigException, yaml.YAMLError, OSError, TypeError, KeyError, AttributeError) as error:
        # the package lets its own TypeError and KeyError through for a file that is YAML, but no kubeconfig
        raise WrongConfiguration(f"no kubeconfig can be read from {file} ({_first_line(error)}): {_ADVICE}") from error
    place = namespace or str(known[chosen].get("namespace") or "default")
    cluster = Cluster(ApiClient(settings), context=chosen, namespace=place)
    try:
        if cluster.get(NAMESPACE, place) is None:
            raise WrongConfiguration(
                f"there is no namespace '{place}' in context '{chosen}': name yours with --namespace, "
                f"or make it with 'kubectl create namespace {place}'"
            )
    except Refused as error:
        if error.status != 403:  # a user of one namespace may not be allowed to look at namespaces
            raise
    return cluster


def _first_line(error: Exception) -> str:
    """Return what an error says, shortly; urllib3 hides the cause in ``reason``."""
    cause = getattr(error, "reason", None) or error
    return (str(cause).strip().splitlines() or [type(error).__name__])[0].rpartition(" object at ")[2][:160]
