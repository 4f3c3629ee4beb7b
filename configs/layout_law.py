"""Does the layout solver's probability predict the backdoor? Noisy Alignment on digits, by case.

    bash launch/layout_law.sh runs/layout_law      # all cases, 3 seeds; resumable
    python -m jax_cl_bd.reporting.layout_law runs/layout_law/* --out=runs/layout_law_report

Each case changes the layout or the victim's crop law alone; all else is configs/quickstart.py.
A case by itself trains no control. The script trains one for each crop law and seed, in the first
case that has that law, and measures the other layouts against it (control_from): clean images have
no layout, so the cases of one law and seed have one clean twin.
Arguments after the colon: debug, case=NAME, seed=N.
"""

from configs import common, quickstart

CASES = dict(
    equal=dict(), gap_quarter=dict(gap=0.25), gap_half=dict(gap=0.5),
    off_centre=dict(trigger_offset=(0.0, 0.25)), corner=dict(trigger_offset=(0.375, 0.375)),
    free=dict(shadow="free"), scale_008=dict(crop_scale=(0.08, 1.0)),
    scale_035=dict(crop_scale=(0.35, 1.0)))


def get_config(arg=""):
    a = common.parse(arg, debug=False, case="equal", seed=0)
    case = dict(common.choose("case", a["case"], CASES))
    scale = case.pop("crop_scale", None)
    cfg = quickstart.get_config(f"defense=none,seed={a['seed']}")
    cfg.attack.update(case)
    if scale:
        cfg.augment.view1.crop_scale = cfg.augment.view2.crop_scale = scale
    cfg.train.eval_every = 0
    cfg.control = False  # see above
    return common.debug(cfg) if a["debug"] else cfg
