"""Trainers: schedules, the auxiliary loss under accumulation and loss scaling, resume, distillation, TRL."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from topo_adapter import (
    DensityCallback,
    DistillationTrainer,
    TopologyCallback,
    TopologyConfig,
    TopologyConfigError,
    TopologyTrainerMixin,
    UnsupportedModelError,
    calibrate,
    initialize_routers,
    record_routes,
)
from topo_adapter.core.passes import ORDINARY, Pass, during
from topo_adapter.layer import hosts
from topo_adapter.ops.objective import attach_loss
from topo_adapter.training.callback import ROUTER_LEARNING_RATE
from topo_adapter.training.densities import Map, TrainAt
from topo_adapter.training.distil import Distil, TrainBeside
from topo_adapter.training.routers import topology_metrics
from topo_adapter.training.trainer import _RememberScale

LENGTH = 48


def tiny_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def tiny_peft(**settings: Any) -> PeftModel:
    settings = {"depth": 3, "visible_depth": 2, "local_window": 4, "num_sink_tokens": 1, **settings}
    base = tiny_base()
    torch.manual_seed(1)
    return get_peft_model(base, TopologyConfig(**settings))


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 64, (count, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(path: Path, **settings: Any) -> TrainingArguments:
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    return TrainingArguments(output_dir=str(path), **settings)


def router_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "topo_routers" in name}


class LMTrainer(TopologyTrainerMixin, Trainer):
    pass


class FullWeight(TopologyCallback):
    """No schedule: the auxiliary loss has its full weight from the first step."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        pass


class TestSchedule:
    def test_is_a_function_of_the_step_and_ends_in_force(self, tmp_path: Path) -> None:
        model = tiny_peft()
        config = model.peft_config["default"]
        seen = []

        class Watch(TopologyCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                super().on_step_begin(*args, **kwargs)
                seen.append((config.temperature, config.homotopy, hosts(model)[0].auxiliary_ramp))

        callback = Watch(temperature=(1.0, 0.1), homotopy=(0.0, 1.0), homotopy_share=0.5, ramp_share=0.25)
        LMTrainer(
            model=model, args=arguments(tmp_path, max_steps=8), train_dataset=rows(8), callbacks=[callback]
        ).train()
        assert [round(h, 4) for _, h, _ in seen] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
        assert [round(r, 4) for _, _, r in seen] == [0, 0.5, 1, 1, 1, 1, 1, 1]
        assert [t for t, _, _ in seen] == pytest.approx([10 ** (-s / 8) for s in range(8)])
        assert (config.temperature, config.homotopy) == (0.1, 1.0)
        model.save_pretrained(tmp_path / "adapter")
        assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["homotopy"] == 1.0

    @pytest.mark.parametrize(
        "bad",
        [
            {"temperature": (1.0, 0.0)},
            {"homotopy": (0.0, 1.5)},
            {"homotopy_share": 0.0},
            {"ramp_share": 2.0},
        ],
    )
    def test_refuses_bad_values(self, bad: dict[str, Any]) -> None:
        with pytest.raises(TopologyConfigError, match=next(iter(bad))):
            TopologyCallback(**bad)

    def test_needs_a_topology(self, tmp_path: Path) -> None:
        trainer = Trainer(
            model=tiny_base(), args=arguments(tmp_path), train_dataset=rows(1), callbacks=[TopologyCallback()]
        )
        with pytest.raises(UnsupportedModelError, match="active"):
            trainer.train()

    def test_alone_refuses_what_it_cannot_scale(self) -> None:
        class Arguments:
            fp16 = True

        args = Arguments()
        with pytest.raises(TopologyConfigError, match="TopologySFTTrainer"):
            TopologyCallback().on_train_begin(args, None, None, model=tiny_peft())  # type: ignore[arg-type]

    def test_resumes_where_it_stopped(self, tmp_path: Path) -> None:
        def run(path: Path, resume: bool) -> tuple[PeftModel, list[float]]:
            model = tiny_peft()
            trainer = LMTrainer(
                model=model,
                args=arguments(path, max_steps=6, save_strategy="steps", save_steps=3, learning_rate=1e-2),
                train_dataset=rows(6),
                callbacks=[TopologyCallback()],
            )
            trainer.train(resume_from_checkpoint=str(path / "checkpoint-3") if resume else None)
            return model, [log["topology/homotopy"] for log in trainer.state.log_history if "loss" in log]

        whole, whole_log = run(tmp_path, resume=False)
        resumed, resumed_log = run(tmp_path, resume=True)
        assert resumed_log == whole_log and len(set(whole_log)) > 3
        for name, value in router_state(whole).items():
            torch.testing.assert_close(router_state(resumed)[name], value, rtol=0, atol=0)


class Stop(TrainerCallback):
    """Ends a training early, as early stopping does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


class TestEvaluationInBetween:
    """Of the model that training ends with, whatever the step."""

    @pytest.mark.parametrize("trainer_class", [Trainer, LMTrainer])
    def test_runs_in_full_force_and_training_goes_on_where_it_was(self, tmp_path: Path, trainer_class: type) -> None:
        model = tiny_peft()
        config = model.peft_config["default"]
        seen: dict[bool, list[float]] = {True: [], False: []}
        model.register_forward_pre_hook(lambda module, _: seen[module.training].append(round(config.homotopy, 4)))
        args = arguments(
            tmp_path,
            max_steps=4,
            learning_rate=0.1,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            eval_on_start=True,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
        )
        callback = TopologyCallback(homotopy=(0.0, 1.0), homotopy_share=1.0)
        data = {"train_dataset": rows(4), "eval_dataset": rows(1), "callbacks": [callback]}
        trainer = trainer_class(model=model, args=args, **data)
        trainer.train()
        assert seen[True] == [0, 0.25, 0.5, 0.75] and set(seen[False]) == {1.0}
        saved = json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())
        assert saved["homotopy"] == 0.25  # of the step, whose weights these are
        assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)

    def test_distillation_evaluates_as_it_trains(self, tmp_path: Path) -> None:
        model = tiny_peft()
        args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
        trainer = DistillationTrainer(model=model, args=args, train_dataset=rows(2), eval_dataset=rows(1))
        seen = []
        config = model.peft_config["default"]
        model.register_forward_pre_hook(lambda module, _: None if module.training else seen.append(config.homotopy))
        trainer.train()
        assert seen[0] == 0.0

    def test_a_run_that_stops_early_says_at_what(self, tmp_path: Path) -> None:
        model = tiny_peft()
        args = arguments(tmp_path, max_steps=8)
        with pytest.warns(UserWarning, match=r"ended after 2 of 8 steps, at homotopy 0\.18"):
            LMTrainer(model=model, args=args, train_dataset=rows(8), callbacks=[Stop(), TopologyCallback()]).train()
        config = model.peft_config["default"]
        assert (config.homotopy, config.temperature) == (1.0, 0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            args = arguments(tmp_path, max_steps=2)
            LMTrainer(model=tiny_peft(), args=args, train_dataset=rows(8), callbacks=[TopologyCallback()]).train()
        assert not any("training ended" in message for message in messages(caught))


@pytest.mark.parametrize("with_mixin", [True, False])
@pytest.mark.parametrize("quantised", [True, False])
def test_routers_of_a_quantised_base_are_trained_in_float32(tmp_path: Path, quantised: bool, with_mixin: bool) -> None:
    model = tiny_peft()
    model.get_base_model().is_loaded_in_4bit = quantised
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)  # as TRL does on such a base; elsewhere it is a choice
    trainer_class, callbacks = (LMTrainer, []) if with_mixin else (Trainer, [TopologyCallback()])
    trainer = trainer_class(model=model, args=arguments(tmp_path), train_dataset=rows(1), callbacks=callbacks)
    if not with_mixin:
        callbacks[0].on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    assert {weight.dtype for weight in router_state(model).values()} == {torch.float32 if quantised else torch.bfloat16}


MISSED = "trained at homotopy 0 and nothing is known to raise it"


def messages(caught: Any) -> list[str]:
    return [str(each.message) for each in caught]


class TestTrainedInVain:
    """Nothing that trains an adapter without effect does so without a word."""

    def test_a_trainer_that_does_not_know_of_it(self, tmp_path: Path) -> None:
        """Every trainer has a callback that drives the adapter to its calibrated end."""
        model = tiny_peft()
        before = router_state(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="(?s).*topology.*")
            Trainer(model, arguments(tmp_path, max_steps=3), train_dataset=rows(4)).train()
        config = model.peft_config["default"]
        assert config.homotopy == 1.0 and config.calibration is not None and config.target_density is not None
        assert any((router_state(model)[name] != value).any() for name, value in before.items())
        assert hosts(model)[0].schedule.driver is None and hosts(model)[0].passes.current() is ORDINARY
        model.merge_adapter(target_density=0.9)

    def test_after_a_training_that_an_error_ended(self, tmp_path: Path) -> None:
        class Break(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                raise KeyboardInterrupt

        model = tiny_peft()
        settings = {"args": arguments(tmp_path, max_steps=2), "train_dataset": rows(4)}
        with pytest.raises(KeyboardInterrupt):
            Trainer(model, **settings, callbacks=[Break()]).train()
        Trainer(model, **settings).train()
        assert model.peft_config["default"].homotopy == 1.0 and hosts(model)[0].schedule.driver is None
        assert model.peft_config["default"].target_density is not None

    def test_a_loop_of_ones_own(self) -> None:
        model = tiny_peft().train()
        batch = {name: value[None] for name, value in rows(1)[0].items()}
        with pytest.warns(UserWarning, match=MISSED):
            model(**batch).loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**batch).loss.backward()

    @pytest.mark.parametrize("driven", ["callback", "mixin", "distillation", "force", "frozen", "evaluation", "tools"])
    def test_no_false_alarm(self, driven: str, tmp_path: Path) -> None:
        model = tiny_peft(homotopy=1.0 if driven == "force" else 0.0)
        settings: dict[str, Any] = {"args": arguments(tmp_path), "train_dataset": rows(4)}
        batch = {name: value[None] for name, value in rows(1)[0].items()}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if driven == "callback":
                Trainer(model, **settings, callbacks=[TopologyCallback()]).train()
            elif driven == "mixin":
                LMTrainer(model, **settings).train()
            elif driven == "distillation":
                DistillationTrainer(model, **settings, num_queries=4).train()
            elif driven == "force":
                model.train()(**batch).loss.backward()
            elif driven == "frozen":
                model.requires_grad_(False).train()(**batch)
            elif driven == "evaluation":
                model.eval()(**batch)
            else:
                model.train()
                initialize_routers(model, batch["input_ids"])
                record_routes(model, batch["input_ids"])
                calibrate(model, batch["input_ids"], around=())
        assert not any(MISSED in text for text in messages(caught))

    def test_rows_that_the_window_covers(self, tmp_path: Path) -> None:
        model = tiny_peft(local_window=LENGTH)
        with pytest.warns(UserWarning) as caught:
            LMTrainer(model, arguments(tmp_path, max_steps=12), train_dataset=rows(4)).train()
        found = [text for text in messages(caught) if "no query had a key hidden from it" in text]
        assert len(found) == 1
        assert "in the first 10 training steps" in found[0] and f"up to {LENGTH + 1} tokens" in found[0]
        with pytest.warns(UserWarning, match="in the first 2 training steps"):
            LMTrainer(tiny_peft(local_window=LENGTH), arguments(tmp_path, max_steps=2), train_dataset=rows(4)).train()

    def test_rows_that_it_does_not_cover(self, tmp_path: Path) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            LMTrainer(tiny_peft(), arguments(tmp_path, max_steps=12), train_dataset=rows(4)).train()
        assert not any("no query had a key hidden" in text for text in messages(caught))

    def test_one_token_cannot_be_spread_over_a_tree(self) -> None:
        model = tiny_peft()
        before = router_state(model)
        with pytest.raises(TopologyConfigError, match="two tokens or more to spread over the tree, got 1"):
            initialize_routers(model, rows(1)[0]["input_ids"][None, :1])
        assert all(torch.equal(before[name], weight) for name, weight in router_state(model).items())


class TestAuxiliaryLoss:
    """The density loss is a mean over equal rows, so micro-batches must add up to the whole batch."""

    settings = {"gumbel_noise": False, "balance_weight": 0.0, "density_weight": 3.0, "homotopy": 0.5}

    def step(self, path: Path, accumulation: int, trainer_class: type[Trainer] = LMTrainer) -> dict[str, torch.Tensor]:
        model = tiny_peft(**self.settings)
        args = arguments(
            path,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
        )
        trainer = trainer_class(model=model, args=args, train_dataset=rows(4), callbacks=[FullWeight()])
        before = router_state(model)
        trainer.train()
        return {name: before[name] - value for name, value in router_state(model).items()}

    def test_is_right_under_gradient_accumulation(self, tmp_path: Path) -> None:
        whole = self.step(tmp_path, 1)
        for accumulation in (2, 4):
            parts = self.step(tmp_path, accumulation)
            for name, value in whole.items():
                assert value.abs().max() > 0
                torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-6)

    def test_would_be_wrong_without_the_scale(self, tmp_path: Path) -> None:
        class Naive(LMTrainer):
            def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                return Trainer.compute_loss(self, *args, **kwargs)

        whole, naive = self.step(tmp_path, 1), self.step(tmp_path, 4, Naive)
        assert any((naive[name] - value).abs().max() > 0.1 * value.abs().max() for name, value in whole.items())

    def test_follows_loss_scaling(self) -> None:
        model = tiny_peft(**self.settings).train()
        ids = rows(1)[0]["input_ids"][None]

        def gradients(factor: float) -> list[torch.Tensor]:
            model.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            (_RememberScale.apply(loss, hosts(model), 1.0) * factor).backward()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        for scaled, plain in zip(gradients(1024.0), gradients(1.0), strict=True):
            torch.testing.assert_close(scaled, plain * 1024, rtol=1e-4, atol=1e-4)

    def test_reaches_the_router_alone(self) -> None:
        model = tiny_peft(density_weight=1.0).train()
        ids = rows(1)[0]["input_ids"][None]
        out = model(input_ids=ids).logits
        (out * 0).sum().backward()  # the main loss has no gradient, so all of it is the auxiliary one's
        touched = [p.grad for n, p in model.named_parameters() if "topo_routers" in n]
        assert all(g is not None and torch.isfinite(g).all() for g in touched)
        assert max(g.abs().max() for g in touched) > 0

    def test_attach_leaves_the_output_alone(self) -> None:
        host = hosts(tiny_peft())[0]
        out = torch.randn(3, requires_grad=True)
        assert torch.equal(attach_loss(out, torch.ones(()), host), out)


class TestDensityCallback:
    """The default of every trainer."""

    CALLBACK: dict[str, Any] = {"densities": (0.5, 0.9), "distil_share": 0.5, "num_windows": 2}

    def test_distils_then_trains_at_drawn_densities_then_calibrates(self, tmp_path: Path) -> None:
        model = tiny_peft()
        config = model.peft_config["default"]
        seen: list[tuple[str, float]] = []

        class Watched(LMTrainer):
            def training_step(self, *args: Any, **kwargs: Any) -> Any:
                seen.append((type(hosts(model)[0].passes.current()).__name__, config.homotopy))
                return super().training_step(*args, **kwargs)

        dense = model.get_base_model()(**{k: v[None] for k, v in rows(1)[0].items()}).logits
        trainer = Watched(
            model,
            arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=4),
            train_dataset=rows(8),
            callbacks=[DensityCallback(**self.CALLBACK)],
        )
        trainer.train()
        assert seen == [("DistilBeside", 0.0)] * 2 + [("TrainBeside", 1.0)] * 2
        assert config.homotopy == 1.0 and config.target_density is not None
        saved = json.loads((tmp_path / "checkpoint-4" / "adapter_config.json").read_text())
        assert saved["calibration"] and saved["target_density"] == config.target_density, "before the last checkpoint"
        with model.disable_adapter():
            assert torch.equal(model(**{k: v[None] for k, v in rows(1)[0].items()}).logits, dense)

    @pytest.mark.parametrize("use_reentrant", [None, True])
    def test_trains_several_visits(self, tmp_path: Path, use_reentrant: bool | None) -> None:
        """Both halves of it; the dial is of masks with all visits, and the adapter that is saved has as many."""
        model = tiny_peft(visits=3)
        settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
        if use_reentrant is not None:
            settings |= {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
            }
        states: list[dict[str, torch.Tensor]] = []

        class Watched(LMTrainer):
            def training_step(self, *args: Any, **kwargs: Any) -> Any:
                states.append(router_state(model))
                return super().training_step(*args, **kwargs)

        trainer = Watched(
            model,
            arguments(tmp_path, **settings),
            train_dataset=rows(8),
            callbacks=[DensityCallback(**self.CALLBACK)],
        )
        trainer.train()
        states.append(router_state(model))
        for before, after in itertools.pairwise(states):
            assert all(torch.isfinite(weight).all() for weight in after.values())
            assert any(not torch.equal(before[name], weight) for name, weight in after.items())
        assert json.loads((tmp_path / "checkpoint-4" / "adapter_config.json").read_text())["visits"] == 3
        table = model.peft_config["default"].calibration
        assert table is not None
        model.peft_config["default"].visits = 1
        alone = calibrate(model, trainer.train_dataset[0]["input_ids"][None], around=())
        deepest = [[head[3] for heads in t["density"].values() for head in heads] for t in (table, alone)]
        assert sum(deepest[0]) > 1.1 * sum(deepest[1])

    def test_the_first_steps_reach_the_routers_by_their_own_loss(self, tmp_path: Path) -> None:
        model = tiny_peft()
        args = arguments(tmp_path, max_steps=4)
        callback = DensityCallback(**{**self.CALLBACK, "distil_share": 0.75})
        trainer = LMTrainer(model, args, train_dataset=rows(8), callbacks=[callback])

        class Gradients(TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                gradients = [weight.grad for weight in hosts(model)[0].parameters() if weight.grad is not None]
                seen.append(max(float(each.abs().max()) for each in gradients))

        seen: list[float] = []
        trainer.add_callback(Gradients())
        trainer.train()
        assert "local_loss" in hosts(model)[0].metrics and all(value > 0 for value in seen[:3])

    def test_the_layers_own_losses_go_on_beside_the_trainers(self) -> None:
        model = tiny_peft(gumbel_noise=False).train()
        config = model.peft_config["default"]
        config.homotopy = 1.0
        batch = {key: value[None] for key, value in rows(1)[0].items()}
        (maps, first) = ([Map(1, None, 0.1)], hosts(model)[0])  # whose input no routing changes

        def gradients(new: Pass, loss_of: Any) -> list[torch.Tensor]:
            model.zero_grad()
            with during(model, new):
                loss_of(model(**batch)).backward()
            return [weight.grad.clone() for weight in first.parameters()]

        local = Distil()
        alone = gradients(local, lambda _: local.losses[0])
        trainers = gradients(TrainAt([config], maps), lambda out: out.loss)
        both = gradients(TrainBeside([config], maps), lambda out: out.loss)
        assert all(each.abs().max() > 1e-6 for each in (*alone, *trainers))
        for whole, one, other in zip(both, alone, trainers, strict=True):
            torch.testing.assert_close(whole, one + other)
        for host in hosts(model):  # as a trainer scales its loss
            host.auxiliary_scale = 3.0
        thrice = gradients(TrainBeside([config], maps), lambda out: 3 * out.loss)
        torch.testing.assert_close(thrice, [3 * each for each in both])

    def test_resumes_as_it_would_have_gone_on(self, tmp_path: Path) -> None:
        def run(resume: bool) -> list[tuple[str, float]]:
            model, seen = tiny_peft(), []

            class Watched(LMTrainer):
                def training_step(self, *args: Any, **kwargs: Any) -> Any:
                    temperature = model.peft_config["default"].temperature
                    seen.append((type(hosts(model)[0].passes.current()).__name__, temperature))
                    return super().training_step(*args, **kwargs)

            args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=4)
            Watched(model, args, train_dataset=rows(8), callbacks=[DensityCallback(**self.CALLBACK)]).train(
                resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resume else None
            )
            return seen

        whole = run(resume=False)
        assert run(resume=True) == whole[4:] and {name for name, _ in whole} == {"DistilBeside", "TrainBeside"}

    @pytest.mark.parametrize("with_mixin", [True, False])
    def test_routers_have_a_learning_rate_of_their_own(self, with_mixin: bool, tmp_path: Path) -> None:
        kind = LMTrainer if with_mixin else Trainer
        for settings, expected in (({}, ROUTER_LEARNING_RATE), ({"learning_rate": 7e-4}, 7e-4)):
            args = arguments(tmp_path, max_steps=1, lr_scheduler_type="constant")
            args.learning_rate = settings.get("learning_rate", type(args).__dataclass_fields__["learning_rate"].default)
            trainer = kind(tiny_peft(), args, train_dataset=rows(2))
            trainer.train()
            assert {group["lr"] for group in trainer.optimizer.param_groups if group["params"]} == {expected}

    def test_beside_other_weights_too(self, tmp_path: Path) -> None:
        model = tiny_peft()
        head = model.get_base_model().lm_head.weight.requires_grad_()
        trainer = LMTrainer(model, arguments(tmp_path, max_steps=1, learning_rate=1e-4, lr_scheduler_type="constant"))
        trainer.create_optimizer()
        rates = {id(w): group["lr"] for group in trainer.optimizer.param_groups for w in group["params"]}
        assert rates.pop(id(head)) == 1e-4 and set(rates.values()) == {ROUTER_LEARNING_RATE}
        with pytest.warns(UserWarning, match="learning rate 0.0001, because other weights are trained"):
            Trainer(model, arguments(tmp_path, max_steps=1, learning_rate=1e-4), train_dataset=rows(2)).train()

    def test_data_that_cannot_be_calibrated_on_are_named(self, tmp_path: Path) -> None:
        model = tiny_peft(local_window=64)
        with pytest.warns(UserWarning, match="cannot be calibrated in this training: .*longer than local_window"):
            LMTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows(1)).train()
        config = model.peft_config["default"]
        assert config.homotopy == 1.0 and config.calibration is None

    @pytest.mark.parametrize(
        ("bad", "match"),
        [
            ({"densities": (0.0, 0.4)}, "densities"),
            ({"distil_share": 1.0}, "distil_share"),
            ({"learning_rate": 0.0}, "learning_rate"),
            ({"num_windows": 0}, "num_windows"),
        ],
    )
    def test_arguments_out_of_range(self, bad: dict[str, Any], match: str) -> None:
        with pytest.raises(TopologyConfigError, match=match):
            DensityCallback(**bad)


class TestLog:
    def test_every_step_reports_the_topology(self, tmp_path: Path) -> None:
        trainer = LMTrainer(model=tiny_peft(), args=arguments(tmp_path, max_steps=3), train_dataset=rows(3))
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert len(logs) == 3
        for log in logs:
            assert 0 < log["topology/density"] <= 1
            assert {"topology/temperature", "topology/homotopy", "topology/auxiliary_loss"} <= log.keys()

    def test_density_is_the_realised_one(self) -> None:
        model = tiny_peft(visible_depth=0).train()
        ids = rows(1)[0]["input_ids"][None]
        model(input_ids=ids)
        assert topology_metrics(model)["topology/density"] == pytest.approx(1.0)
        model.peft_config["default"].visible_depth = 3
        model(input_ids=ids)
        assert topology_metrics(model)["topology/density"] < 0.9


class TestDistillation:
    def test_learns_layer_by_layer_and_leaves_the_base_alone(self, tmp_path: Path) -> None:
        model = tiny_peft()
        before = copy.deepcopy({n: p for n, p in model.named_parameters() if "topo_routers" not in n})
        trainer = DistillationTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=40, learning_rate=1e-2),
            train_dataset=rows(40),
            num_queries=32,
        )
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert sum(losses[-5:]) < sum(losses[:5])
        assert model.peft_config["default"].homotopy == 1.0
        for name, parameter in model.named_parameters():
            if "topo_routers" not in name:
                assert parameter.grad is None and torch.equal(parameter, before[name])
        model.merge_adapter()  # only a finished adapter can be merged

    def test_learns_to_place_several_visits(self, tmp_path: Path) -> None:
        model = tiny_peft(visits=4, depth=4, visible_depth=4)
        args = arguments(tmp_path, max_steps=40, learning_rate=1e-2)
        trainer = DistillationTrainer(model=model, args=args, train_dataset=rows(40), num_queries=32)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert sum(losses[-5:]) < sum(losses[:5])
        model.merge_adapter()
        record = record_routes(model, rows(1)[0]["input_ids"][None])[0]
        assert record.visits.shape == (1, 4, 4, LENGTH) and (record.visits >= 0).all()

    def test_trains_on_from_8_bits(self, tmp_path: Path) -> None:
        model = tiny_peft()
        for host in hosts(model):
            host.in_force().router.round_to(torch.float8_e4m3fn)  # type: ignore[index]
        before = {name: weight.float() for name, weight in router_state(model).items()}
        args = arguments(tmp_path, max_steps=2, learning_rate=1e-5)
        DistillationTrainer(model=model, args=args, train_dataset=rows(4), num_queries=8).train()
        for name, weight in router_state(model).items():
            assert weight.dtype == torch.float32 and 0 < (weight - before[name]).abs().max() < 1e-4, name

    def test_each_layer_reports_one_loss_and_the_base_runs(self) -> None:
        model = tiny_peft().train()
        ids = rows(1)[0]["input_ids"][None]
        with during(model, Distil(num_queries=16, density_weight=0.1)) as distilled:
            out = model(input_ids=ids).logits
        losses = distilled.losses
        assert len(losses) == 2 and all(loss.requires_grad for loss in losses) and not out.requires_grad
        with model.disable_adapter():
            assert torch.equal(out, model(input_ids=ids).logits)
        assert all(host.passes.current() is ORDINARY for host in hosts(model))

    def test_accumulation_divides_the_loss(self, tmp_path: Path) -> None:
        trainer = DistillationTrainer(model=tiny_peft(), args=arguments(tmp_path), train_dataset=rows(1))
        assert trainer.model_accepts_loss_kwargs is False

    def test_needs_an_enabled_adapter(self, tmp_path: Path) -> None:
        model = tiny_peft()
        model.base_model.disable_adapter_layers()
        trainer = DistillationTrainer(model=model, args=arguments(tmp_path), train_dataset=rows(1))
        with pytest.raises(UnsupportedModelError):
            trainer.train()


class TestTRL:
    @pytest.fixture
    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        vocabulary = {f"t{i}": i for i in range(64)}
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), eos_token="t1", pad_token="t2"
        )

    def run(self, trainer_class: type, tokenizer: Any, path: Path, callbacks: list, **settings: Any) -> Any:
        from datasets import Dataset
        from trl import SFTConfig

        torch.manual_seed(1)
        trainer = trainer_class(
            model=tiny_base(),
            args=SFTConfig(
                output_dir=str(path),
                max_steps=3,
                per_device_train_batch_size=1,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=Dataset.from_dict({"input_ids": [row["input_ids"].tolist() for row in rows(8)]}),
            processing_class=tokenizer,
            peft_config=TopologyConfig(depth=3, visible_depth=2, local_window=4, task_type="CAUSAL_LM"),
            callbacks=callbacks,
        )
        before = router_state(trainer.model)
        trainer.train()
        moved = [(before[name] - value).abs().max() for name, value in router_state(trainer.model).items()]
        assert max(moved) > 0
        return trainer

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"gradient_accumulation_steps": 2},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
            {"packing": True, "packing_strategy": "wrapped", "max_length": 32},
        ],
    )
    def test_sft_trainer(self, tokenizer: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
        pytest.importorskip("trl")
        from topo_adapter.sft import TopologySFTTrainer

        trainer = self.run(TopologySFTTrainer, tokenizer, tmp_path, [], **settings)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert len(logs) == 3 and all("topology/density" in log for log in logs)
        assert trainer.model.peft_config["default"].homotopy == 1.0
        trainer.save_model(str(tmp_path / "adapter"))
        reloaded = PeftModel.from_pretrained(tiny_base(), str(tmp_path / "adapter"))
        reloaded.merge_adapter()

    def test_plain_sft_trainer_with_the_callback(self, tokenizer: Any, tmp_path: Path) -> None:
        trl = pytest.importorskip("trl")
        trainer = self.run(trl.SFTTrainer, tokenizer, tmp_path, [TopologyCallback()], gradient_checkpointing=False)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert all("topology/density" in log for log in logs)

    def test_reward_trainer_trains_its_head(self, tokenizer: Any, tmp_path: Path) -> None:
        """The head is new, and no file but the adapter's holds it."""
        trl = pytest.importorskip("trl")
        from datasets import Dataset

        class Rewards(TopologyTrainerMixin, trl.RewardTrainer):
            pass

        def base() -> LlamaForSequenceClassification:
            model = LlamaForSequenceClassification(tiny_base().config)  # its head is another each time
            model.load_state_dict(tiny_base().state_dict(), strict=False)
            model.config.pad_token_id, model.config.num_labels = 2, 1
            model.score = torch.nn.Linear(32, 1, bias=False)
            return model.eval()

        ids = [row["input_ids"].tolist() for row in rows(8)]
        args = trl.RewardConfig(
            output_dir=str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True, bf16=False
        )
        trainer = Rewards(
            model=base(),
            args=args,
            train_dataset=Dataset.from_dict({"chosen_ids": ids[:4], "rejected_ids": ids[4:]}),
            processing_class=tokenizer,
            peft_config=TopologyConfig(depth=3, visible_depth=2, local_window=4, task_type="SEQ_CLS"),
        )
        before = trainer.model.get_base_model().score.weight.detach().clone()
        trainer.train()
        assert not torch.equal(trainer.model.get_base_model().score.weight, before)
        trainer.save_model(str(tmp_path / "adapter"))
        reloaded = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
        ids = rows(1)[0]["input_ids"][None]
        with torch.no_grad():
            assert torch.equal(reloaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)

    def test_sft_trainer_trains_the_tokens_of_a_chat_template(self, tokenizer: Any, tmp_path: Path) -> None:
        pytest.importorskip("trl")
        from topo_adapter.sft import TopologySFTTrainer

        other = copy.deepcopy(tokenizer)
        other.add_tokens(["<|user|>", "<|end|>"], special_tokens=True)
        other.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        other.save_pretrained(tmp_path / "chat")
        trainer = self.run(TopologySFTTrainer, tokenizer, tmp_path, [], chat_template_path=str(tmp_path / "chat"))
        config = trainer.model.peft_config["default"]
        added = list(range(64, 128))  # two, and what fills up the embedding
        assert config.trainable_token_indices == {"embed_tokens": added} and config.modules_to_save == ["lm_head"]
        trainer.save_model(str(tmp_path / "adapter"))
        base = tiny_base()
        base.resize_token_embeddings(128, mean_resizing=False)
        reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        ids = torch.tensor([[5, 64, 9, 65, 7, 8]])
        with torch.no_grad():
            assert torch.equal(reloaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
