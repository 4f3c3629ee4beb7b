"""python -m jax_cl_bd.layouts --scale 0.2 1 --trigger 0.25: solves a layout and draws it.

Finds the poison layout with the largest probability that the random crops of one image form the
attack's pair. All lengths are in one unit: the side of the reference. error_bound is an estimate of
the numerical error (the quadrature's, plus the solver's tolerance around the layout found); it is
no guarantee that no other layout is better. It is null where no layout is found.
"""

import json
import sys

from jax_cl_bd.command_line import Parser
from jax_cl_bd.errors import UserError
from jax_cl_bd.layouts.draw import layout_figure
from jax_cl_bd.layouts.pair_probability import ATTACKS, LAWS
from jax_cl_bd.layouts.solve import SHADOWS, Solution, solve

NOTHING = ("no layout has a positive pair probability under this crop law: no two crops fit into "
           "the two parts (a lowest scale of 0.5 or more always does this)")


def parse(argv):
    """Reads the command line; raises UserError on what argparse does not understand."""
    parser = Parser("jax_cl_bd.layouts", __doc__)
    parser.add_argument("--scale", nargs=2, type=float, default=(0.2, 1.0),
                        metavar=("LOW", "HIGH"), help="RandomResizedCrop's share of the area")
    parser.add_argument("--ratio", nargs=2, type=float, default=(3 / 4, 4 / 3),
                        metavar=("LOW", "HIGH"), help="RandomResizedCrop's aspect w / h")
    parser.add_argument("--trigger", type=float, default=0.25, help="side of the trigger")
    parser.add_argument("--reference", nargs=2, type=float, default=(1.0, 1.0), metavar=("H", "W"),
                        help="the reference part; sets the unit of all lengths (default 1 1)")
    parser.add_argument("--canvas", nargs=2, type=float, metavar=("H", "W"),
                        help="keep this canvas and solve the rest")
    parser.add_argument("--attack", choices=ATTACKS, default=ATTACKS[0])
    parser.add_argument("--shadow", choices=SHADOWS, help="equal: as large as the reference "
                        "(default); free: solved too. noisy_alignment only")
    parser.add_argument("--law", choices=LAWS, help="same_square: all crops are squares of one "
                        "random side, the model of corrupt_encoder's paper and its default")
    parser.add_argument("--crops", type=int, default=2, help="crops drawn of each image")
    parser.add_argument("--pixels", type=float, help="torchvision's rounding, so many pixels per "
                        "unit (default: the continuous law)")
    parser.add_argument("--picture", help="where to draw it (default layout.png; with --json "
                        "nothing is drawn unless this is given)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.attack == "corrupt_encoder" and args.shadow is not None:
        raise UserError("--shadow belongs to noisy_alignment; corrupt_encoder's shadow is what "
                        "the object leaves of the canvas, so drop --shadow")
    args.shadow = args.shadow or "equal"
    if args.law is None:
        square = args.attack == "corrupt_encoder" and args.pixels is None
        args.law = "same_square" if square else "random_resized_crop"
    return args


def report(args, best: Solution) -> dict:
    """The solution as plain numbers; boxes are (y, x, h, w)."""
    names = ("canvas", "reference_box", "shadow_box", "trigger_box")
    if best.layout is None:
        boxes = dict.fromkeys(names) | {"canvas": args.canvas}
    else:
        boxes = {name: part.tolist() for name, part in zip(names, best.layout)}
    numbers = {name: getattr(best, name) for name in Solution._fields if name != "layout"}
    message = {} if best.layout else {"message": NOTHING}
    return boxes | numbers | {"attack": args.attack, "law": args.law} | message


def table(found: dict) -> str:
    """The report as text."""
    lines = [f"{'canvas':<23} h {found['canvas'][0]:.6g}   w {found['canvas'][1]:.6g}"]
    for name in ("reference_box", "shadow_box", "trigger_box"):
        row = "   ".join(f"{axis} {value:.6g}" for axis, value in zip("yxhw", found[name]))
        lines.append(f"{name:<23} {row}")
    lines += [f"{name:<23} {found[name]:.6g}" for name in
              ("pair_probability", "reference_probability", "trigger_probability")]
    lines.append(f"{'error_bound':<23} {found['error_bound']:.2g} "
                 "(quadrature and solver tolerance, no global guarantee)")
    return "\n".join(lines + [f"{name:<23} {found[name]}" for name in ("attack", "law")])


def draw(best: Solution, args) -> None:
    """Writes the picture."""
    object_attack = args.attack == "corrupt_encoder"
    law = (f"{args.crops} crops, scale {args.scale[0]:g} to {args.scale[1]:g}, "
           f"ratio {args.ratio[0]:.4g} to {args.ratio[1]:.4g}")
    if args.law == "same_square":
        law = f"{args.crops} square crops of one side"
    figure = layout_figure(best.layout, best.pair_probability, error_bound=best.error_bound,
                           names=("object", "background") if object_attack
                           else ("reference", "shadow"),
                           note=f"{args.attack.replace('_', ' ')}, {law}")
    path = args.picture or "layout.png"
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--picture {path}: cannot be written ({error})") from error


def main(argv=None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        args = parse(argv)
        best = solve(scale=args.scale, ratio=args.ratio, trigger=args.trigger,
                     reference=args.reference, canvas=args.canvas, shadow=args.shadow,
                     crops=args.crops, attack=args.attack, law=args.law, pixels=args.pixels)
        found = report(args, best)
        if best.layout is not None and (args.picture or not args.json):
            draw(best, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found))
    elif best.layout is None:
        print(f"pair_probability 0: {NOTHING}; no picture is drawn")
    else:
        print(table(found))
        print(f"{'picture':<23} {args.picture or 'layout.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
