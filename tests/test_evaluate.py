"""`topo_evaluation` and `recipes/evaluate.py` on tiny models: every number against a second account of it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_helpers import logits_of, routed, tiny, tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import HfArgumentParser, PreTrainedTokenizerFast

from recipes.evaluate import OutputArguments
from recipes.evaluate import main as run
from topo_adapter import TopologyConfig, TopologyConfigError, calibrate, measure_density, record_routes
from topo_adapter.density import calibrated_density
from topo_evaluation import measures
from topo_evaluation.baselines import TreeRoutes, Window, attending
from topo_evaluation.measures import (
    Case,
    Needle,
    answer_scores,
    copy_windows,
    gap_recovered,
    needle_prompts,
    score,
    score_adapter,
)
from topo_evaluation.report import of
from topo_evaluation.results import KEYS, Row
from topo_evaluation.tasks import EvaluationSettings, in_reach, load, rows_of
from topo_evaluation.texts import EVALUATION

WINDOW, SINKS, LENGTH, VOCAB = 3, 2, 96, 259
LENGTHS, DENSITIES = [64, LENGTH], [0.05, 0.5, 0.75]


def base() -> Any:
    return tiny(num_hidden_layers=2, vocab_size=VOCAB, max_position_embeddings=1024)


def adapted() -> PeftModel:
    model = routed(base(), local_window=WINDOW, num_sink_tokens=SINKS, task_type="CAUSAL_LM")
    calibrate(model, tokens(2, 80, seed=5))
    return model


@pytest.fixture(scope="module")
def adapter() -> PeftModel:
    return adapted()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def a_case(**settings: Any) -> Case:
    windows = tokens(2, LENGTH, seed=1)
    return Case("text", windows, **{"copies": copy_windows(windows, WINDOW), **settings})


def settings_of(folder: Path, **settings: Any) -> EvaluationSettings:
    defaults = {
        "adapter": str(folder / "adapter"),
        "model": str(folder / "base"),
        "lengths": LENGTHS,
        "densities": DENSITIES,
        "texts": [str(folder / "a.txt"), str(folder / "b.txt")],
        "windows": 2,
        "device": "cpu",
    }
    return EvaluationSettings(**{**defaults, **settings})


def main(settings: EvaluationSettings, output: Path) -> list[Row]:
    return run(settings, OutputArguments(str(output)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A base model with its tokenizer, a calibrated adapter of it, and two texts."""
    path = tmp_path_factory.mktemp("evaluate")
    base().save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    adapted().save_pretrained(path / "adapter")
    words = random.Random(0)
    for name in "ab":
        (path / f"{name}.txt").write_text(" ".join(words.choice(["tree", "ball", "leaf", "root"]) for _ in range(150)))
    return path


def losses_of(model: Any, row: Tensor) -> Tensor:
    logits = logits_of(model, row[None])[0].double()
    return -logits.log_softmax(-1)[:-1].gather(1, row[1:, None])[:, 0]


# ---------------------------------------------------------------- what is measured


def test_perplexity_and_copy_loss_are_those_of_the_logits(adapter: PeftModel) -> None:
    case = a_case()
    assert case.copies is not None
    with adapter.disable_adapter():
        found = score(adapter.get_base_model(), case)
        losses = [losses_of(adapter, row).mean() for row in case.windows]
        repeats = [losses_of(adapter, row)[case.copies.scored].mean() for row in case.copies.ids]
    assert found["perplexity"] == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)
    assert found["copy_loss"] == pytest.approx(float(torch.stack(repeats).mean()), rel=1e-5)
    assert "needle_exact" not in found and "density" not in found


def test_no_tensor_holds_the_logits_of_all_tokens(adapter: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topo_adapter.training.losses._CHUNK_LOGITS", 20 * VOCAB)
    sizes: list[int] = []
    head = adapter.get_base_model().lm_head
    watch = head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[-2]))
    try:
        score_adapter(adapter, a_case(), 0.75)
    finally:
        watch.remove()
    assert max(sizes) == 20


def test_the_adapter_at_density_one_is_the_dense_model(adapter: PeftModel) -> None:
    case = a_case()
    dense, found = measures.score_dense(adapter, case), score_adapter(adapter, case, 1.0)
    assert found["density"] == 1 and found["kept_mass"] == pytest.approx(1, abs=1e-6)
    for key in ("perplexity", "copy_loss"):
        assert found[key] == pytest.approx(dense[key], rel=1e-6)


def test_the_adapter_is_scored_as_it_merges(adapter: PeftModel) -> None:
    case, merged = a_case(), adapted()
    found = score_adapter(adapter, case, 0.6)
    merged.merge_adapter(target_density=0.6)
    assert found["depths"] == merged.peft_config["default"].visible_depth
    losses = [losses_of(merged, row).mean() for row in case.windows]
    assert found["perplexity"] == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)

    counted = [torch.stack(list(measure_density(merged, row[None]).values())) for row in case.windows]
    assert found["density"] == pytest.approx(float(torch.stack(counted).mean()))
    torch.testing.assert_close(
        torch.tensor([found["density_map"][layer] for layer in (0, 1)]).double(), torch.stack(counted).mean(0)
    )
    first = case.windows[:1]
    records = record_routes(merged, first)
    with merged.disable_adapter(), attending(merged.get_base_model(), TreeRoutes(WINDOW, SINKS, 2, records)) as tally:
        logits_of(merged, first)
    assert found["kept_mass"] == pytest.approx(float(tally.kept_mass().mean()))
    assert 0 < found["kept_mass"] < 1
    torch.testing.assert_close(tally.density(), counted[0])


def test_gap_recovered() -> None:
    assert gap_recovered(window=5.0, loss=5.0, dense=1.0) == 0
    assert gap_recovered(window=5.0, loss=1.0, dense=1.0) == 1
    assert gap_recovered(window=5.0, loss=2.0, dense=1.0) == 0.75
    assert gap_recovered(window=5.0, loss=7.0, dense=1.0) == -0.5
    assert gap_recovered(window=1.0, loss=1.0, dense=1.0) is None


@pytest.mark.parametrize(("length", "passage", "start", "repeat"), [(4096, 512, 512, 2524), (8192, 512, 512, 2524)])
def test_copies_at_full_length(length: int, passage: int, start: int, repeat: int) -> None:
    windows = torch.arange(2 * length).view(2, length)
    copies = copy_windows(windows, 128)
    assert copies is not None
    assert torch.equal(copies.ids[:, repeat : repeat + passage], windows[:, start : start + passage])
    changed = (copies.ids != windows).nonzero()[:, 1]
    assert (changed.min(), changed.max(), len(changed)) == (repeat, repeat + passage - 1, 2 * passage)
    scored = torch.arange(1, length)[copies.scored]  # the token that each loss belongs to
    assert (scored[0], scored[-1]) == (repeat + round(0.15 * passage), repeat + passage - 1)
    assert torch.equal(windows[0, :length], torch.arange(length))  # not in place


def test_copies_shrink_with_the_window() -> None:
    windows = torch.arange(1024)[None]
    copies = copy_windows(windows, 128)
    assert copies is not None
    changed = (copies.ids != windows).nonzero()[:, 1]
    assert (int(changed.min()), len(changed)) == (631, 128)  # 128 + 128 + 375
    assert copies.ids[0, 631] == 128
    assert copy_windows(windows, 503) is None  # the window reaches what is to be copied
    assert copy_windows(windows, 502) is not None


def test_needle_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer("the whale " * 100).input_ids
    windows = torch.tensor(text[:640]).view(2, 320)
    prompts = needle_prompts(windows, tokenizer, seed=3)
    assert [prompt.depth for prompt in prompts] == 2 * list(measures.NEEDLE_DEPTHS)
    for number, prompt in enumerate(prompts):
        assert prompt.ids.shape == (320,) and prompt.answer == 5
        whole, digits = tokenizer.decode(prompt.ids), tokenizer.decode(prompt.ids[-5:])
        assert digits.isdecimal()
        name = whole.split("What is the secret number of ")[1].split("?")[0]
        needle = f"\nThe secret number of {name} is {digits}.\n"
        question = (
            f"\n\nQuestion: What is the secret number of {name}?\nAnswer: The secret number of {name} is {digits}"
        )
        assert whole.count(needle) == 1 and whole.endswith(question)
        hay = whole.replace(needle, "").removesuffix(question)
        assert tokenizer.decode(windows[number // 4]).startswith(hay)
        assert whole.index(needle) == max(1, round(prompt.depth * len(hay)))
    again, other = (needle_prompts(windows, tokenizer, seed=seed) for seed in (3, 4))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(prompts, again, strict=True))
    assert not all(torch.equal(a.ids, b.ids) for a, b in zip(prompts, other, strict=True))
    assert len({tuple(prompt.ids[-5:].tolist()) for prompt in prompts}) > 4
    assert needle_prompts(windows[:, :200], tokenizer) == []


def test_needles_are_scored_as_greedy_decoding_does(adapter: PeftModel) -> None:
    model = adapter.get_base_model()
    prompt = tokens(1, 40, seed=8)
    with adapter.disable_adapter():
        ids = prompt
        for _ in range(4):
            ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], 1)
        exact, log_prob = answer_scores(model, Needle(ids[0], 4, 0.5))
        assert exact and log_prob == pytest.approx(-float(losses_of(model, ids[0])[-4:].mean()), rel=1e-5)
        for place in (-1, -4):
            wrong = ids[0].clone()
            wrong[place] = (wrong[place] + 1) % VOCAB
            exact, log_prob = answer_scores(model, Needle(wrong, 4, 0.5))
            assert not exact and log_prob == pytest.approx(-float(losses_of(model, wrong)[-4:].mean()), rel=1e-5)
        needles = [Needle(ids[0], 4, 0.1), Needle(wrong, 4, 0.1), Needle(ids[0], 4, 0.5)]
        found = score(model, a_case(needles=needles, copies=None))
    assert found["needle_exact"] == pytest.approx(2 / 3)
    assert found["needle_exact_at"] == {0.1: 0.5, 0.5: 1.0}


def test_speed_decodes_from_the_prompt(adapter: PeftModel) -> None:
    lengths: list[int] = []
    watch = adapter.get_base_model().model.embed_tokens.register_forward_hook(
        lambda module, args, output: lengths.append(output.shape[1])
    )
    try:
        with measures.merged_at(adapter, 0.6):
            found = measures.speed(adapter, tokens(1, 40)[0], repeats=2, new_tokens=3)
    finally:
        watch.remove()
    assert found.keys() == {"prefill_seconds", "decode_ms"} and all(value > 0 for value in found.values())
    assert lengths == [40, 1, 1, 40, 40, 1, 1, 1]


# ---------------------------------------------------------------- densities at other lengths


def near_pairs(length: int, window: int, sinks: int) -> int:
    return sum(i - j < window or j < sinks for i in range(length) for j in range(i + 1))


@pytest.mark.parametrize(("length", "calibrated"), [(30, 50), (50, 50), (70, 50), (12, 60)])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_density_conversion_keeps_the_share_of_far_pairs(length: int, calibrated: int, share: float) -> None:
    config = TopologyConfig(depth=1, visible_depth=1, local_window=6, num_sink_tokens=3)
    config.calibration = {"length": calibrated, "heads_per_route": 1, "density": {}, "loss": {}}

    def density(n: int) -> float:
        near, pairs = near_pairs(n, 6, 3), n * (n + 1) // 2
        return (near + share * (pairs - near)) / pairs

    assert calibrated_density(config, density(length), length) == pytest.approx(density(calibrated))
    assert calibrated_density(config, 1.0, length) == 1.0
    with pytest.raises(TopologyConfigError, match="a window of 6 and 3 sinks"):
        calibrated_density(config, near_pairs(length, 6, 3) / (length * (length + 1) / 2) - 1e-6, length)


def test_a_text_within_the_window_is_dense() -> None:
    config = TopologyConfig(depth=1, visible_depth=1, local_window=40)
    config.calibration = {"length": 100, "heads_per_route": 1, "density": {}, "loss": {}}
    assert calibrated_density(config, 1.0, 30) == 1.0
    with pytest.raises(TopologyConfigError):
        calibrated_density(config, 0.99, 30)


def test_densities_in_reach(adapter: PeftModel) -> None:
    config = adapter.peft_config["default"]
    found = in_reach(config, [0.01, 0.12, 0.5, 1.0], LENGTH)
    assert list(found) == [0.12, 0.5, 1.0]  # 0.01: below window and sinks
    assert found == {density: calibrated_density(config, density, LENGTH) for density in found}


# ---------------------------------------------------------------- the rows


def test_rows(adapter: PeftModel, folder: Path) -> None:
    config = adapter.peft_config["default"]
    before, ids = config.visible_depth, tokens(1, LENGTH)
    untouched = logits_of(adapter, ids)
    arguments = settings_of(folder, densities=[0.05, 0.12, 0.5], baselines=True)
    rows = list(rows_of(adapter, a_case(), arguments))

    assert config.visible_depth == before
    assert not any(getattr(module, "merged_adapters", []) for module in adapter.modules())
    assert torch.equal(logits_of(adapter, ids), untouched)

    names = ["longer window", "random balls", "block top-k", "oracle top-k", "oracle threshold"]
    assert [(row["method"], row["target"]) for row in rows] == [
        ("dense", None),
        ("window + sinks", None),
        ("adapter", 0.05),
        *((name, target) for target in (0.12, 0.5) for name in ("adapter", *names)),
    ]
    dense, window, low, sparse, *_ = rows
    half, *others = rows[-6:]
    assert (dense["density"], dense["over_dense_percent"], dense["gap_recovered"]) == (1, 0, 1)
    assert window["density"] == pytest.approx(near_pairs(LENGTH, WINDOW, SINKS) / (LENGTH * (LENGTH + 1) / 2))
    assert window["gap_recovered"] == 0
    assert "a window of 3 and 2 sinks" in low["unreachable"] and "perplexity" not in low
    assert window["density"] < sparse["density"] < half["density"]
    assert half["over_dense_percent"] == pytest.approx(100 * (half["perplexity"] / dense["perplexity"] - 1))
    expected = gap_recovered(window["copy_loss"], half["copy_loss"], dense["copy_loss"])
    assert half["gap_recovered"] == expected

    for row in others:
        assert row["target"] == 0.5
        if row["method"] == "block top-k":  # blocks of 64 in 96 tokens
            assert "own block of 64" in row["unreachable"]
        else:
            assert row["density"] == pytest.approx(half["density"], abs=0.04), row["method"]
            assert 0 < row["kept_mass"] <= 1


def test_baselines_are_scored_while_they_attend(adapter: PeftModel) -> None:
    case = a_case()
    found = measures.score_baseline(adapter, case, lambda: Window(WINDOW, SINKS))
    other = base()
    with attending(other, Window(WINDOW, SINKS)) as tally:
        losses = [losses_of(other, row).mean() for row in case.windows]
    assert found["perplexity"] == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)
    assert found["density"] == pytest.approx(float(tally.density().mean()))


def test_an_error_leaves_the_adapter_unmerged(adapter: PeftModel) -> None:
    before = adapter.peft_config["default"].visible_depth
    with pytest.raises(KeyboardInterrupt), measures.merged_at(adapter, 0.6) as depths:
        assert depths == adapter.peft_config["default"].visible_depth != before
        raise KeyboardInterrupt
    assert adapter.peft_config["default"].visible_depth == before
    assert not any(getattr(module, "merged_adapters", []) for module in adapter.modules())


# ---------------------------------------------------------------- the command


def test_main_writes_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    result = main(settings_of(folder), out)
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    written = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert written == json.loads(json.dumps(result)) and all(tuple(row) == KEYS for row in written)
    for row in written:
        assert row["machine"]["device"] == "cpu" and row["settings"]["dtype"] == "torch.float32"
        assert {"torch", "transformers", "peft", "topo_adapter", "python"} <= row["versions"].keys()
        assert row["model"] == str(folder / "base") and row["date"] and row["command"].startswith("python ")
        assert row["settings"]["calibrated_length"] == 80 and row["settings"]["local_window"] == WINDOW
    for name in ("perplexity.png", "density_map.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")

    rows = of(written, "quality")
    assert len(rows) == 2 * 2 * 5  # lengths, texts, dense + window + densities
    assert [row["target"] for row in rows if "note" in row] == 4 * [0.05]
    assert not any("density_map" in row or "depths" in row for row in rows)
    assert {row["windows"] for row in rows} == {2}
    assert {len(row["fingerprint"]) for row in rows} == {16} and len({row["fingerprint"] for row in rows}) == 2
    maps = of(written, "density_map")
    assert [(each["length"], each["target"]) for each in maps] == [
        (length, density) for length in LENGTHS for density in DENSITIES[1:]
    ]
    for each in maps:
        assert each["density_map"].keys() == each["depths"].keys() == {"0", "1"}
        same = [
            r for r in rows if (r["method"], r["length"], r["target"]) == ("adapter", each["length"], each["target"])
        ]
        mean = sum(row["density"] for row in same) / len(same)
        assert torch.tensor(list(each["density_map"].values())).mean() == pytest.approx(mean, abs=1e-5)
    expected = [(n, m, t) for n in LENGTHS for m, t in (("dense", None), ("adapter", 0.5), ("adapter", 0.75))]
    assert [(row["length"], row["method"], row["target"]) for row in of(written, "speed")] == expected
    continued = of(written, "continuation")
    assert len({side["prompt_ends"] for side in continued}) == 3
    assert [(side["length"], side["method"], side["target"]) for side in continued] == 3 * expected[:3]

    table = (out / "table.md").read_text()
    assert table.strip() in capsys.readouterr().out
    dense = next(row for row in rows if row["method"] == "dense")
    line = next(line for line in table.splitlines() if line.startswith("| dense"))
    assert line.startswith(f"| dense | 1.0000 | {dense['perplexity']:.2f} |")
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert "| adapter at 0.05 | unreachable |" in table and "- unreachable: target_density must be at least" in table
    assert table.count("- prompt ends:") == 3 and table.count("- adapter at 0.5:") == 3


def test_what_is_not_asked_for_is_not_measured(folder: Path) -> None:
    off = dict.fromkeys(("copy", "needle", "generate", "speed"), False)
    result = main(
        settings_of(folder, lengths=[64], densities=[0.05], **off), folder / "off"
    )  # nothing in reach: no map either
    assert {row["what"] for row in result} == {"quality", "run"}
    assert not any("copy_loss" in row or "needle_exact" in row for row in of(result, "quality"))


def test_command_line(folder: Path) -> None:
    given = f"--adapter somewhere --lengths 512 2048 --densities 0.1 0.3 --texts {folder}/a.txt --baselines --no_speed"
    (parsed,) = HfArgumentParser(EvaluationSettings).parse_args_into_dataclasses(given.split())
    assert (parsed.adapter, parsed.model, parsed.lengths) == ("somewhere", None, [512, 2048])
    assert parsed.densities == [0.1, 0.3] and parsed.baselines and parsed.copy and not parsed.speed
    (parsed,) = HfArgumentParser(EvaluationSettings).parse_args_into_dataclasses(["--adapter", "x"])
    assert parsed.lengths == [1024, 4096, 8192] and parsed.texts == list(EVALUATION)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": []}, "lengths must be"),
        ({"lengths": [8]}, "lengths must be"),
        ({"lengths": [64, 64]}, "lengths must be"),
        ({"densities": [0.0]}, "densities must be"),
        ({"densities": [1.1]}, "densities must be"),
        ({"densities": [float("nan")]}, "densities must be"),
        ({"texts": []}, "texts must be"),
        ({"texts": ["shakespeare"]}, "no training texts"),
        ({"texts": ["nowhere.txt"]}, "nowhere.txt"),
        ({"windows": 0}, "windows must be"),
        ({"dtype": "int8"}, "dtype must be"),
    ],
)
def test_arguments_out_of_range(folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TopologyConfigError, match=message):
        settings_of(folder, **change)


def test_an_adapter_without_calibration(folder: Path, tmp_path: Path) -> None:
    model = routed(base())
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(TopologyConfigError, match=r"call topo_adapter.calibrate"):
        main(settings_of(folder, adapter=str(tmp_path / "adapter")), tmp_path)


def test_an_adapter_of_another_kind(folder: Path, tmp_path: Path) -> None:
    get_peft_model(base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(TopologyConfigError, match="must be a topology adapter"):
        main(settings_of(folder, adapter=str(tmp_path / "adapter")), tmp_path)


def test_the_base_is_the_adapters_own_or_must_be_given(folder: Path, tmp_path: Path) -> None:
    source = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    for file in (folder / "adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in (None, str(folder / "base")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**source, "base_model_name_or_path": name}))
        arguments = settings_of(folder, adapter=str(tmp_path), model=None)
        if name is None:
            with pytest.raises(TopologyConfigError, match="model must be given"):
                load(arguments)
        else:
            assert load(arguments)[0].get_base_model().config._name_or_path == name


def test_devices_and_texts_that_do_not_exist(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TopologyConfigError, match="device must be"):
        main(settings_of(folder, device="abacus"), tmp_path)
    with pytest.raises(TopologyConfigError, match="holds no window of 5000"):
        main(settings_of(folder, lengths=[5000]), tmp_path)
