"""InverTune: the suspected target, its trigger by inversion, and tuning of the neurons it moves.

Sun et al., "InverTune: Removing Backdoors from Multimodal Contrastive Learning Models via Trigger
Inversion and Activation Tuning", arXiv 2506.12411; code Goodman-liyu/InverTune, read for
facts. Three steps:

1. Target (TargetLabel.py): validation images under a universal adversarial patch; the class whose
   share of the predictions rises most, absolutely or (defense.rise = "relative") as a share of what
   it was, is suspected.
2. Trigger (models/inversion.py): mask and pattern of the whole image, by Adam (_invert.py).
3. Tuning (ActivationTuning.py): on one clean batch and its triggered version, the impact of each
   stage, |a - a'|_2 / |a|_2 of the batch means in test mode; in the `layers` stages of most impact
   k-means with two clusters on |a - a'| of every unit, of which the cluster of the larger mean is
   critical; then objectives/invertune.py on the sweep, gradients clipped to length 1.

Where we differ:

- The published patch is given, made for a clean CLIP by another project's generator. Here it is
  made on the suspect itself, or on the model in the folder defense.surrogate; its objective (least
  mean cosine to the clean embeddings, Adam) is ours; size, place and start are the code's.
- Trained at every rate of a sweep, warmed up, on batches of all clean pairs, where the code has one
  batch of 64 at 2e-6 for 200 steps, cosine over 100. No weight decay: the code's 1e-4 would shrink
  weights by less than 1e-4 of themselves, and the text tower, which has no gradient, too.
- Stages: the last block of each residual stage, or every transformer block, by name.
- The inversion takes target images by their labels as the code does, repeated where they are fewer
  than a batch; a target without clean images takes those that the suspect scores highest.

The method names a target in every model: it does not say whether there is a backdoor; the rise and
`flip_rate` (validation images of other predictions that the inverted trigger sends to the target)
are there to judge by. With `truth` the verdict also has target_label_correct, and mask_iou, of the
boxes of mask and patch, where all poisons have the patch at one place.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from sklearn.cluster import KMeans

from jax_cl_bd.data import images, sources, templates
from jax_cl_bd.defenses import _invert, _pinpoint, _sweep, decree
from jax_cl_bd.defenses.outcome import Outcome, whose
from jax_cl_bd.errors import UserError, renamed, unknown
from jax_cl_bd.evals import zero_shot
from jax_cl_bd.models import activations, start, weights_file
from jax_cl_bd.models import encoder as encoders
from jax_cl_bd.objectives import invertune

NEEDS_LABELS = True  # of the validation images and the clean ones
RISES = ("absolute", "relative")
_FALLBACK = 16  # images that stand for a target of which there is no clean one
_SHOWN = 8  # images in the picture of the report


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` pairs are there to train on.

    Raises:
        UserError: those of _sweep.check, _invert.check and objectives/invertune.py, no stage to
            tune, an unknown rise, a surrogate that is no model, or fewer pairs than one batch.
    """
    _sweep.check(cfg)
    d = cfg.defense
    _invert.check(d.probe, d.invert)
    _invert.corner(d.probe, cfg.data.image_size)
    with renamed("objective.", "defense."):
        invertune.heads(_sweep.described(_described(cfg)).objective)
    if d.layers < 1:
        raise UserError(f"defense.layers={d.layers} must be at least 1")
    if d.rise not in RISES:
        raise unknown("defense.rise", d.rise, RISES)
    if d.surrogate:
        side = start.described(d.surrogate, "defense.surrogate")["data"]["image_size"]
        if side != cfg.data.image_size:
            raise UserError(f"defense.surrogate={d.surrogate!r} takes images of {side} px, the "
                            f"suspect of {cfg.data.image_size}")
    _sweep.check_batch(cfg, clean)


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Names the target of `victims[0]`, inverts its trigger and tunes it away; `truth` scores what
    was found, no more."""
    suspect, label = victims[0], whose(folder)
    invert_key, tune_key = jax.random.split(key)
    clean, labels = _shown(suspect, data.clean)
    validation, _ = _shown(suspect, data.validation)
    head = zero_shot.class_weights(suspect, data.validation.classes, templates.PROMPTS)
    trigger, found = _invert_once(cfg, suspect, clean, labels, validation, head, mesh, folder,
                                  invert_key, label)
    batch = np.random.default_rng([cfg.seed, 1]).permutation(len(clean))
    batch = clean[batch[:cfg.defense.invert.batch_size]]
    impacts, neurons = critical(suspect, batch, trigger, cfg.defense.layers, cfg.seed)
    found = {**found, "target_class": str(data.validation.classes[found["target_label"]]),
             "mask_share": float(trigger["mask"].mean()), "impact": impacts,
             "critical_share": {name: float(m.mean()) for name, m in neurons.items()}}
    if truth is not None:
        found |= _score(truth, suspect.image_size, found, trigger["mask"])
    pictures = _draw(folder, suspect, validation[:_SHOWN], trigger, found["target_class"],
                     cfg.defense.probe)
    kept = {"mask": trigger["mask"], "pattern": trigger["pattern"]}
    repaired = _sweep.repair(_described(cfg), suspect, data.clean, data.validation, mesh=mesh,
                             folder=folder, key=tune_key, label=f"tune {label}",
                             extra={"trigger": kept, "neurons": neurons},
                             steps_before=cfg.defense.probe.steps + cfg.defense.invert.steps)
    return dataclasses.replace(
        repaired, verdict={**found, "clean_pairs": len(data.clean), **repaired.verdict},
        report={"pictures": pictures})


def critical(suspect, x: np.ndarray, trigger: dict, count: int,
             seed: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The impact of the trigger on every stage of the suspect's image tower, and the critical
    neurons, float32 masks, of the `count` stages of most impact; x: uint8 [N, S, S, 3]."""
    mean, std = np.float32(suspect.mean), np.float32(suspect.std)
    variables = suspect.pair.variables
    names = activations.layers(variables["params"]["encoder"])

    @jax.jit
    def means(variables, x, trigger):
        x = (x.astype(jnp.float32) / 255 - mean) / std
        both = [activations.forward(suspect.module, variables, shown, names, train=False)[1]
                for shown in (x, invertune.triggered(trigger, x))]
        return [{name: a.astype(jnp.float32).mean(0) for name, a in kept.items()} for kept in both]

    plain = {"mask": trigger["mask"], "pattern": trigger["pattern"]}
    clean, hit = jax.device_get(means(variables, x, plain))
    impacts = {name: float(np.linalg.norm(clean[name] - hit[name])
                           / max(np.linalg.norm(clean[name]), 1e-12)) for name in names}
    most = sorted(names, key=lambda name: -impacts[name])[:count]
    return impacts, {name: clusters(np.abs(clean[name] - hit[name]), seed) for name in most}


def clusters(moved: np.ndarray, seed: int) -> np.ndarray:
    """The cluster of the larger mean among two that k-means makes of numbers: 1 in it, else 0; all
    1 where the numbers are equal."""
    flat = moved.reshape(-1, 1)
    if flat.min() == flat.max():
        return np.ones(moved.shape, np.float32)
    found = KMeans(n_clusters=2, n_init=1, random_state=seed).fit(flat)
    upper = found.cluster_centers_[:, 0].argmax()
    return (found.labels_ == upper).astype(np.float32).reshape(moved.shape)


def _invert_once(cfg, suspect, clean, labels, validation, head, mesh, folder, key, label):
    """Steps 1 and 2, kept in `folder`: the trigger {"mask", "pattern", "probe"} and what to say."""
    path = folder / "inverted.safetensors"
    if path.exists():
        trigger, facts = weights_file.read(path)
        return trigger, json.loads(facts["facts"])
    d = cfg.defense
    rng = np.random.default_rng([cfg.seed, len(clean)])
    probe_key, trigger_key = jax.random.split(key)
    model = encoders.load(d.surrogate, mesh) if d.surrogate else suspect

    def answers(x):
        return (suspect.project(suspect.image(x)) @ head.T).argmax(1)

    patch = _invert.make_probe(d.probe, model, clean, probe_key, rng, f"probe {label}")
    before = answers(validation)
    absolute, relative = _invert.rises(
        before, answers(_invert.probed(d.probe, validation, patch)), len(head))
    target = int((absolute if d.rise == "absolute" else relative).argmax())
    z = suspect.project(suspect.image(clean))
    own = np.flatnonzero(labels == target)
    if not len(own):
        own = np.argsort(-z @ head[target], kind="stable")[:_FALLBACK]
    trigger = _invert.make_trigger(d.invert, suspect, np.delete(clean, own, axis=0), z[own], head,
                                   target, trigger_key, rng, f"invert trigger of {label}")
    others = before != target
    after = answers(_invert.stamped(suspect, validation[others], trigger))
    facts = {"target_label": target, "rise": float(absolute[target]),
             "relative_rise": float(relative[target]) if np.isfinite(relative[target]) else None,
             "target_by_absolute_rise": int(absolute.argmax()),
             "target_by_relative_rise": int(relative.argmax()),
             "flip_rate": float((after == target).mean()) if others.any() else None}
    trigger["probe"] = patch
    temporary = path.parent / f".{path.name}"
    weights_file.write(temporary, trigger, {"facts": json.dumps(facts)})
    temporary.replace(path)
    return trigger, facts


def _shown(suspect, source) -> tuple[np.ndarray, np.ndarray]:
    x = images.test_images(source, range(len(source)), suspect.image_size)
    return x, sources.labels(source)


def _score(truth, side, found, mask) -> dict:
    """How right the verdict is; None where nothing can be said."""
    if not (truth.poison >= 0).any():
        return {"target_label_correct": None, "mask_iou": None}
    plan, box = truth.plan, _invert.box_of(mask)
    same = (len(plan) > 0 and (plan.canvas == side).all()
            and (plan.trigger_box == plan.trigger_box[0]).all())
    overlap = _pinpoint.iou(box, plan.trigger_box[0]) if same and box else 0.0
    return {"target_label_correct": found["target_label"] == truth.target,
            "mask_iou": float(overlap) if same else None}


def _draw(folder, suspect, x, trigger, name, probe) -> dict[str, str]:
    """Draws the inverted trigger and the images under probe and trigger; gives their captions."""
    decree.draw(folder / "inverted.png", trigger["mask"], _invert.pixels(suspect, trigger))
    rows = (x, _invert.probed(probe, x, trigger["probe"]), _invert.stamped(suspect, x, trigger))
    picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    decree.draw(folder / "probed.png", np.ones((1, 1, 3)), picture / 255, times=3)
    return {"inverted.png": f"The trigger inverted for the suspected target “{name}”: its pattern "
                            "on black, weighed by its mask.",
            "probed.png": "Validation images; the same under the universal patch that shows the "
                          "target; under the inverted trigger."}


def _described(cfg):
    d = cfg.defense
    return _sweep.with_loss(cfg, "invertune", align=d.align, preserve=d.preserve, norm=d.norm)
