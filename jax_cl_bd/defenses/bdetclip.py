"""BDetCLIP: triggered images are known at test time by texts that leave them cold.

Niu, He, Wei, Wu, Liu, Feng: "Test-Time Multimodal Backdoor Detection by Contrastive Prompting",
ICML 2025, arXiv 2405.15269; code Purshow/BDetCLIP_badCLIP (src/evaluate.py). The score of an image
is the sum over classes (here the mean) of its cosine to the class's benign descriptions minus that
to its class-perturbed random ones, each the unit mean of text embeddings. Images below a threshold
are flagged: a triggered one goes to its target whatever the texts say, so its difference is small.

Reconstructed, without a language model:

- Benign: `defense.benign` of the 80 prompts (data/templates.py) with the class name, where the
  paper has descriptions of the class by GPT-4.
- Perturbed: `defense.perturbed` of the prompts with `defense.words` random words of the defender's
  own captions, none of them of a class name. They stand in the place of the class name (`defense.
  keep_name` False), or behind the sentence with the name as in the released code, which adds a
  sentence by the language model that has nothing to do with the class (True).
- The threshold: the difference that at most `defense.false_alarm` of the clean validation images
  fall below. The released code is given a number.

Verdict only, of `data.incoming`; how well it does depends on the share of the trigger's images that
the model does send to the target.
"""

import re

import jax
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd.data import sources, templates
from jax_cl_bd.defenses import _detection
from jax_cl_bd.defenses.outcome import Outcome
from jax_cl_bd.errors import UserError

NEEDS_INCOMING = True
_SEED = 7963  # of the texts, beside defense.seed
_SHOWN = 32  # images in the picture of the report, in lines of 16


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` pairs give the random words."""
    d = cfg.defense
    _detection.check(cfg, clean)
    if cfg.text.name == "none":
        raise UserError("defense bdetclip is for image-text models; text.name is 'none'")
    if not d.validation_split:
        raise UserError("defense bdetclip sets its threshold on clean images that were not trained "
                        "on; name their split in defense.validation_split")
    for name in ("benign", "perturbed"):
        if not 1 <= d[name] <= len(templates.PROMPTS):
            raise UserError(f"defense.{name}={d[name]} must be 1 to {len(templates.PROMPTS)}, the "
                            "number of prompts")
    if d.words < 1:
        raise UserError(f"defense.words={d.words} must be at least 1")
    source = sources.load(cfg.data, "train")
    if len(source.classes) < 2:
        raise UserError(f"defense bdetclip describes classes, and data set {cfg.data.name!r} names "
                        f"{len(source.classes)} of them; it needs 2 or more (data.classes_file)")


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Says which incoming images are triggered; `truth` says how well, and changes nothing else.

    Raises:
        UserError: the defender's captions have too few words that are in no class name.
    """
    del mesh, key
    d, model, incoming = cfg.defense, victims[0], data.incoming
    words = vocabulary(data.clean, incoming.classes)
    if len(words) < d.words:
        raise UserError(f"the defender's captions have {len(words)} words that are in no class "
                        f"name, fewer than defense.words={d.words}")
    benign, perturbed = descriptions(d, incoming.classes, words)
    direction = (_classes(model, benign) - _classes(model, perturbed)).mean(0)
    difference = differences(model, incoming, direction, "bdetclip: incoming")
    clean = differences(model, data.validation, direction, "bdetclip: validation")
    found = _detection.judge(-difference, -clean, d.false_alarm)
    verdict = {"rows": len(difference), "clean_rows": len(clean), "classes": len(benign),
               "words": len(words), "false_alarm": d.false_alarm,
               "threshold": -found["threshold"], "flagged": found["flagged"],
               "flagged_share": found["flagged"] / len(difference),
               "most_suspicious": found["most_suspicious"]}
    if truth is not None:
        verdict |= _detection.grade(-difference, found["threshold"], truth.triggered)
    _detection.keep(folder / "scores.npz", {"difference": difference})
    shown = _detection.most(-difference, min(_SHOWN, len(incoming)))
    half = len(shown) // 2
    _detection.draw(folder / "suspicious.png", incoming, [shown[:half], shown[half:2 * half]],
                    model.image_size)
    caption = ("The incoming images that tell benign from perturbed descriptions least, the least "
               "first.")
    return Outcome(verdict, None, {"pictures": {"suspicious.png": caption}})


def vocabulary(source, classes) -> list[str]:
    """The words of a source's captions that are in no class name, each once, in their order."""
    names = {word for name in classes for word in _words(str(name))}
    found = {word for texts in source.captions(np.arange(len(source))) for text in texts
             for word in _words(text)}
    return sorted(found - names)


def descriptions(settings, classes, words: list[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Benign and perturbed texts of every class: [C][defense.benign], [C][defense.perturbed].

    The prompts are the same for all classes, the random words different for every text.
    """
    rng = np.random.default_rng([_SEED, settings.seed])
    prompts = [templates.PROMPTS[n] for n in rng.permutation(len(templates.PROMPTS))]

    def perturbed(prompt, name):
        drawn = " ".join(words[n] for n in rng.permutation(len(words))[:settings.words])
        if settings.keep_name:
            return templates.fill(prompt, name).rstrip(".") + ", " + drawn
        return templates.fill(prompt, drawn)

    names = [str(name) for name in classes]
    return ([[templates.fill(prompt, name) for prompt in prompts[:settings.benign]]
             for name in names],
            [[perturbed(prompt, name) for prompt in prompts[:settings.perturbed]]
             for name in names])


def differences(model, source, direction: np.ndarray, label: str) -> np.ndarray:
    """Mean over classes of the benign minus the perturbed cosine of each image, float32 [n]."""
    return np.concatenate([model.project(model.image(shown)) @ direction
                           for _, shown in _detection.blocks(source, model.image_size, label)])


def _classes(model, texts):
    """Unit means of the text embeddings of every class, float32 [C, E]."""
    z = model.text([text for own in texts for text in own])
    z = z.reshape(len(texts), len(texts[0]), -1).mean(1)
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)


def _words(text):
    return re.findall(r"\w+", text.lower().replace("_", " "))
