"""Our engine against stock lm-eval (HFLM) on the same model object, and against ``generate``."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from kallm.engine.likelihoods import takes_trees
from kallm.engine.segments import plan_segments
from kallm.errors import WrongConfiguration
from kallm.evaluate.harness import KallmLM
from kallm.evaluate.opening import choose_device

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
OTHERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4)),
    "gemma2, soft caps": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=4096)),
    "mistral, short window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=64)),
    "mamba, no attention": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
}
EXAMPLES = "Say which is true.\n\n" + "".join(f"Q: is {a} more than {a + 1}?\nA: False\n\n" for a in range(6))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made = make_model(initializer_range=0.2)
    made.generation_config.repetition_penalty = 5.0
    return made


def ask_likelihood(*pairs: tuple[str, str]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


def requests() -> list[Instance]:
    options = [" (A)", " (B)", " (C)", " True", " False", " Fal"]
    questions = [f"{EXAMPLES}Q: is {a} more than {b}?\nA:" for a, b in itertools.product((1, 12, 3), (2, 30))]
    pairs = [(question, option) for question in questions for option in options]
    pairs += [("The sea is ", "calm"), ("The sea is", " calm"), ("", "The sea"), ("", "<|im_start|>x"), ("x", "y" * 40)]
    return ask_likelihood(
        *pairs, pairs[0], *((f"Sarah was{w} cold because", " it rained") for w in ("", " not", " so"))
    )


def stock(model: PreTrainedModel, **settings: object) -> HFLM:
    return HFLM(pretrained=model, tokenizer=make_tokenizer(), **({"batch_size": 8, "max_length": 512} | settings))


def ours(model: PreTrainedModel, **settings: object) -> KallmLM:
    return KallmLM(model=model, tokenizer=make_tokenizer(), **({"max_length": 512} | settings))


def check_equal(
    found: Sequence[tuple[float, bool]], expected: Sequence[tuple[float, bool]], atol: float = 1e-4
) -> None:
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], rtol=0, atol=atol)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_likelihoods_equal_lm_evals(model: PreTrainedModel) -> None:
    assert takes_trees(model)
    expected = stock(model).loglikelihood(requests(), disable_tqdm=True)
    for batch_size in ("auto", 1, 8, 64):
        check_equal(ours(model, batch_size=batch_size).loglikelihood(requests(), disable_tqdm=True), expected)


def test_greedy_continuations_are_recognised(model: PreTrainedModel) -> None:
    ids = make_tokenizer()("The sea", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=5, do_sample=False, repetition_penalty=1.0)[0].tolist()
    said, other = out[7:], [*out[7:-1], (out[-1] + 1) % 259]
    found = ours(model)._loglikelihood_tokens([(None, out[:7], said), (None, out[:7], other)], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_texts_that_are_too_long_are_cut_as_lm_eval_cuts_them(model: PreTrainedModel) -> None:
    expected = stock(model, max_length=64).loglikelihood(requests(), disable_tqdm=True)
    check_equal(ours(model, max_length=64).loglikelihood(requests(), disable_tqdm=True), expected)


@pytest.mark.parametrize("name", OTHERS)
def test_likelihoods_equal_lm_evals_for_other_architectures(name: str) -> None:
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    expected = stock(model).loglikelihood(requests(), disable_tqdm=True)
    check_equal(ours(model).loglikelihood(requests(), disable_tqdm=True), expected)
    assert takes_trees(model) == (name not in ("bloom", "mamba, no attention"))


def test_likelihoods_of_whole_texts_equal_lm_evals(model: PreTrainedModel) -> None:
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("The sea is calm.", EXAMPLES, "x" * 700)]
    expected = stock(model, max_length=100).loglikelihood_rolling(texts, disable_tqdm=True)
    found = ours(model, max_length=100).loglikelihood_rolling(texts, disable_tqdm=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)


def test_long_texts_are_read_in_several_segments(model: PreTrainedModel) -> None:
    pairs = ask_likelihood(("a" * 700, " b" * 300), ("a" * 700, " c"), ("a" * 1400, "b"))
    expected = stock(model, max_length=2048).loglikelihood(pairs, disable_tqdm=True)
    check_equal(ours(model, max_length=2048).loglikelihood(pairs, disable_tqdm=True), expected, atol=1e-3)


def test_what_texts_share_is_computed_once() -> None:
    pairs = [([*range(100), a, b], [c, 7]) for a in range(5) for b in range(3) for c in range(4)]
    segments = plan_segments(pairs, max_tokens=16)
    assert sum(len(segment.input_ids) for segment in segments) == 100 + 5 + 15 + 60
    assert [len(segment.input_ids) for segment in segments[:1]] == [100]
    assert sorted(torch.cat([segment.owners for segment in segments]).tolist()) == sorted(2 * [*range(60)])
    assert sum(segment.num_done for segment in segments) == 60


def test_replies_equal_generate_and_do_not_depend_on_the_batch(model: PreTrainedModel) -> None:
    tokenizer = make_tokenizer()
    contexts = [f"{EXAMPLES}Q: is {a} more than {b}?\nA:" for a, b in itertools.product((1, 12), (2, 30, 400))]
    alone = []
    for context in contexts:
        ids = tokenizer(context, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=12, do_sample=False, repetition_penalty=1.0)
        alone.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    stop = next(reply for reply in alone if len(reply) > 4)[3]
    for until, expected in (([], alone), ([stop], [reply.partition(stop)[0] for reply in alone])):
        settings = {"until": until, "max_gen_toks": 12, "do_sample": False}
        for batch_size in (1, 8, 64):
            asked = [Instance("generate_until", {}, (context, dict(settings)), 0) for context in contexts]
            assert ours(model, batch_size=batch_size).generate_until(asked, disable_tqdm=True) == expected


def test_conversations_are_written_by_the_models_own_template(model: PreTrainedModel) -> None:
    turns = [{"role": "user", "content": "hello"}]
    assert ours(model).apply_chat_template(turns) == stock(model).apply_chat_template(turns)
    assert ours(model).chat_template(True) == stock(model).chat_template(True)


def test_lm_eval_finds_the_model_by_name(model_folder: Path) -> None:
    made = get_model("kallm").create_from_arg_string(f"path={model_folder}", {"batch_size": "8", "device": "cpu"})
    assert isinstance(made, KallmLM)
    expected = stock(make_model()).loglikelihood(requests()[:3], disable_tqdm=True)
    check_equal(made.loglikelihood(requests()[:3], disable_tqdm=True), expected)


def test_lm_evals_command_line_takes_the_model(model_folder: Path, tmp_path: Path) -> None:
    questions = [{"text": text, "answer": number % 2} for number, text in enumerate(("one", "a cat", "is it", "2 + 2"))]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{text}}\nA:",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "questions.yaml").write_text(yaml.safe_dump(task))
    command = [
        sys.executable,
        "-m",
        "kallm.evaluate",
        "run",
        "--model",
        "kallm",
        "--model_args",
        f"path={model_folder}",
    ]
    command += ["--tasks", "questions", "--include_path", str(tmp_path), "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (samples,) = tmp_path.glob("out/*/samples_questions_*.jsonl")
    answers = [json.loads(line) for line in samples.read_text().splitlines()]
    asked = [
        Instance("loglikelihood", {}, (f"Q: {answer['doc']['text']}\nA:", f" {choice}"), 0)
        for answer in sorted(answers, key=lambda answer: answer["doc_id"])
        for choice in ("yes", "no")
    ]
    found = [(float(value), greedy == "True") for each in answers for ((value, greedy),) in each["resps"]]
    check_equal(found, stock(make_model()).loglikelihood(asked, disable_tqdm=True))


def test_device_that_lm_eval_names_by_default_is_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.warns(UserWarning, match="no GPU for device 'cuda:0'"):
        assert choose_device("cuda:0") == torch.device("cpu")
    assert choose_device(None) == choose_device("cpu") == torch.device("cpu")
    for name in ("cuda:1", "gpu"):
        with pytest.raises(WrongConfiguration, match=name):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device(name) for name in (None, "cuda:1")] == [torch.device("cuda"), torch.device("cuda:1")]


def test_wrong_arguments_are_named(model: PreTrainedModel, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongConfiguration, match="path="):
        KallmLM()
    with pytest.raises(WrongConfiguration, match=r"float64.*known are"):
        KallmLM(str(model_folder), dtype="float64")
    with pytest.raises(WrongConfiguration, match=r"batch_size.*'many'"):
        ours(model, batch_size="many")
    with pytest.raises(WrongConfiguration, match=r"no argument 'deltta'.*Did you mean 'delta'"):
        get_model("kallm").create_from_arg_string(f"path={model_folder},deltta=x", {})
    strange = tmp_path / "strange"
    shutil.copytree(model_folder, strange)
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "model_type": "strange", "auto_map": {}}))
    with pytest.raises(WrongConfiguration, match=r"is a 'strange'.*trust_remote_code=True"):
        KallmLM(str(strange))
    asked = [Instance("generate_until", {}, ("x", {"max_gen_toks": 512}), 0)]
    with pytest.raises(WrongConfiguration, match="lower max_gen_toks"):
        ours(model).generate_until(asked, disable_tqdm=True)
