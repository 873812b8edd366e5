"""The head of an early exit: pooled features of a state to the logits of classes, learned with all before it frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from accelerando.errors import Reason, RefusalError
from accelerando.interval import Floats
from accelerando.signature import Array
from accelerando.techniques._exits import Pool

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)  # on squared weights; what serves unseen rows best is taken
HELD_OUT = 0.2  # of the rows, to tell
STEPS = 80
WORK = 2e8  # rows x features x classes in one step at most
ENDINGS = ("", "Softmax", "LogSoftmax")  # what answers can be: logits, chances, or their logarithms
NEAR = 1e-3


class Head(NamedTuple):
    """Features by a pool, then (d, classes) weights and (classes,) biases, then an ending.

    `wrong` is the share of unseen rows whose class it missed, while it was chosen.
    """

    pool: Pool
    weights: Array
    bias: Array
    ending: str
    wrong: float


def ending_of(answers: Array) -> str:
    """Which of `ENDINGS` a model's answers have been through, (n, classes)."""
    whole = answers.astype(np.float64)
    if np.all(whole >= 0) and np.allclose(whole.sum(axis=1), 1, atol=NEAR):
        return "Softmax"
    if np.all(whole <= 0) and np.allclose(np.exp(whole).sum(axis=1), 1, atol=NEAR):
        return "LogSoftmax"
    return ""


def wanted_of(answers: Array, targets: Array | None) -> Floats:
    """The chances that a head should give, (n, classes): of the label where there is one, else of the answer.

    Args:
        answers: the whole model's, (n, classes).
        targets: labels (n,) or (n, 1), negative where there is none; None without any.

    Raises:
        RefusalError: the targets are no labels, but numbers.
    """
    ending = ending_of(answers)
    logits = np.log(np.clip(answers.astype(np.float64), 1e-12, None)) if ending == "Softmax" else answers
    chances = _softmax(logits.astype(np.float64))
    if targets is None or targets.size != len(answers):
        return chances
    labels = targets.reshape(-1)
    if labels.dtype.kind == "f" and np.any(labels != np.round(labels)):
        raise RefusalError(
            Reason.UNSUPPORTED, "its targets are numbers: an exit is for classes, for it must know when it is sure"
        )
    known = (labels >= 0) & (labels < answers.shape[1])
    chances[known] = np.eye(answers.shape[1])[labels[known].astype(np.int64)]
    return chances


def learn(features: Mapping[Pool, Array], wanted: Floats, ending: str) -> Head:
    """The head that gives the wanted chances to rows that it was not fitted to: of several poolings and penalties.

    Multinomial logistic regression by L-BFGS (Liu & Nocedal 1989), from zero, so the same for the same rows.

    Args:
        features: by pool, (n, d) each.
        wanted: (n, classes), rows of which add up to 1.
    """
    order = np.random.default_rng(0).permutation(len(wanted))
    unseen, seen = np.split(order, [max(1, round(HELD_OUT * len(order)))])
    found = []
    for pool, raw in features.items():
        x, middle, scale = _standardized(raw)
        rows = seen[: max(64, int(WORK / (x.shape[1] * wanted.shape[1])))]
        start = np.zeros((x.shape[1] + 1, wanted.shape[1]))
        for penalty in PENALTIES:
            start = _fitted(x[rows], wanted[rows], penalty, start)
            loss, wrong = _judged(x[unseen], wanted[unseen], start)
            found.append((loss, wrong, pool, start, middle, scale))
    _, wrong, pool, theta, middle, scale = min(found, key=lambda f: f[0])
    weights = theta[:-1] / scale[:, None]
    bias = theta[-1] - middle @ weights
    return Head(pool, weights.astype(np.float32), bias.astype(np.float32), ending, wrong)


def attach(model: Any, head: Head, state: str, output: Any) -> None:
    """Put the head's nodes at the end of a graph, and its answer first among the outputs.

    Args:
        state: the tensor that it pools.
        output: the answer's port, as ONNX has it.
    """
    from onnx.helper import make_node
    from onnx.numpy_helper import from_array

    graph = model.graph
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    rank = len(graph.output[0].type.tensor_type.shape.dim)
    others = [i for i in range(1, rank) if i != head.pool.axis]
    features = state

    def name(what: str) -> str:
        return f"{state}.{what}"

    if others and opset >= 18:
        graph.initializer.append(from_array(np.array(others, np.int64), name("axes")))
        graph.node.append(make_node("ReduceMean", [state, name("axes")], [name("mean")], keepdims=0))
    elif others:
        graph.node.append(make_node("ReduceMean", [state], [name("mean")], axes=others, keepdims=0))
    if others:
        features = name("mean")
    if head.pool.first:
        graph.initializer.append(from_array(np.array(0, np.int64), name("zero")))
        graph.node.append(make_node("Gather", [state, name("zero")], [name("first")], axis=1))
        graph.node.append(make_node("Concat", [name("first"), features], [name("features")], axis=1))
        features = name("features")
    graph.initializer.extend([from_array(head.weights, name("weights")), from_array(head.bias, name("bias"))])
    logits = name("logits") if head.ending else output.name
    graph.node.append(make_node("Gemm", [features, name("weights"), name("bias")], [logits]))
    if head.ending:
        graph.node.append(make_node(head.ending, [logits], [output.name], axis=1))
    graph.output.insert(0, output)


def _softmax(z: Floats) -> Floats:
    power = np.exp(z - z.max(axis=1, keepdims=True))
    chances: Floats = power / power.sum(axis=1, keepdims=True)
    return chances


def _standardized(x: Array) -> tuple[Floats, Floats, Floats]:
    """Features of mean 0 and deviation 1, their means, and their deviations; those that never change are left out."""
    wide = x.astype(np.float64)
    middle, scale = wide.mean(axis=0), wide.std(axis=0)
    scale[scale < 1e-9 + 1e-6 * np.abs(middle)] = np.inf
    return (wide - middle) / scale, middle, scale


def _fitted(x: Floats, wanted: Floats, penalty: float, start: Floats) -> Floats:
    """Weights and, in the last row, biases, (d + 1, classes)."""
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    def loss(flat: Floats) -> tuple[float, Floats]:
        theta = flat.reshape(start.shape)
        z = x @ theta[:-1] + theta[-1]
        z -= z.max(axis=1, keepdims=True)
        power = np.exp(z)
        total = power.sum(axis=1, keepdims=True)
        value = (np.log(total[:, 0]) - (wanted * z).sum(axis=1)).mean() + penalty / 2 * (theta[:-1] ** 2).sum()
        slope = (power / total - wanted) / len(x)
        return float(value), np.concatenate([x.T @ slope + penalty * theta[:-1], slope.sum(axis=0)[None]]).ravel()

    with threadpool_limits(1):  # products this small wait for a second thread longer than they take
        found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
    theta: Floats = found.x.reshape(start.shape)
    return theta


def _judged(x: Floats, wanted: Floats, theta: Floats) -> tuple[float, float]:
    """The cross-entropy, and the share of the rows whose likeliest class is another than is wanted."""
    chances = _softmax(x @ theta[:-1] + theta[-1])
    loss = -(wanted * np.log(np.clip(chances, 1e-12, None))).sum(axis=1).mean()
    return float(loss), float(np.mean(chances.argmax(axis=1) != wanted.argmax(axis=1)))
