"""The image, built and run: as a cluster runs it, with a read-only root, no capabilities and its own user."""

import json
import re
import tomllib
import uuid
from collections.abc import Iterator

import pytest
from containers import HARDENED, ROOT, STUDY, docker, image, wait_for

from kallm.errors import ExitCode

pytestmark = pytest.mark.e2e

CACHES = [
    "HOME",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "CUDA_CACHE_PATH",
    "MPLCONFIGDIR",
]


@pytest.fixture
def volume() -> Iterator[str]:
    """Make a volume for the test, and take it and the container of its name away."""
    name = f"kallm-test-{uuid.uuid4().hex[:8]}"
    yield name
    docker("rm", "--force", name)
    docker("volume", "rm", name)


def in_python(program: str) -> str:
    """Run a program in the hardened image and return what it printed."""
    done = docker(
        "run", "--rm", *HARDENED, "--tmpfs", "/cache:uid=10001", "--entrypoint", "python", image(), "-c", program
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_image_is_the_program() -> None:
    helped = docker("run", "--rm", *HARDENED, image())
    assert helped.returncode == 0
    assert helped.stdout.startswith("Usage: kallm")
    mistaken = docker("run", "--rm", *HARDENED, image(), "tabel")
    assert mistaken.returncode == ExitCode.WRONG_CONFIGURATION
    assert "Did you mean 'table'?" in mistaken.stdout


def test_the_user_is_10001_and_writes_below_cache_only() -> None:
    program = f"""
import getpass, os, pathlib, tempfile
print(os.getuid(), os.getgid(), getpass.getuser(), sorted({{os.environ[name].split("/")[1] for name in {CACHES}}}))
for folder in ("/", "/opt/kallm", "/usr/share/kallm", os.environ["HOME"], tempfile.gettempdir()):
    try:
        pathlib.Path(folder, "written").write_text("")
        print(folder, "yes")
    except OSError:
        print(folder, "no")
"""
    assert in_python(program).splitlines() == [
        "10001 10001 kallm ['cache']",
        "/ no",
        "/opt/kallm no",
        "/usr/share/kallm no",
        "/cache yes",
        "/tmp yes",
    ]


def test_the_bill_of_materials_names_what_is_installed() -> None:
    program = """
import importlib.metadata, pathlib
print(pathlib.Path("/usr/share/kallm/sbom.cdx.json").read_text())
print(*sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions()}))
"""
    bill, _, installed = in_python(program).rstrip().rpartition("\n")
    document = json.loads(bill)
    assert document["bomFormat"] == "CycloneDX"
    named = {f"{part['name']}=={part['version']}" for part in document["components"]}
    named.add(f"kallm=={document['metadata']['component']['version']}")
    assert {_normal(line) for line in installed.split()} == {_normal(line) for line in named}
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert next(line for line in wanted if line.startswith("torch==")) in {line.partition("+")[0] for line in named}


def test_nothing_is_in_the_image_twice_and_no_address_in_its_history() -> None:
    size = int(docker("image", "inspect", "--format", "{{.Size}}", image()).stdout)
    counted = docker("run", "--rm", "--user", "0", "--entrypoint", "du", image(), "-sxb", "/")
    assert size < 1.05 * int(counted.stdout.split()[-2])
    assert "://" not in docker("history", "--no-trunc", image()).stdout


def test_label_and_receipt_name_the_commit() -> None:
    label = '{{index .Config.Labels "org.opencontainers.image.revision"}}'
    revision = docker("image", "inspect", "--format", label, image()).stdout.strip()
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", revision)
    assert in_python("from kallm.receipt import commit; print(commit()['commit'])").strip() == revision


def test_sigterm_saves_and_leaves_with_75_with_an_init_and_without(volume: str) -> None:
    run = ("run", "--name", volume, "--volume", f"{volume}:/cache", *HARDENED)
    study = ("run", STUDY, "--store", "/cache/store", "--no-probe")
    for init in ((), ("--init",)):
        assert docker(*run, "--detach", *init, image(), *study).returncode == 0
        wait_for("parameters replaced by" if not init else "continuing from step", "logs", volume)
        assert docker("stop", "--time", "90", volume).returncode == 0
        left = docker("inspect", "--format", "{{.State.ExitCode}}", volume).stdout.strip()
        said = docker("logs", volume).stdout
        assert int(left) == ExitCode.PREEMPTED, said
        assert "SIGTERM: saving, then leaving" in said
        docker("rm", volume)
    last = docker(*run, image(), *study)
    assert last.returncode == ExitCode.DONE, last.stdout
    assert "continuing from step" in last.stdout
    assert "1 of 1 cells done" in last.stdout


def _normal(line: str) -> str:
    name, _, version = line.partition("==")
    return f"{re.sub('[-_.]+', '-', name).lower()}=={version}"
