"""Distillation on clean images: the defense of Saha et al. (CVPR 2022), by CompRess.

A fresh student learns, from clean unlabeled images alone, to be as similar to past images as the
suspect encoder is (CompRess, NeurIPS 2020). No clean image shows the
trigger, so nothing teaches the student what the trigger means.

Per batch, with t and s the normalised features of the suspect and of the student:
p = softmax(M_t t / T), q = softmax(M_s s / T), loss = mean KL(p || q), against queues that hold
earlier features of the same images, written after the loss. M_s holds features of a momentum copy
of the student, whose batch norm stays in train mode. Suspect and student see the same crop.

Where we differ: queues are [slots, B, D] rings. Over a small clean set they meet the same image
again, and at T = 0.04 its own copy would be all that p sees, so entries of the image itself are
left out of both p and q (mask_own = False keeps them, as released); queue = 0 takes the clean
images less one batch, CompRess has 128,000. The verdict gives the last entropy of p, in nats: near
0, p is one entry and no relation is learned. The momentum is a setting, because 0.999 needs
thousands of steps.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from etils import epath

from jax_cl_bd import metrics, optim, parallel, run_folder
from jax_cl_bd.data import augment, feed
from jax_cl_bd.data.poisoned import PoisonedSet
from jax_cl_bd.defenses.outcome import Outcome, whose
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import build, parts
from jax_cl_bd.objectives.embeddings import EXACT, normalise
from jax_cl_bd.train import TrainState, born_sharded, fit

LEFT_OUT = -1e9  # a logit; finite, so that 0 * (log p - log q) stays 0


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` images are there to train on."""
    if cfg.text.name != "none":
        raise UserError("defense distill is for encoders of images; text.name is "
                        f"{cfg.text.name!r}")
    d = cfg.defense
    parallel.check_batch(d.batch_size, parallel.make_mesh(cfg.mesh), "defense.batch_size")
    if d.queue < 0 or d.queue % d.batch_size:
        raise UserError(f"defense.queue={d.queue} must be a multiple of defense.batch_size="
                        f"{d.batch_size}, or 0 for the clean images less one batch")
    if d.temperature <= 0 or not 0 <= d.momentum <= 1:
        raise UserError(f"defense.temperature={d.temperature} must be positive and "
                        f"defense.momentum={d.momentum} in [0, 1]")
    queue_slots(d, clean)
    augment.check(d.augment, cfg.augment.interpolation)
    optim.make(d.optim, total_steps(d, clean), clean // d.batch_size)


def total_steps(cfg_defense, clean: int) -> int:
    """Steps of the student, from defense.steps or else defense.epochs."""
    steps = cfg_defense.steps or cfg_defense.epochs * (clean // cfg_defense.batch_size)
    if steps < 1:
        raise UserError(f"defense.steps={cfg_defense.steps} and defense.epochs="
                        f"{cfg_defense.epochs} make no step; set one of them")
    return steps


def queue_slots(cfg_defense, clean: int) -> int:
    """How many batches the queues hold, for `clean` images; they may hold an image several times.

    Raises:
        UserError: there are too few images.
    """
    longest = clean // cfg_defense.batch_size - 1
    if longest < 1:
        raise UserError(f"{clean} clean images are fewer than two batches of "
                        f"defense.batch_size={cfg_defense.batch_size}")
    return cfg_defense.queue // cfg_defense.batch_size or longest


def loss(student, suspect, queues, own, temperature: float):
    """CompRess's loss on normalised features (nn/compress_loss.py of the released code).

    Args:
        student, suspect: [N, D_s], [N, D_t], unit rows.
        queues: {"student": [K, D_s], "suspect": [K, D_t]}; row j of both is the same image.
        own: bool [N, K], True where an entry is left out: those of the row's own image.

    Returns:
        mean KL(p || q) in nats, and the mean entropy of p.
    """
    def log_softmax(z, queue):
        logits = jnp.matmul(z, queue.T, precision=EXACT) / temperature
        return jax.nn.log_softmax(jnp.where(own, LEFT_OUT, logits))

    log_p, log_q = log_softmax(suspect, queues["suspect"]), log_softmax(student, queues["student"])
    p = jnp.exp(log_p)
    return (p * (log_p - log_q)).sum(1).mean(), -(p * log_p).sum(1).mean()


def _make_init(cfg, tx, modules, slots: int, suspect_dim: int):
    side, batch = cfg.data.image_size, cfg.defense.batch_size

    def queue(key, dim):  # uniform in +-1/sqrt(d/3), as CompRess starts it
        bound = (3 / dim) ** 0.5
        return {"queue": jax.random.uniform(key, (slots, batch, dim), minval=-bound, maxval=bound)}

    def init(key):
        weights, first, second, steps = jax.random.split(key, 4)
        variables = parts.init_variables(modules, weights, (side, side, 3))
        dim = jax.eval_shape(lambda: modules["encoder"].apply(
            {c: variables[c]["encoder"] for c in variables},
            jnp.zeros((2, side, side, 3)), train=False)).shape[1]
        extra = {"student": queue(first, dim), "suspect": queue(second, suspect_dim),
                 "index": {"queue": jnp.full((slots, batch), -1, jnp.int32)},  # of which image
                 "momentum": jax.tree.map(jnp.copy, variables)}
        return TrainState(step=jnp.zeros((), jnp.int32), params=variables["params"],
                          batch_stats=variables["batch_stats"],
                          opt_state=tx.init(variables["params"]), extra=extra, key=steps)

    return init


def _make_step(cfg, tx, apply_fns, suspect_module):
    d = cfg.defense
    encode = apply_fns["encoder"]

    def step_fn(state, data, batch):
        key = jax.random.fold_in(state.key, state.step)
        x = augment.one_view(d.augment, cfg.augment.interpolation, cfg.data.mean, cfg.data.std,
                             data, batch, key)
        suspect = normalise(suspect_module.apply(data["suspect"], x, train=False))
        queues = {name: state.extra[name]["queue"].reshape(-1, state.extra[name]["queue"].shape[2])
                  for name in ("student", "suspect")}
        own = batch["index"][:, None] == state.extra["index"]["queue"].reshape(1, -1)

        def loss_of(params):
            z, stats = encode({"params": params, "batch_stats": state.batch_stats}, x, True)
            value, entropy = loss(normalise(z), suspect, queues, own & d.mask_own, d.temperature)
            return value, ({"encoder": stats}, entropy)

        (value, (stats, entropy)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        past, past_stats = encode(state.extra["momentum"], x, True)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        momentum = optax.incremental_update(params, state.extra["momentum"]["params"],
                                            1 - d.momentum)
        extra = {"momentum": {"params": momentum, "batch_stats": {"encoder": past_stats}}}
        for name, z in (("student", normalise(past)), ("suspect", suspect),
                        ("index", batch["index"])):
            old = state.extra[name]["queue"]
            extra[name] = {"queue": jax.lax.dynamic_update_index_in_dim(
                old, z, state.step % old.shape[0], 0)}
        state = state.replace(step=state.step + 1, params=params, batch_stats=stats,
                              opt_state=opt_state, extra=extra)
        return state, {"loss": value, "entropy_of_p": entropy, "own_entries": own.mean()}

    return step_fn


class _Feed:
    """The clean images' feed, with the suspect's variables beside them as step arguments."""

    def __init__(self, inner, suspect):
        self.data = {**inner.data, "suspect": jax.device_get(suspect)}
        self.batches = inner.batches


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key) -> Outcome:
    """Trains a student on the clean images to imitate `victims[0]`; never uses `truth`."""
    del truth
    data = data.clean
    suspect = victims[0]
    label = whose(folder)
    d = cfg.defense
    slots = queue_slots(d, len(data))
    student_cfg = ml_collections.ConfigDict(cfg.to_dict())
    student_cfg.train.update(batch_size=d.batch_size, chunks=1)
    steps = total_steps(d, len(data))
    tx, _ = optim.make(d.optim, steps, len(data) // d.batch_size)
    modules = {"encoder": build.build(cfg.model)}
    dim = suspect.image(np.zeros((1, *(suspect.image_size,) * 2, 3), np.uint8)).shape[1]
    run_folder.write_config(folder, student_cfg)
    state, shardings = born_sharded(_make_init(cfg, tx, modules, slots, dim), key, mesh)
    inner = feed.make(student_cfg, PoisonedSet(data),
                      process_index=jax.process_index(), process_count=jax.process_count())
    state = fit(_make_step(cfg, tx, parts.make_apply_fns(modules), suspect.module), state,
                shardings, _Feed(inner, suspect.variables), folder=folder, steps=steps,
                cfg_train=student_cfg.train, mesh=mesh, label=f"distill {label}")
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    last = metrics.read_lines(folder / "metrics.jsonl")[-1]  # the last step is always logged
    verdict = {"clean_images": len(data), "steps": steps, "queue": slots * d.batch_size,
               "entropy_of_p": round(last["train/entropy_of_p"], 4)}
    return Outcome(verdict, variables, {"clean_images": len(data)}, student_cfg)
