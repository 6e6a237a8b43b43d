"""What every command line here has in common."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro

from nanochat_jax.errors import Stopped, UserError


def run[C](main: Callable[[C], Any], config_class: type[C]) -> None:
    """Parse sys.argv into a config and run a stage; what users can mend is told without a traceback.

    The help text is the docstring of the stage's module; nested fields are written --model.depth.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    _use_compilation_cache()
    _keep_freed_memory()
    try:
        module = inspect.getmodule(main)
        name = module.__spec__.name if module and module.__spec__ else None
        config = tyro.cli(config_class, prog=name and f"python -m {name}", description=inspect.getdoc(module))
        if "jax" in sys.modules:
            hosts().join()
        main(config)
    except UserError as error:
        if "jax" in sys.modules:
            hosts().fail(str(error))
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        if hosts().is_first():
            print(f"{stopped}. Run the same command to go on.", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception:
        if "jax" in sys.modules:
            hosts().crash()
        raise


def hosts() -> ModuleType:
    """Of stages that compute: it imports jax, without which others start faster."""
    from nanochat_jax import hosts

    return hosts


def _keep_freed_memory() -> None:
    """On a CPU, let malloc keep what a step frees for the next: else the system clears its pages anew each time.

    Has to come before JAX starts its threads, so that what it will run on is told by what is installed.
    """
    accelerated = importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu")
    if "jax" not in sys.modules or os.environ.get("JAX_PLATFORMS", "" if accelerated else "cpu") != "cpu":
        return
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-8, 1), (-4, 0), (-1, -1)):  # one arena, nothing by mmap, nothing given back
            libc.mallopt(option, value)


def _use_compilation_cache() -> None:
    """Keep compiled programs from one command to the next; jax's own environment variables win."""
    if "jax" not in sys.modules:
        return  # a stage that computes nothing starts faster without it
    import jax

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nanochat_jax" / "xla"
    settings = {"jax_compilation_cache_dir": str(cache), "jax_persistent_cache_min_compile_time_secs": 1.0}
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
