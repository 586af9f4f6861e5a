"""torchrun for the launch files: the same arguments, and one line in place of its report when a rank fails.

A rank that ends with an error of the user prints one line itself, and one that crashes prints its traceback. torchrun
would add forty lines of its own. The exit status is that of the rank that failed first, and 128 + N after signal N.

With PET_LOG_DIR=DIR, what each rank prints is also written to DIR/TIME-NODE/.../attempt_N/LOCAL_RANK/stdout.log and
stderr.log, and each line of the terminal begins with the rank. PET_TEE and PET_REDIRECTS choose otherwise.
"""

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

EXIT_USER_ERROR = 2
EXIT_NO_MEETING = 1


def main(arguments: list[str]) -> int:
    """Run torchrun in this process; returns the exit status."""
    # It logs which process it ends and which one has failed, and a signal that it has got.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.ERROR)
    with log_folder() as logs:
        options = run.parse_args(["--log-dir", logs, *arguments])
        try:
            run.run(options)
        except ChildFailedError as error:
            rank, failure = cause(error.failures)
            if failure.exitcode < 0:
                print(f"error: rank {rank}: {failure.message}", file=sys.stderr, flush=True)
                return 128 - failure.exitcode
            return failure.exitcode
        except (RendezvousError, DistError) as error:
            reason = " ".join(str(error.__cause__ or error).split()).partition(" Exception raised from")[0]
            print(f"error: the nodes cannot meet at {options.rdzv_endpoint}: {reason}", file=sys.stderr, flush=True)
            return EXIT_NO_MEETING
        except SignalException as error:  # from a rank whose error a restart cannot mend, or from outside
            errors = [json.loads(file.read_text()) for file in Path(logs).rglob("error.json")]
            texts = [error["message"]["message"] for error in errors if isinstance(error["message"], dict)]
            return EXIT_USER_ERROR if any(text.startswith("error: ") for text in texts) else 128 + error.sigval
    return 0


def cause(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The failed rank that the others have ended with.

    It is the first one. But a rank that torchrun has ended with SIGTERM comes last, although it may have noted the same
    error in the same second, and may have waited for another one to print it.
    """
    return min(failures.items(), key=lambda one: (one[1].exitcode == -signal.SIGTERM, one[1].timestamp))


@contextmanager
def log_folder() -> Iterator[str]:
    """A new folder for the files of the ranks: in PET_LOG_DIR, or temporary."""
    kept = os.environ.get("PET_LOG_DIR")
    if not kept:
        with tempfile.TemporaryDirectory() as folder:
            yield folder
        return
    os.environ.setdefault("PET_REDIRECTS", "3")  # stdout and stderr of every rank to files,
    os.environ.setdefault("PET_TEE", "3")  # and to the terminal
    os.environ.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[rank ${rank}] ")
    yield str(Path(kept) / f"{time.strftime('%Y-%m-%dT%H-%M-%S')}-{socket.gethostname()}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
