"""The end-to-end stage: its losses against brute force, what each step draws, and training on tiny models."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft_helpers import VOCAB, routed, router_parameters, tiny, tokens, weights_of
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from topo_adapter import TopologyCallback, TopologyConfig, TopologyConfigError, UnsupportedModelError
from topo_adapter.core.dial import Setting, choose, choose_depths, expected_loss
from topo_adapter.core.passes import ORDINARY
from topo_adapter.core.visibility import always_density
from topo_adapter.layer import hosts
from topo_adapter.measuring.calibration import calibrate
from topo_adapter.training import densities, kl
from topo_adapter.training.densities import drawn_density, loss_weight, nearest_map
from topo_adapter.training.kl import KLTrainer, _final_states, logits_head, next_tokens, token_losses

# ---------------------------------------------------------------- losses


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


class TestTokenLosses:
    @pytest.mark.parametrize("chunk", [1, 3, 4, 11, 100, None])
    def test_are_the_brute_force_ones(self, chunk: int | None) -> None:
        weight = leaf(7, 5, seed=1).detach()
        reference = leaf(11, 5, seed=2).detach()
        targets = torch.tensor([0, 6, -100, 3, 3, -100, 1, 2, 5, 4, -100])
        mixing = leaf(2, 11, seed=3).detach()  # every token has a gradient of its own

        hidden = leaf(11, 5)
        divergence, cross_entropy = token_losses(hidden, reference, targets, lambda x: x @ weight.T, chunk)
        (mixing[0] @ divergence + mixing[1] @ cross_entropy).backward()

        brute = leaf(11, 5)
        logits = brute @ weight.T
        kl = F.kl_div(
            logits.log_softmax(-1), (reference @ weight.T).log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        ce = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
        (mixing[0] @ kl + mixing[1] @ ce).backward()

        torch.testing.assert_close(divergence, kl)
        torch.testing.assert_close(cross_entropy, ce)
        torch.testing.assert_close(hidden.grad, brute.grad)
        assert divergence.min() > 0 and (cross_entropy == 0).sum() == 3

    def test_hold_the_logits_of_one_chunk(self) -> None:
        weight, sizes = leaf(7, 5).detach(), []

        def head(x: Tensor) -> Tensor:
            sizes.append(len(x))
            return x @ weight.T

        hidden = leaf(11, 5)
        losses = token_losses(hidden, hidden.detach() + 1, None, head, 4)
        torch.stack(losses).sum().backward()
        # two chunks of 4, the model's and the dense one's, and again in backward
        assert sorted(set(sizes)) == [3, 4] and sizes.count(4) == 2 * 2 * 2

    def test_what_is_not_asked_for_is_zero(self) -> None:
        weight = leaf(7, 5).detach()
        hidden, targets = leaf(4, 5), torch.tensor([1, 2, -100, 0])
        divergence, cross_entropy = token_losses(hidden, None, targets, lambda x: x @ weight.T, 3)
        assert divergence.tolist() == [0] * 4 and (cross_entropy > 0).sum() == 3
        divergence, cross_entropy = token_losses(hidden, hidden.detach(), None, lambda x: x @ weight.T, 3)
        assert cross_entropy.tolist() == [0] * 4
        torch.testing.assert_close(divergence, torch.zeros_like(divergence))

    def test_no_gradient_flows_to_the_reference(self) -> None:
        weight = leaf(7, 5).detach()
        hidden, reference = leaf(4, 5), leaf(4, 5, seed=1)
        token_losses(hidden, reference, None, lambda x: x @ weight.T)[0].sum().backward()
        assert reference.grad is None and hidden.grad is not None

    def test_no_tokens(self) -> None:
        weight = leaf(7, 5).detach()
        for losses in token_losses(leaf(0, 5), None, None, lambda x: x @ weight.T):
            assert losses.shape == (0,)

    def test_without_gradients_are_the_same(self) -> None:
        weight = leaf(7, 5).detach()
        args = (leaf(4, 5), leaf(4, 5, seed=1).detach(), torch.tensor([1, 2, 0, 0]), lambda x: x @ weight.T, 3)
        with_gradient = torch.stack(token_losses(*args))
        with torch.no_grad():
            torch.testing.assert_close(torch.stack(token_losses(*args)), with_gradient.detach())


# ---------------------------------------------------------------- what models do to their logits

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}

SCALED: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny(num_hidden_layers=2),
    "gemma2, softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=1.5)),
    "gemma2, no softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=None)),
    "cohere, logit_scale": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "granite, logits_scaling": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
}


class TestLogitsHead:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", SCALED)
    def test_makes_the_logits_of_the_model(self, name: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        model = SCALED[name]().eval().to(dtype)
        ids = tokens(2, 9)
        with torch.no_grad():
            hidden, outputs = _final_states(model, model, {"input_ids": ids})
            logits = model(input_ids=ids).logits
            ours = logits_head(model)(hidden)
        assert ours.dtype == torch.float32 and logits.abs().max() > 1
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(ours, logits.float(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(outputs.logits, logits[:, -4:])  # the hook is gone again, and was there before

    def test_needs_an_output_embedding(self) -> None:
        with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
            logits_head(LlamaModel(tiny().config))


# ---------------------------------------------------------------- draws


class TestDraws:
    def test_each_block_visits_every_stratum_of_densities(self) -> None:
        lowest, highest = 0.05, 0.8
        drawn = torch.tensor([drawn_density(3, step, lowest, highest) for step in range(160)], dtype=torch.float64)
        assert drawn.min() >= lowest and drawn.max() <= highest
        share = (drawn / lowest).log() / torch.tensor(highest / lowest).double().log()
        strata = (share * 8).long().view(20, 8)
        assert all(sorted(block) == list(range(8)) for block in strata.tolist())
        assert len({tuple(block) for block in strata.tolist()}) > 10
        offsets = share * 8 % 1  # uniform within a stratum, not its middle
        assert offsets.min() < 0.1 and offsets.max() > 0.9 and 0.4 < offsets.mean() < 0.6
        assert len(set(drawn.tolist())) == 160

    def test_are_functions_of_seed_and_step(self) -> None:
        draws = {seed: [drawn_density(seed, step, 0.1, 0.5) for step in range(16)] for seed in (0, 1)}
        assert draws[0] == [drawn_density(0, step, 0.1, 0.5) for step in range(16)] and draws[0] != draws[1]

    def test_one_density(self) -> None:
        assert drawn_density(0, 5, 0.3, 0.3) == pytest.approx(0.3)
        assert drawn_density(0, 5, 1.0, 1.0) == 1.0


class TestNextTokens:
    def test_shifts(self) -> None:
        labels = torch.tensor([[5, 6, 7, 8]])
        assert next_tokens(labels, torch.ones(1, 4, dtype=torch.bool), None).tolist() == [[6, 7, 8, -100]]
        assert labels.tolist() == [[5, 6, 7, 8]]

    def test_leaves_out_padding(self) -> None:
        labels = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
        real = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool()
        found = next_tokens(labels, real, None)
        assert found[real].tolist() == [7, 8, -100, 6, -100]

    def test_keeps_documents_apart(self) -> None:
        labels = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]])
        real = torch.ones(2, 6, dtype=torch.bool)
        position_ids = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 1, 2]])
        expected = [[2, 3, -100, 5, -100, -100], [2, -100, -100, 5, 6, -100]]
        assert next_tokens(labels, real, position_ids).tolist() == expected
        assert next_tokens(labels, real, position_ids[:1]).tolist() == [expected[0]] * 2

    def test_keeps_ignored_labels(self) -> None:
        labels = torch.tensor([[-100, -100, 7, 8]])
        assert next_tokens(labels, torch.ones(1, 4, dtype=torch.bool), None).tolist() == [[-100, 7, 8, -100]]


# ---------------------------------------------------------------- training

LENGTH = 32


def adapter(base: PreTrainedModel | None = None, **settings: Any) -> PeftModel:
    """No auxiliary loss, and so no price of density, unless asked for."""
    base = tiny(num_hidden_layers=2) if base is None else base
    return routed(base, **{"depth": 3, "density_weight": 0.0, "balance_weight": 0.0, **settings})


def rows(count: int, length: int = LENGTH, seed: int = 0) -> list[dict[str, Tensor]]:
    return [{"input_ids": row} for row in tokens(count, length, seed)]


def arguments(path: Path, **settings: Any) -> TrainingArguments:
    defaults = {
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(path), **{**defaults, **settings})


#: One plain step of gradient descent, so that the change of the weights is the gradient.
ONE_STEP = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def trainer_of(path: Path, model: nn.Module | None = None, **settings: Any) -> KLTrainer:
    """A trainer of a tiny adapter; settings of TrainingArguments and of the trainer are told apart here."""
    own = {"densities", "calibration_rows", "kl_weight", "lm_weight", "local_weight", "local_density_weight"}
    own |= {"num_queries", "train_dataset", "eval_dataset", "callbacks"}
    given = {name: settings.pop(name) for name in own & settings.keys()}
    model = adapter() if model is None else model
    return KLTrainer(model=model, args=arguments(path, **settings), **{"train_dataset": rows(8), **given})


def logged(trainer: Trainer, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if "loss" in log]


def brute_force(model: PeftModel, ids: Tensor) -> Tensor:
    """KL(dense || topology) of each token `[B, T]` in evaluation mode, from full logits."""
    with torch.no_grad():
        student = model.eval()(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        with model.disable_adapter():
            dense = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    return (dense.exp() * (dense - student)).sum(-1)


class TestLocalLosses:
    """The layers' own, beside."""

    @staticmethod
    def change(path: Path, **settings: Any) -> list[Tensor]:
        """Of the routers of a layer whose input no routing changes, by one step of gradient descent."""
        model = adapter()
        first = hosts(model)[0]
        before = [weight.detach().clone() for weight in first.parameters()]
        trainer_of(path, model, train_dataset=rows(2), **ONE_STEP, **settings).train()
        return [weight.detach() - was for weight, was in zip(first.parameters(), before, strict=True)]

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_add_their_gradients_times_their_weight(self, accumulation: int, tmp_path: Path) -> None:
        settings = {"gradient_accumulation_steps": accumulation}
        without, once, half = (self.change(tmp_path, local_weight=weight, **settings) for weight in (0.0, 1.0, 0.5))
        # next to nothing of the KL is left here, so this is the layer's own gradient and the auxiliary one
        alone = self.change(tmp_path, kl_weight=1e-9, local_weight=1.0, **settings)
        price = self.change(tmp_path, kl_weight=1e-9, **settings)
        for plain, whole, some, own, auxiliary in zip(without, once, half, alone, price, strict=True):
            local = own - auxiliary
            assert local.abs().max() > 1e-4
            torch.testing.assert_close(whole - plain, local, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(some - plain, local / 2, rtol=1e-3, atol=1e-6)

    def test_are_weighted_by_what_the_step_s_map_is_expected_to_lose(self, tmp_path: Path) -> None:
        """As the loss is; and logged."""
        drawn = {"densities": (0.5, 0.9), "calibration_rows": tokens(2, LENGTH), "max_steps": 2}
        model = adapter()
        trainer = trainer_of(tmp_path, model, local_weight=1.0, **drawn)
        trainer.train()
        assert all(value > 0 for value in logged(trainer, "topology/local_loss"))
        scale = torch.as_tensor(hosts(model)[0].auxiliary_scale)
        torch.testing.assert_close(scale.float(), torch.tensor(trainer._loss_weight), rtol=1e-6, atol=0)


class TestLoss:
    def test_is_the_kl_of_full_logits(self, tmp_path: Path) -> None:
        model = adapter()
        trainer = trainer_of(tmp_path, model)
        ids = tokens(2, LENGTH)
        expected = brute_force(model, ids).mean()
        assert expected > 0.01
        torch.testing.assert_close(trainer.compute_loss(model, {"input_ids": ids}), expected, rtol=1e-4, atol=1e-6)
        model.peft_config["default"].gumbel_noise = False  # which a training step turns off
        trained = trainer.compute_loss(model.train(), {"input_ids": ids})
        torch.testing.assert_close(trained.detach(), expected, rtol=1e-4, atol=1e-6)

    def test_is_zero_where_all_is_dense(self, tmp_path: Path) -> None:
        for depth, dense in ((0, True), ({0: 0, 1: [0] * 4}, True), (3, False)):
            model = adapter(visible_depth=depth)
            loss = trainer_of(tmp_path, model).compute_loss(model, {"input_ids": tokens(2, LENGTH)})
            assert (loss.abs() < 1e-6) == dense

    def test_language_model_loss_is_the_model_s_own(self, tmp_path: Path) -> None:
        model = adapter(visible_depth=0)
        trainer = trainer_of(tmp_path, model, kl_weight=0.0, lm_weight=0.5)
        labels = tokens(2, LENGTH)
        labels[0, :5] = -100
        inputs = {"input_ids": tokens(2, LENGTH), "labels": labels}
        loss = trainer.compute_loss(model, inputs)
        targets = (labels[:, 1:] != -100).sum()
        with torch.no_grad():
            torch.testing.assert_close(loss, 0.5 * model(**inputs).loss * targets / labels.numel())
        without = trainer.compute_loss(model, {"input_ids": inputs["input_ids"]})
        doubled = trainer.compute_loss(model, {"input_ids": inputs["input_ids"], "labels": inputs["input_ids"]})
        assert without == doubled != loss

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_carries_no_loss(self, tmp_path: Path, side: str) -> None:
        model = adapter().train()
        model.peft_config["default"].gumbel_noise = False
        trainer = trainer_of(tmp_path, model, lm_weight=0.3)
        short, long = tokens(1, 20, seed=1), tokens(1, LENGTH, seed=2)

        def gradients(*batches: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
            model.zero_grad()
            losses = []
            for batch in batches:
                real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()
                losses.append(trainer.compute_loss(model, batch) * real)
            total = torch.stack(losses).sum()
            total.backward()
            return total.detach(), [weight.grad for weight in router_parameters(model).values()]

        loss, expected = gradients({"input_ids": short}, {"input_ids": long})
        padding = (LENGTH - 20, 0) if side == "left" else (0, LENGTH - 20)
        padded = torch.cat([F.pad(short, padding, value=0), long])
        mask = torch.cat([F.pad(torch.ones_like(short), padding), torch.ones_like(long)])
        found, gradient = gradients({"input_ids": padded, "attention_mask": mask})
        torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-6)
        for ours, theirs in zip(gradient, expected, strict=True):
            assert theirs.abs().max() > 0
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)

    def test_packed_documents_are_as_if_alone(self, tmp_path: Path) -> None:
        model = adapter()
        trainer = trainer_of(tmp_path, model, lm_weight=0.3)
        first, second = tokens(1, 14, seed=1), tokens(1, LENGTH, seed=2)
        alone = [trainer.compute_loss(model, {"input_ids": ids}) * ids.numel() for ids in (first, second)]
        position_ids = torch.cat([torch.arange(14), torch.arange(LENGTH)])[None]
        packed = {"input_ids": torch.cat([first, second], 1), "position_ids": position_ids}
        loss = trainer.compute_loss(model, packed) * (14 + LENGTH)
        torch.testing.assert_close(loss, alone[0] + alone[1], rtol=1e-4, atol=1e-5)


class Unscheduled(TopologyCallback):
    """No schedule: the auxiliary loss has its full weight from the first step."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        pass


def change(trainer: Trainer) -> dict[str, Tensor]:
    """What training changes in each router weight."""
    before = {name: weight.detach().clone() for name, weight in router_parameters(trainer.model).items()}
    trainer.train()
    changes = {name: before[name] - weight.detach() for name, weight in router_parameters(trainer.model).items()}
    assert max(value.abs().max() for value in changes.values()) > 1e-5
    return changes


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(value.abs().max().item() for value in expected.values())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * largest)


def padded_rows() -> list[dict[str, Tensor]]:
    """Two rows of one length, the second with 20 tokens of padding."""
    ids = tokens(2, LENGTH)
    masks = torch.ones_like(ids)
    masks[1, 12:] = 0
    return [{"input_ids": row, "attention_mask": mask} for row, mask in zip(ids, masks, strict=True)]


class TestAccumulation:
    @pytest.mark.parametrize(
        "case",
        [
            {"train_dataset": padded_rows(), "lm_weight": 0.5},  # micro-batches of 32 and of 12 real tokens
            {"train_dataset": rows(2), "density_weight": 3.0},
            {"train_dataset": rows(2), "density_weight": 3.0, "kl_weight": 1e-9, "lm_weight": 0.0},  # auxiliary alone
        ],
    )
    def test_micro_batches_add_up(self, tmp_path: Path, case: dict[str, Any]) -> None:
        settings = {"density_weight": case["density_weight"]} if "density_weight" in case else {}
        case = {name: value for name, value in case.items() if name != "density_weight"}

        def step(batch: int) -> tuple[dict[str, Tensor], float]:
            trainer = trainer_of(
                tmp_path,
                adapter(**settings),
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=2 // batch,
                callbacks=[Unscheduled()],
                **ONE_STEP,
                **case,
            )
            return change(trainer), logged(trainer, "loss")[0]

        (whole, loss), (parts, loss_of_parts) = step(2), step(1)
        assert_close(parts, whole)
        assert loss_of_parts == pytest.approx(loss, rel=1e-4)

    def test_a_micro_batch_of_padding_adds_nothing(self, tmp_path: Path) -> None:
        row = rows(1)[0]
        padded = [{**row, "attention_mask": torch.full((LENGTH,), real)} for real in (1, 0)]

        def step(train_dataset: list[dict[str, Tensor]], **settings: Any) -> dict[str, Tensor]:
            return change(trainer_of(tmp_path, train_dataset=train_dataset, **ONE_STEP, **settings))

        assert_close(step(padded, gradient_accumulation_steps=2), step([row]))

    def test_the_price_of_density_is_part_of_the_gradient(self, tmp_path: Path) -> None:
        def step(density_weight: float) -> dict[str, Tensor]:
            model = adapter(density_weight=density_weight)
            return change(trainer_of(tmp_path, model, callbacks=[Unscheduled()], **ONE_STEP))

        free, dear = step(0.0), step(3.0)
        assert max((dear[name] - value).abs().max() / value.abs().max() for name, value in free.items()) > 0.1


class TestGradientCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradients_are_the_same(self, tmp_path: Path, use_reentrant: bool) -> None:
        drawn: dict[str, Any] = {"densities": (0.7, 0.8), "calibration_rows": tokens(2, LENGTH, seed=3)}

        def step(**settings: Any) -> tuple[dict[str, Tensor], int]:
            model, runs = adapter(density_weight=1.0, visible_depth=2), []
            model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(0))
            trainer = trainer_of(tmp_path, model, callbacks=[Unscheduled()], **drawn, **ONE_STEP, **settings)
            return change(trainer), len(runs)

        plain, runs = step()
        again, more_runs = step(
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
        )
        assert more_runs > runs  # it was on
        assert_close(again, plain)


class Watch(KLTrainer):
    """Notes the step, the visible depth and the calibration of each forward of a training step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int, Any, Any]] = []

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            own = model.peft_config["default"]
            config = hosts(model)[0].passes.current().in_force(own)
            assert config.gumbel_noise is False and config is not own
            self.seen.append((self.state.global_step, config.visible_depth, config.calibration))
        return super().compute_loss(model, *args, **kwargs)


def watch(path: Path, model: PeftModel, resume: str | None = None, **settings: Any) -> Watch:
    own = ("densities", "calibration_rows", "callbacks")
    given = {name: settings.pop(name) for name in own if name in settings}
    trainer = Watch(model=model, args=arguments(path, **settings), train_dataset=rows(16), **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class TestDraw:
    """What each training step runs at."""

    def test_without_densities_steps_have_the_config_s_depths(self, tmp_path: Path) -> None:
        depths = {1: [2, 0, 3, 1]}
        model = adapter(visible_depth=depths)
        trainer = watch(tmp_path, model, max_steps=3, gradient_accumulation_steps=2)
        assert [seen for _, seen, _ in trainer.seen] == [depths] * 6
        config = model.peft_config["default"]
        assert config.visible_depth == depths and config.gumbel_noise is True
        assert config.calibration is None  # nothing measured where nothing needs it

    def test_steps_have_the_map_of_the_drawn_density(self, tmp_path: Path) -> None:
        model = adapter(visible_depth={0: 1})
        calibration_rows = tokens(2, LENGTH, seed=9)
        trainer = watch(
            tmp_path,
            model,
            densities=(0.5, 0.9),
            calibration_rows=calibration_rows,
            max_steps=8,
            gradient_accumulation_steps=2,
            learning_rate=0.05,
            seed=3,
        )
        drawn = [drawn_density(3, step, 0.5, 0.9) for step in range(8)]
        assert logged(trainer, "topology/target_density") == drawn
        assert [step for step, _, _ in trainer.seen] == [step for step in range(8) for _ in range(2)]
        without = logged(trainer, "topology/heads_without_ball")
        for step, depths, calibration in trainer.seen:
            sparsest = [d for of_layer in choose_depths(calibration, 0.5).values() for d in of_layer]
            depth = model.peft_config["default"].depth
            assert without[step] == sum(d > depth for d in sparsest) / len(sparsest)
            assert calibration["length"] == LENGTH
            assert depths == choose_depths(calibration, drawn[step])
            flat = [(layer, head, d) for layer, heads in depths.items() for head, d in enumerate(heads)]
            assert sum(calibration["density"][layer][head][d] for layer, head, d in flat) / len(flat) <= drawn[step]
        assert len({str(depths) for _, depths, _ in trainer.seen}) > 3
        tables = [table for _, _, table in trainer.seen[::2]]
        for step, renewed in enumerate([False, True, False, True, True, False, True], start=1):
            assert (tables[step] != tables[step - 1]) == renewed
        config = model.peft_config["default"]
        assert config.visible_depth == config.setting_at(config.target_density).depths and config.gumbel_noise is True
        model.set_adapter("default")
        assert calibrate(model, calibration_rows)["loss"] != tables[-1]["loss"]  # trained on since

    def test_steps_that_window_and_sinks_leave_no_choice_are_told(self, tmp_path: Path) -> None:
        near = always_density(LENGTH, 3, 2)
        rows, at = tokens(2, LENGTH, seed=9), {"max_steps": 1}
        with pytest.warns(UserWarning, match=r"\d+% of the densities drawn from 0.001 to 0.9 are below"):
            watch(tmp_path, adapter(), densities=(1e-3, 0.9), calibration_rows=rows, **at)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch(tmp_path, adapter(), densities=(0.95 * near, 0.9), calibration_rows=rows, **at)
        assert not any("densities drawn" in str(each.message) for each in caught)

    def test_a_density_out_of_reach_is_trained_at_the_sparsest_map(self, tmp_path: Path) -> None:
        trainer = watch(
            tmp_path, adapter(), densities=(1e-4, 1e-3), calibration_rows=tokens(2, LENGTH, seed=9), max_steps=1
        )
        ((_, depths, calibration),) = trainer.seen
        for layer, heads in calibration["density"].items():
            assert [head[d] for head, d in zip(heads, depths[layer], strict=True)] == [head[-1] for head in heads]
        with pytest.raises(TopologyConfigError, match="target_density"):
            choose_depths(calibration, 1e-3)

    def test_the_sparsest_map_is_the_sparsest(self) -> None:
        density, loss = {0: [[1.0, 0.1005, 0.1]]}, {0: [[0.0, 0.1, 9]]}
        table = {"length": 200, "heads_per_route": 1, "density": density, "loss": loss}
        config = TopologyConfig(depth=1, visible_depth=1, calibration=table)  # type: ignore[arg-type]
        assert nearest_map(config, 0.01)[0] == {0: [2]}
        assert nearest_map(config, 0.1005)[0] == {0: [1]}
        assert nearest_map(config, 0.1)[0] == {0: [2]}
        assert nearest_map(config, 1.0)[0] == {0: [0]}

    def test_the_price_is_what_the_dial_would_pay(self) -> None:
        """Loss saved by the next piece of density, of a mean head of a layer, at most `density_weight`."""
        table = {
            "length": 200,
            "heads_per_route": 1,
            "density": {0: [[1.0, 0.2, 0.1]] * 2, 3: [[1.0, 0.2, 0.1]] * 2},
            "loss": {0: [[0.0, 0.04, 0.09]] * 2, 3: [[0.0, 0.04, 0.09]] * 2},
        }
        config = TopologyConfig(depth=1, visible_depth=1, density_weight=0.3, calibration=table)  # type: ignore[arg-type]
        assert nearest_map(config, 0.1).price == 0.3  # 2 * 0.05 / 0.1
        assert nearest_map(config, 0.2).price == pytest.approx(2 * 0.04 / 0.8)
        assert nearest_map(config, 1.0)[:3] == ({0: [0, 0], 3: [0, 0]}, None, 0.0)

    def test_the_weight_makes_expected_losses_more_alike(self) -> None:
        density, loss = {0: [[1.0, 0.4, 0.1]]}, {0: [[0.0, 0.02, 0.3]]}
        table = {"length": 200, "heads_per_route": 1, "density": density, "loss": loss}
        config = TopologyConfig(depth=1, visible_depth=1, calibration=table)  # type: ignore[arg-type]
        ends, middle = (0.1, 1.0), nearest_map(config, math.sqrt(0.1))
        assert middle.depths == {0: [2]} and middle.loss == 0.3
        assert loss_weight([config], [nearest_map(config, 0.2)], ends) == 1
        assert loss_weight([config], [nearest_map(config, 0.5)], ends) == pytest.approx(0.3 / 0.02)
        assert loss_weight([config], [nearest_map(config, 1.0)], ends) == pytest.approx(16)
        two = [nearest_map(config, 0.5), nearest_map(config, 0.2)]
        assert loss_weight([config, config], two, ends) == pytest.approx(0.6 / 0.32)
        nothing = [nearest_map(config, 1.0)]
        assert loss_weight([config], nothing, (1.0, 1.0)) == 1  # nothing is lost anywhere

    def test_the_loss_has_the_weight_and_the_logged_kl_has_not(self, tmp_path: Path) -> None:
        settings = {"densities": (0.5, 0.9), "calibration_rows": tokens(2, LENGTH, seed=9), "max_steps": 4}
        trainer = watch(tmp_path, adapter(), **settings)
        weights = []
        for _, depths, calibration in trainer.seen:
            middle = choose(calibration, math.sqrt(0.5 * 0.9))
            weight = expected_loss(calibration, middle) / expected_loss(calibration, Setting(depths, None))
            weights.append(min(weight, 16.0))
        assert min(weights) < 0.99 and max(weights) > 1.01
        losses = [weight * value for weight, value in zip(weights, logged(trainer, "kl"), strict=True)]
        assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-3)

    def test_the_price_of_density_has_the_weight_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = {"densities": (0.5, 0.6), "calibration_rows": tokens(2, LENGTH, seed=9), "max_steps": 1}
        settings |= {"optim": "sgd", "max_grad_norm": 0.0, "warmup_steps": 0, "gradient_accumulation_steps": 2}

        def moved(weight: float, rate: float) -> list[Tensor]:
            monkeypatch.setattr(kl, "loss_weight", lambda *_: weight)
            model = adapter(density_weight=100.0)
            before = {name: value.detach().clone() for name, value in router_parameters(model).items()}
            watch(tmp_path, model, learning_rate=rate, **settings)
            return [value - before[name] for name, value in router_parameters(model).items()]

        for thrice, once in zip(moved(3.0, 0.1), moved(1.0, 0.3), strict=True):
            assert once.abs().max() > 1e-4
            assert torch.allclose(thrice, once, rtol=1e-3, atol=1e-3 * once.abs().max().item())

    def test_the_config_is_put_back_after_an_error(self, tmp_path: Path) -> None:
        model = adapter(visible_depth=2, density_weight=0.4)
        model.get_base_model().lm_head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            watch(tmp_path, model)
        assert hosts(model)[0].passes.current() is ORDINARY
        config = model.peft_config["default"]
        assert config.visible_depth == 2 and config.gumbel_noise is True and config.density_weight == 0.4
        assert len(model.get_base_model().lm_head._forward_pre_hooks) == 0


class TestCalibration:
    @pytest.fixture
    def calibrated_at(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The steps at which a calibration is made."""
        steps: list[int] = []

        def note(model: PeftModel, sequences: Tensor, **kwargs: Any) -> Any:
            steps.append(self.callback.step)
            return calibrate(model, sequences, **kwargs)

        class Step(TrainerCallback):
            step = -1

            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.step = state.global_step

        self.callback = Step()
        monkeypatch.setattr(densities, "calibrate", note)
        return steps

    settings = {"densities": (0.5, 0.9), "save_strategy": "steps", "save_steps": 5}

    def test_is_renewed_before_each_fifth_and_on_resume(self, tmp_path: Path, calibrated_at: list[int]) -> None:
        settings = {**self.settings, "calibration_rows": tokens(2, LENGTH, seed=9), "callbacks": [self.callback]}
        watch(tmp_path, adapter(), max_steps=20, gradient_accumulation_steps=2, **settings)
        assert calibrated_at == [0, 4, 8, 12, 16]
        calibrated_at.clear()
        watch(tmp_path, adapter(), str(tmp_path / "checkpoint-10"), max_steps=20, **settings)
        assert calibrated_at == [10, 12, 16]

    def test_few_steps_have_a_calibration_each_at_most(self, tmp_path: Path, calibrated_at: list[int]) -> None:
        settings = {**self.settings, "calibration_rows": tokens(2, LENGTH, seed=9), "callbacks": [self.callback]}
        watch(tmp_path, adapter(), max_steps=3, **settings)
        assert calibrated_at == [0, 1, 2]


class TestResume:
    def test_goes_on_as_it_would_have(self, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "learning_rate": 0.03}
        settings |= {"densities": (0.5, 0.9), "calibration_rows": tokens(2, LENGTH, seed=9)}

        whole = watch(tmp_path, adapter(), **settings)
        resumed = watch(tmp_path, adapter(), str(tmp_path / "checkpoint-4"), **settings)
        assert [step for step, _, _ in resumed.seen] == [4, 5, 6, 7]
        assert resumed.seen == whole.seen[4:]
        for key in ("topology/target_density", "loss", "kl"):
            assert logged(resumed, key) == logged(whole, key)
        expected, after = router_parameters(whole.model), router_parameters(resumed.model)
        fresh = router_parameters(adapter())
        for key, weight in after.items():
            assert torch.equal(weight, expected[key]) and not torch.equal(weight, fresh[key]), key


class TestTraining:
    def test_loss_falls_and_only_routers_change(self, tmp_path: Path) -> None:
        model = adapter(visible_depth=2)
        held_out = tokens(8, LENGTH, seed=77)
        before, weights = brute_force(model, held_out).mean(), weights_of(model)
        train_dataset = rows(160, seed=1)
        trainer = trainer_of(
            tmp_path,
            model,
            max_steps=40,
            per_device_train_batch_size=4,
            learning_rate=0.02,
            train_dataset=train_dataset,
        )
        trainer.train()
        losses = logged(trainer, "loss")
        assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
        assert brute_force(model, held_out).mean() < 0.9 * before  # of texts that it has not seen
        changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, weights[name])}
        assert changed == set(router_parameters(model))
        assert model.peft_config["default"].homotopy == 1.0

    def test_several_visits(self, tmp_path: Path) -> None:
        """What falls is the KL of the masks with all visits, of texts not seen; and drawn densities train too."""
        model = adapter(visible_depth=3, visits=3)
        held_out = tokens(8, LENGTH, seed=77)
        before = brute_force(model, held_out).mean()
        model.peft_config["default"].visits = 1
        assert abs(brute_force(model, held_out).mean() - before) > 0.05 * before
        model.peft_config["default"].visits = 3
        settings = {"per_device_train_batch_size": 4, "learning_rate": 0.02, "train_dataset": rows(80, seed=1)}
        trainer_of(tmp_path, model, max_steps=20, **settings).train()
        after = brute_force(model, held_out).mean()
        assert after < 0.9 * before
        drawn = {"densities": (0.4, 0.8), "calibration_rows": tokens(2, LENGTH, seed=9)}
        trainer = trainer_of(tmp_path, model, max_steps=1, **settings, **drawn)
        trainer.train()
        assert 0 < logged(trainer, "kl")[0] < math.inf and brute_force(model, held_out).mean() != after

    def test_logs_kl_and_language_model_loss(self, tmp_path: Path) -> None:
        settings = {"kl_weight": 2.0, "lm_weight": 0.5, "logging_steps": 2, "max_steps": 4}
        trainer = trainer_of(tmp_path, gradient_accumulation_steps=2, **settings)
        trainer.train()
        loss, kl, lm = (logged(trainer, name) for name in ("loss", "kl", "lm"))
        assert len(loss) == 2 and min(*kl, *lm) > 0.01
        assert loss == pytest.approx([2 * a + 0.5 * b for a, b in zip(kl, lm, strict=True)], rel=1e-4)
        assert all("topology/density" in log for log in trainer.state.log_history if "loss" in log)

    def test_weights_of_zero_are_not_logged(self, tmp_path: Path) -> None:
        trainer = trainer_of(tmp_path, kl_weight=0.0, lm_weight=1.0)
        trainer.train()
        assert logged(trainer, "lm") == pytest.approx(logged(trainer, "loss"))
        assert not any("kl" in log for log in trainer.state.log_history)

    def test_density_one_is_dense(self, tmp_path: Path) -> None:
        rows = tokens(2, LENGTH, seed=9)
        trainer = trainer_of(tmp_path, densities=(1.0, 1.0), calibration_rows=rows, max_steps=2)
        trainer.train()
        assert max(map(abs, logged(trainer, "kl"))) < 1e-6
        trainer = trainer_of(tmp_path, densities=(0.5, 0.5), calibration_rows=rows, max_steps=2)
        trainer.train()
        assert min(logged(trainer, "kl")) > 1e-3

    @pytest.mark.parametrize("gradient_checkpointing", [False, True])
    def test_dropout_of_the_base_is_off(self, tmp_path: Path, gradient_checkpointing: bool) -> None:
        model = adapter(tiny("phi3", num_hidden_layers=2, resid_pdrop=0.5, embd_pdrop=0.5), visible_depth=0)
        trainer = trainer_of(
            tmp_path,
            model,
            densities=(1.0, 1.0),
            calibration_rows=tokens(2, LENGTH, seed=9),
            gradient_checkpointing=gradient_checkpointing,
        )
        trainer.train()
        assert abs(logged(trainer, "kl")[0]) < 1e-6
        ids = tokens(1, LENGTH)
        with torch.no_grad(), model.disable_adapter():
            dense = [model.train(mode)(input_ids=ids, use_cache=False).logits for mode in (True, False)]
        assert not torch.allclose(*dense)  # in training mode it would be on

    def test_half_precision(self, tmp_path: Path) -> None:
        def loss(**settings: Any) -> float:
            trainer = trainer_of(tmp_path, **settings)
            trainer.train()
            return logged(trainer, "loss")[0]

        assert loss(bf16=True) == pytest.approx(loss(), rel=0.3)

    def test_evaluation_is_the_kl_at_the_config_s_depth(self, tmp_path: Path) -> None:
        model = adapter(visible_depth={1: 3})
        held_out = rows(6, seed=77)
        trainer = trainer_of(
            tmp_path,
            model,
            max_steps=2,
            learning_rate=0.1,
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=4,
            eval_dataset=held_out,
            callbacks=[TopologyCallback((0.3, 0.1), (1.0, 1.0))],
        )
        trainer.train()
        losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
        assert len(losses) == 2 and losses[0] != losses[1]
        expected = brute_force(model, torch.stack([row["input_ids"] for row in held_out])).mean().item()
        assert expected > 1e-3 and losses[1] == pytest.approx(expected, rel=1e-3)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-3)
        assert len(logged(trainer, "loss")) == 2  # evaluation is not counted as training


# ---------------------------------------------------------------- refusals


class Doubled(LlamaForCausalLM):
    """Does to its logits what no field of its config tells."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs


class LastOnly(LlamaForCausalLM):
    """Runs its head over the last token alone."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids, **{**kwargs, "logits_to_keep": 1})


class Shortened(LlamaForCausalLM):
    """Leaves an entry of its vocabulary out."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids, **kwargs)
        outputs.logits = outputs.logits[..., :-1]
        return outputs


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"densities": (0.0, 0.2)}, "densities must be"),
            ({"densities": (0.3, 0.2)}, "densities must be"),
            ({"densities": (0.3, 1.2)}, "densities must be"),
            ({"densities": (float("nan"), 0.2)}, "densities must be"),
            ({"densities": (0.1, 0.2)}, "calibration_rows must be given"),
            ({"kl_weight": -1.0}, "kl_weight"),
            ({"lm_weight": float("inf")}, "lm_weight"),
            ({"lm_weight": float("nan")}, "lm_weight"),
            ({"local_weight": -0.5}, "local_weight must be a finite number >= 0, got -0.5"),
            ({"local_density_weight": -1.0}, "local_density_weight"),
            ({"num_queries": 0}, "num_queries"),
            ({"kl_weight": 0.0}, "kl_weight or lm_weight must be > 0"),
            ({"kl_weight": 0.0, "local_weight": 1.0}, "kl_weight or lm_weight must be > 0"),
        ],
    )
    def test_arguments_out_of_range(self, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(TopologyConfigError, match=message):
            trainer_of(tmp_path, **settings)

    def test_calibration_rows_that_cannot_be_measured(self, tmp_path: Path) -> None:
        trainer = trainer_of(tmp_path, densities=(0.5, 0.9), calibration_rows=tokens(1, 5))  # window 3, 2 sinks
        with pytest.raises(TopologyConfigError, match="local_window"):
            trainer.train()

    def test_a_model_without_adapter(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModelError, match="active"):
            trainer_of(tmp_path, tiny())
        model = adapter()
        model.base_model.disable_adapter_layers()
        with pytest.raises(UnsupportedModelError, match="active"):
            trainer_of(tmp_path, model)

    def test_a_model_that_is_no_peft_model(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModelError, match="must be a PeftModel, got LlamaForCausalLM"):
            trainer_of(tmp_path, adapter().get_base_model())

    @pytest.mark.parametrize(
        ("kind", "message"),
        [(Doubled, "differ by up to"), (Shortened, "differ in shape"), (LastOnly, "run its output embedding once")],
    )
    def test_logits_that_the_chunks_would_miss(self, tmp_path: Path, kind: Any, message: str) -> None:
        torch.manual_seed(0)
        model = adapter(kind(tiny(num_hidden_layers=2, initializer_range=0.3).config))
        with pytest.raises(UnsupportedModelError, match=f"(?s){kind.__name__}.*{message}|{message}.*{kind.__name__}"):
            trainer_of(tmp_path, model).train()

    def test_a_model_without_output_embedding(self, tmp_path: Path) -> None:
        model = adapter(LlamaModel(tiny(num_hidden_layers=2).config))
        with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
            trainer_of(tmp_path, model).train()

    def test_batches_without_ids_or_with_another_mask(self, tmp_path: Path) -> None:
        model, ids = adapter(), tokens(1, 6)
        trainer = trainer_of(tmp_path, model)
        square = torch.ones(1, 1, 6, 6, dtype=torch.bool)
        for mask, got in ((square, r"\(1, 1, 6, 6\)"), ({"full_attention": square}, "dict")):
            with pytest.raises(UnsupportedModelError, match=f"(1, 6).*{got}"):
                trainer.compute_loss(model, {"input_ids": ids, "attention_mask": mask})
        with pytest.raises(UnsupportedModelError, match=r"input_ids, got \['inputs_embeds'\]"):
            trainer.compute_loss(model, {"inputs_embeds": torch.zeros(1, 6, 32)})
