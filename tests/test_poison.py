import io
import json
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from matplotlib import colors
from PIL import Image

from jax_cl_bd import evaluate, poison, preview
from jax_cl_bd.data import sources
from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import htba

FILES = ("plan.npz", "images.array_record", "trigger/params.npz", "summary.json", "preview.png")


def config(**changes):
    view = dict(crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3))
    cfg = ml_collections.ConfigDict(dict(
        seed=0, data=dict(name="digits", data_dir="", image_size=32, train_split="train",
                          test_split="test", limit=0, workers=0, mean=(0.3, 0.3, 0.3),
                          std=(0.3, 0.3, 0.3), skip_corrupt=False, classes_file=""),
        attack=dict(name="noisy_alignment", target=3, poisons=70, trigger_from="", references=0,
                    shadows=10, keep_references=False, shadow="equal", gap=0.0,
                    trigger_offset=(0.0, 0.0), layouts=("left", "right", "top", "bottom"),
                    targeted=True,
                    trigger=dict(name="patch", id=14, size=8, opacity=1.0, train_place="center",
                                 train_box=(0.25, 0.75), test_place="random",
                                 test_box=(0.1, 0.9))),
        augment=dict(view1=view, view2=dict(view)), text=dict(name="none")))
    cfg.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return cfg.lock()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("run"))
    poison.run(config(), folder)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    for name in FILES:
        (tmp_path / "poison" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "poison" / name).write_bytes((made / "poison" / name).read_bytes())
    return epath.Path(tmp_path)


def test_writes_what_the_design_names_and_nothing_else(made):
    found = {str(p.relative_to(Path(made / "poison"))) for p in Path(made / "poison").rglob("*")
             if not p.is_dir()}
    assert found == set(FILES)


def test_load_gives_back_what_was_rendered(made):
    plan, rows = poison.load(made)
    assert rows["image"].shape == (70, 64, 64, 3) and rows["image"].dtype == np.uint8
    np.testing.assert_array_equal(rows["size"], plan.canvas)
    np.testing.assert_array_equal(rows["extent"], plan.canvas)
    source = sources.load(config().data, "train")
    for k in range(70):
        y, x, h, w = plan.reference_box[k]
        np.testing.assert_array_equal(rows["image"][k, y:y + h, x:x + w],
                                      source[plan.reference[k]]["image"])
    # One PNG of the filled part per poison, without loss.
    reader = ArrayRecordReader(str(made / "poison" / "images.array_record"))
    image = np.asarray(Image.open(io.BytesIO(reader.read([5])[0])))
    reader.close()
    np.testing.assert_array_equal(image, rows["image"][5][:image.shape[0], :image.shape[1]])
    np.testing.assert_array_equal(image.shape[:2], plan.canvas[5])


def test_same_config_same_bytes_other_seed_other_plan(made, tmp_path):
    again, other = epath.Path(tmp_path / "again"), epath.Path(tmp_path / "other")
    poison.run(config(), again)
    poison.run(config(seed=1), other)
    for name in FILES:
        assert (again / "poison" / name).read_bytes() == (made / "poison" / name).read_bytes(), name
    assert (poison.load(other)[0].reference != poison.load(made)[0].reference).any()


def test_summary_of_noisy_alignment(made):
    summary = json.loads((made / "poison" / "summary.json").read_text())
    labels = sources.table(sources.load(config().data, "train")).labels
    plan, _ = poison.load(made)
    of_target = int((labels == 3).sum())
    assert summary["poisons"] == summary["added"] == 70 and summary["replaced"] == 0
    assert summary["removed"] == summary["unique_references"] == len(set(plan.reference)) == 70
    assert summary["source_rows"] == len(labels) == summary["rows"]
    assert summary["rate_of_dataset"] == pytest.approx(70 / len(labels))
    assert summary["rate_of_target_class"] == pytest.approx(70 / of_target)
    assert summary["clean_target_images_left"] == of_target - 70
    assert summary["unique_references_by_class"] == {"3": 70}
    shadows = np.unique(plan.shadow)
    assert summary["unique_shadows"] == len(shadows) == 10
    assert summary["unique_shadows_by_class"] == {
        str(c): int((labels[shadows] == c).sum()) for c in np.unique(labels[shadows])}
    assert sum(summary["layouts"].values()) == 70 and min(summary["layouts"].values()) > 0
    assert summary["stored_side"] == 64 and summary["canvas"]["largest"] == [64, 64]
    assert summary["target_class"] == "3"
    trigger = summary["trigger"]
    assert (trigger["id"], trigger["size"], trigger["opacity"]) == (14, 8, 1.0)
    assert trigger["train_place"] == "center"


def test_summary_of_a_replacing_attack(tmp_path):
    cfg = config(attack__name="ssl_backdoor", attack__trigger__train_place="random")
    poison.run(cfg, epath.Path(tmp_path))
    summary = json.loads((tmp_path / "poison" / "summary.json").read_text())
    assert (summary["added"], summary["replaced"], summary["removed"]) == (0, 70, 0)
    assert summary["rows"] == summary["source_rows"]
    assert summary["clean_target_images_left"] == summary["target_images"] - 70
    assert summary["unique_replaced_by_class"] == {"3": 70}


def test_untargeted_counts_only_the_targets_own_images_in_its_rate(tmp_path):
    cfg = config(attack__name="ssl_backdoor", attack__targeted=False, attack__poisons=300)
    poison.run(cfg, epath.Path(tmp_path))
    summary = json.loads((tmp_path / "poison" / "summary.json").read_text())
    own = summary["unique_replaced_by_class"]["3"]
    assert 10 < own < 60
    assert summary["rate_of_target_class"] == pytest.approx(own / summary["target_images"])
    assert summary["clean_target_images_left"] == summary["target_images"] - own


def test_no_attack(tmp_path):
    poison.run(config(attack__name="none", attack__poisons=0), epath.Path(tmp_path))
    plan, rows = poison.load(epath.Path(tmp_path))
    assert len(plan) == 0 and rows["image"].shape == (0, 32, 32, 3)
    summary = json.loads((tmp_path / "poison" / "summary.json").read_text())
    assert summary["rate_of_dataset"] == 0 and summary["canvas"]["largest"] is None


@pytest.mark.parametrize("count, rows, said", [
    (3, 3_000_000, "0.0001 %"), (1500, 3_000_000, "0.05 %"), (320, 8000, "4 %"),
    (70, 1470, "4.76 %"), (1, 1470, "0.068 %"), (0, 1470, "0 %"), (5, 5, "100 %")])
def test_rates_are_printed_with_three_significant_digits(count, rows, said):
    assert poison.percent(count / rows) == said


def test_the_printed_rate_of_a_literature_count_is_not_zero(tmp_path, monkeypatch, capsys):
    facts = dict(poisons=3, added=3, replaced=0, removed=0, rate_of_dataset=3 / 3e6, rows=3_000_000)
    monkeypatch.setattr(poison, "summary", lambda *_: facts)
    poison.run(config(attack__name="none", attack__poisons=0), epath.Path(tmp_path))
    assert "0.0001 % of 3000000 rows" in capsys.readouterr().out


def test_results_say_which_attack_was_run():
    """One module makes BadNets, natural and label-consistent poisons: its settings tell them."""
    cfg = config(attack__name="ssl_backdoor", attack__targeted=False)
    facts = dict(poisons=70, rate_of_dataset=0.04, rate_of_target_class=0.5)
    row = evaluate._poison_row(cfg, facts)
    assert row["attack"] == "ssl_backdoor" and row["count"] == 70 and row["target"] == 3
    assert row["trigger_test"]["id"] == 14
    kept = json.loads(json.dumps(row["settings"]))
    assert kept == json.loads(json.dumps(cfg.attack.to_dict()))
    assert kept["targeted"] is False and kept["trigger"]["train_place"] == "center"


def test_preview_outlines_the_trigger(made):
    picture = np.asarray(Image.open(made / "poison" / "preview.png").convert("RGB")).astype(int)
    for name in preview.COLORS.values():
        color = np.round(255 * np.array(colors.to_rgb(name)))
        assert (np.abs(picture - color).sum(-1) < 30).sum() > 1000


def test_trigger_round_trip_and_reuse(made, tmp_path):
    module, params = poison.load_trigger(config(), made)
    np.testing.assert_array_equal(params["image"], htba.image(14))
    assert params["opacity"] == 1 and module.__name__.endswith("patch")
    # Another id in the config: the trigger of the other run is used, from any of its two folders.
    for given in (made, made / "poison" / "trigger"):
        cfg = config(attack__trigger_from=str(given), attack__trigger__id=12)
        np.testing.assert_array_equal(poison.make_trigger(cfg)[1]["image"], htba.image(14))
    with pytest.raises(UserError, match="trigger_from is .*nowhere"):
        poison.make_trigger(config(attack__trigger_from=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="opacity 1, but attack.trigger.opacity is 0.5"):
        poison.make_trigger(config(attack__trigger_from=str(made), attack__trigger__opacity=0.5))


@pytest.mark.parametrize("damage, message", [
    ("cut", "images, but the plan has 70|corrupt"), ("flip", "corrupt"), ("gone", "is missing"),
    ("fewer", "holds 69 images, but the plan has 70 poisons"), ("not png", "poison 3 .* corrupt")])
def test_damaged_store(copy, damage, message):
    from array_record.python.array_record_module import ArrayRecordWriter
    path = copy / "poison" / "images.array_record"
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:len(data) // 2])
    elif damage == "flip":
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif damage == "gone":
        path.unlink()
    else:
        reader = ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()
        if damage == "fewer":
            records.pop()
        else:
            records[3] = records[3][:-40]
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
    with pytest.raises(UserError, match=message) as error:
        poison.load(copy)
    assert "poison" in str(error.value)


@pytest.mark.parametrize("change, message", [
    (dict(attack__name="noisy_alignmnt"), "did you mean 'noisy_alignment'"),
    (dict(attack__trigger__name="pach"), "did you mean 'patch'"),
    (dict(attack__trigger__id=9), "no trigger 9"), (dict(attack__target=10), "target is 10"),
    (dict(seed=-1), "seed is -1"), (dict(attack__poisons=100000), "has 1[0-9]+ images")])
def test_wrong_settings_leave_nothing_behind(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        poison.run(config(**change), epath.Path(tmp_path))
    assert not (tmp_path / "poison").exists()
