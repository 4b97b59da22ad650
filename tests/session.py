"""What the processes of one test run share: a temporary folder, and the cache of compiled programs.

The programs are kept between runs, as compiling takes most of the tests' time.
"""

import atexit
import contextlib
import fcntl
import os
import pathlib
import platform
import shutil
import tempfile
import time

import jax
from jax._src import compilation_cache

from densejax.training import parallel

CACHES = pathlib.Path("~/.cache/densejax/tests-compiled").expanduser()
LARGEST_CACHE = 2**30  # bytes; above that, the programs are compiled anew
LONGEST_UNUSED = 30 * 24 * 3600  # seconds; after that, a cache of other versions is removed


def _new_folder():
    """A folder that this process removes as it ends, or that a later run removes in its place."""
    pattern = f"densejax-tests-{os.getuid()}-"
    for other in pathlib.Path(tempfile.gettempdir()).glob(f"{pattern}*"):
        # A process that lives holds its lock; one that was killed does not.
        with contextlib.suppress(OSError), (other / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=pattern))
    lock = (folder / "new").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / "new").rename(folder / "lock")  # never seen without being held
    atexit.register(lambda: (shutil.rmtree(folder, ignore_errors=True), lock.close()))
    return folder


def _cache():
    """The folder of compiled programs for this processor and these versions."""
    versions = f"python{platform.python_version()}-jax{jax.__version__}"
    cache = CACHES / f"{parallel.processor()}-{versions}"
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        _tidy(cache)
    except OSError:  # a home directory that cannot be written
        return FOLDER / "compiled"
    return cache


def _tidy(cache):
    """Removes what is damaged, too much or of no use any more; the `checked` file has the time."""
    for other in CACHES.iterdir():
        if time.time() - other.stat().st_mtime > LONGEST_UNUSED and other != cache:
            shutil.rmtree(other, ignore_errors=True)
    stamp = cache / "checked"
    checked = stamp.stat().st_mtime if stamp.exists() else 0.0
    programs = [(path, path.stat()) for path in cache.glob("*-cache")]
    too_large = sum(facts.st_size for _, facts in programs) > LARGEST_CACHE
    for path, facts in programs:
        if too_large or (facts.st_mtime >= checked and _is_damaged(path)):
            path.unlink(missing_ok=True)
    stamp.unlink(missing_ok=True)  # a new file: the folder's own time changes too
    stamp.touch(mode=0o600)


def _is_damaged(path):
    """Whether the process that wrote a program was killed meanwhile: JAX would never replace it."""
    try:
        compilation_cache.decompress_executable(path.read_bytes())
    except Exception:
        return True
    return False


if "DENSEJAX_TESTS" in os.environ:  # a worker or another child of the first process
    FOLDER = pathlib.Path(os.environ["DENSEJAX_TESTS"])
else:
    FOLDER = _new_folder()
    os.environ["DENSEJAX_TESTS"] = str(FOLDER)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_cache())

ENVIRONMENT = {
    "DENSEJAX_TESTS": str(FOLDER),
    "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "4",
}
jax.config.update("jax_compilation_cache_dir", ENVIRONMENT["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
