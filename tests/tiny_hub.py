"""Tiny models of the kinds that Hugging Face folders hold."""

import numpy as np

from jax_cl_bd.models import hub_clip


def made(kind, *, side=8, patch=4, vocab=30, context=5, end=29):
    """A description of a tiny CLIP or SigLIP and random variables, without transformers."""
    tower = {"layers": 1, "heads": 2, "mlp_ratio": 2, "dtype": "float32"}
    siglip = kind == "siglip"
    act, eps = ("gelu_tanh", 1e-6) if siglip else ("quick_gelu", 1e-5)
    described = {
        "model": {"name": "vit", "width": 16, "patch": patch, "pool": "map" if siglip else "cls",
                  "act": act, "eps": eps, "pre_norm": not siglip, "patch_bias": siglip,
                  "bn_groups": 1} | tower,
        "text": {"name": "transformer", "width": 12, "vocab": vocab, "context": context, "end": end,
                 "causal": not siglip, "pool": "last" if siglip else "end", "act": act,
                 "eps": eps, "tokenizer": ""} | tower,
        "objective": {"name": kind, "dim": 16 if siglip else 10, "image_projection": not siglip,
                      "scale_init": np.log(10) if siglip else np.log(1 / 0.07)}
        | ({"text_bias": True, "bias_init": -10.0} if siglip else {}),
        "data": {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "image_size": side}}
    rng = np.random.default_rng(2)
    flat = {place: rng.normal(size=shape).astype(np.float32)
            for place, shape in hub_clip._shapes(described).items()}
    params = {}
    for place, array in flat.items():
        at = params
        for name in place[:-1]:
            at = at.setdefault(name, {})
        at[place[-1]] = array
    return described, {"params": params, "batch_stats": {part: {} for part in params}}
