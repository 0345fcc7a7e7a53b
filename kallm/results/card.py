"""The model card of an exported cell, made from its records: what it is, what it scored, and what it is not."""

from pathlib import Path
from typing import Any

import yaml

from kallm.results.record import CellEntry, EvaluationRecord, StudyDocument, TrainingRecord

__all__ = ["write_card"]

_CARD = """---
{front}---

# {title}

{lead}

{notes}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
```

`trust_remote_code=True` runs `modeling_kallm.py` of this folder, where there is one; it needs torch and transformers
only. Without it transformers refuses the folder.

## Parameters

| trainable | stored | FFNs of the tail |
|---:|---:|---:|
| {trainable:,} | {stored:,} | {ffn:,} |

## Scores

{scores}

## Where it comes from

{origin}

## What it is not

- One cell of a study: one variant, one seed. What a difference between variants is worth, only the study's table says,
  which holds all seeds, intervals and tests.
- Not aligned or checked for safety by this study; what holds for the base model holds here, its licence included.
{limits}
"""


def write_card(
    document: StudyDocument,
    entry: CellEntry,
    training: TrainingRecord | None,
    evaluations: list[EvaluationRecord],
    *,
    licence: str = "unknown",
) -> str:
    """Return the text of ``README.md`` with its YAML front matter.

    Args:
        document: the study.
        entry: the cell, as the study names it.
        training: its record; None where nothing trained.
        evaluations: the records that there are.
        licence: the Hugging Face hub's key for the licence of the base model's weights.
    """
    study = document.study
    front: dict[str, Any] = {"license": licence, "library_name": "transformers", "pipeline_tag": "text-generation"}
    kind, _, name = str(study["model"]).partition(":")
    if kind == "hub":
        front["base_model"] = name.partition("@")[0]
    front["tags"] = [
        "kallm",
        entry.variant,
        *(["kolmogorov-arnold"] if _ffn(document, entry) in ("kan", "kat") else []),
    ]
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=f"{entry.variant}{'' if entry.seed is None else f', seed {entry.seed}'} of {document.name}",
        lead=_lead(document, entry, training),
        notes="\n".join(f"- {note}" for note in document.notes) or "- no notes",
        trainable=entry.parameters.trainable,
        stored=entry.parameters.stored,
        ffn=entry.parameters.ffn,
        scores=_scores(document, evaluations),
        origin=_origin(document, entry, training, evaluations),
        limits=_limits(training),
    )


def _ffn(document: StudyDocument, entry: CellEntry) -> str:
    return str(document.study["variants"][entry.variant]["spec"]["ffn"])


def _shown(source: str) -> str:
    """Return a source as strangers may read it: of a folder, which is this machine's own, only its name."""
    return source if source.startswith(("hub:", "package:")) else Path(source).name


def _lead(document: StudyDocument, entry: CellEntry, training: TrainingRecord | None) -> str:
    model, ffn = _shown(document.study["model"]), _ffn(document, entry)
    if training is None:
        return f"`{model}`, untouched: the baseline of the study."
    what = "with its pretrained FFNs trained on" if ffn == "pretrained" else f"with `{ffn}` in the place of its FFNs"
    return (
        f"`{model}`, the last {document.study['tail']} blocks {what}; {training.tokens:,} tokens of "
        f"`{_shown(document.study['dialogues']['source'])}` in {training.steps:,} steps, of which "
        f"{training.supervised_tokens:,} were supervised; `{document.study['trainable']}` trained."
    )


def _scores(document: StudyDocument, evaluations: list[EvaluationRecord]) -> str:
    if not evaluations:
        return "Not evaluated."
    names = {suite.id: suite.name for suite in document.suites}
    rows = [
        f"| {names.get(record.suite, record.suite)} | {score} | {figure.value:.4g} {figure.unit} | {figure.n:,} |"
        for record in evaluations
        for score, figure in record.scores.items()
    ]
    return "\n".join(["| suite | score | value | n |", "|---|---|---:|---:|", *rows])


def _origin(
    document: StudyDocument, entry: CellEntry, training: TrainingRecord | None, evaluations: list[EvaluationRecord]
) -> str:
    facts = {"study": f"{document.name}.{document.hash}", "cell": entry.id}
    facts |= {f"source: {name}": str(identity) for name, identity in document.study.get("sources", {}).items()}
    if training is not None:
        facts["SHA-256 of the trained tensors"] = training.weights["sha256"]
    receipt = training.receipt if training is not None else evaluations[0].receipt if evaluations else {}
    code, hardware = receipt.get("code") or {}, receipt.get("hardware") or {}
    facts["commit"] = f"{code.get('commit')}{' with changes' if code.get('dirty') else ''}"
    facts["image"] = str(receipt.get("image"))
    facts["hardware"] = ", ".join(
        str(hardware[name]) for name in ("device", "processor", "machine") if hardware.get(name)
    )
    facts["precision"] = str(receipt.get("precision"))
    return "\n".join(f"- {name}: `{value}`" for name, value in facts.items() if value not in ("", "None"))


def _limits(training: TrainingRecord | None) -> str:
    if training is not None and training.receipt.get("precision") == "bf16":
        return (
            "- Not the scored bits when run in another precision: it was trained and scored under bf16 autocast, and "
            "the weights are float32."
        )
    return "- Not the scored bits in another precision, on other hardware or with other versions than those above."
