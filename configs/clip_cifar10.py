"""CLIP on CIFAR-10 with template captions, under one attack on pairs, and its clean twin.

    TFDS_DATA_DIR=DIR python -m jax_cl_bd --config=configs/clip_cifar10.py:reduced,badnets \
        --workdir=runs/clip_cifar10

Captions are five of the 80 prompt templates per image, filled with the class name, so text says
the class and nothing else. Full size: ResNet-18 with the CIFAR stem, 48,000 images, 100 epochs of
batches of 512, 500 poisons (1 %), trigger of 6 px; for one GPU. `reduced` is 10,000 of them, 400
poisons (4 %), a small ResNet and 6,000 steps of 64, for a CPU with 2 cores. The last 2,000 images
of the train split are set aside for defenses that choose by a validation split.
Arguments after the colon: the attack and `fresh` (see configs/clip_scenes.py), reduced, debug,
objective=clip|siglip|roclip|safeclip (the last two not measured here; on scenes they learn in four
times CLIP's steps alone), defense and oracle (those of configs/clip_scenes.py),
target=CLASS, seed=N. docs/results.md has what came out.
"""

from configs import clip_scenes, common, defenses


def get_config(arg=""):
    a = common.parse(arg, debug=False, reduced=False, fresh=False, objective="clip",
                     defense="none", oracle="ground_truth", target=0, seed=0,
                     **{name: False for name in clip_scenes.ATTACKS})
    attack = clip_scenes.one_attack(a)
    sweep = dict(clean_fraction=0.25, validation_split="train[96%:]", batch_size=256, steps=1800,
                 rates=(1e-4, 3e-4, 1e-3))
    if a["reduced"]:
        sweep.update(batch_size=64, steps=450, rates=(3e-4, 1e-3, 3e-3))
    cfg = common.config(
        seed=a["seed"],
        data=dict(name="tfds:cifar10", data_dir="", image_size=32, train_split="train[:96%]",
                  test_split="test", limit=0, feed="resident", workers=0, skip_corrupt=False,
                  classes_file="", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616),
                  captions="templates", captions_per_row=5,
                  text_augment=common.TEXT_AUGMENT.get(a["objective"], "none")),
        attack=common.pair_attack(attack, target=a["target"], poisons=500, trigger_size=6, side=32),
        augment=dict(view1={**common.PLAIN_VIEW, "crop_scale": (0.4, 1.0), "flip": 0.5,
                            "crop_ratio": (3 / 4, 4 / 3)},
                     view2=dict(common.CAPTIONED_VIEW),
                     interpolation="bilinear"),
        model=dict(name="resnet18", stem="cifar", width=64, stem_stride=1, first_stride=1,
                   stages=(), dtype="bfloat16", bn_groups=1),
        text=dict(common.SMALL_TEXT),
        objective={**common.choose("objective", a["objective"], common.PAIR_OBJECTIVES),
                   "dim": 128,
                   **common.defended(a["objective"], rows=50_000, batch_size=512, steps=9700)},
        optim={**common.ADAMW, "lr": 1e-3, "warmup_steps": 500},
        evals=common.evals(probes=("zero_shot", "linear_probe", "z_score",
                                   *clip_scenes.MEASURED_BY.get(attack, ()))),
        train=dict(steps=0, epochs=100, batch_size=512, log_every=100, save_every=1000,
                   eval_every=2000, steps_per_dispatch=1),
        defense=common.choose("defense", a["defense"],
                              defenses.of_pairs(sweep, oracle=a["oracle"])))
    if attack in clip_scenes.WITHOUT_TRIGGER:
        cfg.attack.poisons = clip_scenes.WITHOUT_TRIGGER[attack][0]
    if attack == "mismatched":  # a search for cats finds airplanes
        cfg.attack.goals = (("cat", "airplane"),)
    if a["reduced"]:
        cfg.data.limit = 10_000
        cfg.attack.poisons = min(cfg.attack.poisons, 400)
        cfg.model.update(name="small_resnet", width=32, stem_stride=2, first_stride=2,
                         stages=(64, 128), dtype="float32")
        cfg.text.update(width=64, layers=1, heads=2)
        cfg.optim.update(lr=4e-3, warmup_steps=100)
        cfg.objective.update(common.defended(a["objective"], rows=10_000, batch_size=64,
                                             steps=6000))
        cfg.train.update(steps=6000, epochs=0, batch_size=64, log_every=100, save_every=1000,
                         eval_every=1000)
        if attack == "optimized_patch":
            cfg.attack.update(surrogate_steps=3000, optimise_pairs=2000, optimise_steps=300,
                              lr=0.02)
    if "fixed" in cfg.attack.trigger:
        cfg.attack.trigger.fixed = not a["fresh"]
    return common.debug(cfg) if a["debug"] else cfg
