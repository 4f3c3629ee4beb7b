"""CLIP from scratch on image-caption pairs, as CleanCLIP trains and attacks its victims on CC3M.

    python -m jax_cl_bd.data.prepare pairs shards/*.tar --out=data/cc3m
    echo banana > target.txt
    python -m jax_cl_bd --config=configs/clip_pairs.py:downstream=folder:data/imagenet \
        --config.data.name=pairs:data/cc3m --config.data.classes_file=target.txt \
        --config.evals.downstream_test_split=val \
        --config.evals.downstream_class_names=LOC_synset_mapping.txt --workdir=runs/clip_pairs

Pairs have no labels: the target is line attack.target (0 is the first) of the classes file, a name
that captions contain. `downstream` is labelled data with a class of that name, for zero-shot,
linear probe and attack success rate; without it retrieval and the z-score are measured.
evals.downstream_test_split names its test split (default: data.test_split), and evals.
downstream_class_names a file that gives its folders' classes their names, a line each ("n07753592
banana", as in ImageNet's list of synsets); folders that are named in words need none. Also for
--config.data.name=tfds:coco_captions --config.data.test_split=val, whose 0.05 % (59 poisons) are
too few to work, as users of CleanCLIP's code found.

Bansal et al., ICCV 2023 (arXiv 2303.03323) and its code: CLIP's ResNet-50 and text transformer, 64
epochs of batches of 128, AdamW 5e-4 with weight decay 0.1, 10,000 warm-up steps, then cosine, no
augmentation; 1,500 poisons (0.05 % of 3 M), noise patch of 16 px at 224, captions from the 80
templates. Every image, of training, tests and poisons, is its central square, resized (bicubic) as
it is read; patches are pasted after that, as there (data.center_crop; data/images.py says what
still differs, and the code there squashes images that it poisons). Its zero-shot accuracy on
ImageNet is about 0.19 with all 3 M pairs. `in_modality` makes victims as Verma et al. do
(arXiv 2311.14948): the loss adds the in-modality term on augmented views (theirs are
AutoAugment's, ours those of common.CAPTIONED_VIEW, which repairs see too; EDA captions), batches
of 1,024, learning rate 1e-3.
Defenses have the sizes of CleanCLIP's: 100 K clean pairs of 3 M, 10 epochs of batches of 64 and a
rate of 1e-5, with one below and one above; those whose papers have others are made so
(docs/papers.md). Repairs with several rates choose by labelled images of the data itself, which
pairs do not have, and some defenses need labels throughout: they are refused here, and run where
--config.data.captions=templates captions a labelled set. fine_tune, retrain, norm_only, decree,
density and cosine_filter need none.
The tokenizer is trained on the captions; for CLIP's own, --config.text.tokenizer=tokenizer.json
--config.text.end=49407. For GPUs or a TPU pod; here only its debug mode has been run.
Arguments after the colon: debug, attack (badnets, blended, sig, wanet, label_consistent, natural,
reference, optimized_patch, random_patch, none), tower=rn50|vit_b32|vit_b16|vit_l16 (CLIP's; with
objective=siglip the vit towers and their texts have SigLIP's published form and size),
objective=clip|siglip|roclip|safeclip (the last two with lengths for 1 M pairs; configs/common.py),
in_modality (of clip and siglip), defense (those of configs/clip_scenes.py), downstream=DATA,
seed=N.
"""

from configs import common, defenses

ATTACKS = ("badnets", "blended", "sig", "wanet", "label_consistent", "natural", "reference",
           "optimized_patch", "random_patch", "none")
VIT = dict(name="vit", mlp_ratio=4.0, pool="cls", act="quick_gelu", eps=1e-5, pre_norm=True,
           patch_bias=False, dtype="bfloat16", bn_groups=1)
TOWERS = dict(
    rn50=dict(name="clip_resnet", width=64, stages=(3, 4, 6, 3), heads=32, dtype="bfloat16",
              bn_groups=1),
    vit_b32={**VIT, "width": 768, "layers": 12, "heads": 12, "patch": 32},
    vit_b16={**VIT, "width": 768, "layers": 12, "heads": 12, "patch": 16},
    vit_l16={**VIT, "width": 1024, "layers": 24, "heads": 16, "patch": 16})
DIMS = dict(rn50=1024, vit_b32=512, vit_b16=512, vit_l16=768)  # of the shared space
TEXTS = dict(rn50={}, vit_b32={}, vit_b16={}, vit_l16=dict(width=768, heads=12))
LABELLED = ("zero_shot", "linear_probe")  # probes of the downstream data
SWEEP = dict(clean_fraction=1 / 30, validation_split="validation", batch_size=64, steps=15_624,
             rates=(3e-6, 1e-5, 3e-5))
# Retraining keeps pretraining's warm-up of 10,000 steps, so its rate peaks at 0.41 of the full one.
BRIEF = dict(clean_fraction=SWEEP["clean_fraction"], batch_size=64, steps=SWEEP["steps"])
DEFENSES = {**defenses.of_pairs(SWEEP), "retrain": defenses.retrain(**BRIEF),
            "fine_tune": defenses.fine_tune(**BRIEF, lr=1e-5),
            "abd": defenses.abd(SWEEP, pgd_steps=10),
            "invertune": defenses.invertune(SWEEP, invert_steps=7812)}


def get_config(arg=""):
    a = common.parse(arg, debug=False, attack="badnets", tower="rn50", objective="clip",
                     in_modality=False, defense="none", downstream="", seed=0)
    common.choose("attack", a["attack"], dict.fromkeys(ATTACKS))
    both, defends = a["in_modality"], a["objective"] in common.TEXT_AUGMENT
    if both and defends:
        raise ValueError("argument in_modality after the colon of --config is for objectives clip "
                         f"and siglip, and objective is {a['objective']!r}")
    tower = common.choose("tower", a["tower"], TOWERS)
    text, dim, published = TEXTS[a["tower"]], DIMS[a["tower"]], {}
    if tower["name"] == "vit" and a["objective"] == "siglip":  # texts as large as the image tower
        text = dict(context=64, vocab=32_000, **{k: tower[k] for k in ("width", "layers", "heads")})
        dim, published = tower["width"], common.SIGLIP
    term = {} if defends else {"in_modality": 1.0 if both else 0.0}
    cfg = common.config(
        seed=a["seed"], downstream=a["downstream"],
        data=dict(name="pairs:data/pairs", data_dir="", image_size=224, train_split="train",
                  test_split="test", limit=0, feed="streamed", workers=8, skip_corrupt=False,
                  classes_file="", mean=(0.48145466, 0.4578275, 0.40821073),
                  std=(0.26862954, 0.26130258, 0.27577711), captions="", captions_per_row=5,
                  center_crop=True, text_augment=common.TEXT_AUGMENT.get(
                      a["objective"], "eda" if both else "none")),
        attack=common.pair_attack(a["attack"], target=0, poisons=1500, trigger_size=16, side=224),
        augment=dict(view1=dict(common.PLAIN_VIEW),
                     view2=dict(common.CAPTIONED_VIEW),
                     interpolation="bicubic"),
        model={**tower, **published.get("model", {})},
        text={**common.TEXT, "end": 1, "dtype": "bfloat16", **text, **published.get("text", {})},
        objective={**common.choose("objective", a["objective"], common.PAIR_OBJECTIVES),
                   "dim": dim, **published.get("objective", {}), **term},
        optim={**common.ADAMW, "lr": 1e-3 if both else 5e-4, "warmup_steps": 10_000},
        evals=common.evals(probes=(*(LABELLED if a["downstream"] else ()), "retrieval", "z_score"),
                           fraction=0.1),
        train=dict(steps=0, epochs=64, batch_size=1024 if both else 128, log_every=100,
                   save_every=5000, eval_every=10_000, steps_per_dispatch=1),
        defense=common.choose("defense", a["defense"], DEFENSES))
    return common.debug(cfg) if a["debug"] else cfg
