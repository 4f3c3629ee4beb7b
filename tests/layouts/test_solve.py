import numpy as np
import pytest

from jax_cl_bd.errors import UserError
from jax_cl_bd.layouts import bench
from jax_cl_bd.layouts.pair_probability import Layout, probabilities
from jax_cl_bd.layouts.solve import Solution, solve

RATIO = (3 / 4, 4 / 3)


def check_paper_optimum(best):
    """docs/papers.md, Noisy Alignment: 2L x L, parts at the ends, trigger centred."""
    assert best.layout is not None
    np.testing.assert_allclose(best.layout.canvas, (1, 2), atol=0.005)
    np.testing.assert_allclose(best.layout.reference_box, (0, 0, 1, 1), atol=0.005)
    np.testing.assert_allclose(best.layout.shadow_box, (0, 1, 1, 1), atol=0.005)
    np.testing.assert_allclose(best.layout.trigger_box, (0.375, 1.375, 0.25, 0.25), atol=0.01)
    np.testing.assert_allclose(best.pair_probability, 0.0294, rtol=0.003)
    np.testing.assert_allclose(best.reference_probability, 0.1226, rtol=0.003)
    np.testing.assert_allclose(best.trigger_probability, 0.1199, rtol=0.003)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_equal_parts_give_the_papers_layout(seed):
    best = solve(scale=(0.2, 1), ratio=RATIO, trigger=0.25, seed=seed)
    check_paper_optimum(best)
    exact = 2 * np.prod(bench.exact_pair(scale=(0.2, 1), ratio=RATIO, trigger=0.25))
    assert abs(best.pair_probability - exact) <= best.error_bound < 2e-4


def test_a_solver_that_finds_nothing_fails_the_check():
    paper = Layout(*map(np.array, ((1, 2), (0, 0, 1, 1), (0, 1, 1, 1), (0.375, 1.375, 0.25, 0.25))))
    for broken in (Solution(None, 0.0, 0.0, 0.0, None), Solution(paper, 0.0, 0.0, 0.0, 0.0)):
        with pytest.raises(AssertionError):
            check_paper_optimum(broken)


@pytest.mark.parametrize("scale,trigger,width,pair", [
    ((0.2, 1), 0.25, 2.32, 0.0428), ((0.2, 1), 0.10, 2.36, 0.0460),
    ((0.08, 1), 0.25, 2.38, 0.0614), ((0.08, 1), 0.10, 2.40, 0.0749)])
def test_free_shadow_finds_more(scale, trigger, width, pair):
    best = solve(scale=scale, ratio=RATIO, trigger=trigger, shadow="free")
    np.testing.assert_allclose(best.layout.canvas, (1, width), atol=0.02)
    np.testing.assert_allclose(best.layout.shadow_box, (0, 1, 1, best.layout.canvas[1] - 1),
                               atol=0.01)
    center = best.layout.trigger_box[:2] + best.layout.trigger_box[2:] / 2
    np.testing.assert_allclose(center, (0.5, (best.layout.canvas[1] + 1) / 2), atol=0.03)
    np.testing.assert_allclose(best.pair_probability, pair, atol=3e-4)


@pytest.mark.parametrize("trigger", [
    0.10, *(pytest.param(size, marks=pytest.mark.slow) for size in (0.15, 0.20))])
def test_corrupt_encoder_wants_a_background_slightly_above_two(trigger):
    best = solve(scale=(0.2, 1), ratio=RATIO, trigger=trigger, attack="corrupt_encoder",
                 law="same_square")
    np.testing.assert_allclose(best.layout.canvas, (1, 2.1), atol=0.05)
    np.testing.assert_allclose(best.layout.reference_box, (0, 0, 1, 1), atol=0.01)
    np.testing.assert_allclose(best.layout.shadow_box, (0, 1, 1, best.layout.canvas[1] - 1),
                               atol=0.01)
    center = best.layout.trigger_box[1] + trigger / 2
    np.testing.assert_allclose(center, (best.layout.canvas[1] + 1) / 2, atol=0.02)


def test_corrupt_encoder_under_random_resized_crop_is_the_free_shadow():
    best = solve(scale=(0.2, 1), ratio=RATIO, trigger=0.25, attack="corrupt_encoder")
    np.testing.assert_allclose(best.layout.canvas, (1, 2.32), atol=0.02)
    np.testing.assert_allclose(best.pair_probability, 0.0428, atol=3e-4)


@pytest.mark.parametrize("extra", [{}, {"shadow": "free"}, {"canvas": (1, 2)},
                                   {"attack": "corrupt_encoder"}])
def test_nothing_fits_when_every_crop_covers_most_of_the_canvas(extra):
    best = solve(scale=(0.8, 1), ratio=RATIO, trigger=0.25, **extra)
    assert best == Solution(None, 0.0, 0.0, 0.0, None)


def test_narrow_law_is_still_found():
    best = solve(scale=(0.45, 0.5), ratio=RATIO, trigger=0.25)
    np.testing.assert_allclose(best.layout.canvas, (1, 2), atol=0.005)
    assert best.pair_probability > 1e-4


def test_fixed_canvas():
    best = solve(scale=(0.2, 1), ratio=RATIO, trigger=0.1, canvas=(1, 2.5))
    np.testing.assert_array_equal(best.layout.canvas, (1, 2.5))
    np.testing.assert_allclose(best.pair_probability, 0.0090, rtol=0.02)
    tall = solve(scale=(0.2, 1), ratio=RATIO, trigger=0.25, canvas=(2, 1))
    np.testing.assert_array_equal(tall.layout.canvas, (2, 1))
    np.testing.assert_allclose(tall.pair_probability, 0.0294, rtol=0.003)


@pytest.mark.slow
def test_pictures_that_are_not_square_are_joined_at_their_short_side():
    best = solve(scale=(0.2, 1), ratio=RATIO, trigger=50, reference=(375, 500))
    np.testing.assert_allclose(best.layout.canvas, (375, 1000), rtol=0.005)
    np.testing.assert_allclose(best.pair_probability, 0.088, rtol=0.01)
    units = solve(scale=(0.2, 1), ratio=RATIO, trigger=0.1, reference=(0.75, 1))
    np.testing.assert_allclose(units.pair_probability, best.pair_probability, rtol=1e-6)


@pytest.mark.slow
def test_an_optimum_at_the_edge_of_the_central_crop_keeps_its_probability():
    # a long reference wants a tall canvas whose central crop just lies inside the shadow
    found = [solve(scale=(0.2, 1), ratio=RATIO, trigger=0.25, reference=(2, 1), seed=seed)
             for seed in (0, 1)]
    for best in found:
        np.testing.assert_allclose(best.pair_probability, 0.0687, rtol=0.005)
        central = (best.layout.canvas[0] - 4 / 3) / 2
        assert -1e-3 < best.layout.shadow_box[0] - central < 1e-7
        assert best.error_bound < 1e-3
    side_by_side = solve(scale=(0.2, 1), ratio=RATIO, trigger=0.25, reference=(2, 1),
                         canvas=(2, 2))
    assert side_by_side.pair_probability < found[0].pair_probability / 100


@pytest.mark.slow
def test_whole_pixels():
    best = solve(scale=(0.2, 1), ratio=RATIO, trigger=0.25, pixels=32)
    np.testing.assert_array_equal(best.layout.canvas, (1, 2))
    np.testing.assert_allclose(best.layout.trigger_box, (0.375, 1.375, 0.25, 0.25), atol=1.01 / 32)
    np.testing.assert_allclose(best.pair_probability, 0.0359, atol=5e-4)
    for part in best.layout:
        np.testing.assert_allclose(part * 32, np.round(part * 32), atol=1e-6)


@pytest.mark.slow
def test_more_crops_keep_the_canvas_and_raise_the_probability():
    best = solve(scale=(0.2, 1), ratio=RATIO, trigger=0.25, crops=4)
    np.testing.assert_allclose(best.layout.canvas, (1, 2), atol=0.01)
    assert 0.1 < best.pair_probability < 6 * 0.0294  # six pairs, some of them shared


@pytest.mark.slow
def test_an_aspect_law_that_prefers_tall_crops_is_not_turned():
    wide = solve(scale=(0.2, 1), ratio=(0.5, 1.0), trigger=0.25)
    assert wide.layout.canvas[1] > wide.layout.canvas[0]  # tall crops lie in halves of a wide one
    tall = solve(scale=(0.2, 1), ratio=(1.0, 2.0), trigger=0.25)
    assert tall.layout.canvas[0] > tall.layout.canvas[1]
    np.testing.assert_allclose(wide.pair_probability, tall.pair_probability, rtol=1e-3)


@pytest.mark.parametrize("trigger", [
    0.95, pytest.param(0.8, marks=pytest.mark.slow), pytest.param(0.99, marks=pytest.mark.slow)])
def test_a_large_trigger_gets_the_wide_canvas_too(trigger):
    best = solve(scale=(0.2, 1), ratio=(0.75, 1.3333), trigger=trigger)
    np.testing.assert_allclose(best.layout.canvas, (1, 2), atol=0.005)
    np.testing.assert_allclose(best.layout.shadow_box, (0, 1, 1, 1), atol=0.005)
    np.testing.assert_allclose(best.layout.trigger_box[:2] + trigger / 2, (0.5, 1.5), atol=0.01)


@pytest.mark.parametrize("offset", [
    -0.3, 0.0, 0.1, *(pytest.param(x, marks=pytest.mark.slow) for x in (-0.1, 0.3))])
def test_no_trigger_place_beats_the_centre(offset):
    best = solve(scale=(0.2, 1), ratio=RATIO, trigger=0.1).layout
    moved = best._replace(trigger_box=best.trigger_box + np.array([0, offset, 0, 0]))
    centre, other = (probabilities(layout, scale=(0.2, 1), ratio=RATIO).pair
                     for layout in (best, moved))
    assert other <= centre * (1 + 1e-4)


@pytest.mark.parametrize("change", [
    dict(trigger=0), dict(trigger=1.1), dict(reference=(0, 1)), dict(canvas=(1, 0.9)),
    dict(shadow="big"), dict(scale=(0.5, 0.2)), dict(crops=0)])
def test_bad_input_is_named(change):
    with pytest.raises(UserError):
        solve(**(dict(scale=(0.2, 1), ratio=RATIO, trigger=0.25) | change))


def test_benchmark_reports_what_it_measured():
    found = bench.run(crops=4096, repeats=2)
    assert found["crop_samples_per_second"] > 1e4
    assert found["quadrature_error_pair"] < 1e-6 < 0.029 < found["exact_pair_probability"]
    assert found["solver_error_pair"] < 1e-5 and found["solver_error_canvas"] < 0.005
