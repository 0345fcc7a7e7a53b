"""A study of three tiny cells that ran to its end, once for all tests that read what it left."""

import shutil
from pathlib import Path

import pytest
from finished_study import Finished

from kallm.progress import Reporter, Stop
from kallm.report.report import write_report
from kallm.results.table import build_table, write_table
from kallm.run.local import run_cells
from kallm.store.local import FolderStore
from kallm.study.plan import make_plan
from kallm.study.study import read_study


@pytest.fixture(scope="session")
def _run_once(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, dialogue_folder: Path) -> Finished:
    text = f"""
name: tiny
model: {model_folder}
tail: 1
dialogues: {{source: {dialogue_folder}, heldout: 2}}
variants:
  - baseline
  - linear
  - small-kan: {{ffn: kan, basis: chebyshev2, degree: 2, hidden: 8}}
seeds: [0]
train: {{tokens: 256, length: 64, batch: 2, micro_batch: 1, lr: 0.01}}
suites: [heldout]
"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KALLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        plan, store = make_plan(read_study(text)), FolderStore(tmp_path_factory.mktemp("finished"))
        with Reporter(quiet=True) as reporter:
            run_cells(plan, list(plan.cells), store, reporter, Stop())
    table = build_table(store, plan.document)
    write_table(store, plan.document, table)
    write_report(store, plan.document, table)
    return Finished(plan.document, store.root)


@pytest.fixture
def finished(_run_once: Finished, tmp_path: Path) -> Finished:
    """The study in a folder of the test's own."""
    return Finished(_run_once.document, Path(shutil.copytree(_run_once.folder, tmp_path / "finished")))
