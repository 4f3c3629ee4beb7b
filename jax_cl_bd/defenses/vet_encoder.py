"""Vetting of an encoder by somebody who knows nothing of how it was made.

No paper's: every detector of this library that judges an encoder, each through its own module, on
the defender's clean images (the data of the config, all of them). A detector gives one score,
higher is more suspicious:

    decree   1 - PL1, PL1 the smallest mask that makes all images alike (defenses/decree.py); 0
             where none does
    scan     the share of clean images that the trigger found takes to its label, by the search of
             defenses/oracle_finetune.py over the same images, whose labels are the oracle; 0 where
             no label stands out. A trigger is found only where some of the images carry one.

Thresholds come from the scores of `defense.clean_encoders`, known clean encoders of the same
architecture, at `defense.false_alarm` for each detector: by ranks where there are enough of them,
else by a normal law (_vetting.threshold), and then only a rate of 1 / (n + 1) holds for certain.
Their scores are kept by the digest of their weights, in the folder `defense.calibration`, so that
one calibration serves many suspects; "" is calibration/ in the run folder. Without
any, a detector's own default stands in, and the verdict says that it is not calibrated: nobody
knows its rate.

Verdict {"suspicious", "findings", "not_checked", ...}; no model comes out. There is no truth here.
"""

import hashlib

import jax
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd.data import captions, sources, templates
from jax_cl_bd.defenses import _find_trigger, _oracle, _regions, _search, _vetting, decree
from jax_cl_bd.defenses.given import Given
from jax_cl_bd.defenses.outcome import Outcome
from jax_cl_bd.errors import UserError, renamed
from jax_cl_bd.evals import zero_shot
from jax_cl_bd.models import encoder as encoders
from jax_cl_bd.models import start

VETS = True
VERDICT_ONLY = True
_LOOKED_AT = 64  # images whose pixels tell one data set from another
NEVER = ("triggers that work on images of some classes only (source-specific)",
         "triggers in texts",
         "triggers that are no patch, such as warps or changes of colour",
         "poisons without a trigger (targeted images, mismatched pairs)")


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` images are there.

    Raises:
        UserError: no victim, a bad setting, or clean encoders that are none or of another kind.
    """
    d = cfg.defense
    if not cfg.victim:
        raise UserError("defense vet_encoder judges an encoder from elsewhere: "
                        "--config.victim=FOLDER, of a run or with model.safetensors")
    if not 0 < d.false_alarm < 1:
        raise UserError(f"defense.false_alarm={d.false_alarm} must lie in (0, 1)")
    with renamed("defense.", "defense.decree."):
        decree.check(_vetting.part(cfg, "decree"), clean)
    if d.scan.oracle.name != "ground_truth":
        raise UserError(f"defense.scan.oracle.name={d.scan.oracle.name!r} must be 'ground_truth': "
                        "the labels of the images are the oracle here")
    with renamed("defense.", "defense.scan."):
        _search.check(_vetting.part(cfg, "scan"), clean)
    seen = {}
    for path in (cfg.victim, *d.clean_encoders):
        if path != cfg.victim:
            _check_alike(cfg, path)
        mark = start.fingerprint(start.open_victim(cfg, epath.Path(path)))
        if mark in seen:
            raise UserError(f"defense.clean_encoders has {path!r}, whose weights are those of "
                            f"{seen[mark]!r}; each must be another encoder than the rest and the "
                            "suspect")
        seen[mark] = path
    if len(d.clean_encoders) == 1:
        raise UserError("defense.clean_encoders has one encoder, which says nothing of how scores "
                        "vary; a threshold takes at least two, or give none")


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Judges `victims[0]` on the images of `data.clean`; never uses `truth`."""
    del truth
    d, suspect = cfg.defense, victims[0]
    clean = [start.open_victim(cfg, epath.Path(path), mesh) for path in d.clean_encoders]
    marked = {start.fingerprint(encoder): encoder for encoder in clean}
    findings, not_checked, pictures = [], list(NEVER), {}
    facts = {"seed": cfg.seed, "images": _digest(data.clean), "side": suspect.image_size,
             "classes": [str(name) for name in data.clean.classes]}
    for name, refusal, detect in DETECTORS:
        if why := refusal(suspect, data.clean):
            not_checked.append(f"{name}: {why}")
            continue
        about = facts | {"settings": d[name].to_dict()}

        def found_in(encoder, mark, place):
            made_of = about | {"weights": mark, "tokenizer": _tokenizer(encoder)}
            return _vetting.kept(place / name, made_of, lambda: detect(
                cfg, encoder, data.clean, mesh, place / name, key))

        found = found_in(suspect, start.fingerprint(suspect), folder)
        home = epath.Path(d.calibration or folder.parent.parent / "calibration")
        scores = [found_in(encoder, mark, home / mark[:16])["score"]
                  for mark, encoder in marked.items()]
        findings.append({"detector": name, **_judged(found, scores, d.false_alarm)})
        pictures |= _vetting.shown(folder, name, found["pictures"])
    if not clean:
        not_checked.append("no clean encoders: thresholds are the detectors' defaults, with a "
                           "false alarm rate that nobody knows")
    findings.sort(key=lambda f: (not f["suspicious"], f["threshold"] - f["score"]))
    verdict = {"suspicious": any(f["suspicious"] for f in findings), "calibrated": bool(clean),
               "clean_encoders": len(clean), "false_alarm": d.false_alarm,
               "smallest_false_alarm": 1 / (len(clean) + 1) if clean else None,
               "images": len(data.clean), "findings": findings, "not_checked": not_checked}
    return Outcome(verdict, None, {"pictures": pictures})


def _judged(found: dict, clean: list[float], false_alarm: float) -> dict:
    """A detector's finding by the scores of clean encoders, or by its default without any."""
    if clean:
        limit, rate, law = _vetting.threshold(np.array(clean), false_alarm)
    else:
        limit, rate, law = found["default"], None, None
    return {"suspicious": found["score"] > limit, "score": found["score"], "threshold": limit,
            "calibrated": bool(clean), "threshold_by": law, "false_alarm": rate,
            "clean_scores": sorted(clean),
            "says": found["says"], "details": found["details"]}


def _check_alike(cfg, path):
    """Refuses a folder without an encoder of the suspect's shapes and image size."""
    theirs = ml_collections.ConfigDict({"text": {"name": "none"}, "objective": {},
                                        **start.described(path, "defense.clean_encoders")})
    if cfg.text.name == "none":
        theirs.text = ml_collections.ConfigDict({"name": "none"})
    same = (theirs.data.image_size == cfg.data.image_size
            and (theirs.text.name == "none") == (cfg.text.name == "none")
            and _shapes(theirs) == _shapes(cfg))
    if not same:
        raise UserError(f"defense.clean_encoders has {path!r}, a {theirs.model.name} at "
                        f"{theirs.data.image_size} px that is not built as the suspect, a "
                        f"{cfg.model.name} at {cfg.data.image_size} px; calibration needs the same "
                        "architecture")


def _shapes(cfg):
    tree = encoders.abstract_parts(cfg)
    return {jax.tree_util.keystr(path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _any_encoder(suspect, clean) -> str:
    return ""


def _needs_words(suspect, clean) -> str:
    """Why an encoder cannot be asked for the classes of the images."""
    if suspect.pair is None:
        return "the encoder has no text tower"
    if suspect.pair.tokenizer is None:
        return "there is no tokenizer.json, and --config.text.tokenizer names none"
    if len(np.unique(sources.labels(clean)[sources.labels(clean) >= 0])) < 3:
        return "it needs images labelled with three classes or more"
    return ""


def _decree(cfg, suspect, clean, mesh, folder, key) -> dict:
    own = _vetting.part(cfg, "decree")
    outcome = decree.run(own, [suspect], Given(clean), None, mesh, folder, key)
    share = outcome.verdict["pl1"]
    says = ("no patch makes the images alike" if share is None else
            f"a patch that weighs {share:.4f} of the image makes all images alike")
    return {"score": 0.0 if share is None else 1 - share, "default": 1 - own.defense.threshold,
            "says": says, "details": outcome.verdict, "pictures": outcome.report["pictures"]}


def _scan(cfg, suspect, clean, mesh, folder, key) -> dict:
    own, side = _vetting.part(cfg, "scan"), suspect.image_size
    least = own.defense.curate.rho
    own.defense.curate.rho = -1.0  # whatever a label's trigger does, to be judged afterwards
    pool = sources.Subset(clean, np.flatnonzero(sources.labels(clean) >= 0))
    if not hasattr(pool, "captions"):
        pool = captions.by_template(pool, 1)
    ground = _oracle.make(own, pool, mesh, folder, key)
    head = zero_shot.class_weights(suspect, pool.classes, templates.PROMPTS)
    claims = _find_trigger.suspect_of(suspect, head)
    rng = np.random.default_rng([cfg.seed, len(pool)])
    regions = _regions.make(own.defense.oracle)
    candidates, counts = _search.scan_pool(own, claims, pool, pool, ground, regions, "encoder",
                                           rng)
    triggers = _search.verified(own, claims, pool, candidates, counts, pool, rng)
    rates = {str(pool.classes[t.label]): t.rate for t in triggers}
    says = "no label stands out" if not rates else "; ".join(
        f"the suspected trigger takes {rate:.2f} of the images to {label!r}"
        for label, rate in rates.items())
    return {"score": float(max(rates.values(), default=0.0)), "default": least, "says": says,
            "details": {"labels": rates, "images_scanned": counts["images"],
                        "candidates": int(counts["found"].sum())},
            "pictures": _search.draw(folder, pool, candidates, triggers, side)}


def _tokenizer(encoder) -> str:
    """A digest of how an encoder reads words; "" of one that reads none."""
    words = encoder.pair and encoder.pair.tokenizer
    return hashlib.sha256(words.to_json().encode()).hexdigest() if words else ""


def _digest(source) -> str:
    """Of the labels, sizes and captions of all rows, and of the pixels of a few spread over
    them."""
    digest = hashlib.sha256()
    for part in source.table(np.arange(len(source))):
        digest.update(np.asarray(part, np.int64).tobytes())
    if hasattr(source, "captions"):
        digest.update(repr([list(own) for own in source.captions(np.arange(len(source)))]).encode())
    for row in np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).astype(int)):
        digest.update(np.ascontiguousarray(source[int(row)]["image"]).tobytes())
    return digest.hexdigest()


# Name, as which its settings stand in the config; why it cannot be run on this encoder and these
# images, "" if it can; and detect(cfg, suspect, clean, mesh, folder, key) -> {"score", "default"
# (its threshold without calibration), "says", "details", "pictures"}.
DETECTORS = (("decree", _any_encoder, _decree),
             ("scan", _needs_words, _scan))
