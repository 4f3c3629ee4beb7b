"""folder.py on tiny generated images."""

import ml_collections
import numpy as np
import pytest
from PIL import Image

from jax_cl_bd.data import folder, images, sources
from jax_cl_bd.errors import UserError


def config(path, **changes):
    cfg = ml_collections.ConfigDict(dict(
        name=f"folder:{path}", data_dir="", image_size=16, train_split="train", test_split="val",
        limit=0, skip_corrupt=False, classes_file=""))
    cfg.update(changes)
    return cfg


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("zebra", "ant", "bee"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i, ending in enumerate(("jpg", "JPEG", "png")):
            pixels = rng.integers(0, 256, (10 + i, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.{ending}")
        (tmp_path / "train" / name / "notes.txt").write_text("no image")
    return tmp_path


def test_rows_follow_sorted_classes_and_names(pictures):
    source = sources.load(config(pictures), "train")
    assert source.classes == ("ant", "bee", "zebra") and len(source) == 9
    assert source.paths[:3] == ("ant/0.jpg", "ant/1.JPEG", "ant/2.png")
    item = source[5]
    assert item["label"] == 1 and item["index"] == 5
    np.testing.assert_array_equal(item["image"], np.asarray(Image.open(
        pictures / "train" / "bee" / "2.png")))


def test_table_reads_headers_and_agrees_with_the_items(pictures):
    source = sources.load(config(pictures, limit=7), "train")
    table = sources.table(source)
    np.testing.assert_array_equal(table.sizes, [source[i]["image"].shape[:2] for i in range(7)])
    np.testing.assert_array_equal(table.labels, [source[i]["label"] for i in range(7)])
    assert len(source.paths) == 7


def test_a_class_list_picks_folders_in_sorted_order(pictures):
    listing = pictures / "classes.txt"
    listing.write_text("zebra\nbee\n\n")
    source = folder.load(config(pictures, classes_file=str(listing)), "train")
    assert source.classes == ("bee", "zebra") and len(source) == 6 and source[5]["label"] == 1
    listing.write_text("zebar\n")
    with pytest.raises(UserError, match="did you mean 'zebra'"):
        folder.load(config(pictures, classes_file=str(listing)), "train")
    with pytest.raises(UserError, match="cannot be read"):
        folder.load(config(pictures, classes_file="nowhere.txt"), "train")


def test_a_list_of_synsets_names_the_folders(pictures):
    listing = pictures / "synsets.txt"
    listing.write_text("zebra  Zebra of Grévy, hartebeest\ncat a cat\nant\tAnt\nbee bee\n")
    source = sources.load(config(pictures, class_names=str(listing)), "train")
    assert source.classes == ("Ant", "bee", "Zebra of Grévy")
    assert source.paths[0] == "ant/0.jpg" and source[8]["label"] == 2
    listing.write_text("zebra Zebra\nbee\nant Ant\n")
    with pytest.raises(UserError, match="no name for the class folder 'bee'"):
        folder.load(config(pictures, class_names=str(listing)), "train")
    with pytest.raises(UserError, match="class names 'nowhere.txt' cannot be read: No such"):
        folder.load(config(pictures, class_names="nowhere.txt"), "train")
    with pytest.raises(UserError, match="'digits' names its classes itself"):
        sources.load(config(pictures, class_names=str(listing), name="digits"), "train")


def test_center_crop_makes_every_image_the_central_square(pictures):
    plain, cropped = (sources.load(config(pictures, limit=7, center_crop=crop), "train")
                      for crop in (False, True))
    assert cropped.paths == plain.paths and cropped.classes == plain.classes
    assert not hasattr(cropped, "captions") and len(cropped) == 7
    for i in range(7):
        item, whole = cropped[i], plain[i]["image"]
        assert item["label"] == plain[i]["label"] and item["index"] == i
        np.testing.assert_array_equal(item["image"], images.central_square(whole, 16))
    table = sources.table(cropped)
    np.testing.assert_array_equal(table.sizes, [[16, 16]] * 7)
    np.testing.assert_array_equal(table.labels, sources.table(plain).labels)


def test_a_corrupt_file_is_named_or_left_out(pictures):
    path = pictures / "train" / "bee" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    source = sources.load(config(pictures), "train")
    with pytest.raises(images.CorruptRow, match=r"row 4 \(bee/1.JPEG\)"):
        source[4]
    kept = sources.load(config(pictures, skip_corrupt=True), "train")
    assert len(kept) == 8 and "bee/1.JPEG" not in kept.paths


def test_wrong_layouts_are_explained(pictures):
    with pytest.raises(UserError, match="no folder 'val' .it has: train.*PATH/<split>/<class>"):
        sources.load(config(pictures), "test")
    with pytest.raises(UserError, match="does not exist"):
        sources.load(config(pictures / "nowhere"), "train")
    (pictures / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="no images in empty"):
        sources.load(config(pictures), "train")
