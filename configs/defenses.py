"""The settings of every defense, and which of them image-text models can choose from.

`sweep` is what repairs share that are trained at several learning rates: clean_fraction,
validation_split, batch_size, steps, rates (jax_cl_bd/defenses/_sweep.py).
"""

from configs import common


def of_pairs(sweep, *, oracle="ground_truth"):
    """Every defense of an image-text model by its name, with lengths for CPUs."""
    brief = dict(clean_fraction=sweep["clean_fraction"], batch_size=sweep["batch_size"])
    clean = dict(clean_fraction=sweep["clean_fraction"])
    return dict(
        none=dict(name="none"),
        retrain=retrain(**brief, steps=600),
        fine_tune=fine_tune(**brief, steps=300, lr=1e-3),
        decree=decree(**clean, steps=600),
        density=density(**clean),
        cosine_filter=cosine_filter(**clean),
        bdetclip=bdetclip(**clean, validation_split=sweep["validation_split"]),
        clean_clip=clean_clip(sweep),
        cleaner_clip=cleaner_clip(sweep),
        par=par(sweep),
        supervised=supervised(sweep),
        abd=abd(sweep, pgd_steps=5),  # for time; the literature's usual 10
        invertune=invertune(sweep, invert_steps=1000),
        ubt=ubt(sweep),
        norm_only=norm_only(**brief, steps=100),
        oracle_filter=oracle_filter(sweep, oracle=oracle),
        oracle_finetune=oracle_finetune(sweep, oracle=oracle))


def distill(*, clean_fraction, batch_size, steps, momentum, lr, view=common.STUDENT_VIEW):
    """The distillation defense with CompRess's temperature (docs/papers.md, SSL-Backdoor)."""
    return dict(name="distill", clean_fraction=clean_fraction, batch_size=batch_size, queue=0,
                mask_own=True, temperature=0.04, momentum=momentum, steps=steps, epochs=130,
                augment=dict(view),
                optim={**common.SGD, "lr": lr, "schedule": "step",
                       "milestones": (90 / 130, 120 / 130)})


def retrain(*, clean_fraction, batch_size, steps):
    """Pretraining from scratch on the clean images that distillation would use."""
    return dict(name="retrain", clean_fraction=clean_fraction, batch_size=batch_size, steps=steps,
                epochs=0)


def fine_tune(*, clean_fraction, batch_size, steps, lr):
    """The pretraining loss on clean pairs (docs/papers.md, CleanCLIP)."""
    return dict(name="fine_tune", clean_fraction=clean_fraction, batch_size=batch_size, steps=steps,
                epochs=0, optim={**common.ADAMW, "lr": lr, "warmup_steps": 50})


def _swept(name, sweep):
    """What repairs share that are trained at several rates (defenses/_sweep.py)."""
    return dict(name=name, **sweep, points=3, may_lose=0.02, in_modality=0.0,
                optim={**common.ADAMW, "warmup_steps": 50})


def clean_clip(sweep):
    """CleanCLIP on `pairs` clean pairs, 0 = all (docs/papers.md)."""
    return {**_swept("clean_clip", sweep),
            "in_modality": 1.0, "cross_modal": True, "pairs": 0}


def par(sweep):
    """Perturb and Recover with the authors' tau, betas and weight decay (docs/papers.md)."""
    swept = _swept("par", sweep)
    return {**swept, "optim": {**swept["optim"], "b2": 0.98, "weight_decay": 1e-4}, "tau": 2.15}


def abd(sweep, *, pgd_steps):
    """ABD with adversarial views (docs/papers.md); budget, step length and weight not verified."""
    return {**_swept("abd", sweep),
            "in_modality": 1.0, "budget": 8 / 255, "pgd_steps": pgd_steps, "pgd_rate": 0.25}


def invertune(sweep, *, invert_steps):
    """InverTune with the released weights and sizes (docs/papers.md). `surrogate`: the folder that
    the universal patch is made on, "" the suspect. The probe's steps and lr are ours."""
    swept = _swept("invertune", sweep)
    return {**swept, "optim": {**swept["optim"], "weight_decay": 0.0, "clip_norm": 1.0},
            "surrogate": "", "rise": "absolute", "layers": 3, "align": 1.0, "preserve": 0.5,
            "norm": "train",
            "probe": dict(share=0.03, margin=14 / 224, steps=200, lr=0.05, batch_size=64),
            "invert": dict(steps=invert_steps, lr=0.01, batch_size=64, class_weight=5.0,
                           embedding_weight=0.5, ssim_weight=1.0, mask_weight=0.01)}


def cleaner_clip(sweep):
    """CleanerCLIP, TA-Cleaner (docs/papers.md): CleanCLIP with sub-captions; their weight and their
    number are ours."""
    return {**_swept("cleaner_clip", sweep),
            "in_modality": 1.0, "pairs": 0, "align": 1.0, "negatives": 4}


def ubt(sweep):
    """UBT (docs/papers.md), reconstructed: every number here is ours."""
    return {**_swept("ubt", sweep),
            "pool": "", "suspects": 100,
            "overfit": dict(fraction=0.1, steps=100, lr=1e-4, objective="pull_together"),
            "clean_looking": 0.5, "bad_share": 0.25, "weight": 1.0, "tokens": 2,
            "floor": "strangers", "ascend": "tokens"}


def norm_only(*, clean_fraction, batch_size, steps):
    """The batch norm of the fine-tuning repairs without their gradient (docs/papers.md)."""
    return dict(name="norm_only", clean_fraction=clean_fraction, batch_size=batch_size, steps=steps)


def oracle_filter(sweep, *, oracle="ground_truth", error=0.1):
    """An oracle without a trigger search (docs/papers.md); `oracle`, `error` as below."""
    return {**_swept("oracle_filter", sweep),
            "action": "drop", "pairs": 0, "sure": 0.25,
            "pool": "", "oracle": dict(name=oracle, error=error, steps=1500)}


def oracle_finetune(sweep, *, oracle="ground_truth", error=0.1):
    """Oracle-guided repair (docs/papers.md, EftCLIP). `oracle`: ground_truth, wrong for a share
    `error` of images, or classifier. Thresholds: docs/papers.md."""
    return {**_swept("oracle_finetune", sweep),
            "pool": "", "preserve": 10.0,
            "oracle": dict(name=oracle, error=error, steps=1500, segmenter="classical",
                           segmenter_folder="", segmenter_points=32),
            "scan": dict(screen=20_000, limit=800, enough=20, top=5, sure=0.25, confident=0.5,
                         evidence="transplant", counterfactual=True),
            "curate": dict(parts=("clean", "transplant", "replay"), per_label=16, replay=3.0,
                           rho=0.5, rho_recurring=0.05, flips=32, correlation=0.7,
                           searched=300)}


def supervised(sweep):
    """Supervised fine-tuning of the image tower with CleanCLIP's weight decay (docs/papers.md)."""
    found = _swept("supervised", sweep)
    del found["in_modality"]
    return {**found, "optim": {**found["optim"], "weight_decay": 0.01}}


def decree(*, clean_fraction, steps):
    """DECREE's inversion (docs/papers.md) with its settings for CLIP; `images` clean ones."""
    return dict(name="decree", clean_fraction=clean_fraction, images=1000, batch_size=32,
                steps=steps, lr=0.5, milestones=(0.2, 0.5), lambda_min=1e-7, threshold=0.1)


def density(*, clean_fraction, k=16, batch=2048, false_alarm=0.01):
    """Detection of samples by local density (docs/papers.md); k as in the released code's example.
    More than k poisons in a reference batch hide each other."""
    return dict(name="density", clean_fraction=clean_fraction, k=k, batch=batch,
                false_alarm=false_alarm, pool="")


def cosine_filter(*, clean_fraction, false_alarm=0.01, scorer=""):
    """Pairs that do not match are dropped (docs/papers.md); `scorer`: the folder of an independent
    image-text model, "" the suspect itself."""
    return dict(name="cosine_filter", clean_fraction=clean_fraction, false_alarm=false_alarm,
                scorer=scorer, pool="")


def vet_encoder(*, steps, false_alarm=0.05):
    """The detectors of encoders (docs/papers.md, Vetting); labels of the data are the oracle."""
    search = oracle_finetune({}, error=0.0)
    search["curate"]["rho_recurring"] = 2.0  # off: nothing was pasted on these images
    inversion = decree(clean_fraction=1.0, steps=steps)
    return dict(name="vet_encoder", false_alarm=false_alarm, clean_encoders=(), calibration="",
                decree={k: v for k, v in inversion.items() if k not in ("name", "clean_fraction")},
                scan={k: search[k] for k in ("oracle", "scan", "curate")})


def vet_dataset(*, false_alarm=0.01, level=0.05):
    """The detectors of rows (docs/papers.md, Vetting). `pool` "data": the rows to be judged are
    the train split of the data; "" those of a run folder, as it has them."""
    search = oracle_finetune({}, oracle="classifier", error=0.0)
    return dict(name="vet_dataset", false_alarm=false_alarm, level=level, clean_data="",
                clean_split="", scorer="", pool="data", density=dict(k=16, batch=2048),
                search={"batch_size": 64, **{k: search[k] for k in ("oracle", "scan", "curate")}})


def bdetclip(*, clean_fraction, validation_split, false_alarm=0.05):
    """Detection of triggered images at test time (docs/papers.md): texts of each class, with
    `words` random words in the perturbed ones."""
    return dict(name="bdetclip", clean_fraction=clean_fraction, validation_split=validation_split,
                false_alarm=false_alarm, benign=20, perturbed=20, words=3, keep_name=False, seed=0)
