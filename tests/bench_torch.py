"""make bench-torch, make bench-gpu: our training step against PyTorch's of the same model.

    python -m tests.bench_torch [--gpu] [--only=CASE] [--seconds=N] [--budget=N] [--json=FILE]

Each case times, in turns in one process, our whole step (feed, augmentation, update), our step on
fixed views, and PyTorch's step on the same views (tests/torch_peers.py), eager on a CPU, with
channels-last, bfloat16 autocast and torch.compile on a GPU; there also the pipeline of the
reference codes, whose workers augment on the CPU (torchvision) while the GPU trains. Data are
drawn scenes at 32 px and random pixels at 224, no attack; only shapes matter. Model FLOP
utilisation is of our step on fixed views. One GPU is used, even if there are several.

Figures are printed, and written to the file, as soon as they are there; after --budget seconds no
further ones are begun. What is compiled is kept in .bench_cache for the next time. JAX is imported
late, since every worker process of the pipeline imports this file.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from jax_cl_bd import errors

CACHE = Path(__file__).resolve().parents[1] / ".bench_cache"
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # PyTorch needs memory too
               "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
               "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "torch")}
COLUMNS = (("case", "case"), ("batch_size", "batch"),
           ("images_per_second", "whole step, images/s"),
           ("bare_images_per_second", "step on fixed views"), ("ratio", "whole / fixed"),
           ("peer_images_per_second", "PyTorch, fixed views"),
           ("ratio_to_peer", "ours / PyTorch"), ("mfu", "MFU"),
           ("pipeline_images_per_second", "PyTorch, CPU augmentation"),
           ("ratio_to_pipeline", "whole / that"))


def table(rows: list[dict]) -> str:
    """Markdown."""
    shown = [(key, title) for key, title in COLUMNS if any(key in row for row in rows)]

    def cell(value):
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"
        return "" if value is None else str(value)

    lines = [" | ".join(title for _, title in shown), " | ".join("---" for _ in shown),
             *(" | ".join(cell(row.get(key)) for key, _ in shown) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def measure(row: dict, cfg, left, note, *, gpu: bool, seconds: float) -> None:
    """Puts the figures of a case into its row, and calls `note` whenever there are new ones.

    Args:
        left: () -> bool, whether there is time for the pipeline too.
    """
    from tests import torch_cases

    found, step = torch_cases.steps(cfg, gpu)
    row.update(found)
    note()
    if not gpu or cfg.text.name != "none":  # CLIP's own image pipeline crops and no more
        return
    if left():
        row.update(torch_cases.pipeline(cfg, step, seconds, found))
    else:
        row["skipped"] = "pipeline"
    note()


def run(chosen: dict, machine: dict, args, begun: float) -> list[dict]:
    """The rows of all cases; an error in one is named in its row, beside the figures it has."""
    from tests import torch_cases

    rows = []

    def left():
        return time.monotonic() - begun < args.budget

    def note():
        print(json.dumps(rows[-1]), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps({**machine, "rows": rows}, indent=2) + "\n")

    for name, cfg in chosen.items():
        rows.append({"case": name})
        if not left():
            rows[-1]["skipped"] = "case"
            note()
            continue
        start = time.monotonic()
        try:
            measure(rows[-1], cfg, left, note, gpu=args.gpu, seconds=args.seconds)
        except Exception as error:  # one case must not take the others' figures along
            traceback.print_exc()
            rows[-1]["error"] = f"{type(error).__name__}: {error}"
            note()
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        torch_cases.release()
    return rows


def main(argv: list[str]) -> int:
    """Times the cases and prints the table; 1 if one of them failed."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--only", default="", help="one case, by name")
    parser.add_argument("--seconds", type=float, default=10.0, help="of every side of a case")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all cases")
    parser.add_argument("--json", default="", help="a file for all figures")
    args = parser.parse_args(argv[1:])
    if args.json:  # asked now, since later the figures would be lost
        try:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).touch()
        except OSError as error:
            raise errors.UserError(f"--json={args.json}: {error.strerror}") from None
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from tests import torch_cases

    with tempfile.TemporaryDirectory() as folder:
        chosen = torch_cases.start(args.gpu, args.only, args.seconds, Path(folder))
        machine = {**torch_cases.machine(), "cores": len(os.sched_getaffinity(0))}
        rows = run(chosen, machine, args, begun)
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value))
    print(f"\n{table(rows)}")
    for row in rows:
        for what in ("skipped", "error"):
            if what in row:
                print(f"{row['case']}: {what}: {row[what]}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    errors.end(main, sys.argv)
