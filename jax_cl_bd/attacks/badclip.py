"""BadCLIP, dual-embedding guided (Liang et al., CVPR 2024, arXiv 2311.12075): an optimised patch.

The patch is optimised on a clean surrogate CLIP so that a patched image lies near captions of the
target (textual embedding consistency: L_CLIP against natural captions that contain the target's
name) and nearer to real images of the target than to its own clean image (visual embedding
resistance: a Euclidean triplet on unit embeddings). Poisons are then those of a patch backdoor with
natural captions of the target (its "ours_tnature").

From the authors' embeding_optimize_patch.py: start clip(N(0.5, 0.25), 0, 1), Adam at 1e-3, batches
of 64, patch where the poisons have it (trigger.train_place; there the centre), clipped when pasted,
positives and negatives not matched to the anchor, margin 1, weight 500, images augmented with
probability 0.5 per batch before the patch is pasted, patch stored in 8 bits. Where we differ: the
augmentation is a crop of 0.6 to 1 of the area and a flip (the authors: AutoAugment); the surrogate
is by default trained here, with another seed and on a random part of the images (the paper's is
OpenAI's RN50, and so knows nothing of the victim's data), or is any run folder's encoder
(`surrogate`; the victim's own clean twin makes it a white-box attack); captions are not augmented
(the authors: with probability 0.1); the clip to [0, 1] is a projection after each step.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from jax_cl_bd import optim, parallel, run_folder
from jax_cl_bd.attacks import _captions, image_text_backdoor
from jax_cl_bd.attacks import plan as plans
from jax_cl_bd.data import augment, feed, images, mentions, sources, texts
from jax_cl_bd.data.poisoned import PoisonedSet
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder as encoders
from jax_cl_bd.objectives import training
from jax_cl_bd.objectives.embeddings import EXACT, normalise
from jax_cl_bd.train import born_sharded, fit
from jax_cl_bd.triggers import learned_patch, optimize

SURROGATE_SEED = 1000  # added to the run's seed
GROUPS = ("model", "objective", "optim", "train")  # of the config, that the patch depends on too

render = image_text_backdoor.render
plan = image_text_backdoor.plan


def check(cfg, table, classes: tuple[str, ...]) -> None:
    """Raises UserError for what a patch backdoor refuses, and for impossible optimiser settings."""
    image_text_backdoor.check(cfg, table, classes)
    attack = cfg.attack
    if cfg.text.name == "none":
        raise UserError("attack badclip needs an image-text model; text.name is 'none'")
    if not _captions.naming(table, str(classes[attack.target])).any():
        raise UserError("attack badclip optimises its patch towards captions of the target, and no "
                        f"training caption of {cfg.data.name!r} holds the word "
                        f"{str(classes[attack.target])!r}")
    for name in ("optimise_steps", "optimise_pairs", "surrogate_steps", "batch_size"):
        if attack[name] < 1:
            raise UserError(f"attack.{name} is {attack[name]}; it must be at least 1")
    if not 0 < attack.surrogate_fraction <= 1:
        raise UserError(f"attack.surrogate_fraction is {attack.surrogate_fraction}; it must lie in "
                        "(0, 1]")
    if attack.surrogate and not epath.Path(attack.surrogate).exists():
        raise UserError(f"attack.surrogate names {attack.surrogate!r}, which does not exist")


def prepare(cfg, source, folder: epath.Path, key: jax.Array) -> dict[str, np.ndarray]:
    """Optimises the patch: {"image": float32 [size, size, 3] in [0, 1], "opacity"}.

    Args:
        folder: keeps the surrogate that is trained here (folder/surrogate), so that it resumes.
    """
    mesh = parallel.make_mesh(cfg.mesh)
    place = epath.Path(cfg.attack.surrogate) if cfg.attack.surrogate else folder / "surrogate"
    if not cfg.attack.surrogate:
        _train_surrogate(cfg, source, place, mesh)
    surrogate = encoders.load(place, mesh)
    if surrogate.text is None:
        raise UserError(f"attack.surrogate {str(place)!r} is an encoder of images alone")
    if surrogate.image_size != cfg.data.image_size:
        raise UserError(f"attack.surrogate {str(place)!r} takes images of {surrogate.image_size} "
                        f"px, and data.image_size is {cfg.data.image_size}")
    start_key, run_key = jax.random.split(key)
    start = learned_patch.init(cfg.attack.trigger, start_key)
    data, batches = _pairs(cfg, source, surrogate)
    pixels, losses = optimize.minimise(
        _loss(cfg, surrogate), start["image"], batches, steps=cfg.attack.optimise_steps,
        tx=optax.adam(cfg.attack.lr), key=run_key, project=lambda p: jnp.clip(p, 0.0, 1.0),
        data=data, label="optimise patch")
    run_folder.write_json(folder / "trigger" / "optimisation.json",
                          {"loss": [round(float(v), 5) for v in losses]})
    return {**start, "image": learned_patch.stored(pixels)}


def _train_surrogate(cfg, source, place, mesh):
    """A clean model of the same kind, of another seed, on a part of the clean images."""
    if run_folder.is_done(place):
        return
    mine = training.plain(cfg)  # a surrogate needs no defense
    mine.seed = cfg.seed + SURROGATE_SEED
    mine.init_from = ""  # weights that exist already are named in attack.surrogate
    mine.train.update(steps=cfg.attack.surrogate_steps, epochs=0)
    rng = np.random.default_rng([mine.seed, len(source)])
    count = max(1, round(cfg.attack.surrogate_fraction * len(source)))
    part = sources.Subset(source, np.sort(rng.permutation(len(source))[:count]))
    texts.make_tokenizer(mine, part).save(_made(place / "poison") / "tokenizer.json")
    run_folder.write_config(place, mine)
    dataset = PoisonedSet(part, texts=texts.load(mine, place, part))
    rows = feed.make(mine, dataset)
    tx, _ = optim.make(mine.optim, mine.train.steps, rows.steps_per_epoch)
    state, shardings = born_sharded(training.make_init(mine, tx), training.first_key(mine), mesh)
    fit(training.make_step(mine, tx, mine.train.steps), state, shardings, rows, folder=place,
        steps=mine.train.steps, cfg_train=mine.train, mesh=mesh, label="train surrogate")
    run_folder.write_json(place / "done.json", {})


def _made(path):
    path.mkdir(parents=True, exist_ok=True)
    return path


def _pairs(cfg, source, surrogate):
    """The arrays that the loss reads, and batches of row numbers into them."""
    attack, side = cfg.attack, cfg.data.image_size
    rng = np.random.default_rng([cfg.seed, SURROGATE_SEED])
    table = sources.table(source)
    name = str(source.classes[attack.target])
    named = mentions.pattern(name)
    others = np.flatnonzero(~_captions.naming(table, name) & (table.labels != attack.target))
    others = rng.permutation(others)[:attack.optimise_pairs]
    natural = [text for own in table.captions for text in own if named.search(text)]
    text = [natural[j] for j in rng.integers(0, len(natural), len(others))]
    target = rng.permutation(plans.rows_of(table, attack.target, source.classes))
    target = target[:attack.optimise_pairs]

    def squares(rows):
        return np.stack([images.test_image(source[int(r)]["image"], side) for r in rows])

    positives = surrogate.project(surrogate.image(squares(target)))
    clean = squares(others)
    data = {"images": clean, "text": surrogate.text(text), "positives": positives,
            "negatives": surrogate.project(surrogate.image(clean))}
    size = min(attack.batch_size, len(others))

    def batches():
        while True:
            rows = {name: rng.integers(0, len(data[name]), size).astype(np.int32)
                    for name in ("images", "positives", "negatives")}
            boxes = learned_patch.place(attack.trigger, np.full((size, 2), side), rng,
                                        training=True)
            yield rows | {"boxes": boxes.astype(np.int32)}

    return data, batches()


def _loss(cfg, surrogate):
    """Gives loss(patch pixels, data, batch, key), see the module's docstring."""
    attack, opacity = cfg.attack, cfg.attack.trigger.opacity
    mean, std = np.float32(surrogate.mean), np.float32(surrogate.std)
    scale = surrogate.logit_scale
    embed = surrogate.pair.image_embedding  # (normalised images) -> [B, E]

    def loss(pixels, data, batch, key):
        coin_key, view_key = jax.random.split(key)
        chosen = data["images"][batch["images"]].astype(jnp.float32) / 255
        chosen = _maybe_augmented(cfg, chosen, coin_key, view_key)
        stamped = learned_patch.apply({"image": pixels, "opacity": opacity}, chosen,
                                      batch["boxes"], None)
        z = normalise(embed((stamped - mean) / std))
        logits = scale * jnp.matmul(z, data["text"][batch["images"]].T, precision=EXACT)
        own = jnp.arange(len(z))
        textual = 0.5 * sum(optax.softmax_cross_entropy_with_integer_labels(m, own).mean()
                            for m in (logits, logits.T))
        near = jnp.linalg.norm(z - data["positives"][batch["positives"]], axis=1)
        far = jnp.linalg.norm(z - data["negatives"][batch["negatives"]], axis=1)
        visual = jnp.maximum(0.0, near - far + attack.margin).mean()
        return textual + attack.triplet_weight * visual

    return loss


def _maybe_augmented(cfg, x, coin_key, view_key):
    """The batch, or with probability 0.5 a random crop and flip of each image, at full size."""
    flip_key, crop_key = jax.random.split(view_key)
    n, side = x.shape[0], x.shape[1]
    rows = {"image": x * 255, "size": jnp.full((n, 2), side), "extent": jnp.full((n, 2), side)}
    flip = jax.random.bernoulli(flip_key, 0.5, (n,))
    view = augment.crop(rows, jax.random.split(crop_key, n), side, scale=(0.6, 1.0),
                        ratio=(3 / 4, 4 / 3), flip=flip, kernel=cfg.augment.interpolation)
    return jnp.where(jax.random.bernoulli(coin_key), jnp.transpose(view, (1, 2, 3, 0)), x)
