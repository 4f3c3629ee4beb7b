"""The pair probability that the crop law predicts for the poisons of a plan."""

import numpy as np

from jax_cl_bd.layouts.pair_probability import Layout, probabilities

_MOST = 32  # different geometries computed; beyond, evenly spaced ones stand for all
_POINTS = 256


def pair_probability(cfg, plan) -> tuple[float, float, float]:
    """Mean, smallest and largest probability of the pair over the composites of a plan.

    Both orders of the two views count; the views may crop by different laws.
    """
    rows = np.flatnonzero(plan.layout >= 0)
    geometry = np.concatenate([plan.canvas[rows], plan.reference_box[rows], plan.shadow_box[rows],
                               plan.trigger_box[rows]], axis=1)
    shapes, counts = np.unique(geometry, axis=0, return_counts=True)
    if len(shapes) > _MOST:
        some = np.linspace(0, len(shapes) - 1, _MOST).astype(int)
        shapes, counts = shapes[some], counts[some]
    layout = Layout(shapes[:, :2], shapes[:, 2:6], shapes[:, 6:10], shapes[:, 10:14])
    laws = [tuple(map(tuple, (view.crop_scale, view.crop_ratio)))
            for view in (cfg.augment.view1, cfg.augment.view2)]
    found = {law: probabilities(layout, scale=law[0], ratio=law[1], points=_POINTS)
             for law in set(laws)}
    one, two = (found[law] for law in laws)
    pair = one.reference * two.trigger + one.trigger * two.reference
    return float(np.average(pair, weights=counts)), float(pair.min()), float(pair.max())
