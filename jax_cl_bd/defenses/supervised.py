"""Supervised fine-tuning of the image tower of an image-text model, with a linear head.

Bansal, Singhi, Yang, Yin, Grover, Chang: "CleanCLIP: Mitigating Data Poisoning Attacks in
Multimodal Contrastive Learning", ICCV 2023, arXiv 2303.03323, its variant for who has labels; code
nishadsinghi/CleanCLIP (src/evaluate.py): cross-entropy on labelled clean images, all vision weights
train, and the new head reads the projected features before they are brought to unit length.

What comes out has no text: it answers by its head, and the rows "own_head" and its front are those
of the head, beside the zero-shot figures of the suspect that it is compared with. Other probes are
of the tower. Differences: shown at every rate of defense.rates and at several points of each
(_sweep) instead of 1e-4 for 10 epochs, with the sweep's warm-up; norms are spared the weight decay
like biases; images are augmented as the victim's own were (augment.view1), the central square in
the code.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd.defenses import _classifier, _sweep
from jax_cl_bd.defenses.outcome import Outcome, whose
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder as encoders
from jax_cl_bd.models import parts
from jax_cl_bd.models.pair import modules_of

NEEDS_LABELS = True  # of the images that it trains and chooses on


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` images are there to train on.

    Raises:
        UserError: those of _sweep.check, fewer images than one batch, or another data set to
            measure on, whose classes the head does not know.
    """
    _sweep.check(cfg)
    _classifier.check_batch(cfg, clean)
    if cfg.downstream:
        raise UserError("defense supervised answers by a head for the classes that it is trained "
                        f"on, and downstream={cfg.downstream!r} is measured; leave it empty")


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Fine-tunes the image tower of `victims[0]` on `data.clean`; never uses `truth`.

    Returns:
        The verdict {"clean_images", "rate", "step", ...} with the tower and its head, and all
        points of the sweep.

    Raises:
        UserError: fewer labelled images than one batch.
    """
    del truth
    suspect, clean = victims[0], _classifier.labelled(cfg, data.clean)
    own = _sweep.described(cfg)
    own.text = ml_collections.ConfigDict({"name": "none"})
    modules = _modules(cfg, len(clean.classes))
    head_key, steps_key = jax.random.split(key)
    start = _start(suspect, modules, head_key)
    x, labels = _sweep.validation_images(cfg, data.validation)
    classify = classifier(modules)

    def accuracy(variables):
        features = encoders.of_parts(own, variables, mesh).image(x)
        return float((classify(variables)(features) == labels).mean())

    label = whose(folder)
    found = _sweep.train(
        cfg, own, suspect, _classifier.Feed(own, clean),
        # Copies, also of the key: a step donates its state, and every rate begins from here.
        first=lambda tx: _classifier.first_state(parts.copied(start), tx, jnp.copy(steps_key)),
        make_step=lambda tx: _classifier.make_step(own, modules, tx, own.augment.view1),
        accuracy=accuracy,
        before=_sweep.zero_shot_accuracy(suspect, x, labels, data.validation.classes), mesh=mesh,
        folder=folder, label=f"supervised {label}")
    outcome = _sweep.outcome_of(*found, pairs=len(clean))
    return dataclasses.replace(outcome, classify=classify,
                               verdict={"clean_images": len(clean), **outcome.verdict})


def classifier(modules: dict):
    """variables -> (features of the encoder [N, D] -> class [N])."""
    behind = {name: module for name, module in modules.items() if name != "encoder"}

    def of(variables):
        return lambda features: np.asarray(
            _classifier.logits(behind, variables, jnp.asarray(features))).argmax(1)

    return of


def _modules(cfg, classes):
    """What an image passes: encoder, the projection that some models have, the new head."""
    towers = modules_of(cfg)
    vision = {name: towers[name] for name in ("encoder", "image_projection") if name in towers}
    return {**vision, _classifier.HEAD: _classifier.head(classes)}


def _start(suspect, modules, key):
    """The suspect's vision weights and a head that is drawn anew."""
    variables = {kind: {name: suspect.pair.variables[kind].get(name, {}) for name in modules}
                 for kind in ("params", "batch_stats")}
    vision = {name: module for name, module in modules.items() if name != _classifier.HEAD}
    side = suspect.image_size
    width = jax.eval_shape(lambda v: _classifier.logits(vision, v, jnp.zeros((1, side, side, 3))),
                           variables).shape[1]
    variables["params"][_classifier.HEAD] = modules[_classifier.HEAD].init(
        key, jnp.zeros((1, width)), train=False)["params"]
    return variables

