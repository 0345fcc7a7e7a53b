"""What a retrofitted model must still do, on nine architectures: whatever Hugging Face's tools do with a plain one."""

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, HIDDEN, VOCABULARY, WIDTH, make_architecture
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

from kallm.kan.ffns import FFN
from kallm.model.places import find_ffns
from kallm.model.retrofit import Report, RetrofitConfig, retrofit_

KAN = RetrofitConfig(ffn={"ffn": "kan", "basis": "chebyshev2", "degree": 2}, layers="last:2")
over_architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def retrofitted(name: str, **changes: Any) -> tuple[PreTrainedModel, Report]:
    model = make_architecture(name, **changes)
    return model, retrofit_(model, KAN)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(tokens(2, 9)).logits


@over_architectures
def test_revert_restores_the_pretrained_model_bit_for_bit(name: str) -> None:
    model = make_architecture(name)
    before, weights = logits(model), model.state_dict()
    report = retrofit_(model, KAN)
    assert not torch.equal(logits(model), before)
    report.revert()
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == list(weights)
    report.revert()
    assert torch.equal(logits(model), before)


@over_architectures
def test_the_model_computes_what_the_replaced_block_would_with_the_new_ffn(name: str) -> None:
    """The FFN reads and gives what the pretrained one reads and gives: with its function, the logits are equal."""
    model = make_architecture(name)
    before = logits(model)
    report = retrofit_(model, RetrofitConfig(ffn={"ffn": "affine"}, layers="all"))
    for each in report.replacements:
        each.after.forward = each.before.forward  # type: ignore[method-assign]
    assert torch.equal(logits(model), before)


@over_architectures
def test_a_default_swiglu_takes_the_pretrained_sizes(name: str) -> None:
    model = make_architecture(name)
    report = retrofit_(model, RetrofitConfig(ffn={"ffn": "swiglu"}, layers="all"))
    assert {(r.after.up_proj.in_features, r.after.up_proj.out_features) for r in report.replacements} == {
        (WIDTH, HIDDEN)
    }


@over_architectures
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    model = make_architecture(name).to(dtype)
    retrofit_(model, KAN)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert logits(model).dtype is dtype
    assert logits(model).isfinite().all()


@over_architectures
def test_a_retrofit_on_the_meta_device_takes_the_weights_of_a_real_one(name: str) -> None:
    model, _ = retrofitted(name)
    with torch.device("meta"):
        empty = make_architecture(name)
    retrofit_(empty, KAN)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    real = make_architecture(name)
    retrofit_(real, KAN, generator=torch.Generator().manual_seed(9))
    real.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(real), logits(model))


@over_architectures
def test_generation_with_the_kv_cache_equals_generation_without(name: str) -> None:
    model, _ = retrofitted(name)
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    prompt = tokens(2, 7)
    cached, plain = (
        model.generate(prompt, attention_mask=torch.ones_like(prompt), eos_token_id=None, use_cache=use, **settings)
        for use in (True, False)
    )
    assert cached.sequences.shape == (2, 15)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=0, atol=1e-5)


@over_architectures
def test_a_row_padded_on_the_left_gives_what_it_gives_alone(name: str) -> None:
    model, _ = retrofitted(name)
    rows = [tokens(9), tokens(4, seed=2)]
    batch = torch.stack([nn.functional.pad(row, (9 - len(row), 0)) for row in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (9 - len(row), 0)) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        together = model(batch, attention_mask=mask, position_ids=positions).logits
    written = model.generate(batch, attention_mask=mask, **settings)[:, 9:]
    for row, padded, continued in zip(rows, together, written, strict=True):
        with torch.no_grad():
            alone = model(row[None]).logits[0]
        torch.testing.assert_close(padded[-len(row) :], alone, rtol=0, atol=1e-5)
        expected = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **settings)
        assert torch.equal(continued, expected[0, len(row) :])


@over_architectures
def test_gradient_checkpointing_gives_equal_gradients(name: str) -> None:
    model, _ = retrofitted(name)
    model.train()
    batch = tokens(2, 9)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(batch, labels=batch, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_activation_checkpointing
    checkpointed = gradients()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert all(grad.abs().max() > 0 for name, grad in plain.items() if ".layers.0.linear" in name)


@pytest.fixture
def library_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers logs from the level of a warning on."""
    logging.enable_propagation()
    caplog.set_level("WARNING")
    yield caplog
    logging.disable_propagation()


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **changes})


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tokens(4, 9)]


@over_architectures
def test_the_trainer_lowers_the_loss_and_warns_of_nothing(name: str, tmp_path: Path, library_log) -> None:
    model, report = retrofitted(name)
    before = [parameter.clone() for r in report.replacements for parameter in r.after.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = [parameter for r in report.replacements for parameter in r.after.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert [record.message for record in library_log.records] == []


def test_the_trainers_checkpoints_warn_and_resume(tmp_path: Path) -> None:
    model, _ = retrofitted("llama")
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    with pytest.warns(UserWarning, match=r"kallm\.save"):
        Trainer(model=model, args=arguments(tmp_path, **settings), train_dataset=rows()).train()
    again, _ = retrofitted("llama")
    with pytest.warns(UserWarning, match=r"kallm\.save"):
        Trainer(model=again, args=arguments(tmp_path, **settings), train_dataset=rows()).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )
    assert torch.equal(logits(again), logits(model))


@over_architectures
def test_lora_trains_on_top_and_its_merge_keeps_the_logits(name: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: LoRA on top of a retrofit is not tested")
    model, report = retrofitted(name)
    before = logits(model)
    inner = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(".linear")}
    assert len(inner) == 4
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=sorted(inner), r=2))
    assert torch.equal(logits(adapted), before)
    trainable = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(inner)
    assert all("lora_" in n for n in trainable)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
        optimizer.step()
    trained = logits(adapted)
    assert not torch.equal(trained, before)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-5)
    report.revert()
    assert not any(isinstance(module, FFN) for module in merged.modules())


@over_architectures
def test_a_plain_save_warns_until_the_retrofit_is_reverted(name: str, tmp_path: Path) -> None:
    model, report = retrofitted(name)
    with pytest.warns(UserWarning, match=r"the 2 replaced FFNs.*kallm\.save\(model, folder\).*kallm\.export"):
        model.save_pretrained(tmp_path)
    report.revert()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_warns_too_and_saves_itself(copied: Any, tmp_path: Path) -> None:
    model = make_architecture("llama")
    retrofit_(model, RetrofitConfig(ffn={"ffn": "affine"}, layers="last:2"))
    twin = copied(model)
    assert torch.equal(logits(twin), logits(model))
    nn.init.constant_(twin.lm_head.weight, 7.0)
    with pytest.warns(UserWarning, match=r"kallm\.save"):
        twin.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"kallm\.save"):
        model.save_pretrained(tmp_path / "original")
    assert (load_file(tmp_path / "model.safetensors")["lm_head.weight"] == 7).all()
    assert not (load_file(tmp_path / "original" / "model.safetensors")["lm_head.weight"] == 7).any()


def test_two_retrofits_of_one_model_are_reverted_in_any_order(tmp_path: Path) -> None:
    model = make_architecture("opt")
    before = logits(model)
    first = retrofit_(model, RetrofitConfig(ffn=KAN.ffn, layers=(0,)))
    second = retrofit_(model, RetrofitConfig(ffn={"ffn": "removed"}, layers=(-1,)))
    assert [isinstance(ffn, FFN) for ffn in find_ffns(model).values()] == [True, False, True]
    first.revert()
    with pytest.warns(UserWarning, match="the 1 replaced FFNs"):
        model.save_pretrained(tmp_path)
    second.revert()
    assert torch.equal(logits(model), before)
    assert "save_pretrained" not in vars(model)
