import json
import time

import matplotlib.image
import pytest

from jax_cl_bd.layouts.__main__ import main
from jax_cl_bd.layouts.draw import layout_figure
from jax_cl_bd.layouts.pair_probability import Layout


def test_json_is_one_object_with_the_papers_layout(capsys):
    start = time.perf_counter()
    assert main("--scale 0.2 1 --ratio 0.75 1.3333 --trigger 0.25 --json".split()) == 0
    assert time.perf_counter() - start < 30  # about 3 s on two free cores
    found = json.loads(capsys.readouterr().out)
    assert found["canvas"] == pytest.approx([1, 2], abs=0.005)
    assert found["reference_box"] == pytest.approx([0, 0, 1, 1], abs=0.005)
    assert found["shadow_box"] == pytest.approx([0, 1, 1, 1], abs=0.005)
    assert found["trigger_box"] == pytest.approx([0.375, 1.375, 0.25, 0.25], abs=0.01)
    assert found["pair_probability"] == pytest.approx(0.0294, abs=1e-4)
    assert found["pair_probability"] == pytest.approx(
        2 * found["reference_probability"] * found["trigger_probability"])
    assert 0 < found["error_bound"] < 2e-4


def test_table_and_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("--attack corrupt_encoder --trigger 0.15".split()) == 0
    text = capsys.readouterr().out
    assert "pair_probability" in text and "layout.png" in text and "shadow_box" in text
    assert "no global guarantee" in text
    picture = matplotlib.image.imread(tmp_path / "layout.png")[..., :3]
    assert picture.shape[1] > 600 and picture.shape[1] > picture.shape[0]
    red = (picture[..., 0] > 0.6) & (picture[..., 1] < 0.4)
    assert 0.002 < red.mean() < 0.02  # the trigger is 0.15^2 / 2.1 of the canvas


def test_json_draws_only_on_request(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = "--attack corrupt_encoder --trigger 0.15 --json".split()
    assert main(arguments) == 0 and not list(tmp_path.iterdir())
    assert main([*arguments, "--picture", "here.png"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["here.png"]
    capsys.readouterr()


def test_a_hopeless_law_is_said_clearly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("--scale 0.8 1 --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pair_probability"] == 0 and found["canvas"] is None
    assert "no layout" in found["message"] and found["error_bound"] is None
    assert main("--scale 0.8 1".split()) == 0
    assert "no layout" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [
    "--scale 0 1", "--scale 0.5 0.2", "--scale x 1", "--ratio 2 1", "--trigger 2", "--trigger 0",
    "--canvas 1 0.5", "--attack noisy", "--shadow half", "--crops 1", "--pixels 0", "--nonsense",
    "--reference 0 1", "--attack corrupt_encoder --shadow free", "--trigger nan",
    "--scale nan 1", "--canvas inf 1", "--pixels nan"])
def test_bad_input_is_one_line_and_status_2(arguments, capsys):
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_a_picture_that_cannot_be_written_is_named(tmp_path, capsys):
    path = tmp_path / "missing" / "a.png"
    assert main(["--json", "--picture", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_the_picture_says_what_its_error_is():
    layout = Layout((1, 2), (0, 0, 1, 1), (0, 1, 1, 1), (0.375, 1.375, 0.25, 0.25))
    for bound, expected in ((9e-5, "0.02938 (numerical error about 9e-05), canvas"),
                            (None, "0.02938, canvas")):
        assert expected in layout_figure(layout, 0.02938, error_bound=bound).get_suptitle()
