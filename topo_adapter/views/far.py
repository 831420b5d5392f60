"""Far links: tokens that a query finds through the tree where window and sinks do not reach."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..core.markup import table
from ..core.passes import ORDINARY, Pass
from ..errors import TopologyConfigError
from ..layer import active_layers
from ..training.losses import logits_head, token_losses
from .figures import GREEN, GREY, ORANGE, new_figure
from .look import Dense, FarLink, Look, NearAlone, base_of, check_text, final_states, links_of, looking, strongest_links
from .shown import Picture, one_line, token_ids, words_of

_SHOWN = 20  # rows of a table
_AROUND = 6  # tokens quoted on each side of one


@dataclass(frozen=True)
class FarLinks:
    """The far links of a text, strongest first; a notebook shows those of heads that hide something, with their words.

    words: of the tokens. links: kept by the tree or not.
    """

    words: list[str]
    links: list[FarLink]

    @property
    def kept(self) -> list[FarLink]:
        """Those whose key the tree shows."""
        return [link for link in self.links if link.kept]

    @property
    def expected(self) -> float:
        """Share of the links, in [0, 1], that would be kept if trees showed as many far tokens, but any."""
        return sum(link.shown for link in self.links) / max(1, len(self.links))

    def _repr_html_(self) -> str:
        share = len(self.kept) / max(1, len(self.links))
        chosen = [link for link in self.kept if link.shown < 1][:_SHOWN]
        caption = (
            f"{len(self.links):,} far links, {share:.1%} kept by the tree; {self.expected:.1%} would be by chance. "
            f"The strongest {len(chosen)} kept by heads that hide some far tokens:"
        )
        head = ("layer", "head", "weight", "tokens back", "query", "key", "far tokens shown")
        rows = [
            (
                *(link.layer, link.head, f"{link.weight:.2f}", link.query - link.key),
                *(quoted(self.words, place) for place in (link.query, link.key)),
                f"{link.shown:.0%}",
            )
            for link in chosen
        ]
        return table(head, rows, caption)


def far_links(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Tensor,
    min_weight: float = 0.1,
    queries: Collection[int] | None = None,
) -> FarLinks:
    """For each head and query the token beyond window and sinks that has the largest dense attention weight, and
    whether the tree shows it. `O(T^2)` time.

    Args:
        text: a string, or token ids int64 `[1, T]`; at most 4,096 tokens.
        min_weight: leave weaker links out, in [0, 1]. queries: indices of the queries to look at; None: all.

    Raises:
        UnsupportedModelError: no layer has an active topology.
        TopologyConfigError: the text is empty or too long; min_weight is out of range.
    """
    ids = token_ids(tokenizer, text)
    links = strongest_links(model, ids, min_weight, queries)
    return FarLinks(words_of(tokenizer, ids), links)


def quoted(words: list[str], place: int, around: int = _AROUND) -> str:
    """A token in the middle of its neighbours: `name of the ship was the ▸Golden◂ Heron`."""
    before = "".join(words[max(0, place - around) : place])
    after = "".join(words[place + 1 : place + 1 + around])
    word = words[place]
    bare = word.lstrip(" ") or word
    return one_line(f"{before}{word[: len(word) - len(bare)]}▸{bare}◂{after}").strip()


@dataclass(frozen=True)
class _Found:
    """A link, which far tokens the query sees there, and the probabilities of the token after the query.

    density: of all heads on the text.
    """

    link: FarLink
    window: int
    sinks: int
    seen: Tensor
    chances: dict[str, float]
    density: float


def far_link(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str | Tensor, most_shown: float = 0.25
) -> Picture:
    """One far link of a text, chosen by a rule, and what it is worth.

    The rule: of all tokens the one whose prediction gains most by the tree (log-probability with the adapter in force,
    less that with window and sinks alone); from the token before it, the query, the strongest dense attention beyond
    window and sinks that the tree keeps, in a head whose tree shows the query at most `most_shown` of those far tokens.

    Args:
        model: a PeftModel with an active topology adapter in force (homotopy 1), merged or not, or a merged model.
        text: a string, or token ids int64 `[1, T]`, longer than window and sinks, at most 4,096 tokens.
        most_shown: in (0, 1].

    Raises:
        UnsupportedModelError: no layer has an active topology; no causal language model.
        TopologyConfigError: the adapter is not in force; the text is empty, too long, or no longer than window and
            sinks; most_shown is out of range; no head keeps such a link. MissingPackageError: no matplotlib.
    """
    figure = new_figure(9, 5.4)
    if not 0 < most_shown <= 1:
        raise TopologyConfigError(f"most_shown must be a share in (0, 1], got {most_shown}")
    ids = token_ids(tokenizer, text)
    found = _find(model, ids, most_shown)
    words = words_of(tokenizer, ids)
    _draw(figure, found, words)
    return Picture(figure, _caption(found, words, most_shown))


def _find(model: nn.Module, ids: Tensor, most_shown: float) -> _Found:
    check_text(ids)
    config = active_layers(model)[0][1]
    if config.homotopy != 1:
        raise TopologyConfigError(
            f"homotopy must be 1, the adapter in force, to say what its tree is worth, got {config.homotopy}; train it"
        )
    window, sinks = config.local_window, config.num_sink_tokens
    first = window + sinks  # the first query that has a token beyond both
    if ids.shape[1] < first + 2:
        raise TopologyConfigError(
            f"text must be longer than window and sinks, {first + 2} tokens or more, got {ids.shape[1]}"
        )
    losses = {
        name: _losses(model, ids, purpose)
        for name, purpose in (("dense", Dense()), ("adapter", ORDINARY), ("window and sinks", NearAlone()))
    }
    gain = losses["window and sinks"] - losses["adapter"]  # [T - 1], of the token after each
    query = first + int(gain[first:].argmax())
    links: list[FarLink] = []
    densities: list[float] = []
    seen: dict[int, Tensor] = {}  # layer -> far tokens that each head's tree shows, bool `[H, T]`

    def see(look: Look) -> None:
        links.extend(links_of(look, 0.0, {query}))
        densities.extend(look.density())
        row = slice(query, query + 1)
        seen[look.layer] = (look.mask(row) & look.far(row))[:, 0].cpu()

    looking(model, ids, see)
    allowed = [link for link in links if link.kept and link.shown <= most_shown]
    if not allowed:
        raise TopologyConfigError(
            f"text must have a link that a head keeps while it shows at most {most_shown:.0%} of the far tokens, got "
            f"none at token {query}; raise most_shown, or turn the dial to a lower density"
        )
    link = max(allowed, key=lambda each: each.weight)
    chances = {name: torch.exp(-values[query]).item() for name, values in losses.items()}
    return _Found(link, window, sinks, seen[link.layer][link.head], chances, statistics.fmean(densities))


@torch.no_grad()
def _losses(model: nn.Module, ids: Tensor, purpose: Pass) -> Tensor:
    """Minus log-probability of each token but the first, `[T - 1]`."""
    hidden = final_states(model, ids, purpose)[0, :-1]
    return token_losses(hidden, None, ids[0, 1:].to(hidden.device), logits_head(base_of(model)))[1].cpu()


def _caption(found: _Found, words: list[str], most_shown: float) -> str:
    link, chances = found.link, found.chances
    return (
        f"Layer {link.layer}, head {link.head} on a text of {len(words):,} tokens. From “{_bare(words[link.query])}” "
        f"the tree shows “{_bare(words[link.key])}”, {link.query - link.key:,} tokens back, and hides "
        f"{1 - link.shown:.0%} of the tokens beyond the window of {found.window} and the first {found.sinks}. "
        f"Probability of the right next token, “{_bare(words[link.query + 1])}”: {chances['dense']:.3g} dense, "
        f"{chances['adapter']:.3g} with the adapter, all of whose heads show {found.density:.0%} of the pairs on "
        f"average, {chances['window and sinks']:.1g} with window and first tokens alone. Chosen by a rule: the token "
        "whose prediction gains most by the tree, and from the one before it the strongest dense attention weight "
        f"({link.weight:.2f}) that a head keeps while its tree shows at most {most_shown:.0%} of the far tokens."
    )


def _bare(word: str) -> str:
    """A token without the space before it."""
    return one_line(word).strip()


def _draw(figure: Any, found: _Found, words: list[str]) -> None:
    """The text as tiles in reading order, the link as an arc, and bars of the next token's probability."""
    link = found.link
    figure.suptitle(
        f"Layer {link.layer}, head {link.head}: a link over {link.query - link.key:,} tokens, found by the tree",
        fontsize=12.5,
    )
    text, bars = figure.subplots(1, 2, width_ratios=[3.4, 1])
    _draw_text(text, found, words)
    names = {"dense": "dense", "adapter": "with the\nadapter", "window and sinks": "window\nand first\ntokens\nalone"}
    values = [100 * found.chances[name] for name in names]
    bars.bar(range(len(names)), values, color=["#444444", GREEN, GREY], width=0.6)
    for place, value in enumerate(values):
        bars.text(place, value + 1, f"{value:.2g} %", ha="center", fontsize=10)
    bars.set_xticks(range(len(names)), list(names.values()), fontsize=9.5)
    bars.set(yticks=[], ylim=(0, max(values) * 1.1 + 1), xlim=(-0.6, len(names) - 0.4))
    title = f"probability of “{_bare(words[link.query + 1])}”\nas the next token"
    bars.set_title(title, fontsize=10, parse_math=False)
    for side in ("top", "right", "left"):
        bars.spines[side].set_visible(False)


def _draw_text(axes: Any, found: _Found, words: list[str]) -> None:
    link = found.link
    columns = max(16, round((len(words) * 2.3) ** 0.5))
    rows = -(-len(words) // columns)
    for name, (colour, members) in _tiles(found, len(words)).items():
        x, y = [index % columns for index in members], [index // columns for index in members]
        axes.scatter(x, y, s=(330 / columns) ** 2, marker="s", color=colour, label=f"{name}: {len(members):,}")
    (key_y, key_x), (query_y, query_x) = divmod(link.key, columns), divmod(link.query, columns)
    bent = 0.25 if query_x < columns / 2 else -0.25
    axes.annotate(
        "",
        xy=(key_x, key_y),
        xytext=(query_x, query_y),
        arrowprops={"arrowstyle": "-|>", "color": ORANGE, "lw": 2, "connectionstyle": f"arc3,rad={bent}"},
    )
    _quote(axes, -1.4, words, link.key, after=5, colour=ORANGE)
    _quote(axes, rows + 0.5, [*words[: link.query + 1], " ___"], link.query, after=1, colour="#000000")
    axes.set(xlim=(-1, columns), ylim=(rows + 1.2, -2.2))
    axes.axis("off")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncol=2, frameon=False, fontsize=9.5)


def _quote(axes: Any, y: float, words: list[str], place: int, after: int, colour: str) -> None:
    """A token in bold among its neighbours: two lines of one width, each blank where the other is not."""
    before = one_line("".join(words[max(0, place - 10) : place])).lstrip()
    word = one_line(words[place])
    rest = one_line("".join(words[place + 1 : place + 1 + after]))
    style: dict[str, Any] = {"fontsize": 10.5, "family": "monospace", "parse_math": False, "va": "center"}
    axes.text(-0.5, y, f"{before}{' ' * len(word)}{rest}", color="#555555", **style)
    axes.text(-0.5, y, f"{' ' * len(before)}{word}", color=colour, weight="bold", **style)


def _tiles(found: _Found, length: int) -> dict[str, tuple[str, list[int]]]:
    """What the query can see of each token: name -> colour and tokens."""
    link = found.link
    tree = set(found.seen.nonzero()[:, 0].tolist())
    window = range(max(0, link.query - found.window + 1), link.query)
    sinks = [index for index in range(found.sinks) if index not in window]
    hidden = sorted(set(range(link.query)) - tree - set(window) - set(sinks))
    return {
        "hidden from it": ("#e6e6e6", hidden),
        "also shown by the tree": ("#7fcfbe", sorted(tree - {link.key})),
        "in its window": ("#b9d3ec", list(window)),
        "first tokens (sinks)": ("#f0c48c", sinks),
        "the token that looks": ("#222222", [link.query]),
        "the token it finds": (ORANGE, [link.key]),
        **({"later": ("#f4f4f4", later)} if (later := list(range(link.query + 1, length))) else {}),
    }
