"""`python -m rollout.sglang.cpu`: SGLang's server with the patches of this folder. Takes SGLang's own arguments."""

from __future__ import annotations

import os
import sys
import traceback

from rollout.sglang import cpu


def serve(arguments: list[str]) -> None:
    """Serve until told to stop; no child process is left behind. Does not return."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    exit_code = 0
    try:
        run_server(prepare_server_args(arguments))
    except SystemExit as end:
        exit_code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        exit_code = 1
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not a normal exit: extension modules would then print hundreds of lines about leaks, and bury the reason of an end.
        os._exit(exit_code)


# Not under the guard: a child process that is started by spawn imports its main module again, and needs the patches too.
cpu.install()

if __name__ == "__main__":
    serve(sys.argv[1:])
