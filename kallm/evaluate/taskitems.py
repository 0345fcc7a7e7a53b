"""What lm-eval found, as scores and as one record for each item."""

from collections import defaultdict
from typing import Any

import numpy as np
from lm_eval.api.registry import get_aggregation
from lm_eval.api.task import Task

from kallm.evaluate.score import Score
from kallm.evaluate.suites import Evaluation

__all__ = ["summarise_tasks"]


def summarise_tasks(name: str, tasks: dict[str, Task], found: Any) -> Evaluation:
    """Return lm-eval's figures: per task, their mean over tasks, and the average that a group defines itself."""
    items, by_task = [], {}
    for task_name, task in tasks.items():
        members = _items(task_name, task, found["samples"][task_name])
        items += members
        by_task[task_name] = _scores(found["results"][task_name], members)
    shared = [label for label in next(iter(by_task.values())) if all(label in scores for scores in by_task.values())]
    scores = {
        label: Score(
            value=float(np.mean([of[label].value for of in by_task.values()])),
            unit=next(iter(by_task.values()))[label].unit,
            n=sum(of[label].n for of in by_task.values()),
        )
        for label in shared
    }
    for label, value in _figures(found.get("groups", {}).get(name, {})):
        if label in scores and len(tasks) > 1:
            scores[f"{label} by lm-eval's group"] = scores[label].model_copy(update={"value": value})
    return Evaluation(scores, by_task if len(by_task) > 1 else {}, items)


def _scores(figures: dict[str, Any], items: list[dict[str, Any]]) -> dict[str, Score]:
    found = {
        label: Score(value=value, unit="fraction" if label in items[0]["metrics"] else "as lm-eval says", n=len(items))
        for label, value in _figures(figures)
    }
    for label in ("acc", "acc_norm"):  # a task may define only one of them; both follow from the likelihoods
        if label in items[0]["metrics"] and label not in found:
            mean = float(np.mean([item["metrics"][label] for item in items]))
            found[label] = Score(value=mean, unit="fraction", n=len(items))
    return found


def _figures(figures: dict[str, Any]) -> list[tuple[str, float]]:
    """Return label and value of what lm-eval names ``metric,filter``."""
    found = []
    for key, value in figures.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            found.append((_label(metric, chosen), float(value)))
    return found


def _label(metric: str, chosen: str) -> str:
    return metric if chosen == "none" else f"{metric} ({chosen})"


def _items(name: str, task: Task, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was asked and answered, one record for each document; lm-eval has one for each filter."""
    by_document: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        by_document[sample["doc_id"]].append(sample)
    mean, averages = get_aggregation("mean"), task.aggregation()
    records = []
    for number, filtered in sorted(by_document.items()):
        first = filtered[0]
        metrics = {
            _label(metric, sample["filter"]): float(sample[metric])
            for sample in filtered
            for metric in sample["metrics"]
            if averages.get(metric) is mean and isinstance(sample[metric], (bool, int, float, np.number))
        }
        record = {"id": f"{name}/{number}", "task": name, "prompt": first["arguments"][0][0], "metrics": metrics}
        if task.OUTPUT_TYPE == "multiple_choice":
            record |= _choice(task, first)
            metrics |= {"acc": float(record["correct"]), "acc_norm": float(record["correct_norm"])} | metrics
        elif task.OUTPUT_TYPE == "generate_until":
            record |= _reply(first, metrics)
        else:
            record |= {"loglikelihoods": [response[0] for response in first["resps"]]}
        records.append(record)
    return records


def _choice(task: Task, sample: dict[str, Any]) -> dict[str, Any]:
    """Return which option was chosen; equal likelihoods choose the first one, as lm-eval does."""
    options = [str(option) for option in task.doc_to_choice(sample["doc"])]
    likelihoods = [float(response[0][0]) for response in sample["resps"]][: len(options)]
    target = sample["target"]
    golds = [_place(each, options) for each in (target if isinstance(target, list) else [target])]
    choice = int(np.argmax(likelihoods))
    choice_norm = int(np.argmax(np.array(likelihoods) / [max(len(option), 1) for option in options]))
    return {
        "gold": golds[0],
        "choice": choice,
        "choice_norm": choice_norm,
        "correct": choice in golds,
        "correct_norm": choice_norm in golds,
        "num_options": len(options),
        "options": options,
        "loglikelihoods": likelihoods,
    }


def _place(target: Any, options: list[str]) -> int:
    """Return an answer's place among the options; -1 where it is none of them, then every choice is wrong."""
    if isinstance(target, str):
        return options.index(target) if target in options else -1
    return int(target) if 0 <= int(target) < len(options) else -1


def _reply(sample: dict[str, Any], metrics: dict[str, float]) -> dict[str, Any]:
    """Return what was replied, what lm-eval's first filter read in it, and whether its first metric is satisfied."""
    reply = sample["resps"][0][0]
    parsed = sample["filtered_resps"][0]
    parsed = parsed[0] if isinstance(parsed, list) and parsed else parsed
    status = "empty" if not str(reply).strip() else "unparsed" if parsed == "[invalid]" else "parsed"
    return {
        "reply": reply,
        "parsed": str(parsed),
        "status": status,
        "gold": str(sample["target"]),
        "correct": next(iter(metrics.values()), 0.0) == 1.0,
        "num_options": 0,
    }
