"""The attack measured while it grows: kNN and alignment figures for metrics.jsonl."""

import functools
from collections.abc import Callable

import ml_collections

from jax_cl_bd.evals import alignment, attack_metrics, knn
from jax_cl_bd.models import encoder as encoders

FIGURES = ("clean_accuracy", "triggered_accuracy", "attack_success_rate", "clean_target_rate")


def make(cfg: ml_collections.ConfigDict, data, mesh) -> Callable:
    """Gives watch(state) -> {"eval/...": float}.

    kNN on `data` (evals.test_sets), because it has no training of its own; `reference_alignment`
    and `noise_norm` are what Noisy Alignment claims to move (docs/papers.md, Noisy Alignment). The
    trigger lies by the test protocol.
    """
    k = min(cfg.evals.knn_k, knn.smallest_class(data.train_labels))

    def watch(state) -> dict[str, float]:
        variables = {"params": state.params["encoder"],
                     "batch_stats": state.batch_stats["encoder"]}
        encoder = encoders.make(cfg, variables, mesh)
        predict = functools.partial(
            knn.classify, bank=data.features(encoder, "train"), labels=data.train_labels, k=k,
            classes=len(data.classes), temperature=cfg.evals.knn_temperature)
        names = {"clean": "test"}
        if data.placements:
            names["triggered"] = f"{data.placements[0]}/triggered"
        row = attack_metrics.figures(
            {variant: predict(data.features(encoder, name)) for variant, name in names.items()},
            data.test_labels, data.target)
        figures = {f"eval/knn/{name}": row[name] for name in FIGURES if row.get(name) is not None}
        moved = alignment.of_encoder(encoder, data)
        return figures | {f"eval/alignment/{name}": value for name, value in moved.items()}

    return watch
