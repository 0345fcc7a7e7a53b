"""The real SmolLM2 on the official BIG-Bench Hard, against stock lm-eval and ``generate``; slow."""

import os

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kallm.data.bbh import load_bbh
from kallm.evaluate.conversation import ask
from kallm.evaluate.harness import KallmLM
from kallm.evaluate.tasks import load_tasks
from kallm.evaluate.tasksettings import TaskSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("KALLM_BBH" not in os.environ, reason="KALLM_BBH names no folder of the official files"),
]
FORMS = {
    "boolean_expressions": "one of two words",
    "formal_fallacies": "a word in lower case",
    "snarks": "a letter of two",
    "hyperbaton": "a letter, short questions",
    "movie_recommendation": "a letter of six",
    "object_counting": "a number",
}
REPLY_TOKENS = 12


@pytest.mark.parametrize("task", FORMS)
def test_official_items_are_answered_as_lm_eval_answers_them(
    task: str, real_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = TaskSettings(task=f"leaderboard_bbh_{task}", data=os.environ["KALLM_BBH"])
    (loaded,) = load_tasks(settings)["tasks"].values()
    loaded.build_all_requests(limit=2)
    requests = loaded.instances
    expected = HFLM(real_model, tokenizer=tokenizer, batch_size=8).loglikelihood(requests, disable_tqdm=True)
    documents = np.array([request.doc_id for request in requests])
    lengths = np.array([len(request.args[1].strip()) for request in requests])
    for batch_size in ("auto", 1, 8, 64):
        engine = KallmLM(model=real_model, tokenizer=tokenizer, batch_size=batch_size)
        found = engine.loglikelihood(requests, disable_tqdm=True)
        ours, theirs = (np.array([value for value, _ in answers]) for answers in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        for each in np.unique(documents):
            for by in (1, lengths[documents == each]):
                assert np.argmax(ours[documents == each] / by) == np.argmax(theirs[documents == each] / by)


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_greedy_replies_equal_generate_token_for_token(
    batch_size: int,
    real_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = KallmLM(model=real_model, tokenizer=tokenizer, batch_size=batch_size)
    items = [item for item in load_bbh(os.environ["KALLM_BBH"], subset="all")[0] if item.index == 0]
    prompts = [engine.apply_chat_template([{"role": "user", "content": ask(item)}]) for item in items[::3]]
    plain = real_model.generate
    expected = {}
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = plain(ids, attention_mask=torch.ones_like(ids), max_new_tokens=REPLY_TOKENS, do_sample=False)
        expected[tuple(ids[0].tolist())] = _until_end(out[0, ids.shape[1] :].tolist(), tokenizer)
    said = {}

    def generate(ids: torch.Tensor, **settings: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = plain(ids, **settings)
        for row, mask, whole in zip(ids, settings["attention_mask"], out, strict=True):
            said[tuple(row[mask == 1].tolist())] = _until_end(whole[len(row) :].tolist(), tokenizer)
        return out

    monkeypatch.setattr(real_model, "generate", generate)
    wanted = {"until": [], "max_gen_toks": REPLY_TOKENS, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, dict(wanted)), number) for number, prompt in enumerate(prompts)]
    engine.generate_until(asked, disable_tqdm=True)
    assert said == expected


def _until_end(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokens[: tokens.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in tokens else tokens
