"""`docker compose up`: a study against its own S3 server, ended, killed, continued, asked again."""

import json
import subprocess
import urllib.request
import uuid
from collections.abc import Iterator
from urllib.parse import urljoin

import pytest
from containers import STUDY, docker, image, wait_for

pytestmark = pytest.mark.e2e


class Project:
    """A compose project of its own, with the image under test."""

    def __init__(self) -> None:
        self.name = f"kallm-test-{uuid.uuid4().hex[:8]}"
        self.env = {
            "COMPOSE_PROJECT_NAME": self.name,
            "KALLM_IMAGE": image(),
            "KALLM_STUDY": STUDY,
            "KALLM_REPORT_PORT": "0",
        }

    def compose(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run docker compose to its end."""
        return docker("compose", "--progress", "plain", *command, env=self.env)

    def wait_for(self, text: str, service: str) -> None:
        """Wait until a service prints a text."""
        wait_for(text, "compose", "logs", service, env=self.env)

    def containers(self) -> list[dict[str, object]]:
        """Return what the engine knows of the project's containers."""
        names = self.compose("ps", "--all", "--quiet").stdout.split()
        return list(json.loads(docker("inspect", *names).stdout))


@pytest.fixture(scope="module")
def project() -> Iterator[Project]:
    project = Project()
    yield project
    project.compose("--profile", "report", "down", "--volumes", "--timeout", "5")


def test_killed_in_the_middle_and_brought_up_again_it_continues_and_ends(project: Project) -> None:
    assert project.compose("up", "--detach").returncode == 0
    project.wait_for("parameters replaced by", "kallm")
    assert project.compose("stop", "kallm").returncode == 0  # saved: there is something to continue from
    assert project.compose("up", "--detach").returncode == 0
    project.wait_for("continuing from step", "kallm")
    assert project.compose("kill").returncode == 0
    done = project.compose("up")  # up to two minutes go by before a killed attempt counts as dead
    assert done.returncode == 0, done.stdout
    assert "1 of 1 cells done" in done.stdout
    assert "linear     1/1" in done.stdout
    assert "kallm-1 exited with code 0" in done.stdout
    assert {str(c["Name"]).split("-")[-2]: c["State"]["Running"] for c in project.containers()} == {  # type: ignore[index]
        "s3": True,
        "bucket": False,
        "kallm": False,
    }


def test_a_second_time_it_trains_nothing_and_shows_the_same_table(project: Project) -> None:
    first = project.compose("logs", "--no-log-prefix", "kallm").stdout
    again = project.compose("run", "--rm", "kallm")
    assert again.returncode == 0
    assert "nothing to train" in again.stdout
    shown = [line.strip() for line in first.splitlines() if line.strip().startswith("linear ")]
    assert shown
    assert shown[-1] in again.stdout


def test_run_leaves_with_the_code_of_kallm(project: Project) -> None:
    wrong = project.compose("run", "--rm", "kallm", "run", "nonsense", "--store", "s3://kallm/grid")
    assert wrong.returncode == 2
    assert "unknown study 'nonsense'" in wrong.stdout


def test_the_report_is_served_to_this_machine_alone(project: Project) -> None:
    assert project.compose("up", "--detach", "report").returncode == 0
    project.wait_for("Serving HTTP", "report")
    host, _, port = project.compose("port", "report", "8080").stdout.strip().rpartition(":")
    assert host == "127.0.0.1"
    address = f"http://127.0.0.1:{port}/"
    listing = _read(address)
    study = next(part.partition('"')[0] for part in listing.split('href="')[1:] if part.startswith("tiny."))
    assert "<title>tiny: KALLM</title>" in _read(urljoin(address, f"{study}report.html"))


def test_no_container_listens_beyond_this_machine_or_keeps_a_capability(project: Project) -> None:
    found = project.containers()
    assert len(found) == 4
    for container in found:
        host = container["HostConfig"]
        assert isinstance(host, dict)
        bound = [b["HostIp"] for bindings in (host["PortBindings"] or {}).values() for b in bindings]
        assert set(bound) <= {"127.0.0.1"}, container["Name"]
        assert (host["ReadonlyRootfs"], host["CapDrop"], host["Privileged"]) == (True, ["ALL"], False)


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())
