"""`topo_adapter.viz`: what pages and pictures say is what the definitions say; the page in a real browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from peft import PeftModel
from peft_helpers import HEADS, VOCAB, logits_of, routed, tiny, tokens
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from topo_adapter import (
    MissingPackageError,
    TopologyConfig,
    TopologyConfigError,
    UnsupportedModelError,
    measure_density,
    record_routes,
    viz,
)
from topo_adapter.core.layout import contiguous_layout
from topo_adapter.core.passes import during
from topo_adapter.measuring.report import DensityReport
from topo_adapter.views.far import quoted
from topo_adapter.views.look import Dense, NearAlone, strongest_links

LENGTH, WINDOW, SINKS, LEVELS = 40, 3, 2, 4
DEPTHS: dict[int, int | list[int]] = {0: [0, 1, 2, LEVELS + 1], 1: 2, 2: 3, 3: [1, 1, 4, 4]}
#: Tokens that would be markup, code or a new line if a page took them for it.
NASTY = {
    3: "</script><script>document.title='owned'</script>",
    4: "<img src=x onerror=\"document.title='owned'\">",
    5: "&lt;",
    6: "\n",
    7: "\u2028<!--",
    8: "$x_1$",
    9: " the",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each of the tiny models' tokens."""
    vocabulary = {NASTY.get(token, f" w{token}"): token for token in range(VOCAB)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=" w0"))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    drawn = tokens(1, LENGTH)
    drawn[0, 10 : 10 + len(NASTY)] = torch.tensor(list(NASTY))
    return drawn


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return routed(tiny(), visible_depth=DEPTHS)


def masks(model: Any, ids: Tensor) -> dict[int, Tensor]:
    """The reference: layer -> bool `[H, T, T]`."""
    layout = contiguous_layout(1, ids.shape[1])
    return {
        layer: record.visibility(layout, 2, WINDOW, SINKS).mask()[0]
        for layer, record in record_routes(model, ids).items()
    }


def data_of(page: viz.Page) -> dict[str, Any]:
    """The JSON that a page carries."""
    found = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page.html, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def seen_by_data(data: dict[str, Any], layer: int, head: int) -> Tensor:
    """Section 2 of docs/method.md, from what the page carries, bool `[T, T]`."""
    (of,) = (each["heads"][head] for each in data["layers"] if each["layer"] == layer)
    key, place = torch.tensor(of["key"]), torch.arange(len(data["tokens"]))
    tree = torch.zeros(len(key), len(key), dtype=torch.bool)
    for visit in torch.tensor(of["query"]):
        tree |= visit[:, None] == key
    gap = place[:, None] - place
    return (gap >= 0) & (tree | (gap < data["window"]) | (place < data["sinks"]))


# ---------------------------------------------------------------- the page


def test_the_page_carries_the_reference_mask(model: PeftModel, tokenizer: Any, ids: Tensor) -> None:
    page, expected = viz.balls_html(model, tokenizer, ids, layers=range(4)), masks(model, ids)
    data = data_of(page)
    assert [each["layer"] for each in data["layers"]] == [0, 1, 2, 3]
    densities = measure_density(model, ids)
    for layer, mask in expected.items():
        for head in range(HEADS):
            assert torch.equal(seen_by_data(data, layer, head), mask[head]), (layer, head)
            of = data["layers"][layer]["heads"][head]
            assert of["density"] == pytest.approx(float(densities[layer][head]), abs=1e-4)
    data["layers"][2]["heads"][0]["key"][5] += 1  # a control: another ball is another mask
    assert not torch.equal(seen_by_data(data, 2, 0), expected[2][0])


def test_the_page_shows_the_balls_of_all_visits(tokenizer: Any, ids: Tensor) -> None:
    model = routed(tiny(), visible_depth=DEPTHS, visits=3)
    data, expected = data_of(viz.balls_html(model, tokenizer, ids, layers=range(4))), masks(model, ids)
    for layer, mask in expected.items():
        for head in range(HEADS):
            assert len(data["layers"][layer]["heads"][head]["query"]) == 3
            assert torch.equal(seen_by_data(data, layer, head), mask[head]), (layer, head)
    shown = [link for link in strongest_links(model, ids, 0.0) if link.kept]
    assert shown and all(expected[link.layer][link.head, link.query, link.key] for link in shown)
    for each in data["layers"][1]["heads"]:
        each["query"] = each["query"][:1]  # a control: one visit is another mask
    assert not torch.equal(seen_by_data(data, 1, 2), expected[1][2])


def test_the_page_of_a_text_shows_a_typical_layer(model: PeftModel, tokenizer: Any) -> None:
    data = data_of(viz.balls_html(model, tokenizer, " the"))
    assert data["tokens"] == [" the"] and len(data["layers"]) == 1
    ids = tokens(1, LENGTH, seed=1)
    means = {layer: float(each.mean()) for layer, each in measure_density(model, ids).items()}
    mean = sum(means.values()) / len(means)
    (chosen,) = data_of(viz.balls_html(model, tokenizer, ids))["layers"]
    assert chosen["layer"] == min(means, key=lambda layer: abs(means[layer] - mean))


def test_a_merged_model_has_the_same_page(tokenizer: Any, ids: Tensor) -> None:
    model = routed(tiny(), visible_depth=DEPTHS)
    before = viz.balls_html(model, tokenizer, ids, layers=[0, 3]).html
    assert viz.balls_html(model.merge_and_unload(), tokenizer, ids, layers=[0, 3]).html == before


def test_no_token_is_markup(model: PeftModel, tokenizer: Any, ids: Tensor) -> None:
    page = viz.balls_html(model, tokenizer, ids)
    for word in (NASTY[3], NASTY[4], "<!--", "owned'</script>"):
        assert word not in page.html
    assert data_of(page)["tokens"] == [NASTY.get(int(token), f" w{token}") for token in ids[0]]
    assert page.html.count("<script") == page.html.count("</script>") == 2
    without_text = re.sub(r'(?s)(<script id="data").*?</script>', "", page.html)
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|https?:|fetch|XMLHttp", without_text), "it loads nothing"
    assert "default-src 'none'" in without_text and "innerHTML" not in without_text


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(model: PeftModel, tokenizer: Any, ids: Tensor) -> None:
    page = viz.balls_html(model, tokenizer, ids)
    frame = page._repr_html_()
    found = re.fullmatch(r'<iframe sandbox="allow-scripts" srcdoc="([^"<>]*)" style="[^"<>]*"></iframe>', frame)
    assert found is not None and html.unescape(found[1]) == page.html


# ---------------------------------------------------------------- the page in a browser


def browser() -> str:
    """Chromium; CI installs it (the Makefile), so there it is no reason to skip."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("CI must have a browser, got none of chromium, chromium-browser, google-chrome")
    if found is None:
        pytest.skip("needs a browser: apt-get install chromium")
    return found


def browse(page: Path, address: str, folder: Path, *arguments: str) -> str:
    """What headless Chromium prints of a page, after its scripts have run."""
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", *arguments]
    done = subprocess.run([*command, f"{page.as_uri()}{address}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Spans(HTMLParser):
    """The classes of each token's span, the page's status line and its title."""

    def __init__(self, dump: str) -> None:
        super().__init__()
        self.classes: dict[int, set[str]] = {}
        self.text: dict[str, str] = {"status": "", "title": ""}
        self._into = ""
        self.feed(dump)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if "data-token" in named:
            self.classes[int(named["data-token"] or "")] = set((named.get("class") or "").split())
        self._into = "status" if named.get("id") == "status" else tag if tag == "title" else ""

    def handle_endtag(self, tag: str) -> None:
        self._into = ""

    def handle_data(self, data: str) -> None:
        if self._into:
            self.text[self._into] += data


def expected_classes(data: dict[str, Any], mask: Tensor, layer: int, head: int, query: int) -> dict[int, set[str]]:
    """By definition, from the reference's mask and the balls."""
    of = data["layers"][layer]["heads"][head]
    found = {}
    for key in range(len(data["tokens"])):
        near = query - key < WINDOW or key < SINKS
        tree = any(visit[query] == of["key"][key] for visit in of["query"])
        assert key > query or bool(mask[query, key]) == (near or tree)
        names = {"later"} if key > query else {"hidden"} if not mask[query, key] else set()
        if key <= query:
            names |= {"tree"} if tree else set()
            names |= {"window"} if query - key < WINDOW else {"sink"} if key < SINKS else set()
        found[key] = names | ({"looking"} if key == query else set())
    return found


def test_pointing_at_a_token_shows_what_it_sees(model: PeftModel, tokenizer: Any, ids: Tensor, tmp_path: Path) -> None:
    """Kept by the address, with another pointed at; and pointed at by the mouse, on a page of the same model."""
    page, expected = viz.balls_html(model, tokenizer, ids, layers=range(4)), masks(model, ids)
    file = tmp_path / "page.html"
    page.save(file)
    data, layer, head, query = data_of(page), 2, 1, 30
    found = Spans(browse(file, f"#layer={layer}&head={head}&token={query}&over=12", tmp_path, "--dump-dom"))
    wanted = expected_classes(data, expected[layer][head], layer, head, query)
    assert {"tree", "window", "sink", "hidden", "later", "looking"} <= set().union(*wanted.values()), "a telling case"
    wanted[12].add("over")
    assert found.classes == wanted
    assert found.text["title"] == "Balls along a text", "no token ran as a script"
    seen = int(expected[layer][head][query].sum())
    assert f"Token {query} " in found.text["status"] and f"sees {seen} of {query + 1} tokens" in found.text["status"]
    heads = [
        str(number)
        for number, of in enumerate(data["layers"][layer]["heads"])
        if any(visit[query] == of["key"][12] for visit in of["query"])
    ]
    assert f"is in its ball in heads {', '.join(heads) or 'none'}." in found.text["status"]

    pointing = """<script>
    byId("layer").value = 3; byId("layer").dispatchEvent(new Event("change"));
    byId("head").value = 2; byId("head").dispatchEvent(new Event("change"));
    spans[25].dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
    </script></body>"""
    file.write_text(page.html.replace("</body>", pointing), encoding="utf-8")
    found = Spans(browse(file, "", tmp_path, "--dump-dom"))
    assert found.classes == expected_classes(data, expected[3][2], 3, 2, 25)


def test_a_screenshot_shows_it(model: PeftModel, tokenizer: Any, ids: Tensor, tmp_path: Path) -> None:
    page, shots = tmp_path / "page.html", {}
    viz.balls_html(model, tokenizer, ids, layers=range(4)).save(page)
    for name, address in (("pointing", "#layer=2&head=1&token=30"), ("idle", "#layer=2&head=1")):
        shot = tmp_path / f"{name}.png"
        browse(page, address, tmp_path, f"--screenshot={shot}", "--window-size=900,500", "--hide-scrollbars")
        shots[name] = (matplotlib.image.imread(shot)[..., :3] * 255).round().astype(int).reshape(-1, 3)
        assert len(shots[name]) == 900 * 500
    legend = {"tree": (0x8F, 0xD3, 0xC4), "window": (0xCF, 0xE0, 0xF3), "sink": (0xF3, 0xCF, 0x9B)}
    area = {
        name: {key: int((shot == colour).all(1).sum()) for key, colour in legend.items()}
        for name, shot in shots.items()
    }
    for key in legend:  # the legend shows them idle too; pointing shows them in the text beside
        assert area["pointing"][key] > area["idle"][key] + 200, (key, area)


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_links_are_those_of_the_models_own_attention_weights(family: str, ids: Tensor) -> None:
    model = routed(tiny(family, attn_implementation="eager") if family == "llama" else tiny(family), homotopy=0.0)
    with model.disable_adapter(), torch.no_grad():
        attentions = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    place = torch.arange(LENGTH)
    gap = place[:, None] - place
    far = (gap >= WINDOW) & (place >= SINKS)
    expected = []
    for layer, mask in masks(model, ids).items():
        for head in range(HEADS):
            for query in range(WINDOW + SINKS, LENGTH):
                weights = attentions[layer][0, head, query].double().masked_fill(~far[query], -1)
                key, seen = int(weights.argmax()), mask[head, query] & far[query]
                share = float(seen.sum() / far[query].sum())
                if weights[key] >= 0.15:
                    expected.append((layer, head, query, key, float(weights[key]), bool(seen[key]), share))
    found = strongest_links(model, ids, min_weight=0.15)
    assert len(found) > 20 and {link.kept for link in found} == {True, False}
    assert [link.weight for link in found] == sorted((link.weight for link in found), reverse=True)
    ordered = sorted(found, key=lambda link: (link.layer, link.head, link.query))
    assert len(ordered) == len(expected)
    for link, (layer, head, query, key, weight, kept, share) in zip(ordered, expected, strict=True):
        assert (link.layer, link.head, link.query, link.key, link.kept) == (layer, head, query, key, kept)
        assert link.weight == pytest.approx(weight, abs=1e-5) and link.shown == pytest.approx(share)
    some = strongest_links(model, ids, min_weight=0.15, queries={20, 30})
    assert some == [link for link in found if link.query in (20, 30)] != []


def test_links_show_their_words(model: PeftModel, tokenizer: Any, ids: Tensor) -> None:
    links = viz.far_links(model, tokenizer, ids)
    kept = sum(link.kept for link in links.links)
    assert 0 < len(links.kept) == kept < len(links.links)
    shown = links._repr_html_()
    assert f"{kept / len(links.links):.1%} kept" in shown and f"{links.expected:.1%} would be by chance" in shown
    first = next(link for link in links.kept if link.shown < 1)
    for place in (first.query, first.key):
        around = html.escape(quoted(links.words, place))
        assert f"▸{links.words[place].strip()}◂" in html.unescape(around) and f"<td>{around}</td>" in shown
    assert "<img" not in shown and "</script>" not in shown and shown.count("<tr>") == 21
    assert quoted([" a", " b", "\n", " c"], 1, around=2) == "a ▸b◂⏎ c"


def test_dense_and_near_alone_are_what_they_say(ids: Tensor) -> None:
    model = routed(tiny(), visible_depth=2)
    with during(model, Dense()):
        dense = logits_of(model, ids)
    with model.disable_adapter():
        assert torch.equal(dense, logits_of(model, ids))
    with during(model, NearAlone()):
        near = logits_of(model, ids)
    below = logits_of(routed(tiny(), visible_depth=LEVELS + 1), ids)
    assert (near - below).abs().max() < 1e-4 < (dense - below).abs().max()


def test_sharing_counts_pairs(model: PeftModel) -> None:
    ids = tokens(1, LENGTH) % 7 + 1
    place = torch.arange(LENGTH)
    far = (place[:, None] - place >= WINDOW) & (place >= SINKS)
    same = far & (ids[0][:, None] == ids[0])
    expected = masks(model, ids)
    found = viz.same_token_sharing(model, ids)
    assert [(each.layer, each.head) for each in found] == [(layer, head) for layer in range(4) for head in range(HEADS)]
    for each in found:
        mask = expected[each.layer][each.head]
        assert each.pairs == int(same.sum()) > 0
        assert each.same == pytest.approx(float((mask & same).sum() / same.sum()))
        assert each.any == pytest.approx(float((mask & far).sum() / far.sum()))
    assert found[0].lift == 1 and found[3].lift == 1 and found[3].any == 0, "dense, and without a tree"
    assert max(each.lift for each in found) > 1


# ---------------------------------------------------------------- pictures


def test_pictures_show_and_save_themselves(model: PeftModel, ids: Tensor, tmp_path: Path) -> None:
    picture = viz.density_map(model, ids)
    assert picture._repr_png_().startswith(b"\x89PNG") and picture.caption
    for name in ("map.png", "map.svg"):
        picture.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    (image,) = picture.figure.axes[0].images
    expected = torch.stack(list(measure_density(model, ids).values()))
    assert np.allclose(image.get_array(), expected.numpy())


def test_the_dial_curve_is_the_calibrations(model: PeftModel) -> None:
    config = calibrated()
    line, own = viz.dial_curve(config).figure.axes[0].lines
    densities, losses = line.get_data()
    assert densities[-1] == 1 and losses[-1] == 0 and list(densities) == sorted(densities)
    assert list(losses) == sorted(losses, reverse=True) and losses[0] > 0
    assert list(own.get_data()[0]) == [0.5, 0.5]
    with pytest.raises(TopologyConfigError, match="call calibrate"):
        viz.dial_curve(model)


def calibrated() -> TopologyConfig:
    values = {0: [[1.0, 0.6, 0.3, 0.2]] * 2, 1: [[1.0, 0.7, 0.4, 0.2]] * 2}
    loss = {0: [[0.0, 0.1, 0.2, 0.5]] * 2, 1: [[0.0, 0.01, 0.02, 0.03]] * 2}
    table: Any = {"length": 40, "heads_per_route": 1, "density": values, "loss": loss}
    return TopologyConfig(
        depth=2,
        local_window=WINDOW,
        num_sink_tokens=SINKS,
        calibration=table,
        target_density=0.5,
        base_model_name_or_path="<b>base</b>",
    )


def test_configs_and_reports_show_themselves() -> None:
    shown = calibrated()._repr_html_()
    assert "&lt;b&gt;base&lt;/b&gt;" in shown and "<b>" not in shown
    assert "2 children a vertex, depth 2: 4 leaves" in shown and "<td>0.5</td>" in shown and "<td>0.1</td>" not in shown
    assert "not calibrated" in TopologyConfig()._repr_html_()
    report = DensityReport({3: {"density": 0.25, "calibrated": 0.2, "ratio": 1.25}})
    assert "<td>3</td><td>0.250</td><td>0.200</td><td>1.250</td>" in report._repr_html_()


def test_the_tree_holds_every_token(model: PeftModel, tokenizer: Any, ids: Tensor) -> None:
    picture = viz.tree(model, tokenizer, ids, layer=2, head=1, depth=2)
    labels = [text.get_text() for text in picture.figure.axes[0].texts]
    digits = record_routes(model, ids)[2].key_digits[0, 1, :, :2]
    leaves = {tuple(row) for row in digits.tolist()}
    counts = [int((digits == torch.tensor(leaf)).all(1).sum()) for leaf in sorted(leaves)]
    assert [int(label.split()[0]) for label in labels] == counts and sum(counts) == LENGTH
    picture._repr_png_()  # "$x_1$" and line breaks among the tokens


def test_the_mask_is_coloured_by_what_is_seen(model: PeftModel, ids: Tensor) -> None:
    picture = viz.head_mask(model, ids, layer=2, head=1)
    (image,) = picture.figure.axes[0].images
    colours, mask = torch.as_tensor(np.array(image.get_array())), masks(model, ids)[2][1]
    blue = colours[..., 2] > colours[..., 0]
    assert torch.equal(blue, mask) and mask.any()
    assert f"{float(mask.sum() / (LENGTH * (LENGTH + 1) / 2)):.1%} of the pairs" in picture.figure.axes[0].get_title()


def test_the_far_link_follows_its_rule(model: PeftModel, tokenizer: Any, ids: Tensor) -> None:
    picture = viz.far_link(model, tokenizer, ids, most_shown=0.6)
    chances = []
    for purpose in (None, NearAlone()):
        with during(model, purpose) if purpose else torch.no_grad():
            log = logits_of(model, ids)[0, :-1].log_softmax(-1)
        chances.append(log.gather(1, ids[0, 1:, None])[:, 0])
    first = WINDOW + SINKS
    query = first + int((chances[0] - chances[1])[first:].argmax())
    links = [link for link in strongest_links(model, ids, 0.0, {query}) if link.kept and link.shown <= 0.6]
    best = links[0]
    assert f"Layer {best.layer}, head {best.head} on a text of {LENGTH} tokens" in picture.caption
    assert f"{best.query - best.key} tokens back" in picture.caption and f"({best.weight:.2f})" in picture.caption
    assert f"{float(chances[0][query].exp()):.3g} with the adapter" in picture.caption
    density = float(torch.stack(list(measure_density(model, ids).values())).mean())
    assert f"all of whose heads show {density:.0%} of the pairs on average" in picture.caption
    seen = int(masks(model, ids)[best.layer][best.head, query].sum())
    found = dict(text.get_text().rsplit(": ", 1) for text in picture.figure.axes[0].get_legend().get_texts())
    names = (
        "also shown by the tree",
        "in its window",
        "first tokens (sinks)",
        "the token that looks",
        "the token it finds",
    )
    assert sum(int(found[name]) for name in names) == seen
    assert int(found["hidden from it"]) == query + 1 - seen
    picture._repr_png_()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda m, t: viz.balls_html(m, t, ""), "text must hold at least one token, got none"),
        (lambda m, t: viz.balls_html(m, t, tokens(2, 8)), "one text of 1 to 4,096 tokens, got 2 of 8"),
        (lambda m, t: viz.balls_html(m, t, tokens(1, 4097)), "got 1 of 4,097; cut it"),
        (lambda m, t: viz.balls_html(m, t, tokens(1, 8), layers=[7]), r"routed ones, \[0, 1, 2, 3\], got \[7\]"),
        (lambda m, t: viz.balls_html(m, t, tokens(1, 8).int()), r"int64 tensor \[1, T\] of token ids, got torch.int32"),
        (lambda m, t: viz.far_links(m, t, tokens(1, 8), min_weight=2.0), r"min_weight must be .* in \[0, 1\], got 2.0"),
        (lambda m, t: viz.far_link(m, t, tokens(1, 6)), "longer than window and sinks, 7 tokens or more, got 6"),
        (lambda m, t: viz.far_link(m, t, tokens(1, 20), most_shown=0), r"most_shown must be a share in \(0, 1\]"),
        (lambda m, t: viz.far_link(m, t, tokens(1, 40), most_shown=1e-9), "a link that a head keeps .* got none"),
        (lambda m, t: viz.head_mask(m, tokens(1, 2049), 0, 0), "1 to 2,048 tokens, got 1 of 2,049"),
        (lambda m, t: viz.head_mask(m, tokens(1, 8), 0, 4), r"head must be in 0..3, .* layer 0, got 4"),
        (lambda m, t: viz.tree(m, t, tokens(1, 8), 0, 0, depth=5), r"depth must be an integer in 1..4"),
        (lambda m, t: viz.same_token_sharing(m, torch.arange(1, 30)[None]), "comes again beyond the local window"),
    ],
)
def test_what_cannot_be_shown(model: PeftModel, tokenizer: Any, draw: Callable[..., Any], message: str) -> None:
    with pytest.raises(TopologyConfigError, match=message):
        draw(model, tokenizer)


def test_pages_and_trees_are_of_bounded_size(model: PeftModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topo_adapter.views.page.MAX_BALLS", 200)
    with pytest.raises(TopologyConfigError, match=r"at most 200 balls .* got 2 layers of 40 tokens, 640 balls"):
        viz.balls_html(model, tokenizer, tokens(1, 40), layers=[0, 1])
    monkeypatch.setattr("topo_adapter.views.figures.MAX_LEAVES_DRAWN", 8)
    with pytest.raises(TopologyConfigError, match=r"at most 8 balls to draw, got 2 \*\* 4"):
        viz.tree(model, tokenizer, tokens(1, 8), 0, 0, depth=4)
    assert "The first 2 of 4 levels" in viz.tree(model, tokenizer, tokens(1, 8), 0, 2).caption, "where its queries look"
    assert "The first 3 of 4 levels" in viz.tree(model, tokenizer, tokens(1, 8), 3, 3).caption, "as many as fit"


def test_a_fresh_adapters_tree_is_worth_nothing_yet(tokenizer: Any) -> None:
    with pytest.raises(TopologyConfigError, match=r"homotopy must be 1.*got 0.5"):
        viz.far_link(routed(tiny(), homotopy=0.5), tokenizer, tokens(1, 20))


def test_a_model_without_topology_is_refused(tokenizer: Any) -> None:
    for draw in (viz.balls_html, viz.far_links, viz.far_link):
        with pytest.raises(UnsupportedModelError, match="topology"):
            draw(tiny(), tokenizer, tokens(1, 20))


def test_pictures_need_matplotlib_and_pages_do_not(
    model: PeftModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'topo-adapter\[viz\]'"):
        viz.density_map(model, tokens(1, 8))
    assert viz.balls_html(model, tokenizer, tokens(1, 8)).html
