"""Models of RoCLIP and SafeCLIP are CLIP's: repaired, exported and begun from as such."""

import pytest

from configs import clip_cifar10, clip_pairs, clip_scenes, common
from jax_cl_bd import pretrain, stages
from jax_cl_bd.defenses import _sweep, par
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import hub_clip_config, pair
from jax_cl_bd.objectives import training
from tests.models.test_start import hub_folder, pair_config

DEFENDED = ("roclip", "safeclip")


@pytest.mark.parametrize("objective", DEFENDED)
@pytest.mark.parametrize("defense", ["clean_clip", "par", "oracle_filter"])
def test_repairs_are_those_of_an_undefended_model(objective, defense):
    mine, clip = (clip_scenes.get_config(f"debug,objective={o},defense={defense}")
                  for o in (objective, "clip"))
    assert mine.objective.name == objective and mine.data.text_augment != "none"
    mine_as, clip_as = (_sweep.described(cfg).to_dict() for cfg in (mine, clip))
    for own in (mine_as, clip_as):  # the run's own augmentation, and the rate of its pretraining
        own["augment"].pop("view2"), own["optim"].pop("lr")
    assert mine_as == clip_as
    if defense == "par":
        mine.mesh.data = 1
        par.check(mine, 40)
        assert _sweep.described(par._described(mine)).objective.name == "par"
    assert mine.objective.name == objective  # a copy


@pytest.mark.parametrize("objective", DEFENDED)
def test_the_format_of_clip_holds_them(objective):
    cfg = clip_scenes.get_config(f"debug,tower=vit,objective={objective}")
    clip = clip_scenes.get_config("debug,tower=vit")

    def translated(cfg):
        return hub_clip_config.translate({name: cfg[name].to_dict()
                                          for name in ("model", "text", "objective", "data")})

    assert translated(training.plain(cfg)) == translated(clip)
    assert pair.kind(cfg.objective) == "clip"
    assert pair.kind(clip_scenes.get_config("objective=siglip").objective) == "siglip"


@pytest.mark.parametrize("objective", DEFENDED)
def test_they_begin_from_a_clip_model_and_from_no_other(objective, tmp_path):
    for kind in ("clip", "siglip"):
        hub_folder(tmp_path / kind, kind)
    begun = stages.with_victim(pair_config(tmp_path / "clip", f"objective={objective}"))
    assert begun.objective.name == objective and begun.model.name == "vit"
    with pytest.raises(UserError, match="holds a siglip model"):
        stages.with_victim(pair_config(tmp_path / "siglip", f"objective={objective}"))


def test_other_objectives_are_their_own_plain_form():
    for name in ("clip", "siglip"):
        cfg = clip_scenes.get_config(f"debug,objective={name}")
        assert training.plain(cfg).to_dict() == cfg.to_dict()
        assert training.sized(cfg, rows=9, steps_per_epoch=3) is cfg


@pytest.mark.parametrize("objective, wanted", [("roclip", "eda"), ("safeclip", "eda_twice")])
def test_captions_must_be_augmented(objective, wanted):
    cfg = clip_scenes.get_config(f"debug,objective={objective}")
    assert cfg.data.text_augment == wanted
    training.check(cfg)
    cfg.data.text_augment = "none"
    with pytest.raises(UserError, match=f"set --config.data.text_augment={wanted}"):
        training.check(cfg)


def test_sizes_of_the_experiments():
    """A pool of 2 % of the rows and more; warm-ups as 5 and 2 of 32 epochs; one epoch of steps."""
    roclip = clip_scenes.get_config("objective=roclip")
    assert roclip.objective.queue_batches == 32  # 2,048 of 8,000
    assert (roclip.train.steps, roclip.objective.epoch_steps, roclip.optim.lr) == (9600, 2400, 1e-3)
    assert clip_scenes.get_config("objective=safeclip").train.steps == 9600
    o = clip_scenes.get_config("objective=safeclip").objective
    assert (o.uni_steps, o.cross_steps, o.cross_rate, o.queue_batches) == (375, 150, 0.3, 4)
    assert (o.safe_from, clip_pairs.get_config("objective=safeclip").objective.safe_from) == (0.5,
                                                                                             0.9)
    own = training.sized(clip_scenes.get_config("objective=safeclip"), rows=8320,
                         steps_per_epoch=125)
    assert own.objective.epoch_steps == 125 and own.objective.rows == 8320
    safeclip = clip_cifar10.get_config("reduced,objective=safeclip")
    assert safeclip.objective.uni_steps == 935 and safeclip.train.steps == 6000
    assert clip_cifar10.get_config("objective=roclip").objective.queue_batches == 2
    assert clip_pairs.get_config("objective=roclip").objective.queue_batches * 128 == 21_888
    with pytest.raises(ValueError, match="in_modality .* is for objectives clip and siglip"):
        clip_pairs.get_config("objective=roclip,in_modality")
    assert common.defended("clip", rows=1, batch_size=1, steps=1) == {}


def test_a_plan_that_does_not_fit_is_found_before_anything_is_compiled():
    cfg = clip_scenes.get_config("debug,objective=safeclip")
    cfg.mesh.data = 1
    pretrain.check(cfg, 200)
    cfg.objective.cross_steps = 1
    with pytest.raises(UserError, match="leave none of the 2 steps"):
        pretrain.check(cfg, 200)
