"""Seeing what an adapter does: `from topo_adapter import viz`; pictures need `pip install 'topo-adapter[viz]'`.

| | |
|---|---|
| `density_map(model, input_ids)` | density of each layer and head |
| `dial_curve(config_or_model)` | estimated loss over density |
| `balls_html(model, tokenizer, text)` | a page: point at a token to see what it sees, in which head |
| `tree(model, tokenizer, text, layer, head)` | one head's tree with the tokens in it |
| `head_mask(model, input_ids, layer, head)` | one head's mask over its attention weights |
| `far_links(model, tokenizer, text)` | strong attention beyond the window, and whether the tree keeps it |
| `far_link(model, tokenizer, text)` | a picture of the one that a prediction gains most by |
| `same_token_sharing(model, input_ids)` | whether heads sort tokens by what they are |

A `Picture` or `Page` shows itself in a notebook and is saved by `save(path)`; a picture has a `caption`, and its
matplotlib `figure` for whoever wants to change it.
"""

from .views.far import FarLinks, far_link, far_links
from .views.figures import density_map, dial_curve, head_mask, tree
from .views.look import FarLink, Sharing, same_token_sharing
from .views.page import balls_html
from .views.shown import Page, Picture

__all__ = [
    "FarLink",
    "FarLinks",
    "Page",
    "Picture",
    "Sharing",
    "balls_html",
    "density_map",
    "dial_curve",
    "far_link",
    "far_links",
    "head_mask",
    "same_token_sharing",
    "tree",
]
