"""The dashboard over a made-up model that moves, for looking at it:

    python tests/dashboard_server.py SCENE [--port 8000] [--token SECRET]

Scenes: usual, one, many, quarantined, quiet, overload, long, hostile, several, loading.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvicorn
from shelf import FakeServed, FakeShelf

from accelerando.errors import AccelerandoError
from accelerando.goal import Goal
from accelerando.interval import Interval
from accelerando.serve.status import BUCKETS, Histogram, RungStatus, Stand, Status
from accelerando.server.dashboard import Dashboard, Receive, Send

MB = 1_000_000
EMPTY = Histogram((0,) * (len(BUCKETS) + 1), 0.0)
HOSTILE = (
    "<script>document.body.dataset.owned = 'yes'</script><img src=x onerror=\"document.body.dataset.owned='yes'\">"
)
LONG = (
    "drop_layers(share=0.35, healed=True) > distil(epochs=12, temperature=4.0, alpha=0.7) > merge_tokens(share=0.25) > "
    "quantize_nncf(preset=mixed, ignored_scope=attention.softmax.logits.and.all.that.follows.it, smooth=True) > "
    "openvino(threads=2, streams=1, hint=latency, cache=warm)"
)
RECIPES = [
    "eager", "export_onnx > onnxruntime", "export_onnx > fold > onnxruntime(threads=1)",
    "export_onnx > quantize_dynamic > onnxruntime",
    "export_onnx > quantize_static(method=entropy) > onnxruntime(threads=1)",
    "drop_layers(share=0.5) > distil > quantize_static > onnxruntime",
]  # fmt: skip


def ladder(count: int, recipes: list[str] | None = None) -> tuple[RungStatus, ...]:
    """Rungs, each about 1.6 times faster than the one before and a little worse."""
    names = recipes or RECIPES
    rungs = []
    for i in range(count):
        speed, drop = 1.6**i, 0.0009 * i**1.7
        rungs.append(
            RungStatus(
                number=i,
                recipe=names[i % len(names)] if i < len(names) else f"{names[i % len(names)]} variant {i}",
                state="ready",
                why="",
                quality=Interval(0.9829 - drop - 0.003, 0.9829 - drop, 0.9829 - drop + 0.0028),
                drop=Interval(drop - 0.0008, drop, drop + 0.0009) if i else Interval.exactly(0.0),
                speedup=Interval(0.97 * speed, speed, 1.03 * speed) if i else Interval.exactly(1.0),
                seconds=0.009 / speed,
                bytes=round(38 * MB / (1 + 0.4 * i)),
                answered=0,
                agreement=Interval(0.991 - 3 * drop, 0.995 - 3 * drop, 0.998 - 3 * drop) if i else None,
            )
        )
    return tuple(rungs)


@dataclass
class Scene:
    """What happens to a model: `load` in rows per second at a time."""

    rungs: tuple[RungStatus, ...]
    load: Callable[[float], float]
    goal: str = "p99 <= 20ms, drop <= 1%"
    drift: tuple[str, ...] = ()
    reason: str = "{rows:.0f} rows/s arrive: {spare:.2f} ms a row can be afforded"
    cap: int | None = 200 * MB


def waves(t: float) -> float:
    return 60 + 90 * (1 + math.sin(t / 37)) + (420 if t % 140 < 25 else 0) + 25 * math.sin(t * 1.7)


def spoilt(rungs: tuple[RungStatus, ...], number: int, state: str, why: str) -> tuple[RungStatus, ...]:
    """The rungs with one that is in another state; what failed was never timed."""
    timed = state != "failed"
    return tuple(
        dataclasses.replace(r, state=state, why=why, seconds=r.seconds * timed) if r.number == number else r
        for r in rungs
    )


def scenes() -> dict[str, Scene]:
    bad = "of 412 audited rows 371 agreed (0.868 to 0.929), but its certificate promises 0.985"
    odd = spoilt(spoilt(ladder(6), 4, "quarantined", bad), 0, "out", "")
    odd = spoilt(spoilt(odd, 5, "failed", "onnxruntime: bad_alloc"), 1, "loading", "")
    return {
        "usual": Scene(ladder(5), waves),
        "one": Scene(ladder(1), lambda t: 30 + 10 * math.sin(t / 9), goal="latency <= 15ms", cap=None),
        "many": Scene(ladder(14), waves),
        "quarantined": Scene(
            odd, waves, drift=("pixel 31 of x: mean 0.41, was 0.13 to 0.15", "x: 4 % of values clip")
        ),
        "quiet": Scene(ladder(4), lambda t: 0.0),
        "overload": Scene(ladder(3), lambda t: 1900.0 + 200 * math.sin(t / 5), goal="throughput >= 2000/s, drop <= 1%"),
        "long": Scene(ladder(4, ["eager", "x" * 300, LONG, LONG.replace("0.35", "0.45")]), waves, reason=LONG),
        "hostile": Scene(
            spoilt(ladder(3, [HOSTILE + str(i) for i in range(3)]), 0, "quarantined", HOSTILE), waves,
            drift=(HOSTILE,), reason=HOSTILE,
        ),
    }  # fmt: skip


class Moving(FakeServed):
    """A model whose status moves as its clock does; no request ever reaches it."""

    def __init__(self, scene: Scene, name: str, clock: Callable[[], float], shelf: Callable[[], FakeShelf]) -> None:
        super().__init__()
        self.scene, self.name, self.clock, self.shelf = scene, name, clock, shelf
        self.rng = np.random.default_rng(1)
        self.first = self.last = clock()
        self.queue = 0.0
        first = next(r.number for r in scene.rungs if r.state == "ready")
        self.now = Status(
            name=name, version=1, goal=scene.goal, metric="accuracy", rungs=scene.rungs, standing=first,
            stands=(Stand(time.time(), first, "the start"),), queue_rows=0, rate=0.0, slowdown=1.0, utilisation=0.0,
            rows=0, all_rows=0, answered=0, late=0, refused=0, expired=0, failed=0, cancelled=0, switches=0,
            attainment=1.0, effective_quality=0.0, queued=EMPTY, computed=EMPTY, memory_bytes=0, memory_cap=scene.cap,
            drift=scene.drift,
        )  # fmt: skip

    def status(self) -> Status:
        now = self.clock()
        if now > self.last:
            self.now = self._after(now - self.last, now)
            self.last = now
        return dataclasses.replace(self.now, goal=self.shelf().goals.get(self.name, self.scene.goal))

    def _after(self, seconds: float, now: float) -> Status:
        """One step: the best rung that can answer the load, and the requests that it answers."""
        was, load = self.now, max(0.0, self.scene.load(now - self.first))
        ready = [r for r in was.rungs if r.state == "ready"]
        slow = 1.02 + 0.03 * math.sin((now - self.first) / 50)
        rung = next((r for r in ready if r.seconds * load * slow < 0.62), ready[-1])
        capacity = 1 / (rung.seconds * slow)
        came = int(self.rng.poisson(load * seconds))
        done = min(came, int(capacity * seconds))
        refused = came - done
        busy = min(1.0, load / capacity)
        waits = self.rng.exponential(0.2 * rung.seconds * busy / max(0.02, 1.02 - busy), done)
        works = rung.seconds * np.exp(0.12 * self.rng.standard_normal(done))
        late = int((waits + works > 0.02).sum())
        quality = was.effective_quality * was.all_rows + rung.quality.mid * (done - late)
        why = self.scene.reason
        why = why.format(rows=load, spare=1000 / max(load, 1)) if "{rows" in why else why
        stood = rung.number != was.standing
        at = time.time() - (time.monotonic() - now)
        return dataclasses.replace(
            was,
            rungs=tuple(
                dataclasses.replace(r, answered=r.answered + done * (r.number == rung.number)) for r in was.rungs
            ),
            standing=rung.number,
            stands=(*was.stands, Stand(at, rung.number, why))[-32:] if stood else was.stands,
            switches=was.switches + stood,
            queue_rows=int(busy * 6 + (refused and 64)),
            rate=load,
            slowdown=slow,
            utilisation=busy,
            rows=was.rows + done,
            all_rows=was.all_rows + came,
            answered=was.answered + done,
            late=was.late + late,
            refused=was.refused + refused,
            effective_quality=quality / max(1, was.all_rows + came),
            queued=added(was.queued, waits),
            computed=added(was.computed, works),
            memory_bytes=sum(r.bytes for r in ready),
            audited=was.audited + done // 100,
        )


def added(histogram: Histogram, seconds: np.ndarray[Any, Any]) -> Histogram:
    more = np.bincount(np.searchsorted(BUCKETS, seconds), minlength=len(BUCKETS) + 1)
    counts = tuple(int(a + b) for a, b in zip(histogram.counts, more, strict=True))
    return Histogram(counts, histogram.total + float(seconds.sum()))


class App:
    """The dashboard, and the path by which it changes a goal; behind a token where one is set."""

    def __init__(self, scene: str, token: str = "", history: float = 600.0, pace: float = 0.5) -> None:
        self.token = token
        self.running, self.time = False, time.monotonic() - history  # the past, until it has been told
        made = scenes()
        names = {"several": ["usual", "one", "quiet"], "loading": []}.get(scene, [scene])
        models = {HOSTILE if n == "hostile" else n: made[n] for n in names}
        self.shelf = FakeShelf({})
        for name, one in models.items():
            self.shelf.models[name] = {"1": Moving(one, name, self.clock, lambda: self.shelf)}
        if scene in ("several", "loading"):
            self.shelf.out["spare"] = FakeServed()
        self.running = True
        self.dashboard = Dashboard(self.shelf, clock=self.clock, pace=pace)
        self.running = False
        for _ in range(int(history / 2)):
            self.time += 2.0
            self.dashboard.look()
        self.running = True

    def clock(self) -> float:
        return time.monotonic() if self.running else self.time

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        path = scope["path"]
        token = dict(scope["headers"]).get(b"authorization", b"").decode()
        if path.startswith("/v2/") and self.token and token != f"Bearer {self.token}":
            await reply(send, 401, {"error": "a token is needed"})
        elif scope["method"] == "PUT" and path.endswith("/goal"):
            await self._set_goal(path.removeprefix("/v2/models/").removesuffix("/goal"), receive, send)
        else:
            await self.dashboard(scope, receive, send)

    async def _set_goal(self, name: str, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            goal = json.loads(body)["goal"]
            Goal.parse(goal)
            self.shelf.set_goal(name, goal)
        except AccelerandoError as error:
            await reply(send, 400, {"error": str(error)})
        else:
            await reply(send, 200, {"name": name, "goal": goal})


async def reply(send: Send, status: int, data: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(data).encode()})


@contextlib.contextmanager
def served(app: App, port: int = 0) -> Iterator[str]:
    """The address of a server of the app, which runs in a thread."""
    server = uvicorn.Server(
        uvicorn.Config(app, port=port, log_level="error", lifespan="off", timeout_graceful_shutdown=2)
    )
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        loops[0].call_soon_threadsafe(app.dashboard.close)
        server.should_exit = True
        thread.join(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scene", choices=[*scenes(), "several", "loading"])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token", default="")
    given = parser.parse_args()
    with served(App(given.scene, given.token), given.port), contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
