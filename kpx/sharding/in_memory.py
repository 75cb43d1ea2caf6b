"""Which values of a module are written to memory, and which share it."""

from __future__ import annotations

from kpx.sharding.graph import Graph, Op

# Computed into what reads them, unless something else needs them in memory.
_FUSIBLE = {
    "add", "subtract", "multiply", "divide", "negate", "sqrt", "rsqrt", "power", "maximum", "minimum", "abs", "sign",
    "exponential", "log", "tanh", "logistic", "convert", "select", "compare", "and", "or", "not", "xor", "clamp", "sine",
    "cosine", "is_finite", "broadcast_in_dim", "reshape", "transpose", "slice", "iota", "constant", "exponential_minus_one",
    "log_plus_one", "erf", "pad", "sharding_constraint", "floor", "cbrt", "reverse", "dynamic_slice", "remainder",
    "shift_left", "shift_right_logical", "bitcast_convert", "reduce", "concatenate", "round_nearest_even", "ceil",
}  # fmt: skip
_SAME_MEMORY = {"reshape", "optimization_barrier", "dynamic_update_slice", "sharding_constraint"}
_NEED_MEMORY = {
    "dot_general", "convolution", "ragged_dot", "while", "gather", "scatter", "sort", "custom_call", "case", "if",
    "optimization_barrier", "dynamic_update_slice", "reduce_window", "fft", "cholesky", "triangular_solve",
}  # fmt: skip


def roots(graph: Graph) -> list[int]:
    """Of each value, the one whose memory it shares: what a loop carries, what is updated in place."""
    found = list(range(len(graph.shapes)))
    for number, op in enumerate(graph.ops):
        if op.kind in _SAME_MEMORY and op.operands:
            for operand, result in zip(op.operands, op.results, strict=False):
                if operand not in graph.closed:
                    found[result] = found[operand]
        elif op.kind == "while":
            for place, (operand, result) in enumerate(zip(op.operands, op.results, strict=True)):
                root = result if operand in graph.closed else found[operand]
                found[result] = root
                for region in graph.bodies[number]:
                    found[graph.regions[region].arguments[place]] = root
    for number, op in enumerate(graph.ops):  # what a body gives back takes the place of what it was given
        if op.kind == "while":
            body = graph.regions[graph.bodies[number][-1]]
            for argument, returned in zip(body.arguments, body.returned, strict=True):
                if found[returned] == returned and graph.producers[returned] >= 0:
                    continue  # made anew in each round, beside the old
                found[returned] = found[argument]
    return found


def materialized(graph: Graph) -> frozenset[int]:
    """Values that are written to memory."""
    found = set(graph.returned)
    for number, op in enumerate(graph.ops):
        if op.kind not in _FUSIBLE:
            found.update(op.results)
        for region in graph.bodies.get(number, ()):
            found.update(graph.regions[region].returned)
    for op in graph.ops:
        if op.kind in _NEED_MEMORY and not op.group:
            for value in op.operands:
                producer = graph.producers[value]
                if producer >= 0 and graph.ops[producer].kind not in ("constant", "iota", "broadcast_in_dim"):
                    found.add(value)
    inside = set()
    for op in graph.ops:  # what a kernel computes stays in it, but for what others read
        if op.group:
            inside.update(op.results)
    for op in graph.ops:
        inside.difference_update(v for v in op.operands if v in inside and not _same_group(graph, v, op))
    return frozenset(v for v in found if v not in inside and v not in graph.closed and graph.shapes[v])


def _same_group(graph: Graph, value: int, op: Op) -> bool:
    producer = graph.producers[value]
    return producer >= 0 and graph.ops[producer].group == op.group
