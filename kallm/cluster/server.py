"""Studies through an Argo Server, for sites that give no access to the Kubernetes API; needs the extra ``argo``.

The SDK is the legacy one of Argo 3.7; we use its requests alone, and read answers as JSON, so later servers do as well.
"""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from kallm.cluster.argo import Progress, workflow_progress
from kallm.cluster.client import Unreachable
from kallm.cluster.engines import GONE
from kallm.cluster.starting import Start
from kallm.errors import WrongConfiguration

__all__ = ["ServerEngine", "ServerSettings"]

_TIMEOUT_S = (5.0, 30.0)
_STUCK = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError")


class ServerSettings(BaseModel):
    """Where the Argo Server is; the variables are those of the ``argo`` program."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    server: str = Field(pattern=r"^[\w.\[\]:-]+$", description="ARGO_SERVER: host:port")
    token: SecretStr | None = Field(None, description="ARGO_TOKEN: what the portal shows, 'Bearer …'")
    secure: bool = Field(True, description="ARGO_SECURE: https")
    insecure_skip_verify: bool = Field(False, description="ARGO_INSECURE_SKIP_VERIFY: accept any certificate")
    base_href: str = Field("/", description="ARGO_BASE_HREF: path in front of the server's own")
    namespace: str = Field("default", description="ARGO_NAMESPACE, or --namespace")

    @classmethod
    def from_environment(cls, namespace: str | None = None) -> "ServerSettings":
        """Read the settings from the environment.

        Raises:
            WrongConfiguration: ARGO_SERVER is not set, or a variable holds something else than its description says.
        """
        given = {
            name: value for name in cls.model_fields if (value := os.environ.get(f"ARGO_{name.upper()}")) is not None
        }
        if namespace:
            given["namespace"] = namespace
        if "server" not in given:
            raise WrongConfiguration(
                "--engine server needs the Argo Server's address: set ARGO_SERVER to host:port, and ARGO_TOKEN"
            )
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            name = str(error.errors(include_input=False)[0]["loc"][0])
        raise WrongConfiguration(f"ARGO_{name.upper()} is wrong: expected {cls.model_fields[name].description}")


class ServerEngine:
    """An Argo Server; raises ``WrongConfiguration`` where it does not answer or refuses."""

    def __init__(self, settings: ServerSettings) -> None:
        """Prepare the SDK; nothing is asked of the server yet.

        Raises:
            WrongConfiguration: the SDK is not installed.
        """
        try:
            from argo_workflows import ApiClient, Configuration
            from argo_workflows.api.workflow_service_api import WorkflowServiceApi
        except ModuleNotFoundError as error:
            raise WrongConfiguration(
                "--engine server needs the package argo-workflows: 'pip install kallm[argo]' installs it"
            ) from error
        scheme = "https" if settings.secure else "http"
        self.address = f"{scheme}://{settings.server}/{settings.base_href.strip('/')}".rstrip("/")
        configuration = Configuration(host=self.address, discard_unknown_keys=True)
        configuration.verify_ssl = not settings.insecure_skip_verify
        configuration.retries = False
        if settings.token is not None:
            configuration.api_key["BearerToken"] = settings.token.get_secret_value()
        self.namespace = settings.namespace
        self._api = WorkflowServiceApi(ApiClient(configuration))

    def create(self, manifest: Mapping[str, Any]) -> str:
        """Submit a workflow and return its name."""
        from argo_workflows.model.io_argoproj_workflow_v1alpha1_workflow_create_request import (
            IoArgoprojWorkflowV1alpha1WorkflowCreateRequest as Request,
        )

        body = Request(workflow=dict(manifest), _check_type=False)
        made = self._ask(self._api.create_workflow, body=body)
        assert made is not None
        return str(made["metadata"]["name"])

    def progress(self, name: str) -> Progress:
        """Return how far a workflow is."""
        found = self._ask(self._api.get_workflow, name=name, missing_is_none=True)
        return GONE if found is None else workflow_progress(found)

    def look(self, name: str, *, pending: bool = False) -> Start:
        """Return how the pods begin, from what Argo notes about them."""
        found = self._ask(self._api.get_workflow, name=name, missing_is_none=True) or {}
        nodes = [node for node in ((found.get("status") or {}).get("nodes") or {}).values() if node["type"] == "Pod"]
        begun = [node for node in nodes if node.get("phase") != "Pending"]
        if begun and not pending:
            return Start(running=True)
        told = [str(node.get("message") or "") for node in nodes if node.get("phase") == "Pending"]
        stuck = [message for message in told if message.startswith(_STUCK)]
        if stuck:
            return Start(trouble=f"a pod cannot start: {stuck[0]}")
        return Start(waiting=next(filter(None, told), "no pod has begun yet"))

    def stop(self, name: str) -> bool:
        """End a workflow so that what runs saves its state."""
        from argo_workflows.model.io_argoproj_workflow_v1alpha1_workflow_stop_request import (
            IoArgoprojWorkflowV1alpha1WorkflowStopRequest as Request,
        )

        body = Request(name=name, namespace=self.namespace)
        return self._ask(self._api.stop_workflow, name=name, body=body, missing_is_none=True) is not None

    def remove(self, name: str) -> None:
        """Delete a workflow with its pods."""
        self._ask(self._api.delete_workflow, name=name, missing_is_none=True)

    def names(self) -> list[str]:
        """Return the workflows of kallm."""
        found = self._ask(self._api.list_workflows, list_options_label_selector="app.kubernetes.io/name=kallm") or {}
        return [each["metadata"]["name"] for each in found.get("items") or ()]

    def commands(self, name: str) -> tuple[str, str]:
        """Return the lines for ``argo`` with the same environment."""
        return f"argo watch -n {self.namespace} {name}", f"argo stop -n {self.namespace} {name}"

    def _ask(self, call: Callable[..., Any], *, missing_is_none: bool = False, **given: Any) -> dict[str, Any] | None:
        from argo_workflows.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            answer = call(namespace=self.namespace, _preload_content=False, _request_timeout=_TIMEOUT_S, **given)
        except (HTTPError, AttributeError) as error:
            # the SDK stumbles over a TLS error's missing body with an AttributeError
            cause = error.__context__ if isinstance(error, AttributeError) else error
            told = " ".join(str(getattr(cause, "reason", None) or type(cause).__name__).split())[:160]
            raise Unreachable(
                f"the Argo Server {self.address} does not answer ({told}): "
                "check ARGO_SERVER, ARGO_SECURE and the network"
            ) from error
        except ApiException as error:
            if missing_is_none and error.status == 404:
                return None
            raise WrongConfiguration(
                f"the Argo Server {self.address} refuses this: {_message(error.body) or error.reason}"
            ) from error
        try:
            found: dict[str, Any] = json.loads(answer.data)
        except ValueError as error:
            raise Unreachable(f"{self.address} answers, but not as an Argo Server does: check ARGO_SERVER") from error
        return found


def _message(body: Any) -> str:
    try:
        return " ".join(str(json.loads(body)["message"]).split())[:400]
    except (ValueError, KeyError, TypeError):
        return ""
