"""The attack measured while it grows: a probe and alignment figures for metrics.jsonl."""

import functools
from collections.abc import Callable

import ml_collections

from jax_cl_bd.evals import alignment, attack_metrics, knn, zero_shot
from jax_cl_bd.models import encoder as encoders

FIGURES = ("clean_accuracy", "triggered_accuracy", "attack_success_rate", "clean_target_rate")


def make(cfg: ml_collections.ConfigDict, data, mesh, tokenizer=None) -> Callable:
    """Gives watch(state) -> {"eval/...": float}.

    kNN on `data` (evals.test_sets), because it has no training of its own, or zero-shot for an
    image-text model; `reference_alignment` and `noise_norm` are what Noisy Alignment claims to move
    (docs/papers.md, Noisy Alignment). The trigger lies by the test protocol.
    """
    def watch(state) -> dict[str, float]:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        encoder = encoders.of_parts(cfg, variables, mesh, tokenizer)
        name, predict = probe_of(cfg, encoder, data)
        sets = {"clean": "test"}
        if data.placements:
            sets["triggered"] = f"{data.placements[0]}/triggered"
        row = attack_metrics.figures(
            {variant: predict(data.features(encoder, name)) for variant, name in sets.items()},
            data.test_labels, data.target)
        figures = {f"eval/{name}/{k}": row[k] for k in FIGURES if row.get(k) is not None}
        moved = alignment.of_encoder(encoder, data)
        return figures | {f"eval/alignment/{k}": value for k, value in moved.items()}

    return watch


def probe_of(cfg, encoder, data) -> tuple[str, Callable]:
    """The probe that needs no training, by name, and its features [N, D] -> class [N]."""
    if encoder.text is not None:
        return "zero_shot", zero_shot.classifier(encoder, data)
    k = min(cfg.evals.knn_k, knn.smallest_class(data.train_labels))
    return "knn", functools.partial(
        knn.classify, bank=data.features(encoder, "train"), labels=data.train_labels, k=k,
        classes=len(data.classes), temperature=cfg.evals.knn_temperature)
