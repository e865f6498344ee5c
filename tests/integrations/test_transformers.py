"""The callback in transformers' Trainer: what it sets up, and that a resumed training equals a whole one."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import normwise as nw
from normwise.decay.wrappers import unwrapped

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def _what_its_own_checkpoints_need() -> Any:
    """Before transformers 4.47 the Trainer cannot load its random states on torch 2.6 or later."""
    if hasattr(transformers.trainer, "safe_globals"):
        return contextlib.nullcontext()
    rebuild: Any = np.zeros(1).__reduce__()[0]
    return torch.serialization.safe_globals([rebuild, np.ndarray, np.dtype, type(np.dtype(np.uint32))])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), _what_its_own_checkpoints_need():
        warnings.filterwarnings("ignore", module="transformers|accelerate|torch")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        yield


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.relu(self.norm(self.first(x))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def data(n: int = 48) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(6, generator=generator), "labels": torch.randint(0, 3, (), generator=generator)}
        for _ in range(n)
    ]


class StopAt(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Stops a training whose length stays as it was."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def trainer(
    tmp_path: Path, model: nn.Module, callbacks: list[Any], dataset: Any = None, **settings: Any
) -> Any:
    optimizers = settings.pop("optimizers", (None, None))
    given = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "remove_unused_columns": False,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**given, **settings}),
        train_dataset=data() if dataset is None else dataset,
        callbacks=callbacks,
        optimizers=optimizers,
    )


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def decays_of(fit: Any, model: nn.Module) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: g["weight_decay"] for g in fit.optimizer.param_groups for p in g["params"]}


def test_nothing_given(tmp_path: Path) -> None:
    model, callback = Net(), nw.transformers.DecayCallback()
    fit = trainer(tmp_path, model, [callback], lr_scheduler_type="cosine", warmup_steps=3)
    fit.train()
    (decay,) = callback.decays
    assert callback.plan is not None
    assert callback.plan.verdicts["first.weight"] == "shrink"
    assert decay.steps == fit.state.global_step == 18
    assert decays_of(fit, model) == {
        "first.weight": 0.0, "norm.weight": 0.0, "norm.bias": 0.0, "head.weight": 0.1, "head.bias": 0.0,
    }  # fmt: skip
    assert len({group["lr"] for group in fit.optimizer.param_groups}) == 1
    assert all(isinstance(p, Tensor) for group in fit.optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("kind", ["linear", "cosine_with_restarts", "constant_with_warmup"])
@pytest.mark.one_in(2)
def test_the_sum_of_rates_is_that_of_the_training(kind: str, tmp_path: Path) -> None:
    used: list[float] = []

    class Rates(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            unwrapped(parts["optimizer"]).register_step_pre_hook(
                lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"])
            )

    callback = nw.transformers.DecayCallback()
    fit = trainer(
        tmp_path,
        Net(),
        [callback, Rates()],
        lr_scheduler_type=kind,
        warmup_steps=4,
        gradient_accumulation_steps=2,
    )
    fit.train()
    (line,) = [note for note in callback.decays[0]._notes if note.startswith("time: ")]
    assert f"Σlr = {sum(used):.4g} over {len(used)} steps" in line


RULES: dict[str, dict[str, Any]] = {
    "nothing given": {},
    "scheduled": {"rule": nw.L2(lambda step: 0.5 / (1 + step))},
    "sphere": {"rule": nw.Sphere()},
    "peaks": {"rule": nw.AdaptiveWeightShrink(0.5), "clock": "lr^2/max_lr"},
    "every": {"rule": nw.AdaptiveWeightShrink(0.5), "every": 4},
    "weight_decay": {"weight_decay": 0.3},
}


@pytest.mark.parametrize(
    ("name", "optim"), [*((name, "adamw_torch") for name in RULES), ("nothing given", "sgd")]
)
@pytest.mark.one_in(2)
def test_resumed_equals_uninterrupted(name: str, optim: str, tmp_path: Path) -> None:
    def callback() -> Any:
        return nw.transformers.DecayCallback(**RULES[name])

    whole = Net()
    settings = {"optim": optim, "lr_scheduler_type": "linear"}
    trainer(tmp_path / "whole", whole, [callback()], **settings).train()
    interrupted = Net()
    trainer(tmp_path, interrupted, [callback(), StopAt(7)], **settings).train()
    resumed, again = Net(seed=5), callback()
    fit = trainer(tmp_path, resumed, [again], **settings)
    fit.train(resume_from_checkpoint=True)
    assert again.decays[0].steps == 18
    assert same(weights(resumed), weights(whole))
    assert not same(weights(interrupted), weights(whole))


def test_resumed_twice_and_the_files_are_as_without_normwise(tmp_path: Path) -> None:
    """The optimizer's saved groups are those that the Trainer has made; the rest is in trainer_state.json."""
    whole = Net()
    trainer(tmp_path / "whole", whole, [nw.transformers.DecayCallback()]).train()
    for stop in (5, 11):
        fit = trainer(tmp_path, Net(seed=stop - 5), [nw.transformers.DecayCallback(), StopAt(stop)])
        fit.train(resume_from_checkpoint=stop > 5)
    saved = torch.load(tmp_path / "checkpoint-11" / "optimizer.pt", weights_only=True)
    assert [len(group["params"]) for group in saved["param_groups"]] == [2, 3]
    assert [group["weight_decay"] for group in saved["param_groups"]] == [0.1, 0.0]
    resumed = Net(seed=8)
    trainer(tmp_path, resumed, [nw.transformers.DecayCallback()]).train(resume_from_checkpoint=True)
    assert same(weights(resumed), weights(whole))


class TestATrainingThatBeganWithoutNormwise:
    def test_it_is_refused(self, tmp_path: Path) -> None:
        trainer(tmp_path, Net(), [StopAt(7)]).train()
        fit = trainer(tmp_path, Net(), [nw.transformers.DecayCallback()])
        with pytest.raises(ValueError, match=r"made without DecayCallback.*adopt=True"):
            fit.train(resume_from_checkpoint=True)

    def test_it_is_adopted_knowingly(self, tmp_path: Path) -> None:
        trainer(tmp_path, Net(), [StopAt(7)]).train()
        model, callback = Net(), nw.transformers.DecayCallback(adopt=True)
        fit = trainer(tmp_path, model, [callback, StopAt(12)])
        fit.train(resume_from_checkpoint=True)
        assert callback.decays[0].steps == 5
        assert "over 11 steps" in callback.decays[0].explain()
        assert decays_of(fit, model)["first.weight"] == 0
        again = nw.transformers.DecayCallback()
        trainer(tmp_path, Net(), [again]).train(resume_from_checkpoint=True)
        assert again.decays[0].steps == 11


@pytest.mark.parametrize("extended", ["keep", "anew"])
def test_a_training_that_is_extended(extended: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = nw.transformers.DecayCallback()
    trainer(tmp_path, Net(), [first, StopAt(7)]).train()
    callback = nw.transformers.DecayCallback(extended=extended)
    trainer(tmp_path, Net(), [callback], num_train_epochs=5).train(resume_from_checkpoint=True)
    (before,), (now,) = first.decays, callback.decays
    if extended == "keep":
        assert (now.rule, now.steps) == (before.rule, 30)
        assert "made for 18 steps, and the training now has 30: λ is kept" in caplog.text
    else:
        assert now.rule != before.rule
        assert now.steps == 23


@pytest.mark.thorough
def test_a_second_training(tmp_path: Path) -> None:
    model, callback = Net(), nw.transformers.DecayCallback()
    fit = trainer(tmp_path, model, [callback])
    for _ in range(2):
        fit.train()
        assert [decay.steps for decay in callback.decays] == [18]
    assert decays_of(fit, model)["head.weight"] == 0.1


def test_a_second_training_that_resumes(tmp_path: Path) -> None:
    whole, model = Net(), Net()
    trainer(tmp_path / "whole", whole, [nw.transformers.DecayCallback()]).train()
    fit = trainer(tmp_path, model, [nw.transformers.DecayCallback(), StopAt(7)])
    fit.train()
    fit.remove_callback(StopAt)
    fit.train(resume_from_checkpoint=True)
    assert same(weights(model), weights(whole))


def test_a_checkpoint_of_another_rule_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, Net(), [nw.transformers.DecayCallback(rule=nw.L2(0.1)), StopAt(7)]).train()
    fit = trainer(tmp_path, Net(), [nw.transformers.DecayCallback(rule=nw.L2(0.2))])
    with pytest.raises(ValueError, match=r"made with the rule .*0.1.*give the same"):
        fit.train(resume_from_checkpoint=True)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, Net(), [nw.transformers.DecayCallback(), StopAt(7)]).train()
    path = tmp_path / "checkpoint-7" / "trainer_state.json"
    state = json.loads(path.read_text())
    for text in ("AAAA", "no base64", 3):
        state["stateful_callbacks"]["DecayCallback"]["attributes"]["recipe"] = text
        path.write_text(json.dumps(state))
        with pytest.raises(ValueError, match="damaged"):
            trainer(tmp_path, Net(), [nw.transformers.DecayCallback()]).train(resume_from_checkpoint=True)


def test_callbacks_that_the_trainer_builds_anew(tmp_path: Path) -> None:
    whole = Net()
    trainer(tmp_path / "whole", whole, [nw.transformers.DecayCallback()]).train()
    trainer(tmp_path, Net(), [nw.transformers.DecayCallback(), StopAt(7)]).train()
    resumed, settings = Net(seed=5), {"restore_callback_states_from_checkpoint": True}
    trainer(tmp_path, resumed, [nw.transformers.DecayCallback()], **settings).train(
        resume_from_checkpoint=True
    )
    assert same(weights(resumed), weights(whole))
    other = tmp_path / "other"
    trainer(other, Net(), [nw.transformers.DecayCallback(weight_decay=0.2), StopAt(7)]).train()
    fit = trainer(other, Net(), [nw.transformers.DecayCallback(weight_decay=0.2)], **settings)
    with pytest.raises(ValueError, match="would lose its weight_decay"):
        fit.train(resume_from_checkpoint=True)


def test_the_random_state_is_as_without_a_plan(tmp_path: Path) -> None:
    first, model = nw.transformers.DecayCallback(), Net()
    trainer(tmp_path, model, [first]).train()
    assert first.plan is not None
    other = Net()
    plan = nw.Plan.from_json(first.plan.to_json(), other)
    trainer(tmp_path, other, [nw.transformers.DecayCallback(plan=plan)]).train()
    assert same(weights(model), weights(other))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from data()


def test_data_without_a_length(tmp_path: Path) -> None:
    callback = nw.transformers.DecayCallback()
    trainer(tmp_path, Net(), [callback], Stream(), max_steps=10).train()
    assert callback.decays[0].steps == 10


def test_an_optimizer_and_a_schedule_of_the_users_own(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, weight_decay=0.2)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 14)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [4])
    callback = nw.transformers.DecayCallback()
    trainer(tmp_path, model, [callback], optimizers=(optimizer, scheduler)).train()
    (decay,) = callback.decays
    assert decay.optimizer is optimizer
    assert {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]} == {
        "first.weight": 0.0, "norm.weight": 0.2, "norm.bias": 0.2, "head.weight": 0.2, "head.bias": 0.2,
    }  # fmt: skip
    assert len({group["lr"] for group in optimizer.param_groups}) == 1


def test_an_optimizer_that_chooses_its_rate(tmp_path: Path) -> None:
    model = Net()
    optimizer = transformers.optimization.Adafactor(model.parameters())
    scheduler = transformers.optimization.AdafactorSchedule(optimizer)
    fit = trainer(tmp_path, model, [nw.transformers.DecayCallback()], optimizers=(optimizer, scheduler))
    with pytest.raises(ValueError, match="the learning rates sum to 0"):
        fit.train()


@pytest.mark.parametrize(
    "settings", [{"bf16": True}, {"max_grad_norm": 0.01}, {"gradient_accumulation_steps": 2}]
)
@pytest.mark.one_in(2)
def test_settings_of_the_trainer(settings: dict[str, Any], tmp_path: Path) -> None:
    callback = nw.transformers.DecayCallback()
    trainer(tmp_path, Net(), [callback], **settings).train()
    assert callback.decays[0].steps == (9 if "gradient_accumulation_steps" in settings else 18)


def test_a_language_model_with_gradient_checkpointing(tmp_path: Path) -> None:
    if not hasattr(transformers, "Qwen3Config"):
        pytest.skip("Qwen3 is of transformers 4.51")
    config = transformers.Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 32, (12,), generator=generator) for _ in range(16)]
    dataset = [{"input_ids": t, "labels": t} for t in tokens]
    callback = nw.transformers.DecayCallback()
    fit = trainer(tmp_path, model, [callback], dataset, num_train_epochs=2, gradient_checkpointing=True)
    fit.train()
    assert callback.plan is not None
    shrunk = {name for name, verdict in callback.plan.verdicts.items() if verdict == "shrink"}
    assert "model.layers.0.self_attn.q_proj.weight" in shrunk
    assert callback.decays[0].steps == 4


def test_a_model_of_adapters(tmp_path: Path) -> None:
    """Of a model under LoRA the trained weights are the adapters: nothing else is touched."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        Net(), peft.LoraConfig(target_modules=["first"], r=2, init_lora_weights=False)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    callback = nw.transformers.DecayCallback()
    trainer(tmp_path, model, [callback]).train()
    assert callback.plan is not None
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all("lora_" in name for name in trained)
    decayed = [p for decay in callback.decays for unit in decay.units for p in unit.params]
    assert all(p.requires_grad for p in decayed)


def test_the_monitor(tmp_path: Path) -> None:
    callback = nw.transformers.DecayCallback(monitor=5)
    trainer(tmp_path, Net(), [callback, StopAt(7)]).train()
    assert callback.monitor.steps == 7
    again = nw.transformers.DecayCallback(monitor=5)
    trainer(tmp_path, Net(), [again]).train(resume_from_checkpoint=True)
    assert again.monitor.steps == 18
    without = nw.transformers.DecayCallback(monitor=None)
    trainer(tmp_path / "other", Net(), [without]).train()
    assert without.monitor is None
