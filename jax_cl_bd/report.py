"""report: shows one run as a page, or many runs as a table over seeds.

    python -m jax_cl_bd.report DIR                          # writes DIR/report/index.html
    python -m jax_cl_bd.report DIR [DIR ...] --out=FOLDER   # groups runs equal but for seed, target
"""

import shlex
import sys
from pathlib import PurePath

import ml_collections
from etils import epath

from jax_cl_bd import command_line, errors
from jax_cl_bd.errors import UserError
from jax_cl_bd.reporting import fronts, html, many_runs, one_run, read


def run(cfg: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Writes report/index.html and its pictures from what the run folder holds so far."""
    page, pictures = one_run.build(read.load(folder, cfg), _command())
    html.write(folder / "report", page, pictures)


def compare(folders: list[epath.Path], out: epath.Path) -> str:
    """Writes index.html, table.md, table.csv and pictures over many runs; gives the Markdown.

    Repairs are also shown side by side, by victim (reporting/fronts.py), those of a folder that
    holds nothing but defenses of another's victim included. Folders without a readable config or
    results are listed as incomplete.

    Raises:
        UserError: none of them is complete.
    """
    runs, repaired, incomplete = [], [], []
    for folder in folders:
        try:
            found = read.load(folder)
        except UserError as error:
            incomplete.append((str(folder), str(error)))
            continue
        if found.defenses:
            repaired.append(found)
        if (found.results is None or "victim" not in found.results) and not found.defenses:
            incomplete.append((str(folder), "no results.json: the evaluate stage is not complete"))
        elif "victim" in found.results:
            runs.append(found)
    if not runs and not repaired:
        reasons = "; ".join(f"{folder}: {why}" for folder, why in incomplete)
        raise UserError(f"no complete run among {len(folders)} folders ({reasons})")
    tables, repairs = many_runs.tables(runs), fronts.collect(repaired)
    page, pictures = many_runs.build(tables, incomplete, repairs)
    html.write(out, page, pictures)
    text = many_runs.markdown(tables, incomplete, repairs)
    (out / "table.md").write_text(text)
    (out / "table.csv").write_text(many_runs.table_csv(tables, repairs))
    return text


def main(argv: list[str]) -> None:
    """Reads the command line; see the top of this file."""
    parser = command_line.Parser("jax_cl_bd.report", __doc__)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="run folders, local or gs://")
    parser.add_argument("--out", help="folder for the table over many runs")
    given = parser.parse_args(argv)
    folders = read.folders(given.folders)
    if given.out:
        print(compare(folders, epath.Path(given.out)))
    elif len(folders) == 1:
        run(read.load(folders[0]).cfg, folders[0])
        print(f"report: {folders[0] / 'report' / 'index.html'}")
    else:
        raise UserError(f"{len(folders)} run folders need --out=FOLDER for their table")


def _command() -> str | None:
    """The command that made this run, where the report is its last stage."""
    if PurePath(sys.argv[0]).parts[-2:] != ("jax_cl_bd", "__main__.py"):
        return None
    return shlex.join(["python", "-m", "jax_cl_bd", *sys.argv[1:]])


if __name__ == "__main__":
    errors.end(main, sys.argv[1:])
