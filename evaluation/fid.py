"""The Fréchet distance between two sets of images (Heusel et al., 2017), and `eval.py fid`.

Shapes: B images of a batch, n images in all, d features of one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.linalg import eigh, eigvalsh
from torch import Tensor
from tqdm import tqdm

from evaluation.features import choose_extractor, feature_name, find_inception
from evaluation.folders import has_miniature_size, image_files, images_in
from evaluation.report import result_file, write_result
from support.cli import BadInput, require
from support.files import atomic_write, expand, sha256
from support.machine import provenance

FEW = 2048                      # below as many images as Inception has features, FID is biased


class Statistics:
    """Mean and covariance of features, in float64, streamed: no image's features are kept.

    n counts the images; it is 0 where a file does not say. `features` names the network they come
    from, where that is known.
    """

    def __init__(self, features: str = ""):
        self.n = 0
        self.features = features
        self.mean = np.zeros(0)
        self._scatter = np.zeros(0)             # Σ (x − mean)(x − mean)ᵀ

    def add(self, features: Tensor) -> None:
        """Takes in the features (B, d) of B more images."""
        x = features.detach().cpu().double().numpy()
        part = Statistics()
        part.n = len(x)
        part.mean = x.mean(0)
        part._scatter = (x - part.mean).T @ (x - part.mean)
        self.merge(part)

    def merge(self, other: Statistics) -> None:
        """Takes in another's images: exact, in any order, up to rounding (Chan et al., 1979)."""
        if not self.mean.size:
            self.n = other.n
            self.mean = other.mean
            self._scatter = other._scatter.copy()
            return
        if not (self.n and other.n):
            raise ValueError("statistics of an unknown number of images can't be added to")
        n = self.n + other.n
        apart = other.mean - self.mean
        self._scatter += other._scatter
        self._scatter += np.outer(apart, apart * (self.n * other.n / n))
        self.mean = self.mean + apart * (other.n / n)
        self.n = n

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), with n − 1 in the denominator; zeros for one image."""
        return self._scatter / max(self.n - 1, 1)

    def save(self, path: str | Path) -> None:
        """An .npz with mu and sigma, as pytorch-fid writes and reads it, and with n and of."""
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, mu=self.mean, sigma=self.covariance, n=self.n, of=self.features)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """What `save` or pytorch-fid wrote. Raises BadInput where the file is something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                # "same_kind" refuses complex numbers and objects instead of casting them
                mu = file["mu"].astype(np.float64, casting="same_kind")
                sigma = file["sigma"].astype(np.float64, casting="same_kind")
                n = int(file["n"]) if "n" in file else 0
                features = str(file["of"]) if "of" in file else ""
        except FileNotFoundError:
            raise BadInput(f"{path}: there is no such file") from None
        except Exception as error:      # a damaged archive raises whatever its parts do
            raise BadInput(f"{path} is no .npz with mu and sigma ({error}): pass one, or a folder "
                           "of images") from None
        matching = mu.ndim == 1 and sigma.shape == 2 * mu.shape and mu.size > 0
        require((not (matching and np.isfinite(mu).all() and np.isfinite(sigma).all()),
                 f"{path}: mu {mu.shape} and sigma {sigma.shape} are no finite mean and "
                 "covariance; compute them again"))
        self = cls(features)
        self.n = n
        self.mean = mu
        self._scatter = sigma * max(n - 1, 1)
        return self


def frechet(a: Statistics, b: Statistics) -> float:
    """‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2 √(Σ₁ Σ₂)), at least 0.

    Tr √(Σ₁ Σ₂) is the sum of the √eigenvalues of R Σ₂ Rᵀ with RᵀR = Σ₁. That matrix is symmetric,
    so nothing becomes complex as in SciPy's sqrtm. R has as many rows as Σ₁ has rank: the zero
    eigenvalues of a deficient Σ₁ come out as noise of 1e-16, whose root 1e-8 is not small. Raises
    BadInput where the numbers of features differ.
    """
    if a.mean.shape != b.mean.shape:
        raise BadInput(f"{a.mean.size} features an image and {b.mean.size} can't be compared: "
                       "both sides must come from one network")
    values, vectors = eigh(a.covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    root = vectors[:, kept] * np.sqrt(values[kept])                            # (d, rank), Rᵀ
    spectrum = eigvalsh(root.T @ b.covariance @ root) if kept.any() else np.zeros(1)
    cross = np.sqrt(spectrum.clip(min=0)).sum()
    apart = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return max(0.0, float(apart @ apart + traces - 2 * cross))


# ------------------------------------------------------------------------------- eval.py fid

def fid(config) -> None:
    """`fid A B`: the distance between two sets of images, each a folder or an .npz."""
    paths = [expand(path) for path in config.paths]
    require((len(paths) != 2 and not (len(paths) == 1 and config.save),
             "fid takes two folders of images or .npz files, or one and --save FILE"))
    stored = {path: Statistics.load(path) for path in paths if path.suffix.lower() == ".npz"}
    folders = [path for path in paths if path not in stored]
    for folder in folders:
        image_files(folder)             # a missing folder is found before a network is loaded
    name, extractor = _extractor_for(config, folders[0]) if folders else ("", None)
    sets = [stored.get(path) or folder_statistics(config, path, name, extractor) for path in paths]
    if config.save:
        _save(sets[0], expand(config.save))
    if len(sets) == 2:
        _report(config, paths, sets, extractor)


def _extractor_for(config, folder: Path) -> tuple[str, Callable]:
    miniature = has_miniature_size(folder) and not find_inception(config.inception)
    if miniature:
        print("the images are 64 x 64: taken for the miniature's, and read by its own CLIP; "
              "--inception FILE gives their FID", file=sys.stderr)
    return choose_extractor(miniature, config.clip_model, config.inception, config.device,
                            prefer_clip=bool(config.clip_model))


def folder_statistics(config, folder: Path, name: str, extractor: Callable) -> Statistics:
    """The statistics of the features of a folder's images."""
    statistics = Statistics(feature_name(name, extractor))
    with tqdm(total=len(image_files(folder)), unit="image", desc=folder.name, leave=False) as bar:
        for _, images in images_in(folder, config.batch, config.skip_bad):
            statistics.add(extractor(images.to(config.device)))
            bar.update(len(images))
    return statistics


def _save(statistics: Statistics, file: Path) -> None:
    # A file is read as statistics by its ending, so it gets that ending.
    file = file if file.suffix.lower() == ".npz" else file.with_name(f"{file.name}.npz")
    statistics.save(file)
    print(f"statistics of {statistics.n or 'some'} images in {file}")


def _report(config, paths: list[Path], sets: list[Statistics], extractor: Callable | None) -> None:
    """Prints and writes the distance, under the name of the features that it compares."""
    names = list(dict.fromkeys(s.features for s in sets if s.features))
    if len(names) > 1:
        raise BadInput(f"{paths[0]} and {paths[1]} hold features of different networks: "
                       f"{names[0]}; {names[1]}")
    name = (names or ["Fréchet distance of unnamed features"])[0].partition(", weights")[0]
    value = frechet(*sets)
    first, second = (f"{s.n:,}" if s.n else "an unknown number of" for s in sets)
    print(f"{name}: {value:.4f}\nbetween {first} images of {paths[0]} and {second} of {paths[1]}")
    for warning in _warnings(sets, name):
        print(f"warning: {warning}", file=sys.stderr)
    write_result(result_file(config), {
        "score": name, "value": value,
        "network": extractor.protocol if extractor else "as in the .npz files",
        "sets": [_describe(path, side) for path, side in zip(paths, sets)]} | provenance(config))


def _describe(path: Path, side: Statistics) -> dict:
    if path.is_dir():
        return {"folder": str(path), "images": side.n, "left out": len(image_files(path)) - side.n}
    return {"file": str(path), "images": side.n or None, "sha256": sha256(path)}


def _warnings(sets: list[Statistics], name: str) -> list[str]:
    """Why a distance should not be trusted."""
    n = min((s.n for s in sets if s.n), default=0)
    d = sets[0].mean.size
    warnings = []
    if name == "FID" and 0 < n < FEW:
        warnings.append(f"FID of {n} images is biased upwards: take at least {FEW:,}, and compare "
                        "it only with FIDs of as many")
    if 0 < n <= d:
        warnings.append(f"{n} images can't fill {d} dimensions: the covariance is singular")
    return warnings
