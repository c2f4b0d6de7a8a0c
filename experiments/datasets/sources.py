"""Where the files of the data sets are, where they come from, and the errors when they are absent or broken."""

import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

ENVIRONMENT_VARIABLE = "CEDARJAX_DATA"


class DatasetNotFoundError(FileNotFoundError):
    """A data set is not on this machine; the message says where it was looked for and how to get it."""


class DataError(ValueError):
    """A data file does not hold what it should; the message names the file, the key and what was expected."""


class Source(NamedTuple):
    """One data file."""

    file: str
    """Path below the data directory."""
    origin: str
    """The original public source."""
    licence: str
    """Licence of the original."""
    contents: str
    """What the arrays of the file must be."""


_TABLE = (
    "x float32 [n, {d}], y [n], client_id int [n] (0..49 training clients, 50..59 test clients), "
    "split uint8 [n] (1 = test client)"
)
_UCI = "UCI Machine Learning Repository"
_SPLITS = "the non-IID client splits of it in the repository IntelligentSystemsLab/generic_and_open_learning_federator"

SOURCES = {
    "wisdm": Source(
        "wisdm/watch_accel_w100.npz",
        f"WISDM Smartphone and Smartwatch Activity and Biometrics Dataset (Weiss, 2019), {_UCI}, id 507",
        "CC BY 4.0",
        "x float32 [n, 100, 3] (watch acceleration in m/s^2, 5 s at 20 Hz), y int [n] 0..5, client_id int [n], "
        "user int [51], classes text [6]",
    ),
    "beijing-air": Source(
        "beijing_air/hourly.npz",
        f"Beijing Multi-Site Air Quality (Chen, 2019), {_UCI}, id 501",
        "CC BY 4.0",
        "sensors float32 [n, 11] (PM2.5, PM10, SO2, NO2, CO, O3, TEMP, PRES, DEWP, RAIN, WSPM; NaN = missing), "
        "time int [n, 4] (year, month, day, hour), wind_dir int [n] (0..15, -1 = missing), client_id int [n], "
        "stations text [12]",
    ),
    "omniglot": Source(
        "omniglot/background_small.npz",
        "Omniglot (Lake, Salakhutdinov and Tenenbaum, 2015), repository brendenlake/omniglot, "
        "images_background_small1.zip and images_background_small2.zip",
        "MIT",
        "x28 uint8 [4840, 28, 28] (ink = 255), char_id int [4840] 0..241",
    ),
    "mnist": Source(
        "mnist/full70k_pfllib_dir20.npz",
        "MNIST (LeCun, Cortes and Burges, 1998), in the 20-client split of the repository TsingZ0/PFLlib",
        "CC BY-SA 3.0",
        "x uint8 [70000, 28, 28], y uint8 [70000], client_id int [70000] 0..19, "
        "from_t10k bool [70000] (true for the original test images)",
    ),
    "redwine": Source(
        "RedWineQuality/alpha{alpha}.npz",
        f"Wine Quality (Cortez et al., 2009), {_UCI}, id 186; {_SPLITS}",
        "CC BY 4.0 (data), MIT (splits)",
        _TABLE.format(d=11) + ", y int, quality 3..7",
    ),
    "california": Source(
        "CaliforniaHousing/alpha{alpha}.npz",
        f"California Housing (Pace and Barry, 1997), StatLib; {_SPLITS}",
        "public (data), MIT (splits)",
        _TABLE.format(d=8) + ", y float, house value in 100 000 $",
    ),
    "bike": Source(
        "BikeSharingDataset/alpha{alpha}.npz",
        f"Bike Sharing (Fanaee-T and Gama, 2013), {_UCI}, id 275; {_SPLITS}",
        "CC BY 4.0 (data), MIT (splits)",
        _TABLE.format(d=15) + ", y float, rescaled rental count",
    ),
    "olscancer": Source(
        "OLSCancer/alpha{alpha}.npz",
        f"OLS Regression Challenge on cancer mortality (Rippner, 2017), data.world; {_SPLITS}",
        "see data.world (data), MIT (splits)",
        _TABLE.format(d=31) + ", y float, deaths per 100 000",
    ),
}


def data_directory(data_dir: str | os.PathLike[str] | None = None) -> tuple[Path | None, str]:
    """The data directory, and in words where it was looked for.

    The argument wins; then the environment variable `CEDARJAX_DATA`; then `shared/data` beside the repository.
    """
    if data_dir is not None:
        return Path(data_dir), f"{Path(data_dir)} (the data directory asked for)"
    if value := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(value), f"{Path(value)} (${ENVIRONMENT_VARIABLE})"
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    where = f"{beside}; ${ENVIRONMENT_VARIABLE} is not set and no data directory was given"
    return (beside if beside.is_dir() else None), where


def find(name: str, data_dir: str | os.PathLike[str] | None = None, **parts: object) -> Path:
    """Path of the file of a data set.

    Args:
      name: a key of `SOURCES`.
      data_dir: see `data_directory`.
      **parts: what the file's name is completed with, for example `alpha=0.5`.

    Raises:
      DatasetNotFoundError: saying where it was looked for and how to get it.
    """
    source = SOURCES[name]
    file = source.file.format(**parts)
    directory, where = data_directory(data_dir)
    if directory is not None and (directory / file).is_file():
        return directory / file
    raise DatasetNotFoundError(
        f"data set {name!r} is not on this machine: no file {file} in {where}.\n"
        f"  Source:   {source.origin}\n"
        f"  Licence:  {source.licence}\n"
        f"  To use it, store it as {file} with the arrays {source.contents};\n"
        f"  then pass --data-dir DIR (data_dir=) or set {ENVIRONMENT_VARIABLE}=DIR.\n"
        "  The sets 'digits' and 'synthetic-iot' need no files."
    )


def read(path: str | os.PathLike[str], keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Reads arrays of an `.npz` file; nothing is unpickled.

    Args:
      path: the file.
      keys: arrays that must be there.
      optional: arrays that are read when they are there.

    Raises:
      DatasetNotFoundError: when there is no such file.
      DataError: when the file is no `.npz`, is damaged, lacks a key or holds Python objects.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetNotFoundError(
            f"{path} must be an .npz file with the arrays {', '.join(keys)}; there is no such file."
        )
    try:
        with open(path, "rb") as handle:
            file = np.load(handle, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{path} must be an .npz file with named arrays, it is a single .npy array.")
            missing = [key for key in keys if key not in file.files]
            if missing:
                held = ", ".join(file.files) or "nothing"
                raise DataError(
                    f"{path} must hold the arrays {', '.join(keys)}; {', '.join(missing)} is absent, it holds {held}."
                )
            wanted = [*keys, *(key for key in optional if key in file.files)]
            return {key: _member(path, file, key) for key in wanted}
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(f"{path} must be an .npz file, it is damaged or something else: {error}") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} must be an .npz file, it is something else: {error}") from error


def check_lengths(path: Path, arrays: dict[str, np.ndarray], keys: tuple[str, ...]) -> None:
    """Raises a DataError unless the named arrays have the same, positive number of rows."""
    lengths = {key: (len(arrays[key]) if arrays[key].ndim else None) for key in keys}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        told = ", ".join(f"{key} {list(arrays[key].shape)}" for key in keys)
        raise DataError(f"{path}: {', '.join(keys)} must have one row for each example, got shapes {told}.")
    if 0 in lengths.values():
        raise DataError(f"{path}: {keys[0]} must hold at least 1 example, got 0.")


def check_finite(path: Path, key: str, array: np.ndarray) -> None:
    """Raises a DataError that names the first row with a NaN or an infinity."""
    bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if bad.any():
        raise DataError(
            f"{path}: {key} must be finite, got {bad.sum()} rows with NaN or infinity, the first is row {bad.argmax()}."
        )


def check_range(path: Path, key: str, array: np.ndarray, low: int, high: int) -> None:
    """Raises a DataError unless all entries of an integer array lie in `low..high`."""
    if not np.issubdtype(array.dtype, np.integer) or array.min() < low or array.max() > high:
        got = f"{array.min()}..{array.max()}" if array.size else "nothing"
        raise DataError(f"{path}: {key} must hold integers {low}..{high}, got {got} of dtype {array.dtype}.")


def check_shape(path: Path, key: str, array: np.ndarray, shape: tuple[int | None, ...]) -> None:
    """Raises a DataError unless the array has this shape; None stands for any size."""
    fits = array.ndim == len(shape) and all(w is None or w == s for w, s in zip(shape, array.shape, strict=True))
    if not fits:
        wanted = ", ".join("n" if size is None else str(size) for size in shape)
        raise DataError(f"{path}: {key} must have shape [{wanted}], got {list(array.shape)}.")


def _member(path: Path, file: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    try:
        return file[key]
    except (ValueError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(f"{path}: array {key} cannot be read: {error}") from error
    except Exception as error:  # zlib.error and kin derive from Exception alone
        raise DataError(f"{path}: array {key} is damaged: {error}") from error
