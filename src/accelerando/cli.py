"""The command line.  Every command does its work in the library; here it is only called and shown."""

from __future__ import annotations

import inspect
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from accelerando.errors import AccelerandoError, BundleError, UsageError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Finds, proves and ships the fastest faithful version of a trained model, on this machine.",
)  # fmt: skip
GoalOption = Annotated[str, typer.Option(help='what is asked for, as in "speedup >= 4, drop <= 1%"')]
BudgetOption = Annotated[str, typer.Option(help='how long it may take, as in "6min"')]
LossOption = Annotated[
    str | None, typer.Option(help="for retraining: loss.py:function of (answer, targets), giving a scalar tensor")
]
AugmentOption = Annotated[
    str | None, typer.Option(help="for retraining: augment.py:function of a tuple of input tensors, giving another")
]
BundleArgument = Annotated[Path, typer.Argument(help="the bundle's folder")]


def main() -> None:
    """Run a command; a mistake of the caller is one clear message and status 2, a bad bundle status 3."""
    try:
        app()
    except UsageError as error:
        _fail(error, 2)
    except BundleError as error:
        _fail(error, 3)
    except AccelerandoError as error:
        _fail(error, 1)
    except BrokenPipeError:
        sys.exit(141)  # whoever read our output went away


@app.command()
def demo(
    into: Annotated[Path, typer.Option(help="where the bundle goes")] = Path("demo-bundle"),
    budget: BudgetOption = "100s",
    fresh: Annotated[bool, typer.Option(help="begin anew, also where a bundle is there")] = True,
) -> None:
    """Train a small network on scikit-learn's digits, and accelerate it: speedup >= 4, drop <= 1%."""
    _need("torch", "sklearn")
    from accelerando.bundle import Bundle
    from accelerando.demo import ORIGIN, run_demo

    if fresh and (into / "manifest.json").exists():
        if Bundle.open(into, hashes=False).workload["origin"] != ORIGIN:
            raise UsageError(f"{into} holds another bundle than the demo's; give --into another folder")
        shutil.rmtree(into)
    result = run_demo(into, budget, _say)
    _finish(result, Path(f"{into}/report.html"))


@app.command()
def optimize(
    model: Annotated[str, typer.Argument(help="model.py:build, package.module:build, or model.onnx")],
    data: Annotated[str, typer.Option(help="data.py:load, or samples.npz")],
    goal: GoalOption = "drop <= 1%",
    budget: BudgetOption = "6min",
    into: Annotated[Path, typer.Option(help="the bundle's folder")] = Path("bundle"),
    train: Annotated[str | None, typer.Option(help="data to calibrate and retrain with: data.py:load, or .npz")] = None,
    metric: Annotated[str | None, typer.Option(help="a metric's name, or metric.py:function")] = None,
    loss: LossOption = None,
    augment: AugmentOption = None,
    prefer: Annotated[str | None, typer.Option(help="quality or speed")] = None,
    memory_limit: Annotated[int | None, typer.Option(help="MB that a candidate may hold")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the search that is in the folder")] = False,
    html: Annotated[Path | None, typer.Option(help="write the HTML report here")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Find, prove and ship the fastest version of a model that meets a goal."""
    _need("torch", "onnx", "cloudpickle")
    from accelerando.pipeline import accelerate
    from accelerando.targets import read_data, read_model

    if into.is_dir() and any(into.iterdir()) and not resume:
        raise UsageError(f"{into} is there already; --resume goes on with its search, --into names another folder")
    limit = memory_limit * 2**20 if memory_limit else None
    ways = _ways_to_teach(train, loss, augment)
    result = accelerate(
        read_model(model), read_data(data), goal, train=read_data(train) if train else None, metric=_metric(metric),
        budget=budget, into=into, prefer=prefer, memory_limit=limit, origin=model, progress=not quiet,
        **ways,
    )  # fmt: skip
    _finish(result, html)


@app.command()
def refresh(
    bundle: BundleArgument,
    model: Annotated[str, typer.Option(help="the retrained original: model.py:build, or model.onnx")],
    data: Annotated[str, typer.Option(help="data.py:load, or samples.npz")],
    into: Annotated[Path, typer.Option(help="the new bundle's folder")],
    train: Annotated[str | None, typer.Option(help="training data, where recipes heal: data.py:load, or .npz")] = None,
    metric: Annotated[str | None, typer.Option(help="a metric's name, or metric.py:function")] = None,
    loss: LossOption = None,
    augment: AugmentOption = None,
    budget: Annotated[str | None, typer.Option(help="how long it may take; a fifth of the search otherwise")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Apply a bundle's recipes to new weights of its model, without a new search."""
    _need("torch", "onnx", "cloudpickle")
    from accelerando import renewal
    from accelerando.targets import read_data, read_model

    ways = _ways_to_teach(train, loss, augment)
    result = renewal.refresh(
        bundle, read_model(model), read_data(data), into, train=read_data(train) if train else None,
        metric=_metric(metric), budget=budget, origin=model, progress=not quiet, **ways,
    )  # fmt: skip
    _finish(result, None)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="model.py:build, or model.onnx")],
    data: Annotated[str, typer.Option(help="data.py:load, or samples.npz")],
    seconds: Annotated[float, typer.Option(help="how long it may take")] = 20.0,
) -> None:
    """Show where time and memory go, and the ceiling of this machine."""
    _need("torch", "onnx")
    from accelerando.adoption import adopt
    from accelerando.machine import Machine
    from accelerando.profile.portrait import Profile
    from accelerando.report import profile_text
    from accelerando.targets import read_data, read_model

    workload = adopt(read_model(model), read_data(data), metric="cosine")  # a profile judges nothing
    taken = Profile.take(workload.model, workload.select, Machine.look(), seconds=seconds)
    typer.echo(profile_text.render(taken.to_json()))


@app.command()
def report(
    bundle: BundleArgument, html: Annotated[Path | None, typer.Option(help="write the HTML report here")] = None
) -> None:
    """Show what a bundle holds and how it was found."""
    from accelerando.bundle import Bundle
    from accelerando.report import text
    from accelerando.result import Result

    opened = Bundle.open(bundle)
    text.show(opened)
    if html:
        _say(f"report: {Result(opened).report(html)}")


@app.command()
def bench(
    bundle: BundleArgument,
    model: Annotated[str | None, typer.Option(help="how to get the original: model.py:build")] = None,
) -> None:
    """Measure a bundle's rungs again, here and now, against the original."""
    _need("cloudpickle")
    from accelerando.bundle import Bundle
    from accelerando.measure.again import bench_again, reference_of
    from accelerando.report import words
    from accelerando.targets import call_target

    opened = Bundle.open(bundle)
    for difference in opened.differences():
        _say(f"not as when it was measured: {difference}")
    original = call_target(model) if model and not model.endswith(".onnx") else None
    reference = reference_of(opened, original)
    if not reference.is_original:
        against, origin = words.recipe(reference.rung.recipe), opened.workload["origin"] or "FILE:FUNCTION"
        _say(f"a bundle's own code is not run unasked (--model {origin}): measured against {against}")
    for one in bench_again(opened, reference):
        if one.speedup is None or one.latency is None:
            _say(f"{words.recipe(one.rung.recipe)}: {one.refusal}")
            continue
        was = f", was {words.times(one.rung.evidence.speedup.mid)}" if reference.is_original else ""
        speed = words.between(one.speedup, words.times)
        typer.echo(f"{words.recipe(one.rung.recipe)}: {speed}{was}; p50 {words.seconds(one.latency.mid)}")


@app.command()
def verify(bundle: BundleArgument) -> None:
    """Check a bundle's hashes, and that its rungs answer as they did."""
    from accelerando.bundle import Bundle

    findings = Bundle.open(bundle).verify()
    for finding in findings:
        typer.echo(str(finding))
    if not all(f.good for f in findings):
        raise typer.Exit(3)


@app.command()
def run(
    bundle: BundleArgument,
    inputs: Annotated[Path, typer.Argument(help="an .npz file; arrays by the names of the model's inputs")],
    out: Annotated[Path, typer.Option(help="where the answers go, an .npz file")],
) -> None:
    """Run the best rung of a bundle on some inputs."""
    import numpy as np

    from accelerando.serve.runtime import load
    from accelerando.signature import flatten
    from accelerando.targets import match_names, read_npz

    arrays = read_npz(inputs)
    with warnings.catch_warnings(record=True) as said, load(bundle) as fast:
        signature = fast.bundle.signature
        leaves = match_names(arrays, [p.name for p in signature.inputs], str(inputs))
        args, kwargs = signature.call(leaves)
        outputs, _ = flatten(fast(*args, **kwargs))
    for warning in said:
        _say(str(warning.message))
    named: dict[str, Any] = {p.name: x for p, x in zip(signature.outputs, outputs, strict=True)}
    np.savez(out, **named)
    _say(f"{len(outputs[0])} answers in {out}")


@app.command()
def serve(
    bundles: Annotated[list[str], typer.Argument(help="bundles: FOLDER, or NAME=FOLDER")],
    goal: Annotated[str | None, typer.Option(help='what is asked for, as in "p99 <= 20ms, drop <= 1%"')] = None,
    host: Annotated[str, typer.Option(help="where to listen; the loopback unless told otherwise")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="of HTTP; 0 for any")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="of gRPC; 0 for any, -1 for none")] = 8001,
    memory: Annotated[str | None, typer.Option(help='that the rungs of one model may hold, as in "200MB"')] = None,
    governor: Annotated[str, typer.Option(help="steady, balanced or responsive")] = "balanced",
    audit: Annotated[float, typer.Option(help="share of requests that the best rung is asked too")] = 0.01,
    isolate: Annotated[bool, typer.Option(help="compute in a process of its own, which may crash")] = True,
    watch: Annotated[bool, typer.Option(help="load a bundle anew when its folder changes")] = True,
    tokens: Annotated[Path | None, typer.Option(help="file of bearer tokens, one a line; read when it changes")] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM file, for TLS")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's key")] = None,
    max_body: Annotated[str, typer.Option(help="of one request")] = "64MiB",
    log: Annotated[Path | None, typer.Option(help="file for the log, lines of JSON; else standard error")] = None,
    traces: Annotated[str | None, typer.Option(help="OpenTelemetry collector, http://host:4318")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="a name that requests may call it by; many")] = None,
) -> None:
    """Serve bundles by the Open Inference Protocol (HTTP and gRPC), with a dashboard at /."""
    _need("uvicorn", "httptools", "orjson", "prometheus_client", "grpc", extra="serve")
    from accelerando.server.command import Wishes, serve_bundles

    serve_bundles(
        bundles,
        Wishes(
            goal, host, port, grpc_port, memory, governor, audit, isolate, watch, tokens, certificate, key, max_body,
            log, traces, allow_host or (),
        ),
        typer.echo,
    )  # fmt: skip


@app.command()
def simulate(
    bundle: BundleArgument,
    trace: Annotated[str, typer.Option(help='a trace file, or "gamma(rate=200, cv2=4, seconds=60)"')],
    goal: Annotated[str | None, typer.Option(help="what is asked for; the bundle's own goal without it")] = None,
    with_original: Annotated[
        bool, typer.Option("--with-original", help="as in a program, where load(model=...) runs its own code")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="write the plot here")] = None,
) -> None:
    """Replay arrivals against the ladder's measured times, without running a model: what each policy would do."""
    from accelerando.report.simulation import render, write
    from accelerando.serve.simulation import simulate_bundle

    found = simulate_bundle(bundle, trace, goal, with_original=with_original)
    typer.echo(render(found))
    if html:
        _need("plotly")
        write(found, html)
        _say(f"page written to {html}")


@app.command()
def export(
    bundle: BundleArgument,
    into: Annotated[Path, typer.Argument(help="the folder to write")],
    to: Annotated[str, typer.Option(help="triton, ovms or onnx")] = "onnx",
    rung: Annotated[int | None, typer.Option(help="number of a rung; the best without it")] = None,
) -> None:
    """Write a rung as another server's model repository."""
    from accelerando.bundle import Bundle
    from accelerando.model_repository import export_bundle

    for path in export_bundle(Bundle.open(bundle), to, into, rung):
        typer.echo(path)


@app.command()
def doctor() -> None:
    """Show this machine, the backends and techniques found, what is missing, and how to get it."""
    from accelerando.doctor import show

    show()


def _metric(name: str | None) -> Any:
    """A metric's name, or a function of the user's."""
    if name is None or ":" not in name:
        return name
    from accelerando.targets import find_target

    return find_target(name)


def _ways_to_teach(train: str | None, loss: str | None, augment: str | None) -> dict[str, Callable[..., Any] | None]:
    """The user's own functions for retraining, by the names that the library has for them.

    Raises:
        UsageError: one is given without data to retrain with, is not there, or does not take what it will be given.
    """
    from accelerando.targets import find_target

    found: dict[str, Callable[..., Any] | None] = {}
    for option, target, given in (
        ("loss", loss, ("the model's answer", "the targets")),
        ("augment", augment, ("a tuple of tensors",)),
    ):
        if target and not train:
            raise UsageError(
                f"--{option} {target} is for retraining, and there is nothing to retrain with: give --train"
            )
        found[option] = find_target(target) if target else None
        if found[option] is not None and not _takes(found[option], len(given)):
            raise UsageError(f"--{option} {target} must be a function of {' and '.join(given)}, by position")
    return found


def _takes(function: Any, count: int) -> bool:
    """Whether a function can be called with so many arguments by position, as far as it tells."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _need(*packages: str, extra: str = "optimize") -> None:
    """Raises MissingExtraError, with the pip line, where a package of an extra is not installed."""
    from importlib.util import find_spec

    from accelerando.errors import MissingExtraError

    missing = [p for p in packages if find_spec(p) is None]
    if missing:
        raise MissingExtraError(f"this needs {', '.join(missing)}: pip install 'accelerando[{extra}]'")


def _finish(result: Any, html: Path | None) -> None:
    """Show a result, and write its report."""
    from accelerando.report import text

    text.show(result.bundle)
    if html:
        _say(f"report: {result.report(html)}")
    _say(f"bundle: {result.bundle.path}   use it: accelerando.load({str(result.bundle.path)!r})")
    if result.bundle.run.get("why_stopped") == "interrupted":
        raise typer.Exit(130)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _fail(error: AccelerandoError, status: int) -> None:
    typer.echo(f"accelerando: {error}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
