"""What is measured on one text at one length: perplexity, copying, needles, density, kept mass and speed."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from topo_adapter import TopologyConfig, measure_density, record_routes
from topo_adapter.core.visibility import always_density
from topo_adapter.hf.gates import text_decoder
from topo_adapter.training.losses import logits_head, token_losses

from .baselines import (
    Baseline,
    BlockTopK,
    LongerWindow,
    OracleThreshold,
    OracleTopK,
    RandomBalls,
    Tally,
    TreeRoutes,
    attending,
    find_threshold,
)

#: The copy test at 4,096 tokens and more; in shorter windows everything shrinks in proportion.
PASSAGE, PASSAGE_START, PASSAGE_GAP, FULL_LENGTH = 512, 512, 1500, 4096
#: The first part of a repeat is not scored: until there nothing tells that it is one.
UNSCORED = 0.15
#: Where a needle lies in its haystack: 0 is the start.
NEEDLE_DEPTHS = (0.1, 0.25, 0.5, 0.75)
NEEDLE = "\nThe secret number of {name} is {digits}.\n"
QUESTION = "\n\nQuestion: What is the secret number of {name}?\nAnswer: The secret number of {name} is"
NAMES = ("Alice", "Bruno", "Clara", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Julia", "Karim", "Laura")

Scores = dict[str, Any]


@dataclass(frozen=True)
class Copies:
    """Windows with a repeated passage, `[K, T]`, and which of the `T - 1` next-token losses belong to the repeat."""

    ids: Tensor
    scored: slice


@dataclass(frozen=True)
class Needle:
    """A prompt with its answer, `[T]`; the answer is the last `answer` tokens, digits alone."""

    ids: Tensor
    answer: int
    depth: float


@dataclass(frozen=True)
class Case:
    """One text at one length: windows `[K, T]`; copies None and no needles: not measured."""

    text: str
    windows: Tensor
    copies: Copies | None = None
    needles: Sequence[Needle] = ()

    @property
    def length(self) -> int:
        return self.windows.shape[1]


# ---------------------------------------------------------------------------------------------------------
# Inputs


def copy_windows(windows: Tensor, local_window: int) -> Copies | None:
    """The windows `[K, T]` with a passage that comes again later.

    None where the local window reaches from the repeat to the passage, so that copying needs no other key.
    """
    length = windows.shape[1]
    scale = min(1.0, length / FULL_LENGTH)
    passage, start, gap = (round(scale * size) for size in (PASSAGE, PASSAGE_START, PASSAGE_GAP))
    repeat = start + passage + gap
    unscored = round(UNSCORED * passage)
    if repeat - start <= local_window or unscored == passage:
        return None
    ids = windows.clone()
    ids[:, repeat : repeat + passage] = ids[:, start : start + passage]
    return Copies(ids, slice(repeat + unscored - 1, repeat + passage - 1))  # loss i is that of token i + 1


def needle_prompts(windows: Tensor, tokenizer: PreTrainedTokenizerBase, seed: int | str = 0) -> list[Needle]:
    """A needle at every depth of every window `[K, T]`, the question at the end; `T` tokens with the answer.

    Empty where the windows are too short to hold needle and question.
    """
    drawn = random.Random(f"needle {seed}")
    prompts = []
    for window in windows:
        for depth in NEEDLE_DEPTHS:
            name, digits = drawn.choice(NAMES), str(drawn.randrange(10_000, 100_000))
            needle = _tokens(tokenizer, NEEDLE.format(name=name, digits=digits))
            question, answer = question_and_answer(tokenizer, name, digits)
            extra = len(needle) + len(question) + len(answer)
            if len(window) < 2 * extra:
                return []
            hay = window[: len(window) - extra]
            place = max(1, round(depth * len(hay)))  # behind a beginning-of-sequence token
            ids = torch.cat([hay[:place], needle, hay[place:], question, answer])
            prompts.append(Needle(ids, len(answer), depth))
    return prompts


def question_and_answer(tokenizer: PreTrainedTokenizerBase, name: str, digits: str) -> tuple[Tensor, Tensor]:
    """Tokens up to the first that holds one of the digits of the answer, and from there on."""
    question = QUESTION.format(name=name)
    whole, start = _tokens(tokenizer, f"{question} {digits}"), _tokens(tokenizer, question)
    first = 0
    while first < min(len(start), len(whole)) and start[first] == whole[first]:
        first += 1
    while first < len(whole) - 1 and not any(c.isdigit() for c in tokenizer.decode(whole[first : first + 1])):
        first += 1  # the space, where it is a token of its own
    return whole[:first], whole[first:]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)


# ---------------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def hidden_states(base: PreTrainedModel, row: Tensor) -> Tensor:
    """Final hidden states `[T, hidden]` of the tokens `[T]`."""
    ids = row[None].to(base.device)
    return text_decoder(base)(input_ids=ids, use_cache=False).last_hidden_state[0]


@torch.no_grad()
def next_token_losses(base: PreTrainedModel, row: Tensor) -> Tensor:
    """Cross-entropy of each token `[T]` but the first, `[T - 1]`; no tensor holds the logits of all tokens."""
    hidden = hidden_states(base, row)
    return token_losses(hidden[:-1], None, row[1:].to(hidden.device), logits_head(base))[1]


@torch.no_grad()
def answer_scores(base: PreTrainedModel, needle: Needle) -> tuple[bool, float]:
    """Whether greedy decoding of the prompt gives the answer, and the mean log-probability of the answer's tokens.

    One forward over prompt and answer: greedy decoding gives the answer if and only if each of its tokens is the
    most probable after those before it.
    """
    logits = logits_head(base)(hidden_states(base, needle.ids)[-needle.answer - 1 : -1])
    answer = needle.ids[-needle.answer :].to(logits.device)
    log_probs = logits.log_softmax(-1).gather(1, answer[:, None])
    return bool((logits.argmax(-1) == answer).all()), log_probs.mean().item()


def score(base: PreTrainedModel, case: Case, tally: Tally | None = None) -> Scores:
    """Scores of whatever is in force in the model.

    Args:
        tally: of the baseline in force; adds its density over all windows and its kept mass on the first.

    Returns:
        `perplexity`, and where the case asks for them `copy_loss` (nats per token), `needle_exact` (share of exact
        answers), `needle_log_prob` and `needle_exact_at` (by depth).
    """
    scores: Scores = {}
    losses = []
    for row in case.windows:
        losses.append(next_token_losses(base, row).mean().item())
        if tally is not None and len(losses) == 1:
            scores["kept_mass"] = tally.kept_mass().mean().item()
    scores["perplexity"] = math.exp(statistics.fmean(losses))
    if tally is not None:
        scores["density"] = tally.density().mean().item()
    if case.copies is not None:
        repeats = [next_token_losses(base, row)[case.copies.scored] for row in case.copies.ids]
        scores["copy_loss"] = torch.stack(repeats).mean().item()
    if case.needles:
        answers = [(needle.depth, *answer_scores(base, needle)) for needle in case.needles]
        scores["needle_exact"] = statistics.fmean(exact for _, exact, _ in answers)
        scores["needle_log_prob"] = statistics.fmean(log_prob for *_, log_prob in answers)
        scores["needle_exact_at"] = {
            depth: statistics.fmean(exact for at, exact, _ in answers if at == depth)
            for depth in sorted({at for at, *_ in answers})
        }
    return scores


def density_map(base: PreTrainedModel, windows: Tensor) -> dict[int, list[float]]:
    """Realised density per routed layer and head, mean over windows `[K, T]`."""
    decoder = text_decoder(base)  # without the head: nobody needs logits
    found = [measure_density(decoder, row[None].to(base.device)) for row in windows]
    return {layer: torch.stack([each[layer] for each in found]).mean(0).tolist() for layer in found[0]}


def kept_mass(adapter: PeftModel, row: Tensor) -> float:
    """Attention weight that falls on visible keys of an adapter's mask, mean over layers, heads and tokens `[T]`.

    The weight is that of all causal keys, on the hidden states of the sparse model, as in `Tally`.
    """
    base, config, ids = adapter.get_base_model(), config_of(adapter), row[None].to(adapter.device)
    mask = TreeRoutes(config.local_window, config.num_sink_tokens, config.arity, record_routes(text_decoder(base), ids))
    with torch.no_grad(), adapter.disable_adapter(), attending(base, mask) as tally:
        text_decoder(base)(input_ids=ids, use_cache=False)
    return tally.kept_mass().mean().item()


@torch.no_grad()
def speed(model: Any, row: Tensor, repeats: int = 3, new_tokens: int = 16) -> Scores:
    """Medians of `prefill_seconds` of the tokens `[T]` or `[B, T]`, all at once, and of `decode_ms`: milliseconds of a
    greedy step, which decodes a token of each."""
    ids = torch.atleast_2d(row).to(model.device)

    def prefill() -> Any:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def decode(outputs: Any) -> Any:
        token = outputs.logits[:, -1:].argmax(-1)
        return model(input_ids=token, past_key_values=outputs.past_key_values, use_cache=True)

    def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
        _synchronise(ids.device)
        start = time.perf_counter()
        outputs = run()
        _synchronise(ids.device)
        return time.perf_counter() - start, outputs

    outputs = decode(decode(prefill()))  # compiles and warms up
    prefills, decodes = [], []
    for _ in range(repeats):
        took, outputs = seconds(prefill)
        prefills.append(took)
    for _ in range(new_tokens):
        before = outputs
        took, outputs = seconds(lambda: decode(before))  # noqa: B023  # runs at once
        decodes.append(took)
    return {"prefill_seconds": statistics.median(prefills), "decode_ms": 1e3 * statistics.median(decodes)}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------
# Methods, each in force on one case


def config_of(adapter: PeftModel) -> TopologyConfig:
    return adapter.peft_config[adapter.active_adapter]


@contextlib.contextmanager
def merged_at(adapter: PeftModel, target: float) -> Iterator[Any]:
    """While active, the adapter is merged at a density of the calibrated length; yields depths per layer and head."""
    config = config_of(adapter)
    before = config.setting, config.target_density
    adapter.merge_adapter(target_density=target)  # refuses before it changes anything
    try:
        yield config.visible_depth
    finally:
        adapter.unmerge_adapter()
        config.setting, config.target_density = before


@contextlib.contextmanager
def uniform_at(adapter: PeftModel, depth: int) -> Iterator[None]:
    """While active, merged with all heads at one depth, with all of the adapter's visits."""
    config = config_of(adapter)
    before, config.setting = config.setting, (depth, None)
    adapter.merge_adapter()
    try:
        yield
    finally:
        adapter.unmerge_adapter()
        config.setting = before


def score_dense(adapter: PeftModel, case: Case) -> Scores:
    with adapter.disable_adapter():
        return {"density": 1.0, "kept_mass": 1.0, **score(adapter.get_base_model(), case)}


def score_baseline(adapter: PeftModel, case: Case, make: Callable[[], Baseline]) -> Scores:
    base = adapter.get_base_model()
    with adapter.disable_adapter():
        baseline = make()
        with attending(base, baseline) as tally:
            return score(base, case, tally)


def score_adapter(adapter: PeftModel, case: Case, target: float) -> Scores:
    """Of the adapter merged at a density of the calibrated length."""
    base = adapter.get_base_model()
    with merged_at(adapter, target) as depths:
        found = density_map(base, case.windows)
        return {
            "density": statistics.fmean(value for heads in found.values() for value in heads),
            "kept_mass": kept_mass(adapter, case.windows[0]),
            **score(base, case),
            "density_map": found,
            "depths": depths,
        }


def baselines_at(
    base: Any, case: Case, config: TopologyConfig, density: float, seed: int
) -> dict[str, Callable[[], Baseline]]:
    """What makes each baseline for a density on one text; made while the adapter is disabled."""
    near = config.local_window, config.num_sink_tokens
    density = max(density, always_density(case.length, *near))  # equal but for rounding
    return {
        LongerWindow.name: lambda: LongerWindow(*near, case.length, density),
        RandomBalls.name: lambda: RandomBalls(*near, case.length, density, seed),
        BlockTopK.name: lambda: BlockTopK(*near, density),
        OracleTopK.name: lambda: OracleTopK(*near, case.length, density),
        OracleThreshold.name: lambda: OracleThreshold(*near, find_threshold(base, case.windows[:1], *near, density)),
    }


def gap_recovered(window: float, loss: float, dense: float) -> float | None:
    """How much of what window and sinks lose against the dense model is won back; None where they lose nothing."""
    return None if window == dense else (window - loss) / (window - dense)
