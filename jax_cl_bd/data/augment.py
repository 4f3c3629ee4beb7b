"""Views of training images, made on the device inside the jitted step.

One view: RandomResizedCrop by layouts.crop_law, flip, colour jitter, grayscale, blur, solarize,
normalisation. Every draw depends on (key, row index, view) alone, so an image's views are the same
in any batch. Operations with probability or strength 0 are left out when the step is traced.

Differences from the SimCLR/MoCo code in PyTorch: jitter keeps the order brightness, contrast,
saturation, hue (torchvision shuffles it); the crop box is real-valued unless the law rounds it; the
Gaussian blur is cut at 3 of the largest sigmas (PIL approximates it by box filters).
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.data import color, resample
from jax_cl_bd.errors import UserError
from jax_cl_bd.layouts import crop_law

_CROP, _REST = 0, 1  # sub-streams of a view's key
_CAPTION = 2  # sub-stream of a row's key, beside its views 0 and 1
_NO_BLUR = 1e-3  # px; the taps of so narrow a Gaussian are exactly 0, 1, 0
_RATES = ("flip", "jitter", "grayscale", "blur", "solarize")
_STRENGTHS = ("brightness", "contrast", "saturation", "hue")


def views(cfg, data: dict, batch: dict, key: jax.Array,
          recipes: tuple[str, str] = ("view1", "view2")) -> dict[str, jax.Array]:
    """Draws the two training views of a batch.

    Args:
        cfg: the whole config (reads `augment`, `data.mean`, `data.std`).
        data, batch: of data/feed.py.
        key: already folded with the step.
        recipes: the names in cfg.augment by which view 1 and view 2 are drawn.
    Returns:
        {"view1", "view2": float32 [B, S, S, 3], normalised; "index": int32 [B]}. With captions
        also "tokens": int32 [B, T], one of the row's, and what was made of it: perhaps "tokens2"
        and "tokens3", augmented twins, and other arrays whose names begin with "tokens"
        (data/texts.py).
    """
    mean, std, kernel = cfg.data.mean, cfg.data.std, cfg.augment.interpolation
    index = batch["index"]
    keys = _row_keys(key, index)
    rows = index, data["pair"][index]
    picked = [pick(data, batch, row) for row in rows]
    made = [_view(cfg.augment[recipe], kernel, mean, std, row, _fold(keys, v), _side(data, batch))
            for v, (recipe, row) in enumerate(zip(recipes, picked))]
    return {"view1": made[0], "view2": made[1], "index": index,
            **_captions(picked[0], _fold(keys, _CAPTION))}


def one_view(recipe, interpolation: str, mean, std, data: dict, batch: dict,
             key: jax.Array) -> jax.Array:
    """Draws a single view of each row with another recipe: float32 [B, S, S, 3], normalised."""
    index = batch["index"]
    return _view(recipe, interpolation, mean, std, pick(data, batch, index),
                 _row_keys(key, index), _side(data, batch))


def plain_view(cfg, row: dict, side: int) -> jax.Array:
    """The central square of each image, not augmented: float32 [B, side, side, 3], normalised.

    `row`: of `pick`.
    """
    size, extent = row["size"].astype(jnp.float32), row["extent"].astype(jnp.float32)
    short = jnp.broadcast_to(size.min(1, keepdims=True), size.shape)
    box = jnp.concatenate([(size - short) / 2, short], axis=1) * jnp.tile(extent / size, 2)
    x = resample_box(row["image"], box, side, flip=jnp.zeros(len(box), bool),
                     kernel=cfg.augment.interpolation)
    mean, std = np.float32(cfg.data.mean), np.float32(cfg.data.std)
    return (jnp.transpose(x, (1, 2, 3, 0)) - mean) / std


def check(recipe, interpolation: str) -> None:
    """Checks one view's settings.

    Raises:
        UserError: a probability or strength out of range, or a range that is not one.
    """
    resample.check(interpolation)
    for name in _RATES:
        if not 0 <= recipe[name] <= 1:
            raise UserError(f"augment {name} is {recipe[name]}; a probability is in [0, 1]")
    for name in _STRENGTHS:
        top = 0.5 if name == "hue" else float("inf")
        if not 0 <= recipe[name] <= top:
            raise UserError(f"augment {name} is {recipe[name]}; it must be in [0, {top}]")
    for name, top in (("crop_scale", 1.0), ("crop_ratio", float("inf")),
                      ("blur_sigma", float("inf"))):
        pair = tuple(recipe[name])
        if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= top:
            raise UserError(f"augment {name} is {pair}; it must be two numbers with 0 < low <= "
                            f"high <= {top}")


def pick(data: dict, batch: dict, row: jax.Array) -> dict[str, jax.Array]:
    """Gathers {"image": uint8 [B, P, P, 3], "size", "extent": [B, 2]}, and tokens where there are
    any, of rows of the poisoned set.

    `row` [B] is the batch's index or its pair. P is S, or the poisons' side where there are any.
    """
    poison = data["poison"]
    m = poison["image"].shape[0]
    n_source = data["pair"].shape[0] - m
    if "clean" in data:
        # A row that is no clean one points somewhere; `select` then takes the poison.
        at = jnp.where(row < n_source, row, 0)
        clean = {name: jnp.take(a, at, axis=0) for name, a in data["clean"].items()}
    else:
        clean = {name: value for name, value in batch.items() if name != "index"}
    if not m:
        return clean
    is_poison = row >= n_source
    at = jnp.where(is_poison, row - n_source, 0)
    side = max(clean["image"].shape[1], poison["image"].shape[1])

    def select(name):
        a, b = clean[name], jnp.take(poison[name], at, axis=0)
        if name == "image":
            a, b = _pad(a, side), _pad(b, side)
        return jnp.where(is_poison.reshape(-1, *[1] * (a.ndim - 1)), b, a)

    return {name: select(name) for name in clean}


def crop(row: dict, keys: jax.Array, side: int, *, scale, ratio, flip: jax.Array,
         kernel: str) -> jax.Array:
    """Draws a crop of each image and resamples it: float32 [3, B, side, side] in [0, 1].

    The box is drawn in the geometry of `size` and mapped to `extent`, so that an image stored out
    of shape is cropped as if it had kept it. Shrinking is antialiased. flip: bool [B].
    """
    size, extent = row["size"].astype(jnp.float32), row["extent"].astype(jnp.float32)
    box = crop_law.sample(keys, size, scale=scale, ratio=ratio)
    return resample_box(row["image"], box * jnp.tile(extent / size, 2), side, flip=flip,
                        kernel=kernel)


def resample_box(image: jax.Array, box: jax.Array, side: int, *, flip: jax.Array,
                 kernel: str) -> jax.Array:
    """Resamples box [B, 4] (y, x, h, w in pixels) of uint8 [B, P, P, 3]: [3, B, side, side]."""
    rows = resample.weights(box[:, 0], box[:, 2], side, image.shape[1], kernel)
    columns = resample.weights(box[:, 1], box[:, 3], side, image.shape[2], kernel)
    columns = jnp.where(flip[:, None, None], columns[:, ::-1], columns)  # a flip costs nothing here
    planes = jnp.transpose(image, (3, 0, 1, 2)).astype(jnp.float32) / 255.0
    # The clip is for bicubic, which overshoots.
    return jnp.clip(resample.apply(planes, rows, columns), 0.0, 1.0)


def _captions(row, keys):
    """Chooses one of the captions of each row; all token arrays follow the one choice."""
    if "tokens" not in row:
        return {}
    u = jax.vmap(jax.random.uniform)(keys)
    chosen = jnp.minimum((u * row["count"]).astype(jnp.int32), row["count"] - 1)
    return {name: jnp.take_along_axis(row[name], chosen[:, None, None], axis=1)[:, 0]
            for name in row if name.startswith("tokens")}


def _jitter(recipe, x, u):
    if not recipe.jitter:
        return x
    chosen = u[0] < recipe.jitter
    for name, draw in zip(("brightness", "contrast", "saturation"), u[1:4]):
        if recipe[name]:
            low = max(0.0, 1.0 - recipe[name])
            factor = low + (1.0 + recipe[name] - low) * draw
            x = getattr(color, name)(x, jnp.where(chosen, factor, 1.0))
    if recipe.hue:
        x = color.hue(x, jnp.where(chosen, recipe.hue * (2.0 * u[4] - 1.0), 0.0))
    return x


def _blur(recipe, x, pick_u, sigma_u):
    low, high = recipe.blur_sigma
    side = x.shape[-1]
    sigma = jnp.where(pick_u < recipe.blur, low + (high - low) * sigma_u, _NO_BLUR)
    band = resample.blur_weights(sigma, side, resample.blur_radius(high, side))
    return jnp.clip(resample.apply(x, band, band), 0.0, 1.0)


def _pad(image, side):
    more = side - image.shape[1]
    return jnp.pad(image, ((0, 0), (0, more), (0, more), (0, 0))) if more else image


def _side(data, batch):
    return (data["clean"] if "clean" in data else batch)["image"].shape[1]


def _row_keys(key, index):
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def _fold(keys, number):
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _view(recipe, kernel, mean, std, row, keys, side):
    # u: [K, N] uniform draws, one call of the generator for all that follows the crop
    u = jax.vmap(lambda k: jax.random.uniform(k, (10,)))(_fold(keys, _REST)).T
    x = crop(row, _fold(keys, _CROP), side, scale=recipe.crop_scale, ratio=recipe.crop_ratio,
             flip=u[0] < recipe.flip, kernel=kernel)
    x = _jitter(recipe, x, u[1:6])
    if recipe.grayscale:
        x = color.grayscale(x, u[6] < recipe.grayscale)
    if recipe.blur:
        x = _blur(recipe, x, u[7], u[8])
    if recipe.solarize:
        x = color.solarize(x, u[9] < recipe.solarize)
    mean, std = np.float32(mean), np.float32(std)
    return (jnp.transpose(x, (1, 2, 3, 0)) - mean) / std
