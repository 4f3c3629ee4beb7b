import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import warp


def settings(**changes):
    base = dict(name="warp", id=14, size=24, opacity=1.0, train_place="random",
                train_box=(0.0, 1.0), test_place="random", test_box=(0.1, 0.9), strength=1.0)
    return ml_collections.ConfigDict({**base, **changes})


def made(**changes):
    return warp.init(settings(**changes), jax.random.key(0))


def pictures(n, height, width):
    return np.random.default_rng(0).random((n, height, width, 3)).astype(np.float32)


def put(params, images, boxes):
    return np.asarray(jax.jit(warp.apply)(params, images, np.array(boxes), None))


def torch_warped(field, strength, images):
    """CleanCLIP's code path with torch's own functions, for square images."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    side = images.shape[1]
    grid = torch.tensor(np.array(field)).permute(2, 0, 1)[None]
    grid = functional.interpolate(grid, size=side, mode="bicubic", align_corners=True)
    line = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    points = torch.stack((x, y), 2)[None] + strength * grid.permute(0, 2, 3, 1) / side
    points = points.clamp(-1, 1).repeat(len(images), 1, 1, 1)
    out = functional.grid_sample(torch.from_numpy(images).permute(0, 3, 1, 2), points,
                                 align_corners=True)
    return out.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("size, side, strength", [
    (24, 24, 1.0), (4, 24, 8.0), (4, 32, 0.5), (24, 15, 3.0), (2, 24, 2.0)])
def test_equals_torch_grid_sample(size, side, strength):
    params = made(size=size, strength=strength)
    images = pictures(2, side, side)
    out = put(params, images, [[0, 0, side, side]] * 2)
    np.testing.assert_allclose(out, torch_warped(params["field"], strength, images), rtol=0,
                               atol=2e-5)
    assert np.abs(out - images).mean() > 1e-3  # it does something


def test_field_is_uniform_scaled_to_mean_absolute_value_one():
    field = made(size=64)["field"]
    np.testing.assert_allclose(np.abs(field).mean(), 1.0, rtol=1e-5)
    # U[-1, 1] has mean absolute value 1/2, so the scaled one ends near 2.
    assert 1.9 < np.abs(field).max() < 2.1 and abs(field.mean()) < 0.1


def test_pixels_move_by_half_a_pixel_on_average_at_strength_one():
    side = 33
    ramp = np.broadcast_to(np.arange(side, dtype=np.float32)[:, None] / 64, (side, side))
    images = np.stack([ramp, ramp.T, ramp], -1)[None].copy()  # value = 1/64 of the coordinate
    moved = (put(made(size=side), images, [[0, 0, side, side]]) - images)[0, 4:-4, 4:-4] * 64
    for c in (0, 1):
        assert np.abs(moved[..., c]).mean() == pytest.approx(0.5 * 32 / 33, rel=0.08)
    field = made(size=side)["field"][4:-4, 4:-4] * 16 / 33
    np.testing.assert_allclose(moved[..., 0], field[..., 1], rtol=0, atol=1e-3)  # y
    np.testing.assert_allclose(moved[..., 1], field[..., 0], rtol=0, atol=1e-3)  # x


def test_one_stored_field_for_all_images_and_keys():
    one = pictures(1, 24, 24)
    images = np.concatenate([one, one])
    out = put(made(), images, [[0, 0, 24, 24]] * 2)
    np.testing.assert_array_equal(out[0], out[1])
    np.testing.assert_array_equal(made()["field"], made()["field"])
    other = warp.init(settings(), jax.random.key(1))["field"]
    assert (other != made()["field"]).any()


def test_nothing_comes_in_from_outside_the_box():
    images = pictures(1, 32, 32)
    box = warp.place(settings(), np.array([[20, 26]]), np.random.default_rng(0), training=True)
    np.testing.assert_array_equal(box, [[0, 0, 20, 26]])
    params = made(strength=20.0)
    out = put(params, images, box)
    np.testing.assert_array_equal(out[:, 20:], images[:, 20:])
    np.testing.assert_array_equal(out[:, :, 26:], images[:, :, 26:])
    blackened = images.copy()
    blackened[:, 20:], blackened[:, :, 26:] = 0, 0
    np.testing.assert_array_equal(put(params, blackened, box)[:, :20, :26], out[:, :20, :26])
    alone = put(params, images[:, :20, :26].copy(), box)
    np.testing.assert_allclose(out[:, :20, :26], alone, rtol=0, atol=2e-5)


def test_another_field():
    params = made()
    other = warp.same_kind(params, jax.random.key(9))
    assert other["field"].shape == (24, 24, 2) and other["strength"] == params["strength"]
    assert (other["field"] != params["field"]).all()
    np.testing.assert_allclose(np.abs(other["field"]).mean(), 1.0, rtol=1e-5)


def test_differentiable_in_the_field():
    params = made(size=4)

    @jax.jit
    def total(field):
        out = warp.apply({**params, "field": field}, images, np.array([[0, 0, 12, 12]]), None)
        return (out * weight).sum()

    images, weight = pictures(1, 12, 12), jnp.asarray(pictures(2, 12, 12)[1:])
    gradient = np.asarray(jax.jit(jax.grad(total))(params["field"]))
    step = np.zeros((4, 4, 2), np.float32)
    step[1, 2, 0] = 1e-2
    slope = (total(params["field"] + step) - total(params["field"] - step)) / 2e-2
    np.testing.assert_allclose(gradient[1, 2, 0], slope, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("change, message", [
    (dict(size=1), "size is 1"), (dict(strength=0.0), "strength is 0")])
def test_settings_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        warp.check(settings(**change))
