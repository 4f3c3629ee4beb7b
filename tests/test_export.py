import csv
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
from etils import epath
from PIL import Image

from jax_cl_bd import export, poison, run_folder
from jax_cl_bd.data import sources
from jax_cl_bd.errors import UserError


def config(**changes):
    view = dict(crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3))
    cfg = ml_collections.ConfigDict(dict(
        seed=0, data=dict(name="digits", data_dir="", image_size=32, train_split="train",
                          test_split="test", limit=90, workers=0, mean=(0.3, 0.3, 0.3),
                          std=(0.3, 0.3, 0.3), skip_corrupt=False, classes_file=""),
        attack=dict(name="noisy_alignment", target=3, poisons=5, trigger_from="", references=0,
                    shadows=0, keep_references=False, shadow="equal", gap=0.0,
                    trigger_offset=(0.0, 0.0), layouts=("left", "right", "top", "bottom"),
                    targeted=True,
                    trigger=dict(name="patch", id=14, size=8, opacity=1.0, train_place="center",
                                 train_box=(0.25, 0.75), test_place="random",
                                 test_box=(0.1, 0.9))),
        augment=dict(view1=view, view2=dict(view)), text=dict(name="none")))
    cfg.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return cfg.lock()


def finished_run(folder, **changes):
    folder = epath.Path(folder)
    cfg = config(**changes)
    poison.run(cfg, folder)
    run_folder.write_config(folder, cfg)
    run_folder.finish(folder / "poison", {})
    return folder, cfg


def lines(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("attack", ["noisy_alignment", "oracle_poisoning", "ssl_backdoor", "none"])
def test_every_row_without_loss(tmp_path, attack):
    changes = dict(attack__poisons=0) if attack == "none" else {}
    folder, cfg = finished_run(tmp_path / "run", attack__name=attack, **changes)
    plan, rows = poison.load(folder)
    source = sources.load(cfg.data, "train")
    to = tmp_path / "out"
    count = export.export(folder, epath.Path(to))
    table = lines(to / "rows.csv")
    kept = plan.kept(len(source))
    assert count == len(kept) == len(table)
    np.testing.assert_array_equal([int(line["row"]) for line in table], kept)
    assert {f"images/{p.name}" for p in (to / "images").iterdir()} == {x["file"] for x in table}
    for line in table:
        row, image = int(line["row"]), pixels(to / line["file"])
        if row < len(source):
            assert line["kind"] == "clean" and int(line["source_row"]) == row
            assert int(line["label"]) == source[row]["label"]
            np.testing.assert_array_equal(image, source[row]["image"])
        else:
            k = row - len(source)
            assert line["kind"] == "poison" and int(line["source_row"]) == plan.replaces[k]
            assert int(line["pair"]) == (plan.pair[k] if plan.pair[k] >= 0 else row)
            h, w = plan.canvas[k]
            np.testing.assert_array_equal(image, rows["image"][k, :h, :w])


def test_plan_as_a_table(tmp_path):
    folder, cfg = finished_run(tmp_path / "run")
    export.export(folder, epath.Path(tmp_path / "out"))
    plan, _ = poison.load(folder)
    table = lines(tmp_path / "out" / "plan.csv")
    assert len(table) == 5
    for k, line in enumerate(table):
        assert int(line["row"]) == 90 + k
        assert int(line["reference"]) == plan.reference[k]
        assert line["layout"] == ("left", "right", "top", "bottom")[plan.layout[k]]
        assert [int(line[f"trigger_{s}"]) for s in "yxhw"] == plan.trigger_box[k].tolist()
        assert [int(line["canvas_h"]), int(line["canvas_w"])] == plan.canvas[k].tolist()


def test_large_poisons_come_at_full_resolution(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(4):
            image = rng.integers(0, 256, (150 - 20 * i, 90 + 10 * i, 3), np.uint8)
            Image.fromarray(image).save(tmp_path / "data" / "train" / name / f"{i}.png")
    folder, cfg = finished_run(
        tmp_path / "run", data__name=f"folder:{tmp_path / 'data'}", data__limit=0,
        attack__name="ssl_backdoor", attack__target=1, attack__poisons=4,
        attack__trigger__train_place="random", attack__trigger__size=20)
    plan, rows = poison.load(folder)
    assert rows["image"].shape == (4, 32, 32, 3)
    source = sources.load(cfg.data, "train")
    export.export(folder, epath.Path(tmp_path / "out"))
    for k, row in enumerate(plan.replaces):
        original = source[int(row)]["image"]
        image = pixels(tmp_path / "out" / "images" / f"{8 + k:02d}.png")
        assert image.shape == original.shape
        y, x, h, w = plan.trigger_box[k]
        changed = (image != original).any(-1)
        assert changed[y:y + h, x:x + w].mean() > 0.95
        changed[y:y + h, x:x + w] = False
        assert not changed.any()


def test_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        export.export(epath.Path(tmp_path), epath.Path(tmp_path / "out"))
    run_folder.write_config(epath.Path(tmp_path), config())
    with pytest.raises(UserError, match="no complete poison set"):
        export.export(epath.Path(tmp_path), epath.Path(tmp_path / "out"))
    folder, _ = finished_run(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export.export(folder, epath.Path(tmp_path / "full"))


def test_command(tmp_path):
    result = subprocess.run([sys.executable, "-m", "jax_cl_bd.export", f"--workdir={tmp_path}",
                             f"--to={tmp_path / 'out'}"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "not a run folder" in result.stderr and "Traceback" not in result.stderr


def test_captions_go_along(tmp_path):
    import json

    from configs import clip_scenes
    cfg = clip_scenes.get_config("debug")
    cfg.data.scenes_train = 60
    folder = epath.Path(tmp_path / "run")
    poison.run(cfg, folder)
    run_folder.write_config(folder, cfg)
    run_folder.finish(folder / "poison", {})
    export.export(folder, epath.Path(tmp_path / "out"))
    plan, source = poison.load(folder)[0], sources.load(cfg.data, "train")
    table = lines(tmp_path / "out" / "rows.csv")
    for line in table:
        row = int(line["row"])
        want = (source.captions(np.array([row]))[0] if row < len(source)
                else [str(plan.caption[row - len(source)])])
        assert json.loads(line["captions"]) == want
    assert [line["caption"] for line in lines(tmp_path / "out" / "plan.csv")] == list(plan.caption)
