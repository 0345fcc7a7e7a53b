"""Tails that are the whole model: a tied head, a tail of all blocks, and models that cannot be cut."""

import copy
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, make_architecture
from conftest import make_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BloomConfig, GraniteConfig, PreTrainedModel

from kallm.data.packing import IGNORED, Row
from kallm.errors import WrongConfiguration
from kallm.kan.spec import FFNSpec
from kallm.model.passage import Passage, apart
from kallm.model.places import find_ffns
from kallm.model.retrofit import RetrofitConfig, retrofit_
from kallm.model.start import freeze, record_ffn_inputs, start_tail
from kallm.model.trunk import Tail, Trunk, WholeTail, assembled, split
from kallm.progress import Reporter, Stop
from kallm.results.record import EvaluationRecord, TrainingRecord, cell_key, evaluation_key, read_record
from kallm.run.local import run_cells
from kallm.store.opening import open_store
from kallm.study.plan import make_plan
from kallm.study.study import read_study
from kallm.train.checkpoint import load_checkpoint, load_weights, save_checkpoint, save_weights, take_snapshot
from kallm.train.loop import Progress, Trainer, make_optimizer
from kallm.train.recipe import Recipe

TIED = {"tie_word_embeddings": True}
KAN = RetrofitConfig(ffn={"ffn": "kan", "basis": "chebyshev2", "degree": 2, "hidden": 24}).ffn
RECIPE = Recipe(tokens=1, length=14, batch=4, micro_batch=2, epochs=1, lr=0.01)


def make_rows(vocabulary: int = VOCABULARY, num: int = 4) -> list[Row]:
    """Return packed rows of two documents, 5 and 9 tokens."""
    draw = torch.Generator().manual_seed(5)
    rows = []
    for _ in range(num):
        ids = torch.randint(3, vocabulary, (14,), generator=draw)
        targets = ids.roll(-1)
        targets[[4, 13]] = IGNORED
        rows.append(Row(Passage(ids, torch.cat([torch.arange(5), torch.arange(9)])), targets))
    return rows


def one_document(row: Row) -> Passage:
    """Return a row's second document alone: packed ones equal the whole model's only up to rounding."""
    return Passage(row.passage.input_ids[5:], row.passage.position_ids[5:])


def make_trainer(trunk: Trunk, tail: Tail, rows: list[Row]) -> Trainer:
    hidden = [trunk(row.passage) for row in rows]
    return Trainer(tail, make_optimizer(tail, RECIPE), rows, hidden, RECIPE, seed=0, progress=Progress())


def plain_loss(model: PreTrainedModel, rows: list[Row], *, masks: bool = False) -> Tensor:
    """Return the summed loss of rows the plain way: the whole model, full logits, torch's cross-entropy."""
    ids = torch.stack([row.passage.input_ids for row in rows])
    positions = torch.stack([row.passage.position_ids for row in rows])
    mask = apart(positions)[:, None] if masks else None
    logits = model(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    targets = torch.stack([row.targets for row in rows])
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def assert_gradients_equal(tail: Tail, model: PreTrainedModel) -> None:
    """Every gradient of the tail's is the whole model's of that name, and nothing else trains."""
    expected = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    found = {tail.whole_name(name): value.grad for name, value in tail.named_parameters() if value.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        size = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6 + 1e-5 * size)


@pytest.mark.parametrize(
    ("name", "changes"), [("llama", TIED), ("gpt2", {}), ("gemma2", {}), ("opt", {}), ("qwen3", TIED)]
)
def test_a_tied_heads_gradient_is_the_sum_of_both_its_uses(name: str, changes: dict[str, Any]) -> None:
    model = make_architecture(name, num_blocks=5, **changes)
    plain, rows = copy.deepcopy(model), make_rows()
    trunk, tail = split(model, 2, head="tied")
    freeze(tail, "tail+head")
    trainer = make_trainer(trunk, tail, rows)
    tail.eval()
    loss = trainer.forward([0, 1, 2])
    loss.backward()

    plain.requires_grad_(False)
    twin = split(plain, 2)[1]
    for parameter in [name for name, _ in tail.named_parameters() if _.requires_grad]:
        plain.get_parameter(tail.whole_name(parameter)).requires_grad_(True)
    expected = plain_loss(plain, rows[:3], masks=twin.masks)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_gradients_equal(tail, plain)
    embedding = plain.get_input_embeddings().weight
    assert embedding.grad is not None
    assert tail.body.get_input_embeddings().weight is tail.head.weight


@pytest.mark.parametrize("spec", [None, KAN])
def test_a_tail_of_all_blocks_trains_as_the_whole_model_does(spec: FFNSpec | None) -> None:
    """From the weights (the FFNs stay) and from scratch (every block's FFN is replaced)."""
    model, rows = make_architecture("llama", num_blocks=5), make_rows()
    plain = copy.deepcopy(model)
    trunk, tail = split(model, 5)
    if spec is not None:
        config = RetrofitConfig(ffn=spec, layers="all")
        for each in (tail, plain):
            assert len(retrofit_(each, config, generator=torch.Generator().manual_seed(3)).replacements) == 5
    freeze(tail, "tail+head")
    loss = make_trainer(trunk, tail, rows).forward([0, 1, 2, 3])
    loss.backward()
    plain.get_input_embeddings().requires_grad_(False)
    expected = plain_loss(plain, rows)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_gradients_equal(tail, plain)


def test_capped_logits_give_the_models_own_loss_and_gradients() -> None:
    model, rows = make_architecture("gemma2", num_blocks=5, final_logit_softcapping=0.5), make_rows()
    trunk, tail = split(model, 3)
    assert trunk.cut == 2
    freeze(tail, "tail+head")
    loss = make_trainer(trunk, tail, rows).forward([0, 1])
    loss.backward()
    plain = copy.deepcopy(model)
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight" or any(f"layers.{n}." in name for n in (2, 3, 4)))
    plain.model.norm.requires_grad_(True)
    expected = plain_loss(plain, rows[:2])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_gradients_equal(tail, plain)


def make_granite() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = GraniteConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=5,
        embedding_multiplier=12.0,
        logits_scaling=8.0,
        pad_token_id=0,
        **sizes,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_model_that_cannot_be_cut_runs_whole_and_says_so() -> None:
    model, rows = make_granite(), make_rows()
    trunk, tail = split(model, 2)
    assert isinstance(tail, WholeTail)
    assert trunk.note.startswith("GraniteForCausalLM cannot be cut between its blocks, so each cell runs the whole")
    passage = one_document(rows[0])
    with torch.no_grad():
        logits = tail.head(tail(trunk(passage)[None], passage.position_ids[None]))
        whole = model(passage.input_ids[None], position_ids=passage.position_ids[None], use_cache=False).logits
    assert torch.equal(logits, whole)
    freeze(tail, "tail")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(trunk, tail, rows)
    losses = [trainer.advance(lambda: None)["loss"] for _ in range(trainer.num_steps)]
    assert losses[0] == pytest.approx(plain_loss(model, rows).item() / 48, rel=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    trained = {tail.whole_name(name) for name, value in tail.named_parameters() if value.requires_grad}
    assert {name.split(".")[2] for name in trained if ".layers." in name} == {"3", "4"}


def test_a_model_without_position_ids_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=99, hidden_size=32, n_layer=3, n_head=4))
    with pytest.raises(WrongConfiguration, match="BloomModel takes no position ids"):
        split(model, 2)


def test_a_tied_head_needs_a_tied_model() -> None:
    with pytest.raises(WrongConfiguration, match="head: tied needs a model whose embedding is its head"):
        split(make_architecture("llama", num_blocks=5), 2, head="tied")


def tied() -> tuple[PreTrainedModel, Trunk, WholeTail]:
    """Return a tiny model, and its tied tail with two fresh FFNs."""
    model = make_model()
    trunk, tail = split(model, 2, head="tied")
    rows = make_rows(259)
    inputs = record_ffn_inputs(tail, [(trunk(row.passage), row.passage.position_ids) for row in rows])
    assert len(inputs) == 2
    report = start_tail(tail, KAN, inputs, seed=1)
    assert [each.name for each in report.replacements] == ["body.layers.3.mlp", "body.layers.4.mlp"]
    freeze(tail, "tail+head")
    assert isinstance(tail, WholeTail)
    return model, trunk, tail


def test_fresh_ffns_of_a_tied_tail_are_calibrated_on_what_an_untied_one_reads() -> None:
    rows = make_rows(259)
    found = []
    for head in ("untied", "tied"):
        trunk, tail = split(make_model(), 2, head=head)  # type: ignore[arg-type]
        found.append(record_ffn_inputs(tail, [(trunk(row.passage), row.passage.position_ids) for row in rows]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_training_a_tied_tail_leaves_the_model_and_other_tails_alone() -> None:
    model, trunk, tail = tied()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = copy.deepcopy(tail)
    trainer = make_trainer(trunk, tail, make_rows(259))
    trainer.advance(lambda: None)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(twin.head.weight, model.lm_head.weight)
    assert not torch.equal(tail.head.weight, twin.head.weight)
    assert twin.body.embed_tokens.weight is twin.head.weight
    assert twin.body.layers[0] is tail.body.layers[0] is model.model.layers[0]
    assert twin.body.layers[4] is not tail.body.layers[4]
    trainable = sum(value.numel() for value in tail.parameters() if value.requires_grad)
    blocks = sum(value.numel() for block in tail.blocks for value in block.parameters())
    assert trainable == blocks + 259 * 48 + 48


def test_a_tied_tails_weights_and_checkpoints_come_back(tmp_path) -> None:
    store, rows = open_store(str(tmp_path)), make_rows(259)
    _, trunk, tail = tied()
    trainer = make_trainer(trunk, tail, rows)
    trainer.advance(lambda: None)
    weights = save_weights(store, "w", tail)
    state = save_checkpoint(store, "c", take_snapshot(tail, trainer._optimizer, trainer.progress))
    _, _, other = tied()
    load_weights(store, weights, other)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in tail.state_dict().items())
    assert other.body.embed_tokens.weight is other.head.weight

    _, trunk, again = tied()
    optimizer = make_optimizer(again, RECIPE)
    progress = load_checkpoint(store, state, again, optimizer)
    assert progress == trainer.progress
    for ours, theirs in zip(optimizer.state.values(), trainer._optimizer.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_tied_tail_put_into_the_whole_model_generates_and_is_taken_out_again() -> None:
    model, trunk, tail = tied()
    make_trainer(trunk, tail, make_rows(259)).advance(lambda: None)
    passage = one_document(make_rows(259)[0])
    ids, positions = passage.input_ids[None], passage.position_ids[None]
    before = {name: id(value) for name, value in model.named_parameters()}
    with torch.no_grad(), assembled(model, tail.eval()) as whole:
        assert whole.get_input_embeddings().weight is whole.lm_head.weight is tail.head.weight
        expected = tail.head(tail(ids[..., None].float(), positions))
        assert torch.equal(whole(ids, use_cache=False).logits, expected)
        whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert {name: id(value) for name, value in model.named_parameters()} == before
    assert not model.model._forward_pre_hooks


def test_a_pretrained_tail_of_the_same_form_gives_the_models_own_logits() -> None:
    model, _, tail = tied()
    passage = one_document(make_rows(259)[0])
    original = tail.pretrained(model).eval()
    with torch.no_grad():
        found = original.head(original(passage.input_ids[None, :, None].float(), passage.position_ids[None]))
        whole = model(passage.input_ids[None], position_ids=passage.position_ids[None], use_cache=False).logits
    assert torch.equal(found, whole)
    assert len(find_ffns(original)) == 5


@pytest.mark.parametrize("override", ["tail=all", "head=tied"])
def test_a_study_without_a_trunk_learns_and_is_evaluated(override: str, study_text: str, tmp_path) -> None:
    plan, store = make_plan(read_study(study_text, [override])), open_store(str(tmp_path))
    with Reporter(quiet=True) as reporter:
        run_cells(plan, list(plan.cells), store, reporter, Stop())
    for cell in plan.cells:
        record = read_record(store, TrainingRecord, cell_key(cell.id, "trained.json"))
        assert record is None or record.loss_history[-1][1] < record.loss_history[0][1]
        assert all(read_record(store, EvaluationRecord, evaluation_key(cell.id, suite)) for suite in plan.suites)
