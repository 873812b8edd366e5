"""How an attack is made and registered, and the doors at which it is tried."""

from __future__ import annotations

import base64
import io
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import accelerando
from accelerando import manifest
from accelerando.bundle import Bundle
from accelerando.errors import BundleError

Door = Callable[[Path], Any]


def opens(path: Path) -> None:
    Bundle.open(path)


def reads_trials(path: Path) -> None:
    assert Bundle.open(path).trials


def verifies(path: Path) -> None:
    for finding in Bundle.open(path).verify():
        if finding.passed is False:
            raise BundleError(finding.code, finding.detail)


def loads(path: Path) -> None:
    accelerando.load(path).close()


@dataclass(frozen=True)
class Attack:
    make: Callable[[Path], None]
    code: str
    door: Door

    @property
    def name(self) -> str:
        return self.make.__name__


ATTACKS: list[Attack] = []


def attack(code: str, door: Door = opens) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def register(make: Callable[[Path], None]) -> Callable[[Path], None]:
        ATTACKS.append(Attack(make, code, door))
        return make

    return register


def edit(path: Path, change: Callable[[dict[str, Any]], Any], seal: bool = True) -> None:
    """Change the manifest as someone who knows the format would: with a seal that fits."""
    data = json.loads((path / "manifest.json").read_text())
    change(data)
    if seal:
        data["seal"] = manifest.seal(data)
    (path / "manifest.json").write_text(json.dumps(data))


def edit_rung(path: Path, /, **changed: Any) -> None:
    edit(path, lambda data: data["rungs"][1].update(changed))


def edit_file(path: Path, /, **changed: Any) -> None:
    edit(path, lambda data: data["rungs"][1]["files"][0].update(changed))


def edit_evidence(path: Path, /, **changed: Any) -> None:
    edit(path, lambda data: data["rungs"][1]["evidence"].update(changed))


def artifact(path: Path, rung: int = 1) -> Path:
    key = json.loads((path / "manifest.json").read_text())["rungs"][rung]["key"]
    return path / "rungs" / key / "fake.json"


def replace_extra(path: Path, name: str, content: bytes) -> None:
    """Put another file in the place of the parity or the profile, with a hash that fits."""
    old = json.loads((path / "manifest.json").read_text())[name]["path"]
    (path / old).unlink()
    file = manifest.described(name, old.rpartition(".")[2], content)
    (path / file["path"]).write_bytes(content)
    edit(path, lambda data: data.update({name: file}))


def packed(array: Any, **said: Any) -> dict[str, Any]:
    raw = zlib.compress(np.asarray(array, dtype="<f4").tobytes())
    return {"shape": list(np.shape(array)), "f4": base64.b64encode(raw).decode(), **said}


def npz(compressed: bool = False, **members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


def npy(array: Any, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()
