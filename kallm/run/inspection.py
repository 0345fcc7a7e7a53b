"""What the KAN layers of a trained cell learned, computed from its weights: the suite ``edges`` without its record."""

import torch

from kallm.evaluate.edges import choose_passages, describe_edges, find_layers
from kallm.evaluate.suites import EdgesSettings
from kallm.model.passage import Passage
from kallm.progress import Reporter
from kallm.results.record import Items
from kallm.run.materials import Materials
from kallm.run.trained import open_trained
from kallm.store.store import Store
from kallm.study.plan import Cell, Plan

__all__ = ["describe_cell"]


def describe_cell(plan: Plan, cell: Cell, store: Store) -> Items:
    """Return one item per KAN layer of a cell, from the settings of the study, or the suite's own; empty without any.

    Raises:
        WrongConfiguration: the cell is not trained yet, or has diverged.
        DataMismatch: its weights are missing, damaged or other ones.
    """
    if cell.variant.spec.ffn != "kan":
        return []
    asked = [settings for settings in plan.suites.values() if isinstance(settings, EdgesSettings)]
    settings = asked[0] if asked else EdgesSettings()
    with Reporter(quiet=True) as reporter:
        conversations = Materials(plan, reporter, lambda: None).heldout
    with open_trained(plan, cell, store) as trained, torch.no_grad(), trained.precision:

        def read(passage: Passage) -> None:
            trained.model.base_model(input_ids=passage.input_ids[None].to(trained.model.device), use_cache=False)

        passages = choose_passages(settings, trained.tokenizer, conversations)
        return describe_edges(find_layers(trained.model), map(read, passages), settings)
