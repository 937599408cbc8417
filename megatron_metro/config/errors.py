"""Errors a user can cause, each with the exit code its process ends with."""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# What a user can do nothing about would bury what a tool says. Set here because every entry point loads this module
# before megatron-core, which warns of NVIDIA's kernels that are not there, of a default of its own and of its
# distributed optimizer's gradients, and calls torch.distributed by names that torch 2.13 calls old.
warnings.filterwarnings("ignore", "(Transformer Engine and )?Apex (are|is) not installed", UserWarning)
warnings.filterwarnings("ignore", "full scope is deprecated. Use empty cuda_graph_scope", UserWarning)
warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor", UserWarning, r"megatron\.core\.optimizer")
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


class MetroError(Exception):
    """Base of all errors that end a tool with one line on standard error; subclasses choose the exit code."""

    exit_code: int = 70


class ConfigError(MetroError, ValueError):
    """A flag, a configuration file or a combination of them cannot work."""

    exit_code = 64


class DataError(MetroError, ValueError):
    """Text, token files or a tokenizer are missing, damaged or do not belong together."""

    exit_code = 65


class CheckpointError(MetroError, ValueError):
    """A checkpoint is missing, damaged or does not fit the run."""

    exit_code = 66


class OutOfMemoryError(MetroError):
    """A device or the host has no memory left."""

    exit_code = 71


class StorageError(MetroError, OSError):
    """The file system refused a write."""

    exit_code = 74


class StoppedError(MetroError):
    """A signal has ended the run before its end; 128 + the signal's number when nothing could be saved."""

    exit_code = 75

    def __init__(self, message: str, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NumericError(MetroError):
    """Losses or gradients are not finite, again and again."""

    exit_code = 76


class UnsafeError(MetroError, ValueError):
    """A file asks for something that could run foreign code."""

    exit_code = 77


class PeerError(MetroError):
    """Another process of the job died, stopped answering or never came."""

    exit_code = 78


def first_line(error: BaseException) -> str:
    """Kind and first line of an error's text, to go into an error of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process with one line on standard error and the error's exit code when the body raises a MetroError.

    Ctrl-C, as a shell reports it, is one line too; a reader of standard output that has gone needs none. Any other
    exception is a fault of ours: its traceback, and exit code 70.
    """
    try:
        yield
        sys.stdout.flush()
    except MetroError as error:
        sys.stderr.write(f"error: {' '.join(str(error).splitlines())}\n")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        # Python flushes once more at its end, which must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except Exception:  # noqa: BLE001 (whatever it is, its exit code tells it from what a user can mend)
        traceback.print_exc()
        raise SystemExit(MetroError.exit_code) from None
