"""One step of self-supervised training: augment, loss, optimizer, EMA; for any objective.

`make_init` and `make_step` are pure functions of a config, so that victim and control differ in
their data alone.
"""

import jax
import jax.numpy as jnp
import ml_collections
import optax

from jax_cl_bd import lookup
from jax_cl_bd.data import augment
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import build, pair, parts, start
from jax_cl_bd.objectives import gradient_cache
from jax_cl_bd.train import TrainState

STREAM = 2  # of cfg.seed; 1 draws the plan, 3 is the defenses'


def first_key(cfg: ml_collections.ConfigDict) -> jax.Array:
    """The key that weights and steps of a pretraining run are drawn from."""
    return jax.random.key(cfg.seed * 16 + STREAM)


def first_variables(cfg: ml_collections.ConfigDict) -> dict:
    """The variables that pretraining begins with, drawn or loaded as `make_init` has them."""
    key = jax.random.split(first_key(cfg), 3)[0]
    return jax.jit(lambda key, weights: start.placed(init_variables(cfg, key), weights))(
        key, start.load(cfg))


def init_variables(cfg: ml_collections.ConfigDict, key: jax.Array) -> dict:
    """Draws the variables of every part of a config's model."""
    side = cfg.data.image_size
    context = 0 if cfg.text.name == "none" else cfg.text.context
    return parts.init_variables(modules_of(cfg), key, (side, side, 3), context)


def has_batch_norm(cfg: ml_collections.ConfigDict) -> bool:
    """Says whether any part of a config's model keeps running statistics."""
    shapes = jax.eval_shape(lambda key: init_variables(cfg, key), jax.random.key(0))
    return bool(jax.tree.leaves(shapes["batch_stats"]))


def check(cfg: ml_collections.ConfigDict) -> None:
    """Finds an objective that does not fit the model, before anything is compiled.

    Raises:
        UserError: an unknown objective, one that needs captions where there is no text tower or the
            other way round, or one that needs augmented captions without them.
    """
    objective = lookup.load("objectives", cfg.objective.name, offers="loss")
    needs, has = getattr(objective, "TEXT", False), cfg.text.name != "none"
    if needs != has:
        says = "needs a text tower" if needs else "has no use for a text tower"
        raise UserError(f"objective {cfg.objective.name!r} {says}, and text.name is "
                        f"{cfg.text.name!r}")
    for name in ("dim", "hidden", "bottleneck", "layers", "queue_batches"):
        if cfg.objective.get(name, 1) < 1:
            raise UserError(f"objective.{name}={cfg.objective[name]} must be at least 1")
    objective.heads(cfg.objective, bn_groups=cfg.model.bn_groups)
    if hasattr(objective, "TEXT_AUGMENT"):
        if cfg.data.text_augment != objective.TEXT_AUGMENT:
            raise UserError(f"objective {cfg.objective.name!r} is of augmented captions, and "
                            f"data.text_augment is {cfg.data.text_augment!r}; set "
                            f"--config.data.text_augment={objective.TEXT_AUGMENT}")
    elif needs and cfg.objective.in_modality > 0 and cfg.data.text_augment == "none":
        raise UserError(f"objective.in_modality = {cfg.objective.in_modality} compares captions "
                        "with augmented ones; set --config.data.text_augment=eda")
    modules_of(cfg)


def check_steps(cfg: ml_collections.ConfigDict, steps: int) -> None:
    """Asks an objective that follows a plan of its own whether it fits into `steps`; cfg: `sized`.

    Raises:
        UserError: it does not.
    """
    objective = lookup.load("objectives", cfg.objective.name, offers="loss")
    if hasattr(objective, "check_steps"):
        objective.check_steps(cfg, steps)


def rehearse(cfg: ml_collections.ConfigDict, steps: int, mesh) -> None:
    """Draws the model and goes through the objective's loss on shapes alone, without the towers, so
    that what either lacks is found before anything is compiled. cfg: `sized`."""
    objective = lookup.load("objectives", cfg.objective.name, offers="loss")
    fns = parts.make_apply_fns(modules_of(cfg))
    rows, side = cfg.train.batch_size, cfg.data.image_size
    image = jax.ShapeDtypeStruct((rows, side, side, 3), jnp.float32)
    batch = {"view1": image, "view2": image, "index": jax.ShapeDtypeStruct((rows,), jnp.int32)}
    if cfg.text.name != "none":
        tokens = jax.ShapeDtypeStruct((rows, cfg.text.context), jnp.int32)
        batch |= {"tokens": tokens, "tokens2": tokens, "tokens3": tokens}

    def once(key, batch):
        variables, step = init_variables(cfg, key), jnp.zeros((), jnp.int32)
        extra = objective.init_extra(cfg, variables, key)
        for name, given in (("encoder", "view1"), ("text", "tokens")):
            if name in fns:
                fns[name] = _stand_in(fns[name], name, variables, batch[given][:1])
        _, (stats, extra, _) = objective.loss(cfg, variables, extra, batch, fns, key, step)
        return objective.after_update(cfg, {**variables, "batch_stats": stats}, extra, step, steps)

    with jax.set_mesh(mesh):
        jax.eval_shape(once, jax.random.key(0), batch)


def _stand_in(tower, name, variables, x):
    """Answers with zeros where a tower would give features, of as many numbers."""
    width = tower(variables, x, False)[0].shape[-1]
    return lambda variables, x, train: (jnp.zeros((len(x), width)),
                                        variables["batch_stats"].get(name, {}))


def sized(cfg: ml_collections.ConfigDict, *, rows: int, steps_per_epoch: int):
    """The config with what the data say to objectives that count epochs: objective.rows, of the
    poisoned set, and objective.epoch_steps where that is 0. Others get theirs back as it is."""
    if "epoch_steps" not in cfg.objective:
        return cfg
    own = ml_collections.ConfigDict(cfg.to_dict())
    own.objective.rows = rows
    own.objective.epoch_steps = own.objective.epoch_steps or steps_per_epoch
    return own


def plain(cfg: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy of the config with the loss that a model is fine-tuned or trained by when there is
    nothing to defend against: its own, or, of an objective that is itself a defense (RoCLIP,
    SafeCLIP), the one that it defends, on plain images and captions as for undefended models."""
    own = ml_collections.ConfigDict(cfg.to_dict())
    objective = lookup.load("objectives", cfg.objective.name, offers="loss")
    if hasattr(objective, "PLAIN"):
        kept = {name: cfg.objective[name] for name in ("dim", "image_projection", "scale_init")}
        own.objective = ml_collections.ConfigDict(
            {"name": objective.PLAIN, **kept, "in_modality": 0.0, "in_modality_temperature": 0.0})
        own.data.text_augment = "none"
    return own


def modules_of(cfg: ml_collections.ConfigDict) -> dict:
    """The encoder and the objective's heads, or all of an image-text model, in the data's order."""
    if cfg.text.name != "none":
        return pair.modules_of(cfg)
    objective = lookup.load("objectives", cfg.objective.name, offers="loss")
    return {"encoder": build.build(cfg.model),
            **objective.heads(cfg.objective, bn_groups=cfg.model.bn_groups)}


def make_init(cfg: ml_collections.ConfigDict, tx):
    """Gives init(key[, weights]) -> TrainState: a pure function, the same for victim and control.

    `weights`: what `start.load` gives, in place of what would be drawn. An argument, since closed
    over they would be constants of the compiled program.
    """
    objective = lookup.load("objectives", cfg.objective.name, offers="loss")

    def init(key, weights=None):
        drawn, extra, steps = jax.random.split(key, 3)
        variables = init_variables(cfg, drawn)
        if weights is not None:
            variables = start.placed(variables, weights)
        return TrainState(step=jnp.zeros((), jnp.int32), params=variables["params"],
                          batch_stats=variables["batch_stats"],
                          opt_state=tx.init(variables["params"]),
                          extra=objective.init_extra(cfg, variables, extra), key=steps)

    return init


def make_update(cfg: ml_collections.ConfigDict, tx, steps: int):
    """Gives update(state, views, key) -> (state, metrics): loss, optimizer, EMA; no data work."""
    objective = lookup.load("objectives", cfg.objective.name, offers="loss")
    apply_fns = _apply_fns(cfg)

    def update(state, views, key):
        def loss_of(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            return objective.loss(cfg, variables, state.extra, views, apply_fns, key, state.step)

        (loss, (batch_stats, extra, metrics)), grads = jax.value_and_grad(
            loss_of, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        if hasattr(objective, "update_scale"):
            factor = objective.update_scale(cfg, state.step)
            updates = jax.tree.map(lambda u: factor * u, updates)
        params = optax.apply_updates(state.params, updates)
        if hasattr(objective, "constrain"):
            params = objective.constrain(params)
        variables = {"params": params, "batch_stats": batch_stats}
        extra = objective.after_update(cfg, variables, extra, state.step, steps)
        return state.replace(step=state.step + 1, params=params, batch_stats=batch_stats,
                             opt_state=opt_state, extra=extra), {"loss": loss, **metrics}

    return update


def _apply_fns(cfg):
    """The parts of the model, over the whole batch or over train.chunks parts of it."""
    chunks, own = cfg.train.chunks, ml_collections.ConfigDict(cfg.to_dict())
    if chunks > 1:
        own.model.bn_groups = max(1, cfg.model.bn_groups // chunks)
    return gradient_cache.chunked(parts.make_apply_fns(modules_of(own)), chunks)


def make_step(cfg: ml_collections.ConfigDict, tx, steps: int):
    """Gives step(state, data, batch) -> (state, metrics): augment on the device, then update."""
    update, draw = make_update(cfg, tx, steps), make_views(cfg)

    def step_fn(state, data, batch):
        view_key, loss_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        return update(state, draw(data, batch, view_key), loss_key)

    return step_fn


def make_views(cfg: ml_collections.ConfigDict):
    """Gives draw(data, batch, key) -> the views of a batch, by the recipes of the objective."""
    objective = lookup.load("objectives", cfg.objective.name, offers="loss")
    recipes = getattr(objective, "RECIPES", ("view1", "view2"))
    return lambda data, batch, key: augment.views(cfg, data, batch, key, recipes)


def looks_at_all(cfg: ml_collections.ConfigDict) -> bool:
    """Says whether the objective looks at all data now and then, see `make_refresh`."""
    objective = lookup.load("objectives", cfg.objective.name, offers="loss")
    return hasattr(objective, "make_refresh")


def make_refresh(cfg: ml_collections.ConfigDict, feed, mesh):
    """What train.fit asks before every step, of objectives that look at all data now and then; None
    of others. `cfg`: sized."""
    objective = lookup.load("objectives", cfg.objective.name, offers="loss")
    make = getattr(objective, "make_refresh", None)
    return make and make(cfg, feed, mesh)
