"""What a compiled program says it does: its collectives and their bytes, read from its HLO text.

Loops count as often as they run, where that can be read. The bytes of a collective are
those that each device sends in a ring, with R the bytes of its result on one device and n devices
in a group: all-gather R (n - 1) / n, all-reduce 2 R (n - 1) / n, reduce-scatter R (n - 1),
all-to-all R (n - 1) / n, collective-permute R.

A TPU's compiler hides a collective behind computation by spreading it over fusions: one that starts
it, any number of `async_collective_fusion` that each send some of it, one that ends it. The text
repeats the collective in every one of them; it counts once, where it starts.
"""

import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
         "ragged-all-to-all", "collective-broadcast")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2,
         "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\([^\n]*\) -> [^\n]*)?\{$", re.M)
_OP = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|async_execution_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .*compare\(\S+, %?([\w.\-]+)\), direction=LT")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    kind; name in the HLO; shape: its result on one device, as in the HLO; result_bytes; group: how
    many devices take part together; times it runs; sent_bytes: by each device, all times; source:
    the operation of the model that it was made for.
    """

    kind: str
    name: str
    shape: str
    result_bytes: float
    group: int
    times: int
    sent_bytes: float
    source: str


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of a compiled program, the most bytes first.

    `text`: of `compiled.as_text()`; `devices`: of the whole program, where a group is not listed.
    """
    computations, entry = _computations(text)
    runs = dict.fromkeys(computations, 0)
    runs[entry] = 1
    for name in _in_order(computations, entry):
        for line in computations[name]:
            inside = _trips(line, computations) if " while(" in line else 1
            for called in _called(line):
                if called in runs:
                    runs[called] += runs[name] * inside
    found = [c for name, lines in computations.items()
             if runs[name] and not _goes_on(name, lines) for line in lines
             if (c := _collective(line, runs[name], devices,
                                  scatters=name.startswith("all-reduce-scatter")))]
    return sorted(found, key=lambda c: -c.sent_bytes)


def _computations(text):
    """{computation: its lines}, and the name of the entry."""
    found, entry = {}, None
    for head in _COMPUTATION.finditer(text):
        body = text[head.end():text.index("\n}", head.end())]
        found[head[2]] = body.splitlines()
        entry = head[2] if head[1] else entry
    return found, entry


def _goes_on(name, lines):
    """Whether a computation carries on or ends a collective that another one started."""
    def has(target):
        return any(f'custom_call_target="{target}"' in line for line in lines)
    return has("AsyncCollectiveDone") or (name.startswith("async_collective_fusion")
                                          and not has("AsyncCollectiveStart"))


def _trips(line, computations):
    """How often a loop runs: as the compiler says, else up to what its condition compares with, as
    of a scan, which counts from 0; 1 if neither is known."""
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition = "\n".join(computations.get(_CONDITION.search(line)[1], []))
    compared = _BELOW.search(condition)
    constants = dict(_CONSTANT.findall(condition))
    return int(constants.get(compared[1], 1)) if compared else 1


def _called(line):
    names = _CALLED.findall(line)
    for listed in _BRANCHES.findall(line):
        names += [name.strip().lstrip("%") for name in listed.split(",")]
    return names


def _in_order(computations, entry):
    """Callers before what they call."""
    order, seen = [], set()

    def visit(name):
        if name in seen or name not in computations:
            return
        seen.add(name)
        for line in computations[name]:
            for called in _called(line):
                visit(called)
        order.append(name)

    visit(entry)
    return reversed(order)


def _collective(line, times, devices, scatters):
    """`scatters`: in a TPU's fusion of an all-reduce and the slice that each device keeps of it."""
    op = _OP.match(line)
    if op is None:
        return None
    name, shape, kind = op.groups()
    started = kind.endswith("-start")
    kind = kind.removesuffix("-start")
    if kind not in KINDS:
        return None
    if started and shape.startswith("(") and kind != "all-reduce":
        # (operands, results[, contexts]): the results are the second of the two.
        shape = _second(shape)
    result = sum(BYTES[t] * math.prod(int(d) for d in dims.split(",") if d)
                 for t, dims in _ARRAY.findall(shape) if t in BYTES)
    n = _group(line, devices)
    sent = {"all-gather": (n - 1) / n, "all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1,
            "all-to-all": (n - 1) / n, "ragged-all-to-all": (n - 1) / n}.get(kind, 1) * result
    if scatters and kind == "all-reduce":
        kind, sent, result = "reduce-scatter", sent / 2, result / n
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, name, re.sub(r"\{[^}]*\}", "", shape), result, n, times, sent * times,
                      source[1] if source else "")


def _second(shape):
    """The second element of the text of a tuple."""
    depth, parts, start = 0, [], 1
    for i, c in enumerate(shape):
        depth += (c in "({[") - (c in ")}]")
        if (c == "," and depth == 1) or i == len(shape) - 1:
            parts.append(shape[start:i])
            start = i + 1
    return parts[1] if len(parts) > 1 else parts[0]


def _group(line, devices):
    """How many devices a collective's groups have."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    made = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if made:
        return int(made[2])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]* \{([^}]*)\}", line)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", mesh[2]))
    return devices
