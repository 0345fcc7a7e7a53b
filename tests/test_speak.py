"""A trained cell at work: its whole model, the commands that speak and export, and the card."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
import yaml
from click.testing import Result
from finished_study import Finished, contents
from studies import SyntheticStudy
from test_exported import open_elsewhere
from typer.testing import CliRunner

from kallm.cli import app
from kallm.data.packing import encode
from kallm.errors import KallmError, WrongConfiguration
from kallm.options import find_plan
from kallm.progress import Reporter
from kallm.results.card import write_card
from kallm.results.record import TrainingRecord, cell_key, read_record
from kallm.run.materials import Materials
from kallm.run.speech import Speaker
from kallm.run.trained import open_trained, read_evaluations
from kallm.store.local import FolderStore

pytest_plugins = ["finished"]

VARIANTS = ["baseline", "linear", "small-kan"]


def plan_of(finished: Finished) -> Any:
    return find_plan(finished.store, f"{finished.document.name}.{finished.document.hash}")


def cell_of(plan: Any, variant: str) -> Any:
    return next(cell for cell in plan.cells if cell.name == variant)


def kallm(*arguments: str, folder: Path, stdin: str = "") -> Result:
    """Call the program on the finished study, as ``main`` does."""
    return CliRunner().invoke(app, [*arguments, "--store", str(folder)], input=stdin, catch_exceptions=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_model_of_a_cell_scores_what_its_record_says(variant: str, finished: Finished) -> None:
    plan = plan_of(finished)
    cell = cell_of(plan, variant)
    (record,) = read_evaluations(finished.store, plan, cell)
    with Reporter(quiet=True) as reporter:
        conversations = Materials(plan, reporter, lambda: None).heldout
    with open_trained(plan, cell, finished.store) as trained, torch.no_grad():
        rows = [torch.tensor([encode(trained.tokenizer, conversation)]) for conversation in conversations]
        nll = sum(float(trained.model(ids, labels=ids).loss.double()) * (ids.shape[1] - 1) for ids in rows)
    found = nll / sum(ids.shape[1] - 1 for ids in rows)
    assert found == pytest.approx(record.scores["cross_entropy"].value, abs=1e-6)


def test_the_cells_are_different_models(finished: Finished) -> None:
    plan, ids, found = plan_of(finished), torch.arange(3, 20)[None], []
    for variant in VARIANTS:
        with open_trained(plan, cell_of(plan, variant), finished.store) as trained, torch.no_grad():
            found.append(trained.model(ids).logits)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_generate_prints_what_the_model_generates(finished: Finished) -> None:
    plan = plan_of(finished)
    with open_trained(plan, cell_of(plan, "small-kan"), finished.store) as trained:
        ids = trained.tokenizer("the sea", return_tensors="pt")["input_ids"]
        mask = torch.ones_like(ids)
        out = trained.model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        expected = trained.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    before = contents(finished.folder)
    done = kallm("generate", "small-kan", "the sea", "--max-new-tokens", "12", folder=finished.folder)
    assert done.exit_code == 0, done.output
    assert done.stdout.rstrip("\n") == expected.rstrip("\n")
    assert contents(finished.folder) == before


def test_a_seed_gives_the_same_text_again_and_another_seed_another(finished: Finished) -> None:
    plan = plan_of(finished)
    with open_trained(plan, cell_of(plan, "linear"), finished.store) as trained:

        def say(seed: int) -> str:
            return Speaker(trained, max_new_tokens=16, temperature=1.0, seed=seed).continue_text("tea")

        assert say(0) == say(0)
        assert say(0) != say(1)


def test_a_piped_chat_answers_every_line_as_the_conversation_goes(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(finished)
    with open_trained(plan, cell_of(plan, "small-kan"), finished.store) as trained:
        speaker = Speaker(trained, max_new_tokens=8, temperature=0.0, seed=0)
        speaker.begin()
        first, second = speaker.reply("tea?"), speaker.reply("rain?")
        speaker.begin()
        alone = speaker.reply("rain?")
    expected = capsys.readouterr().out
    assert first in expected
    assert second in expected
    lines = "tea?\n\nrain?\n/new\nrain?\n/exit\nnever answered\n"
    done = kallm("chat", "small-kan", "--max-new-tokens", "8", folder=finished.folder, stdin=lines)
    assert done.exit_code == 0, done.output
    assert done.stdout == expected
    assert alone in done.stdout


def test_the_oldest_turns_are_forgotten_and_a_turn_that_never_fits_is_refused(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(finished)
    with open_trained(plan, cell_of(plan, "baseline"), finished.store) as trained:
        speaker = Speaker(trained, max_new_tokens=4, temperature=0.0, seed=0)
        trained.model.config.max_position_embeddings = 80
        speaker.reply("a" * 30)
        fresh = speaker.reply("b" * 40)
        assert "the oldest turn is forgotten" in capsys.readouterr().err
        speaker.begin()
        assert speaker.reply("b" * 40) == fresh
        with pytest.raises(WrongConfiguration, match=r"the turn has \d+ tokens, but 76 fit; shorten it"):
            Speaker(trained, max_new_tokens=4, temperature=0.0, seed=0).reply("c" * 100)
        with pytest.raises(WrongConfiguration, match=r"the prompt has 100 tokens, and 76 fit beside"):
            speaker.continue_text("c" * 100)
        with pytest.raises(WrongConfiguration, match="the prompt is empty"):
            speaker.continue_text("")
        trained.tokenizer.chat_template = None
        with pytest.raises(WrongConfiguration, match="has no chat template: use 'kallm generate'"):
            speaker.begin()


def read_until(terminal: int, ending: bytes) -> bytes:
    """Read what a program writes to its terminal; when it has left, this raises OSError."""
    seen = b""
    while not seen.endswith(ending):
        seen += os.read(terminal, 1024)
    return seen


@pytest.fixture
def _heeds_interrupts() -> Iterator[None]:
    """Let what the test starts heed Ctrl-C, even where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heeds_interrupts")
@pytest.mark.parametrize("ending", [b"\x04", b"\x03"])
def test_a_chat_on_a_terminal_is_left_with_0(ending: bytes, finished: Finished) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "kallm.cli", "chat", "baseline", "--max-new-tokens", "4"]
    chat = subprocess.Popen(
        [*command, "--store", str(finished.folder)],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    seen = read_until(ours, b"/exit leaves\r\n> ")
    os.write(ours, b"tea?\r")
    seen += read_until(ours, b"> ")
    if ending == b"\x03":  # the terminal controls no session, so that the key alone sends nothing
        # Python notices a signal that comes between its last look and the blocking read only with the next key
        while chat.poll() is None and psutil.Process(chat.pid).status() != psutil.STATUS_SLEEPING:
            time.sleep(0.01)
        chat.send_signal(signal.SIGINT)
    else:
        os.write(ours, ending)
    assert chat.wait(timeout=120) == 0, seen
    os.close(ours)
    assert b"Traceback" not in seen


@pytest.mark.parametrize(
    ("damage", "arguments", "code", "sentence"),
    [
        ("", ["chat", "small-kna"], 2, "unknown cell 'small-kna' in"),
        ("", ["generate", "small-kan", ""], 2, "the prompt is empty"),
        ("", ["export", "small-kan", "."], 2, "' is there already: name a folder that is new or empty"),
        ("trained.json", ["chat", "small-kan"], 2, "is not trained yet: 'kallm run' or 'kallm cell' of its study"),
        ("weights/*/weights.safetensors", ["generate", "small-kan", "x"], 3, "weights.safetensors is missing, but"),
        ("../../studies/*/study.json", ["chat", "small-kan"], 2, "names small-kan.seed-0."),
    ],
)
def test_what_cannot_speak_is_one_clear_line(
    damage: str, arguments: list[str], code: int, sentence: str, finished: Finished
) -> None:
    if damage:
        cell = cell_of(plan_of(finished), "small-kan").id
        (path,) = (finished.folder / "cells" / cell).glob(damage)
        path.unlink()
    done = kallm(*arguments, folder=finished.folder)
    assert isinstance(done.exception, KallmError)
    assert done.exception.code == code
    assert sentence in str(done.exception)
    assert done.stdout == ""


def test_a_diverged_cell_has_no_weights(finished: Finished) -> None:
    plan = plan_of(finished)
    cell = cell_of(plan, "small-kan")
    key = cell_key(cell.id, "trained.json")
    record = read_record(finished.store, TrainingRecord, key)
    assert record is not None
    finished.store.put(key, record.model_copy(update={"outcome": "diverged", "cause": "loss nan"}).to_bytes())
    with (
        pytest.raises(WrongConfiguration, match="has no weights, it diverged: loss nan"),
        open_trained(plan, cell, finished.store),
    ):
        pass


def test_exported_cells_compute_the_same_bits_without_kallm(finished: Finished, tmp_path: Path) -> None:
    plan = plan_of(finished)
    for variant in VARIANTS:
        done = kallm("export", variant, str(tmp_path / variant), "--license", "apache-2.0", folder=finished.folder)
        assert done.exit_code == 0, done.output
        assert done.stdout == f"{cell_of(plan, variant).id} is in {tmp_path / variant}\n"
    told = open_elsewhere([tmp_path / variant for variant in VARIANTS], tmp_path)
    for variant, each in zip(VARIANTS, told, strict=True):
        cell, folder = cell_of(plan, variant), tmp_path / variant
        assert each["parameters"] == cell.parameters.stored
        with open_trained(plan, cell, finished.store) as trained, torch.no_grad():
            expected = trained.model(torch.arange(3, 33)[None]).logits
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
            assert tokenizer.chat_template == trained.tokenizer.chat_template
        assert torch.equal(torch.load(f"{folder}.pt")["logits"], expected)
        card = (folder / "README.md").read_text()
        assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
        assert f"- cell: `{cell.id}`" in card
        assert str(tmp_path.parent) not in card


def test_a_card_tells_the_records_and_what_they_are_not(tmp_path: Path) -> None:
    study, store = SyntheticStudy(notes=("a demonstration budget",)), FolderStore(tmp_path)
    document = study.fill(store)
    entry = study.entry("kan", 1)
    training = read_record(store, TrainingRecord, cell_key(entry.id, "trained.json"))
    evaluations = [study.evaluate(store, entry, suite) for suite in study.suites]
    study_of_hub = document.study | {"model": "hub:org/name@" + "0" * 40, "tail": 5, "trainable": "tail+head"}
    study_of_hub |= {"dialogues": {"source": "package:chitchat-dataset"}, "sources": {"model": "abc"}}
    card = write_card(document.model_copy(update={"study": study_of_hub}), entry, training, evaluations)
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/name",
        "tags": ["kallm", "kan", "kolmogorov-arnold"],
    }
    for record in evaluations:
        for score, figure in record.scores.items():
            assert f"| {score} | {figure.value:.4g} {figure.unit} | {figure.n:,} |" in card
    for told in (
        "| 39,382,848 | 134,515,008 | 6,635,520 |",
        "- study: `synthetic.0123456789ab`",
        f"`{training.weights['sha256'] if training else ''}`",
        "1f2e3d4c5b6a79880123456789abcdef01234567",
        "Test CPU",
        "- a demonstration budget",
        "## What it is not",
    ):
        assert told in card
