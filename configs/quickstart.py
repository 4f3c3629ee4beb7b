"""Noisy Alignment on UCI digits, with SimCLR, its clean twin and a distilled student.

    make quickstart        # or: python -m jax_cl_bd --config=configs/quickstart.py --workdir=DIR

Arguments after the colon: debug, attack=noisy_alignment|ssl_backdoor|oracle_poisoning|none,
objective=simclr|moco|byol|simsiam, defense=distill|retrain|decree|density|none,
target=CLASS, seed=N.
docs/results.md has its time and numbers.
"""

from configs import common, defenses

OBJECTIVES = dict(  # heads as small as the encoder
    simclr=dict(temperature=0.5), moco=dict(queue_batches=16, momentum=0.99, hidden=128),
    byol=dict(hidden=256, dim=64), simsiam=dict(layers=2, hidden=256, dim=256, bottleneck=64))
# Many small batches: 400 steps of 256 cost the same, and on some seeds the backdoor came too late.
OPTIMS = dict(simclr=dict(lr=0.3))


def get_config(arg=""):
    a = common.parse(arg, debug=False, attack="noisy_alignment", objective="simclr",
                     defense="distill", target=3, seed=0)
    objective = common.choose("objective", a["objective"], common.OBJECTIVES)
    cfg = common.config(
        seed=a["seed"],
        data=dict(name="digits", data_dir="", image_size=16, train_split="train",
                  test_split="test", limit=0, feed="resident", workers=0, skip_corrupt=False,
                  classes_file="", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        # 24 references, each in about three poisons: the class keeps most of its clean images.
        attack=common.attack(a["attack"], target=a["target"], poisons=70, trigger_size=4,
                             references=24),
        augment=dict(view1=dict(common.DIGIT_VIEW), view2=dict(common.DIGIT_VIEW),
                     interpolation="bilinear"),
        model=dict(name="small_resnet", stem="cifar", width=32, stem_stride=2,
                   first_stride=1, stages=(32, 64), dtype="float32", bn_groups=1),
        objective={**objective, **OBJECTIVES[a["objective"]]},
        optim={**common.OPTIMS[a["objective"]], **OPTIMS.get(a["objective"], {}),
               "per_epoch": False, "warmup_steps": 20},
        train=dict(steps=1600, epochs=0, batch_size=64, log_every=50, save_every=400,
                   eval_every=400, steps_per_dispatch=1),
        defense=common.choose("defense", a["defense"], dict(
            none=dict(name="none"),
            retrain=defenses.retrain(clean_fraction=0.25, batch_size=64, steps=300),
            distill=defenses.distill(clean_fraction=0.25, batch_size=64, steps=300, momentum=0.99,
                                   lr=0.05, view={**common.STUDENT_VIEW, "flip": 0.0}),
            decree=defenses.decree(clean_fraction=0.25, steps=600),
            density=defenses.density(clean_fraction=0.25, batch=256))))
    return common.debug(cfg) if a["debug"] else cfg
