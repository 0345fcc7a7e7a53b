"""The rules of a site, held against the pods that manifests will create; ``SITES`` at the bottom is all of them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kallm.cluster.podspecs import PlannedPod, describe, flatten, plan_pods
from kallm.cluster.rules import documents as document_rules
from kallm.cluster.rules import pods as pod_rules
from kallm.errors import WrongConfiguration, did_you_mean

__all__ = ["SITES", "Finding", "Rule", "check_manifests"]


@dataclass(frozen=True)
class Finding:
    """One sentence on what a site would not take, where it stands, and the page that says so."""

    rule: str
    where: str
    sentence: str
    source: str

    def __str__(self) -> str:
        return f"{self.where}: {self.sentence} ({self.source})"


@dataclass(frozen=True)
class Rule:
    """A rule of a site: where it is written, and what looks for a breach in a pod, in a document, or in both."""

    source: str
    pod: Callable[[PlannedPod], Iterable[str]] | None = None
    document: Callable[[dict[str, Any]], Iterable[str]] | None = None


def check_manifests(site: str, documents: list[dict[str, Any]]) -> list[Finding]:
    """Return what a site would not take in the documents, each pod as it will be after its patches.

    Args:
        site: a name of ``SITES``.
        documents: Kubernetes objects; with ``kallm-site`` among them, a Workflow's pods are worked out with its values.

    Raises:
        WrongConfiguration: there is no such site, or a document cannot be read as what it says it is.
    """
    if site not in SITES:
        raise WrongConfiguration(f"there are no rules for a site {site!r}: {did_you_mean(site, SITES)}")
    try:
        flat = list(flatten(documents))
        planned = list(plan_pods(flat))
        return [finding for name, rule in SITES[site].items() for finding in _apply(name, rule, planned, flat)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WrongConfiguration(
            f"a document has not the shape of what its kind says ({type(error).__name__}: {error}); "
            "`kubectl create --dry-run=server -f FILE` says where"
        ) from error


def _apply(name: str, rule: Rule, planned: list[PlannedPod], documents: list[dict[str, Any]]) -> Iterator[Finding]:
    if rule.pod is not None:
        for pod in planned:
            yield from (Finding(name, pod.where, sentence, rule.source) for sentence in rule.pod(pod))
    if rule.document is not None:
        for document in documents:
            for sentence in rule.document(document):
                yield Finding(name, describe(document), sentence, rule.source)


_NRP = "https://nrp.ai/documentation/userdocs/"
_KUBERNETES = "https://kubernetes.io/docs/concepts/"
_CHAMELEON = "https://chameleoncloud.readthedocs.io/en/latest/technical/"

_EVERYWHERE = {
    "grace-period": Rule(_KUBERNETES + "workloads/pods/pod-lifecycle/#pod-termination", pod_rules.allow_time_to_save),
    "image": Rule(_KUBERNETES + "containers/images/#image-names", pod_rules.pin_images),
}

SITES: dict[str, dict[str, Rule]] = {
    "nrp": {
        "placeholder": Rule("docs/nrp.md", document=document_rules.replace_placeholders),
        "resources": Rule(
            _NRP + "start/policies",
            pod_rules.give_resources("cpu", "memory"),
            document_rules.give_resources_to_executor,
        ),
        "ephemeral-storage": Rule(_NRP + "start/policies", pod_rules.give_resources("ephemeral-storage")),
        "limit": Rule(_NRP + "start/policies", pod_rules.keep_limits_near_requests),
        "sleep": Rule(_NRP + "start/policies", pod_rules.do_not_sleep),
        "controller": Rule(_NRP + "start/policies", document=document_rules.belong_to_a_controller),
        "parallelism": Rule(_NRP + "running/jobs", document=document_rules.limit_parallelism),
        "priority-class": Rule(_NRP + "running/priority-classes", pod_rules.use_priorities),
        "gpu-name": Rule(_NRP + "running/gpu-pods", pod_rules.ask_for_gpus_by_name(pod_rules.NRP_GPUS)),
        "gpu-count": Rule(_NRP + "running/gpu-pods", pod_rules.hold_few_gpus(8)),
        "gpu-quota": Rule(_NRP + "running/gpu-pods", pod_rules.ask_for_gpus_with_quota),
        "gpu-product": Rule(_NRP + "running/gpu-pods", pod_rules.name_gpu_product),
        "shared-memory": Rule(_NRP + "running/gpu-pods", pod_rules.keep_shared_memory_in_limit),
        "service": Rule(_NRP + "running/long-idle", document=document_rules.do_not_linger),
        "secret": Rule(_NRP + "running/scheduling", pod_rules.refer_to_secrets, document_rules.keep_secrets_out),
        "endpoint": Rule(_NRP + "storage/ceph-s3", document=document_rules.use_inside_endpoint),
        "cluster-wide": Rule(_NRP + "start/policies", document=document_rules.stay_in_namespace),
        **_EVERYWHERE,
    },
    "chameleon": {
        "placeholder": Rule("docs/chameleon.md", document=document_rules.replace_placeholders),
        "nautilus": Rule(
            _NRP + "running/priority-classes",
            pod_rules.ask_for_no_nautilus,
            document_rules.ask_for_no_nautilus_endpoint,
        ),
        "gpu-name": Rule(
            "https://docs.nvidia.com/datacenter/cloud-native/gpu-operator/latest/gpu-operator-mig.html",
            pod_rules.ask_for_gpus_by_name({"gpu"}, pattern=r"mig-\d+g\.\d+gb(\.me)?"),
        ),
        "one-node": Rule("https://github.com/argoproj/argo-workflows/issues/14634", pod_rules.need_one_node),
        "lease": Rule(
            _CHAMELEON + "reservations/index.html", pod_rules.keep_data_outside, document_rules.keep_store_outside
        ),
        "secret": Rule(
            _KUBERNETES + "configuration/secret/", pod_rules.refer_to_secrets, document_rules.keep_secrets_out
        ),
        **_EVERYWHERE,
    },
}
"""Rules by site and name; each is quoted by the page it stands on."""
