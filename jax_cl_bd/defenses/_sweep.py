"""Fine-tuning at several rates, and the defender's choice among what comes out.

A repair that is shown at one learning rate says little: too small a rate leaves the backdoor, too
large a one destroys the model and with it the attack. So a repair of an image-text model is trained
at each of `defense.rates` and looked at after each of `defense.points` equal parts of its steps.
The defender quotes the strongest point, the largest rate and of it the latest, whose zero-shot
accuracy on its own validation images is at most `defense.may_lose` below the suspect's, or, if none
is, the point of highest accuracy; attack success plays no part. The benchmark measures all points
(defend.py), for the front of clean accuracy against attack success. A rate that diverges ends there
and keeps the points before; the verdict names it.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from flax import traverse_util

from jax_cl_bd import checkpoint, lookup, optim, parallel, run_folder
from jax_cl_bd.data import feed, images, sources, templates, texts
from jax_cl_bd.data.poisoned import PoisonedSet
from jax_cl_bd.defenses.outcome import Outcome
from jax_cl_bd.errors import UserError
from jax_cl_bd.evals import zero_shot
from jax_cl_bd.models import encoder as encoders
from jax_cl_bd.models import weights_file
from jax_cl_bd.objectives import training
from jax_cl_bd.train import NonFinite, TrainState, fit, is_finite


@dataclasses.dataclass(frozen=True)
class Point:
    """One state of a repair: its rate, steps, accuracy on the defender's validation images, whether
    the defender chose it, the suspect's accuracy on them, and the file of its weights (`load`)."""

    rate: float
    step: int
    validation_accuracy: float
    path: epath.Path
    chosen: bool = False
    suspect_accuracy: float | None = None

    def row(self) -> dict[str, Any]:
        """What results.json says of it."""
        return {"rate": self.rate, "step": self.step, "chosen": self.chosen,
                "validation_accuracy": self.validation_accuracy}


def check(cfg: ml_collections.ConfigDict) -> None:
    """Finds bad settings of a sweep before anything is compiled. Raises UserError."""
    d = cfg.defense
    if cfg.text.name == "none":
        raise UserError(f"defense {d.name} is for image-text models; text.name is 'none'")
    if not d.rates or min(d.rates) <= 0 or sorted(set(d.rates)) != list(d.rates):
        raise UserError(f"defense.rates={tuple(d.rates)} must be positive learning rates, "
                        "ascending, each once")
    if d.steps < 1 or d.points < 1 or d.steps % d.points:
        raise UserError(f"defense.points={d.points} must divide defense.steps={d.steps}")
    if not 0 <= d.may_lose < 1:
        raise UserError(f"defense.may_lose={d.may_lose} must lie in [0, 1)")
    if not d.validation_split:
        raise UserError(f"defense {d.name} chooses its settings on images that were not trained "
                        "on; name their split in defense.validation_split")
    if d.get("in_modality", 0) < 0:
        raise UserError(f"defense.in_modality={d.in_modality} must be 0 (off) or more")
    parallel.check_batch(d.batch_size, parallel.make_mesh(cfg.mesh), "defense.batch_size")
    for rate in d.rates:
        optim.make(_optim(cfg, rate), d.steps, 1)


def repair(cfg, suspect, pairs, validation, *, mesh, folder: epath.Path, key: jax.Array,
           label: str, extra: dict | None = None, derive: Callable | None = None,
           steps_before: int = 0) -> Outcome:
    """Fine-tunes the suspect on a source with captions, see `tune`; the verdict is the rate and the
    step of the point chosen, what it does on the validation images, and the cost. `derive`: of
    data/texts.py, for an objective that needs further texts. `steps_before`: gradient steps that
    the defense made before, for the cost."""
    read = texts.of(described(cfg), suspect.pair.tokenizer, pairs)
    dataset = PoisonedSet(pairs, texts=dataclasses.replace(read, derive=derive))
    variables, own, points = tune(cfg, suspect, dataset, validation, mesh=mesh, folder=folder,
                                  key=key, label=label, extra=extra)
    found = outcome_of(variables, own, points, pairs=len(pairs))
    found.verdict["gradient_steps"] += steps_before
    return found


def outcome_of(variables, own, points: list[Point], *, pairs: int) -> Outcome:
    """What a defense gives back of a sweep on so many pairs; its verdict is on the point chosen."""
    chosen = next(p for p in points if p.chosen)
    reached = [p.rate for p in points]
    verdict = {"training_pairs": pairs,
               "gradient_steps": own.defense.steps * len(own.defense.rates),  # of all rates
               "diverged": [rate for rate in own.defense.rates
                            if reached.count(rate) < own.defense.points],
               "rate": chosen.rate, "step": chosen.step,
               "validation_accuracy": chosen.validation_accuracy,
               "validation_accuracy_of_suspect": chosen.suspect_accuracy}
    return Outcome(verdict, variables, {}, own, points)


def tune(cfg, suspect, dataset, validation, *, mesh, folder: epath.Path, key: jax.Array,
         label: str, extra: dict | None = None
         ) -> tuple[dict, ml_collections.ConfigDict, list[Point]]:
    """Fine-tunes the suspect on the pairs of a data set at every rate, by its pretraining loss with
    defense.in_modality times L_SS.

    Args:
        dataset: PoisonedSet with texts. validation: source with labels. extra: what the objective
            needs besides its own `init_extra`, the same at every rate.
    Returns:
        The chosen variables, the config that describes them, and all points. The chosen model also
        lies in `folder`, where load_encoder finds it.
    """
    own = described(cfg)
    x, truth = validation_images(cfg, validation)

    def accuracy(variables):
        repaired = encoders.of_parts(own, variables, mesh, suspect.pair.tokenizer)
        return zero_shot_accuracy(repaired, x, truth, validation.classes)

    def first(tx):
        state = first_state(own, suspect.pair.variables, tx, key)
        return state.replace(extra=state.extra | (extra or {}))

    return train(cfg, own, suspect, feed.make(own, dataset), first=first,
                 make_step=lambda tx: training.make_step(own, tx, cfg.defense.steps),
                 accuracy=accuracy,
                 before=zero_shot_accuracy(suspect, x, truth, validation.classes),
                 mesh=mesh, folder=folder, label=label)


def train(cfg, own, suspect, rows, *, first: Callable, make_step: Callable,
          accuracy: Callable[[dict], float], before: float, mesh, folder: epath.Path,
          label: str) -> tuple[dict, ml_collections.ConfigDict, list[Point]]:
    """Trains at every rate and chooses among the points (top of the file).

    Args:
        own: describes the model that is trained. rows: a feed.
        first: optimiser -> TrainState. make_step: optimiser -> step function of train.fit.
        accuracy: variables -> accuracy on the validation images; `before`: the suspect's.
    Returns:
        As `tune`.
    Raises:
        NonFinite: every rate diverged before its first point.
    """
    wanted = before - cfg.defense.may_lose
    every = cfg.defense.steps // cfg.defense.points
    points = []
    for rate in cfg.defense.rates:
        place = folder / f"rate_{rate:g}"
        tx, _ = optim.make(_optim(cfg, rate), cfg.defense.steps, 1)
        state = first(tx)
        shardings = parallel.state_shardings(mesh, jax.eval_shape(lambda s=state: s))

        def look(state, place=place, rate=rate):
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            if not is_finite(state):
                raise NonFinite(f"{label}, rate {rate:g}: the state after step "
                                f"{int(state.step)} is not finite")
            found = accuracy(variables)
            path = place / "points" / f"{int(state.step)}.safetensors"
            save(path, variables, {"rate": rate, "step": int(state.step),
                                   "validation_accuracy": found})
            return {"eval/validation_accuracy": found}

        cfg_train = own.train.copy_and_resolve_references()
        cfg_train.eval_every = every
        run_folder.write_config(place, own)
        ended = place / "diverged.json"
        try:
            if not ended.exists():
                fit(make_step(tx), jax.device_put(state, shardings), shardings, rows, folder=place,
                    steps=cfg.defense.steps, cfg_train=cfg_train, mesh=mesh,
                    label=f"{label}, rate {rate:g}", evaluate=look)
        except NonFinite as error:
            run_folder.write_json(ended, {"what": error.what})
        if ended.exists():
            print(f"{run_folder.read_json(ended)['what']}; this rate ends there", file=sys.stderr)
        paths = sorted((place / "points").glob("*.safetensors"), key=lambda p: int(p.stem))
        for path in paths[-cfg.defense.points:]:
            points.append(Point(**_facts(path), path=path))
    if not points:
        raise NonFinite(f"{label}: every rate of defense.rates={tuple(cfg.defense.rates)} diverged",
                        "; lower them or raise defense.optim.warmup_steps")
    good = [i for i, p in enumerate(points) if p.validation_accuracy >= wanted]
    best = max(range(len(points)), key=lambda i: points[i].validation_accuracy)
    at = good[-1] if good else best  # ascending in rate and step, so the last is the strongest
    points[at] = dataclasses.replace(points[at], chosen=True, suspect_accuracy=before)
    variables = load(own, points[at].path)
    keep(folder, own, variables, points[at].step, suspect)
    return variables, own, points


def check_clip(cfg: ml_collections.ConfigDict, what: str = "") -> None:
    """Refuses a model that was not pretrained by CLIP's loss, on which a repair's own loss builds.

    `what`: the setting that is for CLIP models alone; "" the defense as a whole. Raises UserError.
    """
    if training.plain(cfg).objective.name != "clip":
        raise UserError(f"{what or f'defense {cfg.defense.name}'} is for models pretrained with "
                        f"objective 'clip'; this one has {cfg.objective.name!r}")


def check_batch(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Refuses fewer clean pairs than one batch. Raises UserError."""
    if clean < cfg.defense.batch_size:
        raise UserError(f"{clean} clean pairs are fewer than one batch of defense.batch_size="
                        f"{cfg.defense.batch_size}")


def with_loss(cfg, name: str, **fields) -> ml_collections.ConfigDict:
    """A copy of the config with an objective that is for repairs alone, and its own fields; what
    the victim was trained by stays in objective.base. The in-modality term is the repair's, which
    the victim's pretraining may have had and the repair not."""
    own = training.plain(cfg)
    own.objective.update(base=own.objective.name, name=name,
                         in_modality=float(cfg.defense.get("in_modality", 0)), **fields)
    return own


def described(cfg) -> ml_collections.ConfigDict:
    """The config of a repaired model: the victim's, with the repair's loss and batches. A victim of
    RoCLIP or SafeCLIP is repaired as CLIP, by CLIP's loss."""
    own = training.plain(cfg)
    own.train.update(batch_size=cfg.defense.batch_size, chunks=1, eval_every=0)
    own.objective.in_modality = float(cfg.defense.get("in_modality", 0))
    if own.objective.in_modality:
        own.data.text_augment = "eda"
    return own


def keep(folder: epath.Path, cfg, variables, step: int, suspect) -> None:
    """Leaves a model in a defense's folder as a run leaves its own. Its config names the victim's
    loss, not one that is for repairs alone."""
    kept = ml_collections.ConfigDict(cfg.to_dict())
    if "base" in kept.objective:  # see `with_loss`
        kept.objective.name = kept.objective.base
        del kept.objective.base
    run_folder.write_config(folder, kept)
    if cfg.text.name != "none":
        suspect.pair.tokenizer.save(folder / "tokenizer.json")
    if checkpoint.newest_good_step(folder / "checkpoints", rename=True) is None:
        with checkpoint.open_manager(folder / "checkpoints") as manager:
            checkpoint.save(manager, step, jax.tree.map(jnp.asarray, variables))


def first_state(cfg, variables, tx, key: jax.Array) -> TrainState:
    """The suspect's weights under a fresh optimiser."""
    objective = lookup.load("objectives", cfg.objective.name, offers="loss")
    copied = jax.tree.map(jnp.copy, variables)  # the step donates them
    extra_key, steps = jax.random.split(key)
    return TrainState(step=jnp.zeros((), jnp.int32), params=copied["params"],
                      batch_stats=copied["batch_stats"], opt_state=tx.init(copied["params"]),
                      extra=objective.init_extra(cfg, copied, extra_key), key=steps)


def save(path: epath.Path, variables: dict, facts: dict) -> None:
    """Writes a model's variables, with a few figures, under a temporary name first."""
    flat = traverse_util.flatten_dict(jax.device_get(variables), sep="/")
    temporary = path.parent / f".{path.name}"
    weights_file.write(temporary, {name: np.asarray(v) for name, v in flat.items()},
                       {"facts": json.dumps(facts)})
    temporary.replace(path)


def load(cfg, path: epath.Path) -> dict:
    """Reads what `save` wrote: {"params": {part: ...}, "batch_stats": {part: ...}}."""
    flat, _ = weights_file.read(path)
    nested = traverse_util.unflatten_dict(flat, sep="/")
    # Parts without batch norm have no entry there in the file; a head of a defense's own has none
    # in the config.
    names = {**encoders.abstract_parts(cfg)["params"], **nested["params"]}
    return {kind: {part: nested.get(kind, {}).get(part, {}) for part in names}
            for kind in ("params", "batch_stats")}


def _facts(path):
    return json.loads(weights_file.read(path)[1]["facts"])


def _optim(cfg, rate):
    chosen = cfg.defense.optim.copy_and_resolve_references()
    chosen.lr = float(rate)
    return chosen


def validation_images(cfg, validation) -> tuple[np.ndarray, np.ndarray]:
    """The labelled images of a source, uint8 [N, S, S, 3], and their labels int [N].

    Raises:
        UserError: none has a label.
    """
    labels = sources.labels(validation)
    if not (labels >= 0).any():
        raise UserError(f"defense {cfg.defense.name} chooses its settings on labelled images, and "
                        f"data set {cfg.data.name!r} has none")
    rows = np.flatnonzero(labels >= 0)
    return images.test_images(validation, rows, cfg.data.image_size), labels[rows]


def zero_shot_accuracy(encoder, x, labels, classes) -> float:
    """Share of images that an image-text model classifies correctly with the 80 prompts."""
    head = zero_shot.class_weights(encoder, classes, templates.PROMPTS)
    scores = encoder.project(encoder.image(x)) @ head.T
    return float((scores.argmax(1) == labels).mean())
