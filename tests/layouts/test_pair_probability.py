import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_cl_bd.errors import UserError
from jax_cl_bd.layouts import crop_law
from jax_cl_bd.layouts.pair_probability import Layout, Probabilities, probabilities

RATIO = (3 / 4, 4 / 3)


def side_by_side(*, width=2.0, height=1.0, trigger=0.25, center=0.5, reference=1.0, shadow=1.0):
    """Reference at the left end, shadow at the right end, trigger at `center` of the shadow."""
    start = width - shadow
    return Layout((height, width), (0, 0, height, reference), (0, start, height, shadow),
                  (height / 2 - trigger / 2, start + center * shadow - trigger / 2,
                   trigger, trigger))


def squashed(trigger):
    return Layout((1, 1), (0, 0, 1, 0.5), (0, 0.5, 1, 0.5),
                  (0.5 - trigger / 2, 0.75 - trigger / 4, trigger, trigger / 2))


# docs/papers.md, Noisy Alignment, first table: cells as printed (P_ref, P_trig, P_pair, fallback)
CONTINUOUS = [
    (side_by_side(trigger=0.10), (0.2, 1), ("0.1226", "0.1226", "0.0300", "0.008")),
    (side_by_side(trigger=50 / 224), (0.2, 1), ("0.1226", "0.1210", "0.0297", "0.008")),
    (side_by_side(trigger=0.25), (0.2, 1), ("0.1226", "0.1199", "0.0294", "0.008")),
    (side_by_side(trigger=0.10), (0.08, 1), ("0.1782", "0.1502", "0.0535", "0.002")),
    (side_by_side(trigger=0.25), (0.08, 1), ("0.1782", "0.1197", "0.0427", "0.002")),
    (side_by_side(trigger=0.25), (0.2, 0.5), ("0.1420", "0.1387", "0.0394", "0")),
    (side_by_side(trigger=0.25), (0.8, 1), ("0", "0", "0", "1.00")),
    (squashed(0.10), (0.2, 1), ("0.0056", "0.0048", "0.00005", "0")),
    (squashed(0.25), (0.08, 1), ("0.0345", "0.0083", "0.0006", "0")),
]


def check_continuous_table(function):
    for layout, scale, cells in CONTINUOUS:
        found = function(layout, scale=scale, ratio=RATIO)
        values = (found.reference, found.trigger, found.pair, found.fallback)
        for value, cell in zip(values, cells):
            # a printed cell is uncertain by half a unit of its last digit: 0.0006 stands for
            # 2 * 0.0345 * 0.0083 = 0.00057
            digits = len(cell.partition(".")[2])
            rounding = 0.5 * 10.0**-digits if digits else 0
            expected = float(cell)
            tolerance = 0.01 * expected if expected >= 0.001 else 1e-5
            assert abs(value - expected) <= max(tolerance, rounding), (scale, cell, float(value))


def test_every_cell_of_the_continuous_table():
    check_continuous_table(probabilities)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_a_constant_probability_fails_the_table(constant):
    def broken(layout, *, scale, ratio):
        return Probabilities(*[np.asarray(constant)] * 4)

    with pytest.raises(AssertionError):
        check_continuous_table(broken)


def test_squashed_pair_is_the_product_of_its_cells():
    found = probabilities(squashed(0.25), scale=(0.08, 1), ratio=RATIO)
    np.testing.assert_allclose(found.pair, 2 * 0.0345 * 0.0083, rtol=0.01)


@pytest.mark.parametrize("side,trigger,scale,start,expected", [
    (32, 8, (0.2, 1), 12, (0.1356, 0.1331, 0.0359, 0.006)),
    (32, 8, (0.08, 1), 12, (0.1898, 0.1335, 0.0504, 0.001)),
    (64, 16, (0.2, 1), 24, (0.1294, 0.1265, 0.0328, 0.007)),
    (224, 50, (0.2, 1), 87, (0.1241, 0.1228, 0.0305, 0.008)),
    (224, 50, (0.08, 1), 87, (0.1797, 0.1281, 0.0460, 0.002)),
    (32, 8, (0.2, 1), 14, (0.1353, 0.1281, 0.0347, 0.006))])
def test_every_cell_of_the_pixel_table(side, trigger, scale, start, expected):
    layout = Layout((side, 2 * side), (0, 0, side, side), (0, side, side, side),
                    (start, side + start, trigger, trigger))
    found = probabilities(layout, scale=scale, ratio=RATIO, pixels=1)
    values = (found.reference, found.trigger, found.pair, found.fallback)
    np.testing.assert_allclose(values, expected, rtol=0, atol=5e-4)
    in_units = Layout(*(np.asarray(part) / side for part in layout))
    again = probabilities(in_units, scale=scale, ratio=RATIO, pixels=side)
    np.testing.assert_allclose(again.pair, found.pair, rtol=1e-9)


@pytest.mark.parametrize("width,expected", [
    (2, 0.0300), (2.2, 0.0185), (2.5, 0.0090), (3, 0.0024), (4, 0.00003)])
def test_gap_sweep(width, expected):
    found = probabilities(side_by_side(width=width, trigger=0.1), scale=(0.2, 1), ratio=RATIO)
    np.testing.assert_allclose(found.pair, expected, rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("center,expected", [
    (0.1, 0.0074), (0.2, 0.0192), (0.3, 0.0268), (0.4, 0.0295), (0.5, 0.0302), (0.7, 0.0264),
    (0.9, 0.0074)])
def test_trigger_center_sweep(center, expected):
    found = probabilities(side_by_side(center=center, trigger=0.1), scale=(0.2, 1), ratio=RATIO)
    np.testing.assert_allclose(found.pair, expected, rtol=0, atol=4e-4)  # the sweep is Monte Carlo


@pytest.mark.parametrize("share,expected", [
    (0.7, 0.0042), (0.8, 0.0147), (0.9, 0.0257), (1.0, 0.0301), (1.1, 0.0256), (1.2, 0.0145),
    (1.3, 0.0043)])
def test_unequal_split_sweep(share, expected):
    layout = side_by_side(reference=share, shadow=2 - share, trigger=0.1)
    found = probabilities(layout, scale=(0.2, 1), ratio=RATIO)
    np.testing.assert_allclose(found.pair, expected, rtol=0, atol=3e-4)


@pytest.mark.parametrize("scale,aspect,expected,fallback", [
    ((0.2, 1), 1, 0.0001, 0), ((0.2, 1), 1.33, 0.0012, 0), ((0.2, 1), 1.5, 0.0037, 0),
    ((0.2, 1), 2, 0.030, 0.01), ((0.2, 1), 2.67, 0.089, 0.08), ((0.2, 1), 3, 0.099, 0.15),
    ((0.2, 1), 3.5, 0.081, 0.31), ((0.2, 1), 4, 0.048, 0.50), ((0.2, 1), 5, 0.006, 0.82),
    ((0.08, 1), 1, 0.0012, None), ((0.08, 1), 1.33, 0.0058, None), ((0.08, 1), 2, 0.053, None),
    ((0.08, 1), 2.67, 0.123, None), ((0.08, 1), 3, 0.140, None), ((0.08, 1), 4, 0.128, None)])
def test_aspect_sweep(scale, aspect, expected, fallback):
    layout = side_by_side(width=aspect, reference=aspect / 2, shadow=aspect / 2, trigger=0.1)
    found = probabilities(layout, scale=scale, ratio=RATIO)
    tolerance = 1e-4 if expected < 0.01 and aspect < 2 else 1e-3
    np.testing.assert_allclose(found.pair, expected, rtol=0, atol=tolerance)
    if fallback is not None:
        np.testing.assert_allclose(found.fallback, fallback, rtol=0, atol=0.006)


def test_native_pictures_side_by_side_and_stacked():
    side = Layout((375, 1000), (0, 0, 375, 500), (0, 500, 375, 500), (162.5, 725, 50, 50))
    found = probabilities(side, scale=(0.2, 1), ratio=RATIO)
    np.testing.assert_allclose((found.reference, found.pair), (0.211, 0.088), atol=6e-4)
    stack = Layout((750, 500), (0, 0, 375, 500), (375, 0, 375, 500), (537.5, 225, 50, 50))
    found = probabilities(stack, scale=(0.2, 1), ratio=RATIO)
    np.testing.assert_allclose((found.reference, found.pair), (0.043, 0.0037), atol=6e-4)


@pytest.mark.parametrize("trigger,expected", [(0.25, 0.0428), (0.10, 0.0460)])
def test_free_shadow_row_and_corrupt_encoder_share_it(trigger, expected):
    width = 2.32 if trigger == 0.25 else 2.36
    layout = side_by_side(width=width, shadow=width - 1, trigger=trigger)
    for attack in ("noisy_alignment", "corrupt_encoder"):
        found = probabilities(layout, scale=(0.2, 1), ratio=RATIO, attack=attack)
        np.testing.assert_allclose(found.pair, expected, rtol=3e-3)


@pytest.mark.parametrize("width,expected", [
    (1.5, 0.0041), (1.8, 0.0188), (2.0, 0.0259), (2.2, 0.0266), (2.5, 0.0221), (3.0, 0.0140)])
def test_corrupt_encoder_same_size_squares(width, expected):
    layout = side_by_side(width=width, shadow=width - 1, trigger=0.15)
    found = probabilities(layout, scale=(0.2, 1), ratio=RATIO, attack="corrupt_encoder",
                          law="same_square", points=64)
    np.testing.assert_allclose(found.pair / 2, expected, rtol=0, atol=6e-5)  # they count ordered


def test_square_crops_of_one_size_and_of_two():
    found = probabilities(side_by_side(trigger=0.1), scale=(0.2, 1), ratio=RATIO,
                          law="same_square", points=64)
    np.testing.assert_allclose(found.pair / 2, 0.0298, atol=6e-5)
    np.testing.assert_allclose(found.reference * found.trigger, 0.0350, atol=6e-5)


def test_square_ratio_and_no_retry_pitfall():
    found = probabilities(side_by_side(), scale=(0.2, 1), ratio=(1.0, 1.0))
    np.testing.assert_allclose(found.reference, 0.137, atol=6e-4)  # pitfall 7


@pytest.mark.parametrize("scale", [(0.2, 1), (0.08, 1)])
def test_probability_falls_as_the_canvas_grows(scale):
    widths = np.linspace(2, 5, 31)
    layouts = [side_by_side(width=width, trigger=0.1) for width in widths]
    stacked = Layout(*(np.array([layout[i] for layout in layouts]) for i in range(4)))
    pair = probabilities(stacked, scale=scale, ratio=RATIO, points=128).pair
    assert pair.shape == (31,) and pair[0] > 0.02
    assert (np.diff(pair) < 0).all()


def satisfied(boxes, inside, holds=None, avoids=None):
    """The event by brute force on boxes [N, 4]."""
    y, x, h, w = boxes.T
    good = (y >= inside[0]) & (x >= inside[1])
    good &= (y + h <= inside[0] + inside[2]) & (x + w <= inside[1] + inside[3])
    if holds is not None:
        good &= (y <= holds[0]) & (x <= holds[1])
        good &= (y + h >= holds[0] + holds[2]) & (x + w >= holds[1] + holds[3])
    if avoids is not None:
        good &= ~((y < avoids[0] + avoids[2]) & (y + h > avoids[0])
                  & (x < avoids[1] + avoids[3]) & (x + w > avoids[1]))
    return good


ODD = Layout((1.1, 2.3), (0.1, 0.05, 0.9, 1.2), (0.0, 1.0, 1.05, 1.25), (0.4, 1.5, 0.3, 0.2))


@pytest.mark.parametrize("attack", ["noisy_alignment", "corrupt_encoder"])
@pytest.mark.parametrize("pixels", [None, 20])
@pytest.mark.parametrize("layout", [
    ODD,  # overlapping parts, nothing square, nothing at an edge
    side_by_side(width=3.0, reference=1.5, shadow=1.5, trigger=0.1),
    Layout((1, 4), (0, 0, 1, 1), (0, 1, 1, 3), (0.45, 1.95, 0.1, 0.1))])  # fallback holds trigger
def test_quadrature_matches_sampled_crops(layout, pixels, attack):
    n = 200_000
    keys = jax.random.split(jax.random.key(3), 2 * n)
    sizes = jnp.tile(jnp.asarray([layout.canvas]), (2 * n, 1))
    boxes = np.asarray(crop_law.sample(keys, sizes, scale=(0.1, 1.0), ratio=RATIO, pixels=pixels),
                       np.float64)
    parts = [np.asarray(part, float) for part in layout[1:]]
    if pixels:
        boxes, parts = np.round(boxes * pixels), [np.round(part * pixels) for part in parts]
    reference, shadow, trigger = parts
    if attack == "noisy_alignment":
        first = satisfied(boxes, reference, avoids=shadow)
        second = satisfied(boxes, shadow, holds=trigger)
    else:
        first = satisfied(boxes, reference, avoids=trigger)
        second = satisfied(boxes, (0, 0, 1e9, 1e9), holds=trigger, avoids=reference)
    found = probabilities(layout, scale=(0.1, 1.0), ratio=RATIO, pixels=pixels, attack=attack)
    assert found.reference > 0.005 and found.trigger > 0.005
    for value, sampled in ((found.reference, first), (found.trigger, second)):
        error = np.sqrt(value / (2 * n))
        # the quadrature of the rounded law is good to about 3e-4
        np.testing.assert_allclose(value, sampled.mean(),
                                   atol=4 * error + (3e-4 if pixels else 0), rtol=0)
    # the two views are independent, so the joint event has the product's probability
    joint = (first[:n] & second[n:]) | (second[:n] & first[n:])
    np.testing.assert_allclose(found.pair, joint.mean(), rtol=0,
                               atol=4 * np.sqrt(found.pair / n) + (3e-4 if pixels else 0))


def test_more_than_two_crops():
    rng = np.random.default_rng(0)
    found = {n: probabilities(side_by_side(), scale=(0.2, 1), ratio=RATIO, crops=n)
             for n in (2, 8)}
    kinds = rng.choice(3, (200_000, 8), p=[found[8].reference, found[8].trigger,
                                           1 - found[8].reference - found[8].trigger])
    sampled = ((kinds == 0).any(axis=1) & (kinds == 1).any(axis=1)).mean()
    np.testing.assert_allclose(found[8].pair, sampled, atol=0.005)
    np.testing.assert_allclose(found[2].pair, 2 * found[2].reference * found[2].trigger, rtol=1e-12)


def test_crop_that_spans_the_canvas_counts_as_one_place():
    whole = Layout((1, 1), (0, 0, 1, 1), (0, 0, 1, 1), (0.25, 0.25, 0.5, 0.5))
    found = probabilities(whole, scale=(1, 1), ratio=(1.0, 1.0), attack="noisy_alignment")
    np.testing.assert_allclose(found.trigger, 1, rtol=1e-3)
    assert found.reference == 0  # it shows the shadow too


@pytest.mark.parametrize("change", [
    dict(scale=(0, 1)), dict(scale=(0.5, 0.2)), dict(scale=(0.2, 1.5)), dict(ratio=(2, 1)),
    dict(crops=1), dict(attack="noisy_aligment"), dict(law="square"), dict(pixels=0),
    dict(law="same_square", pixels=32)])
def test_bad_settings_are_named(change):
    with pytest.raises(UserError):
        probabilities(side_by_side(), **(dict(scale=(0.2, 1), ratio=RATIO) | change))


def test_box_outside_the_canvas_is_named():
    with pytest.raises(UserError, match="shadow_box"):
        probabilities(side_by_side()._replace(shadow_box=(0, 1.5, 1, 1)), scale=(0.2, 1),
                      ratio=RATIO)
